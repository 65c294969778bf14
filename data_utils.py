"""From photographs of faces to (LR, HR) pairs: the report's "Dataset and Preprocessing".

A larger photograph is reduced to 256 px on its shorter side, then each is cropped to `crop_size`
(128) and downscaled bicubically by `upscale_factor` (8); both pictures are rounded to 8 bit, as
real files are.
"""

import contextlib
import hashlib
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from support.cli import InputError, first_line, log, parallel_map
from support.machine import ignore_signals

TRAIN_DIR = "data/DIV2K_train_HR"
VALID_DIR = "data/DIV2K_valid_HR"
FRAME = 256  # px of the report's photographs, on the shorter side
CROPS = ("center", "random", "mixed")
# Of the crops in --crop mixed; results/EXPERIMENTS.md, "Which crops to train on".
MIX = {"center": 0.1, "random": 0.5, "rescaled": 0.3, "recoloured": 0.1}
SCALES = (0.5, 1.5)  # of the face in a rescaled crop
MIDDLE = np.nextafter(0.5, 0)  # a central crop's place; rounds down where two are central
SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff"}
# What Pillow may try on a file, whatever its suffix: nothing that runs other programs. JPEG takes
# in MPO, the JPEG of many phones.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
NAMES = {"WEBP": "WebP"}  # as a person writes them, where Pillow does not
PUT_BACK = "put it back and run the command again (a training: with --resume)"

# read_image refuses what this warns of
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# ---------------------------------------------------------------------------------------------
# Photographs


def list_images(folder, flag, formats=FORMATS, suffixes=SUFFIXES):
    """Sorted paths of the images in `folder`; subfolders, hidden and other files are skipped.

    `flag` is the command-line flag that names the folder. Raises InputError if there is none.
    """
    folder = Path(folder)
    wanted = f"set {flag} to a folder that holds the photographs themselves (face_001.jpg, ...)"
    if not folder.is_dir():
        if flag in ("--train_dir", "--valid_dir", "--data_dir"):
            wanted += ("; prepare_celeba_hq.py makes it of CelebA-HQ, and train_identity.py "
                       "--demo needs none")
        raise InputError(f"{folder}: no such folder; {wanted}")
    paths = sorted(p for p in folder.iterdir()
                   if p.suffix.lower() in suffixes and not p.name.startswith(".") and p.is_file())
    if not paths:
        raise InputError(f"{folder}: no {format_names(formats, 'or')} in it; {wanted}")
    return paths


def format_names(formats, conjunction):
    """("JPEG", "WEBP", "BMP"), "or" -> "JPEG, WebP or BMP"."""
    *names, last = (NAMES.get(name, name) for name in formats)
    return f"{', '.join(names)} {conjunction} {last}"


def read_image(path, keep_mode=False, formats=FORMATS):
    """Any photographer's file -> upright 8-bit RGB picture (PIL).

    EXIF orientation is applied; 16 bit is scaled to 8, transparency laid on white, grey, palette
    and CMYK converted. Of several frames the first is read. `keep_mode` applies the orientation
    alone, and sets .info["animated"]. formats: what Pillow may try. Raises InputError naming the
    file, also for pixels of 32 bit, whose white level is unknown.
    """
    try:
        if isinstance(path, (str, os.PathLike)) and Path(path).exists() and (
                not Path(path).is_file()):
            raise InputError("not a file that can be read to its end")  # a pipe would be waited for
        with Image.open(path, formats=formats) as image:
            place = image.fp.tell()
            size = image.fp.seek(0, os.SEEK_END)
            image.fp.seek(place)
            # No photograph packs 1000 px into a byte (a flat grey JPEG: 170), and to decode what
            # claims to takes up to 1.4 GB on each core. Flat drawings may, up to 16 Mpx.
            limit = min(Image.MAX_IMAGE_PIXELS, max(2 ** 24, 1000 * size))
            if image.width * image.height > limit:
                raise InputError(f"declares {image.width}x{image.height} px, a decompression bomb")
            if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
                raise InputError("holds 32-bit or signed pixels; save it with 8 or 16 bit")
            # only callers with keep_mode use it; a phone's MPO also holds thumbnails
            animated = keep_mode and image.format != "MPO" and getattr(image, "is_animated", False)
            image.load()
            with contextlib.suppress(SyntaxError):  # damaged EXIF data: taken as it stands
                image = ImageOps.exif_transpose(image)
            image.info["animated"] = animated
        return image if keep_mode else to_rgb(image)
    except Exception as error:  # decoders raise anything on damaged bytes
        reason = first_line(error)
        if isinstance(error, Image.UnidentifiedImageError):
            reason = f"not a picture of a known format ({format_names(formats, 'and')})"
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


