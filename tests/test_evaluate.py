"""evaluate.py: metrics against numpy and hand counts, judges, and the script on portraits."""

import base64
import functools
import io
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import pytorch_ssim
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import evaluate
from data_utils import ValidDatasetFromFolder
from model import Generator
from support import checkpoints, report, tables
from support.cli import InputError, run_script
from support.portraits import synthetic_portraits
from support.statistics import bootstrap
from support.verification import recognition, similarity

CPU = torch.device("cpu")


def psnr_by_hand(a, b):
    """(H, W, 3) arrays in [0, 1] -> dB on Y."""
    error = (a - b) @ np.array([0.299, 0.587, 0.114])
    return 10 * np.log10(1 / np.mean(error ** 2))


def ssim_by_hand(a, b):
    """Wang et al. 2004, zero-padded, channel by channel; (H, W, 3) arrays in [0, 1] -> mean."""
    g = np.exp(-np.arange(-5, 6) ** 2 / (2 * 1.5 ** 2))
    window = np.outer(g, g) / g.sum() ** 2

    def local_mean(x):
        padded = np.pad(x, ((5, 5), (5, 5), (0, 0)))
        return sum(window[i, j] * padded[i:i + x.shape[0], j:j + x.shape[1]]
                   for i in range(11) for j in range(11))

    c1, c2 = 0.01 ** 2, 0.03 ** 2
    ma, mb = local_mean(a), local_mean(b)
    va, vb = local_mean(a * a) - ma ** 2, local_mean(b * b) - mb ** 2
    cov = local_mean(a * b) - ma * mb
    return np.mean((2 * ma * mb + c1) * (2 * cov + c2)
                   / ((ma ** 2 + mb ** 2 + c1) * (va + vb + c2)))


def as_tensors(images):
    """(N, H, W, 3) array -> (N, 3, H, W) float tensor."""
    return torch.tensor(images, dtype=torch.float32).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def pairs():
    """Two pairs of pictures, one close and one not: (2, 18, 23, 3) arrays in [0, 1]."""
    rng = np.random.default_rng(0)
    hr = rng.random((2, 18, 23, 3))
    noise = rng.standard_normal(hr.shape) * np.array([0.03, 0.3])[:, None, None, None]
    return np.clip(hr + noise, 0, 1), hr


# ---------------------------------------------------------------------------------------------
# The metrics


def test_psnr_y(pairs):
    sr, hr = pairs
    actual = evaluate.psnr_y(as_tensors(sr), as_tensors(hr))
    np.testing.assert_allclose(actual, [psnr_by_hand(a, b) for a, b in zip(sr, hr)], rtol=1e-4)
    flat = torch.full((1, 3, 4, 4), 0.5)
    green = flat + torch.tensor([0, 0.1, 0])[:, None, None]
    assert evaluate.psnr_y(green, flat).item() == pytest.approx(-20 * np.log10(0.0587), rel=1e-4)
    assert evaluate.psnr_y(flat, flat).item() == np.inf


def test_ssim(pairs):
    """In float64, against numpy; in float32, which the networks give, against numpy on the same."""
    sr, hr = pairs
    expected = [ssim_by_hand(a, b) for a, b in zip(sr, hr)]
    assert expected[0] > 0.9 > expected[1]
    exact = [torch.tensor(x).permute(0, 3, 1, 2) for x in (sr, hr)]
    np.testing.assert_allclose(evaluate.ssim(*exact), expected, rtol=0, atol=1e-12)
    sr, hr = (x.astype(np.float32) for x in (sr, hr))
    expected = [ssim_by_hand(a.astype(float), b.astype(float)) for a, b in zip(sr, hr)]
    actual = evaluate.ssim(as_tensors(sr), as_tensors(hr).contiguous())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(evaluate.ssim(as_tensors(hr), as_tensors(hr)), [1, 1], atol=1e-12)


def test_ssim_is_that_of_the_reports_package(pairs):
    """pytorch-ssim 0.1, in float32; it halves its window with Python 2's `/`, which floored."""
    class Floored(int):
        def __truediv__(self, other):
            return int(self) // other

    sr, hr = (as_tensors(x) for x in pairs)
    size = Floored(11)
    window = pytorch_ssim.create_window(size, channel=3)
    expected = pytorch_ssim._ssim(sr, hr, window, size, 3, size_average=False)
    np.testing.assert_allclose(evaluate.ssim(sr, hr), expected, rtol=0, atol=1e-5)


def test_ssim_runs_where_the_images_are():
    images = torch.empty(2, 3, 16, 16, device="meta")  # shapes alone: as far as a GPU from the CPU
    assert evaluate.ssim(images, images).device.type == "meta"


def test_cosine():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 4, 6))
    expected = [x @ y / np.sqrt(x @ x * (y @ y)) for x, y in zip(a, b)]
    np.testing.assert_allclose(evaluate.cosine(torch.tensor(a), torch.tensor(b)), expected,
                               rtol=1e-5)


def recognised(probes, gallery):
    """{rate: value} without the intervals."""
    rates = recognition(similarity(probes, gallery), resamples=10)
    return {name: value for name, (value, _, _) in rates.items()}


def test_recognition_counted_by_hand():
    n = 20  # 380 impostor pairs: 1 % lets three of them through
    similarity = np.full((n, n), 0.01) + np.eye(n) * 0.59
    similarity[0, [0, 1, 2]] = 0.2, 0.5, 0.45    # third best, and under the threshold
    similarity[1, [0, 1]] = 0.4, 0.35            # second best, but over the threshold
    similarity[2, [0, 2]] = 0.31, 0.3            # second best; 0.31 is the threshold
    similarity[3, 3] = 0.005                     # behind everybody
    probes = np.hstack([similarity, np.sqrt(1 - (similarity ** 2).sum(1, keepdims=True))])
    gallery = np.eye(n, n + 1)
    lengths = np.linspace(0.5, 3, n)[:, None]    # which must not matter
    rates = recognised(probes * lengths, gallery * lengths[::-1])
    genuine, impostors = np.diag(similarity), similarity[~np.eye(n, dtype=bool)]
    wins = (genuine[:, None] > impostors).mean()
    assert rates == pytest.approx({"rank1": 16 / 20, "rank5": 19 / 20, "tar_at_far_1": 17 / 20,
                                   "auc": wins})


