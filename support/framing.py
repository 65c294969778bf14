"""Are the faces where CelebA-HQ has them? A look at a few photographs before a run."""

import numpy as np

from support.cli import log

LOOKED_AT = 20  # photographs, in half a second on a core
# In the frame's side, of 20 photographs framed like CelebA-HQ: middle of the eyes (spread 0.007,
# 0.006) and their distance (0.008).
EYES, DISTANCE = (0.50, 0.47), 0.257
MOST_OFF, MOST_SCALED = 0.05, 1.25
SMALLEST = 128  # px of a frame in which eyes are found to a hundredth


def warn_of_framing(dataset):
    """Log `framing_warning` of the first frames of a FaceFolder; of small ones nothing is said."""
    pictures = [dataset.picture(i) for i in range(min(len(dataset), LOOKED_AT))]
    if min(min(picture.size) for picture in pictures) >= SMALLEST:
        if warning := framing_warning(pictures):
            log(warning)


def framing_warning(pictures):
    """PIL pictures of one face each -> a line if the eyes are not where CelebA-HQ's are, or None.

    Nothing is said where MTCNN finds a face in less than half of them, as in drawings.
    """
    from facenet_pytorch import MTCNN  # slow to import

    detector = MTCNN(min_face_size=60, device="cpu")
    found = []
    for picture in pictures:
        _, _, landmarks = detector.detect(picture, landmarks=True)
        if landmarks is not None:  # the first face is the largest
            left, right = np.asarray(landmarks[0][:2], dtype=float)
            side = min(picture.size)
            middle = ((left + right) / 2 - np.array(picture.size) / 2) / side + 0.5
            found.append([*middle, np.hypot(*(right - left)) / side])
    if len(found) < max(1, len(pictures) / 2):
        return None
    x, y, distance = np.median(found, axis=0)
    scale = max(distance / DISTANCE, DISTANCE / distance)
    if max(abs(x - EYES[0]), abs(y - EYES[1])) <= MOST_OFF and scale <= MOST_SCALED:
        return None
    return (f"warning: the photographs are not framed like CelebA-HQ: the eyes are at ({x:.2f}, "
            f"{y:.2f}) of the frame, {distance:.2f} apart, instead of ({EYES[0]:.2f}, "
            f"{EYES[1]:.2f}), {DISTANCE:.2f}. A network learns the framing that it is "
            "shown: align them first")
