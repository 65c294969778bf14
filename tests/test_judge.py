"""--judge dlib: geometry, left out photographs and tables; without dlib, what is said."""

import importlib.util
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, TinyFaces
from PIL import Image
from torch import nn

import evaluate
from support import dlib_judge, tables
from support.cli import InputError
from support.portraits import synthetic_portraits

installed = all(importlib.util.find_spec(name) for name in ("dlib", "face_recognition_models"))
with_dlib = pytest.mark.skipif(not installed, reason="pip install -r requirements-judge.txt")


@pytest.fixture(scope="module")
def judge():
    return dlib_judge.load_dlib()


@pytest.fixture(scope="module")
def portraits():
    """Drawn portraits, of which dlib's detector takes some for faces: (6, 3, 256, 256)."""
    pictures = synthetic_portraits(6, 256, 0)
    return torch.tensor(pictures).permute(0, 3, 1, 2).float() / 255


@with_dlib
def test_descriptors_are_dlibs_own(judge, portraits):
    """With dlib's one call from picture and landmarks to descriptor, which cuts the chip itself."""
    vectors = judge(portraits, portraits)
    assert vectors.shape == (6, 128) and vectors.dtype == torch.float32
    seen = 0
    for picture, vector in zip(dlib_judge.to_bytes(portraits), vectors):
        if (face := judge.find_face(picture)) is None:
            assert vector.isnan().all()
            continue
        expected = judge.network.compute_face_descriptor(picture, face)
        np.testing.assert_allclose(vector, expected, atol=0.01)  # its chips are cut more coarsely
        seen += 1
    assert seen


@with_dlib
def test_hr_says_where_the_chip_is_cut(judge, portraits):
    """A face that is blurred beyond detection still has its descriptor; a shifted one another."""
    seen = ~judge(portraits, portraits).isnan().any(1)
    hr = portraits[seen][:2]
    blurred = nn.functional.interpolate(nn.functional.avg_pool2d(hr, 16), scale_factor=16)
    assert judge.find_face(dlib_judge.to_bytes(blurred)[0]) is None
    vectors = judge(blurred, hr)
    assert vectors.isfinite().all()
    distances = evaluate.distance(vectors, judge(hr, hr))
    assert (distances > 0.1).all() and evaluate.distance(judge(hr, hr), judge(hr, hr)).max() == 0
    face = judge.find_face(dlib_judge.to_bytes(hr)[0])
    chip = judge.dlib.get_face_chip(dlib_judge.to_bytes(blurred)[0], face, 150)
    np.testing.assert_allclose(vectors[0], judge.network.compute_face_descriptor(chip), atol=1e-6)


@with_dlib
def test_other_photographs_are_looked_at_anew(judge, portraits):
    """The landmarks are kept for a batch: not for the next one."""
    first = judge(portraits, portraits)
    flat = torch.full_like(portraits, 0.5)
    assert judge(portraits, flat).isnan().all()
    torch.testing.assert_close(judge(portraits, portraits), first, equal_nan=True)


@with_dlib
def test_the_script_with_dlib(tmp_path, monkeypatch, capsys):
    """A photograph without a face is named and left out of the judge's columns alone."""
    monkeypatch.setattr(evaluate, "load_face_network", lambda _: TinyFaces())
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for i, portrait in enumerate(synthetic_portraits(4, 256, 0)):
        Image.fromarray(portrait).save(data / f"face_{i}.png")
    Image.effect_noise((256, 256), 60).convert("RGB").save(data / "noise.png")
    evaluate.main(["--data_dir", str(data), "--crop_size", "0", "--judge", "dlib", "--device",
                   "cpu", "--out_dir", str(out)])
    per_image = pd.read_csv(out / "per_image.csv")
    unseen = per_image[per_image["distance_dlib"].isna()]["image"]
    assert (unseen == "noise.png").sum() == 3 and not per_image["cosine"].isna().any()
    summary = pd.read_csv(out / "summary.csv").set_index("model")
    values = per_image.groupby("model")["distance_dlib"].mean()  # pandas leaves NaN out
    assert (summary["n_dlib"] == 5 - unseen.nunique()).all() and (summary["n"] == 5).all()
    for model in summary.index:
        assert summary["distance_dlib"][model] == pytest.approx(values[model])
    assert summary["distance_dlib"]["HR"] == 0 < summary["distance_dlib"]["bicubic"]
    assert summary["rank1_dlib"]["HR"] == 1
    text = (out / "summary.md").read_text()
    assert "noise.png" in text and "dlib finds no face on HR" in text and "lower is better" in text
    assert text in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------
# Without dlib


@pytest.mark.parametrize("missing", ["dlib", "face_recognition_models"])
def test_a_missing_package_is_one_line(missing, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *rest: None if name == missing else find(name, *rest))
    if missing == "dlib":
        monkeypatch.setitem(sys.modules, "dlib", None)  # importing it fails
    elif not installed:
        pytest.skip("dlib itself is missing")
    with pytest.raises(InputError, match=f"--judge dlib: .*{missing}.*requirements-judge.txt"):
        evaluate.load_judge("dlib")


def test_it_is_imported_only_when_asked_for():
    text = (ROOT / "evaluate.py").read_text()
    assert "\nfrom support.dlib_judge" not in text and "\nimport dlib" not in text


