"""super_resolve.py on tiny pictures; what is expected comes from Pillow and from the Generator."""

import io
import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, features

import data_utils
import super_resolve
from model import Generator
from support import checkpoints, figures
from support.cli import InputError, run_script

BICUBIC = Image.Resampling.BICUBIC


def random_generator(factor, seed=0):
    torch.manual_seed(seed)
    generator = Generator(factor).eval()
    with torch.no_grad():
        generator.last.weight.mul_(5)  # else all that it draws is middle grey
    return generator


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """(checkpoint of a 4x generator, the generator)."""
    path = tmp_path_factory.mktemp("network") / "netG.pth"
    generator = random_generator(4)
    checkpoints.save_torch(generator.state_dict(), path)
    return path, generator


def picture(width, height, seed=0, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def save(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def by_hand(generator, image):
    """The generator on an RGB picture -> (H, W, 3) array in 0...255, not rounded."""
    lr = torch.tensor(np.asarray(image.convert("RGB"))).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        return generator(lr)[0].permute(1, 2, 0).numpy() * 255


def run(network, out, *argv):
    super_resolve.main([*map(str, argv), "--out_dir", str(out), "--checkpoint", str(network[0]),
                        "--device", "cpu"])


def close(image, expected, within=1.0):
    return np.abs(np.asarray(image, dtype=float) - expected).max() <= within


# ---------------------------------------------------------------------------------------------
# Pictures


@pytest.mark.parametrize("pixels", [1, 2 ** 15])
def test_output_is_the_generators(network, tmp_path, pixels, capsys, monkeypatch):
    monkeypatch.setattr(super_resolve, "PIXELS", pixels)  # 1: each picture by itself
    sizes = [(8, 8), (9, 5), (8, 8), (1, 1), (8, 8)]
    pictures = [picture(*size, seed) for seed, size in enumerate(sizes)]
    for i, image in enumerate(pictures):
        save(image, tmp_path / f"in/{i}.png")
    run(network, tmp_path / "out", tmp_path / "in")
    for i, image in enumerate(pictures):
        sr = Image.open(tmp_path / f"out/{i}_sr.png")
        assert sr.mode == "RGB" and sr.size == (4 * image.width, 4 * image.height)
        assert close(sr, by_hand(network[1], image))
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert len(lines) == 5
    assert all(f"{i}.png" in line and f"{i}_sr.png" in line for i, line in enumerate(lines))
    assert said.err.count("plausible, not evidence") == 1


def test_the_checkpoint_says_the_factor_and_the_shipped_one_is_the_default(tmp_path, monkeypatch):
    generator, path = random_generator(2), tmp_path / "netG.pth"
    checkpoints.save_torch(generator.state_dict(), path)
    monkeypatch.setattr(checkpoints, "shipped_generator", lambda: path)
    image = picture(6, 7)
    super_resolve.main([str(save(image, tmp_path / "a.png")), "--out_dir", str(tmp_path / "out")])
    assert close(Image.open(tmp_path / "out/a_sr.png"), by_hand(generator, image))


def test_a_large_picture_in_strips_is_the_whole(network, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(super_resolve, "PIXELS", 400)
    image = picture(20, 100)
    run(network, tmp_path / "out", save(image, tmp_path / "a.png"))
    assert close(Image.open(tmp_path / "out/a_sr.png"), by_hand(network[1], image))
    assert "large for a face picture" in capsys.readouterr().out


@pytest.mark.parametrize("factor", [2, 16])
def test_reach_covers_all_that_a_pixel_depends_on(factor):
    lr = torch.rand(1, 3, 60, 3, requires_grad=True)
    sr = random_generator(factor)(lr)
    middle = 30 * factor
    sr[:, :, middle:middle + factor].sum().backward()  # what LR row 30 becomes
    rows = lr.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert abs(rows - 30).max() <= super_resolve.RECEPTIVE_FIELD


@pytest.mark.parametrize("mode", ["1", "L", "I;16", "LA"])
def test_grey_stays_grey(network, tmp_path, mode):
    grey = picture(8, 6, channels=1)
    given = grey.convert("1" if mode == "1" else "L")
    if mode == "I;16":
        given = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    elif mode == "LA":
        given.putalpha(picture(8, 6, seed=1, channels=1))
    options = {"transparency": 0} if mode == "I;16" else {}  # Pillow can't convert such a file
    run(network, tmp_path / "out", save(given, tmp_path / "a.png", **options))
    sr = Image.open(tmp_path / "out/a_sr.png")
    assert sr.mode == ("LA" if mode == "LA" else "L")
    expected = by_hand(network[1], grey.convert(mode) if mode == "1" else grey)
    expected = expected @ [0.299, 0.587, 0.114]  # ITU-R BT.601
    assert close(sr.getchannel("L"), expected, within=1.5)


def test_alpha_is_kept(network, tmp_path):
    image, alpha = picture(8, 6), picture(8, 6, seed=1, channels=1)
    given = image.copy()
    given.putalpha(alpha)
    run(network, tmp_path / "out", save(given, tmp_path / "a.png"))
    sr = Image.open(tmp_path / "out/a_sr.png")
    assert sr.mode == "RGBA"
    assert close(sr.getchannel("A"), np.asarray(alpha.resize((32, 24), BICUBIC)), within=0)
    assert close(sr.convert("RGB"), by_hand(network[1], image))


def test_a_transparent_palette_colour(network, tmp_path):
    given = picture(8, 6).quantize(4)
    rgba = given.copy()
    rgba.info["transparency"] = 2
    rgba = rgba.convert("RGBA")
    run(network, tmp_path / "out", save(given, tmp_path / "a.png", transparency=2))
    sr = Image.open(tmp_path / "out/a_sr.png")
    assert close(sr.getchannel("A"), np.asarray(rgba.getchannel("A").resize((32, 24), BICUBIC)))
    assert close(sr.convert("RGB"), by_hand(network[1], rgba.convert("RGB")))


def test_orientation_and_colour_profile(network, tmp_path):
    image, exif = picture(8, 6), Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees clockwise
    save(image, tmp_path / "a.png", exif=exif, icc_profile=b"a profile")
    run(network, tmp_path / "out", tmp_path / "a.png")
    sr = Image.open(tmp_path / "out/a_sr.png")
    assert close(sr, by_hand(network[1], image.transpose(Image.Transpose.ROTATE_270)))
    assert not sr.getexif() and sr.info["icc_profile"] == b"a profile"


def test_compare(network, tmp_path, monkeypatch):
    shown = []

    def grid(rows, headings):
        shown.append((rows, headings))
        return rows[0][0]

    monkeypatch.setattr(figures, "grid", grid)
    image = picture(6, 5)
    run(network, tmp_path / "out", save(image, tmp_path / "a.png"), "--compare")
    (((nearest, bicubic, sr),), headings), = shown
    assert close(nearest, np.asarray(image).repeat(4, 0).repeat(4, 1), within=0)
    assert close(bicubic, np.asarray(image.resize((24, 20), BICUBIC)), within=0)
    assert close(sr, by_hand(network[1], image))
    assert len(headings) == 3 and (tmp_path / "out/a_compare.png").exists()


def test_blend(network, tmp_path):
    generators, paths = [random_generator(2, seed) for seed in (0, 1)], []
    for name, generator in zip("ab", generators):
        paths.append(tmp_path / name / "netG.pth")
        checkpoints.save_torch(generator.state_dict(), paths[-1])
        paths[-1].with_name("config.json").write_text(
            json.dumps({"flags": {}, "start": "the same"}))
    states = [generator.state_dict() for generator in generators]
    blended = Generator(2).eval()
    blended.load_state_dict({k: (0.75 * v + 0.25 * states[1][k]).to(v.dtype)
                             for k, v in states[0].items()})
    image = picture(8, 8)
    run((paths[0],), tmp_path / "out", save(image, tmp_path / "a.png"), "--blend",
        f"{paths[1]}:0.25")
    assert close(Image.open(tmp_path / "out/a_sr.png"), by_hand(blended, image))


# ---------------------------------------------------------------------------------------------
# Files


def test_what_cannot_be_read_is_named_and_the_others_are_done(network, tmp_path, capsys):
    save(picture(5, 5), tmp_path / "in/good.png")
    (tmp_path / "in/bad.jpg").write_bytes(b"no picture")
    (tmp_path / "empty").mkdir()
    save(picture(129, 4), tmp_path / "huge.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    names = ["missing.png", "loop.png", "in", "empty", "huge.png", f"{'a' * 300}.png"]
    arguments = [tmp_path / name for name in names]
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: run(network, tmp_path / "out", *arguments))
    assert stop.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    for name in [name for name in names if name != "in"] + ["bad.jpg"]:
        assert sum(name in line for line in errors) == 1
    assert len(errors) == 7  # and how many there were
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["good_sr.png"]


def test_names_never_collide(network, tmp_path):
    names = ["x/a.png", "x/a.bmp", "y/a.png", "y/A.tif", "y/a_2.png", "y/a_sr.png", "y/a_sr_2.png"]
    pictures = {name: picture(4, 4, seed) for seed, name in enumerate(names)}
    for name, image in pictures.items():
        save(image, tmp_path / name)
    before = {name: (tmp_path / name).read_bytes() for name in names}
    inputs = [tmp_path / name for name in names]
    run(network, tmp_path / "out", *inputs, tmp_path / "x", "--compare")  # x/ a second time
    written = sorted((tmp_path / "out").iterdir())
    assert len(written) == 2 * len(names)
    assert len({path.name.lower() for path in written}) == len(written)
    results = [np.asarray(Image.open(path)) for path in written if path.stem.endswith("_sr")]
    for image in pictures.values():
        expected = by_hand(network[1], image)
        assert sum(close(result, expected) for result in results) == 1
    assert before == {name: (tmp_path / name).read_bytes() for name in names}


def test_an_earlier_result_is_replaced_and_nothing_else(network, tmp_path, capsys):
    names, out = ["a", "b", "c", "d", "e"], tmp_path / "out"
    inputs = [save(picture(4, 4, seed), tmp_path / f"{name}.png")
              for seed, name in enumerate(names)]
    run(network, out, *inputs, "--compare")
    results = {path.name: path.read_bytes() for path in out.iterdir()}
    Image.open(out / "a_sr.png").rotate(90).save(out / "b_sr.png")  # touched up by hand
    (out / "c_compare.png").write_bytes(b"the user's")
    (out / "d_sr.png").unlink()
    (out / "d_sr.png").symlink_to("a_sr.jpg")
    (out / "e_sr.png").write_bytes(results["e_sr.png"][:200])  # ours, and damaged
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.exists()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: run(network, out, *inputs, "--compare"))
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert stop.value.code == 2 and len(errors) == 4
    for name, line in zip(("b_sr.png", "c_compare.png", "d_sr.png"), errors):
        assert line.startswith(f"error: {out / name} was not written by this project and is not ")
    assert before | {"e_sr.png": results["e_sr.png"]} == {
        path.name: path.read_bytes() for path in out.iterdir() if path.exists()}
    assert (out / "d_sr.png").is_symlink()


def test_a_name_that_grows_too_long_is_named(network, tmp_path, capsys):
    long = save(picture(4, 4), tmp_path / f"{'a' * 250}.png")
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: run(network, tmp_path / "out", long,
                               save(picture(4, 4), tmp_path / "b.png")))
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert stop.value.code == 2 and len(errors) == 2
    assert "a_sr.png: File name too long; shorten the name" in errors[0]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b_sr.png"]


def test_names_of_any_bytes(network, tmp_path, monkeypatch, capsys):
    """An older disk's names are Latin-1."""
    names = [b"caf\xe9", b"r\xe9seau", "a\u2028b".encode()]
    for name in names:
        save(picture(4, 4), tmp_path / os.fsdecode(name + b".png"))
    listed = b"\0".join(bytes(tmp_path / os.fsdecode(name)) + b".png" for name in names[1:])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(listed), encoding="utf-8"))
    run_script(lambda: run(network, tmp_path / os.fsdecode(b"out\xe9"), "-",
                           tmp_path / "caf\udce9.png", "--compare"))
    assert "caf\\udce9_sr.png" in capsys.readouterr().out
    assert {path.name for path in os.scandir(os.fsencode(tmp_path) + b"/out\xe9")} == {
        name + end for name in names for end in (b"_sr.png", b"_compare.png")}


