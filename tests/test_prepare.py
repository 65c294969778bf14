"""prepare_celeba_hq.py on small folders and zips; the expected pixels come from Pillow alone."""

import csv
import hashlib
import os
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import prepare_celeba_hq
from support.cli import InputError, run_script
from support.portraits import synthetic_portraits

ROOT = Path(prepare_celeba_hq.__file__).parent


@pytest.fixture(scope="module")
def faces():
    return [Image.fromarray(face) for face in synthetic_portraits(12, 256, seed=3)]


def save(folder, pictures, names=None):
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures):
        picture.save(folder / (names[i] if names else f"{i}.jpg"), quality=95)
    return folder


def prepare(source, out, n_train, n_valid, *flags):
    prepare_celeba_hq.main([str(source), "--out_dir", str(out), "--n_train", str(n_train),
                            "--n_valid", str(n_valid), *flags])


def manifest(out):
    with open(out / "manifest.csv", newline="") as file:
        return list(csv.DictReader(file))


def files(out):
    """Everything in the output folder, and each file's bytes."""
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*")
            if path.is_file()}


def split_of(out):
    """{base name of the source: split}"""
    return {Path(row["source"]).name: row["split"] for row in manifest(out)}


def digest(path):
    pixels = np.asarray(Image.open(path)).tobytes()
    return hashlib.blake2b(pixels, digest_size=16).hexdigest()


def pack(path, folder, extra=()):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, file.relative_to(folder.parent))
        for name, content in extra:
            archive.writestr(name, content)
    return path


def test_a_folder_becomes_two_of_lossless_256_px_frames(tmp_path, faces):
    large = [face.resize((512, 640), Image.Resampling.LANCZOS) for face in faces[:3]]
    source = save(tmp_path / "in", large + faces[3:8])
    prepare(source, tmp_path / "data", 6, 2)
    rows = manifest(tmp_path / "data")
    assert list(rows[0]) == ["file", "source", "hash", "split"]
    assert Counter(row["split"] for row in rows) == {"train": 6, "valid": 2}
    assert len({row["source"] for row in rows}) == 8
    for row in rows:
        out = tmp_path / "data" / row["file"]
        assert out.parent.name == f"DIV2K_{row['split']}_HR" and out.suffix == ".png"
        assert row["hash"] == digest(out)
        original = Image.open(tmp_path / row["source"])
        if original.size == (512, 640):
            original = original.resize((256, 320), Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(Image.open(out)), np.asarray(original))
    expected = {row["file"] for row in rows} | {"manifest.csv"}
    assert set(files(tmp_path / "data")) == expected  # no temporary file is left


def test_a_phone_photograph_is_stored_upright(tmp_path, faces):
    source = save(tmp_path / "in", faces[:2])
    exif = Image.Exif()
    exif[274] = 6  # stored lying on its side
    wide = faces[0].resize((400, 256))
    wide.save(source / "0.jpg", exif=exif, icc_profile=b"not a profile")
    prepare(source, tmp_path / "data", 1, 1)
    out, = tmp_path.glob("data/*/0.png")
    upright = Image.open(source / "0.jpg").transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(upright))
    assert not Image.open(out).getexif()


def test_every_layout_gives_the_same_selection(tmp_path, faces):
    flat = save(tmp_path / "flat", faces[:6])
    nested = save(tmp_path / "CelebAMask-HQ" / "CelebA-HQ-img", faces[:6]).parent
    mask = Image.new("L", (512, 512))
    save(nested / "CelebAMask-HQ-mask-anno" / "0", [mask], ["00000_hair.png"])
    save(nested / "CelebA-HQ-img" / ".thumbnails", faces[:1])
    people = tmp_path / "people"
    save(people / "train" / "female", faces[:2], ["0.jpg", "1.JPG"])
    save(people / "train" / "male", faces[2:4], ["2.jpg", "3.jpg"])
    save(people / "val" / "male", faces[4:6], ["4.jpg", "5.jpg"])
    (people / "readme.txt").write_text("not an image")
    mac = [("__MACOSX/CelebAMask-HQ/._0.jpg", b"not an image")]
    sources = {"flat": flat, "nested": nested, "people": people,
               "zip": pack(tmp_path / "all.zip", nested, mac)}
    made = {}
    for name, source in sources.items():
        prepare(source, tmp_path / "out" / name, 3, 2)
        made[name] = {row["file"]: row["hash"] for row in manifest(tmp_path / "out" / name)}
    assert len(made["flat"]) == 5
    assert made["flat"] == made["nested"] == made["people"] == made["zip"]


