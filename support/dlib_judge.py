"""dlib's face recognition network as a judge that training never saw: `evaluate.py --judge dlib`.

A ResNet by Davis King, 99.38 % on LFW; code and weights come from PyPI (requirements-judge.txt),
the weights are in the public domain. Imported only when asked for.
"""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import nn

from support.cli import InputError, first_line

CHIP = 150  # px of the pictures that the network takes
SAME_PERSON = 0.6  # dlib's own threshold: a smaller distance is the same person
INSTALL = "pip install -r requirements-judge.txt"


def load_dlib():
    """The judge. Raises InputError where a package is missing or lacks a file."""
    package = importlib.util.find_spec("face_recognition_models")
    try:
        import dlib
    except ImportError:
        dlib = None
    if dlib is None or package is None:
        missing = "dlib" if dlib is None else "face_recognition_models"
        raise InputError(f"--judge dlib: the package {missing} is not installed; {INSTALL}")
    # the package itself is not imported: its __init__ needs pkg_resources, which setuptools dropped
    folder = Path(package.origin).parent / "models"
    try:
        landmarks = dlib.shape_predictor(str(folder / "shape_predictor_5_face_landmarks.dat"))
        network = dlib.face_recognition_model_v1(
            str(folder / "dlib_face_recognition_resnet_model_v1.dat"))
    except RuntimeError as error:
        raise InputError(f"--judge dlib: {first_line(error)}; {INSTALL}") from None
    return DlibJudge(dlib, landmarks, network)


class DlibJudge(nn.Module):
    """(pictures, HR) -> dlib's 128 numbers of each face, to be compared by Euclidean distance.

    They are neither centred nor of unit length: their cosine says nothing. Computed on the CPU.
    """

    label = f"dlib_face_recognition_resnet_model_v1 (under {SAME_PERSON}: the same person)"

    def __init__(self, dlib, landmarks, network):
        super().__init__()
        self.dlib, self.landmarks, self.network = dlib, landmarks, network
        self.detector = dlib.get_frontal_face_detector()
        self.hr, self.faces = None, []

    def find_face(self, picture):
        """Five landmarks of the largest face on (H, W, 3) uint8, or None where there is no face."""
        for upsampled in (0, 1):  # the detector's smallest face has 80 px
            if found := self.detector(picture, upsampled):
                return self.landmarks(picture, max(found, key=lambda box: box.area()))
        return None

    def forward(self, images, hr):
        """images, hr: (N, 3, H, W) in [0, 1] -> (N, 128), NaN where HR shows no face.

        Both are rounded to 8 bit. HR's landmarks say where a chip is cut, whatever the picture, so
        that a face is judged and not how well the detector finds it.
        """
        if hr is not self.hr:  # found once for all models' pictures of a batch
            self.hr, self.faces = hr, [self.find_face(picture) for picture in to_bytes(hr)]
        vectors = np.full((len(images), 128), np.nan, np.float32)
        for vector, picture, face in zip(vectors, to_bytes(images), self.faces):
            if face is not None:
                chip = self.dlib.get_face_chip(picture, face, CHIP)
                vector[:] = self.network.compute_face_descriptor(chip)
                if not np.isfinite(vector).all():
                    raise InputError("--judge dlib: gives NaN or infinite values; " + INSTALL)
        return torch.from_numpy(vectors)


def to_bytes(images):
    """(N, 3, H, W) in [0, 1] -> (N, H, W, 3) uint8 array."""
    images = images.detach().float().clamp(0, 1).mul(255).round().byte()
    return images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
