"""report.html: one page, complete in itself, that shows what evaluate.py measured."""

import base64
import io
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from support import report

NAMES = ["bicubic", "netG <8> & \"co\"", "HR"]
CAPTIONS = ["", "cos 0.10  9.0 dB", "cos 0.90", ""]
VOID = {"meta", "img", "input", "br"}


class Page(HTMLParser):
    """Checks that tags close in order; keeps each tag's attributes and the text of cells."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.cells = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("th", "td"):
            self.cells.append("")
        elif tag == "br" and self.open[-1] == "td":
            self.cells[-1] += "/"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("th", "td"):
            self.cells[-1] += data


@pytest.fixture
def page(tmp_path):
    """(path, the pictures in it: best LR, bicubic, SR, HR)."""
    pictures = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue", "white")]
    rows = [{"label": label, "images": pictures, "captions": CAPTIONS}
            for label in ("best", "worst")]
    table = ["model", "psnr_y"], [[name, "27.00 [26.00, 28.00]"] for name in NAMES]
    pictures[0].save(tmp_path / "sweep.png")
    path = tmp_path / "report.html"
    report.save_report(path, [("crop_16", table, ["PSNR-Y in dB"], ["netG - bicubic: +1"], rows)],
                       tmp_path / "sweep.png")
    return path, pictures


def test_the_page_holds_everything_and_asks_for_nothing(page):
    path, pictures = page
    parsed = Page(path.read_text(encoding="utf-8"))
    assert parsed.cells == ["model", "psnr_y", *(text for name in NAMES
                                                 for text in (name, "27.00/[26.00, 28.00]"))]
    assert "bicubic: cos 0.10, 9.0 dB<br>" in path.read_text(encoding="utf-8")
    images = [attributes for tag, attributes in parsed.tags if tag == "img"]
    assert [image["alt"] for image in images[:-1]] == NAMES * 2  # LR has no size of its own
    for image, expected in zip(images, [*pictures[1:] * 2, pictures[0]]):
        kind, data = image["src"].split(",")
        assert kind == "data:image/png;base64"
        shown = Image.open(io.BytesIO(base64.b64decode(data)))
        assert np.array_equal(np.asarray(shown), np.asarray(expected))
    sliders = [attributes for tag, attributes in parsed.tags if tag == "input"]
    assert [(slider["min"], slider["max"]) for slider in sliders] == [("0", "2")] * 2
    assert not any("http" in value or "href" in name for _, attributes in parsed.tags
                   for name, value in attributes.items())


def test_a_browser_shows_it(page, tmp_path):
    """At 0.5 the left half is the second model's picture and the right half bicubic's."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome",
                                                   "chrome"))), None)
    if not browser:
        pytest.skip("no Chromium")
    shot = tmp_path / "shot.png"
    subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                    f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,1200",
                    f"--screenshot={shot}", page[0].as_uri()], check=True, timeout=60,
                   capture_output=True)
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    lime, blue = ((np.abs(pixels - colour).max(2) < 9) for colour in ((0, 255, 0), (0, 0, 255)))
    assert lime.sum() == pytest.approx(blue.sum(), rel=0.05) and lime.sum() > 10_000
    assert np.nonzero(blue)[1].min() < np.nonzero(lime)[1].min()
