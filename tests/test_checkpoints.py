"""checkpoints.py: the public layout, untrusted files, files that survive, blends."""

import errno
import json
import os
import pickle
import resource
import shutil
import signal
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from model import Discriminator, Generator, probability
from support import checkpoints
from support.cli import InputError

# ---------------------------------------------------------------------------------------------
# The public code base's networks, written down again with its names


class PublicResidual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64)
        self.prelu = nn.PReLU()
        self.conv2, self.bn2 = nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64)

    def forward(self, x):
        y = self.prelu(self.bn1(self.conv1(x)))
        return x + self.bn2(self.conv2(y))


class PublicUpsample(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(64, 256, 3, padding=1)
        self.pixel_shuffle = nn.PixelShuffle(2)
        self.prelu = nn.PReLU()

    def forward(self, x):
        return self.prelu(self.pixel_shuffle(self.conv(x)))


class PublicGenerator(nn.Module):
    def __init__(self, doublings):
        super().__init__()
        self.block1 = nn.Sequential(nn.Conv2d(3, 64, 9, padding=4), nn.PReLU())
        for n in range(2, 7):
            setattr(self, f"block{n}", PublicResidual())
        self.block7 = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64))
        self.block8 = nn.Sequential(*[PublicUpsample() for _ in range(doublings)],
                                    nn.Conv2d(64, 3, 9, padding=4))

    def forward(self, x):
        y = first = self.block1(x)
        for n in range(2, 8):
            y = getattr(self, f"block{n}")(y)
        return (torch.tanh(self.block8(first + y)) + 1) / 2


class PublicDiscriminator(nn.Module):
    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(3, 64, 3, padding=1), nn.LeakyReLU(0.2)]
        channels = [64, 64, 128, 128, 256, 256, 512, 512]
        for n in range(1, 8):
            layers += [nn.Conv2d(channels[n - 1], channels[n], 3, stride=1 + n % 2, padding=1),
                       nn.BatchNorm2d(channels[n]), nn.LeakyReLU(0.2)]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Conv2d(512, 1024, 1), nn.LeakyReLU(0.2),
                   nn.Conv2d(1024, 1, 1)]
        self.net = nn.Sequential(*layers)

    def forward(self, x):
        return torch.sigmoid(self.net(x).view(len(x)))


def randomised(network, seed=0):
    """Random weights and BatchNorm statistics that keep every layer's part in the output."""
    torch.manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            nn.init.normal_(module.bias, std=0.1)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.normal_(module.bias, std=0.2)
        elif isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight, 0.1, 0.4)
    return network.eval()


@pytest.mark.parametrize("doublings", [1, 2, 3])
def test_public_generators_load_and_tell_their_factor(doublings, tmp_path):
    public = randomised(PublicGenerator(doublings))
    with torch.no_grad():
        public.block8[-1].weight.mul_(0.02)  # off the ends of the tanh
    state = public.state_dict()
    expected_names = {"block1.0.weight", "block1.1.weight", "block2.conv1.weight",
                      "block7.1.running_var", "block8.0.conv.weight", "block8.0.prelu.weight",
                      f"block8.{doublings}.weight"}
    assert expected_names <= state.keys()
    path = tmp_path / "any_name.pth"
    torch.save(state, path)
    generator = checkpoints.load_generator(path)
    assert generator.scale_factor == 2 ** doublings and not generator.training
    lr = torch.rand(2, 3, 6, 5)
    with torch.no_grad():
        sr = public(lr)
        assert sr.std() > 0.02 and 0.1 < sr.mean() < 0.9
        torch.testing.assert_close(generator(lr), sr, rtol=0, atol=1e-4)


def test_the_discriminator_is_the_public_one():
    public = randomised(PublicDiscriminator())
    state = public.state_dict()
    assert {"net.0.weight", "net.3.running_mean", "net.24.weight", "net.26.bias"} <= state.keys()
    discriminator = Discriminator().eval()
    discriminator.load_state_dict({
        key.replace("net.24.", "classifier.1.").replace("net.26.", "classifier.3.")
        .replace("net.", "features."): value for key, value in state.items()})
    images = torch.rand(4, 3, 24, 16)
    with torch.no_grad():
        expected = public(images)
        assert expected.std() > 1e-4
        torch.testing.assert_close(probability(discriminator(images)), expected)


def test_our_own_files_load_unchanged(tmp_path):
    network, path = Generator(4), tmp_path / "network.pth"
    checkpoints.save_torch(randomised(network).state_dict(), path)
    loaded = checkpoints.load_generator(path).state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in network.state_dict().items())


# ---------------------------------------------------------------------------------------------
# Untrusted files


