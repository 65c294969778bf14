"""support/framing.py with landmarks that are known, and with the real MTCNN on what has no face."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from support.framing import framing_warning, warn_of_framing


class Frames(list):
    """As much of a data set as is looked at."""

    picture = list.__getitem__


@pytest.fixture
def landmarks(monkeypatch):
    """A list that takes, for each picture, its eyes in px or None: what MTCNN will find."""
    queue = []

    def detect(picture, landmarks):
        eyes = queue.pop(0)
        return None, None, None if eyes is None else np.array([[*eyes, (0, 0), (0, 0), (0, 0)]])

    monkeypatch.setitem(sys.modules, "facenet_pytorch", SimpleNamespace(
        MTCNN=lambda **options: SimpleNamespace(detect=detect)))
    return queue


@pytest.mark.parametrize("x, y, distance, said", [
    (128, 120, 66, False), (138, 112, 70, False),
    (128, 90, 66, True), (150, 120, 66, True), (128, 120, 40, True), (128, 120, 90, True)])
@pytest.mark.parametrize("width", [256, 400])
def test_eyes_that_are_elsewhere_are_said(landmarks, x, y, distance, said, width):
    x += (width - 256) / 2  # a wide frame is cropped in its middle
    landmarks += [((x - distance / 2, y), (x + distance / 2, y))] * 3
    warning = framing_warning([Image.new("RGB", (width, 256))] * 3)
    assert (warning is not None) == said
    assert not said or "not framed like CelebA-HQ" in warning


def test_one_odd_photograph_and_drawings_are_no_matter(landmarks):
    good, odd = ((95, 120), (161, 120)), ((20, 20), (40, 20))
    landmarks += [good, odd, good]
    assert framing_warning([Image.new("RGB", (256, 256))] * 3) is None
    landmarks += [odd, None, None]
    assert framing_warning([Image.new("RGB", (256, 256))] * 3) is None


def test_a_data_set_is_looked_at_unless_it_is_small(landmarks, capsys):
    for side, said in ((256, True), (127, False)):
        landmarks[:] = [((20, 20), (40, 20))] * 20
        warn_of_framing(Frames([Image.new("RGB", (side, side))] * 30))
        assert ("warning" in capsys.readouterr().out) == said


def test_the_real_detector_finds_no_face_in_noise():
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    assert framing_warning([Image.fromarray(noise)] * 2) is None