@pytest.mark.parametrize("better, found", [(4, 1.0), (5, 7 / 8)])
def test_rank_5_is_the_fifth_place(better, found):
    probes = np.eye(8)
    probes[0, :1 + better] = 0.3, *[0.4] * better
    rates = recognition(similarity(probes, np.eye(8)), resamples=10)
    assert rates["rank5"][0] == found


def test_recognition_of_random_embeddings_by_all_pairs():
    rng = np.random.default_rng(1)
    n = 25
    gallery = rng.standard_normal((n, 4))
    probes = gallery + rng.standard_normal((n, 4))
    unit = [x / np.sqrt((x ** 2).sum(1))[:, None] for x in (probes, gallery)]
    genuine = [unit[0][i] @ unit[1][i] for i in range(n)]
    impostors = [unit[0][i] @ unit[1][j] for i in range(n) for j in range(n) if i != j]
    auc = np.mean([(g > i) + (g == i) / 2 for g in genuine for i in impostors])
    # the largest TAR of any threshold whose FAR is at most 1 %
    tar = max(np.mean(np.array(genuine) > t) for t in impostors
              if np.mean(np.array(impostors) > t) <= 0.01)
    better = [sum(unit[0][i] @ unit[1][j] > genuine[i] for j in range(n)) for i in range(n)]
    rates = recognised(probes, gallery)
    assert rates == pytest.approx({"auc": auc, "tar_at_far_1": tar,
                                   "rank1": np.mean(np.array(better) < 1),
                                   "rank5": np.mean(np.array(better) < 5)})
    assert 0 < rates["rank1"] < rates["rank5"] < 1 and 0.5 < rates["auc"] < 1


def test_recognition_at_its_limits():
    faces = np.random.default_rng(0).standard_normal((12, 8))
    assert set(recognised(faces, faces).values()) == {1.0}
    same = recognised(np.ones((12, 8)), np.ones((12, 8)))  # a network that collapsed
    assert same == {"rank1": 0, "rank5": 0, "auc": 0.5, "tar_at_far_1": 0}
    one = recognised(faces[:1], faces[:1])
    assert np.isnan(one["auc"]) and np.isnan(one["tar_at_far_1"])


@pytest.mark.parametrize("value", [0, np.nan])
def test_an_embedding_that_is_none_is_never_a_hit(value):
    faces = np.random.default_rng(0).standard_normal((12, 8))
    none = np.full_like(faces, value)
    for probes, gallery in ((none, faces), (faces, none), (none, none)):
        rates = recognised(probes, gallery)
        assert rates["rank1"] == rates["rank5"] == rates["auc"] == rates["tar_at_far_1"] == 0
    assert recognised(none[:1], faces[:1])["rank1"] == 0
    part = faces.copy()
    part[:3] = value
    assert recognised(part, faces)["rank1"] == 9 / 12


def test_bootstrap_is_the_normal_interval_of_normal_data():
    values = np.random.default_rng(0).normal(5, 2, 400)
    low, high = bootstrap(values)
    half = 1.96 * values.std() / np.sqrt(400)
    assert low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.05 * half)
    assert (low, high) == bootstrap(values)
    assert (low, high) != bootstrap(values, seed=1)
    assert bootstrap(np.full(7, 0.25)) == (0.25, 0.25)


def test_bootstrap_of_a_coin_follows_the_binomial():
    """Means of 20 resampled from 10 heads: Binomial(20, 1/2) / 20, whose quantiles are 6 and 14."""
    values = np.repeat([0.0, 1.0], 10)
    assert bootstrap(values) == (6 / 20, 14 / 20)


def test_differences_are_paired_by_image():
    rng = np.random.default_rng(0)
    images = [f"{i}.png" for i in range(30)]
    a = pd.DataFrame({"model": "a", "image": images, "psnr_y": rng.normal(25, 3, 30),
                      "ssim": rng.random(30)})
    b = a.assign(model="b", psnr_y=a["psnr_y"] + 0.5)[::-1]  # constant gain, other order
    c = a.assign(model="c", psnr_y=a["psnr_y"] + rng.normal(0, 1, 30))
    hr = a.assign(model="HR", psnr_y=np.inf)
    table = tables.differences(pd.concat([a, b, c, hr]), seed=0)
    assert list(zip(table["model"], table["minus"])) == [
        (m, minus) for m, minus in (("b", "a"), ("c", "a"), ("c", "b")) for _ in range(2)]
    rows = table.set_index(["model", "minus", "metric"])
    gain = rows.loc["b", "a", "psnr_y"]
    for column in ("difference", "low", "high"):
        assert gain[column] == pytest.approx(0.5)
    assert gain["significant"] and not rows.loc["b", "a", "ssim"]["significant"]
    values = c["psnr_y"].to_numpy() - a["psnr_y"].to_numpy()
    noise = rows.loc["c", "a", "psnr_y"]
    assert noise["difference"] == pytest.approx(values.mean())
    half = 1.96 * values.std() / np.sqrt(30)
    assert noise["high"] - noise["low"] == pytest.approx(2 * half, rel=0.1)
    assert noise["significant"] == (abs(values.mean()) > half)


# ---------------------------------------------------------------------------------------------
# Batches


class Embedder(nn.Module):
    """Cheap and different for every face: a coarse picture of it."""

    def forward(self, x):
        return F.adaptive_avg_pool2d(x, 4).flatten(1)


