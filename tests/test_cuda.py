"""CUDA: its branches walked with fake tensors, which need no GPU; then, where there is one, on it.

A fake tensor has a shape, a type and a device "cuda:0", but no values. Its autograd engine asks the
driver for the device, so gradients are zeros here; all else of a step is the real code. What would
wait for the GPU (`.item()`, `if tensor`) asks for a value and fails.
"""

import copy
import types

import numpy as np
import pandas as pd
import pytest
import ranks
import torch
import torch.distributed as dist
from conftest import TinyFaces
from PIL import Image
from test_train import flags, interrupt
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data_utils
import train_identity
import training_step
from data_utils import TrainDatasetFromFolder, to_pairs
from model import Generator
from support import checkpoints, figures, machine
from support.cli import InputError

CUDA = torch.device("cuda", 0)
needs_gpus = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


class Operations(TorchDispatchMode):
    """Notes the name, the types and the devices of every operation."""

    def __init__(self):
        super().__init__()
        self.noted = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        self.noted.append((str(function), [x.dtype for x in tensors],
                           {x.device.type for x in tensors}))
        return result

    def types(self, name):
        return [types for operation, types, _ in self.noted if operation.startswith(name)]


def move(module, device=None, memory_format=None):
    """nn.Module.to, which cannot swap the parameters of a module for fake ones."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                layout = memory_format if p.dim() == 4 else None
                part._parameters[name] = nn.Parameter(
                    p.detach().to(device, memory_format=layout), p.requires_grad)
        for name, b in part._buffers.items():
            part._buffers[name] = b if b is None else b.to(device)
    return module


@pytest.fixture
def fake_cuda(monkeypatch):
    """A machine whose GPU has fake tensors; autocast and GradScaler take it for a real one."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(training_step, "load_face_network", lambda weights: TinyFaces())
    monkeypatch.setattr(nn.Module, "to", move)
    with FakeTensorMode() as mode:
        monkeypatch.setattr(training_step, "deepcopy",
                            lambda network: copy.deepcopy(network, {id(mode): mode}))
        yield CUDA


@pytest.fixture
def no_backward(monkeypatch):
    """Zeros for all gradients."""
    def grad(output, inputs, **options):
        return [torch.zeros_like(x) for x in ([inputs] if torch.is_tensor(inputs) else inputs)]

    def backward(output, gradient=None, inputs=None):
        for parameter in inputs or backward.parameters:
            parameter.grad = torch.zeros_like(parameter)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    return backward


def parse(precision, device="cuda", *more):
    return train_identity.parse(
        ["--crop_size", "32", "--batch_size", "4", "--beta", "0.1", "--gamma", "3", "--vgg_weights",
         "random", "--face_weights", "random", "--device", device, "--precision", precision, *more])


# ---------------------------------------------------------------------------------------------
# Without a GPU


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "auto"])
def test_a_step_stays_on_the_gpu_and_in_its_precision(precision, fake_cuda, no_backward):
    trainer = training_step.build_trainer(parse(precision, "cuda", "--alpha", "0"), fake_cuda, 10)
    trainer.netG.train()
    trainer.netD.train()
    no_backward.parameters = list(trainer.netG.parameters())
    lr, hr = (torch.empty(4, 3, side, side, device=fake_cuda) for side in (4, 32))
    with Operations() as operations:
        with trainer.autocast():
            targets = training_step.batch_targets(trainer, [None, 0, None, None], hr)
        values = training_step.train_step(trainer, lr, hr, targets, True, True)
        training_step.apply_updates(trainer, True)
    assert values.dtype == torch.float32
    # the scale of fp16 is kept on the GPU, too
    assert not [name for name, _, devices in operations.noted if len(devices) > 1]
    expected = {"fp32": torch.float32, "fp16": torch.float16}.get(precision, torch.bfloat16)
    convolutions, products = map(operations.types, ("aten.convolution", "aten.mm"))
    assert len(convolutions) > 20 and len(products) == 3  # TinyFaces has the products
    assert {types[-1] for types in convolutions + products} == {expected}
    assert trainer.scaler.is_enabled() == (precision == "fp16")
    assert trainer.checkpoint_chunk is None and trainer.chunk == 4
    assert len(operations.types("aten._fused_adam_")) == 2
    assert len(operations.types("aten._foreach_lerp_")) == 1
    for network in (trainer.netG, trainer.netD, trainer.average):
        for parameter in network.parameters():
            assert parameter.device == fake_cuda and parameter.dtype == torch.float32
            assert parameter.dim() < 4 or parameter.is_contiguous(
                memory_format=torch.channels_last)


def test_several_gpus_share_batchnorms_statistics(fake_cuda, monkeypatch):
    wrapped = []
    monkeypatch.setattr(training_step, "DistributedDataParallel",
                        lambda network, **options: wrapped.append(network) or network)
    monkeypatch.setattr(nn.SyncBatchNorm, "convert_sync_batchnorm",
                        classmethod(lambda cls, network: network.apply(
                            lambda m: setattr(m, "synchronised", True))))
    trainer = types.SimpleNamespace()
    training_step.build_networks(trainer, parse("fp32"), fake_cuda, world=2)
    assert wrapped == [trainer.netG, trainer.netD]
    for network in (trainer.netG, trainer.netD, trainer.average):
        assert network.synchronised