def distances(shift):
    """Two models' tables: b's distance to HR differs from a's by about `shift`."""
    rng = np.random.default_rng(0)
    a = pd.DataFrame({"model": "a", "image": [f"{i}.png" for i in range(30)], "psnr_y": 25.0,
                      "ssim": 0.5, "distance_dlib": rng.uniform(0.3, 0.6, 30)})
    b = a.assign(model="b", distance_dlib=a["distance_dlib"] + shift + rng.normal(0, 0.01, 30))
    table = pd.concat([a, b], ignore_index=True)
    table.loc[table["image"] == "3.png", "distance_dlib"] = np.nan
    return table


@pytest.mark.parametrize("shift, words", [(-0.05, "significantly better"),
                                          (0.05, "significantly worse")])
def test_a_smaller_distance_is_better(shift, words):
    table = distances(shift)
    pair = tables.differences(table, 0).set_index("metric", drop=False).loc["distance_dlib"]
    a, b = (table[table["model"] == m]["distance_dlib"].dropna().to_numpy() for m in "ab")
    assert pair["difference"] == pytest.approx((b - a).mean())
    assert tables.verdict(pair) == words
    assert tables.left_out(table, "distance_dlib") == ["3.png"]
    assert tables.remarks(table) == ["left out, dlib finds no face on HR (distance_dlib), 1 of 30: "
                                     "3.png"]


def test_recognition_by_distance_is_of_the_faces_that_are_seen():
    """Descriptors of other lengths: by cosine nobody would be recognised."""
    rng = np.random.default_rng(0)
    gallery = np.outer(np.arange(1, 31), rng.standard_normal(128))  # one direction, other lengths
    probes = gallery + 0.01 * rng.standard_normal((30, 128))
    gallery[3] = probes[3] = np.nan
    vectors = {("a", "distance_dlib"): probes, ("HR", "distance_dlib"): gallery}
    rates = tables.rates_of(vectors, "a", "distance_dlib", 0)
    assert {name: value for name, (value, _, _) in rates.items()} == {
        "rank1": 1, "rank5": 1, "auc": 1, "tar_at_far_1": 1}
    nobody = dict.fromkeys(vectors, np.full((30, 128), np.nan))
    assert np.isnan(tables.rates_of(nobody, "a", "distance_dlib", 0)["rank1"]).all()


def test_fifteen_comparisons_of_noise_are_corrected():
    """Six models that differ by noise alone: a plain interval finds a difference, Holm none."""
    rng = np.random.default_rng(4)
    images = [f"{i}.png" for i in range(40)]
    table = pd.concat([pd.DataFrame({"model": m, "image": images, "psnr_y": rng.normal(25, 1, 40),
                                     "ssim": rng.normal(0.7, 0.1, 40)}) for m in "abcdef"])
    pairs = tables.differences(table, 0)
    assert ((pairs["p"] < 0.05) == ((pairs["low"] > 0) | (pairs["high"] < 0))).all()
    assert (pairs["p"] < 0.05).any() and not pairs["significant"].any()
    assert (pairs["p_holm"] >= pairs["p"]).all()
    few = tables.correct(pairs[(pairs["minus"] == "a") & (pairs["metric"] == "psnr_y")])
    assert few["p_holm"].min() == pytest.approx(min(1, 5 * few["p"].min()))
    assert "corrected by Holm for the 15 comparison(s)" in tables.difference_lines(pairs)


class FakeDlib:
    """A detector that finds faces only on the enlarged picture, in boxes of these areas."""

    class Box:
        def __init__(self, size):
            self.size = size

        def area(self):
            return self.size

    def __init__(self, *sizes):
        self.boxes, self.asked = [self.Box(size) for size in sizes], []

    def get_frontal_face_detector(self):
        def detect(picture, upsampled):
            self.asked.append(upsampled)
            return self.boxes if upsampled == 1 else []
        return detect


def test_a_small_face_is_looked_for_once_more_and_the_largest_is_taken():
    fake = FakeDlib(20, 90, 50)
    judge = dlib_judge.DlibJudge(fake, lambda picture, box: box.size, None)
    assert judge.find_face(np.zeros((9, 9, 3), np.uint8)) == 90 and fake.asked == [0, 1]
    none = dlib_judge.DlibJudge(FakeDlib(), None, None)
    assert none.find_face(np.zeros((9, 9, 3), np.uint8)) is None


def test_a_descriptor_that_is_no_number_is_an_error():
    class Sick(FakeDlib):
        def get_face_chip(self, picture, face, size):
            return picture

        def compute_face_descriptor(self, chip):
            return [np.nan] * 128

    sick = Sick(1)
    judge = dlib_judge.DlibJudge(sick, lambda picture, box: box, sick)
    with pytest.raises(InputError, match="--judge dlib: gives NaN"):
        judge(torch.zeros(1, 3, 9, 9), torch.zeros(1, 3, 9, 9))


def test_a_judge_of_distances_is_shown_hr_beside_the_pictures():
    found = evaluate.embed_all({"distance_dlib": lambda pictures, hr: (hr - pictures).mean((2, 3))},
                               torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8))
    assert found["distance_dlib"].eq(1).all()
