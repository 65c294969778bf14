"""train_identity.py: the step, a whole run, and everything that may happen to a run."""

import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import ranks
import torch
from conftest import ROOT, TinyFaces
from PIL import Image
from tqdm import tqdm

import ablation
import benchmark
import data_utils
import evaluate
import super_resolve
import train_identity
import training_step
from data_utils import TrainDatasetFromFolder
from model import Discriminator, Generator
from support import checkpoints, demo, figures, machine, run_folder
from support.cli import InputError, run_script
from support.figures import save_curves

REPORT_COLUMNS = "Epoch,Loss_D,Loss_G,Score_D,Score_G,PSNR,SSIM,Cosine"


def flags(faces, out_dir, *more):
    """A run of a second: 16 px, 2x, no VGG (alpha 0)."""
    return ["--train_dir", f"{faces}/train", "--valid_dir", f"{faces}/valid", "--crop_size", "16",
            "--upscale_factor", "2", "--batch_size", "2", "--num_epochs", "2",
            "--alpha", "0", "--face_weights", "random", "--device", "cpu", "--precision", "fp32",
            "--out_dir", str(out_dir), *more]


def weights(folder, epoch=2):
    return torch.load(folder / f"netG_epoch_2_{epoch}.pth", weights_only=True)


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


@pytest.fixture(scope="module", autouse=True)
def without_what_takes_long():
    """The face network and drawing curves each take longer than a tiny run; see `small_run`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_step, "load_face_network", lambda weights: TinyFaces())
        patch.setattr(train_identity, "LAZY_INTERVAL", 2)
        patch.setattr(figures, "save_curves", lambda table, path: None)
        yield


@pytest.fixture(scope="module")
def finished(faces, tmp_path_factory):
    """A finished run with all its files: one pixel epoch, one GAN epoch."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "save_curves", save_curves)
        train_identity.main(flags(faces, folder))
    return folder


# ---------------------------------------------------------------------------------------------
# The step


load_vgg, load_face_network = (functools.cache(load) for load in (
    training_step.load_vgg, training_step.load_face_network))


def small_run(*more):
    """(trainer, LR, HR): four images of 32 px, 8x, with both frozen networks (random weights)."""
    args = train_identity.parse(
        ["--crop_size", "32", "--batch_size", "4", "--vgg_weights", "random", "--face_weights",
         "random", "--device", "cpu", "--precision", "fp32", "--gamma", "3", *more])
    with pytest.MonkeyPatch.context() as patch:
        # copies: a trainer in bf16 casts its own
        patch.setattr(training_step, "load_vgg", lambda weights: deepcopy(load_vgg(weights)))
        patch.setattr(training_step, "load_face_network",
                      lambda weights: deepcopy(load_face_network(weights)))
        trainer = training_step.build_trainer(args, torch.device("cpu"), 1)
    trainer.netG.train()
    trainer.netD.train()
    generator = torch.Generator().manual_seed(5)
    return (trainer, torch.rand(4, 3, 4, 4, generator=generator),
            torch.rand(4, 3, 32, 32, generator=generator))


@pytest.mark.parametrize("without", [
    (), ("mixed_batches", "back_projection"),
    ("mixed_batches", "back_projection", "cross_entropy")])
def test_step_equals_the_straightforward_loop(without):
    """Same losses and same gradients as autograd on L_total in NCHW (benchmark.py).

    The weights give each term a gradient at SR about as long as the pixel loss's. Pictures of a new
    generator that projects back are so alike that BatchNorm, in a batch of them alone, enlarges
    rounding errors.
    """
    more = ["--alpha", "100", "--beta", "0.1", "--gamma", "10000", "--without", "ratio_bound",
            *without]
    fast, lr, hr = small_run(*more)
    plain, _, _ = small_run(*more)
    for network in (plain.netG, plain.netD):
        network.to(memory_format=torch.contiguous_format)
    expected = benchmark.reference_step(plain, lr, hr)

    fast.chunk = fast.checkpoint_chunk = 3
    targets = training_step.batch_targets(fast, [0, None, 1, None], hr)
    values = training_step.train_step(fast, lr, hr, targets, True, True).nan_to_num(0)
    logged = dict(zip(training_step.LOGGED, values.tolist()))  # nan: weight 0, left out

    for name in ("pixel", "content", "adversarial", "identity", "loss_d"):
        assert logged[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-12), name
    for ours, theirs in ((fast.netG, plain.netG), (fast.netD, plain.netD)):
        largest = max(p.grad.abs().max().item() for p in theirs.parameters())
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-2, atol=1e-3 * largest,
                                       msg=lambda m, n=name: f"{n} {m}")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_takes_nearly_the_same_step(precision):
    """Losses within 2 % of the fp32 reference's; bf16 holds 8 bits, 0.4 %, of each value.

    In fp16 the gradients come with the GradScaler's factor; there a CPU takes its time for VGG.
    """
    alpha, gamma, n = ("100", "10000", 4) if precision == "bf16" else ("0", "0", 2)
    weights = ["--alpha", alpha, "--beta", "0.1", "--gamma", gamma, "--without", "ratio_bound",
               "back_projection",  # with which a new generator's errors are too small for bf16
               "--seed", "2"]  # bf16 shortens G's gradient by 1 to 13 % over seeds, here by 1 %
    fast, lr, hr = small_run("--precision", precision, *weights)
    plain, _, _ = small_run(*weights)
    lr, hr = lr[:n], hr[:n]
    expected = benchmark.reference_step(plain, lr, hr)
    with fast.autocast():
        targets = training_step.batch_targets(fast, [0, None, 1, None][:n], hr)
    values = training_step.train_step(fast, lr, hr, targets, True, True)
    assert values.dtype == torch.float32
    logged = dict(zip(training_step.LOGGED, values.nan_to_num(0).tolist()))
    for name in ("pixel", "content", "adversarial", "identity", "loss_d"):
        assert logged[name] == pytest.approx(expected[name], rel=0.02), name
    for ours, theirs, apart in ((fast.netG, plain.netG, 0.05), (fast.netD, plain.netD, 0.02)):
        a, b = (torch.cat([p.grad.flatten() for p in network.parameters()])
                for network in (ours, theirs))
        assert a.dtype == torch.float32
        assert torch.cosine_similarity(a, b, dim=0) > 0.95
        length = (a.norm() / b.norm() / fast.scaler.get_scale()).item()
        assert length == pytest.approx(1, abs=apart)


def test_frozen_networks_are_cast_once():
    """Not in every step, and with the same result to the bit."""
    run, _, hr = small_run("--precision", "bf16")
    plain, _, _ = small_run("--precision", "fp32")
    with run.autocast():
        for ours, theirs in zip(run.loss.targets(hr), plain.loss.targets(hr)):
            assert torch.equal(ours, theirs)
    for network in (run.loss.vgg, run.face_network):
        layers = [m for m in network.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
        assert {m.weight.dtype for m in layers} == {torch.bfloat16}


def test_launches_are_counted_by_hand():
    a, b, w = torch.ones(2, 3), torch.ones(3, 4), torch.ones(5, requires_grad=True)

    def tiny():
        x = torch.empty(2, 3).copy_(a)          # 1: an allocation is none
        y = (x @ b).t()[1:].unsqueeze(0)        # 1: views are none
        torch._foreach_add_([x, y], 1)          # 1: two tensors at once
        torch.cat(y.split(2, 1), 1)             # 1
        torch.autograd.grad((3 * w).sum(), w)   # 4: product, sum, a one, product

    with benchmark.Launches() as counter:
        tiny()
    assert counter.count == 8


def test_no_step_launches_more_than_it_has_to():
    """The figures are those of results/EXPERIMENTS.md, of which BatchNorm's counters 11 and 25."""
    run, lr, hr = small_run()
    training_step.train_step(run, lr, hr, None, True, False)
    training_step.apply_updates(run, True)  # makes the optimisers' moments
    before = run.chunk, run.checkpoint_chunk
    launches = benchmark.step_launches(run, lr, hr)
    assert list(launches) == ["pixel", "GAN", "perceptual"]
    for count, most in zip(launches.values(), (181, 496, 1342)):
        assert 0.9 * most < count <= most, launches
    assert (run.chunk, run.checkpoint_chunk) == before


def test_the_arithmetic_is_counted_in_any_precision():
    flop = [benchmark.step_flop(run, lr[:1], hr[:1]) for run, lr, hr in (
        small_run("--precision", precision) for precision in ("fp32", "bf16"))]
    assert flop[0] == flop[1] > 1e9


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="its memory is managed otherwise")
def test_freed_memory_is_kept():
    def resident():  # MiB
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2 ** 20

    machine.keep_freed_memory()
    block = torch.ones(2 ** 26)  # 256 MiB
    full = resident()
    del block
    assert resident() > full - 20