def test_a_generator_with_shared_statistics_is_saved_like_any_other():
    plain = Generator(8)
    shared = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    assert not any(type(module) is nn.BatchNorm2d for module in shared.modules())
    assert shared.state_dict().keys() == plain.state_dict().keys()
    lr = torch.rand(1, 3, 4, 4)
    assert torch.equal(shared.eval()(lr), plain.eval()(lr))


def test_lr_is_made_in_float_on_the_gpu(fake_cuda):
    """Its interpolation knows no whole numbers."""
    with Operations() as operations:
        lr, hr = to_pairs(torch.empty(2, 16, 16, 3, dtype=torch.uint8, device=fake_cuda), 8)
    passes = operations.types("aten._upsample_bicubic2d_aa")
    assert len(passes) == 2 and all(set(types) == {torch.float32} for types in passes)
    assert lr.shape == (2, 3, 2, 2) and hr.shape == (2, 3, 16, 16)
    for images in (lr, hr):
        assert images.dtype == torch.float32 and images.device == fake_cuda
    assert hr.is_contiguous(memory_format=torch.channels_last)


def test_lr_made_in_float_is_pillows():
    """In black and white, where bicubic overshoots: at most one level apart, and seldom."""
    rng = np.random.default_rng(0)
    crops = (255 * rng.integers(0, 2, (4, 8, 8, 3), np.uint8)).repeat(12, 1).repeat(12, 2)
    ours = data_utils.downscale_levels(torch.tensor(crops).permute(0, 3, 1, 2).float(), (12, 12))
    pillows = [np.asarray(Image.fromarray(crop).resize((12, 12), Image.Resampling.BICUBIC))
               for crop in crops]
    apart = np.abs(ours.permute(0, 2, 3, 1).numpy() - np.array(pillows))
    assert set(np.unique(apart)) <= {0, 1} and apart.mean() < 0.02


@pytest.mark.parametrize("cache_gb, room", [(4.0, 4), (4.0, 3), (0.0, 9)])
def test_crops_are_cut_on_the_gpu_or_copied_from_pinned_memory(cache_gb, room, faces,
                                                                monkeypatch):
    """room: the GPU's free memory in multiples of the frames with their mirror images."""
    copies = []

    def pin_memory(self, *_):
        pinned = self.clone()
        pinned.pinned = True
        return pinned

    def to(self, *args, non_blocking=False, **options):
        if args and isinstance(args[0], torch.device):
            copies.append((getattr(self, "pinned", False), non_blocking))
            return self
        return convert(self, *args, **options)

    def loader(dataset, batch_sampler, pin_memory, **_):
        for indices in batch_sampler:
            batch = torch.utils.data.default_collate([dataset[i] for i in indices])
            yield [x.pin_memory() for x in batch] if pin_memory else batch

    convert = torch.Tensor.to
    dataset, plain = (TrainDatasetFromFolder(faces / "train", 16, 2, "mixed", 1, cache_gb, True)
                      for _ in range(2))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (
        room * 2 * sum(frame.nbytes for frame in dataset.frames), 0))
    monkeypatch.setattr(data_utils, "DataLoader", loader)
    for epoch in (1, 2, 3, 4):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "pin_memory", pin_memory)
            patch.setattr(torch.Tensor, "to", to)
            dataset.set_epoch(epoch)
            got = list(dataset.batches([[0, 1], [2]], CUDA))
        if cache_gb and room == 4:  # frames and mirror images once, then what was made of them
            of_frames = 2 * len(dataset) if epoch == 1 else 0
            assert len(copies) == of_frames + bool(dataset.precomputed)
            assert not any(pinned for pinned, _ in copies)
        else:
            assert len(got) == 2 and set(copies) == {(True, True)}
        copies.clear()
        plain.set_epoch(epoch)
        assert all(torch.equal(a, b) for batch, indices in zip(got, ([0, 1], [2]))
                   for a, b in zip(batch, to_pairs(torch.stack([*map(plain.crop, indices)]), 2)))


@pytest.mark.parametrize("supported", [True, False])
def test_auto_is_bf16_where_the_gpu_has_it(supported, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: supported or emulated)
    assert machine.fast_precision(CUDA) == ("bf16" if supported else "fp16")


def test_fp32_is_not_tf32(monkeypatch):
    """Whatever was set before, a script that has chosen its device computes in fp32."""
    joined, devices = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(dist, "init_process_group", joined.append)
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "3"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    for choose in (machine.choose_device, machine.set_up_machine):
        torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("high")
        chosen = choose("auto")
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert chosen == (torch.device("cuda", 1), 3, 4)
    assert devices == [torch.device("cuda", 1)] and joined == ["nccl"]
    assert torch.backends.cudnn.benchmark
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="--nproc_per_node: more processes than GPUs, .* 2"):
        machine.set_up_machine("auto")


