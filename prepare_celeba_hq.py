"""Make the report's data set, data/DIV2K_train_HR and data/DIV2K_valid_HR, from CelebA-HQ.

CelebA-HQ is Karras et al. 2018, "Progressive Growing of GANs", made from CelebA (Liu et al. 2015,
"Deep Learning Face Attributes in the Wild"). This script downloads nothing. Most people get the
30,000 photographs as CelebAMask-HQ.zip, from https://github.com/switchablenorms/CelebAMask-HQ .
CelebA's terms, https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html , allow non-commercial research
only and forbid passing the photographs on; whoever uses the data must read and accept them.

A folder or a zip is taken, with the photographs at any depth; where it has a folder CelebA-HQ-img,
only that is read (beside it lie the masks). Stopped half-way, the same command continues.
"""

import support  # noqa: F401  first, for Ctrl-C

# isort: split
import csv
import hashlib
import io
import os
import re
import signal
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import repeat
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from data_utils import (
    FRAME,
    SUFFIXES,
    TRAIN_DIR,
    VALID_DIR,
    list_images,
    pixel_hash,
    read_image,
    to_frame,
)
from support.checkpoints import remove_leftovers, replacing
from support.cli import InputError, Parser, parallel_map, run_script

FOLDERS = {"valid": Path(VALID_DIR).name, "train": Path(TRAIN_DIR).name}
COLUMNS = ["file", "source", "hash", "split"]
MAX_MEMBER = 200 * 2 ** 20  # bytes a zip member may unpack to; a 1024 px PNG has about 2 MB
CHUNK = 256  # pictures between two writes of the manifest: what a stopped run may have to redo
NAMED = 10  # how many files a message names before it says "..."


def shorten(names):
    return ", ".join(map(str, names[:NAMED])) + (", ..." if len(names) > NAMED else "")


# ---------------------------------------------------------------------------------------------
# What is there


def find_photographs(source):
    """Every image in a folder or a zip -> {name without suffix: path inside `source`}.

    The names are unique whatever the case: they become the PNGs. Raises InputError for what is
    neither a folder nor a zip, holds no image, or has members that lead out of the folder.
    """
    if source.is_dir():
        members = [p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()]
    else:
        try:
            if source.is_fifo():  # would be waited for
                raise zipfile.BadZipFile("a pipe")
            with zipfile.ZipFile(source) as archive:
                members = archive.namelist()
        except Exception as error:  # a damaged directory raises what it likes
            raise InputError(f"{source}: neither a folder nor a zip that can be read "
                             f"({getattr(error, 'strerror', None) or error})") from None
        for member in members:
            parts = member.replace("\\", "/").split("/")
            if not parts[0] or ".." in parts or re.match("[A-Za-z]:", member):
                raise InputError(f"{source}: refused, its member {member!r} leads out of the "
                                 "folder it would be unpacked to")

    paths = {member: PurePosixPath(member.replace("\\", "/")) for member in sorted(set(members))
             if not member.endswith("/")}
    found = {member: path for member, path in paths.items() if path.suffix.lower() in SUFFIXES
             and not any(part.startswith(".") for part in path.parts)}
    found = {m: path for m, path in found.items() if "CelebA-HQ-img" in path.parts} or found
    if not found:
        raise InputError(f"{source}: no JPEG, PNG, WebP, BMP or TIFF in it; give the folder or zip "
                         "of the photographs (an archive inside it has to be unpacked first)")
    same = Counter(path.stem.lower() for path in found.values())
    return {path.stem if same[path.stem.lower()] == 1 else f"{path.stem}_{text_hash(member)[:8]}":
            member for member, path in found.items()}


def text_hash(text):
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=16).hexdigest()


def read_identities(path):
    """CelebA-HQ-identity.txt, lines `0.jpg 1234` -> {name without suffix: identity}."""
    try:
        if not Path(path).is_file():  # a pipe would be waited for
            raise OSError
        lines = [line.split() for line in Path(path).read_text(encoding="utf-8").splitlines()]
        return {PurePosixPath(name).stem: identity for name, identity in filter(None, lines)}
    except (OSError, ValueError):
        raise InputError(f"{path}: cannot be read as lines of `0.jpg 1234` (a file name and the "
                         "number of an identity)") from None


