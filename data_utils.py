"""From photographs of faces to (LR, HR) pairs: the report's "Dataset and Preprocessing".

A photograph is brought to 256 px on its shorter side, cropped to `crop_size` (128) and downscaled
bicubically by `upscale_factor` (8); both pictures are rounded to 8 bit, as real files are.
"""

import contextlib
import hashlib
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset, DistributedSampler

from support.cli import InputError, log, parallel_map

TRAIN_DIR = "data/DIV2K_train_HR"
VALID_DIR = "data/DIV2K_valid_HR"
FRAME = 256  # px of the report's photographs, on the shorter side
SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff"}
# What Pillow may try on a file, whatever its suffix: nothing that runs other programs. JPEG takes
# in MPO, the JPEG of many phones.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")

# read_image refuses what this warns of
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

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


def pixel_hash(image):
    """Hex digest of a picture's pixels: equal for the same photograph under another name."""
    return hashlib.blake2b(np.asarray(image).tobytes(), digest_size=16).hexdigest()


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
        checked = parallel_map(self._check, self.files, f"reading {dataset_dir}")
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


def check_no_overlap(train, valid):
    """Raise InputError if a photograph (by pixel hash) is in both data sets."""
    known = dict(zip(train.hashes, train.files))
    pairs = [f"{path} = {known[digest]}" for digest, path in zip(valid.hashes, valid.files)
             if digest in known]
    if pairs:
        raise InputError(f"{len(pairs)} validation photograph(s) are also in the training set; "
                         "remove them, or go on with --allow_overlap:\n  " + "\n  ".join(pairs))


def load_data(args):
    """Flags of train_identity.py -> (training set, validation set), checked.

    Says so when the crop size is floored. Raises InputError.
    """
    crop = valid_crop_size(args.crop_size, args.upscale_factor)
    if crop != args.crop_size:
        log(f"--crop_size {args.crop_size} is no multiple of {args.upscale_factor}: using {crop}")
    if not crop:
        raise InputError(f"--crop_size {args.crop_size}: must be {args.upscale_factor} or more")
    if crop < 32 and args.alpha:
        raise InputError(f"--crop_size {args.crop_size}: VGG16 halves a picture five times and "
                         "needs 32 px; take a larger crop, or --alpha 0")
    train = TrainDatasetFromFolder(args.train_dir, crop, args.upscale_factor, args.crop, args.seed,
                                   args.cache_gb)
    valid = ValidDatasetFromFolder(args.valid_dir, crop, args.upscale_factor, args.cache_gb)
    if not args.allow_overlap:
        check_no_overlap(train, valid)
    return train, valid


def epoch_order(n, args, epoch, rank, world):
    """(batches of indices of this rank, flip of every image): functions of seed and epoch alone."""
    sampler = DistributedSampler(range(n), world, rank, shuffle=True, seed=args.seed)
    sampler.set_epoch(epoch)
    order, size = list(sampler), args.batch_size // world
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
    flips = torch.rand(n, generator=generator) < (0.0 if "flips" in args.without else 0.5)
    return [order[i:i + size] for i in range(0, len(order), size)], flips
