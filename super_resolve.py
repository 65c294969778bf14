"""Enlarge small face pictures, or the small faces in photographs, with a trained generator.

    python super_resolve.py face.png folder/ --out_dir out           # pictures that are a face
    python super_resolve.py party.jpg --detect --out_dir out         # faces in a larger photo
    python super_resolve.py face.png --checkpoint epochs/netG_epoch_8_100.pth --compare
    find album/ -name '*.heic' | python super_resolve.py - --detect  # a list of paths

`face.png` gives `face_sr.png`; `party.jpg` gives `party_face1.png`, ... and, enlarged, with its
small faces restored, `party_restored.png`. A further input of the same name, from another folder or
with another suffix, counts on: `face_2`.
"""

import support  # noqa: F401  first, for Ctrl-C

# isort: split
import math
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, features

from data_utils import FORMATS, SUFFIXES, list_images, read_image, to_rgb, to_tensor
from support import checkpoints, figures
from support.cli import InputError, Parser, check_out_dir, positive, run_script
from support.figures import to_image
from support.machine import DEVICES, choose_device

FRAMES = (128, 384)  # px of HR frames that training shows a whole face in: 256, rescaled
SMALL_FACE = 64  # px of the largest frame in a photo that gains detail; the face is half of it
LARGE = 64    # px; a picture with a longer side than this is probably more than a face
LIMIT = 128   # px; 8x of it is a file of 1024 px, and the network has seen no face as large
PIXELS = 2 ** 15  # LR px to compute at a time: 1 to 2 GB of activations at 8x
RECEPTIVE_FIELD = 22  # LR px to each side that an output pixel depends on (most of all factors)
SMALLEST = 20  # px of the smallest face looked for, MTCNN's default
SURE = 0.95   # MTCNN's probability; faces of 32 px and more score above 0.99, flukes below 0.95
MOST = 10 ** 8  # px of a restored photo: 300 MB in memory
# Beyond what training takes: {suffix: what is missing where it cannot be read}.
MORE_SUFFIXES = {".gif": "", ".avif": "a Pillow of 11.3 or more, built with AVIF",
                 **dict.fromkeys((".heic", ".heif"), "the package pillow-heif: "
                                                     "pip install pillow-heif")}


# ---------------------------------------------------------------------------------------------
# Pictures


def known_formats():
    """Pillow's names of the formats that can be read here; a HEIC decoder is taken in if found."""
    try:
        from pillow_heif import register_heif_opener
        register_heif_opener()
        heif = ("HEIF",)
    except ImportError:
        heif = ()
    return (*FORMATS, "GIF", *["AVIF"] * features.check("avif"), *heif)


def find_inputs(arguments, fail, formats=FORMATS):
    """Pictures and folders -> paths in that order, each once; fail(error) for an empty folder.

    The argument - stands for the lines of standard input.
    """
    paths, suffixes = {}, SUFFIXES | MORE_SUFFIXES.keys()
    listed = re.split("[\n\0]", sys.stdin.read()) if "-" in arguments and sys.stdin else []
    arguments = [path for argument in arguments
                 for path in (listed if argument == "-" else [argument]) if path]
    for argument in map(Path, arguments):
        try:
            found = [argument]
            if argument.is_dir():
                found = list_images(argument, "the argument", formats, suffixes)
        except (InputError, OSError) as error:  # a name that is too long, a folder not to be read
            fail(error)
            continue
        for path in found:
            paths.setdefault(os.path.realpath(path), path)
    return list(paths.values())


def unique_stems(paths):
    """A stem for the outputs of each path: its own, or with _2, _3, ... where that is taken.

    Every output adds an ending of its own to a stem, so unique stems make unique files.
    """
    stems, taken = [], set()
    for path in paths:
        stem, n = path.stem, 1
        while stem.lower() in taken:  # macOS and Windows ignore case
            n += 1
            stem = f"{path.stem}_{n}"
        taken.add(stem.lower())
        stems.append(stem)
    return stems