@pytest.mark.parametrize("now", [2, 1])
def test_the_gpus_random_numbers_go_on(now, tmp_path, monkeypatch):
    """If there are as many GPUs as before."""
    states, restored = [torch.tensor([1], dtype=torch.uint8), torch.tensor([2])], []
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", restored.extend)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: now)
    checkpoints.save_run(tmp_path, {}, {})
    checkpoints.restore_run(checkpoints.read_run(tmp_path), {}, "last.pt")
    assert restored == (states if now == 2 else [])


# ---------------------------------------------------------------------------------------------
# On a GPU


class TestOnGPU:
    pytestmark = needs_gpus

    def step(self, device, precision):
        """(logged values, gradients of G, of D) of a step on four images, all terms."""
        machine.choose_device(device)
        device = torch.device(device)
        trainer = training_step.build_trainer(
            parse(precision, device.type, "--without", "ratio_bound"), device, 1)
        generator = torch.Generator().manual_seed(5)
        lr, hr = (torch.rand(4, 3, side, side, generator=generator).to(
            device, memory_format=torch.channels_last) for side in (4, 32))
        trainer.netG.train()
        trainer.netD.train()
        with trainer.autocast():
            targets = training_step.batch_targets(trainer, [0, None, 1, None], hr)
        values = training_step.train_step(trainer, lr, hr, targets, True, True)
        scale = trainer.scaler.get_scale()
        return [values.cpu(), *(torch.cat([p.grad.flatten() / scale for p in network.parameters()])
                                .cpu() for network in (trainer.netG, trainer.netD))]

    @pytest.mark.parametrize("precision, loss, gradient", [
        ("fp32", 1e-4, 0.9999), ("bf16", 0.03, 0.95), ("fp16", 0.02, 0.99)])
    def test_the_step_is_the_cpus(self, precision, loss, gradient):
        """Losses to a share of their size, gradients by their direction and length."""
        ours, expected = self.step("cuda", precision), self.step("cpu", "fp32")
        torch.testing.assert_close(ours[0], expected[0], rtol=loss, atol=1e-9)
        for a, b in zip(ours[1:], expected[1:]):
            assert a.isfinite().all() and torch.cosine_similarity(a, b, dim=0) > gradient
            assert a.norm().item() == pytest.approx(b.norm().item(), rel=0.1)

    def test_fp32_has_its_24_bits(self):
        """TF32 has 11: an error of 1e-4 of the result's size."""
        machine.choose_device("cuda")
        x, weight = torch.randn(2, 64, 32, 32), torch.randn(64, 64, 3, 3)
        rows = x.flatten(2)[0]
        for ours, exact in (
                (nn.functional.conv2d(x.cuda(), weight.cuda()),
                 nn.functional.conv2d(x.double(), weight.double())),
                (rows.cuda() @ rows.cuda().T, rows.double() @ rows.double().T)):
            assert (ours.cpu() - exact).norm() < 1e-5 * exact.norm()

    @pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
    def test_a_run_that_was_stopped_goes_on(self, precision, faces, tmp_path, monkeypatch):
        monkeypatch.setattr(training_step, "load_face_network", lambda weights: TinyFaces())
        monkeypatch.setattr(figures, "save_curves", lambda table, path: None)
        argv = [*flags(faces, tmp_path / "whole"), "--device", "cuda", "--precision", precision]
        train_identity.main(argv)
        with monkeypatch.context() as patch:
            interrupt(patch, 5, 15)
            with pytest.raises(SystemExit):
                train_identity.main([*argv, "--out_dir", str(tmp_path / "stopped")])
        train_identity.main(["--resume", "--out_dir", str(tmp_path / "stopped")])
        whole, stopped = (pd.read_csv(tmp_path / name / "train_results.csv")
                          for name in ("whole", "stopped"))
        columns = ["Loss_D", "Loss_G", "Score_D", "PSNR", "SSIM", "Cosine", "Pixel"]
        pd.testing.assert_frame_equal(stopped[columns], whole[columns], rtol=0.02)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_two_gpus_learn_what_one_learns(self, tmp_path, monkeypatch):
        """With shared statistics, each rank's four images are half of a batch of eight."""
        monkeypatch.setattr(training_step, "load_face_network", lambda weights: TinyFaces())
        machine.choose_device("cuda")
        without = "ratio_bound", "mixed_batches"
        ranks.on_two_ranks(ranks.save_step, str(tmp_path), without, "cuda")
        saved = [torch.load(tmp_path / f"{rank}.pt", map_location="cpu") for rank in range(2)]
        trainer, _ = ranks.step_of_ranks([0, 1], 1, without, CUDA)
        for name in ("netG", "netD"):
            ours, other = (torch.cat([g.flatten() for g in s[name]]) for s in saved)
            whole = torch.cat([p.grad.flatten() for p in getattr(trainer, name).parameters()])
            assert torch.equal(ours, other)
            assert (ours - whole.cpu()).norm() < 1e-3 * whole.norm().cpu()