class Hostile:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def refused(path, load=checkpoints.load_generator):
    """The message with which a file is refused: one line that names it."""
    with pytest.raises(InputError) as error:
        load(path)
    message = str(error.value)
    assert "\n" not in message and message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "network.pth"
    assert "no such checkpoint" in refused(path)
    torch.save(Generator(2).state_dict(), path)
    whole = path.read_bytes()
    pages = [b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1", b"\xff\xd8\xff\xe0"]
    for content in (b"", b"P", b"\x80", whole[:10], whole[:len(whole) // 2], whole[:-1],
                    bytes(2000), *pages):
        path.write_bytes(content)
        assert "truncated, damaged or not a checkpoint" in refused(path)


def test_a_flipped_bit_never_alters_what_is_loaded(tmp_path):
    """torch.load itself looks at no checksum: nearly every flip in a weight went through."""
    path = tmp_path / "netG.pth"
    torch.save(randomised(Generator(2)).state_dict(), path)
    whole, expected = path.read_bytes(), checkpoints.read_state(path)
    rng, found = np.random.default_rng(0), 0
    for bit in rng.integers(8 * len(whole), size=40):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            state = checkpoints.read_state(path)
        except InputError as error:
            found += "checksum of its record" in str(error)
            continue
        assert all(torch.equal(value, state[key]) for key, value in expected.items())  # padding
    assert found > 30


def test_a_checkpoint_is_no_zip_bomb(tmp_path):
    path = tmp_path / "netG.pth"
    torch.save({"first.0.bias": torch.zeros(2 ** 20)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    assert path.stat().st_size < 2 ** 14
    assert "packed or overlapping" in refused(path)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content)
        archive.filelist *= 3  # thrice the same bytes
    assert "packed or overlapping" in refused(path)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("key", [None, "weight"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_would_run_code_does_not(legacy, key, tmp_path):
    path, trace = tmp_path / "netG.pth", tmp_path / "trace"
    hostile = Hostile(f"touch {trace}")
    torch.save({key: hostile} if key else hostile, path,
               _use_new_zipfile_serialization=not legacy)
    assert "could run code" in refused(path)
    path.write_bytes(pickle.dumps(hostile))
    assert "could run code" in refused(path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(hostile))
    assert trace.exists()  # it was a real one


def test_other_networks_are_refused(tmp_path):
    path = tmp_path / "netG.pth"
    torch.save(nn.Linear(2, 2).state_dict(), path)
    assert "Generator" in refused(path)
    torch.save(Discriminator().state_dict(), path)
    assert "Generator" in refused(path)
    torch.save(Generator(2).state_dict(), path)
    state = Generator(2).state_dict()
    for wrong in ({k: v for k, v in state.items() if k != "skip.0.bias"},
                  state | {"first.0.weight": torch.zeros(64, 3, 7, 7)},
                  state | {"first.0.weight": state["first.0.weight"].to("meta")},
                  state | {"first.0.bias": torch.zeros(1).expand(10 ** 13)}):  # 40 TB if believed
        torch.save(wrong, path)
        assert "Generator" in refused(path)


@pytest.mark.parametrize("content", [{}, [1, 2], torch.zeros(3), {"epoch": 3}, {1: torch.zeros(2)}])
def test_what_is_no_state_dict_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "netG.pth")
    assert "not the state dict" in refused(tmp_path / "netG.pth")


def test_training_states_are_refused_as_networks(tmp_path):
    network = Generator(2)
    optimizer = torch.optim.Adam(network.parameters())
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pth")
    assert "not the state dict" in refused(tmp_path / "optimizer.pth")
    checkpoints.save_run(tmp_path, {"netG": network, "optimizerG": optimizer}, {"epoch": 1})
    assert "--resume" in refused(tmp_path / "last.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value, tmp_path):
    state = Generator(2).state_dict()
    state["residual.3.bn2.running_var"][5] = value
    torch.save(state, tmp_path / "netG.pth")
    message = refused(tmp_path / "netG.pth")
    assert "NaN" in message and "residual.3.bn2.running_var" in message


# ---------------------------------------------------------------------------------------------
# Files that survive


def test_writing_makes_folders_and_leaves_nothing_else(tmp_path):
    folder = tmp_path / "a" / "b"
    checkpoints.save_json({"x": [1, "é"]}, folder / "c.json")
    assert json.loads((folder / "c.json").read_text()) == {"x": [1, "é"]}
    checkpoints.save_text("new", folder / "c.json")
    assert (folder / "c.json").read_text() == "new"
    assert [p.name for p in folder.iterdir()] == ["c.json"]


@pytest.mark.parametrize("failure", [KeyError("x"), KeyboardInterrupt(),
                                     RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")])
def test_a_failure_while_writing_leaves_the_old_file(failure, tmp_path):
    path = tmp_path / "last.pt"
    path.write_text("old")
    with pytest.raises(type(failure)), checkpoints.replacing(path) as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".pt"
        temporary.write_text("half of the n")
        assert path.read_text() == "old"
        raise failure
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_of_a_folder_called_cuda_is_a_full_disk(tmp_path):
    with pytest.raises(InputError, match="could not write .*No space left on device; free some"):
        with checkpoints.replacing(tmp_path / "last.pt"):
            raise OSError(errno.ENOSPC, "No space left on device", "/data/CUDA/last.pt")


def test_an_error_without_words_is_still_one_line(tmp_path):
    with pytest.raises(InputError, match="could not write .*last.pt: RuntimeError; free some"):
        with checkpoints.replacing(tmp_path / "last.pt"):
            raise RuntimeError()


def test_a_long_name_can_be_written(tmp_path):
    path = tmp_path / ("é" * 125 + ".txt")  # 254 bytes, of the 255 that a disk takes
    checkpoints.save_text("new", path)
    assert path.read_text() == "new"


def test_only_our_own_leftovers_are_deleted(tmp_path):
    ours = [".last.123.tmp.pt", ".netG_epoch_8_3.7.tmp.pth"]
    users = [".notes.tmp.txt", ".last.tmp.pt", ".notes.123.tmp.txt", "last.123.tmp.pt", "last.pt",
             ".my.last.123.tmp.pt"]
    for name in ours + users:
        (tmp_path / name).touch()
    checkpoints.remove_leftovers(tmp_path, r"last|net[GD]_epoch_\d+_\d+")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(users)


def test_a_folder_that_cannot_be_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("old")
    for path in (tmp_path / "file" / "x.csv", tmp_path / "file" / "y" / "x.csv"):
        with pytest.raises(InputError, match="could not write .*x.csv"):
            checkpoints.save_text("new", path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="could not write .*folder"):
        checkpoints.save_text("new", tmp_path / "folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("save, value", [
    (checkpoints.save_torch, {"one": torch.zeros(30_000)}),
    (checkpoints.save_torch, {str(i): torch.zeros(9) for i in range(500)}),
    (checkpoints.save_text, "x" * 60_000),
    (checkpoints.save_csv, pd.DataFrame({"x": range(30_000)})),
])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_full_disk_leaves_the_old_file(save, value, tmp_path):
    path = tmp_path / "last.pt"
    path.write_text("old")
    reader, writer = os.pipe()
    child = os.fork()
    if not child:  # alone, the limit being one of the whole process
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            save(value, path)
        except BaseException as error:
            os.write(writer, f"{type(error).__name__} {error}".encode())
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    with open(reader, encoding="utf-8") as pipe:
        message = pipe.read()
    assert status == 0
    assert message.startswith(f"InputError could not write {path}: ") and "free some" in message
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "old"


def test_a_run_goes_on_with_its_parts_and_random_numbers(tmp_path):
    torch.manual_seed(3)
    network = nn.Linear(2, 2)
    checkpoints.save_run(tmp_path, {"netG": network}, {"epoch": 7, "rows": [[1.5, None]]})
    expected = torch.rand(4)
    other = nn.Linear(2, 2)
    state = checkpoints.read_run(tmp_path)
    assert state["progress"] == {"epoch": 7, "rows": [[1.5, None]]}
    checkpoints.restore_run(state, {"netG": other}, tmp_path / "last.pt")
    assert torch.equal(torch.rand(4), expected) and torch.equal(other.weight, network.weight)
    with pytest.raises(InputError, match="last.pt: netG does not fit"):
        checkpoints.restore_run(state, {"netG": nn.Linear(3, 3)}, tmp_path / "last.pt")
    with pytest.raises(InputError, match="elsewhere: no such folder"):
        checkpoints.read_run(tmp_path / "elsewhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="nothing to resume"):
        checkpoints.read_run(tmp_path / "empty")
    torch.save(network.state_dict(), tmp_path / "last.pt")
    assert "not a training state" in refused(tmp_path / "last.pt",
                                             lambda path: checkpoints.read_run(path.parent))


def test_a_shipped_generator_that_is_gone_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "PRETRAINED", tmp_path)
    with pytest.raises(InputError, match="--checkpoint"):
        checkpoints.shipped_generator()
    for name in ("netG_epoch_4_200.pth", "netD_epoch_8_300.pth", ".netG_epoch_8_400.1.tmp.pth",
                 "netG_epoch_8_100.pth"):
        (tmp_path / name).touch()
    assert checkpoints.shipped_generator() == checkpoints.generator_path(tmp_path, 8, 100)


def test_the_shipped_generator_is_there():
    """A fresh clone once lacked it: .gitignore named the one before."""
    assert checkpoints.load_generator(checkpoints.shipped_generator()).scale_factor == 8


def test_the_shipped_generators_are_known_by_their_digests(tmp_path):
    shipped = sorted(checkpoints.PRETRAINED.rglob("*.pth"))
    for path in shipped:
        line = f"{checkpoints.file_digest(path)}  {path.name}"
        assert line in path.with_name("SHA256SUMS").read_text().splitlines(), path
    copy = tmp_path / shipped[0].name
    checkpoints.save_torch(Generator(2).state_dict(), copy)
    checkpoints.load_generator(copy)
    shutil.copy(shipped[0].with_name("SHA256SUMS"), tmp_path)
    assert "SHA256SUMS" in refused(copy)
    checkpoints.load_generator(shutil.copy(copy, tmp_path / "netG_epoch_2_1.pth"))  # not named


# ---------------------------------------------------------------------------------------------
# Blends


@pytest.mark.parametrize("text, path, weight", [("B.pth:0.3", "B.pth", 0.3), ("b:1", "b", 1.0),
                                                ("C:/x/B.pth:0", "C:/x/B.pth", 0.0)])
def test_parse_blend(text, path, weight):
    assert checkpoints.parse_blend(text) == (path, weight)


@pytest.mark.parametrize("text", ["B.pth", "B.pth:", ":0.3", "0.3", "B.pth:1.5", "B.pth:-0.1",
                                  "B.pth:nan", "B.pth:much", ""])
def test_other_blends_are_refused(text):
    with pytest.raises(InputError, match="B.pth:0.3"):
        checkpoints.parse_blend(text)


def make_run(folder, seed, start, factor=2):
    """A run's folder with one generator of random weights -> (its path, its state dict)."""
    state = randomised(Generator(factor), seed).state_dict()
    path = folder / "netG_epoch_2_1.pth"
    checkpoints.save_torch(state, path)
    if start != "no config":
        checkpoints.save_json({"flags": {}} | ({"start": start} if start != "empty" else {}),
                              folder / "config.json")
    return path, state


def test_blend_is_the_weighted_mean_of_the_weights(tmp_path):
    path_a, a = make_run(tmp_path / "a", 1, "digest")
    path_b, b = make_run(tmp_path / "b", 2, "digest")
    for weight in (0.3, 1.0):
        blend = checkpoints.load_blend(path_a, path_b, weight)
        assert not blend.training and blend.scale_factor == 2
        for key, value in blend.state_dict().items():
            if value.is_floating_point():
                expected = (1 - weight) * a[key].double().numpy() + weight * b[key].double().numpy()
                np.testing.assert_allclose(value.numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("start_a, start_b", [("x", "y"), (None, None), ("x", None), ("x", "empty"),
                                              ("x", "no config"), ("no config", "no config")])
def test_generators_without_a_shared_start_are_not_blended(start_a, start_b, tmp_path):
    path_a, _ = make_run(tmp_path / "a", 1, start_a)
    path_b, _ = make_run(tmp_path / "b", 2, start_b)
    with pytest.raises(InputError, match="cannot be blended.*--start") as error:
        checkpoints.load_blend(path_a, path_b, 0.5)
    assert str(path_a) in str(error.value) and str(path_b) in str(error.value)


def test_a_generator_is_blended_with_the_one_it_was_fine_tuned_from(tmp_path):
    path_a, a = make_run(tmp_path / "a", 1, "x")
    path_b, b = make_run(tmp_path / "b", 2, checkpoints.file_digest(path_a))
    for paths in ((path_a, path_b), (path_b, path_a)):
        blend = checkpoints.load_blend(*paths, 0.5).last.bias
        torch.testing.assert_close(blend, (a["last.bias"] + b["last.bias"]) / 2)


def test_generators_of_different_factors_are_not_blended(tmp_path):
    path_a, _ = make_run(tmp_path / "a", 1, "x")
    path_b, _ = make_run(tmp_path / "b", 2, "x", factor=4)
    with pytest.raises(InputError, match="upscale factor or back_projection"):
        checkpoints.load_blend(path_a, path_b, 0.5)


@pytest.mark.parametrize("of_a, of_b", [(True, False), (False, True)])
def test_generators_of_which_one_projects_back_are_not_blended(of_a, of_b, tmp_path):
    paths = []
    for name, projects in (("a", of_a), ("b", of_b)):
        path, _ = make_run(tmp_path / name, 1, "x")
        checkpoints.save_torch(Generator(2, back_projection=projects).state_dict(), path)
        paths.append(path)
    with pytest.raises(InputError, match="upscale factor or back_projection"):
        checkpoints.load_blend(*paths, 0.5)


def test_shipped_kinds_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "PRETRAINED", tmp_path)
    (tmp_path / "pixel").mkdir()
    for name in ("netG_epoch_8_100.pth", "pixel/netG_epoch_8_7.pth"):
        (tmp_path / name).touch()
    assert checkpoints.shipped_generator("pixel") == tmp_path / "pixel" / "netG_epoch_8_7.pth"
