"""ablation.py: a tiny ablation that is interrupted, goes on, and is asked for again."""

import hashlib
import json
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TinyFaces
from PIL import Image
from torch import nn

import ablation
import evaluate
import train_identity
import training_step
from data_utils import ValidDatasetFromFolder
from model import Generator
from support import checkpoints, figures
from support.cli import InputError
from support.portraits import synthetic_portraits

NAMES = ["baseline", "visual", "identity", "gamma_30"]
RUNS = [f"{name}_seed{seed}" for seed in (1, 2) for name in NAMES]


def tiny_vgg(_):
    torch.manual_seed(3)
    network = nn.Sequential(nn.AvgPool2d(4), nn.Conv2d(3, 8, 3)).requires_grad_(False)
    network.label = "tiny"
    return network


class TinyGenerator(Generator):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.residual = nn.Identity()


class TinyDiscriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.classifier = nn.Linear(75, 1)

    def forward(self, images):
        return self.classifier(nn.functional.adaptive_avg_pool2d(images, 5).flatten(1)).squeeze(1)


def flags(folder):
    return ["--train_dir", f"{folder}/train", "--valid_dir", f"{folder}/valid", "--crop_size", "32",
            "--upscale_factor", "2", "--batch_size", "16", "--without", "lazy", "--device", "cpu",
            "--precision", "fp32", "--start", f"{folder}/start.pth", "--epochs", "2",
            "--last_k", "2", "--seeds", "1", "2", "--gamma", "30", "--judge", f"{folder}/judge.pt",
            "--out_dir", f"{folder}/runs", "--results_dir", f"{folder}/results"]