def shuffled(photographs, identities, seed):
    """{name: path} -> [(name, path, identity)], shuffled; the pictures of one identity adjoin.

    `identities` None: each photograph is its own; otherwise those without one are left out. Sorted
    by a hash of seed and identity: the order does not depend on what else is there, nor on how the
    data set was packed.
    """
    if identities is None:
        people = {name: name for name in photographs}
    else:
        people = {name: identities.get(PurePosixPath(member.replace("\\", "/")).stem)
                  for name, member in photographs.items()}

    known = filter(people.get, people)
    return [(name, photographs[name], people[name])
            for name in sorted(known, key=lambda name: (text_hash(f"{seed} {people[name]}"), name))]


# ---------------------------------------------------------------------------------------------
# Making the two folders


@lru_cache(1)  # opened once, for all threads
def open_zip(source):
    return zipfile.ZipFile(source)


def read_member(source, member):
    """One member of a zip -> a file in memory. Raises InputError if it is damaged or too large."""
    info = open_zip(source).getinfo(member)
    if info.file_size > MAX_MEMBER:
        raise InputError(f"unpacks to {info.file_size / 2 ** 20:.0f} MiB")
    # Of the others zipfile unpacks without a bound, whatever size the member declares
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InputError("is packed in an uncommon way; unpack the zip and give the folder")
    try:
        with open_zip(source).open(info) as file:
            return io.BytesIO(file.read(info.file_size))
    except Exception as error:  # damaged or encrypted: zipfile and zlib raise many kinds
        raise InputError(str(error)) from None


def make_frame(source, member, out, known):
    """One photograph -> (hash of its 256 px frame's pixels, PNG as bytes, None).

    The bytes are None if `out` already holds the pixels of hash `known`. (None, None, the reason)
    if the photograph cannot be used. Raises InputError if `out` holds another picture.
    """
    try:
        there = pixel_hash(read_image(out))
    except InputError:  # missing or damaged: make it again
        there = None
    if there and there == known:
        return known, None, None
    if there:
        raise InputError(f"{out} is not the picture of manifest.csv any more and stays as it is; "
                         "move it, and the same command makes that one again")
    file = source / member
    try:
        file = file if source.is_dir() else read_member(source, member)
        image = read_image(file)
        if min(image.size) < FRAME:
            raise InputError(f"{image.width}x{image.height} px is smaller than {FRAME} px")
    except InputError as error:
        return None, None, str(error).removeprefix(f"{file}: ")
    frame, png = to_frame(image), io.BytesIO()
    frame.save(png, "PNG")
    return pixel_hash(frame), png.getvalue(), None


def fill(pool, args, split, n, queue, manifest, seen, bar):
    """Take photographs from the front of `queue` until `split` has `n`.

    -> (manifest, the entries of `queue` that were taken, how far down the queue it went). What
    cannot be used, or has the pixels of one in `seen` ({hash: path}, extended here), is named and
    the next one takes its place. Raises InputError at the first picture that differs from an
    earlier run's manifest, before it is written.
    """
    before = [row for row in manifest if row[3] == split]
    others = [row for row in manifest if row[3] != split]
    known = {row[0]: row[2] for row in before}
    rows, taken, end = [], [], 0
    while len(rows) < n and end < len(queue):
        chunk = queue[end:end + min(CHUNK, n - len(rows))]
        end += len(chunk)
        files = [f"{FOLDERS[split]}/{name}.png" for name, _, _ in chunk]
        made = pool.map(make_frame, repeat(args.source), [member for _, member, _ in chunk],
                        [args.out_dir / file for file in files], map(known.get, files))
        pictures = {}
        for entry, file, (digest, png, problem) in zip(chunk, files, made):
            source = f"{args.source.resolve().name}/{entry[1]}"
            if digest in seen:
                problem = f"has the same pixels as {seen[digest]}"
            if problem:
                tqdm.write(f"skipped: {source}: {problem}")
                continue
            row = [file, source, digest, split]
            if len(rows) < len(before) and row != before[len(rows)]:
                raise InputError(other_selection(args, f"{before[len(rows)][1]}, not {source}"))
            seen[digest] = source
            rows.append(row)
            taken.append(entry)
            bar.update()
            if png:
                pictures[file] = png
        manifest = others + rows + before[len(rows):]
        # The manifest goes first: no picture is ever there that it does not name
        with replacing(args.out_dir / "manifest.csv") as temporary, \
                open(temporary, "w", newline="", encoding="utf-8",
                     errors="surrogateescape") as file:
            csv.writer(file).writerows([COLUMNS, *manifest])
        for file, png in pictures.items():
            with replacing(args.out_dir / file) as temporary:
                temporary.write_bytes(png)
    return manifest, taken, end