def test_equal_names_in_two_folders_are_kept_apart(tmp_path, faces):
    save(tmp_path / "in" / "female", faces[:2])
    save(tmp_path / "in" / "male", faces[2:4])
    prepare(tmp_path / "in", tmp_path / "data", 3, 1)
    assert len(list(tmp_path.glob("data/*/*.png"))) == len(manifest(tmp_path / "data")) == 4


@pytest.mark.parametrize("member", ["../evil.jpg", "a/../../evil.txt", "/etc/evil.jpg",
                                    "..\\evil.jpg", "C:\\evil.jpg"])
def test_a_zip_member_that_leaves_the_folder_is_refused(tmp_path, faces, member):
    source = pack(tmp_path / "in.zip", save(tmp_path / "in", faces[:3]), [(member, b"x")])
    with pytest.raises(InputError, match="leads out") as error:
        prepare(source, tmp_path / "out" / "data", 1, 1)
    assert repr(member) in str(error.value)
    assert not (tmp_path / "out").exists()


def test_zip_bombs_and_damaged_members_are_passed_by(tmp_path, faces, monkeypatch, capsys):
    folder = save(tmp_path / "in", faces[:4])
    with zipfile.ZipFile(tmp_path / "in.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(4):
            archive.write(folder / f"{i}.jpg")
        archive.writestr("large.png", bytes(2 ** 20))
        archive.writestr("bz2.jpg", (folder / "0.jpg").read_bytes(), zipfile.ZIP_BZIP2)
        archive.writestr("flipped.jpg", (folder / "1.jpg").read_bytes(), zipfile.ZIP_STORED)
        place = archive.getinfo("flipped.jpg").header_offset
    content = bytearray((tmp_path / "in.zip").read_bytes())
    content[place + 500] ^= 255
    (tmp_path / "in.zip").write_bytes(content)
    monkeypatch.setattr(prepare_celeba_hq, "MAX_MEMBER", 2 ** 19)
    with pytest.raises(InputError, match="4 photographs that can be used"):
        prepare(tmp_path / "in.zip", tmp_path / "data", 6, 1)
    output = capsys.readouterr().out
    assert "large.png: unpacks to 1 MiB" in output
    assert "bz2.jpg: is packed in an uncommon way" in output
    assert "flipped.jpg: Bad CRC-32" in output
    with pytest.raises(InputError, match="neither a folder nor a zip"):
        prepare(folder / "0.jpg", tmp_path / "data", 1, 1)


def test_no_person_is_in_both_splits(tmp_path, faces):
    source = save(tmp_path / "in", faces)
    person = {f"{i}.jpg": str(i % 5) for i in range(11)}  # 11.jpg is not named
    lines = [f"{name} {number}" for name, number in person.items()]
    (tmp_path / "identity.txt").write_text("\n".join(lines) + "\n")
    flag = ["--identity_file", str(tmp_path / "identity.txt")]
    for seed in range(5):
        out = tmp_path / f"data{seed}"
        prepare(source, out, 6, 3, "--seed", str(seed), *flag)
        splits = split_of(out)
        assert Counter(splits.values()) == {"train": 6, "valid": 3}
        assert "11.jpg" not in splits
        people = {split: {person[n] for n, s in splits.items() if s == split}
                  for split in ("train", "valid")}
        assert not people["train"] & people["valid"]
    with pytest.raises(InputError, match=r"--n_train \d --n_valid 3 would fit") as error:
        prepare(source, tmp_path / "tight", 8, 3, *flag)  # 11 pictures, but people are whole
    fits = str(error.value).split("; ")[1].split()
    prepare(source, tmp_path / "tight", int(fits[1]), int(fits[3]), *flag)
    (tmp_path / "identity.txt").write_text("".join(f"{i}.jpg 1\n" for i in range(6)))
    with pytest.raises(InputError, match="has 2 photographs.* 3 \\+ 2 are asked for$"):
        prepare(source, tmp_path / "one", 3, 2, *flag)  # nothing would fit: all are one person
    (tmp_path / "identity.txt").write_text("0.jpg\n")
    with pytest.raises(InputError, match="identity.txt: cannot be read as lines"):
        prepare(source, tmp_path / "data", 1, 1, *flag)


def test_the_seed_alone_decides(tmp_path, faces):
    source = save(tmp_path / "in", faces)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare(source, tmp_path / name, 5, 3, "--seed", str(seed))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert split_of(tmp_path / "a") != split_of(tmp_path / "c")


def test_a_stopped_run_goes_on(tmp_path, faces, monkeypatch):
    monkeypatch.setattr(prepare_celeba_hq, "CHUNK", 2)
    source, out = save(tmp_path / "in", faces), tmp_path / "data"
    prepare(source, tmp_path / "whole", 6, 3)

    writes = []

    def killed(path, write=prepare_celeba_hq.replacing):
        writes.append(path)
        if len(writes) == 6:
            raise KeyboardInterrupt
        return write(path)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_celeba_hq, "replacing", killed)
        with pytest.raises(InputError, match="run the same command again"):
            prepare(source, out, 6, 3)
    assert 0 < len(list(out.glob("*/*.png"))) < 9
    stem = Path(manifest(out)[0]["file"]).stem
    (out / "DIV2K_valid_HR" / f".{stem}.123.tmp.png").write_bytes(b"half a pict")
    (out / ".manifest.123.tmp.csv").write_bytes(b"half a manif")
    users = out / "DIV2K_valid_HR" / ".notes.tmp.png"
    users.write_bytes(b"the user's")
    prepare(source, out, 6, 3)
    assert users.read_bytes() == b"the user's"
    users.unlink()
    assert files(out) == files(tmp_path / "whole")

    lost, torn, *kept = sorted(out.glob("*/*.png"))
    lost.unlink()
    torn.write_bytes(torn.read_bytes()[:1000])
    for path in kept:
        os.utime(path, (1, 1))
    prepare(source, out, 6, 3)
    assert files(out) == files(tmp_path / "whole")
    assert all(path.stat().st_mtime == 1 for path in kept)

    prepare(source, out, 8, 3)  # more training photographs: those already there stay
    assert all(path.stat().st_mtime == 1 for path in kept)
    assert len(list(out.glob("DIV2K_train_HR/*.png"))) == 8


