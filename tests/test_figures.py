"""figures.py on made-up tables and drawn faces; a warning of matplotlib's is an error."""

import os
import re
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from PIL import Image, ImageFont

from data_utils import downscale, to_tensor
from support import figures
from support.cli import InputError
from support.portraits import synthetic_portraits

pytestmark = pytest.mark.filterwarnings("error")
FONTS = f"{matplotlib.get_data_path()}/fonts/ttf"


@pytest.fixture(scope="module")
def faces():
    return [Image.fromarray(face) for face in synthetic_portraits(3, 128, seed=1)]


def places(sheet, picture):
    """Every (x, y) at which `sheet` shows exactly `picture`."""
    sheet, picture = (np.asarray(image.convert("RGBA")).view(np.uint32)[..., 0]
                      for image in (sheet, picture))  # a number per pixel
    height, width = picture.shape
    y, x = np.nonzero(sheet[:-height, :-width] == picture[0, 0])
    for k in (0.3, 0.4, 0.5, 0.6, 0.99):  # a few pixels of its diagonal first
        i, j = int(k * height), int(k * width)
        kept = sheet[y + i, x + j] == picture[i, j]
        y, x = y[kept], x[kept]
    return [(x, y) for y, x in zip(y.tolist(), x.tolist())
            if (sheet[y:y + height, x:x + width] == picture).all()]


