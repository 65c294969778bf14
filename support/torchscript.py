"""A judge from a TorchScript file, which is code that the user trusts."""

import warnings
import zipfile
from pathlib import Path

import torch

from support.cli import InputError

EXPORTED = {"archive_format", "serialized_exported_program.json"}  # in torch.export's
SCRIPTED = "constants.pkl"  # in TorchScript's


def names_inside(path):
    """Names of the files in a zip archive; none if it is no such archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {Path(entry).name for entry in archive.namelist()}
    except Exception:  # a damaged directory raises what it likes
        return set()


def load_script(path):
    """A TorchScript file -> the network in eval mode. Raises InputError naming --judge."""
    inside = names_inside(path)
    if inside & EXPORTED or Path(path).suffix == ".pt2":
        # torch.export.load unpickles and opens libraries that lie in the archive
        raise InputError(f"--judge {path}: a torch.export archive, which can run any program when "
                         "it is opened; save the network with torch.jit.save instead")
    try:
        if SCRIPTED not in inside:
            raise ValueError("no TorchScript")
        with zipfile.ZipFile(path) as archive, warnings.catch_warnings():
            if archive.testzip():  # PyTorch looks at no checksum
                raise ValueError("damaged")
            warnings.simplefilter("ignore")  # of PyTorch's next ways to export
            network = torch.jit.load(path, map_location="cpu").eval()
    except Exception:  # the loader raises what it likes
        raise InputError(f"--judge {path}: damaged, or not a TorchScript file") from None
    network.label = path
    return network