def test_a_gif_is_its_first_frame_and_says_so(network, tmp_path, capsys):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    save(frames[0], tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    save(frames[1], tmp_path / "still.gif")
    run(network, tmp_path / "out", tmp_path)  # also in a folder
    for name, frame in (("moving", frames[0]), ("still", frames[1])):
        assert close(Image.open(tmp_path / f"out/{name}_sr.png"), by_hand(network[1], frame))
    lines = capsys.readouterr().out.splitlines()
    assert ["first frame" in line for line in lines] == [True, False]


@pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
def test_avif(network, tmp_path):
    path = save(picture(4, 3).resize((32, 24), BICUBIC), tmp_path / "a.avif", quality=100)
    run(network, tmp_path / "out", path)
    expected = by_hand(network[1], Image.open(path))
    assert close(Image.open(tmp_path / "out/a_sr.png"), expected)


def test_heic(network, tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    image, path = picture(4, 3).resize((64, 48), BICUBIC), tmp_path / "in/a.heic"
    path.parent.mkdir()
    pillow_heif.from_pillow(image).save(path, quality=100, chroma=444)
    run(network, tmp_path / "out", path.parent)
    assert close(Image.open(tmp_path / "out/a_sr.png"), by_hand(network[1], image), within=25)


@pytest.mark.parametrize("suffix, wanted", [("heic", "pip install pillow-heif"),
                                            ("avif", "a Pillow of 11.3")])
def test_a_decoder_that_is_missing_is_named(network, tmp_path, monkeypatch, capsys, suffix, wanted):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr(features, "check", lambda feature: False)
    (tmp_path / f"a.{suffix}").write_bytes(b"no matter")
    with pytest.raises(InputError, match="not done"):
        run(network, tmp_path / "out", tmp_path / f"a.{suffix}", tmp_path / f"missing.{suffix}")
    first, second = [e for e in capsys.readouterr().err.splitlines() if e.startswith("error")]
    assert f"a.{suffix}" in first and wanted in first
    assert f"missing.{suffix}" in second and wanted not in second


def test_a_list_of_paths_on_standard_input(network, tmp_path, monkeypatch):
    paths = [save(picture(4, 4, i), tmp_path / f"{name}.png") for i, name in enumerate("abc")]
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{paths[1]}\n\n{paths[2]}\n"))
    run(network, tmp_path / "out", "-")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["b_sr.png", "c_sr.png"]
    with pytest.raises(InputError, match="standard input"):
        run(network, tmp_path / "out", "-")  # read to its end
    monkeypatch.setattr(sys, "stdin", None)  # closed by the shell
    with pytest.raises(InputError, match="standard input"):
        run(network, tmp_path / "out", "-")


def test_no_output_into_a_folder_of_inputs(network, tmp_path):
    path = save(picture(4, 4), tmp_path / "a_sr.png")
    (tmp_path / "link").symlink_to(tmp_path)
    for out in (tmp_path, tmp_path / "link"):
        with pytest.raises(InputError, match="--out_dir"):
            run(network, out, path)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["a_sr.png"]


# ---------------------------------------------------------------------------------------------
# Faces in a photograph


def landmarks(x, y, eyes, mouth, degrees=0.0):
    """The five points of a face between whose eyes lies (x, y): eye distance, eyes to mouth."""
    points = np.array([[-eyes / 2, 0], [eyes / 2, 0], [0, mouth / 2],
                       [-eyes / 3, mouth], [eyes / 3, mouth]])
    turn = np.exp(1j * np.deg2rad(degrees))
    turned = (points[:, 0] + 1j * points[:, 1]) * turn  # y points down: clockwise
    return np.stack([turned.real + x, turned.imag + y], axis=1)


@pytest.mark.parametrize("degrees", [0, 30, -90, 180])
def test_square_of_known_landmarks(degrees):
    # an average training frame of 256 px, turned about its centre: eyes 64 px apart at 0.47 of the
    # height, mouth 66 px below
    arm = (0.5 - 0.47) * 256 * 1j * np.exp(1j * np.deg2rad(degrees))
    turned = super_resolve.face_square(landmarks(128 - arm.real, 128 - arm.imag, 64, 66, degrees))
    assert turned[:3] == pytest.approx((128, 128, 256), abs=3)
    assert np.exp(1j * turned[3]) == pytest.approx(np.exp(1j * np.deg2rad(degrees)))


def test_a_head_in_profile_is_measured_from_eyes_to_mouth():
    assert super_resolve.face_square(landmarks(50, 50, 10, 60))[2] == pytest.approx(3.6 * 60)


def test_cut_and_paste_are_pillows_crop_and_each_others_inverse():
    photo = picture(12, 10).resize((120, 100), BICUBIC)
    square = (50.0, 45.0, 40.0, 0.0)
    face = photo.crop((30, 25, 70, 65))
    for size in (40, 16):
        expected = np.asarray(face.resize((size, size), BICUBIC))
        assert close(super_resolve.cut_face(photo, square, size), expected, within=0)
    turned = super_resolve.cut_face(photo, (50.0, 45.0, 40.0, np.pi / 2), 40)
    assert close(turned, np.asarray(face.transpose(Image.Transpose.ROTATE_90)))
    outside = super_resolve.cut_face(photo, (0.0, 45.0, 40.0, 0.0), 40)
    assert close(outside, np.asarray(photo)[25:65, np.arange(-20, 20).clip(0)], within=0)

    tilted = (50.3, 45.2, 41.7, 0.4)
    same = super_resolve.paste_face(photo, super_resolve.cut_face(photo, tilted, 128), tilted)
    assert close(same, np.asarray(photo, dtype=float), within=12)


@pytest.fixture
def detector(monkeypatch):
    """Put a list of (landmarks, probability) into its .faces: what --detect will find."""
    fake = SimpleNamespace(faces=[])

    def detect(photo, landmarks):
        if not fake.faces:
            return None, [None], None
        points, probabilities = zip(*fake.faces)
        return None, np.array(probabilities, dtype=object), np.array(points, dtype=object)

    fake.detect = detect
    monkeypatch.setitem(sys.modules, "facenet_pytorch",
                        SimpleNamespace(MTCNN=lambda **options: fake))
    return fake


def test_detect_writes_each_face_and_the_enlarged_photo(network, tmp_path, detector, capsys):
    """A face whose eyes are 12 px apart is put in, one of 40 px is not; the last is a fluke."""
    photo = picture(30, 40).resize((300, 400), BICUBIC)
    detector.faces = [(landmarks(150, 250, 40, 40), 1.0), (landmarks(110, 90, 12, 12), 0.99),
                      (landmarks(50, 350, 30, 30), 0.8)]
    run(network, tmp_path / "out", save(photo, tmp_path / "p.png"), "--detect", "--compare",
        "--upscale", "3")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "p_compare.png", "p_face1.png", "p_face2.png", "p_restored.png"]
    # eyes 12 px apart: a frame of 48 px around the point 1.2 px below the eyes; the network takes
    # it as it is, and the other one of 160 px reduced to 96 (384 px at 4x)
    square = super_resolve.face_square(landmarks(110, 90, 12, 12))
    assert square == pytest.approx((110, 91.2, 48, 0))
    face = Image.open(tmp_path / "out/p_face2.png")
    assert face.size == (192, 192)
    assert close(face, by_hand(network[1], super_resolve.cut_face(photo, square, 48)))
    assert Image.open(tmp_path / "out/p_face1.png").size == (384, 384)

    restored = np.asarray(Image.open(tmp_path / "out/p_restored.png"), dtype=int)
    lanczos = np.asarray(photo.resize((900, 1200), Image.Resampling.LANCZOS), dtype=int)
    assert restored.shape == lanczos.shape
    changed = np.abs(restored - lanczos).max(2)
    inside = np.zeros(changed.shape, bool)
    inside[201:347, 257:403] = True  # 3 * (91.2 -+ 24), 3 * (110 -+ 24), and a px for the turn
    assert not changed[~inside].any() and changed[inside].mean() > 1
    assert changed[202, 258:402].mean() < 0.1 * changed[inside].mean()  # the soft edge
    line, = capsys.readouterr().out.splitlines()
    assert "(300x400) -> " in line and "p_restored.png (900x1200)" in line
    assert "face 1: 80 px, left as it is" in line and "face 2: 24 px" in line


def test_a_photo_that_gains_nothing_is_not_written_unless_forced(network, tmp_path, detector,
                                                                 monkeypatch, capsys):
    photo = picture(200, 200)
    detector.faces = [(landmarks(100, 92, 40, 40), 1.0)]
    path = save(photo, tmp_path / "p.png")
    run(network, tmp_path / "out", path, "--detect")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["p_face1.png"]
    assert "--force" in capsys.readouterr().out
    run(network, tmp_path / "out", path, "--detect", "--force", "--upscale", "1")
    assert Image.open(tmp_path / "out/p_restored.png").size == (200, 200)
    monkeypatch.setattr(super_resolve, "MOST", 600 * 600)
    with pytest.raises(InputError, match="not done"):
        run(network, tmp_path / "out", path, "--detect", "--force", "--upscale", "4")
    assert "p.png: 800x800 px would be too large" in capsys.readouterr().err
    run(network, tmp_path / "out", path, "--detect", "--force")  # the most that is allowed
    assert Image.open(tmp_path / "out/p_restored.png").size == (600, 600)


def test_compare_shows_the_face_as_the_photo_has_it(network, tmp_path, detector, monkeypatch):
    shown = []
    monkeypatch.setattr(figures, "grid", lambda rows, headings: shown.append(rows) or rows[0][0])
    photo = picture(30, 30).resize((300, 300), BICUBIC)
    detector.faces = [(landmarks(150, 145, 50, 50), 1.0)]  # a frame of 200 px
    run(network, tmp_path / "out", save(photo, tmp_path / "p.png"), "--detect", "--compare")
    (((own, _, sr),),) = shown
    expected = photo.crop((50, 50, 250, 250)).resize(sr.size, Image.Resampling.NEAREST)
    assert close(own, np.asarray(expected))


def test_reduce(network, tmp_path, capsys):
    image = picture(300, 200)
    run(network, tmp_path / "out", save(image, tmp_path / "a.png"), "--reduce", "20")
    assert close(Image.open(tmp_path / "out/a_sr.png"),
                 by_hand(network[1], image.resize((30, 20), BICUBIC)))
    wide = save(picture(900, 60), tmp_path / "b.png")
    with pytest.raises(SystemExit):
        run_script(lambda: run(network, tmp_path / "out", wide, "--reduce", "20"))
    said = capsys.readouterr().err
    assert "b.png: 300x20 px is more than" in said and "--reduce" not in said
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--out_dir .*file: .* no folder that may be written to"):
        run(network, tmp_path / "file", tmp_path / "a.png")


def test_detect_keeps_grey_and_alpha(network, tmp_path, detector):
    photo, alpha = picture(200, 200, channels=1), picture(200, 200, seed=1, channels=1)
    given = photo.copy()
    given.putalpha(alpha)
    detector.faces = [(landmarks(100, 98.4, 16, 16), 1.0)]  # a frame of 64 px around (100, 100)
    run(network, tmp_path / "out", save(given, tmp_path / "p.png"), "--detect", "--upscale", "1")
    restored, face = (Image.open(tmp_path / f"out/p_{name}.png") for name in ("restored", "face1"))
    assert restored.mode == face.mode == "LA"
    assert close(restored.getchannel("A"), np.asarray(alpha), within=0)
    expected = alpha.crop((68, 68, 132, 132)).resize((256, 256), BICUBIC)
    assert close(face.getchannel("A"), np.asarray(expected))


def test_a_photo_without_a_face_is_named(network, tmp_path, capsys):
    """The real MTCNN, also on a picture that is smaller than the faces that it looks for."""
    blank = save(Image.new("RGB", (80, 60), (90, 120, 150)), tmp_path / "blank.png")
    tiny = save(picture(7, 40), tmp_path / "tiny.png")
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: run(network, tmp_path / "out", blank, tiny, "--detect"))
    assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert "blank.png: no face found" in errors and "tiny.png: no face found" in errors
    assert not (tmp_path / "out").exists()