def center_crop(image, size, shift=0):
    """The central `size` x `size` square, or one `shift` px to its right and below it."""
    left, top = ((side - size) // 2 + shift for side in image.size)
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
    whether as many square pictures fit into `cache_gb` GiB; if not, they are decoded again when
    asked for and a file that has vanished or changed since the check is an InputError that names
    it. copies: of each picture that will be held.
    """

    def __init__(self, dataset_dir, crop_size, upscale_factor, keep_frames, cache_gb, flag,
                 files=None, copies=1):
        self.factor = upscale_factor
        self.keep_frames = keep_frames
        self.crop_size = valid_crop_size(crop_size, upscale_factor)
        if crop_size and self.crop_size <= 0:
            raise InputError(f"--crop_size {crop_size} is smaller than the upscale factor "
                             f"{upscale_factor}")
        self.files = files or list_images(dataset_dir, flag)
        pixels = FRAME if keep_frames else self.crop_size
        self.cached = copies * len(self.files) * 3 * pixels ** 2 <= cache_gb * 2 ** 30
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
            picture = np.array(self._kept(frame)) if self.cached else None
            return pixel_hash(frame), (stat.st_size, stat.st_mtime_ns), picture, None
        except (InputError, OSError) as error:
            return None, None, None, str(error)

    def _kept(self, frame):
        """What is kept of a frame: all of it, or the centre crop if no other part is asked for."""
        return frame if self.keep_frames else center_crop(frame, self.crop_size)

    def picture(self, index):
        """The frame of file `index`, or its centre crop, as a PIL picture."""
        if self.cached:
            return Image.fromarray(self.pictures[index])
        path = self.files[index]
        try:
            stat = os.stat(path)
        except OSError:
            raise InputError(f"{path}: vanished after the run had started; {PUT_BACK}") from None
        if (stat.st_size, stat.st_mtime_ns) != self.stats[index]:
            raise InputError(f"{path}: changed after the run had started; {PUT_BACK}")
        return self._kept(to_frame(read_image(path)))

    def digest(self):
        """One hash of the whole data set: the pixels of all its files in order."""
        return hashlib.blake2b("".join(self.hashes).encode(), digest_size=16).hexdigest()

    def __len__(self):
        return len(self.files)


class TrainDatasetFromFolder(FaceFolder):
    """(LR, HR) pairs: float tensors (3, c/s, c/s) and (3, c, c) in [0, 1].

    crop: "center" is the report's text; "random" its published code, a square anywhere in the
    frame; "mixed" some of either, squares of another size brought to c px, and squares in other
    colours, which photographs of faces lack (shares: `MIX`). Crops and flips change with
    `set_epoch` and are functions of (seed, epoch, index) alone, so that a resumed run sees the same
    ones. `centered[i]`: whether photograph i is at its centre crop.
    """

    def __init__(self, dataset_dir, crop_size, upscale_factor, crop="center", seed=0, cache_gb=4.0,
                 flips=False):
        super().__init__(dataset_dir, crop_size, upscale_factor, crop != "center", cache_gb,
                         "--train_dir", copies=1 + flips)
        self.seed, self.flips = seed, flips
        self.shares = MIX if crop == "mixed" else {crop: 1.0}
        if self.cached:  # to mirror a crop takes longer than all else; frames are mirrored once
            self.frames = [torch.from_numpy(picture) for picture in self.pictures]
            self.mirrored = [frame.flip(1) for frame in self.frames] if flips else None
        self.on_gpu = False  # whether the frames lie on a GPU
        self.set_epoch(0)

    def set_epoch(self, epoch):
        """Draw each photograph's crop and flip, and make those crops that are not just cut out."""
        rng, n = np.random.default_rng([self.seed, epoch]), len(self)
        kinds = rng.choice([*self.shares], n, p=[*self.shares.values()])
        self.centered = kinds == "center"
        self.places = np.where(self.centered[:, None], MIDDLE, rng.random((n, 2)))
        self.scales = np.where(kinds == "rescaled", rng.uniform(*SCALES, n), 1.0)
        self.flipped = (rng.random(n) < 0.5) & self.flips
        # c -> gain c + offset in each channel: any colours, flat areas among them
        self.recoloured = kinds == "recoloured"
        self.gains = rng.uniform(0.2, 1, (n, 3))
        self.offsets = rng.random((n, 3)) * (1 - self.gains) * 255
        self.precomputed = {}
        if self.cached:
            indices = np.flatnonzero((self.scales != 1) | self.recoloured).tolist()
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                self.precomputed = dict(zip(indices, pool.map(self.crop, indices)))

    def cache_keys(self, indices):
        """Cache key of each crop that can come again in another epoch, else None."""
        return [(index, bool(self.flipped[index])) if self.centered[index] and self.cached else None
                for index in indices]

    def crop(self, index):
        """The HR crop of photograph `index` in this epoch: (c, c, 3), uint8."""
        if index in self.precomputed:
            return self.precomputed[index]
        crop = self._cut(index) if self.scales[index] == 1 else self._rescale(index)
        if self.recoloured[index]:
            crop = crop.cpu().numpy() * self.gains[index] + self.offsets[index]
            crop = torch.from_numpy(crop.round().astype(np.uint8))
        return crop

    def _cut(self, index):
        """A square of the frame, pixel for pixel."""
        mirror, size = self.flipped[index], self.crop_size
        if self.cached:
            frame = (self.mirrored if mirror else self.frames)[index]
        else:
            frame = torch.from_numpy(np.array(self.picture(index)))
            frame = frame.flip(1) if mirror else frame
        top, left = (int(place * (side - size + 1))
                     for place, side in zip(self.places[index], frame.shape))
        return frame[top:top + size, left:left + size]

    def _rescale(self, index):
        """A square in which the face is `scales[index]` times as large: bicubic, any sub-pixel.

        No smaller than the frame allows: of a frame of c px the whole, unscaled.
        """
        picture, size = self.picture(index), self.crop_size
        side = min(size / self.scales[index], *picture.size)
        top, left = self.places[index] * (picture.height - side, picture.width - side)
        crop = picture.resize((size, size), Image.Resampling.BICUBIC,
                              box=(left, top, left + side, top + side))
        crop = torch.from_numpy(np.array(crop))
        return crop.flip(1) if self.flipped[index] else crop

    def _to_gpu(self, device):
        """Take the frames and this epoch's made crops to a GPU, if it has room for them."""
        copies = self.frames + (self.mirrored or [])
        if not self.on_gpu:
            free, _ = torch.cuda.mem_get_info(device)
            if sum(frame.nbytes for frame in copies) > free / 4:  # the networks need the most of it
                return
            copies = [frame.to(device) for frame in copies]
            self.frames, self.mirrored = copies[:len(self)], copies[len(self):]
            self.on_gpu = True
        if self.precomputed:
            crops = torch.stack([*self.precomputed.values()]).to(device)
            self.precomputed = dict(zip(self.precomputed, crops))

    def __getitem__(self, index):
        lr, hr = to_pairs(self.crop(index)[None], self.factor)
        return lr[0], hr[0]

    def batches(self, indices, device):
        """For each list of indices a batch (LR, HR) on `device`, float, channels last.

        On a GPU with room for them the frames lie there, and a batch is only cut out. Pictures
        that do not fit into the cache are decoded by worker processes.
        """
        if self.cached:
            if device.type == "cuda":
                self._to_gpu(device)
            for batch in indices:
                crops = torch.stack([self.crop(index) for index in batch])
                if device.type == "cuda" and not self.on_gpu:  # pinned, so that the CPU goes on
                    crops = crops.pin_memory().to(device, non_blocking=True)
                yield to_pairs(crops, self.factor)
            return
        loader = DataLoader(self, batch_sampler=indices, num_workers=min(8, os.cpu_count()),
                            pin_memory=device.type == "cuda", worker_init_fn=ignore_signals)
        for pair in loader:
            yield [x.to(device, memory_format=torch.channels_last, non_blocking=True) for x in pair]


def to_pairs(crops, factor):
    """HR crops (N, H, W, 3), uint8 -> (LR, HR), float (N, 3, h, w), (N, 3, H, W) in [0, 1].

    LR is bicubic, antialiased and rounded to 8 bit like Pillow's, to within one level.
    """
    hr = crops.permute(0, 3, 1, 2)  # channels last
    size = hr.shape[2] // factor, hr.shape[3] // factor
    if hr.device.type == "cpu":
        lr = F.interpolate(hr, size=size, mode="bicubic", antialias=True).float()
    else:  # CUDA interpolates no whole numbers
        lr = downscale_levels(hr.float(), size)
    return lr.div_(255), hr.float().div_(255)


def downscale_levels(images, size):
    """Float images of levels 0 to 255, (N, 3, H, W) -> (N, 3, *size): bicubic, antialiased.

    Rounded to whole levels after the rows and after the columns, as Pillow does: an overshoot of
    the first pass would reach the second as it is, and change an LR pixel by up to ten levels.
    """
    for sides in ((images.shape[2], size[1]), size):
        images = F.interpolate(images, size=sides, mode="bicubic", antialias=True)
        images = images.round().clamp(0, 255)
    return images


class ValidDatasetFromFolder(FaceFolder):
    """(LR, bicubic-restored LR, HR) triples in [0, 1]; crop_size 0 keeps whole frames.

    files: paths to take instead of all photographs in `dataset_dir`.
    """

    def __init__(self, dataset_dir, crop_size, upscale_factor, cache_gb=4.0, flag="--valid_dir",
                 files=None):
        super().__init__(dataset_dir, crop_size, upscale_factor, True, cache_gb, flag, files)

        self.shift, self.scale = 0, 1.0

    def framed(self, crop_size, shift=0, scale=1.0):
        """The same photographs, not read again, in another framing.

        crop_size: 0 for whole frames; shift: px to the right and down of the centre crop; scale:
        of the whole frame, and so of the face in it.
        """
        other = copy(self)
        other.crop_size, other.shift, other.scale = crop_size, shift, scale
        return other

    def __getitem__(self, index):
        frame = self.picture(index)
        if self.scale != 1:
            frame = frame.resize([max(self.factor, round(side * self.scale))
                                  for side in frame.size], Image.Resampling.BICUBIC)
        if self.crop_size:
            hr = center_crop(frame, self.crop_size, self.shift)
        else:
            hr = frame.crop((0, 0, valid_crop_size(frame.width, self.factor),
                             valid_crop_size(frame.height, self.factor)))
        lr = downscale(hr, self.factor)
        restored = lr.resize(hr.size, Image.Resampling.BICUBIC)
        return to_tensor(lr), to_tensor(restored), to_tensor(hr)


def check_room(px, flags):
    """Raise InputError naming the flags that ask for a crop of more px than a frame can have."""
    if px > FRAME:
        raise InputError(f"{flags}: takes {px} px of photographs that are reduced to {FRAME} px on "
                         "their shorter side; take less")


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
    check_room(crop, "--crop_size")
    if crop == args.upscale_factor or (crop <= 16 and "mixed_batches" in args.without):
        raise InputError(f"--crop_size {args.crop_size}: leaves BatchNorm a single pixel, which it "
                         "cannot standardise where an image is alone; take 32 px")
    if crop < 32 and args.alpha:
        raise InputError(f"--crop_size {args.crop_size}: VGG16 halves a picture five times and "
                         "needs 32 px; take a larger crop, or --alpha 0")
    train = TrainDatasetFromFolder(args.train_dir, crop, args.upscale_factor, args.crop, args.seed,
                                   args.cache_gb, "flips" not in args.without)
    valid = ValidDatasetFromFolder(args.valid_dir, crop, args.upscale_factor, args.cache_gb)
    if not args.allow_overlap:
        check_no_overlap(train, valid)
    return train, valid


def epoch_order(n, batch_size, seed, epoch, rank, world):
    """This rank's batches of indices: a function of seed and epoch alone.

    batch_size: of all ranks together.
    """
    # the sampler seeds with seed + epoch: 2^20 apart, no two runs share an order
    sampler = DistributedSampler(range(n), world, rank, shuffle=True, seed=seed << 20)
    sampler.set_epoch(epoch)
    order, size = list(sampler), batch_size // world
    return [order[i:i + size] for i in range(0, len(order), size)]