def read_manifest(path):
    """Rows [file, source, hash, split] of an earlier run's manifest; [] if there is none."""
    if not path.exists():
        return []
    try:
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            header, *rows = csv.reader(file)
    except (OSError, ValueError, csv.Error):
        header, rows = None, []
    if header != COLUMNS or any(len(row) != len(COLUMNS) for row in rows):
        raise InputError(f"{path}: not a manifest of this script; choose another --out_dir")
    return rows


def other_selection(args, difference):
    return (f"{args.out_dir} holds another selection ({difference}): give the source and the flags "
            "that made it, or another --out_dir; nothing was deleted")


def check_no_mixing(args, manifest):
    """Raise InputError if the output folders hold what this selection would be mixed with."""
    named = {row[0] for row in manifest}
    strangers = [f"{folder}/{path.name}" for folder in FOLDERS.values()
                 for path in sorted((args.out_dir / folder).glob("*"))
                 if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
                 and f"{folder}/{path.name}" not in named]
    if strangers:
        raise InputError(other_selection(args, f"{len(strangers)} image(s) that its manifest.csv "
                                               f"does not name: {shorten(strangers)}"))
    n = Counter(row[3] for row in manifest)
    # The training set may grow; another validation set would change what it may hold
    if n["train"] > args.n_train or n["valid"] > args.n_valid or (
            n["train"] and n["valid"] < args.n_valid):
        raise InputError(other_selection(
            args, f"made with {n['train']} for training, {n['valid']} for validation"))