def test_help_has_an_example_and_mistakes_end_in_one_line(network, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        super_resolve.main(["--help"])
    assert stop.value.code == 0 and "example: python super_resolve.py" in capsys.readouterr().out
    path = save(picture(4, 4), tmp_path / "a.png")
    with pytest.raises(InputError, match="no such checkpoint"):
        run((tmp_path / "none.pth",), tmp_path / "out", path)
    with pytest.raises(InputError, match="--upscale"):
        run(network, tmp_path / "out", path, "--detect", "--upscale", 0)
    for more in (["--upscale", 2], ["--force"], ["--detect", "--reduce", 32]):
        with pytest.raises(InputError, match="leave (it|them) out"):
            run(network, tmp_path / "out", path, *more)


def test_the_angle_is_that_of_eyes_and_mouth_together():
    """Eyes 20 degrees askew over a straight mouth, both as long: the mean of the two."""
    points = landmarks(50, 50, 60, 60)
    points[:2] = landmarks(50, 50, 60, 60, 20)[:2]
    assert np.rad2deg(super_resolve.face_square(points)[3]) == pytest.approx(10)


@pytest.mark.parametrize("square", [(150.2, 90.7, 40.3, 0.5), (4.0, 3.0, 40.0, -2.0),
                                    (298.0, 197.0, 31.0, 0.0)])
def test_a_pasted_face_changes_what_it_would_in_the_whole_photo(square):
    """Only the part around it is composed; also where it leaves the photo."""
    photo, face = picture(300, 200), picture(64, 64, seed=1)
    side = round(square[2])
    mask = Image.new("L", (side, side), 0)
    soft = side // 8
    mask.paste(255, (soft, soft, side - soft, side - soft))
    mask = mask.filter(ImageFilter.GaussianBlur(soft / 2))
    matrix = np.linalg.inv(super_resolve.placement(square, side))
    face_there, mask_there = (super_resolve.warp(image, matrix, photo.size)
                              for image in (face.resize((side, side), BICUBIC), mask))
    whole = Image.composite(face_there, photo, mask_there)
    result = super_resolve.paste_face(photo, face, square)
    assert result.size == photo.size and close(result, np.asarray(whole, float), within=1)
    assert photo == picture(300, 200)


def test_a_pasted_face_has_four_soft_edges():
    photo, face = Image.new("RGB", (100, 100)), Image.new("RGB", (64, 64), "white")
    result = np.asarray(super_resolve.paste_face(photo, face, (50.0, 50.0, 64.0, 0.0)), int)
    for line in (result[50, :, 0], result[:, 50, 0]):  # the square is from 18 to 82
        assert line[50] == 255 and line[18] < 10 and np.abs(np.diff(line)).max() < 40
        assert np.abs(line - line[::-1]).max() <= 2


def test_a_pasted_face_is_reduced_smoothly():
    """A fine pattern of black and white becomes grey, not what every fourth pixel happens to be."""
    checks = np.repeat(np.indices((128, 128)).sum(0)[..., None] % 2 * 255, 3, axis=2)
    result = super_resolve.paste_face(Image.new("RGB", (60, 60)),
                                      Image.fromarray(checks.astype(np.uint8)), (30., 30., 32., 0.))
    assert close(np.asarray(result)[25:35, 25:35], 127.5, within=5)


@pytest.mark.parametrize("side, factor, size", [(5, 8, 16), (30.4, 8, 30), (90, 8, 48), (5, 4, 32),
                                                (90, 2, 90)])
def test_a_frame_has_a_size_that_training_shows(side, factor, size):
    low, high = (round(data_utils.FRAME * scale / factor) for scale in data_utils.SCALES)
    assert super_resolve.frame_size(side, factor) == size == np.clip(round(side), low, high)


def test_a_tilted_face_goes_back_as_it_was():
    photo = picture(12, 10).resize((120, 100), BICUBIC)
    square = (60.0, 50.0, 50.0, 0.5)
    large = photo.resize((240, 200), Image.Resampling.LANCZOS)
    face = super_resolve.cut_face(large, (120.0, 100.0, 100.0, 0.5), 128)
    job = SimpleNamespace(rgb=photo, squares=[square], path="p.png")
    restored = super_resolve.restored_photo(job, [face], 2, False)
    assert close(restored, np.asarray(large, dtype=float), within=12)


def test_reduce_enlarges_nothing(network, tmp_path):
    image = picture(12, 10)
    run(network, tmp_path / "out", save(image, tmp_path / "a.png"), "--reduce", "20")
    assert close(Image.open(tmp_path / "out/a_sr.png"), by_hand(network[1], image))


def test_a_profile_of_inks_is_none_of_the_result(network, tmp_path, detector):
    path = save(picture(80, 60).convert("CMYK"), tmp_path / "a.tif", icc_profile=b"of inks")
    assert Image.open(path).info["icc_profile"] == b"of inks"
    detector.faces = [(landmarks(40, 30, 5, 5), 0.99)]
    run(network, tmp_path / "out", path)
    run(network, tmp_path / "out", path, "--detect")
    for name in ("sr", "face1", "restored"):
        assert "icc_profile" not in Image.open(tmp_path / f"out/a_{name}.png").info


def test_a_face_of_32_px_gains_and_one_of_35_does_not():
    job = SimpleNamespace(rgb=picture(100, 100), squares=[(50.0, 50.0, 64.0, 0.0)], path="p.png")
    assert super_resolve.restored_photo(job, [picture(256, 256)], 1, False)
    job.squares = [(50.0, 50.0, 70.0, 0.0)]
    assert super_resolve.restored_photo(job, [picture(256, 256)], 1, False) is None