def test_a_frame_that_was_edited_stays_as_it_is(tmp_path, faces):
    source, out = save(tmp_path / "in", faces[:5]), tmp_path / "data"
    prepare(source, out, 3, 2)
    edited = sorted(out.glob("*/*.png"))[2]
    Image.open(edited).rotate(180).save(edited)
    before = edited.read_bytes()
    with pytest.raises(InputError, match=f"{edited} is not the picture of manifest.csv any more"):
        prepare(source, out, 3, 2)
    assert edited.read_bytes() == before
    edited.unlink()
    prepare(source, out, 3, 2)


def test_no_process_is_left_behind(tmp_path, faces, monkeypatch):
    """Threads do the work: a process that is killed would be waited for, or outlive its parent."""
    processes = []

    def make_frame(*args, make=prepare_celeba_hq.make_frame):
        processes.append(os.getpid())
        return make(*args)

    monkeypatch.setattr(prepare_celeba_hq, "make_frame", make_frame)
    prepare(save(tmp_path / "in", faces[:5]), tmp_path / "data", 3, 2)
    assert processes == [os.getpid()] * 5


def test_names_of_any_bytes(tmp_path, faces, capsys):
    """An older disk's names are Latin-1; the manifest finds them again."""
    source = save(tmp_path / "in", faces[:5])
    name = os.fsdecode(b"caf\xe9.jpg")
    (source / "0.jpg").rename(source / name)
    (source / "broken\udce9.jpg").write_bytes(b"no picture")
    for _ in range(2):
        run_script(lambda: prepare(source, tmp_path / "data", 3, 2))
    assert "skipped: in/broken\\udce9.jpg: not a picture of a known format" in (
        capsys.readouterr().out)
    assert (tmp_path / "data" / "manifest.csv").read_bytes().count(b"caf\xe9.png") == 1
    assert len(list((tmp_path / "data").glob("*/caf*.png"))) == 1