def save_portraits(folder, sizes, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i, portrait in enumerate(synthetic_portraits(len(sizes), 64, seed)):
        Image.fromarray(portrait).resize(sizes[i]).save(folder / f"face_{i}.png")
    return folder


SIZES = [(40, 40), (40, 40), (40, 40), (48, 40), (40, 40)]


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """Whole frames of different sizes."""
    return ValidDatasetFromFolder(save_portraits(tmp_path_factory.mktemp("frames"), SIZES), 0, 4)


def test_a_batch_holds_one_size_in_order(frames):
    for indices, expected in ((None, [[0, 1], [2], [3], [4]]), ([4, 0, 3], [[4, 0], [3]]),
                              ([], [])):
        seen = list(evaluate.batches(frames, 2, CPU, indices))
        assert [group for group, *_ in seen] == expected
        for group, *images in seen:
            for k, batch in enumerate(images):  # LR, bicubic, HR
                assert torch.equal(batch, torch.stack([frames[i][k] for i in group]))


def test_measuring_in_batches_is_measuring_one_by_one(frames):
    torch.manual_seed(0)
    netG = Generator(4).eval()
    models = {"bicubic": lambda lr, restored, hr: restored,
              "net": lambda lr, restored, hr: netG(lr), "HR": lambda lr, restored, hr: hr}
    embedders = {"cosine": Embedder(), "cosine_judge": Embedder()}
    (batched, vectors), (single, _) = (evaluate.measure(models, frames, embedders, size, CPU)
                                       for size in (3, 1))
    assert list(batched.columns) == ["model", "image", "psnr_y", "ssim", "cosine", "cosine_judge"]
    by_name = [table.sort_values(["model", "image"], ignore_index=True)
               for table in (batched, single)]
    pd.testing.assert_frame_equal(*by_name, rtol=1e-4)
    assert vectors["net", "cosine_judge"].shape == (5, 48)
    assert (batched["image"][batched["model"] == "net"] == [p.name for p in frames.files]).all()

    def mean_levels(hr, sr):  # in a discriminator's place
        return hr.mean((1, 2, 3)), sr.mean((1, 2, 3))

    known = {}
    for _ in range(2):  # what training logs, with HR's embeddings new and then known
        rows = evaluate.validate(netG.train(), mean_levels, frames, embedders["cosine"], known, CPU,
                                 range(5)).numpy()
        assert sorted(known) == rows[:, 5].tolist() == [0, 1, 2, 3, 4]
        np.testing.assert_allclose(rows[:, :3], batched[batched["model"] == "net"][
            ["psnr_y", "ssim", "cosine"]], rtol=1e-4)
    with torch.no_grad():
        sr = netG(frames[3][0][None])
        logits = [x.item() for x in mean_levels(frames[3][2][None], sr)]
        np.testing.assert_allclose(vectors["net", "cosine"][list(batched["image"][
            batched["model"] == "net"]).index(frames.files[3].name)],
            evaluate.embed(Embedder(), sr)[0], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(rows[3, 3:5], logits, rtol=1e-3, atol=1e-5)
    without = evaluate.validate(netG, None, frames, embedders["cosine"], known, CPU, range(5))
    np.testing.assert_array_equal(without[:, [0, 1, 2, 5]], rows[:, [0, 1, 2, 5]])
    assert without[:, 3:5].isnan().all()

    # networks in bf16, metrics in fp32: SSIM's variances would be lost in bf16; a judge in fp32
    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    seen = {"cosine": [], "cosine_judge": []}
    for name, embedder in embedders.items():
        embedder.register_forward_hook(
            lambda *_, name=name: seen[name].append(torch.is_autocast_enabled("cpu")))
    half, _ = evaluate.measure(models, frames, embedders, 3, CPU, autocast)
    assert set(seen["cosine"]) == {True} and set(seen["cosine_judge"]) == {False}
    pd.testing.assert_frame_equal(half[half["model"] == "bicubic"],
                                  batched[batched["model"] == "bicubic"], rtol=1e-2)
    for column in ("psnr_y", "ssim"):
        np.testing.assert_array_equal(half[column][half["model"] == "bicubic"],
                                      batched[column][batched["model"] == "bicubic"])
    rows = evaluate.validate(netG, None, frames, embedders["cosine"], {}, CPU, range(5),
                             autocast).numpy()
    np.testing.assert_allclose(rows[:, :3], half[half["model"] == "net"][
        ["psnr_y", "ssim", "cosine"]], rtol=1e-4)


def test_a_restored_photograph_is_no_training(frames):
    torch.manual_seed(0)
    netG = Generator(4)
    before = netG.state_dict()["skip.1.running_mean"].clone()
    bicubic, sr, hr = evaluate.restore(netG.train(), frames, 3, CPU)
    assert torch.equal(netG.state_dict()["skip.1.running_mean"], before)
    with torch.no_grad():
        torch.testing.assert_close(sr, netG.eval()(frames[3][0][None])[0])
    assert torch.equal(bicubic, frames[3][1]) and torch.equal(hr, frames[3][2])


def test_summary_has_the_means_and_the_pooled_psnr():
    table = pd.DataFrame({"model": ["a"] * 2 + ["HR"] * 2, "image": ["1", "2"] * 2,
                          "psnr_y": [20.0, 40.0, np.inf, np.inf], "ssim": [0.5, 0.7, 1, 1],
                          "cosine": [0.8, 0.9, 1, 1]})
    vectors = {("a", "cosine"): np.eye(2), ("HR", "cosine"): np.eye(2)}
    a, hr = (row for _, row in tables.summarise(table, vectors, 0).iterrows())
    assert (a["n"], a["psnr_y"], a["ssim"], a["cosine"]) == pytest.approx((2, 30, 0.6, 0.85))
    assert (a["psnr_y_low"], a["psnr_y_high"]) == (20, 40)  # a quarter of the draws are one image
    assert a["psnr_y_pooled"] == pytest.approx(-10 * np.log10((1e-2 + 1e-4) / 2))
    assert hr["psnr_y"] == hr["psnr_y_low"] == hr["psnr_y_pooled"] == np.inf
    assert a["rank1"] == 1


def test_one_flat_picture_does_not_decide(capsys):
    """Bicubic restores it exactly: its infinite PSNR-Y is left out, for both models alike."""
    rng = np.random.default_rng(0)
    images = [f"{i}.png" for i in range(30)]
    a = pd.DataFrame({"model": "a", "image": images, "psnr_y": rng.normal(25, 3, 30), "ssim": 0.5,
                      "cosine": 0.5})
    b = a.assign(model="b", psnr_y=a["psnr_y"] + rng.normal(0, 1, 30))
    plain = pd.concat([a[1:], b[1:]])
    b.loc[0, "psnr_y"] = np.inf
    table = pd.concat([a, b, a.assign(model="HR", psnr_y=np.inf)])
    assert tables.restored_exactly(table) == ["0.png"]
    vectors = {(model, "cosine"): np.eye(30) for model in ("a", "b", "HR")}
    summary = tables.summarise(table, vectors, 0).set_index("model")
    for model in (a, b):
        assert summary["psnr_y"][model["model"][0]] == pytest.approx(model["psnr_y"][1:].mean())
    assert np.isfinite(summary.loc[["a", "b"], ["psnr_y_low", "psnr_y_high"]]).all(axis=None)
    assert summary["psnr_y"]["HR"] == np.inf and (summary["n"] == 30).all()
    row, expected = (tables.differences(t, 0).query("metric == 'psnr_y'").iloc[0]
                     for t in (table, plain))
    pd.testing.assert_series_equal(row, expected)
    flat = tables.differences(table[table["image"] == "0.png"], 0)
    assert not flat["significant"].any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_difference_that_is_no_number_is_not_significant(value):
    a = pd.DataFrame({"model": "a", "image": ["1", "2"], "psnr_y": 20.0, "cosine": [0.5, 0.6]})
    table = tables.differences(pd.concat([a, a.assign(model="b", cosine=[0.7, value])]), 0)
    assert not table["significant"].any()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_network_that_gives_no_numbers_is_named(frames, value):
    class Sick(Embedder):
        label = "sick.pt"

        def forward(self, x):
            return super().forward(x) + value

    models = {"net": lambda lr, restored, hr: restored}
    for embedders, name in (({"cosine": Sick()}, "--face_weights sick.pt: "),
                            ({"cosine": Embedder(), "cosine_sick": Sick()}, "--judge sick.pt: ")):
        with pytest.raises(InputError, match=name):
            evaluate.measure(models, frames, embedders, 2, CPU)
    with pytest.raises(InputError, match="net: its pictures hold NaN"):
        evaluate.measure({"net": lambda lr, restored, hr: restored * value}, frames,
                         {"cosine": Embedder()}, 2, CPU)


# ---------------------------------------------------------------------------------------------
# Judges


class Judge(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 16, stride=16)
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x):
        return F.normalize(self.bn(self.conv(x)).mean((2, 3)))


class Flat(nn.Module):
    """Not an embedding of each face."""

    def forward(self, x):
        return x.mean((1, 2, 3))


class Narrow(nn.Module):
    """For other inputs than a judge gets."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(7, 2)

    def forward(self, x):
        return self.linear(x)


def script(network, path):
    torch.jit.save(torch.jit.script(network.eval()), path)
    return path


judges = pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning",
                                    "ignore:.*torch.jit.*:DeprecationWarning")


@judges
def test_a_judge_gives_its_own_embeddings(tmp_path):
    torch.manual_seed(0)
    network = Judge()
    nn.init.uniform_(network.bn.running_var, 0.5, 2)
    judge = evaluate.load_judge(str(script(network, tmp_path / "judge.pt")))
    images = torch.rand(5, 3, 160, 160).contiguous(memory_format=torch.channels_last)
    for n in (1, 2, 5):  # [0, 1] pictures reach it in [-1, 1]
        torch.testing.assert_close(evaluate.embed(judge, images[:n]), network(images[:n] * 2 - 1),
                                   rtol=1e-4, atol=1e-5)


def refused(path):
    with pytest.raises(InputError, match="--judge") as error:
        evaluate.load_judge(str(path))
    message = str(error.value)
    assert "\n" not in message and str(path) in message
    return message


@judges
def test_judges_that_cannot_judge_are_refused(tmp_path):
    assert "no such file" in refused(tmp_path / "missing.pt")
    assert "(1,)" in refused(script(Flat(), tmp_path / "flat.pt"))
    assert "cannot be multiplied" in refused(script(Narrow(), tmp_path / "narrow.pt"))


@judges
def test_files_that_are_no_judges_are_refused_in_one_line(tmp_path, capfd, caplog):
    path = tmp_path / "judge.pt"
    good = script(Judge(), tmp_path / "a.pt").read_bytes()
    capfd.readouterr()
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        weights = max((archive.read(record) for record in archive.infolist()), key=len)
    one_bit = bytearray(good)
    one_bit[good.index(weights) + len(weights) // 2] ^= 1
    damaged = bytearray(good)
    damaged[good.index(b"PK\1\2") + 6] ^= 0x80  # the version that zipfile says it cannot read
    with pytest.raises(NotImplementedError):
        zipfile.ZipFile(io.BytesIO(damaged))
    for content in (b"", b"not a network", good[:-300], good[:1000], one_bit, damaged):
        path.write_bytes(content)
        assert "not a TorchScript file" in refused(path)
    torch.save(Judge().state_dict(), path)
    assert "not a TorchScript file" in refused(path)
    assert capfd.readouterr() == ("", "") and not caplog.records  # no loader's traceback


class Hostile:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("name, marker", [("judge.pt2", "anything"), ("judge.pt", "archive_format"),
                                          ("judge.pt", "serialized_exported_program.json")])
def test_an_exported_judge_is_not_opened(name, marker, tmp_path, monkeypatch):
    """torch.export.load unpickles opaque objects and loads libraries from the archive."""
    trace, path = tmp_path / "trace", tmp_path / name
    with zipfile.ZipFile(path, "w") as bad:
        for member in (marker, "constants.pkl", "data/weights/opaque_obj_0", "data.pkl"):
            bad.writestr(f"judge/{member}", pickle.dumps(Hostile(f"touch {trace}"), 2))

    def never(*_):
        raise AssertionError("opened")

    monkeypatch.setattr(torch.export, "load", never)
    monkeypatch.setattr(torch.jit, "load", never)
    assert "torch.jit.save" in refused(path)
    assert not trace.exists()


def test_a_judge_that_cannot_be_downloaded_is_named_as_one(capsys):
    with pytest.raises(InputError, match="--judge casia-webface: could not download") as error:
        evaluate.load_judge("casia-webface")
    evaluate.load_judge("random")
    assert "--face_weights" not in str(error.value) + capsys.readouterr().out


def test_a_checkpoint_may_be_called_like_a_reference(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("HR").write_bytes(checkpoint.read_bytes())
    models, _ = evaluate.load_models(evaluate.parse(["--checkpoint", "HR"]), CPU)
    assert list(models) == ["bicubic", str(tmp_path / "HR"), "HR"]


@judges
def test_a_judge_may_be_called_low(tmp_path):
    """The interval of the cosine is in columns cosine_low and cosine_high."""
    paths = [str(script(Judge(), tmp_path / name)) for name in ("low.pt", "a_high.pt", "a.pt")]
    embedders, labels = evaluate.load_embedders("random", paths)
    table = pd.DataFrame({"model": ["net", "HR"], "image": "1", "psnr_y": [20.0, np.inf],
                          "ssim": 1.0} | dict.fromkeys(embedders, 0.5))
    vectors = {(model, name): np.eye(1) for model in ("net", "HR") for name in embedders}
    summary = tables.summarise(table, vectors, 0)
    assert summary.columns.is_unique and labels.keys() == embedders.keys()
    head = tables.markdown(summary, labels).splitlines()[0]
    cells = [cell.strip() for cell in head.split("|")]
    assert cells[3:9] == ["psnr_y", "ssim", *embedders] and "rank1" in cells[9:]
    assert labels["cosine_a"] == paths[2]


# ---------------------------------------------------------------------------------------------
# The script


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random 4x generator whose pictures are not just middle grey."""
    torch.manual_seed(0)
    generator = Generator(4)
    with torch.no_grad():
        generator.last.weight.mul_(5)
    path = tmp_path_factory.mktemp("network") / "netG_epoch_4_1.pth"
    checkpoints.save_torch(generator.state_dict(), path)
    return path


@judges
def test_the_script_on_portraits(checkpoint, tmp_path, capsys):
    data, out = save_portraits(tmp_path / "data", [(48, 40)] * 3), tmp_path / "out"
    judge = script(Judge(), tmp_path / "mine.pt")
    evaluate.main(["--checkpoint", str(checkpoint), "--data_dir", str(data), "--crop_size", "32",
                   "--face_weights", "random", "--judge", str(judge), "--out_dir", str(out),
                   "--device", "cpu", "--batch_size", "2"])
    assert sorted(p.name for p in out.iterdir()) == [
        "comparison_crop_32.png", "differences.csv", "per_image.csv", "report.html", "summary.csv",
        "summary.md"]

    per_image = pd.read_csv(out / "per_image.csv")
    assert list(per_image.columns[:6]) == ["framing", "model", "image", "psnr_y", "ssim", "cosine"]
    assert per_image["model"].value_counts().to_dict() == {"bicubic": 3, checkpoint.stem: 3,
                                                           "HR": 3}
    for row in per_image[per_image["model"] == "bicubic"].itertuples():
        hr = Image.open(data / row.image).crop((8, 4, 40, 36))
        sr = hr.resize((8, 8), Image.BICUBIC).resize((32, 32), Image.BICUBIC)
        a, b = (np.asarray(image) / 255 for image in (sr, hr))
        assert row.psnr_y == pytest.approx(psnr_by_hand(a, b), rel=1e-4)
        assert row.ssim == pytest.approx(ssim_by_hand(a, b), abs=1e-4)

    summary = pd.read_csv(out / "summary.csv").set_index("model")
    assert list(summary.index) == ["bicubic", checkpoint.stem, "HR"] and (summary["n"] == 3).all()
    means = per_image.groupby("model")[["psnr_y", "ssim", "cosine", "cosine_mine"]].mean()
    for model in ("bicubic", checkpoint.stem):
        for metric in means:
            assert summary[metric][model] == pytest.approx(means[metric][model])
            assert (summary[f"{metric}_low"][model] <= means[metric][model] + 1e-9
                    and means[metric][model] <= summary[f"{metric}_high"][model] + 1e-9)
    ceiling = summary.loc["HR"]
    assert ceiling["psnr_y"] == np.inf
    for column in ("ssim", "cosine", "cosine_mine", "auc_mine", "rank1_mine", "tar_at_far_1_mine"):
        assert ceiling[column] == pytest.approx(1)
    assert {"psnr_y_pooled", "rank1", "rank5", "auc", "tar_at_far_1"} <= set(summary.columns)
    assert "random" in ceiling["networks"]

    differences = pd.read_csv(out / "differences.csv")
    assert {"model", "minus", "metric", "difference", "low", "high"} <= set(differences.columns)
    assert set(differences["metric"]) == {"psnr_y", "ssim", "cosine", "cosine_mine"}
    gain = differences[differences["metric"] == "psnr_y"].iloc[0]
    assert gain["difference"] == pytest.approx(
        means["psnr_y"][gain["model"]] - means["psnr_y"][gain["minus"]])

    text = (out / "summary.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [row.split()[1] for row in rows] == ["model", "bicubic", checkpoint.stem, "HR"]
    assert len({row.count("|") for row in rows}) == 1
    assert rows[-1].split()[5] == "-" and "inf" not in rows[-1]  # HR's PSNR-Y with itself
    assert text in capsys.readouterr().out
    assert min(Image.open(out / "comparison_crop_32.png").size) >= 4 * 32


def test_the_script_on_whole_frames_and_odd_crops(checkpoint, tmp_path, monkeypatch, capsys):
    data = save_portraits(tmp_path / "data", [(41, 40), (48, 43)])
    monkeypatch.setattr(evaluate, "load_face_network",
                        lambda name: setattr(network := Embedder(), "label", name) or network)
    pictures = []
    monkeypatch.setattr(evaluate.figures, "save_comparison",
                        lambda path, headings, rows: pictures.append((headings, rows)))

    def run(*argv):
        evaluate.main(["--checkpoint", str(checkpoint), "--data_dir", str(data), "--device", "cpu",
                       "--out_dir", str(tmp_path / "out"), *argv])
        return pd.read_csv(tmp_path / "out" / "per_image.csv"), pictures.pop()

    table, (headings, rows) = run("--crop_size", "0")
    assert len(table) == 6 and headings == ["LR", "bicubic", checkpoint.stem, "HR"]
    sizes = {(40, 40): (10, 10), (48, 40): (12, 10)}  # HR: LR; both frames are shown
    assert {row["images"][-1].size: row["images"][0].size for row in rows} == sizes
    for row in rows:
        assert row["images"][1].size == row["images"][2].size == row["images"][3].size
        assert len(row["captions"]) == 4 and "cos" in row["captions"][2]
    assert "no multiple" not in capsys.readouterr().out

    _, (_, rows) = run("--crop_size", "31")
    assert "--crop_size 31 is no multiple of 4: using 28" in capsys.readouterr().out
    assert {row["images"][-1].size for row in rows} == {(28, 28)}


def test_both_framings_and_the_sweep(checkpoint, tmp_path, monkeypatch, capsys):
    """Gains by hand: the crop is cut, or the frame resized, with PIL alone."""
    assert evaluate.parse([]).crop_size == [128, 0]
    data, out = save_portraits(tmp_path / "data", [(48, 48)] * 2), tmp_path / "out"
    monkeypatch.setattr(evaluate, "load_face_network",
                        lambda name: setattr(network := Embedder(), "label", name) or network)
    evaluate.main(["--checkpoint", str(checkpoint), "--data_dir", str(data), "--crop_size", "32",
                   "0", "--shift", "0", "8", "--scale", "1", "1.5", "--out_dir", str(out),
                   "--device", "cpu"])
    summary = pd.read_csv(out / "summary.csv")
    assert summary["framing"].unique().tolist() == ["crop_32", "whole_frames"]
    for name in ("comparison_crop_32.png", "comparison_whole_frames.png", "sweep.png"):
        assert (out / name).stat().st_size > 0
    page = (out / "report.html").read_text()
    assert base64.b64encode((out / "sweep.png").read_bytes()).decode() in page
    assert page.count("<table>") == 2 and page.count("<figure>") == 2 * len([*data.iterdir()])
    text = (out / "summary.md").read_text()
    assert "## crop_32" in text and "## whole_frames" in text and text in capsys.readouterr().out

    table = pd.read_csv(out / "sweep.csv").set_index(["sweep", "value", "model"])
    for sweep, value, framing in (("shift", 0, "crop_32"), ("scale", 1, "whole_frames")):
        of = summary[summary["framing"] == framing].set_index("model")
        for metric in ("psnr_y", "ssim", "cosine"):
            for model in ("bicubic", checkpoint.stem):
                assert table.loc[(sweep, value, model), metric] == pytest.approx(of[metric][model])
            assert table.loc[(sweep, value, checkpoint.stem), f"{metric}_gain"] == pytest.approx(
                of[metric][checkpoint.stem] - of[metric]["bicubic"])
    for sweep, value, edit in (("shift", 8, lambda im: im.crop((16, 16, 48, 48))),
                               ("scale", 1.5, lambda im: im.resize((72, 72), Image.BICUBIC))):
        psnr = []
        for path in sorted(data.iterdir()):
            hr = edit(Image.open(path))
            lr = hr.resize((hr.width // 4, hr.height // 4), Image.BICUBIC)
            psnr.append(psnr_by_hand(*(np.asarray(image) / 255 for image in (
                lr.resize(hr.size, Image.BICUBIC), hr))))
        assert table.loc[(sweep, value, "bicubic"), "psnr_y"] == pytest.approx(np.mean(psnr))


def test_names_of_any_bytes(checkpoint, tmp_path, capsys):
    """An older disk's names are Latin-1."""
    data = save_portraits(tmp_path / "data", [(40, 40)] * 2)
    (data / "face_0.png").rename(data / os.fsdecode(b"caf\xe9.png"))
    network = shutil.copy(checkpoint, tmp_path / os.fsdecode(b"r\xe9seau.pth"))
    run_script(lambda: evaluate.main(
        ["--checkpoint", str(network), "--data_dir", str(data), "--crop_size", "32",
         "--face_weights", "random", "--device", "cpu", "--out_dir", str(tmp_path / "out")]))
    assert "r\\udce9seau" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "out" / "per_image.csv")
    assert set(table["image"]) == {"caf\\udce9.png", "face_1.png"}
    assert (tmp_path / "out" / "comparison_crop_32.png").exists()


@pytest.mark.parametrize("name, part", [("data", "among photographs"),
                                        ("data/new", "among photographs"),
                                        ("out", "not overwritten")])
def test_the_users_pictures_are_not_written_over(checkpoint, tmp_path, name, part):
    data = save_portraits(tmp_path / "data", [(40, 40)])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "comparison_crop_32.png").write_text("the user's")
    (tmp_path / "out" / "per_image.csv").touch()  # of an earlier evaluation
    with pytest.raises(InputError, match=part):
        evaluate.main(["--checkpoint", str(checkpoint), "--data_dir", str(data), "--crop_size",
                       "32", "--face_weights", "random", "--out_dir", str(tmp_path / name)])
    assert (tmp_path / "out" / "comparison_crop_32.png").read_text() == "the user's"
    assert [path.name for path in data.iterdir()] == ["face_0.png"]


@pytest.mark.parametrize("name", ["summary.csv", "summary.md", "report.html", "sweep.csv"])
def test_the_users_tables_are_not_written_over(checkpoint, tmp_path, name):
    data, path = save_portraits(tmp_path / "data", [(40, 40)]), tmp_path / name
    like_ours = {".csv": "model,accuracy\n", ".md": "## My notes",
                 ".html": '<!doctype html>\n<html lang="en">\n<head>'}
    for text in ("the user's", like_ours[path.suffix]):
        path.write_text(text)
        with pytest.raises(InputError, match=f"{path} was not written by this project"):
            evaluate.main(["--checkpoint", str(checkpoint), "--data_dir", str(data), "--crop_size",
                           "32", "--shift", "1", "--face_weights", "random", "--out_dir",
                           str(tmp_path)])
        assert path.read_text() == text
    ours = Path(evaluate.__file__).parent / "results"
    evaluate.figures.check_ours(ours / name for name in ("sweep.csv", "ablation.csv",
                                                         "ablation.md", "none.csv"))


def test_the_pictures_are_the_best_the_median_and_the_worst(frames):
    table = pd.DataFrame({"model": "net", "image": [p.name for p in frames.files], "psnr_y": 20.0,
                          "cosine": [0.5, 0.1, 0.9, 0.7, 0.3]})
    models = {"net": lambda lr, restored, hr: restored}
    rows = evaluate.picture_rows(models, frames, table, CPU)
    assert [row["label"] for row in rows] == ["best", "median", "worst"]
    assert [row["captions"][1] for row in rows] == ["cos 0.90  20.0 dB", "cos 0.50  20.0 dB",
                                                    "cos 0.10  20.0 dB"]
    for row, index in zip(rows, (2, 0, 1)):
        assert np.array_equal(np.asarray(row["images"][0]),
                              (frames[index][0].permute(1, 2, 0) * 255).round().byte().numpy())


@pytest.mark.parametrize("value", ["nan", "inf", "0", "-1", "1e300", "1e-300", "x"])
def test_a_scale_that_no_picture_has_is_refused(value):
    with pytest.raises(InputError, match="--scale"):
        evaluate.parse(["--scale", value])
    assert evaluate.parse(["--scale", "0.5", "2"]).scale == [0.5, 2]


def test_what_the_script_cannot_use(checkpoint, tmp_path):
    data = save_portraits(tmp_path / "data", [(40, 40)])
    other = tmp_path / "netG_epoch_2_1.pth"
    checkpoints.save_torch(Generator(2).state_dict(), other)
    rest = ["--face_weights", "random", "--out_dir", str(tmp_path / "out")]
    for argv, part in (
            (["--checkpoint", str(tmp_path / "none.pth")], "none.pth"),
            (["--checkpoint", str(checkpoint), str(other)], "factor"),
            (["--checkpoint", str(checkpoint), "--blend", "B.pth"], "--blend"),
            (["--checkpoint", str(checkpoint), "--data_dir", str(tmp_path / "no")], "--data_dir"),
            (["--checkpoint", str(checkpoint), "--crop_size", "64"], "face_0.png")):
        with pytest.raises(InputError, match=part):
            evaluate.main(["--data_dir", str(data), *argv, *rest])
    assert not Path(tmp_path / "out").exists()


def test_the_inputs_for_another_tool_and_what_it_made_of_them(checkpoint, tmp_path, monkeypatch,
                                                              capsys):
    """Pillow's bicubic, restored elsewhere from the written files, scores as our bicubic does."""
    monkeypatch.setattr(evaluate, "load_face_network",
                        lambda name: setattr(network := Embedder(), "label", name) or network)
    data, lr = save_portraits(tmp_path / "data", [(48, 40)] * 3), tmp_path / "lr"
    rest = ["--checkpoint", str(checkpoint), "--data_dir", str(data), "--crop_size", "32", "0",
            "--device", "cpu", "--out_dir", str(tmp_path / "out")]
    evaluate.main([*rest[:-1], str(data / "unused"), "--export_lr", str(lr)])
    assert "--restored" in capsys.readouterr().out and not (tmp_path / "out").exists()
    for framing, size in (("crop_32", (8, 8)), ("whole_frames", (12, 10))):
        assert sorted(p.name for p in (lr / framing).iterdir()) == [f"face_{i}.png"
                                                                    for i in range(3)]
        (tmp_path / "other" / framing).mkdir(parents=True)
        for path in (lr / framing).iterdir():
            picture = Image.open(path)
            assert picture.size == size and picture.mode == "RGB"
            picture = picture.resize((4 * size[0], 4 * size[1]), Image.BICUBIC)
            picture.save(tmp_path / "other" / framing / f"{path.stem}.bmp")  # any suffix
        picture.rotate(90).save(tmp_path / "other" / framing / "another.bmp")  # more than asked for

    evaluate.main([*rest, "--restored", f"other={tmp_path / 'other'}"])
    table = pd.read_csv(tmp_path / "out" / "summary.csv").set_index(["framing", "model"])
    for framing in ("crop_32", "whole_frames"):
        assert list(table.loc[framing].index) == ["bicubic", "other", checkpoint.stem, "HR"]
        figures = ["n", "psnr_y", "ssim_low", "cosine", "rank1_high"]
        np.testing.assert_allclose(table.loc[(framing, "other"), figures].astype(float),
                                   table.loc[(framing, "bicubic"), figures].astype(float),
                                   rtol=1e-6)

    crops = tmp_path / "other" / "crop_32"  # a folder without subfolders is of all framings
    with pytest.raises(InputError, match="32x32 px, but HR has 48x40 in whole_frames"):
        evaluate.main([*rest, "--restored", f"other={crops}"])
    Image.new("RGB", (32, 32)).save(crops / "face_1.png")
    with pytest.raises(InputError, match="--restored: .*face_1.* differ in their suffix alone"):
        evaluate.main([*rest, "--restored", f"other={tmp_path / 'other'}"])
    (crops / "face_1.png").unlink()
    (crops / "face_1.bmp").unlink()
    with pytest.raises(InputError, match="lacks 1 of 3 pictures: face_1"):
        evaluate.main([*rest, "--restored", f"other={tmp_path / 'other'}"])
    for text, said in (("other", "NAME=FOLDER"), ("HR=" + str(lr), "HR is taken"),
                       ("other=" + str(tmp_path / "no"), "--restored")):
        with pytest.raises(InputError, match=said):
            evaluate.main([*rest, "--restored", text])
    users = tmp_path / "lr" / "whole_frames" / "face_1.png"
    Image.new("RGB", (12, 10)).save(users)
    before = {path: path.read_bytes() for path in lr.rglob("*.png")}
    (lr / "crop_32" / "face_0.png").unlink()
    with pytest.raises(InputError, match=f"{users} was not written .* another --export_lr"):
        evaluate.main([*rest, "--export_lr", str(lr)])
    assert before.items() > {path: path.read_bytes() for path in lr.rglob("*.png")}.items()
    users.unlink()
    for _ in range(2):
        evaluate.main([*rest, "--export_lr", str(lr)])
    with pytest.raises(InputError, match="--export_lr .* among photographs"):
        evaluate.main([*rest, "--export_lr", str(data / "lr")])
    with pytest.raises(InputError, match="--shift and --judge: leave it out beside --export_lr"):
        evaluate.main([*rest, "--export_lr", str(lr), "--shift", "1", "--judge", "none.pt"])
    Image.new("RGB", (48, 40)).save(data / "face_1.jpg")
    with pytest.raises(InputError, match="face_1.* differ in their suffix alone"):
        evaluate.main([*rest, "--export_lr", str(lr)])


@pytest.mark.parametrize("flags, said", [
    (["--crop_size", "40", "--shift", "1"], "smaller than the crop of 44 px"),
    (["--crop_size", "0", "--shift", "8"], "smaller than the crop of 144 px"),
    (["--crop_size", "3"], "--crop_size 3: must be 4 or more, or 0 for whole frames"),
    (["--crop_size", "300"], "--crop_size: takes 300 px of photographs that are reduced to 256"),
    (["--crop_size", "252", "--shift", "4"], "--crop_size and --shift: takes 260 px"),
    (["--crop_size", "40", "--shift", "-1"], "smaller than the crop of 44 px"),
])
def test_a_crop_that_leaves_the_photographs_is_refused(checkpoint, tmp_path, flags, said):
    data = save_portraits(tmp_path / "data", [(40, 40)])
    with pytest.raises(InputError, match=said):
        evaluate.main(["--checkpoint", str(checkpoint), "--data_dir", str(data), "--device", "cpu",
                       "--out_dir", str(tmp_path / "out"), *flags])


def test_a_flat_picture_leaves_the_sweep_its_gains(checkpoint, tmp_path):
    """Bicubic restores it exactly: an infinite PSNR-Y, which is left out of either mean."""
    data = save_portraits(tmp_path / "data", [(48, 48)] * 2)
    args = evaluate.parse(["--crop_size", "32", "--shift", "0"])

    def gains():
        models, factor = evaluate.load_models(evaluate.parse(["--checkpoint", str(checkpoint)]),
                                              CPU)
        table = evaluate.sweep(models, ValidDatasetFromFolder(data, 32, factor), args, Embedder(),
                               CPU, evaluate.nullcontext)
        return table.set_index("model")[["psnr_y", "psnr_y_gain"]].to_numpy()

    expected = gains()
    Image.new("RGB", (48, 48), "white").save(data / "flat.png")
    np.testing.assert_allclose(gains(), expected)


def test_each_framing_has_its_own_notes(tmp_path, monkeypatch):
    """dlib finds other faces in whole frames than in crops: each page section says of how many."""
    monkeypatch.setattr(tables, "rates_of", lambda *_: {})
    found = {}
    for framing, unseen in (("crop_16", ["0.png"]), ("whole_frames", [])):
        images = [f"{i}.png" for i in range(4)]
        one = pd.DataFrame({"model": "a", "image": images, "psnr_y": 20.0, "ssim": 0.5,
                            "cosine": 0.5, "distance_dlib": 0.4})
        one.loc[one["image"].isin(unseen), "distance_dlib"] = np.nan
        found[framing] = one, tables.summarise(one, {}, 0), tables.differences(one, 0)
    labels = {"cosine": "tiny", "distance_dlib": "dlib"}
    sections = tables.write_tables(tmp_path, found, labels, dict.fromkeys(found, []))
    report.save_report(tmp_path / "report.html", sections)
    crops, frames = (tmp_path / "report.html").read_text().split("<h2>")[1:]
    assert "of the 3 photographs" in crops and "1 of 4: 0.png" in crops
    assert "of the 4 photographs" in frames and "left out" not in frames


def test_a_gallery_face_that_is_none_is_in_the_way_of_everybody():
    faces = np.random.default_rng(0).standard_normal((12, 8))
    part = faces.copy()
    part[:3] = np.nan
    rates = recognised(faces, part)
    assert rates["rank1"] == 0 and rates["rank5"] == 9 / 12


def test_a_blend_is_of_the_first_checkpoint_and_b(tmp_path):
    states, paths = [], []
    for seed, name in enumerate("abc"):
        torch.manual_seed(seed)
        states.append(Generator(2).state_dict())
        paths.append(str(tmp_path / f"{name}.pth"))
        checkpoints.save_torch(states[-1], paths[-1])
    checkpoints.save_json({"flags": {}, "start": "the same"}, tmp_path / "config.json")
    models, factor = evaluate.load_models(evaluate.parse(
        ["--checkpoint", *paths[:2], "--blend", f"{paths[2]}:0.25"]), CPU)
    assert list(models) == ["bicubic", "a", "b", "a+0.25*c", "HR"] and factor == 2
    blended = {key: (0.75 * value + 0.25 * states[2][key]).to(value.dtype)
               for key, value in states[0].items()}
    lr = torch.rand(1, 3, 6, 6)
    for name, state in (("a", states[0]), ("b", states[1]), ("a+0.25*c", blended)):
        expected = Generator(2).eval()
        expected.load_state_dict(state)
        with torch.no_grad():
            torch.testing.assert_close(models[name](lr, None, None), expected(lr))