def test_the_benchmark_times_every_kind_of_crops(faces, monkeypatch):
    """16 epochs of 6 photographs in 2 seconds, on one thread; then the threads are as before."""
    threads = []
    monkeypatch.setattr(benchmark, "timed",
                        lambda *_: threads.append(torch.get_num_threads()) or 2.0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    flags = SimpleNamespace(crop_size=16, upscale_factor=2)
    rates = benchmark.data_path(faces / "train", flags, torch.device("cpu"))
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert rates == {"center": 48, "random": 48, "mixed": 48}
    assert set(threads) == {1} and after == 2


def test_a_benchmark_whose_process_died_says_so():
    pipe, end = multiprocessing.Pipe()
    end.close()
    with pytest.raises(InputError, match="--batch_size"):
        benchmark.ask(pipe, "step")


def test_lazy_terms_weigh_what_they_weigh_every_step():
    """With a weight of 3 the identity gradient at SR is three times as large."""
    gradients = []
    for weight in (1, 3):
        run, lr, hr = small_run("--alpha", "0", "--beta", "0", "--gamma", "1000")
        targets = run.loss.targets(hr)
        training_step.train_step(run, lr, hr, None, False, False)
        pixel = run.netG.last.weight.grad.clone()
        run.netG.zero_grad()
        training_step.train_step(run, lr, hr, targets, False, True, weight)
        gradients.append(run.netG.last.weight.grad - pixel)
    torch.testing.assert_close(gradients[1], 3 * gradients[0], rtol=1e-2, atol=1e-4)


def test_targets_of_a_batch_are_those_of_each_image():
    """In its order, whether kept or not; what is kept is not computed again."""
    run, _, hr = small_run()
    first = training_step.batch_targets(run, [7, None, 8, None], hr)
    again = training_step.batch_targets(run, [8, None, 7, None], hr * 0)  # black, but for the kept
    for column, later, images in zip(first, again, zip(*map(run.loss.targets, hr.split(1)))):
        torch.testing.assert_close(column, torch.cat(images), rtol=1e-3, atol=1e-5)
        assert torch.equal(later[0], column[2]) and torch.equal(later[2], column[0])
        assert torch.equal(later[1], later[3]) and not torch.equal(later[1], column[1])
    run, _, hr = small_run("--alpha", "0", "--gamma", "0")
    assert training_step.batch_targets(run, [7, None, 8, None], hr) == [None, None]


@pytest.mark.parametrize("bound", [0, 0.5, 1e6])
def test_the_adversarial_gradient_is_bounded(bound):
    """By autograd on the terms: at SR at most `bound` times as long as the pixel gradient."""
    run, lr, hr = small_run("--alpha", "0", "--gamma", "0", "--beta", "0.1")
    run.max_ratio = bound
    plain, _, _ = small_run("--alpha", "0", "--gamma", "0")
    sr = plain.netG(lr)
    fake = torch.cat([plain.netD(torch.cat([real, made]))[2:]
                      for real, made in zip(hr.chunk(2), sr.chunk(2))])
    adversarial, = torch.autograd.grad(0.1 * -torch.sigmoid(fake).log().mean(), sr,
                                       retain_graph=True)
    pixel, = torch.autograd.grad((sr - hr).square().mean(), sr, retain_graph=True)
    ratio = (adversarial.norm() / pixel.norm()).item()
    assert ratio > 1
    sr.backward(pixel + 4 * adversarial * (0.5 / ratio if bound == 0.5 else 1))

    values = training_step.train_step(run, lr, hr, None, True, False, interval_weight=4)
    assert values[training_step.LOGGED.index("ratio")] == pytest.approx(ratio, rel=1e-4)
    for ours, expected in zip(run.netG.parameters(), plain.netG.parameters()):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("with_gan", [False, True])
def test_the_first_update_is_adams(with_gan):
    """The rate times g / (|g| + eps); D is left alone in a pixel step."""
    run, lr, hr = small_run("--alpha", "0", "--gamma", "0", "--lr", "0.01", "--lr_d", "0.001",
                            "--without", "stripe_filter", "slow_d")
    training_step.train_step(run, lr, hr, None, with_gan, False)
    expected = [p - rate * p.grad / (p.grad.abs() + 1e-8) if p.grad is not None else p.clone()
                for network, rate in ((run.netG, 0.01), (run.netD, 0.001))
                for p in network.parameters()]
    assert (next(run.netD.parameters()).grad is not None) == with_gan
    average = [2 / 11 * a + 9 / 11 * b for a, b in zip(run.average.parameters(), expected)]
    training_step.apply_updates(run, with_gan)
    for mean, after in zip(run.average.parameters(), average):
        torch.testing.assert_close(mean.detach(), after.detach(), rtol=1e-5, atol=1e-6)
    for p, after in zip([*run.netG.parameters(), *run.netD.parameters()], expected):
        torch.testing.assert_close(p, after, rtol=1e-5, atol=1e-6)
        assert p.grad is None  # the next step's gradients are not added to this one's


@pytest.mark.parametrize("without, first", [([], 2.0), (["slow_d"], 1.0)])
def test_d_begins_at_twice_its_rate(without, first, monkeypatch):
    monkeypatch.setattr(training_step, "WARM_UP_D", 2)
    trainer, lr, hr = small_run("--alpha", "0", "--gamma", "0", "--lr_d", "0.001", "--without",
                                *without)
    rates = []
    for with_gan in (True, False, True, True):
        training_step.train_step(trainer, lr, hr, None, with_gan, False)
        rates.append(trainer.optimizerD.param_groups[0]["lr"])
        training_step.apply_updates(trainer, with_gan)
    assert rates == [0.001 * first, 0.001 * first, 0.001 * first, 0.001]


def test_average_ramps_up():
    """After one update the average is (2/11) old + (9/11) new; the limit holds later.

    So are BatchNorm's statistics; its counters are the network's own.
    """
    run, _, _ = small_run()
    old, new = deepcopy(run.netG), run.netG
    for value in new.state_dict().values():
        value.add_(3)
    for updates, limit, kept in ((1, 0.999, 2 / 11), (10 ** 6, 0.9, 0.9)):
        average = deepcopy(old)
        training_step.update_average(average, new, updates, limit)
        for mean, a, b in zip(*(net.state_dict().values() for net in (average, old, new))):
            expected = kept * a + (1 - kept) * b if a.is_floating_point() else b
            torch.testing.assert_close(mean, expected)


def test_report_recipe_undoes_every_departure():
    args = train_identity.parse(["--recipe", "report"])
    assert (args.batch_size, args.lr, args.lr_d, args.pretrain_epochs) == (32, 1e-4, 1e-4, 0)
    assert args.without == list(train_identity.DEPARTURES) and args.precision == "fp32"
    assert (args.alpha, args.beta, args.gamma) == (0.005, 0.001, 0.6)
    trainer = training_step.build_trainer(
        train_identity.parse(["--recipe", "report", "--alpha", "0", "--face_weights", "random"]),
        torch.device("cpu"), 10)
    assert trainer.loss.gan_loss == "linear" and not trainer.mixed_batches
    assert trainer.max_ratio == 0 and not trainer.stripe_filter
    assert trainer.average is trainer.netG
    assert trainer.optimizerD.param_groups[0]["betas"] == (0.9, 0.999)
    assert trainer.scheduleG.lr_lambdas[0](10) == 1
    weight = trainer.netG.upsample[0].conv.weight
    assert not torch.equal(weight[0], weight[1])  # ICNR would make them equal
    assert args.crop == "random"


def test_the_training_set_is_what_the_flags_say(faces):
    folders = ["--train_dir", str(faces / "train"), "--valid_dir", str(faces / "valid")]
    for flags, shares, flips, seed in (
            (["--crop", "random", "--seed", "3"], {"random": 1}, True, 3),
            (["--without", "flips"], data_utils.MIX, False, 0)):
        train, _ = data_utils.load_data(train_identity.parse(
            ["--crop_size", "32", *folders, *flags]))
        assert (train.shares, train.flips, train.seed) == (shares, flips, seed)


def test_the_default_recipe_is_what_help_says():
    """The numbers of DEPARTURES, as text."""
    trainer, _, _ = small_run("--alpha", "0")
    assert trainer.optimizerD.param_groups[0]["betas"] == (0.5, 0.999)
    assert trainer.optimizerG.param_groups[0]["betas"] == (0.9, 0.999)
    assert trainer.max_ratio == 1 and training_step.EMA_DECAY == 0.999
    assert trainer.loss.gan_loss == "bce" and trainer.mixed_batches and trainer.stripe_filter
    assert trainer.average is not trainer.netG
    assert trainer.scheduleG.lr_lambdas[0](100) == pytest.approx(0.05)
    args = train_identity.parse([])
    assert (args.batch_size, args.lr, args.lr_d, args.pretrain_epochs) == (16, 4e-4, 2.5e-5, 75)
    assert args.crop == "mixed" and data_utils.MIX == {  # those of results/EXPERIMENTS.md
        "center": 0.1, "random": 0.5, "rescaled": 0.3, "recoloured": 0.1}
    for number in ("three quarters", "16 images", "4e-4", "a twentieth", "2.5e-5", "beta1 0.5",
                   "at most as long", "every 4th step"):
        assert any(number in why for why in train_identity.DEPARTURES.values()), number


def test_a_damaged_scale_is_seen_when_it_is_restored():
    trainer, _, _ = small_run("--alpha", "0", "--precision", "fp16")
    state = trainer.scaler.state_dict()
    assert state["scale"] == 2 ** 16
    with pytest.raises((TypeError, RuntimeError)):
        trainer.scaler.load_state_dict(state | {"scale": "x"})


def test_a_preset_gives_way_to_a_weight_of_its_own():
    assert train_identity.parse(["--preset", "visual", "--gamma", "3"]).gamma == 3
    assert train_identity.parse(["--preset", "visual"]).gamma == 0.006


@pytest.mark.parametrize("name", train_identity.DEPARTURES)
def test_one_departure_can_be_undone_by_itself(name):
    args, ours = train_identity.parse(["--without", name]), train_identity.parse([])
    changed = {key for key, value in vars(args).items() if value != vars(ours)[key]}
    assert args.without == [name]
    assert changed == {"without", *train_identity.UNDONE.get(name, {})}


def test_help_lists_every_departure_and_few_flags(capsys):
    with pytest.raises(SystemExit):
        train_identity.parse(["--help"])
    text = capsys.readouterr().out
    for name in train_identity.DEPARTURES:
        assert re.search(f"^  {name} +\\S", text, re.M), name
    assert len(re.findall(r"^  (?:-h, )?--\w+", text, re.M)) <= 32


@pytest.mark.parametrize("flag", ["--lr=-1e-4", "--gamma=nan", "--lr_d=inf"])
def test_a_number_out_of_range_names_its_flag(flag):
    with pytest.raises(InputError, match=flag.split("=")[0]):
        train_identity.parse([flag])


@pytest.mark.parametrize("script, argv", [
    (train_identity.parse, ["--seed", "-1"]), (train_identity.parse, ["--num_epochs", "0"]),
    (evaluate.parse, ["--seed", "-1"]), (evaluate.parse, ["--batch_size", "0"]),
    (ablation.parse, ["--seeds", "0", "-1"])])
def test_a_whole_number_out_of_range_names_its_flag(script, argv):
    with pytest.raises(InputError, match=f"argument {argv[0]}: must be a whole number from [01]"):
        script(argv)


def test_a_whole_number_of_the_benchmark_names_its_flag():
    with pytest.raises(InputError, match="--rounds"):
        benchmark.main(["--rounds", "0"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a machine without CUDA")
def test_the_benchmark_replaces_no_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "benchmark", lambda args: {"speedup": 2})
    monkeypatch.setattr(benchmark, "report", lambda result: "")
    path = tmp_path / "face.jpg"
    path.write_bytes(b"the user's")
    with pytest.raises(InputError, match=f"--json {path}: .* not overwritten"):
        benchmark.main(["--json", str(path)])
    assert path.read_bytes() == b"the user's"
    for _ in range(2):
        benchmark.main(["--json", str(tmp_path / "bench.json")])
    assert json.loads((tmp_path / "bench.json").read_text()) == {"speedup": 2}
    (tmp_path / "config.json").write_text('{"flags": {}}')
    with pytest.raises(InputError, match="--json .*config.json: exists .* not overwritten"):
        benchmark.main(["--json", str(tmp_path / "config.json")])


def test_a_crop_larger_than_the_benchmarks_frames_is_refused():
    with pytest.raises(InputError, match="--crop_size: takes 264 px"):
        benchmark.main(["--crop_size", "264"])


def test_the_benchmark_names_the_flag_that_asks_for_cuda():
    with pytest.raises(InputError, match="--device cuda"):
        benchmark.main(["--device", "cuda"])


# ---------------------------------------------------------------------------------------------
# A run


def test_run_writes_every_promised_file(finished):
    for name in ("netG_epoch_2_2.pth", "netD_epoch_2_2.pth", "last.pt", "train_results.csv",
                 "samples/epoch_1.png", "samples/epoch_2.png", "config.json", "curves.png"):
        assert (finished / name).stat().st_size > 0, name
    text = (finished / "train_results.csv").read_text()
    assert text.startswith(REPORT_COLUMNS)
    table = pd.read_csv(finished / "train_results.csv")
    assert table["Epoch"].tolist() == [1, 2] and table["Phase"].tolist() == ["pixel", "gan"]
    gan = table.iloc[1]
    assert 0 < gan["Score_D"] < 1 and 0 < gan["Score_G"] < 1 and 0 <= gan["D_accuracy"] <= 1
    assert table.loc[0, ["Loss_D", "Adversarial", "Identity"]].isna().all()
    assert math.isnan(gan["Content"]) and gan["Identity"] > 0  # alpha is 0: not computed, not 0
    assert gan["Gradient_ratio"] > 0 and (table["Seconds"] > 0).all()
    config = json.loads((finished / "config.json").read_text())
    assert config["networks"]["inception_resnet_v1"] == "tiny"
    assert config["data"]["train"]["n"] == 6 and config["flags"]["crop_size"] == 16
    assert checkpoints.load_generator(finished / "netG_epoch_2_2.pth").scale_factor == 2
    Discriminator().load_state_dict(torch.load(finished / "netD_epoch_2_2.pth"))


def test_tensorboard_has_the_same_rows_and_samples(faces, tmp_path, monkeypatch):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = flags(faces, tmp_path, "--tensorboard")
    train_identity.main(run)
    train_identity.main([*run, "--overwrite"])  # what the first run wrote goes
    train_identity.main(["--resume", "--out_dir", str(tmp_path), "--num_epochs", "3"])
    assert len([*(tmp_path / "tensorboard").iterdir()]) == 3
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    table = pd.read_csv(tmp_path / "train_results.csv").set_index("Epoch")
    for name in table.columns.drop(["Phase", "Content"]):  # alpha is 0
        expected = table[name].dropna()
        assert [event.step for event in events.Scalars(name)] == [*expected.index]
        assert [event.value for event in events.Scalars(name)] == pytest.approx([*expected])
    shown = events.Images("samples (bicubic, SR, HR)")
    assert [event.step for event in shown] == [1, 2, 3]
    sample = Image.open(tmp_path / "samples" / "epoch_3.png")
    assert np.array_equal(Image.open(io.BytesIO(shown[2].encoded_image_string)), sample)


def test_tensorboard_that_is_missing_is_said_at_once(faces, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        train_identity.main(flags(faces, tmp_path, "--tensorboard"))
    assert not (tmp_path / "train_results.csv").exists()


def test_pixel_loss_falls(faces, tmp_path):
    train_identity.main(flags(faces, tmp_path, "--num_epochs", "8", "--pretrain_epochs", "8",
                              "--lr", "0.002"))
    pixel = pd.read_csv(tmp_path / "train_results.csv")["Pixel"]
    assert pixel.iloc[-2:].mean() < 0.5 * pixel.iloc[0]


def test_same_seed_same_bits_and_config_repeats_a_run(finished, tmp_path):
    train_identity.main(["--config", str(finished / "config.json"), "--out_dir", str(tmp_path)])
    assert_same_bits(weights(tmp_path), weights(finished))


def test_a_config_of_another_version_says_what_it_lacks(finished, tmp_path, capsys):
    config = json.loads((finished / "config.json").read_text())
    config["flags"]["label_smoothing"] = 0.1  # a flag that was dropped
    del config["flags"]["lr_d"]               # one that was added
    (tmp_path / "config.json").write_text(json.dumps(config))
    args = train_identity.parse(["--config", str(tmp_path / "config.json")])
    assert args.batch_size == 2 and args.lr_d == 2.5e-5 and not hasattr(args, "label_smoothing")
    output = capsys.readouterr().out
    assert "unknown and ignored: label_smoothing" in output
    assert "missing, today's default is used: lr_d" in output
    train_identity.parse(["--config", str(finished / "config.json")])
    assert capsys.readouterr().out == ""


def test_a_repetition_on_other_files_is_said(tmp_path, capsys):
    files = SimpleNamespace(digest=lambda: "a")
    config = {"flags": {}, "start": None, "data": {"train": {"hash": "a"}, "valid": {"hash": "b"}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "netG.pth").write_bytes(b"")
    args = train_identity.parse([])
    args.config, args.start = str(tmp_path / "config.json"), str(tmp_path / "netG.pth")
    run_folder.new_progress(args, files, files)
    assert "not the same run, since --valid_dir, --start differ(s)" in capsys.readouterr().out
    args.start = None
    run_folder.new_progress(args, files, SimpleNamespace(digest=lambda: "b"))
    (tmp_path / "config.json").write_text(json.dumps({"flags": {}, "data": 3}))
    run_folder.new_progress(args, files, files)
    assert capsys.readouterr().out == ""


def test_a_repetition_at_another_commit_is_said(finished, tmp_path, capsys, monkeypatch):
    config = json.loads((finished / "config.json").read_text())
    for commit, said in ((config["git"]["commit"], False), ("0" * 40, True)):
        config["git"]["commit"] = commit
        (tmp_path / "config.json").write_text(json.dumps(config))
        run_folder.say_what_differs(tmp_path / "config.json", {"data": {}, "start": None})
        assert ("the default recipe may differ" in capsys.readouterr().out) == said
    config["git"]["commit"] = None  # made in a copy without git
    (tmp_path / "config.json").write_text(json.dumps(config))
    run_folder.say_what_differs(tmp_path / "config.json", {"data": {}, "start": None})
    assert "may differ" not in capsys.readouterr().out
    config["git"]["commit"] = "0" * 40
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(run_folder, "git", lambda *command: None)  # a copy without git
    run_folder.say_what_differs(tmp_path / "config.json", {"data": {}, "start": None})
    assert "may differ" not in capsys.readouterr().out


def test_the_shipped_run_can_be_repeated():
    args = train_identity.parse(["--config", str(ROOT / "epochs/pretrained/gan/config.json")])
    assert args.num_epochs == 14 and args.pretrain_epochs == 0 and args.without == []


def test_dead_discriminator_is_announced():
    dead = training_step.dead_discriminator
    row = {"Epoch": 3, "Score_D": 0.9, "Score_G": 0.4, "Gradient_ratio": 0.1, "D_updates": 100}
    report = train_identity.parse(["--recipe", "report"])
    assert dead(row, report) is None
    warning = dead(row | {"Score_G": 0.895}, report)
    assert "epoch 3" in warning
    assert "cross_entropy" in warning and "mixed_batches" in warning and "slow_d" in warning
    ours = dead(row | {"Score_G": 0.895}, train_identity.parse([]))
    assert "--lr_d" in ours
    assert "cross_entropy" not in ours and "slow_d" not in ours  # nothing that is already done
    assert "beta" not in ours  # the generator's weight teaches D nothing
    silent = row | {"Gradient_ratio": 1e-5}
    unheard = dead(silent, report)
    assert "1.0e-05" in unheard and "cross_entropy" in unheard and "lr_d" not in unheard
    assert "a lower --lr_d" in dead(silent | {"Score_D": 0.99, "Score_G": 0.01}, report)
    assert "-0.1000" in dead(row | {"Score_D": 0.4, "Score_G": 0.5}, report)
    pixel = row | {"Score_D": math.nan, "Score_G": math.nan, "Gradient_ratio": math.nan}
    assert dead(pixel, report) is None


def test_a_new_discriminator_is_not_called_dead():
    row = {"Epoch": 3, "Score_D": 0.5, "Score_G": 0.5, "Gradient_ratio": 0.1}
    args = train_identity.parse([])
    assert training_step.dead_discriminator(row | {"D_updates": 99}, args) is None
    warning = training_step.dead_discriminator(row | {"D_updates": 100}, args)
    assert "dead" in warning and "after 100 updates" in warning


def test_a_warning_comes_once(faces, tmp_path, capsys):
    """Without weight the adversarial gradient is none of the pixel gradient in both GAN epochs."""
    train_identity.main(flags(faces, tmp_path, "--pretrain_epochs", "0", "--beta", "0",
                              "--without", "back_projection"))  # which leaves D little to see
    assert capsys.readouterr().out.count("warning: epoch") == 1


@pytest.mark.parametrize("without", [[], ["mixed_batches"]])
def test_validation_asks_the_discriminator_as_training_does(without):
    run, _, _ = small_run("--without", *without)
    hr, sr = torch.rand(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    before, logged = deepcopy(run.netD.state_dict()), {}
    with torch.no_grad():
        real, fake = training_step.validation_discriminator(run)(hr, sr)
    assert_same_bits(run.netD.state_dict(), before)
    training_step.discriminator_step(run, sr.requires_grad_(), hr, logged, 1.0)
    torch.testing.assert_close(real.sigmoid().mean(), logged["score_d"])
    torch.testing.assert_close(fake.sigmoid().mean(), logged["score_g"])


@pytest.mark.parametrize("more, told_apart", [((), True), (("--without", "mixed_batches"), False)])
def test_mixed_passes_let_the_discriminator_learn(more, told_apart):
    """Blurred against sharp noise: BatchNorm of each kind by itself hides what tells them apart."""
    run, _, _ = small_run("--crop_size", "64", "--lr_d", "1e-4", *more)
    generator = torch.Generator().manual_seed(6)
    for _ in range(4):
        hr = torch.rand(8, 3, 32, 32, generator=generator)
        sr = torch.nn.functional.avg_pool2d(hr, 5, 1, 2).requires_grad_()
        logged = {}
        training_step.discriminator_step(run, sr, hr, logged, 1.0)
        run.optimizerD.step()
        run.optimizerD.zero_grad()
    gap = (logged["score_d"] - logged["score_g"]).item()
    assert (gap > 0.1) == told_apart, gap


def test_a_loss_that_is_not_finite_stops_the_run(faces, tmp_path, monkeypatch):
    train_identity.main(flags(faces, tmp_path, "--num_epochs", "1", "--pretrain_epochs", "0",
                              "--without", "lazy"))
    before = (tmp_path / "last.pt").read_bytes()
    monkeypatch.setattr(training_step, "adversarial_loss", lambda kind, fake: fake.sum() / 0)
    with pytest.raises(InputError, match="epoch 2, step 1: adversarial is not finite"):
        train_identity.main(["--resume", "--out_dir", str(tmp_path), "--num_epochs", "2"])
    assert (tmp_path / "last.pt").read_bytes() == before


@pytest.mark.parametrize("poisoned", ["netG", "netD"])
@pytest.mark.parametrize("step", [2, 3], ids=["saved in mid-epoch", "last of the epoch"])
def test_weights_that_are_not_finite_are_not_saved(faces, finished, tmp_path, monkeypatch,
                                                   poisoned, step):
    """The losses of that step are finite, its update is not."""
    if step == 2:
        monkeypatch.setattr(run_folder, "SAVE_MINUTES", 0)
    shutil.copytree(finished, tmp_path / "run")
    original, count, before = train_identity.apply_updates, [0], []

    def apply_updates(run, with_gan):
        original(run, with_gan)
        count[0] += 1
        if count[0] == step:
            before.append((tmp_path / "run" / "last.pt").read_bytes())
            next(getattr(run, poisoned).parameters()).data[0] = math.nan

    monkeypatch.setattr(train_identity, "apply_updates", apply_updates)
    with pytest.raises(InputError, match=f"epoch 3, step {step}: .*infinite or NaN"):
        train_identity.main(["--resume", "--out_dir", str(tmp_path / "run"), "--num_epochs", "3"])
    assert [(tmp_path / "run" / "last.pt").read_bytes()] == before
    assert not (tmp_path / "run" / "netG_epoch_2_3.pth").exists()


def test_every_term_is_learnt_where_an_epoch_is_shorter_than_the_interval(faces, tmp_path,
                                                                          monkeypatch):
    """Three steps an epoch, one in eight: the steps of the run count, not those of the epoch."""
    monkeypatch.setattr(train_identity, "LAZY_INTERVAL", 8)
    train_identity.main(flags(faces, tmp_path, "--pretrain_epochs", "0", "--num_epochs", "4"))
    table = pd.read_csv(tmp_path / "train_results.csv")
    assert table["Adversarial"].notna().tolist() == [True, False, True, False]  # steps 0 and 8
    assert table["Identity"].notna().tolist() == [False, True, False, False]    # step 4


def test_an_epoch_gives_its_steps_what_they_need(faces, tmp_path, monkeypatch):
    """The weight of terms that only every second step has, its crops, its crops' keys."""
    steps, epochs, keys = [], [], []
    set_epoch, step = TrainDatasetFromFolder.set_epoch, training_step.train_step

    def train_step(trainer, lr, hr, targets, gan, perceptual, weight):
        assert trainer.netG.training and trainer.netD.training
        steps.append((gan, perceptual, weight))
        return step(trainer, lr, hr, targets, gan, perceptual, weight)

    monkeypatch.setattr(train_identity, "train_step", train_step)
    monkeypatch.setattr(TrainDatasetFromFolder, "set_epoch",
                        lambda self, epoch: epochs.append(epoch) or set_epoch(self, epoch))
    monkeypatch.setattr(TrainDatasetFromFolder, "cache_keys",
                        lambda self, indices: keys.extend(indices) or [None] * len(indices))
    train_identity.main(flags(faces, tmp_path, "--seed", "3", "--without", "ema"))  # netG itself
    assert steps == [(False, False, 1)] * 3 + [(False, True, 2), (True, False, 2), (False, True, 2)]
    assert epochs == [0, 1, 2]
    assert [keys[:2], keys[2:]] == data_utils.epoch_order(6, 2, 3, 2, 0, 1)[::2]


def test_the_average_is_validated_on_frames_and_on_crops(faces, monkeypatch):
    """D judges crops alone; rows are in the order of the photographs."""
    seen, caches, trainer = [], [], small_run("--alpha", "0")[0]

    def validate(netG, discriminate, dataset, face_network, cache, device, indices, context):
        assert context is trainer.autocast
        caches.append(cache)
        seen.append((netG, discriminate is not None, dataset.crop_size))
        return torch.tensor([[0.0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0]])

    monkeypatch.setattr(evaluate, "validate", validate)
    valid = data_utils.ValidDatasetFromFolder(faces / "valid", 16, 2)
    results = train_identity.validate_epoch(trainer, True, valid, 0, 1)
    assert seen == [(trainer.average, False, 0), (trainer.average, True, 16)]
    assert trainer.average is not trainer.netG and caches[0] is not caches[1]
    assert [rows[:, 5].tolist() for rows in results] == [[0, 1], [0, 1]]


@pytest.mark.parametrize("flag, striped", [([], False), (["--without", "stripe_filter"], True)])
def test_no_update_gives_the_convolutions_behind_an_upsampling_stripes(flag, striped):
    run, lr, hr = small_run("--alpha", "0", *flag)

    def largest(weight):
        signs = (-1.0) ** torch.arange(weight.shape[-1])
        return [(weight.detach() * along).sum(-along.dim()).abs().max().item()
                for along in (signs, signs[:, None])]

    for _ in range(2):  # as begun, and after an update
        for network in (run.netG, run.average):
            behind = [network.last] + [block.conv for block in network.upsample[1:]]
            assert len(behind) == 3  # 8x: two of the three upsamplings have one before them
            for convolution in behind:
                assert all((response > 1e-3) == striped for response in largest(convolution.weight))
            assert min(largest(network.upsample[0].conv.weight)) > 1e-3
        training_step.train_step(run, lr, hr, None, False, False)
        training_step.apply_updates(run, False)
    whole = Generator(2)  # whose one block sees LR, of which nothing may be lost
    before = whole.upsample[0].conv.weight.detach().clone()
    training_step.remove_stripes(whole)
    assert torch.equal(whole.upsample[0].conv.weight, before)
    assert max(largest(whole.last.weight)) < 1e-3


def test_fp16_with_its_scaler():
    run, lr, hr = small_run("--precision", "fp16", "--alpha", "0")
    before = run.netG.last.weight.detach().clone()
    values = training_step.train_step(run, lr, hr, None, False, False)
    training_step.apply_updates(run, False)
    assert run.scaler.is_enabled() and values[0].isfinite()
    assert not torch.equal(run.netG.last.weight, before)
    before, scale = deepcopy(run.netG.state_dict()), run.scaler.get_scale()
    training_step.train_step(run, lr, hr, None, False, False)
    run.netG.first[0].weight.grad[0, 0, 0, 0] = math.inf  # an overflow
    training_step.apply_updates(run, False)
    assert torch.equal(run.netG.skip[0].weight, before["skip.0.weight"])
    assert run.scaler.get_scale() == scale / 2


def test_an_overflow_in_fp16_is_the_scalers_business():
    history = torch.zeros(2, len(training_step.LOGGED))
    history[1, training_step.LOGGED.index("ratio")] = math.inf
    training_step.check_finite(history, 1, scaled=True)
    with pytest.raises(InputError, match="step 2: ratio"):
        training_step.check_finite(history, 1)
    history[0, training_step.LOGGED.index("adversarial")] = math.inf
    with pytest.raises(InputError, match="step 1: adversarial"):
        training_step.check_finite(history, 1, scaled=True)


def test_a_ratio_that_overflowed_is_left_out_of_the_epochs():
    run, *_ = small_run()
    history = torch.full((3, len(training_step.LOGGED)), 0.5)
    history[1, -1] = math.inf
    row = train_identity.epoch_row(run, train_identity.parse([]), {
        "epoch": 80, "history": history, "seconds": 1.0}, np.zeros((2, 2, 6)))
    assert row["Gradient_ratio"] == 0.5


def test_a_row_has_the_validations_means_and_ds_accuracy():
    """D is right about 3 of 4 real (logit above 0) and 1 of 4 generated images."""
    run, *_ = small_run()
    frames, crops = np.zeros((2, 4, 6))
    frames[:, :3], crops[:, :3] = (20, 0.5, 0.7), (22, 0.6, 0.8)
    crops[:, 3], crops[:, 4] = (1, 2, -1, 3), (1, 2, -1, 3)
    history = torch.full((3, len(training_step.LOGGED)), 0.5)
    row = train_identity.epoch_row(run, train_identity.parse([]), {
        "epoch": 80, "history": history, "seconds": 1.0}, (frames, crops))
    names = ("PSNR", "SSIM", "Cosine", "PSNR_crop", "SSIM_crop", "Cosine_crop", "D_accuracy")
    assert [row[name] for name in names] == pytest.approx([20, 0.5, 0.7, 22, 0.6, 0.8, 0.5])
    crops[:, 4] = -1
    row = train_identity.epoch_row(run, train_identity.parse([]), {
        "epoch": 80, "history": history, "seconds": 1.0}, (frames, crops))
    assert row["D_accuracy"] == (0.75 + 1) / 2
    history = torch.arange(len(training_step.LOGGED)).float().repeat(3, 1)
    numbered = train_identity.epoch_row(run, train_identity.parse([]), {
        "epoch": 80, "history": history, "seconds": 1.0}, (frames, crops))
    assert [numbered[name] for name in ("Pixel", "Content", "Adversarial", "Identity", "Loss_D",
                                        "Score_D", "Score_G", "Gradient_ratio")] == [*range(8)]
    assert row["Loss_G"] == pytest.approx(0.5 * (1 + 0.005 + 0.001 + 3))  # gamma is 3 here


def test_help_shows_the_defaults_that_are_used(capsys):
    with pytest.raises(SystemExit):
        train_identity.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "rate of the generator (default: 0.0004)" in text
    assert "the identity loss (default: 0.6)" in text
    assert "seed of weights, order, flips and crops (default: 0)" in text


def test_names_that_are_given_win_over_stored_flags(finished):
    config = ["--config", str(finished / "config.json")]
    assert train_identity.parse(config).gamma == 0.6
    assert train_identity.parse([*config, "--preset", "baseline"]).gamma == 0
    args = train_identity.parse([*config, "--recipe", "report", "--lr", "0.003"])
    assert "cross_entropy" in args.without and args.lr == 0.003 and args.gamma == 0.6
    assert args.batch_size == 32
    assert train_identity.parse([*config, "--without", "flips"]).batch_size == 2


def test_a_start_is_fine_tuned_unless_something_else_is_asked_for(finished):
    def chosen(*more):
        args = train_identity.parse(["--start", "netG.pth", *more])
        return args.lr, args.pretrain_epochs

    assert chosen() == (2e-5, 75) and chosen("--without", "flips") == (2e-5, 75)
    assert chosen("--lr", "0.003") == (0.003, 75)
    assert chosen("--pretrain_epochs", "7") == (2e-5, 7)
    assert chosen("--recipe", "report") == (1e-4, 0)
    assert chosen("--config", str(finished / "config.json")) == (4e-4, 1)
    assert chosen("--resume", "--out_dir", str(finished)) == (4e-4, 1)


# ---------------------------------------------------------------------------------------------
# Interruptions


def interrupt(monkeypatch, at_update, number):
    """Send this process a signal while its `at_update`-th update is computed."""
    original, count = train_identity.apply_updates, [0]

    def apply_updates(run, with_gan):
        count[0] += 1
        if count[0] == at_update:
            os.kill(os.getpid(), number)
        original(run, with_gan)

    monkeypatch.setattr(train_identity, "apply_updates", apply_updates)


def test_resume_is_bit_identical_in_bf16(faces, tmp_path, monkeypatch):
    """The precision that auto was is the run's from then on, wherever it is resumed."""
    monkeypatch.setattr(training_step, "fast_precision", lambda device: "bf16")
    run = flags(faces, tmp_path / "whole", "--precision", "auto")
    train_identity.main(run)
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["flags"][
        "precision"] == "bf16"
    with monkeypatch.context() as patch:
        interrupt(patch, 5, signal.SIGTERM)
        with pytest.raises(SystemExit):
            train_identity.main([*run, "--out_dir", str(tmp_path / "halves")])
    monkeypatch.setattr(training_step, "fast_precision", lambda device: "fp32")
    train_identity.main(["--resume", "--out_dir", str(tmp_path / "halves")])
    assert_same_bits(weights(tmp_path / "halves"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("at_update, number", [(1, signal.SIGTERM), (3, signal.SIGINT),
                                               (5, signal.SIGTERM)])
def test_resume_is_bit_identical(faces, finished, tmp_path, monkeypatch, capsys, at_update, number):
    """Stopped in the pixel epoch, at its end and in the GAN epoch: 3 updates an epoch."""
    with monkeypatch.context() as patch:
        interrupt(patch, at_update, number)
        with pytest.raises(SystemExit) as stop:
            train_identity.main(flags(faces, tmp_path))
    assert stop.value.code == 128 + number
    assert f"train_identity.py --resume --out_dir {tmp_path}" in capsys.readouterr().out
    train_identity.main(["--resume", "--out_dir", str(tmp_path)])
    assert_same_bits(weights(tmp_path), weights(finished))
    rows, expected = (pd.read_csv(folder / "train_results.csv").drop(columns="Seconds")
                      for folder in (tmp_path, finished))
    pd.testing.assert_frame_equal(rows, expected)


def test_signal_during_validation(faces, finished, tmp_path, monkeypatch):
    """It finishes the epoch, saves, exits with 143, and the run goes on with the next epoch."""
    original = train_identity.validate_epoch

    def validate_epoch(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train_identity, "validate_epoch", validate_epoch)
        with pytest.raises(SystemExit) as stop:
            train_identity.main(flags(faces, tmp_path))
    assert stop.value.code == 143
    train_identity.main(["--resume", "--out_dir", str(tmp_path)])
    assert_same_bits(weights(tmp_path), weights(finished))


def test_a_signal_to_the_loaders_processes_is_the_runs_business(faces, monkeypatch):
    """torchrun signals all of its processes; a loader's that died of it would be an error."""
    monkeypatch.setattr(data_utils.os, "cpu_count", lambda: 1)  # one process
    dataset = TrainDatasetFromFolder(faces / "train", 16, 2, cache_gb=0)
    batches = dataset.batches([[0]] * 200, torch.device("cpu"))
    next(batches)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGTERM)
    time.sleep(0.1)
    assert sum(1 for _ in batches) == 199


def test_killed_at_twelve_random_moments(faces, finished, tmp_path):
    """kill -9, again and again, while last.pt is written after every step: nothing is lost."""
    context = ranks.forkserver()
    rng, folder, argv, kills = random.Random(0), tmp_path / "run", None, 0
    started = time.monotonic()
    while kills < 12:
        argv = (["--resume", "--out_dir", str(folder)] if (folder / "last.pt").exists()
                else flags(faces, folder, "--num_epochs", "200"))
        process = context.Process(target=ranks.train_and_save_always, args=(argv,))
        begun = time.time()
        process.start()
        # a quarter anywhere from the start on, the others once a checkpoint is on its way
        while kills % 4 and process.is_alive() and time.monotonic() < started + 120:
            with suppress(FileNotFoundError):  # it has just become last.pt
                if any(p.stat().st_mtime > begun for p in folder.glob(".last.*")):
                    break
            time.sleep(0.001)
        time.sleep(rng.random() * (0.3 if kills % 4 else 1.0))
        process.kill()
        process.join()
        kills += 1
        if (folder / "last.pt").exists():
            checkpoints.read_run(folder)  # whole, at any moment
    assert time.monotonic() - started < 150
    state = checkpoints.read_run(folder)
    assert state["progress"]["updates"] > 0
    assert_same_bits(*(s["parts"]["netG"] for s in (state, replayed(faces, tmp_path, state))))


def replayed(faces, tmp_path, state):
    """The state of a run that went without a stop to the same update."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, state["progress"]["updates"], signal.SIGTERM)
        with pytest.raises(SystemExit):
            train_identity.main(flags(faces, tmp_path / "whole", "--num_epochs", "200"))
    return checkpoints.read_run(tmp_path / "whole")


def test_a_folder_that_holds_a_run_is_refused(faces, finished):
    before = (finished / "last.pt").read_bytes()
    being_written = finished / ".last.1.tmp.pt"  # by the run that goes on in this folder
    being_written.touch()
    with pytest.raises(InputError, match="--resume.*--out_dir.*--overwrite"):
        train_identity.main(flags(faces, finished))
    assert (finished / "last.pt").read_bytes() == before
    being_written.unlink()


def test_resume_with_other_photographs_is_refused(faces, finished, tmp_path):
    with pytest.raises(InputError, match="--train_dir .*not the photographs"):
        train_identity.main(["--resume", "--out_dir", str(finished), "--train_dir",
                             f"{faces}/valid", "--allow_overlap"])
    with pytest.raises(InputError, match="nothing to resume"):
        train_identity.main(["--resume", "--out_dir", str(tmp_path)])


def test_another_start_is_refused_where_it_would_do_nothing(finished):
    with pytest.raises(InputError, match="--start other.pth: .*begin a new run"):
        train_identity.main(["--resume", "--out_dir", str(finished), "--start", "other.pth"])


def test_a_run_that_goes_on_keeps_its_factor(finished):
    with pytest.raises(InputError, match="--upscale_factor 4: the run in .* has 2"):
        train_identity.main(["--resume", "--out_dir", str(finished), "--upscale_factor", "4"])


def test_icnr_is_refused_where_it_would_do_nothing(finished):
    before = (finished / "config.json").read_text()
    with pytest.raises(InputError, match="--without icnr: concerns a generator's first weights"):
        train_identity.main(["--resume", "--out_dir", str(finished), "--without", "icnr"])
    assert (finished / "config.json").read_text() == before


def test_flags_given_beside_resume_are_applied_and_said(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    train_identity.main(["--resume", "--out_dir", str(tmp_path / "run"), "--lr", "1e-5", "--lr_d",
                         "1e-6", "--num_epochs", "3", "--without", "cosine", "slow_d"])
    said = capsys.readouterr().out
    for change in ("--lr 0.0004 -> 1e-05", "--num_epochs 2 -> 3", "--lr_d 2.5e-05 -> 1e-06",
                   "--without [] -> ['cosine', 'slow_d']"):
        assert change in said
    assert "--gamma" not in said and "--save_every" not in said
    assert pd.read_csv(tmp_path / "run" / "train_results.csv")["Learning_rate"].iloc[-1] == 1e-5
    group = checkpoints.read_run(tmp_path / "run")["parts"]["optimizerD"]["param_groups"][0]
    assert group["lr"] == 1e-6 and tuple(group["betas"]) == (0.9, 0.999)
    train_identity.main(["--resume", "--out_dir", str(tmp_path / "run")])  # as it was left
    assert "changed" not in (said := capsys.readouterr().out) and "3 epochs are done" in said


def test_a_run_goes_on_without_the_generator_of_its_start(faces, tmp_path, finished, monkeypatch,
                                                          capsys):
    start = tmp_path / "start.pth"
    shutil.copy(finished / "netG_epoch_2_2.pth", start)
    digest = hashlib.sha256(start.read_bytes()).hexdigest()
    with monkeypatch.context() as patch:
        interrupt(patch, 1, signal.SIGTERM)
        with pytest.raises(SystemExit):
            train_identity.main(flags(faces, tmp_path / "run", "--start", str(start)))
    assert f"fine-tuning {start}: --lr 2e-05 --pretrain_epochs 1" in capsys.readouterr().out
    start.unlink()
    train_identity.main(["--resume", "--out_dir", str(tmp_path / "run")])
    said, config = capsys.readouterr().out, json.loads(
        (tmp_path / "run" / "config.json").read_text())
    assert config["start"] == digest and "changed" not in said and "fine-tuning" not in said
    assert (config["flags"]["lr"], config["flags"]["pretrain_epochs"]) == (2e-5, 1)


def test_a_run_gives_the_signals_back(faces, tmp_path, monkeypatch):
    before = [signal.getsignal(number) for number in run_folder.STOP_SIGNALS]
    monkeypatch.setattr(train_identity, "train", lambda args: run_folder.catch_signals(1))
    train_identity.main(flags(faces, tmp_path))
    assert [signal.getsignal(number) for number in run_folder.STOP_SIGNALS] == before


@pytest.mark.parametrize("world", [1, 2])
def test_a_second_signal_stops_a_lone_process_only(world):
    """A scheduler and torchrun each send one: rank 0 must not die while it saves."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        caught = run_folder.catch_signals(world)
        os.kill(os.getpid(), signal.SIGTERM)
        assert caught == [signal.SIGTERM]
        assert (signal.getsignal(signal.SIGTERM) is signal.SIG_DFL) == (world == 1)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_time_left_counts_what_the_gan_epochs_will_cost(monkeypatch):
    """5 more pixel epochs of a minute and 4 with every term in every fourth step: 5 + 4 x 3.25."""
    monkeypatch.setattr(train_identity, "LAZY_INTERVAL", 4)
    args = train_identity.parse(["--num_epochs", "10", "--pretrain_epochs", "6"])
    row = dict.fromkeys(("PSNR", "SSIM", "Cosine", "PSNR_crop", "SSIM_crop", "Cosine_crop",
                         "Pixel"), 0.5)
    row |= {"Epoch": 1, "Phase": "pixel", "Seconds": 60.0}
    line = train_identity.summary_line(row, args)
    assert line.endswith("about 18 min left")
    assert "whole frames 0.50 dB" in line and "centre crops 0.50 dB" in line
    args = train_identity.parse(["--num_epochs", "10", "--pretrain_epochs", "10"])
    assert train_identity.summary_line(row, args).endswith("about 9 min left")
    assert train_identity.summary_line(row | {"Seconds": 10.0}, args).endswith("about 90 s left")
    assert train_identity.summary_line(row | {"Epoch": 10}, args).endswith("; 60 s")


def test_an_epoch_without_a_gan_step_says_so(faces, tmp_path, monkeypatch, capsys):
    """Three steps an epoch and a GAN step in every ninth: two epochs of three go without."""
    monkeypatch.setattr(train_identity, "LAZY_INTERVAL", 9)
    train_identity.main(flags(faces, tmp_path, "--num_epochs", "3", "--pretrain_epochs", "0"))
    lines = [line for line in capsys.readouterr().out.splitlines() if "(gan)" in line]
    assert ["no GAN step" in line for line in lines] == [False, True, True]
    assert not any("nan" in line for line in lines)
    assert pd.read_csv(tmp_path / "train_results.csv")["D_updates"].tolist() == [1, 1, 1]


def test_a_batch_larger_than_the_data_set_is_said(faces, tmp_path, capsys):
    run = flags(faces, tmp_path, "--num_epochs", "1", "--pretrain_epochs", "1")
    train_identity.main([*run, "--batch_size", "7"])
    assert "--batch_size 7 is more than the 6 training images" in capsys.readouterr().out
    train_identity.main([*run, "--batch_size", "6", "--overwrite"])
    assert "is more than" not in capsys.readouterr().out


def test_a_finished_run_prints_lines_that_work(faces, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "a run"  # the space has to be quoted
    train_identity.main(flags(faces, folder, "--num_epochs", "1", "--pretrain_epochs", "1"))
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    commands = {words[1]: words[2:] for words in lines if words[:1] == ["python"]}
    assert {*commands} == {"evaluate.py", "super_resolve.py"}
    monkeypatch.setattr(evaluate, "load_face_network", lambda name: TinyFaces())
    evaluate.main(commands["evaluate.py"])
    assert (folder / "results" / "summary.csv").exists()
    argv = [str(faces / "valid/0.png") if word == "PICTURE" else word
            for word in commands["super_resolve.py"]]
    super_resolve.main([*argv, "--out_dir", str(tmp_path / "out")])
    assert (tmp_path / "out" / "0_sr.png").exists()


def test_the_bar_of_a_gan_step_fits_100_columns(faces, tmp_path, monkeypatch):
    bars = []

    class Bar(tqdm):
        def __init__(self, **options):
            super().__init__(**options | {"disable": False, "file": io.StringIO()})
            bars.append(self)

    monkeypatch.setattr(train_identity, "tqdm", Bar)
    train_identity.main(flags(faces, tmp_path, "--num_epochs", "1", "--pretrain_epochs", "0"))
    bar = bars[0]
    assert all(f"{name}=" in bar.postfix for name in ("pixel", "D(x)", "D(G(z))"))
    line = tqdm.format_meter(2000, 2000, 3723, prefix="epoch 100/100", unit="image", ncols=100,
                             postfix=bar.postfix)
    assert len(line) <= 100 and line.rstrip().endswith(f"{bar.postfix}]")


def test_an_epoch_begins_anew_with_another_number_of_steps(faces, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, 2, signal.SIGTERM)
        with pytest.raises(SystemExit):
            train_identity.main(flags(faces, tmp_path))
    train_identity.main(["--resume", "--out_dir", str(tmp_path), "--batch_size", "1"])
    assert len(pd.read_csv(tmp_path / "train_results.csv")) == 2


def test_the_schedule_follows_another_batch_size(finished, tmp_path):
    """After 3 of 4 epochs the half cosine from 1 to 0.05 is at cos(3/4 pi), in whatever steps."""
    shutil.copytree(finished, tmp_path / "run")
    train_identity.main(["--resume", "--out_dir", str(tmp_path / "run"), "--num_epochs", "4",
                         "--batch_size", "1"])
    rate = pd.read_csv(tmp_path / "run" / "train_results.csv")["Learning_rate"]
    assert rate[2] == pytest.approx(4e-4 * (0.05 + 0.95 * (1 - math.sqrt(0.5)) / 2))
    assert rate[3] == pytest.approx(4e-4 * 0.05)


def test_a_rate_that_goes_up_is_said(finished, tmp_path, capsys):
    """The half cosine of 2 epochs has ended at a twentieth; that of 4 is then half way."""
    shutil.copytree(finished, tmp_path / "run")
    args = ["--resume", "--out_dir", str(tmp_path / "run"), "--num_epochs"]
    train_identity.main([*args, "4"])
    said = f"rate goes up from {4e-4 * 0.05:.2g} to {4e-4 * 0.525:.2g}: the half cosine is stretch"
    assert said in capsys.readouterr().out
    train_identity.main([*args, "4"])
    assert "goes up" not in capsys.readouterr().out
    train_identity.main([*args, "5", "--without", "cosine"])
    assert ("to 0.0004: the half cosine no longer holds; --lr 2e-05 --without cosine keeps it"
            in capsys.readouterr().out)


def test_a_rate_that_is_asked_for_is_no_stretched_cosine(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    args = ["--resume", "--out_dir", str(tmp_path / "run"), "--num_epochs", "3"]
    train_identity.main([*args, "--lr", "1e-3"])
    assert "goes up" not in capsys.readouterr().out


def test_the_advice_on_a_rate_keeps_what_is_undone(capsys):
    run = small_run("--without", "flips", "--num_epochs", "2")[0]
    run.scheduleG.last_epoch = 1  # as of a resumed run, its rate at the end of a shorter cosine
    run.optimizerG.param_groups[0]["lr"] = 2e-5
    training_step.set_rates(run, train_identity.parse(["--without", "flips"]))
    assert "--without flips cosine keeps it" in capsys.readouterr().out


def test_an_average_may_begin_later(faces, tmp_path):
    train_identity.main(flags(faces, tmp_path, "--without", "ema", "stripe_filter"))
    last = checkpoints.read_run(tmp_path)["parts"]["netG"]
    train_identity.main(["--resume", "--without", "stripe_filter", "--lr", "0", "--num_epochs", "3",
                         "--out_dir", str(tmp_path)])
    state = checkpoints.read_run(tmp_path)["parts"]
    assert torch.equal(state["average"]["last.weight"], last["last.weight"])


def test_an_overflow_in_fp16_does_not_stop_what_goes_on_in_fp32(faces, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, 1, signal.SIGTERM)
        with pytest.raises(SystemExit):
            train_identity.main(flags(faces, tmp_path, "--pretrain_epochs", "0"))
    state = checkpoints.read_run(tmp_path)
    state["progress"]["history"][0, -1] = math.inf
    checkpoints.save_torch(state, tmp_path / "last.pt")
    train_identity.main(["--resume", "--out_dir", str(tmp_path)])
    assert len(pd.read_csv(tmp_path / "train_results.csv")) == 2


def test_generators_of_a_run_without_last_pt_are_not_overwritten(faces, tmp_path):
    (tmp_path / "netG_epoch_2_2.pth").write_text("kept")
    with pytest.raises(InputError, match="--overwrite"):
        train_identity.main(flags(faces, tmp_path))
    assert (tmp_path / "netG_epoch_2_2.pth").read_text() == "kept"


def test_overwrite_leaves_nothing_of_the_old_run(faces, tmp_path):
    (tmp_path / "samples").mkdir()
    users = ["netG_epoch_2_best.pth", "samples/epoch_best.png"]
    for name in ("last.pt", "netG_epoch_2_100.pth", "netG_epoch_8_15.pth", "samples/epoch_100.png",
                 *users):
        (tmp_path / name).write_text("old")
    run_folder.delete_old_run(train_identity.parse([*flags(faces, tmp_path), "--overwrite"]))
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")) == [
        "last.pt", *users[:1], "netG_epoch_8_15.pth", *users[1:]]  # the new run's; another scale's


@pytest.mark.parametrize("last", [True, False], ids=["a run", "a shipped generator"])
def test_a_run_that_is_refused_costs_nothing(faces, tmp_path, last):
    """--start, or a frozen network, that cannot be had: what lay in the folder is still there."""
    for name in ("netG_epoch_2_2.pth", *["last.pt"] * last):
        (tmp_path / name).write_text("kept")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(InputError, match="no_such.pth"):
        train_identity.main(flags(faces, tmp_path, "--overwrite", "--start", "no_such.pth"))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_start_that_overwrite_would_delete_is_refused(faces, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = tmp_path / "netG_epoch_2_15.pth"
    start.write_text("kept")
    for spelling in (str(start), start.name):
        with pytest.raises(InputError, match="--out_dir"):
            run_folder.open_run(train_identity.parse(
                [*flags(faces, tmp_path), "--overwrite", "--start", spelling]))
    assert start.read_text() == "kept"


def test_a_demo_has_a_folder_of_its_own(tmp_path, monkeypatch):
    """It replaces the demo before it, so it must never be in the folder of a run."""
    monkeypatch.setattr(demo, "synthetic_portraits", lambda n, size, seed: np.zeros(
        (1, size, size, 3), np.uint8))
    trained, users = [], tmp_path / "demo" / "data" / "valid" / "000.png"
    monkeypatch.setattr(train_identity, "train", trained.append)
    monkeypatch.setattr(evaluate, "main", lambda argv: None)
    users.parent.mkdir(parents=True)
    users.write_bytes(b"the user's")
    with pytest.raises(InputError, match=f"{users} was not written"):
        train_identity.main(["--demo", "--out_dir", str(tmp_path)])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [users]
    users.unlink()
    train_identity.main(["--demo", "--out_dir", str(tmp_path)])
    assert Path(trained[0].out_dir) == tmp_path / "demo" and trained[0].overwrite
    assert (trained[0].lr, trained[0].pretrain_epochs) == (1e-4, 4)  # not --start's rate
    shown = Image.open(tmp_path / "demo" / "restored.png")
    assert shown.width > 3 * 128 and shown.height > 128


def test_a_demo_leaves_a_users_run_alone(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "demo")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="demo holds a run that is no demo's"):
        train_identity.main(["--demo", "--out_dir", str(tmp_path)])
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    state = checkpoints.read_run(finished)  # a demo that was stopped early has no config.json
    state["progress"]["flags"] |= {"train_dir": "x/demo/data/train", "face_weights": "random"}
    checkpoints.save_torch(state, tmp_path / "demo" / "last.pt")
    (tmp_path / "demo" / "config.json").unlink()
    demo.check_replaceable(tmp_path / "demo")


def test_a_demo_that_was_interrupted_ends_with_its_evaluation(faces, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "begin", lambda out_dir, device: flags(tmp_path / "data", tmp_path))
    shutil.copytree(faces, tmp_path / "data")
    measured = []
    monkeypatch.setattr(evaluate, "main", measured.append)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt(patch, 2, signal.SIGINT)
        train_identity.main(["--demo"])
    assert not measured
    train_identity.main(["--resume", "--out_dir", str(tmp_path)])
    evaluated = evaluate.parse(measured[0])
    assert Path(evaluated.data_dir) == tmp_path / "data" / "valid"
    assert "next: make the data set" in capsys.readouterr().out


@pytest.mark.parametrize("more, good", [
    (["--crop_size", "8", "--upscale_factor", "8"], False), (["--crop_size", "8"], True),
    (["--without", "mixed_batches"], False),
    (["--without", "mixed_batches", "--crop_size", "24"], True)])
def test_a_crop_of_which_a_network_sees_one_pixel_is_refused(faces, tmp_path, more, good):
    """Batches, and a validation, of one image: BatchNorm cannot standardise a lone value."""
    shutil.copytree(faces / "valid", tmp_path / "valid")
    for path in sorted((tmp_path / "valid").iterdir())[1:]:
        path.unlink()
    args = [*flags(faces, tmp_path / "run", "--pretrain_epochs", "0", "--num_epochs", "1",
                   "--valid_dir", str(tmp_path / "valid"), "--batch_size", "1"), *more]
    if good:
        train_identity.main(args)
        return
    with pytest.raises(InputError, match="--crop_size .* take 32 px"):
        train_identity.main(args)


def test_a_crop_of_nothing_is_refused(faces, tmp_path):
    with pytest.raises(InputError, match="--crop_size 1: must be 2 or more"):
        train_identity.main(flags(faces, tmp_path, "--crop_size", "1"))


def test_a_folder_that_cannot_be_written_is_bad_input(faces, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    argv = flags(faces, tmp_path / "file" / "run")
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: train_identity.main(argv))
    assert stop.value.code == 2 and "file" in capsys.readouterr().err


def test_a_crop_too_small_for_vgg_is_refused(faces, tmp_path):
    with pytest.raises(InputError, match="--crop_size 16.*needs 32"):
        train_identity.main(flags(faces, tmp_path, "--alpha", "0.006"))


def test_overlap_is_refused(faces, tmp_path):
    argv = flags(faces, tmp_path)
    argv[3] = argv[1]
    with pytest.raises(InputError, match="also in the training set"):
        train_identity.main(argv)


def test_errors_are_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, ROOT / "train_identity.py", "--train_dir", tmp_path / "none"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "--train_dir" in done.stderr and "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------
# Several processes


def test_two_processes_learn_what_one_learns(faces, tmp_path):
    """With one photograph throughout, BatchNorm sees the same statistics on both ranks."""
    picture = (faces / "train" / "0.png").read_bytes()
    (tmp_path / "train").mkdir()
    for i in range(4):
        (tmp_path / "train" / f"{i}.png").write_bytes(picture)
    (tmp_path / "valid").symlink_to(faces / "valid")
    one, two = (flags(tmp_path, tmp_path / name, "--without", "flips", "lazy", "--crop", "center",
                      "--save_every", "1", "--batch_size", "4") for name in ("one", "two"))
    train_identity.main(one)
    ranks.on_two_ranks(ranks.train, two)
    a, b = (pd.read_csv(tmp_path / name / "train_results.csv") for name in ("one", "two"))
    columns = ["Loss_D", "Loss_G", "Score_D", "Score_G", "PSNR", "SSIM", "Cosine", "Pixel",
               "Identity", "D_accuracy"]
    pd.testing.assert_frame_equal(a[columns], b[columns], rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("without", [(), ("mixed_batches",)])
def test_gradients_are_the_mean_over_the_processes(without, tmp_path):
    """Each has images of its own; D's gradients, of two passes, are exchanged once."""
    without = "ratio_bound", *without
    ranks.on_two_ranks(ranks.save_step, str(tmp_path), without)
    saved = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone, logged = zip(*(ranks.step_of_ranks([rank], 1, without) for rank in range(2)))
    for name in ("netG", "netD"):
        local = [[p.grad for p in getattr(trainer, name).parameters()] for trainer in alone]
        for ours, a, b in zip(saved[1][name], *local):
            mean, tolerance = (a + b) / 2, 1e-3 * (a - b).abs().max().item() + 1e-9
            torch.testing.assert_close(ours, mean, rtol=1e-4, atol=tolerance)
        assert all(map(torch.equal, saved[0][name], saved[1][name]))
    assert saved[0]["sent"] == sum(p.numel() for p in alone[0].netD.parameters())
    # one ratio for all: of sums of squares, and the pixel gradient's is the pixel loss's multiple
    squares = sum(one["ratio"] ** 2 * one["pixel"] for one in logged)
    ratio = math.sqrt(squares / sum(one["pixel"] for one in logged))
    assert [s["logged"]["ratio"] for s in saved] == pytest.approx([ratio, ratio], rel=1e-4)


def test_two_processes_that_are_stopped_go_on_exactly(faces, tmp_path):
    """The row of an epoch is the mean over both, also of the steps before the stop."""
    ranks.on_two_ranks(ranks.train_whole_and_stopped, flags(faces, "x"), str(tmp_path))
    whole, stopped = (pd.read_csv(tmp_path / name / "train_results.csv").drop(columns="Seconds")
                      for name in ("whole", "stopped"))
    pd.testing.assert_frame_equal(stopped, whole, rtol=1e-6)
    for network in ("netG", "netD"):
        a, b = (torch.load(tmp_path / name / f"{network}_epoch_2_2.pth")
                for name in ("whole", "stopped"))
        assert_same_bits(a, b)


@pytest.mark.parametrize("of_start", [True, False])
@pytest.mark.parametrize("more", [[], ["--without", "back_projection"]])
def test_the_flags_say_whether_a_start_projects_back(tmp_path, of_start, more):
    """The weights are the start's; an earlier generator is fine-tuned with it, and the reverse."""
    start = Generator(2, back_projection=of_start)
    checkpoints.save_torch(start.state_dict(), tmp_path / "netG.pth")
    args = train_identity.parse(["--start", str(tmp_path / "netG.pth"), "--upscale_factor", "2",
                                 "--without", "stripe_filter", *more[1:]])
    trainer = SimpleNamespace()
    training_step.build_networks(trainer, args, torch.device("cpu"), 1)
    state = trainer.netG.state_dict()
    assert ("back_projection" in state) == (not more)
    for name, value in start.state_dict().items():
        assert name == "back_projection" or torch.equal(state[name], value)
    checkpoints.save_torch(state, tmp_path / "tuned.pth")
    loaded = checkpoints.load_generator(tmp_path / "tuned.pth")
    assert (loaded.back_projection is not None) == (not more)


def test_what_is_written_of_an_epoch_is_the_averages(faces, tmp_path, monkeypatch):
    """Every second epoch and the last are kept; samples of whole frames and of crops in turn."""
    trainer, seen, config = small_run("--alpha", "0")[0], [], {}
    trainer.average.last.bias.data += 1
    monkeypatch.setattr(figures, "save_samples", lambda path, images: None)
    monkeypatch.setattr(evaluate, "restore", lambda netG, dataset, index, device: seen.append(
        (netG is trainer.average, dataset.crop_size, index)))
    args = train_identity.parse(flags(faces, tmp_path, "--num_epochs", "5", "--save_every", "2"))
    valid = data_utils.ValidDatasetFromFolder(faces / "valid", 16, 2)
    rows = [{"Epoch": epoch, "Seconds": 2.0 * epoch} for epoch in range(1, 6)]
    for epoch in range(1, 6):
        train_identity.write_epoch(trainer, args, rows[:epoch], config, valid)
    assert sorted(path.name for path in tmp_path.glob("netG*")) == [
        f"netG_epoch_2_{epoch}.pth" for epoch in (2, 4, 5)]
    assert_same_bits(weights(tmp_path, 5), trainer.average.state_dict())
    assert seen == [(True, 0, 0), (True, 16, 0), (True, 0, 1), (True, 16, 1)] * 5
    assert config["wall_seconds"] == 30


def test_every_second_is_of_one_epoch(faces, tmp_path, monkeypatch):
    """By a clock that ticks when it is looked at, also where last.pt is written in between."""
    clock = itertools.count()
    monkeypatch.setattr(run_folder, "SAVE_MINUTES", 0)
    monkeypatch.setattr(run_folder.time, "perf_counter", lambda: next(clock))
    train_identity.main(flags(faces, tmp_path, "--num_epochs", "3", "--pretrain_epochs", "3"))
    seconds = pd.read_csv(tmp_path / "train_results.csv")["Seconds"]
    ticks = next(clock)
    assert 0.8 * ticks < seconds.sum() < ticks
