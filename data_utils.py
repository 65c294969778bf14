"""From photographs of faces to (LR, HR) pairs: the report's "Dataset and Preprocessing".

A photograph is brought to 256 px on its shorter side, cropped to `crop_size` (128) and downscaled
bicubically by `upscale_factor` (8); both pictures are rounded to 8 bit, as real files are.
"""

import argparse
import contextlib
import hashlib
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torch.utils.data import Dataset
from tqdm import tqdm

TRAIN_DIR = "data/DIV2K_train_HR"
VALID_DIR = "data/DIV2K_valid_HR"
FRAME = 256  # px of the report's photographs, on the shorter side
SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff"}
# What Pillow may try on a file, whatever its suffix: nothing that runs other programs. JPEG takes
# in MPO, the JPEG of many phones.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")

# read_image refuses what this warns of
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class InputError(Exception):
    """Something that the user gave cannot be used; the message says what and what to do."""

    def __str__(self):
        # From a DataLoader's worker it comes with the worker's traceback before the message
        return super().__str__().rpartition(f"{__name__}.InputError: ")[2].rstrip()


def run_script(main):
    """Run a script's `main()`: bad input becomes one line on stderr and exit code 2.

    An OSError counts as such: a folder that may not be read or written, a disk that fails.
    """
    try:
        main()
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def positive(text):
    """argparse type: a whole number from 1 up."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return int(text)


def not_negative(text):
    """argparse type: a whole number from 0 up."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return int(text)


# ---------------------------------------------------------------------------------------------
# Photographs


def list_images(folder, flag):
    """Sorted paths of the images in `folder`; subfolders, hidden and other files are passed by.

    `flag` is the command-line flag that names the folder. Raises InputError if there is none.
    """
    folder = Path(folder)
    wanted = f"set {flag} to a folder that holds the photographs themselves (face_001.jpg, ...)"
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; {wanted}")
    paths = sorted(p for p in folder.iterdir()
                   if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file())
    if not paths:
        raise InputError(f"{folder}: no JPEG, PNG, WebP, BMP or TIFF in it; {wanted}")
    return paths