def test_a_pipe_is_not_waited_for(tmp_path, faces):
    source = save(tmp_path / "in", faces[:3])
    os.mkfifo(source / "pipe.jpg")
    os.mkfifo(tmp_path / "identity.txt")
    with pytest.raises(InputError, match="pipe.jpg: neither a folder nor a zip"):
        prepare(source / "pipe.jpg", tmp_path / "data", 2, 1)
    prepare(source, tmp_path / "data", 2, 1)
    with pytest.raises(InputError, match="identity.txt"):
        prepare(source, tmp_path / "data", 2, 1, "--identity_file", str(tmp_path / "identity.txt"))


def test_too_few_images_says_what_would_fit(tmp_path, faces):
    source = save(tmp_path / "in", faces[:10])
    with pytest.raises(InputError, match="has 10 photographs") as error:
        prepare(source, tmp_path / "data", 2000, 100)
    assert "--n_train 9 --n_valid 1 would fit" in str(error.value)
    assert not (tmp_path / "data").exists()
    prepare(source, tmp_path / "data", 9, 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no JPEG, PNG"):
        prepare(tmp_path / "empty", tmp_path / "data", 1, 1)
    with pytest.raises(InputError, match="1 or more"):
        prepare(source, tmp_path / "data", 1, 0)


def test_what_cannot_be_used_is_named_and_replaced(tmp_path, faces, capsys):
    source, out = save(tmp_path / "in", faces), tmp_path / "data"
    prepare(source, tmp_path / "before", 6, 2)
    first = [row["source"] for row in manifest(tmp_path / "before")]
    broken = [Path(first[0]).name, Path(first[-1]).name]  # one of each split
    content = (source / broken[0]).read_bytes()
    (source / broken[0]).write_bytes(content[:len(content) // 2])
    faces[0].resize((255, 300)).save(source / broken[1])
    capsys.readouterr()
    prepare(source, out, 6, 2)
    output = capsys.readouterr().out
    assert f"skipped: in/{broken[0]}: image file is truncated" in output
    assert f"skipped: in/{broken[1]}: 255x300 px is smaller than 256 px" in output
    before, after = split_of(tmp_path / "before"), split_of(out)
    assert not set(broken) & set(after)
    assert Counter(after.values()) == {"train": 6, "valid": 2}
    assert all(after[name] == split for name, split in before.items() if name not in broken)
    prepare(source, out, 6, 2)
    assert split_of(out) == after
    with pytest.raises(InputError, match="has 10 photographs that can be used") as error:
        prepare(source, out, 10, 2)
    assert "--n_train 8 --n_valid 2 would fit" in str(error.value)
    prepare(source, out, 8, 2)


def test_duplicates_are_used_once(tmp_path, faces, capsys):
    source = tmp_path / "in"
    save(source, faces[:5], [f"{i}.png" for i in range(5)])
    save(source, faces[:5], [f"copy of {i}.bmp" for i in range(5)])
    prepare(source, tmp_path / "data", 3, 2)
    hashes = [digest(path) for path in tmp_path.glob("data/*/*.png")]
    assert len(hashes) == len(set(hashes)) == 5
    with pytest.raises(InputError, match="has 5 photographs that can be used"):
        prepare(source, tmp_path / "data", 4, 2, "--out_dir", str(tmp_path / "more"))
    assert "has the same pixels as in/" in capsys.readouterr().out


def test_nothing_is_mixed_with_another_selection(tmp_path, faces):
    source, out = save(tmp_path / "in", faces), tmp_path / "data"
    mine = save(out / "DIV2K_train_HR", faces[:1], ["mine.png"])
    with pytest.raises(InputError, match="DIV2K_train_HR/mine.png"):
        prepare(source, out, 4, 2)
    assert set(files(out)) == {"DIV2K_train_HR/mine.png"}
    (mine / "mine.png").unlink()
    prepare(source, out, 4, 2)
    before = files(out)
    other = save(tmp_path / "other" / "in", [face.rotate(180) for face in faces])
    for arguments in ((source, 4, 2, "--seed", "1"), (source, 3, 2), (source, 4, 1),
                      (source, 4, 3), (other, 4, 2)):
        picture = next(out.glob("DIV2K_valid_HR/*.png"))
        picture.unlink()  # so that there is something to do
        with pytest.raises(InputError, match="holds another selection"):
            prepare(arguments[0], out, *arguments[1:])
        picture.write_bytes(before[f"DIV2K_valid_HR/{picture.name}"])
        assert files(out) == before
    with pytest.raises(InputError, match="holds the output folder"):
        prepare(tmp_path, out, 4, 2)
    (out / "manifest.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="not a manifest of this script"):
        prepare(source, out, 4, 2)


def test_check_counts_what_is_there(tmp_path, faces, capsys):
    source = save(tmp_path / "in", faces[:5], [f"{i}.png" for i in range(5)])
    prepare(source, tmp_path / "data", 3, 2)
    capsys.readouterr()
    prepare_celeba_hq.main(["--check", str(tmp_path / "data")])
    output = capsys.readouterr().out
    assert "DIV2K_train_HR: 3 images, 0 unreadable" in output
    assert "DIV2K_valid_HR: 2 images, 0 unreadable" in output
    assert "in both splits: 0" in output

    train = tmp_path / "data" / "DIV2K_train_HR"
    Image.new("RGB", (300, 12)).save(train / "tiny.png")
    (train / "broken.png").write_bytes(b"no picture")
    shared = next(tmp_path.glob("data/DIV2K_valid_HR/*.png"))
    (train / "again.bmp").write_bytes(shared.read_bytes())
    with pytest.raises(InputError, match=r"1 unreadable file\(s\), 1 photograph"):
        prepare_celeba_hq.main(["--check", str(tmp_path / "data")])
    output = capsys.readouterr().out
    assert f"{shared} = {train / 'again.bmp'}" in output
    assert f"unreadable: {train / 'broken.png'}: not a picture" in output

    with pytest.raises(InputError, match=r"1 unreadable file\(s\), 0 photograph"):
        prepare_celeba_hq.main(["--check", str(train)])
    output = capsys.readouterr().out
    assert "256 x 256 px: 4" in output and "300 x 12 px: 1" in output
    line, = [line for line in output.splitlines() if "faces found" in line]
    counts = [int(part.split()[-1]) for part in line.split(",")]
    assert sum(counts) == 5 and counts[0] >= 1  # tiny.png has none
    assert "tiny.png" in output.split("no face in")[1]


def test_the_command_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        prepare_celeba_hq.main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for text in ("Karras et al. 2018", "Liu et al. 2015", "non-commercial", "(default: 2000)",
                 "(default: data)", "example: python prepare_celeba_hq.py CelebAMask-HQ.zip"):
        assert text in shown
    example = shown.split("example: python ")[1].split()
    failed = subprocess.run([sys.executable, ROOT / example[0], *example[1:]], cwd=tmp_path,
                            capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stdout == ""
    assert failed.stderr.startswith("error: CelebAMask-HQ.zip: ")
    assert failed.stderr.count("\n") == 1
    with pytest.raises(InputError, match="--check .* leave out .*--identity_file"):
        prepare_celeba_hq.main(["--check", str(tmp_path), "--identity_file", "none"])


def test_a_zip_with_a_damaged_directory_is_named(tmp_path, faces):
    """A name that is flagged as UTF-8 and is none: zipfile raises a UnicodeDecodeError."""
    path = pack(tmp_path / "in.zip", save(tmp_path / "in", faces[:1], ["caf\u00e9x.jpg"]))
    path.write_bytes(path.read_bytes().replace("\u00e9".encode(), b"\xe9e"))
    with pytest.raises(InputError, match="in.zip: neither a folder nor a zip that can be read"):
        prepare(path, tmp_path / "data", 1, 1)
