"""Every command of the README, in its order, on tiny inputs.

A minute long, so .ci/run asks for it (`pytest -m readme`) and runs the two of "Install" itself.
"""

import importlib
import json
import re
import shlex
import shutil
import zipfile

import pytest
import torch
from conftest import ROOT
from PIL import Image

import train_identity
from model import Generator
from support import checkpoints
from support.cli import InputError
from support.portraits import synthetic_portraits

TINY = {
    "prepare_celeba_hq.py": ["--n_train", "4", "--n_valid", "2"],
    "train_identity.py": ["--crop_size", "24", "--num_epochs", "1", "--batch_size", "2", "--alpha",
                          "0", "--face_weights", "random", "--device", "cpu"],
    "evaluate.py": ["--crop_size", "16", "--face_weights", "random", "--device", "cpu"],
    "ablation.py": ["--crop_size", "32", "--epochs", "1", "--batch_size", "4", "--vgg_weights",
                    "random", "--face_weights", "random", "--device", "cpu", "--gamma", "3",
                    "--seeds", "0"],
    "benchmark.py": ["--batch_size", "2", "--crop_size", "32", "--rounds", "1", "--valid_images",
                     "2", "--device", "cpu"],
    "super_resolve.py": ["--device", "cpu"],
}


def commands():
    """The lines of the README's bash blocks that run one of the scripts, comments off."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and line[0] in ("python", "torchrun", "srun")]


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A folder with what a user has: a downloaded zip and photographs."""
    monkeypatch.chdir(tmp_path)
    pictures = [Image.fromarray(p) for p in synthetic_portraits(6, 256, 0)]
    with zipfile.ZipFile("CelebAMask-HQ.zip", "w") as archive:
        for i, picture in enumerate(pictures):
            picture.save(f"{i}.jpg")
            archive.write(f"{i}.jpg", f"CelebAMask-HQ/CelebA-HQ-img/{i}.jpg")
    shutil.copytree(ROOT / "epochs" / "pretrained", tmp_path / "epochs" / "pretrained")
    (tmp_path / "folder_of_faces").mkdir()
    pictures[0].resize((16, 16)).save("small_face.png")
    pictures[1].resize((16, 16)).save("folder_of_faces/a.png")
    pictures[2].save("party.jpg")
    return tmp_path


@pytest.mark.readme
def test_every_command(workspace, monkeypatch, capsys):
    ran = set()
    for words in commands():
        if words[0] != "python":  # several processes: test_train.py; here the flags
            train_identity.parse(words[words.index("train_identity.py") + 1:])
            continue
        script, argv = words[1], words[2:]
        more = [] if "--check" in argv else TINY[script]
        if "--resume" in argv:
            more = ["--num_epochs", "1"]
        torch.manual_seed(0)
        if script == "evaluate.py":  # a whole run leaves this
            checkpoints.save_torch(Generator(8).state_dict(), "epochs/netG_epoch_8_100.pth")
        try:
            importlib.import_module(script.removesuffix(".py")).main(argv + more)
        except (SystemExit, InputError) as end:
            # a drawn face may not be one to the detector: that is said, and is no crash
            assert getattr(end, "code", 2) in (0, None) or "--detect" in argv, words
        ran.add(script)
    assert ran == set(TINY)
    assert json.loads((workspace / "bench.json").read_text()).keys() >= {
        "train_images_per_second", "reference_images_per_second", "speedup", "conv_fraction",
        "memory_ratio", "data_images_per_second"}
    assert "data path, mixed crops" in capsys.readouterr().out