def read_image(path, keep_mode=False):
    """Any photographer's file -> upright 8-bit RGB picture (PIL).

    EXIF orientation is applied; 16 bit is scaled to 8, transparency laid on white, grey, palette
    and CMYK converted. `keep_mode` only turns it upright. Raises InputError naming the file.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            place = image.fp.tell()
            size = image.fp.seek(0, os.SEEK_END)
            image.fp.seek(place)
            # No photograph packs 1000 px into a byte (a flat grey JPEG: 170), and to decode what
            # claims to takes up to 1.4 GB on each core. Flat drawings may, up to 16 Mpx.
            limit = min(Image.MAX_IMAGE_PIXELS, max(2 ** 24, 1000 * size))
            if image.width * image.height > limit:
                raise InputError(f"declares {image.width}x{image.height} px, a decompression bomb")
            image.load()
            with contextlib.suppress(SyntaxError):  # damaged EXIF data: taken as it stands
                image = ImageOps.exif_transpose(image)
        return image if keep_mode else to_rgb(image)
    except Exception as error:  # decoders raise anything on damaged bytes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "not an image of a known format"
        raise InputError(f"{path}: {reason}") from None


def to_rgb(image):
    """A PIL picture of any mode -> RGB, 8 bit, transparency on white."""
    if image.mode.startswith("I"):  # 16 bit grey; 65535 is white, and so is what is transparent
        table = np.rint(np.arange(65536) / 257).astype(int)
        table[image.info.get("transparency", 65535)] = 255
        image = image.convert("I").point(table.tolist(), "L")
        image.info.pop("transparency", None)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_frame(image):
    """Bring a larger picture to 256 px on the shorter side (bicubic, antialiased)."""
    scale = FRAME / min(image.size)
    if scale >= 1:
        return image
    size = tuple(max(FRAME, round(side * scale)) for side in image.size)
    return image.resize(size, Image.Resampling.BICUBIC)


def center_crop(image, size):
    """The central `size` x `size` square; size 0 keeps the whole picture."""
    if not size:
        return image
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def valid_crop_size(crop_size, upscale_factor):
    """The largest multiple of the factor that is not above `crop_size` (SRGAN's convention)."""
    return crop_size - crop_size % upscale_factor


def downscale(image, factor):
    """HR picture -> LR picture: bicubic and antialiased (Pillow), rounded to 8 bit."""
    return image.resize((image.width // factor, image.height // factor), Image.Resampling.BICUBIC)


def to_tensor(image):
    """PIL RGB picture or (H, W, 3) uint8 array -> float tensor (3, H, W) in [0, 1]."""
    array = np.array(image, dtype=np.uint8)
    return torch.from_numpy(array).permute(2, 0, 1).to(torch.float32).div(255)


def to_image(tensor):
    """Float tensor (3, H, W) in [0, 1] -> PIL RGB picture, rounded to 8 bit."""
    array = tensor.detach().float().clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())


def pixel_hash(image):
    """Hex digest of a picture's pixels: equal for the same photograph under another name."""
    return hashlib.blake2b(np.asarray(image).tobytes(), digest_size=16).hexdigest()


def each(function, items, title):
    """[function(item) for item in items] on all cores, with a bar on a terminal."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(tqdm(pool.map(function, items), total=len(items), desc=title, leave=False,
                         disable=None))


def unusable(errors):
    """Raise one InputError that lists every file that could not be used, if there is any."""
    if errors:
        raise InputError(f"{len(errors)} file(s) cannot be used; repair or remove them:\n  "
                         + "\n  ".join(errors))


# ---------------------------------------------------------------------------------------------
# Data sets


class FaceFolder(Dataset):
    """What the two data sets share: every file is read and checked once, then held as uint8.

    `files`: sorted paths. `hashes`: one hex digest of the 256 px frame's pixels per file. `cached`:
    whether the pictures fit into `cache_gb` GiB; if not, they are decoded again when asked for and
    a file that has vanished or changed since the check is an InputError that names it.
    """

    def __init__(self, dataset_dir, crop_size, upscale_factor, crop, cache_gb, flag):
        self.factor = upscale_factor
        self.crop = crop
        self.crop_size = valid_crop_size(crop_size, upscale_factor)
        if crop_size and self.crop_size <= 0:
            raise InputError(f"--crop_size {crop_size} is smaller than the upscale factor "
                             f"{upscale_factor}")
        self.files = list_images(dataset_dir, flag)
        pixels = self.crop_size if self.crop_size and crop == "center" else FRAME
        self.cached = len(self.files) * 3 * pixels ** 2 <= cache_gb * 2 ** 30
        checked = each(self._check, self.files, f"reading {dataset_dir}")
        unusable([error for _, _, _, error in checked if error])
        self.hashes, self.stats, self.pictures, _ = zip(*checked)

    def _check(self, path):
        """(pixel hash, file size and time, the HR picture as uint8 if it is to be kept, error)."""
        try:
            stat = os.stat(path)
            frame = to_frame(read_image(path))
            if min(frame.size) < max(self.crop_size, self.factor):
                raise InputError(f"{path}: {frame.width}x{frame.height} px is smaller than the "
                                 f"crop of {max(self.crop_size, self.factor)} px")
            picture = np.asarray(self._still(frame)) if self.cached else None
            return pixel_hash(frame), (stat.st_size, stat.st_mtime_ns), picture, None
        except (InputError, OSError) as error:
            return None, None, None, str(error)

    def _still(self, frame):
        """The part of a frame that never changes: the centre crop, or for random crops all."""
        if self.crop == "random":
            return frame
        if self.crop_size:
            return center_crop(frame, self.crop_size)
        return frame.crop((0, 0, valid_crop_size(frame.width, self.factor),
                           valid_crop_size(frame.height, self.factor)))

    def picture(self, index):
        """The centre crop (or, for random crops, the frame) of file `index` as a PIL picture."""
        if self.cached:
            return Image.fromarray(self.pictures[index])
        path = self.files[index]
        try:
            stat = os.stat(path)
        except OSError:
            raise InputError(f"{path}: vanished after the run had started; put it back and "
                             "--resume") from None
        if (stat.st_size, stat.st_mtime_ns) != self.stats[index]:
            raise InputError(f"{path}: changed after the run had started; put it back and --resume")
        return self._still(to_frame(read_image(path)))

    def digest(self):
        """One hash of the whole data set: the pixels of all its files in order."""
        return hashlib.blake2b("".join(self.hashes).encode(), digest_size=16).hexdigest()

    def __len__(self):
        return len(self.files)


class TrainDatasetFromFolder(FaceFolder):
    """(LR, HR) pairs: float tensors (3, c/s, c/s) and (3, c, c) in [0, 1].

    crop="center" is the report's text; crop="random" is its published code: another square each
    epoch, a function of (seed, epoch, index) alone, so that a resumed run sees the same ones.
    """

    def __init__(self, dataset_dir, crop_size, upscale_factor, crop="center", seed=0, cache_gb=4.0):
        super().__init__(dataset_dir, crop_size, upscale_factor, crop, cache_gb, "--train_dir")
        self.seed = seed
        self.epoch = 0

    def __getitem__(self, index):
        hr = self.picture(index)
        if self.crop == "random":
            rng = np.random.default_rng([self.seed, self.epoch, index])
            left = rng.integers(hr.width - self.crop_size + 1)
            top = rng.integers(hr.height - self.crop_size + 1)
            hr = hr.crop((left, top, left + self.crop_size, top + self.crop_size))
        return to_tensor(downscale(hr, self.factor)), to_tensor(hr)


class ValidDatasetFromFolder(FaceFolder):
    """(LR, bicubic-restored LR, HR) triples in [0, 1]; crop_size 0 keeps whole frames."""

    def __init__(self, dataset_dir, crop_size, upscale_factor, cache_gb=4.0, flag="--valid_dir"):
        super().__init__(dataset_dir, crop_size, upscale_factor, "center", cache_gb, flag)

    def __getitem__(self, index):
        hr = self.picture(index)
        lr = downscale(hr, self.factor)
        restored = lr.resize(hr.size, Image.Resampling.BICUBIC)
        return to_tensor(lr), to_tensor(restored), to_tensor(hr)


def refuse_overlap(train, valid):
    """Raise InputError if a photograph (by pixel hash) is in both data sets."""
    known = dict(zip(train.hashes, train.files))
    pairs = [f"{path} = {known[digest]}" for digest, path in zip(valid.hashes, valid.files)
             if digest in known]
    if pairs:
        raise InputError(f"{len(pairs)} validation photograph(s) are also in the training set; "
                         "remove them, or go on with --allow_overlap:\n  " + "\n  ".join(pairs))


# ---------------------------------------------------------------------------------------------
# Synthetic portraits, for the demo and the tests


def synthetic_portraits(n, size, seed):
    """n procedural portraits of n different people: uint8 array (n, size, size, 3).

    Each is drawn from one vector of random numbers (the identity): skin, hair, face shape, eyes,
    brows, nose, mouth and light. Same seed, same people. Eyes sit at 0.47 of the height, as in
    CelebA-HQ.
    """
    rng = np.random.default_rng(seed)
    return np.stack([_portrait(rng.random(32), size) for _ in range(n)])


def _portrait(identity, size):
    v = iter(identity)

    def between(low, high):
        return low + (high - low) * next(v)

    unit = 4 * size  # drawn at 4x and reduced: smooth edges
    image = Image.new("RGB", (unit, unit), tuple(int(between(60, 220)) for _ in range(3)))
    draw = ImageDraw.Draw(image)

    def ellipse(x, y, rx, ry, fill):
        draw.ellipse([(x - rx) * unit, (y - ry) * unit, (x + rx) * unit, (y + ry) * unit], fill)

    def shade(colour, factor):
        return tuple(int(min(255, channel * factor)) for channel in colour)

    tone = next(v)
    skin = tuple(int(a + (b - a) * tone) for a, b in zip((245, 205, 180), (105, 65, 45)))
    dark, red = next(v), next(v)
    hair = tuple(int(c * (1 - dark)) + 15 for c in (200, 150 - 60 * red, 90 - 50 * red))
    width, height = between(0.21, 0.29), between(0.30, 0.36)

    ellipse(0.5, 0.48, width + between(0.02, 0.09), between(0.36, 0.44), hair)  # hair behind
    length = between(0.48, 0.95)
    draw.rectangle([(0.47 - width) * unit, 0.45 * unit, (0.53 + width) * unit, length * unit], hair)
    draw.polygon([(x * unit, y * unit) for x, y in
                  ((0.40, 0.75), (0.60, 0.75), (0.85, 1.0), (0.15, 1.0))], shade(skin, 0.85))
    ellipse(0.5, 0.52, width, height, skin)
    jaw = between(0.6, 1.0)
    ellipse(0.5, 0.68, width * jaw, 0.19, skin)
    fringe = between(0.17, 0.21)
    draw.chord([(0.5 - width) * unit, 0.14 * unit, (0.5 + width) * unit, 2 * fringe * unit],
               180 + between(-25, 10), 360 + between(-10, 25), hair)

    spread, eye, lid = between(0.085, 0.13), between(0.028, 0.048), between(0.45, 0.8)
    iris = tuple(int(between(20, 150)) for _ in range(3))
    brow, tilt = between(0.010, 0.028), between(-0.03, 0.03)
    for side in (-1, 1):
        x = 0.5 + side * spread
        ellipse(x, 0.47, eye, eye * lid, (240, 238, 232))
        ellipse(x, 0.47, eye * 0.55, eye * min(lid, 0.55), iris)
        ellipse(x, 0.47, eye * 0.25, eye * 0.25, (10, 10, 10))
        draw.line([((x - side * 0.05) * unit, (0.40 + tilt) * unit),
                   ((x + side * 0.05) * unit, (0.40 - tilt) * unit)], shade(hair, 0.7),
                  max(1, int(brow * unit)))
    nose, tip = between(0.02, 0.045), between(0.56, 0.61)
    draw.polygon([(0.5 * unit, 0.47 * unit), ((0.5 - nose) * unit, tip * unit),
                  ((0.5 + nose) * unit, tip * unit)], shade(skin, 0.88))
    mouth, lips = between(0.05, 0.11), between(0.010, 0.030)
    ellipse(0.5, between(0.68, 0.73), mouth, lips, (int(between(120, 200)), 60, 70))

    image = image.filter(ImageFilter.GaussianBlur(unit / 256)).resize((size, size), Image.LANCZOS)
    ramp = np.linspace(-1, 1, size) * between(-0.25, 0.25)  # light from one side
    lit = np.asarray(image) * (1 + ramp[None, :, None])
    return np.clip(np.rint(lit), 0, 255).astype(np.uint8)