def modified(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder in which an ablation was stopped in visual_seed1, went on and ended."""
    folder = tmp_path_factory.mktemp("ablation")
    for split, n, size, seed in (("train", 16, 32, 1), ("valid", 4, 36, 2)):  # frames of 36 px
        (folder / split).mkdir()
        for i, portrait in enumerate(synthetic_portraits(n, size, seed)):
            Image.fromarray(portrait).save(folder / split / f"{i}.png")
    torch.jit.script(TinyFaces()).save(folder / "judge.pt")
    update, updates = training_step.apply_updates, []

    def update_and_interrupt(run, with_gan):
        update(run, with_gan)
        updates.append(with_gan)
        if len(updates) == 2 + 2:  # baseline, then in visual's second epoch
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        for module in (training_step, evaluate):
            patch.setattr(module, "load_face_network", lambda _: TinyFaces())
        patch.setattr(training_step, "load_vgg", tiny_vgg)
        patch.setattr(training_step, "Discriminator", TinyDiscriminator)
        for module in (training_step, checkpoints):
            patch.setattr(module, "Generator", TinyGenerator)
        patch.setattr(ablation, "BLEND", [0.0, 0.5, 1.0])
        torch.manual_seed(4)
        checkpoints.save_torch(TinyGenerator(2).state_dict(), folder / "start.pth")
        for name in ("save_curves", "save_samples"):  # most of the time, and not looked at here
            patch.setattr(figures, name, lambda *_: None)
        patch.setattr(train_identity, "apply_updates", update_and_interrupt)
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        with pytest.raises(SystemExit) as stop:
            ablation.main(flags(folder))
        assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        between = {path.name: modified(path) for path in (folder / "runs").iterdir()}
        ablation.main(flags(folder))
        yield folder, stop.value.code, between, updates


# ---------------------------------------------------------------------------------------------
# Training


def test_an_interrupted_run_is_resumed(done):
    folder, code, between, updates = done
    assert code == 128 + signal.SIGTERM
    assert set(between) == {"baseline_seed1", "visual_seed1"}
    assert "netG_epoch_2_2.pth" not in {path.name for path in between["visual_seed1"]}
    assert {p.name for p in (folder / "runs").iterdir()} == {*RUNS}
    assert len(updates) == 8 * 2  # no step was taken twice
    assert modified(folder / "runs" / "baseline_seed1") == between["baseline_seed1"]
    table = pd.read_csv(folder / "runs" / "visual_seed1" / "train_results.csv")
    assert table["Epoch"].tolist() == [1, 2]


def test_runs_differ_in_weights_and_seed_alone(done):
    runs = done[0] / "runs"
    start = hashlib.sha256((done[0] / "start.pth").read_bytes()).hexdigest()
    configs = {name: json.loads((runs / name / "config.json").read_text()) for name in RUNS}
    of_the_run = ("alpha", "beta", "gamma", "seed")
    weights = {name: tuple(config["flags"].pop(key) for key in of_the_run)
               for name, config in configs.items()}
    assert weights["visual_seed2"] == (0.006, 0.001, 0.006, 2)
    assert weights["gamma_30_seed1"] == (0.005, 0.001, 30.0, 1)
    first = configs["baseline_seed1"]
    assert first["start"] == start and first["flags"]["pretrain_epochs"] == 0
    assert all(c["flags"] == first["flags"] and c["start"] == start for c in configs.values())


def test_asked_again_it_trains_nothing(done, capsys):
    folder, _, _, updates = done
    before, steps = modified(folder / "runs"), len(updates)
    tables = [(folder / "results" / f"ablation.{kind}").read_bytes() for kind in ("csv", "md")]
    ablation.main(flags(folder))
    assert modified(folder / "runs") == before and len(updates) == steps
    assert tables == [(folder / "results" / f"ablation.{kind}").read_bytes()
                      for kind in ("csv", "md")]
    assert capsys.readouterr().out.count("is finished") == 8


def test_without_a_flag_it_is_the_whole_study(done, tmp_path, monkeypatch):
    """Seven weightings, three seeds, 15 GAN epochs from the shipped generator of the pixel loss."""
    called = []
    monkeypatch.setattr(train_identity, "main", called.append)
    # nothing is trained
    monkeypatch.setattr(ablation, "check_networks", lambda folder, first: None)
    args = ablation.parse(["--out_dir", str(tmp_path)])
    assert args.judge == ["dlib"] and args.training == []
    runs = ablation.train_all(args, [], {}, "")
    assert [folder.name for folder in runs.values()] == [
        f"{name}_seed{seed}" for seed in (0, 1, 2) for name in (
            "baseline", "visual", "identity", "gamma_0", "gamma_0.05", "gamma_1",
            "gamma_3")]
    settings = [train_identity.parse(argv) for argv in called]
    shipped = str(checkpoints.shipped_generator("pixel"))
    assert [s.out_dir for s in settings] == [*map(str, runs.values())]
    assert {(s.start, s.num_epochs, s.pretrain_epochs, s.lr) for s in settings} == {
        (shipped, 15, 0, 1e-4)}  # the rate of the ablation, not of --start
    assert [s.gamma for s in settings[:7]] == [0, 0.006, 0.6, 0, 0.05, 1, 3]


@pytest.mark.parametrize("more, said", [
    (["--epochs", "3"], "--num_epochs 2 -> 3"),
    (["--epochs", "1"], "--num_epochs 2 -> 1"),
    (["--lr", "0.1"], "--lr 0.0001 -> 0.1"),
    (["--precision", "bf16"], "--precision fp32 -> bf16"),
    (["--train_dir", "OTHER"], "the photographs"),
    (["--start", "runs/baseline_seed1/netG_epoch_2_2.pth"], "the generator that it starts from"),
])
def test_other_settings_are_refused_before_anything_is_trained(done, tmp_path, more, said):
    folder, _, _, updates = done
    before, steps = modified(folder / "runs"), len(updates)
    for i, portrait in enumerate(synthetic_portraits(8, 32, 9)):
        Image.fromarray(portrait).save(tmp_path / f"{i}.png")
    more = [str(folder / word) if word.startswith("runs") else word.replace("OTHER", str(tmp_path))
            for word in more]
    with pytest.raises(InputError, match=said):
        ablation.main([*flags(folder), *more])
    assert modified(folder / "runs") == before and len(updates) == steps


def test_a_bad_judge_or_run_is_named(done, tmp_path):
    folder = done[0]
    elsewhere = [*flags(folder), "--out_dir", str(tmp_path / "runs")]
    with pytest.raises(InputError, match="judge.*no such file"):
        ablation.main([*elsewhere, "--judge", "nothing.pt"])
    assert not (tmp_path / "runs").exists()  # not after hours of training
    with pytest.raises(InputError, match="runs/baseline_seed1: .*infinite or NaN"):
        ablation.main([*elsewhere, "--lr", "1e5", "--batch_size", "8"])


# ---------------------------------------------------------------------------------------------
# Figures


def test_tables_have_the_promised_columns(done):
    table = pd.read_csv(done[0] / "results" / "ablation.csv").set_index("name")
    blends = [f"blend {weight:g}" for weight in ablation.BLEND]
    assert table.index.tolist() == ["bicubic", "start", *NAMES, *blends]
    for metric in ("psnr_y", "ssim", "cosine", "cosine_judge"):
        assert (table[f"{metric}_low"] <= table[metric]).all()
        assert (table[metric] <= table[f"{metric}_high"]).all()
        differences = table.loc[NAMES[1:], f"{metric}_difference"]
        assert np.allclose(differences, table[metric][NAMES[1:]] - table[metric]["baseline"])
        assert table[f"{metric}_significant"].notna().sum() == 3
    assert {"alpha", "beta", "gamma", "n", "rank1", "auc_judge", "psnr_y_last_mean",
            "cosine_last_min", "d_accuracy_last_max"} <= set(table)
    assert (table["n"] == 4).all()


def test_values_are_those_of_the_generators(done):
    folder = done[0]
    table = pd.read_csv(folder / "results" / "ablation.csv").set_index("name")
    luma = np.array([0.299, 0.587, 0.114])[:, None, None]
    values = []
    for seed in (1, 2):
        netG = checkpoints.load_generator(folder / f"runs/identity_seed{seed}/netG_epoch_2_2.pth")
        for lr, _, hr in ValidDatasetFromFolder(folder / "valid", 0, 2):
            error = ((netG(lr[None])[0].detach().double().numpy() - hr.numpy()) * luma).sum(0)
            values.append(-10 * np.log10((error ** 2).mean()))
    assert table["psnr_y"]["identity"] == pytest.approx(np.mean(values), abs=1e-4)

    logs = [pd.read_csv(folder / f"runs/identity_seed{seed}/train_results.csv")["PSNR"].mean()
            for seed in (1, 2)]  # both epochs are the last two
    assert table["psnr_y_last_mean"]["identity"] == pytest.approx(np.mean(logs))
    assert table["psnr_y_last_min"]["identity"] == pytest.approx(min(logs))
    assert table["psnr_y_last_max"]["identity"] == pytest.approx(max(logs))


def test_blend_goes_from_visual_to_identity(done):
    folder = done[0]
    table = pd.read_csv(folder / "results" / "ablation.csv").set_index("name")
    for name, blend in (("visual", "blend 0"), ("identity", "blend 1")):
        log = pd.read_csv(folder / "runs" / f"{name}_seed1" / "train_results.csv").iloc[-1]
        assert table["psnr_y"][blend] == pytest.approx(log["PSNR"], abs=1e-4)
        assert table["cosine"][blend] == pytest.approx(log["Cosine"], abs=1e-5)


def test_last_epochs_by_hand():
    rows = [("a", seed, epoch, base + epoch) for seed, base in ((1, 0), (2, 10))
            for epoch in (1, 2, 3)]
    curves = pd.DataFrame(rows, columns=["name", "seed", "epoch", "psnr_y"])
    curves = curves.assign(ssim=curves["psnr_y"], cosine=0.5, d_accuracy=1.0)
    last = ablation.last_epochs(curves, 2).loc["a"]
    assert last["psnr_y"].to_dict() == {"mean": 7.5, "min": 2.5, "max": 12.5}


@pytest.mark.parametrize("low, high, by_seed, verdict", [
    (0.010, 0.014, [0.011, 0.013], True),
    (-0.014, -0.010, [-0.011, -0.013], True),
    (-0.001, 0.025, [0.011, 0.013], False),     # the photographs could have done it
    (0.010, 0.014, [0.004, 0.020], False),      # or the seed: 0.012 on average, 0.016 apart
    (0.010, 0.014, [-0.002, 0.026], False),
    (0.010, 0.014, [0.012], None),              # one seed, no spread
    (-0.010, 0.014, [0.002], False),
    (0.0, 0.014, [0.007, 0.007], False),
])
def test_significant(low, high, by_seed, verdict):
    assert ablation.significant(low, high, by_seed) is verdict


def test_two_seeds_let_noise_pass_by_trigonometry():
    # |a + b| / 2 > |a - b|: the ratio of two independent normals exceeds 2
    assert ablation.passed_by_noise(2) == pytest.approx(2 / np.pi * np.arctan(1 / 2), abs=0.005)
    assert ablation.passed_by_noise(5) < ablation.passed_by_noise(3) < ablation.passed_by_noise(2)


def test_differences_and_sentences_by_hand():
    runs = {(name, seed): Path(f"{name}_seed{seed}")
            for seed in (1, 2) for name in ("baseline", "identity")}
    images = [f"{i}.png" for i in range(50)]
    per_image = pd.concat([pd.DataFrame({
        "model": name, "image": images, "psnr_y": 25 + noise,
        "cosine": 0.8 + gain + noise / 1000}) for name, gain, noise in (
            ("baseline", 0.0, np.sin(np.arange(50))), ("identity", 0.012, np.cos(np.arange(50))))])
    per_run = pd.DataFrame({"model": [folder.name for folder in runs.values()],
                            "psnr_y": [25.0, 25.1, 25.2, 25.1],
                            "cosine": [0.8, 0.811, 0.81, 0.823]})
    pairs = ablation.differences(per_image, per_run, runs).set_index("metric", drop=False)
    assert pairs["significant"].to_dict() == {"psnr_y": False, "cosine": True}
    assert np.allclose(pairs["by_seed"]["cosine"], [0.011, 0.013])
    words = [ablation.sentence(pair) for pair in pairs.itertuples()]
    assert words[0].startswith("identity - baseline: PSNR-Y (dB) ")
    assert words[0].endswith("not significant (by seed: +0.100, -0.100)")
    assert words[1].startswith("identity - baseline: cosine +0.012")
    assert words[1].endswith("significantly better (by seed: +0.0110, +0.0130)")


def test_an_image_that_bicubic_restores_exactly_is_left_out_of_differences_too():
    """A flat one. The others differ by 0.5 dB, this one by -6.5."""
    runs = {(name, 0): Path(name) for name in ("baseline", "identity")}
    averaged = pd.DataFrame([
        [model, image, psnr, 0.5] for model, values in {
            "bicubic": (25.0, 24.0, np.inf), "baseline": (27.0, 28.0, 40.0),
            "identity": (27.4, 28.6, 33.5)}.items() for image, psnr in zip("abc", values)],
        columns=["model", "image", "psnr_y", "ssim"])
    per_run = pd.DataFrame({"model": ["baseline", "identity"], "psnr_y": [27.5, 28.0],
                            "ssim": 0.5})
    pairs = ablation.differences(averaged, per_run, runs).set_index("metric")
    assert pairs.loc["psnr_y", "difference"] == pytest.approx(0.5)
    assert pairs.loc["psnr_y", "by_seed"] == [pytest.approx(0.5)]
    assert pairs.loc["ssim", "difference"] == 0


def test_report_states_rule_conditions_and_references(done):
    folder = done[0]
    text = (folder / "results" / "ablation.md").read_text()
    assert "16 training photographs (mixed crops of 32 px), 4 validation photographs" in text
    assert "VGG16 tiny; InceptionResnetV1 tiny" in text and "seeds 1, 2" in text
    assert "excludes 0" in text and "spread between seeds" in text
    assert text.count("- baseline: ") == 3 * 4  # metrics: three and a judge's
    assert "| gamma_30 | 0.005 | 0.001 | 30.0 | " in text
    for name, values in figures.REPORT.items():
        assert f"| {name} | {values['PSNR']} | {values['SSIM']} | {values['Cosine']} |" in text
    with Image.open(folder / "results" / "ablation.png") as image:
        assert image.width > 1000


def test_runs_of_other_networks_are_not_compared(done):
    """As after a change of TORCH_HOME; of other code it is said, by the commits."""
    folder = done[0]
    path = folder / "runs" / "gamma_30_seed2" / "config.json"
    before = path.read_text()
    config = json.loads(before)
    config["networks"]["vgg16"] = "another"
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match="gamma_30_seed2: trained with other networks"):
        ablation.main(flags(folder))
    path.write_text(before)
    config = json.loads(before)
    others = config | {"git": {"commit": "f00dfeed" * 5}}
    words = ablation.conditions(ablation.parse(flags(folder)), [config, config, others])
    assert f"; commit {str(config['git']['commit'])[:7]}, f00dfee." in words


def test_equal_gammas_are_refused(done):
    with pytest.raises(InputError, match="--gamma 1000000.0 1000001.0: two of them are equal"):
        ablation.parse(["--gamma", "1000000", "1000001"])
    assert ablation.parse(["--gamma", "3", "3"]).gamma == [3, 3]
    assert ablation.parse(["--seeds", "1", "0", "1"]).seeds == [1, 0]  # noise is of two seeds
    assert ablation.parse(["--epochs", "3"]).last_k == 3               # as ablation.md then says


def test_the_person_who_stops_it_is_told_how_to_go_on(done, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_identity, "train", lambda args: exit(130))
    command = [*flags(done[0]), "--out_dir", str(tmp_path / "runs")]
    with pytest.raises(SystemExit) as stop:
        ablation.main(command)
    said = capsys.readouterr().out
    assert stop.value.code == 130
    assert f"python ablation.py {' '.join(command)}" in said


@pytest.mark.parametrize("name, said", [("valid", "among photographs"),
                                        ("results2", "was not written")])
def test_no_result_over_or_among_the_users_pictures(done, name, said):
    folder = done[0]
    (folder / "results2").mkdir(exist_ok=True)
    (folder / "results2" / "ablation.png").write_bytes(b"the user's")
    with pytest.raises(InputError, match=f"{name}.* {said}"):
        ablation.main([*flags(folder), "--results_dir", f"{folder}/{name}", "--out_dir",
                       f"{folder}/new"])
    assert not (folder / "new").exists()
    assert (folder / "results2" / "ablation.png").read_bytes() == b"the user's"


def test_a_weight_that_training_refuses_is_refused_before_the_first_run(done):
    folder = done[0]
    with pytest.raises(InputError, match="--gamma"):
        ablation.main([*flags(folder), "--gamma", "-1", "--out_dir", f"{folder}/new"])
    assert not (folder / "new").exists()


def test_the_bars_are_of_paired_differences():
    table = pd.DataFrame({
        "name": ["bicubic", "baseline", "identity"], "gamma": [np.nan, 0, 0.6],
        **{f"{metric}{end}": values for metric in ("psnr_y", "cosine") for end, values in (
            ("", [1, 20, 18]), ("_low", [0, 10, 9]), ("_high", [2, 30, 29]),
            ("_difference_low", [np.nan] * 2 + [-3]), ("_difference_high", [np.nan] * 2 + [-1]))}})
    bars = ablation.paired_intervals(table).set_index("name")
    assert list(bars.index) == ["baseline", "identity"]
    assert bars.loc["identity", ["psnr_y_low", "cosine_high"]].tolist() == [17, 19]
    assert bars.loc["baseline", ["psnr_y_low", "cosine_high"]].isna().all()


def test_a_judge_is_called_by_its_files_whole_name():
    pair = SimpleNamespace(model="visual", minus="baseline", metric="cosine_my_judge",
                           difference=0.1, low=0.0, high=0.2, by_seed=[0.1], significant=None)
    assert "cosine of judge my_judge +0.1000" in ablation.sentence(pair)


def test_a_flat_picture_leaves_an_average_its_interval():
    runs = {("baseline", 1): Path("baseline_seed1")}
    per_image = pd.DataFrame({"model": "baseline_seed1", "image": ["1", "2", "3"],
                              "psnr_y": [30.0, 31.0, np.inf], "cosine": 0.5})
    per_run = pd.DataFrame({"model": ["baseline_seed1"], "n": 3, "psnr_y": 30.5, "cosine": 0.5})
    _, summary = ablation.average_seeds(per_image, per_run, runs)
    assert summary.loc[0, ["psnr_y_low", "psnr_y_high"]].tolist() == [30.0, 31.0]


def test_a_run_goes_on_where_its_start_lies_elsewhere(done, tmp_path, monkeypatch):
    """Another checkout, another machine: last.pt holds the weights, and the file is the same."""
    folder, asked = done[0], []
    run = tmp_path / "visual_seed1"
    run.mkdir()
    for name in ("config.json", "last.pt"):
        shutil.copy(folder / "runs" / "visual_seed1" / name, run)
    shutil.copy(folder / "start.pth", tmp_path / "moved.pth")
    config = json.loads((run / "config.json").read_text())
    command = [*flags(folder), "--start", str(tmp_path / "moved.pth")]
    args = ablation.parse(command)
    monkeypatch.setattr(train_identity, "train", asked.append)
    ablation.train_run(run, [*args.training, "--preset", "visual", "--start", args.start, "--lr",
                             "1e-4", "--pretrain_epochs", "0", "--num_epochs", "2", "--seed", "1"],
                       config["data"], "again")
    assert asked[0].resume and asked[0].start == str(folder / "start.pth")


def test_auto_is_one_precision_for_all_runs(done, monkeypatch):
    """Also for those that another machine makes later."""
    def train_all(args, training, *_):
        raise InputError(train_identity.parse(training).precision)

    monkeypatch.setattr(ablation, "train_all", train_all)
    monkeypatch.setattr(ablation, "fast_precision", lambda device: "fp16")
    with pytest.raises(InputError, match="fp16"):
        ablation.main([*flags(done[0]), "--precision", "auto"])


def tables_of(gains, images):
    """(per image, per run, runs) of configurations with these cosines more than the baseline's."""
    runs = {(name, seed): Path(f"{name}_seed{seed}") for seed in (1, 2) for name in gains}
    per_image = pd.concat([pd.DataFrame({
        "model": name, "image": [f"{i}.png" for i in range(images)], "psnr_y": 25.0,
        "cosine": 0.5 + gain}) for name, gain in gains.items()])
    per_run = pd.DataFrame({"model": [folder.name for folder in runs.values()], "psnr_y": 25.0,
                            "cosine": [0.5 + np.mean(gains[name]) for name, _ in runs]})
    return per_image, per_run, runs


def test_five_photographs_find_nothing():
    """The interval excludes 0 and the seeds agree, but of 32 choices of signs two are as far."""
    gains = {"baseline": 0.0, "identity": np.array([0.01, 0.02, 0.015, 0.012, 0.018])}
    pair = ablation.differences(*tables_of(gains, 5)).query("metric == 'cosine'").iloc[0]
    assert pair["low"] > 0 and ablation.significant(pair["low"], pair["high"], pair["by_seed"])
    assert pair["p"] > 0.05 and not pair["significant"]


def test_what_the_identity_loss_does_by_itself_is_minus_gamma_0():
    """identity, which comes first, minus gamma_0: not the other way round."""
    gains = {"identity": np.linspace(0.02, 0.03, 30), "gamma_0": np.linspace(0.01, 0.014, 30)}
    pair, = ablation.differences(*tables_of(gains, 30), "gamma_0").query(
        "metric == 'cosine'").itertuples()
    assert pair.difference == pytest.approx(0.013)
    assert pair.by_seed == pytest.approx([0.013] * len(pair.by_seed))
    assert ablation.sentence(pair).startswith("identity - gamma_0: cosine +0.0130 [")


def test_a_gamma_of_0_is_the_reference_of_its_alpha(done, tmp_path):
    shutil.copytree(done[0] / "runs", tmp_path / "runs")
    ablation.main([*flags(done[0]), "--gamma", "0", "30", "--out_dir", f"{tmp_path}/runs",
                   "--results_dir", f"{tmp_path}/results"])
    text = (tmp_path / "results" / "ablation.md").read_text()
    assert set(re.findall(r"^- (\w+) - (\w+)", text, re.M)) == {
        (name, "baseline") for name in ("visual", "identity", "gamma_0", "gamma_30")} | {
        ("identity", "gamma_0"), ("gamma_30", "gamma_0")}


def test_holm_counts_the_comparisons_with_the_baseline():
    """Two of them; visual against identity is not asked."""
    noise = np.random.default_rng(0).standard_normal((2, 30)) * 0.01
    gains = {"baseline": 0.0, "visual": noise[0] + 0.004, "identity": noise[1] + 0.001}
    pairs = ablation.differences(*tables_of(gains, 30)).query("metric == 'cosine'")
    assert len(pairs) == 2 and pairs["p"].max() < 0.8
    assert pairs["p_holm"].min() == pytest.approx(2 * pairs["p"].min())
