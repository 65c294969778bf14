"""A generator in the formats of other programs: ONNX, TorchScript, safetensors."""

import warnings
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn

from support.checkpoints import replacing, save_safetensors
from support.cli import InputError, first_line
from support.fast_layers import PReLU
from support.torchscript import SCRIPTED, names_inside

FORMATS = {"onnx": ".onnx", "torchscript": ".pt", "safetensors": ".safetensors"}  # and suffixes


def export(generator, kind, path):
    """Write a Generator as one of FORMATS to `path`.

    The first two map any LR (N, 3, h, w) in [0, 1] to SR (N, 3, s*h, s*w); the last holds the
    weights alone, which `checkpoints.load_generator` reads. Raises InputError where a package is
    missing or the file cannot be written.
    """
    generator = generator.cpu().eval()
    if kind == "safetensors":
        save_safetensors(generator.state_dict(), path)
        return
    network, lr = plain(generator), torch.zeros(2, 3, 16, 24)
    with torch.no_grad(), replacing(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch's next ways to export
        if kind == "torchscript":
            with open(temporary, "wb") as file:  # given its name, TorchScript would write that, too
                torch.jit.save(torch.jit.trace(network, lr), file)
        else:
            write_onnx(network, lr, temporary)


def is_export(path):
    """Whether a file looks like one of FORMATS of a Generator, by names that lie in it."""
    if Path(path).suffix == ".pt":  # the suffix of a run's last.pt and of a judge, too
        return SCRIPTED in names_inside(path) and b"upsample" in Path(path).read_bytes()
    return b"upsample.0.conv.weight" in Path(path).read_bytes()


def write_onnx(network, lr, path):
    """`network` as ONNX with any number of images, height and width; one file holds everything."""
    try:
        import onnx  # noqa: F401
        import onnxscript
    except ImportError as error:
        raise InputError(f"--export onnx needs the package {error.name}: pip install onnx "
                         "onnxscript") from None
    shapes = {"lr": {0: "n", 2: "h", 3: "w"}}
    try:
        torch.onnx.export(network, (lr,), str(path), input_names=["lr"], output_names=["sr"],
                          dynamic_shapes=shapes, dynamo=True, external_data=False, verbose=False)
    except RuntimeError as error:  # the exporter's own, whatever fails in it
        raise InputError(f"--export onnx: torch {torch.__version__} with onnxscript "
                         f"{onnxscript.__version__} failed ({first_line(error)}); pip install -U "
                         "torch onnx onnxscript") from error


def plain(generator):
    """A copy of a Generator of PyTorch's own layers alone: `fast_layers` are not for exporting."""
    network = deepcopy(generator)
    for module in [*network.modules()]:
        for name, child in module.named_children():
            if isinstance(child, PReLU):
                slope = nn.PReLU()
                slope.load_state_dict(child.state_dict())
                setattr(module, name, slope)
    last = network.last
    conv = nn.Conv2d(last.in_channels, last.out_channels, last.kernel_size, padding=last.padding)
    conv.load_state_dict(last.state_dict())
    network.last = nn.Sequential(nn.PixelShuffle(2), conv)
    return network.eval().requires_grad_(False)