def written(path):
    """The words of a matplotlib SVG that was saved with its text as text."""
    return {text.text for text in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")}


def ink(sheet, box):
    return (np.asarray(sheet.crop(box)) < 128).any()


# Pictures


def test_grid_shows_each_picture_once_in_reading_order(faces):
    sheet = figures.grid([faces[:2], [faces[2], faces[0].rotate(90)]], ("one", "two"))
    (a,), (b,), (c,) = (places(sheet, face) for face in faces)
    assert a[1] == b[1] and a[0] == c[0] and a[0] < b[0] and a[1] < c[1]
    for x, _ in (a, b):
        assert ink(sheet, (x, 0, x + 128, a[1]))  # its heading


def test_samples_hold_the_rounded_tensors(tmp_path, faces):
    a, b, c = (to_tensor(face) for face in faces)
    figures.save_samples(tmp_path / "samples" / "epoch_1.png", [(a, b, c)])
    sheet = Image.open(tmp_path / "samples" / "epoch_1.png")
    assert [len(places(sheet, face)) for face in faces] == [1, 1, 1]


@pytest.mark.parametrize("models, zoom", [(1, 3), (3, 2), (12, 1)])
def test_comparison_enlarges_by_whole_pixels(tmp_path, faces, models, zoom):
    names = [f"epochs/ablation/identity_gamma_0.5/netG_epoch_8_{n}" for n in range(models)]
    rows = []
    for label, hr in zip(("best", "median", "worst"), faces):
        lr = downscale(hr, 8)
        rows.append({"label": label, "images": [lr, *[hr.rotate(180)] * (models + 1), hr],
                     "captions": ["", *["cos 0.51  22.1 dB"] * (models + 1), ""]})
    figures.save_comparison(tmp_path / "comparison.png", ["LR", "bicubic", *names, "HR"], rows)
    sheet = Image.open(tmp_path / "comparison.png")
    assert sheet.width < 2400
    size, starts = 128 * zoom, set()
    for row in rows:
        (x, y), = places(sheet, row["images"][-1].resize((size, size), Image.Resampling.NEAREST))
        (left, top), = places(sheet, row["images"][0].resize((size, size),
                                                             Image.Resampling.NEAREST))
        assert top == y and left < x
        turned = places(sheet, row["images"][1].resize((size, size), Image.Resampling.NEAREST))
        starts |= {left, x, *(a for a, _ in turned)}
        assert ink(sheet, (0, y, left, y + size))                         # the row's label
        assert ink(sheet, (turned[0][0], y + size, turned[0][0] + size, y + size + 10 * zoom))
        assert not ink(sheet, (x, y + size, x + size, y + size + 4))      # HR has no caption
    starts = sorted(starts)
    assert len(starts) == models + 3
    first_row = places(sheet, faces[0].resize((size, size), Image.Resampling.NEAREST))[0][1]
    for x in starts[1:]:  # headings keep to their columns: white between them
        assert not ink(sheet, (x - 3, 0, x - 1, first_row))


def test_shorten_keeps_both_ends():
    font = ImageFont.truetype(f"{FONTS}/DejaVuSans.ttf", 12)
    long = "epochs/identity/netG_epoch_8_100"
    short = figures.shorten(long, font, 100)
    start, end = short.split("…")
    assert long.startswith(start) and long.endswith(end) and start and end
    assert font.getlength(short) <= 100 < font.getlength(long)
    assert figures.shorten("LR", font, 100) == "LR"
    assert figures.shorten("LR", font, 1) == "LR"  # nothing left to drop


# Plots


def results(n, pixel_epochs):
    """A train_results.csv of n epochs."""
    epoch = np.arange(1, n + 1)
    gan = epoch > pixel_epochs
    table = pd.DataFrame({"Epoch": epoch, "Loss_G": 0.02 / epoch, "PSNR": 24.9 - 6 / epoch,
                          "SSIM": 0.7 - 0.3 / epoch, "Cosine": 0.4 - 0.3 / epoch,
                          "PSNR_crop": 25.9 - 6 / epoch, "SSIM_crop": 0.8 - 0.3 / epoch,
                          "Cosine_crop": 0.5 - 0.3 / epoch,
                          "Pixel": 0.01 / epoch, "Content": 0.3 / epoch, "Identity": 0.001 / epoch,
                          "Learning_rate": 1e-4, "Phase": np.where(gan, "gan", "pixel"),
                          "Seconds": 9.0})
    for i, name in enumerate(("Loss_D", "Score_D", "Score_G", "Adversarial", "D_accuracy",
                              "Gradient_ratio")):
        table[name] = np.where(gan, 0.4 + 0.1 * i, np.nan)
    return table


@pytest.mark.parametrize("n, pixel_epochs, gone", [
    (1, 1, []), (100, 20, ["Content", "Identity"]),
    (3, 1, [c for c in results(1, 0) if c not in ("Epoch", "Phase")])])
def test_curves_of_every_length_and_with_columns_of_nan(tmp_path, n, pixel_epochs, gone):
    table = results(n, pixel_epochs)
    table[gone] = np.nan
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figures.save_curves(table, tmp_path / "curves.svg")
    words = written(tmp_path / "curves.svg")
    assert {"report's frames, best visual 27.07", "report's frames, baseline 0.764",
            "report's frames, best identity 0.8630"} <= words
    assert ("GAN phase" in words) == (0 < pixel_epochs < n)
    assert ("frames 24.84" in words) == ("crops 25.84" in words) == (n == 100)
    assert ("D(x) 0.50" in words) == (n > pixel_epochs and "Score_D" not in gone)
    assert ("no values yet" in words) == (n < 100)
    assert not any("nan" in word for word in words)


def test_curves_png_replaces_the_old_one_whole(tmp_path):
    path = tmp_path / "curves.png"
    table = results(4, 2)
    table["Adversarial"] = -1.0  # as hinge has it; not for the logarithmic panel
    figures.save_curves(table, path)
    with Image.open(path) as picture:
        assert picture.width > 1200 and picture.height > 700
        assert len(np.unique(np.asarray(picture.convert("L")))) > 50
    before = path.read_bytes()
    with pytest.raises(KeyError):
        figures.save_curves(table.drop(columns="PSNR"), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_each_picture_says_who_wrote_it_and_nothing_of_when(tmp_path, faces):
    sweep = pd.DataFrame({"sweep": "shift", "value": [1, 1], "model": ["bicubic", "net"],
                          **{f"{m}_gain": [0.0, 1.0] for m in ("psnr_y", "ssim", "cosine")}})
    for save, subject in ((figures.save_image, faces[0]), (figures.save_sweep, sweep)):
        for name in "ab":
            save(subject, tmp_path / f"{name}.png")
        figures.check_ours(tmp_path.iterdir())
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    figures.check_ours(ROOT.glob("results/*.png"))  # which evaluate.py and ablation.py replace
    figures.check_ours([tmp_path / "none.png", tmp_path / f"{'a' * 300}.png"])


def test_every_model_of_a_sweep_is_drawn(tmp_path):
    models = ["bicubic", *(f"net{i}" for i in range(2 * len(figures.STYLES)))]
    sweep = pd.DataFrame({"sweep": "shift", "value": 1, "model": models,
                          **dict.fromkeys(["psnr_y_gain", "ssim_gain", "cosine_gain"],
                                          range(len(models)))})
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figures.save_sweep(sweep, tmp_path / "sweep.svg")
    assert written(tmp_path / "sweep.svg") >= set(models)


def test_a_sweep_is_drawn_in_the_order_of_its_values(tmp_path, monkeypatch):
    drawn, draw = [], figures.draw_line
    monkeypatch.setattr(figures, "draw_line", lambda panel, x, y, style: (
        drawn.append((list(x), list(y))), draw(panel, x, y, style))[1])
    figures.save_sweep(pd.DataFrame({
        "sweep": "shift", "value": [8, 8, 0, 0, 4, 4], "model": ["bicubic", "net"] * 3,
        **dict.fromkeys(["psnr_y_gain", "ssim_gain", "cosine_gain"], [0, 1, 0, 3, 0, 2])}),
        tmp_path / "sweep.png")
    assert drawn == [([0, 4, 8], [3, 2, 1])] * 3


def test_a_sweep_of_long_names_and_of_nothing(tmp_path):
    """A warning of matplotlib is an error here; a panel without a curve names nobody."""
    sweep = pd.DataFrame({"sweep": "shift", "value": [0, 0, 1, 1],
                          "model": ["bicubic", "n" * 90, "bicubic", "a$_$b\udce9"],
                          "psnr_y_gain": np.nan, "ssim_gain": 0.1, "cosine_gain": 0.2})
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figures.save_sweep(sweep, tmp_path / "sweep.svg")
    words = (tmp_path / "sweep.svg").read_text()
    assert "n" * 19 + "…" + "n" * 20 in words and "n" * 41 not in words
    assert words.count(">bicubic<") == 2


def test_what_others_wrote_is_named(tmp_path, faces):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty.png").touch()
    faces[0].save(tmp_path / "plain.png")
    figures.save_image(faces[0], tmp_path / "ours.png")
    Image.open(tmp_path / "ours.png").save(tmp_path / "edited.png")
    for path in tmp_path.iterdir():
        if path.name != "ours.png":
            with pytest.raises(InputError, match=f"{path.name} was not .* another --flag"):
                figures.check_ours([tmp_path / "ours.png", path], "--flag")


def test_labels_do_not_overlap_and_point_at_their_values():
    _, axes = figures.panels([["a"]], (5, 3), {"a": "title"})
    panel = axes["a"]
    values = [0.0, 5.0, 5.0, 5.01, np.nan, 9.99, 10.0]
    for value in values:
        panel.axhline(value)
    figures.label_ends(panel, [(1, value, str(i), "black") for i, value in enumerate(values)])
    heights = {text.get_text(): text.get_position()[1] for text in panel.texts}
    assert sorted(heights, key=heights.get) == ["0", "1", "2", "3", "5", "6"]
    assert np.diff(sorted(heights.values())).min() > 0.06
    assert 0 <= min(heights.values()) and max(heights.values()) <= 1
    low, high = panel.get_ylim()
    starts = [line.get_ydata()[0] for line in panel.lines[len(values):]]
    assert starts == pytest.approx((np.array([0, 5, 5, 5.01, 9.99, 10]) - low) / (high - low))


def test_lines_differ_without_colour():
    for part in (1, 2):
        assert len({style[part] for style in figures.STYLES}) == len(figures.STYLES)


def ablation(names, seeds, psnr_y=24.0):
    table, curves = [], []
    for i, name in enumerate(names):
        row = {"name": name}
        for measure, value, spread in (("psnr_y", psnr_y - i / 10, 0.2), ("ssim", 0.7, 0.01),
                                       ("cosine", 0.4 + i / 50, 0.01)):
            row |= {measure: value, f"{measure}_low": value - spread,
                    f"{measure}_high": value + spread}
        table.append(row)
        curves += [{"name": name, "seed": seed, "epoch": epoch, "psnr_y": psnr_y - 1 / epoch,
                    "ssim": 0.7, "cosine": 0.4 - 0.1 / epoch + seed / 100}
                   for seed in range(seeds) for epoch in range(1, 6)]
    return pd.DataFrame(table), pd.DataFrame(curves)


def test_tradeoff_names_every_point_and_is_not_squashed_by_the_reports(tmp_path, monkeypatch):
    drawn, panels = {}, figures.panels

    def keep(*args):
        figure, axes = panels(*args)
        drawn.update(axes)
        return figure, axes

    monkeypatch.setattr(figures, "panels", keep)
    names = ["baseline", "visual", "identity", *(f"gamma {n}" for n in range(6))]
    table, curves = ablation(names, seeds=2)
    weight = np.linspace(0, 1, 5)
    blend = pd.DataFrame({"weight": weight, "psnr_y": 23.9 - weight / 10,
                          "cosine": 0.42 + weight / 50})
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figures.save_tradeoff(table, curves, tmp_path / "ablation.svg", blend)
    assert {*names, "0.25", "0.5", "0.75", "report, best identity"} <= written(
        tmp_path / "ablation.svg")
    assert drawn["trade"].get_xlim()[1] < 25 and drawn["trade"].get_ylim()[1] < 0.7
    low, high = drawn["report"].get_xlim()
    assert low < 26.75 and high > 27.07
    first = drawn["psnr_y"].lines[0]
    assert first.get_ydata() == pytest.approx(24 - 1 / np.arange(1, 6))


def test_tradeoff_of_one_seed_with_gaps(tmp_path):
    table, curves = ablation(["baseline"], seeds=1, psnr_y=26.8)
    table[["psnr_y_low", "psnr_y_high"]] = np.nan
    curves.loc[curves["epoch"] % 2 == 1, ["psnr_y", "cosine"]] = np.nan
    figures.save_tradeoff(table, curves, tmp_path / "ablation.png")
    with Image.open(tmp_path / "ablation.png") as picture:
        assert picture.width > 1200 and picture.height > 700


# The pipeline


PIPELINE = ROOT / "pipeline.svg"


def test_pipeline_names_the_method():
    assert PIPELINE.stat().st_size < 60_000
    words = " ".join("".join(text.itertext()) for text in ElementTree.parse(PIPELINE).iter()
                     if re.search("text|title", text.tag))
    for word in ("256 × 256", "128 px", "bicubic", "16 × 16", "Generator", "9×9", "5 residual",
                 "3 sub-pixel", "tanh", "VGG16 features[:31]", "Discriminator",
                 "InceptionResnetV1", "alpha", "beta", "gamma", "L_total"):
        assert word in words


def test_pipeline_texts_fit_their_boxes_even_in_a_wide_font():
    root = ElementTree.parse(PIPELINE).getroot()
    boxes = [[float(rect.get(key)) for key in ("x", "y", "width", "height")]
             for rect in root.findall("{*}rect")]
    texts = root.findall("{*}text")
    assert len(boxes) > 10 and len(texts) > 30
    for text in texts:
        bold = "-Bold" if text.get("font-weight") == "bold" else ""
        font = ImageFont.truetype(f"{FONTS}/DejaVuSans{bold}.ttf", float(text.get("font-size")))
        width, x, y = font.getlength("".join(text.itertext())), *(
            float(text.get(key)) for key in "xy")
        left = x if text.get("text-anchor") == "start" else x - width / 2
        around = [box for box in boxes if box[0] <= x <= box[0] + box[2]
                  and box[1] <= y <= box[1] + box[3]]
        a, _, room, _ = min(around, key=lambda box: box[2])
        assert a + 3 <= left and left + width <= a + room - 3, "".join(text.itertext())