def split_alpha(image):
    """A PIL picture of any mode -> (RGB picture, alpha channel (L) or None).

    Colours are taken as they are, not laid on white as for training: alpha is put back later.
    """
    transparent = "transparency" in image.info and image.mode != "I;16"  # would turn white
    if transparent or image.mode in ("RGBA", "LA", "PA", "RGBa"):
        image = image.convert("RGBA")
        return image.convert("RGB"), image.getchannel("A")
    return to_rgb(image), None


def like_original(rgb, original, alpha=None):
    """An RGB result -> grey if `original` is grey; with `alpha` (L), resized bicubically.

    The colour profile is kept: without it a phone's wide-gamut colours would turn dull. One of
    inks or of Lab says nothing of RGB.
    """
    grey = original.mode in ("1", "L", "LA") or original.mode.startswith("I")
    result = rgb.convert("L") if grey else rgb.copy()
    if alpha is not None:
        result.putalpha(alpha.resize(rgb.size, Image.Resampling.BICUBIC))
    result.info.pop("icc_profile", None)
    if original.mode not in ("CMYK", "LAB") and "icc_profile" in original.info:
        result.info["icc_profile"] = original.info["icc_profile"]
    return result


# ---------------------------------------------------------------------------------------------
# The network


def super_resolve(generator, pictures):
    """RGB pictures (PIL) of any sizes -> RGB pictures, `generator.scale_factor` times as large.

    Pictures of equal size are computed together, as many as PIXELS allows.
    """
    device = next(generator.parameters()).device
    by_size = {}
    for index, picture in enumerate(pictures):
        by_size.setdefault(picture.size, []).append(index)
    results = [None] * len(pictures)
    for (width, height), indices in by_size.items():
        n = max(1, PIXELS // (width * height))
        for part in (indices[i:i + n] for i in range(0, len(indices), n)):
            lr = torch.stack([to_tensor(pictures[i]) for i in part])
            lr = lr.to(device, memory_format=torch.channels_last)
            for index, sr in zip(part, upscale(generator, lr)):
                results[index] = to_image(sr)
    return results


@torch.inference_mode()
def upscale(generator, lr):
    """generator(lr), a strip of rows at a time if lr is large: (N, 3, h, w) -> (N, 3, s*h, s*w)."""
    s, height, strips = generator.scale_factor, lr.shape[2], []
    rows = max(RECEPTIVE_FIELD, PIXELS // (lr.shape[0] * lr.shape[3]))
    for top in range(0, height, rows):
        above = min(top, RECEPTIVE_FIELD)
        sr = generator(lr[:, :, top - above:top + rows + RECEPTIVE_FIELD])
        strips.append(sr[:, :, above * s:(above + rows) * s])
    return torch.cat(strips, dim=2)


# ---------------------------------------------------------------------------------------------
# Faces in a photograph


def find_faces(detector, photo):
    """RGB photo -> the `face_square` of each face, large ones first. `detector`: an MTCNN."""
    if min(photo.size) < SMALLEST:  # MTCNN fails on what is smaller than its smallest face
        return []
    _, probabilities, landmarks = detector.detect(photo, landmarks=True)
    if landmarks is None:
        return []
    return [face_square(np.asarray(points, dtype=float))
            for points, sure in zip(landmarks, probabilities) if sure >= SURE]


def face_square(points):
    """Landmarks -> the square that CelebA-HQ would frame that face with: (x, y, side, angle).

    points: (5, 2) px: the eyes (left one in the photo first), nose, corners of the mouth. (x, y):
    the centre; side in px; angle in radians, clockwise. Karras et al. 2018, appendix C: 4 eye
    distances wide, or 3.6 times eyes to mouth where a turned head brings the eyes together. Check:
    MTCNN's landmarks in 100 frames of 256 px give a centre of (128.6, 127.4), a side of 262 +- 8
    and an angle of 0.0 +- 0.9 degrees.
    """
    eyes, mouth = points[:2].mean(0), points[3:].mean(0)
    across, down = points[1] - points[0], mouth - eyes
    x, y = eyes + 0.1 * down
    side = max(4.0 * np.hypot(*across), 3.6 * np.hypot(*down))
    right = across + [down[1], -down[0]]  # both say which way is right; their sum is steadier
    return float(x), float(y), float(side), math.atan2(right[1], right[0])


def placement(square, size):
    """(3, 3) matrix: px of the `size` x `size` face -> px of the photo that it was cut from."""
    x, y, side, angle = square
    cos, sin = math.cos(angle) * side / size, math.sin(angle) * side / size
    return np.array([[cos, -sin, x - (cos - sin) * size / 2],
                     [sin, cos, y - (sin + cos) * size / 2],
                     [0, 0, 1]])


def warp(image, matrix, size):
    """PIL picture -> one of `size`, whose pixel p shows `matrix` @ p (bicubic); black outside."""
    return image.transform(size, Image.Transform.AFFINE, matrix[:2].ravel(),
                           Image.Resampling.BICUBIC)


def cut_face(image, square, size):
    """The upright face in `square` of a PIL picture as `size` x `size` px, antialiased.

    Where the square leaves the picture, its edge is repeated.
    """
    side = max(1, round(square[2]))  # first cut pixel by pixel, then resize, which antialiases
    pixels = np.asarray(image)
    padded = np.pad(pixels, [(side, side)] * 2 + [(0, 0)] * (pixels.ndim - 2), mode="edge")
    matrix = placement(square, side)
    matrix[:2, 2] += side
    face = warp(Image.fromarray(padded), matrix, (side, side))
    return face.resize((size, size), Image.Resampling.BICUBIC)


def paste_face(photo, face, square):
    """`photo` with `face` put back into `square`; a soft edge, and nothing changed outside."""
    side = max(1, round(square[2]))
    soft = max(1, side // 8)
    mask = Image.new("L", (side, side), 0)
    ImageDraw.Draw(mask).rectangle([soft, soft, side - 1 - soft, side - 1 - soft], fill=255)
    mask = mask.filter(ImageFilter.GaussianBlur(soft / 2))
    face = face.resize((side, side), Image.Resampling.BICUBIC)
    # of a large photo only the part around the face is composed anew
    reach = math.ceil(0.75 * side) + 2  # half a diagonal, and a little
    left, top = (max(0, math.floor(at) - reach) for at in square[:2])
    part = photo.crop((left, top, min(photo.width, left + 2 * reach),
                       min(photo.height, top + 2 * reach)))
    matrix = placement(square, side)
    matrix[:2, 2] -= left, top
    matrix = np.linalg.inv(matrix)
    part = Image.composite(warp(face, matrix, part.size), part, warp(mask, matrix, part.size))
    photo = photo.copy()
    photo.paste(part, (left, top))
    return photo


def frame_size(side, factor):
    """LR px for the network of a frame that has `side` px in the photo: its own, within FRAMES."""
    low, high = (size // factor for size in FRAMES)
    return min(max(round(side), low), high)


# ---------------------------------------------------------------------------------------------
# From file to files


def read_any(path, formats):
    """`read_image` in its own mode; where the decoder is missing, its InputError says so."""
    try:
        return read_image(path, keep_mode=True, formats=formats)
    except InputError as error:
        missing = MORE_SUFFIXES.get(path.suffix.lower())
        name = "AVIF" if path.suffix.lower() == ".avif" else "HEIF"
        if not missing or name in formats or not path.is_file():
            raise
        raise InputError(f"{path}: to read this format needs {missing}") from error


def prepare(path, stem, formats, detector, factor, reduce):
    """Read one file -> all that is known of it; `.lr`: the RGB pictures to super-resolve.

    formats: `known_formats()`; reduce: px to bring the shorter side to, or None. Raises InputError
    naming the file: unreadable, too large, or without a face.
    """
    original = read_any(path, formats)
    try:
        rgb, alpha = split_alpha(original)
    except ValueError as error:  # a colour space that Pillow reads but does not convert
        raise InputError(f"{path}: {error}") from None
    if detector is None:
        lr, squares = [reduced(rgb, reduce)], []
        if max(lr[0].size) > LIMIT:
            advice = "" if reduce else ", --reduce 32 reduces a picture of one face"
            raise InputError(f"{path}: {lr[0].width}x{lr[0].height} px is more than the network is "
                             f"for ({LIMIT} px): --detect finds the faces in a photo{advice}")
    else:
        squares = find_faces(detector, rgb)
        if not squares:
            raise InputError(f"{path}: no face found, nothing written")
        lr = [cut_face(rgb, square, frame_size(square[2], factor)) for square in squares]
    return SimpleNamespace(path=path, stem=stem, original=original, rgb=rgb, alpha=alpha,
                           squares=squares, lr=lr)


def reduced(image, size):
    """`image` with a shorter side of `size` px, antialiased, if it is larger and size is given."""
    if not size or min(image.size) <= size:
        return image
    return image.resize([max(1, round(side * size / min(image.size))) for side in image.size],
                        Image.Resampling.BICUBIC)


def results(job, faces, upscale, force):
    """The pictures to write, by the ending of their names, and what was done with each face.

    faces: the super-resolved `job.lr`.
    """
    if not job.squares:
        large = max(job.lr[0].size) > LARGE
        return ({"sr": like_original(faces[0], job.original, job.alpha)},
                "; large for a face picture: --detect finds the faces in a photo" * large)
    pictures, remarks = {}, []
    restored = restored_photo(job, faces, upscale, force)
    if restored:
        pictures["restored"] = like_original(restored, job.original, job.alpha)
    for n, (face, square) in enumerate(zip(faces, job.squares), 1):
        alpha = job.alpha and cut_face(job.alpha, square, face.width)
        pictures[f"face{n}"] = like_original(face, job.original, alpha)
        kept = "" if force or square[2] <= SMALL_FACE else ", left as it is in the photo"
        remarks.append(f"face {n}: {round(square[2] / 2)} px{kept}")
    if not restored:
        remarks.append("no face is so small that the photo gains by it; --force restores all")
    return pictures, f"; {'; '.join(remarks)}"


def restored_photo(job, faces, upscale, force):
    """The photo `upscale` times as large (Lanczos) with its small faces put in; None without any.

    upscale: None for 4, or less where MOST pixels allow less. A large face has more detail in the
    photo than the network, which sees it reduced, can give back; force: put it in all the same.
    """
    pixels = job.rgb.width * job.rgb.height
    upscale = upscale or max(1, min(4, math.isqrt(MOST // pixels)))
    size = job.rgb.width * upscale, job.rgb.height * upscale
    small = [(face, square) for face, square in zip(faces, job.squares)
             if force or square[2] <= SMALL_FACE]
    if not small:
        return None
    if size[0] * size[1] > MOST:
        raise InputError(f"{job.path}: {size[0]}x{size[1]} px would be too large; give a smaller "
                         "--upscale")
    photo = job.rgb.resize(size, Image.Resampling.LANCZOS)
    for face, (x, y, side, angle) in small:
        photo = paste_face(photo, face, (x * upscale, y * upscale, side * upscale, angle))
    return photo


def comparison(job, faces):
    """Input (nearest) | bicubic | output, a row for each face; the input as the file has it."""
    inputs = ([cut_face(job.rgb, square, max(1, round(square[2]))) for square in job.squares]
              or job.lr)
    rows = [[face.resize(sr.size, Image.Resampling.NEAREST),
             face.resize(sr.size, Image.Resampling.BICUBIC), like_original(sr, job.original)]
            for face, sr in zip(inputs, faces)]
    return figures.grid(rows, ("input", "bicubic", "output"))


def write(job, pictures, out_dir):
    """Write what `results` made -> {path: picture}. Raises InputError naming a path.

    Nothing of a job is written where one of its names is taken by what this script did not write.
    """
    written = {out_dir / f"{job.stem}_{ending}.png": p for ending, p in pictures.items()}
    figures.check_ours(written)
    for path, picture in written.items():
        figures.save_image(picture, path)
    return written


# ---------------------------------------------------------------------------------------------
# The command line


def load_network(args):
    """The generator that the flags ask for, on the device that they ask for."""
    device = choose_device(args.device)
    path = args.checkpoint or checkpoints.shipped_generator()
    if args.blend:
        generator = checkpoints.load_blend(path, *checkpoints.parse_blend(args.blend))
    else:
        generator = checkpoints.load_generator(path)
    return generator.to(device, memory_format=torch.channels_last)


def parse(argv):
    """The command line -> argparse.Namespace."""
    parser = Parser(
        description="Upscale small face pictures, or the faces in photographs.",
        epilog="example: python super_resolve.py party.jpg --detect --compare --out_dir out")
    parser.add_argument("inputs", nargs="+",
        help="pictures (JPEG, PNG, WebP, BMP, TIFF, GIF, AVIF; HEIC with the package pillow-heif), "
             "and folders of pictures; -: a list of them, a line each, on standard input")

    add = parser.add_argument_group("output").add_argument
    add("--out_dir", default="out", help="folder for the PNG files")
    add("--compare", action="store_true",
        help="also write input | bicubic | output side by side (NAME_compare.png)")

    add = parser.add_argument_group("faces").add_argument
    add("--detect", action="store_true",
        help=f"the inputs are photographs: find the faces in them (from {SMALLEST} px), write each "
             "(NAME_face1.png) and the enlarged photo with its small faces put in "
             "(NAME_restored.png)")
    add("--upscale", type=positive,
        help="factor by which --detect enlarges the photo (default: 4, less for a large one)")
    add("--force", action="store_true",
        help=f"put in faces of more than {SMALL_FACE // 2} px, too, although the photo shows more")
    add("--reduce", type=positive, metavar="PX",
        help="without --detect: bring the shorter side to PX first (a whole head: 32)")

    add = parser.add_argument_group("network").add_argument
    add("--checkpoint",
        help="generator (.pth), which also says the factor (default: the shipped one)")
    add("--blend", metavar="B.pth:WEIGHT",
        help="interpolate the weights: 1 - WEIGHT of the checkpoint's, WEIGHT of B's")

    add = parser.add_argument_group("machine").add_argument
    add("--device", choices=DEVICES, default="auto", help="where to compute")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    if args.detect and args.reduce:
        raise InputError("--reduce: leave it out beside --detect, which cuts the faces to size")
    if not args.detect and (args.upscale or args.force):
        raise InputError("--upscale and --force are of --detect: add that, or leave them out")
    failed = []

    def fail(error):
        failed.append(error)
        print(f"error: {error}", file=sys.stderr)

    formats = known_formats()
    out_dir, paths = Path(args.out_dir), find_inputs(args.inputs, fail, formats)
    if not paths and not failed:
        raise InputError("-: no path on standard input; give one per line")
    if os.path.realpath(out_dir) in {os.path.dirname(os.path.realpath(path)) for path in paths}:
        raise InputError(f"--out_dir {out_dir} holds an input, which an output might overwrite; "
                         "choose another folder")
    check_out_dir(out_dir)
    generator = load_network(args)
    detector = None
    if args.detect:
        from facenet_pytorch import MTCNN  # slow to import, and only needed here
        detector = MTCNN(keep_all=True, min_face_size=SMALLEST,
                         device=next(generator.parameters()).device)
    print(f"warning: faces restored {generator.scale_factor}x are plausible, not evidence: what "
          "the network adds was not in the picture. Never identify a person by it", file=sys.stderr)

    files = list(zip(paths, unique_stems(paths)))
    step = 1 if args.detect else 16  # photos are large: one in memory at a time
    for start in range(0, len(files), step):
        jobs = []
        for path, stem in files[start:start + step]:
            try:
                jobs.append(prepare(path, stem, formats, detector, generator.scale_factor,
                                    args.reduce))
            except InputError as error:
                fail(error)
        all_faces = super_resolve(generator, [lr for job in jobs for lr in job.lr])
        for job in jobs:
            faces = [all_faces.pop(0) for _ in job.lr]
            try:
                pictures, remark = results(job, faces, args.upscale, args.force)
                if args.compare:
                    pictures["compare"] = comparison(job, faces)
                written = write(job, pictures, out_dir)
            except InputError as error:
                fail(error)
                continue
            sizes = ", ".join(f"{path} ({p.width}x{p.height})" for path, p in written.items())
            remark += "; only the first frame" * job.original.info["animated"]
            print(f"{job.path} ({job.rgb.width}x{job.rgb.height}) -> {sizes}{remark}", flush=True)
    if failed:
        raise InputError(f"{len(failed)} input(s) not done, see above")


if __name__ == "__main__":
    run_script(main)