def too_few(args, count, what, fits=None):
    """InputError: `count` photographs are not enough; with flag values that would fit, if any."""
    if fits is None and count > 1:
        valid = max(1, count * args.n_valid // (args.n_train + args.n_valid))
        fits = f"--n_train {count - valid} --n_valid {valid}"
    return InputError(f"{args.source} has {count} {what}, but {args.n_train} + {args.n_valid} are "
                      "asked for" + (f"; {fits} would fit" if fits else ""))


def prepare(args):
    """Make the two folders and the manifest as the flags say; raises InputError."""
    if args.n_train < 1 or args.n_valid < 1:
        raise InputError("--n_train and --n_valid must be 1 or more")
    if args.source.resolve() in [args.out_dir.resolve(), *args.out_dir.resolve().parents]:
        raise InputError(f"{args.source} holds the output folder {args.out_dir}; give the folder "
                         "of the photographs alone, or an --out_dir elsewhere")
    photographs = find_photographs(args.source)
    identities = read_identities(args.identity_file) if args.identity_file else None
    queue = shuffled(photographs, identities, args.seed)
    if len(queue) < len(photographs):
        print(f"{len(photographs) - len(queue)} of {len(photographs)} photographs are left out: "
              f"{args.identity_file} does not name them")
    if len(queue) < args.n_train + args.n_valid:
        raise too_few(args, len(queue), "photographs")
    manifest = read_manifest(args.out_dir / "manifest.csv")
    check_no_mixing(args, manifest)
    for folder in ("", *FOLDERS.values()):  # of a run that was killed
        stems = {"manifest", *(Path(row[0]).stem[:50] for row in manifest)}
        remove_leftovers(args.out_dir / folder, "|".join(map(re.escape, stems)))

    # Ctrl-C, a cluster's SIGTERM and a terminal that closes end this process tidily
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:
            signal.signal(getattr(signal, name), signal.default_int_handler)
    # Threads, which no one can kill and which end with this process; Pillow lets them run at once
    pool = ThreadPoolExecutor(os.cpu_count())
    seen = {}
    try:
        with tqdm(total=args.n_train + args.n_valid, unit="img", disable=None) as bar:
            # Validation takes from the front, training from the back: spares are there for both
            manifest, valid, end = fill(pool, args, "valid", args.n_valid, queue, manifest, seen,
                                        bar)
            people = {person for _, _, person in valid}
            rest = [entry for entry in reversed(queue[end:]) if entry[2] not in people]
            manifest, train, _ = fill(pool, args, "train", args.n_train, rest, manifest, seen, bar)
    except KeyboardInterrupt:
        raise InputError("stopped; run the same command again to continue") from None
    finally:
        pool.shutdown(cancel_futures=True)
        open_zip.cache_clear()  # the next zip of that name may be another
    if len(train) < args.n_train:
        raise too_few(args, len(train) + len(valid), "photographs that can be used",
                      f"--n_train {len(train)} --n_valid {len(valid)}" if train else "")
    print(f"{len(train)} photographs in {args.out_dir / FOLDERS['train']}, {len(valid)} in "
          f"{args.out_dir / FOLDERS['valid']}, listed in {args.out_dir / 'manifest.csv'}")


# ---------------------------------------------------------------------------------------------
# Looking at what is there


def check_folder(folder, detector):
    """Print what is in a folder of images -> ({hash: path}, number of unreadable files)."""
    def look(path):
        """(size, pixel hash, number of faces, None), or the reason why it cannot be read."""
        try:
            image = read_image(path)
        except InputError as error:
            return None, None, None, str(error)
        frame = to_frame(image)
        # Below its smallest face MTCNN has no scale to search, and fails
        searchable = min(frame.size) >= detector.min_face_size
        boxes = detector.detect(frame)[0] if searchable else None
        return image.size, pixel_hash(frame), 0 if boxes is None else len(boxes), None

    paths = list_images(folder, "--check")
    looks = dict(zip(paths, parallel_map(look, paths, f"looking at {folder}")))
    errors = [error for _, _, _, error in looks.values() if error]
    good = {path: found for path, found in looks.items() if not found[3]}
    print(f"{folder}: {len(paths)} images, {len(errors)} unreadable")
    for error in errors:
        print(f"  unreadable: {error}")
    for size, count in Counter(size for size, _, _, _ in good.values()).most_common():
        print(f"  {size[0]} x {size[1]} px: {count}")
    faces = Counter(min(n, 2) for _, _, n, _ in good.values())
    print(f"  faces found: none in {faces[0]}, one in {faces[1]}, more in {faces[2]}")
    if faces[0]:
        print(f"  no face in {shorten([p.name for p, found in good.items() if not found[2]])}")
    return {digest: path for path, (_, digest, _, _) in good.items()}, len(errors)


def check(folder):
    """Report on a data folder with its two splits, or on one folder of images.

    Raises InputError, after the report, if files are unreadable or a photograph is in both splits.
    """
    from facenet_pytorch import MTCNN  # slow to import, and only needed here

    detector = MTCNN(keep_all=True, device="cpu")
    splits = [folder / name for name in FOLDERS.values() if (folder / name).is_dir()]
    hashes, unreadable = zip(*[check_folder(split, detector) for split in splits or [folder]])
    shared = []
    if len(hashes) == 2:
        shared = sorted(set(hashes[0]) & set(hashes[1]), key=hashes[0].get)
        print(f"in both splits: {len(shared)} photographs")
        for digest in shared:
            print(f"  {hashes[0][digest]} = {hashes[1][digest]}")
    if shared or sum(unreadable):
        raise InputError(f"{folder}: {sum(unreadable)} unreadable file(s), {len(shared)} "
                         "photograph(s) in both splits; see the list above")


def main(argv=None):
    parser = Parser(
        description=__doc__,
        epilog="example: python prepare_celeba_hq.py CelebAMask-HQ.zip --n_train 2000 "
               "--n_valid 100")
    add = parser.add_argument_group("photographs").add_argument
    add("source", nargs="?", type=Path, help="folder or zip of the photographs, 256 px or larger")
    add("--identity_file", help="CelebA-HQ-identity.txt, lines `0.jpg 1234`: no person in both "
                                "splits; photographs that it does not name are left out")
    add = parser.add_argument_group("split").add_argument
    add("--n_train", type=int, default=2000, help="training photographs")
    add("--n_valid", type=int, default=100, help="validation photographs")
    add("--seed", type=int, default=0, help="another seed, other photographs")
    add = parser.add_argument_group("output").add_argument
    add("--out_dir", type=Path, default=Path(TRAIN_DIR).parent,
        help=f"folder for {FOLDERS['train']}/, {FOLDERS['valid']}/ and manifest.csv")
    add = parser.add_argument_group("check").add_argument
    add("--check", type=Path, metavar="DIR",
        help="make nothing; report on DIR, a data folder or a folder of images: sizes, unreadable "
             "files, faces found by MTCNN (about 0.1 s per image), photographs in both splits")
    args = parser.parse_args(argv)
    if args.check and (args.source or args.identity_file):
        raise InputError("--check reports on DIR alone; leave out the photographs and "
                         "--identity_file")
    if args.check:
        check(args.check)
    elif args.source:
        prepare(args)
    else:
        raise InputError("give the folder or zip of the photographs, or --check DIR; see --help")


if __name__ == "__main__":
    run_script(main)
