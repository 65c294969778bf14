"""evaluate.py --export: what other programs compute is what PyTorch computes."""

import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch

import evaluate
from model import Generator
from support import checkpoints
from support.cli import InputError

SIZES = [(1, 3, 16, 24), (2, 3, 33, 17)]


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """(checkpoint of a 4x generator with slopes and pictures of its own, the generator)."""
    torch.manual_seed(0)
    generator, path = Generator(4).eval(), tmp_path_factory.mktemp("network") / "netG.pth"
    with torch.no_grad():
        generator.last.weight.mul_(5)
        for i, (name, weight) in enumerate(generator.named_parameters()):
            if "prelu" in name:
                weight.fill_(0.1 + 0.02 * i)
    checkpoints.save_torch(generator.state_dict(), path)
    return path, generator


def exported(network, kind, path):
    evaluate.main(["--export", kind, str(path), "--checkpoint", str(network[0])])
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # one file, and complete
    assert evaluate.export.is_export(path)  # and may be replaced
    return str(path)


def random_lr(size):
    return torch.rand(size, generator=torch.Generator().manual_seed(1))


def test_onnx(network, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(exported(network, "onnx", tmp_path / "netG.onnx"),
                                       providers=["CPUExecutionProvider"])
    for size in SIZES:
        lr = random_lr(size)
        sr, = session.run(None, {"lr": lr.numpy()})
        with torch.no_grad():
            expected = network[1](lr).numpy()
        assert expected.std() > 0.05
        np.testing.assert_allclose(sr, expected, atol=1e-4)


def test_torchscript(network, tmp_path):
    path = tmp_path / "netG.pt"
    exported(network, "torchscript", path)
    exported(network, "torchscript", path)  # ours is replaced
    assert b"netG" not in path.read_bytes()  # the name, with the process in it, that it had first
    script = torch.jit.load(path)
    for size in SIZES:
        lr = random_lr(size)
        torch.testing.assert_close(script(lr), network[1](lr), atol=1e-4, rtol=0)


def test_safetensors(network, tmp_path):
    torch_file = pytest.importorskip("safetensors.torch")
    path = exported(network, "safetensors", tmp_path / "netG.safetensors")
    expected = network[1].state_dict()
    for state in (torch_file.load_file(path), checkpoints.load_generator(path).state_dict()):
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_safetensors_are_checked_like_any_checkpoint(network, tmp_path):
    torch_file = pytest.importorskip("safetensors.torch")
    state, path = network[1].state_dict(), tmp_path / "bad.safetensors"
    for bad, reason in ((state | {"first.0.bias": torch.full((64,), torch.nan)}, "NaN or infinite"),
                        ({"first.0.bias": torch.zeros(64)}, "sub-pixel blocks"),
                        (state | {"first.0.bias": torch.zeros(3)}, "not a checkpoint")):
        torch_file.save_file(bad, path)
        with pytest.raises(InputError, match=f"bad.safetensors: .*{reason}"):
            checkpoints.load_generator(path)
    checkpoints.save_safetensors(state, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="bad.safetensors: truncated"):
        checkpoints.load_generator(path)
    with pytest.raises(InputError, match="no such checkpoint"):
        checkpoints.load_generator(tmp_path / "none.safetensors")


@pytest.mark.parametrize("kind, package", [("onnx", "onnx"), ("onnx", "onnxscript"),
                                           ("safetensors", "safetensors.torch")])
def test_a_package_that_is_missing_is_named(network, tmp_path, monkeypatch, kind, package):
    if package == "onnxscript":
        pytest.importorskip("onnx")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"pip install {kind}"):
        exported(network, kind, tmp_path / "out")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("kind, suffix", [("onnx", ".onnx"), ("torchscript", ".pt"),
                                          ("safetensors", ".safetensors")])
def test_a_file_of_another_kind_is_not_replaced(network, tmp_path, monkeypatch, kind, suffix):
    path = tmp_path / "face.png"
    path.write_bytes(b"the user's")
    with pytest.raises(InputError, match=f"--export {path}: .* no {suffix} file.* not overwritten"):
        exported(network, kind, path)
    assert path.read_bytes() == b"the user's"
    path = path.rename(tmp_path / f"generator{suffix}")
    monkeypatch.setattr(evaluate.export, "export", lambda *_: None)
    with pytest.raises(InputError, match=f"--export {path}: .* not overwritten"):
        exported(network, kind, path)  # another's, of the right suffix
    if kind == "torchscript":
        torch.jit.script(torch.nn.Identity()).save(path)  # a judge, say
        with pytest.raises(InputError, match=f"--export {path}: .* not overwritten"):
            exported(network, kind, path)
        torch.jit.script(torch.nn.Sequential(OrderedDict(upsample=torch.nn.Identity()))).save(path)
    else:
        path.write_bytes(b"... upsample.0.conv.weight ...")
    exported(network, kind, path)


@pytest.mark.parametrize("more", [["--judge", "dlib"], ["--shift", "1"], ["--export_lr", "lr"],
                                  ["--gallery", "people"]])
def test_what_an_export_would_ignore_is_refused(tmp_path, more):
    with pytest.raises(InputError, match=f"{more[0]}: leave it out beside --export"):
        evaluate.main(["--export", "onnx", str(tmp_path / "out.onnx"), *more])
    with pytest.raises(InputError, match="--export onnx: give the file to write"):
        evaluate.main(["--export", "onnx", ""])


def test_versions_that_do_not_go_together_are_named(network, tmp_path, monkeypatch):
    """As torch 2.9 with onnxscript 0.6: no full disk."""
    pytest.importorskip("onnx")
    onnxscript = pytest.importorskip("onnxscript")

    def fail(*_args, **_how):
        raise RuntimeError("no such pass\nof many lines")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(InputError, match="onnx: torch .*no such pass.*pip install") as error:
        exported(network, "onnx", tmp_path / "out.onnx")
    assert onnxscript.__version__ in str(error.value) and "\n" not in str(error.value)
    assert "free some space" not in str(error.value) and not [*tmp_path.iterdir()]


def test_what_cannot_be_exported(network, tmp_path):
    with pytest.raises(InputError, match="--export tflite: give onnx, torchscript or safetensors"):
        exported(network, "tflite", tmp_path / "out")
    with pytest.raises(InputError, match="one generator"):
        evaluate.main(["--export", "onnx", "out", "--checkpoint", "a.pth", "b.pth"])
