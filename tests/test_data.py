"""data_utils.py on tiny pictures; what is expected comes from numpy, Pillow and closed forms."""

import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import traceback
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import data_utils
from data_utils import (
    TrainDatasetFromFolder,
    ValidDatasetFromFolder,
    check_no_overlap,
    epoch_order,
    read_image,
    unusable,
)
from support.cli import InputError, run_script
from support.portraits import synthetic_portraits

ROOT = Path(data_utils.__file__).parent
BICUBIC = Image.Resampling.BICUBIC
LOSSLESS = {"png": {}, "bmp": {}, "tif": {}, "tiff": {"compression": "tiff_lzw"},
            "webp": {"lossless": True}}


def noise(width, height, seed=0, channels=3):
    """(H, W, channels) array of random bytes, (H, W) for one channel."""
    array = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return array[..., 0] if channels == 1 else array


def smooth(width, height):
    """A picture that lossy formats hardly change."""
    y, x = np.mgrid[:height, :width]
    return np.stack([60 + 3 * x, 40 + 4 * y, 220 - 3 * x], 2).clip(0, 255).astype(np.uint8)


def save(picture, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    image.save(path, **options)
    return path


def levels(tensor):
    """Tensor (3, H, W) in [0, 1] -> (H, W, 3) array of the 8-bit levels, which must be whole."""
    assert tensor.dtype == torch.float32 and 0 <= tensor.min() and tensor.max() <= 1
    values = tensor.permute(1, 2, 0).numpy() * 255
    assert np.abs(values - np.rint(values)).max() < 1e-4
    return np.rint(values).astype(int)


def resized(array, width, height):
    return np.asarray(Image.fromarray(array).resize((width, height), BICUBIC))


def square(array, size):
    """The central square, by slices."""
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top:top + size, left:left + size]


def whole(path):
    """What the validation set makes of the only photograph beside `path`: all of it, 8 bit."""
    dataset = ValidDatasetFromFolder(path.parent, 0, 4)
    assert dataset.files == [path]
    return levels(dataset[0][2])


def equal(a, b, within=0):
    a, b = np.asarray(a, float), np.asarray(b, float)
    return a.shape == b.shape and np.abs(a - b).max() <= within


def same(dataset, other):
    return all(torch.equal(a, b) for i in range(len(dataset)) for a, b in zip(dataset[i], other[i]))


# ---------------------------------------------------------------------------------------------
# Preprocessing


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_pairs_and_triples(tmp_path, factor):
    photo = noise(256, 256)
    save(photo, tmp_path / "a.png")
    hr = square(photo, 128)
    assert np.array_equal(hr, photo[64:192, 64:192])
    lr = resized(hr, 128 // factor, 128 // factor)

    pair = TrainDatasetFromFolder(tmp_path, 128, factor)[0]
    assert pair[0].shape == (3, 128 // factor, 128 // factor) and pair[1].shape == (3, 128, 128)
    assert equal(levels(pair[0]), lr, within=1) and equal(levels(pair[1]), hr)

    triple = ValidDatasetFromFolder(tmp_path, 128, factor)[0]
    assert len(triple) == 3
    for tensor, expected in zip(triple, (lr, resized(lr, 128, 128), hr)):
        assert equal(levels(tensor), expected)


def bicubic_weights(n_in, n_out):
    """(n_out, n_in): Keys' cubic with a = -0.5, widened by the factor when it reduces."""
    scale = n_in / n_out
    x = (np.arange(n_in) + 0.5 - (np.arange(n_out)[:, None] + 0.5) * scale) / max(scale, 1)
    x = np.abs(x)
    weights = np.where(x < 1, 1.5 * x ** 3 - 2.5 * x ** 2 + 1,
                       np.where(x < 2, -0.5 * x ** 3 + 2.5 * x ** 2 - 4 * x + 2, 0))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_bicubic_is_the_closed_form(tmp_path, factor):
    save(noise(64, 64), tmp_path / "a.png")
    lr, restored, hr = (levels(x) for x in ValidDatasetFromFolder(tmp_path, 64, factor)[0])
    n = 64 // factor
    for given, result, weights in ((hr, lr, bicubic_weights(64, n)),
                                   (lr, restored, bicubic_weights(n, 64))):
        columns = np.clip(np.einsum("ij,yjc->yic", weights, given), 0, 255)
        expected = np.clip(np.einsum("ij,jxc->ixc", weights, columns), 0, 255)
        assert equal(result, expected, within=1.1)  # Pillow rounds after each direction


@pytest.mark.parametrize("size, frame", [((1024, 1024), (256, 256)), ((512, 300), (437, 256)),
                                         ((300, 512), (256, 437)), ((257, 256), (257, 256))])
def test_large_pictures_are_reduced_first(tmp_path, size, frame):
    photo = noise(*size)
    save(photo, tmp_path / "a.bmp")
    hr = square(resized(photo, *frame), 128)
    pair = TrainDatasetFromFolder(tmp_path, 128, 8)[0]
    assert equal(levels(pair[1]), hr)
    assert equal(levels(pair[0]), resized(hr, 16, 16), within=1)


def test_small_pictures_are_kept(tmp_path):
    photo = noise(201, 131)
    save(photo, tmp_path / "a.png")
    assert equal(levels(TrainDatasetFromFolder(tmp_path, 128, 8)[0][1]), photo[1:129, 36:164])


@pytest.mark.parametrize("crop, factor, floor", [(130, 8, 128), (100, 8, 96), (50, 4, 48),
                                                 (33, 2, 32)])
def test_crop_is_floored(tmp_path, crop, factor, floor):
    photo = noise(128, 128)
    save(photo, tmp_path / "a.png")
    for dataset in (TrainDatasetFromFolder(tmp_path, crop, factor),
                    TrainDatasetFromFolder(tmp_path, crop, factor, "random"),
                    ValidDatasetFromFolder(tmp_path, crop, factor)):
        assert dataset.crop_size == floor
        lr, hr = dataset[0][0], dataset[0][-1]
        assert lr.shape == (3, floor // factor, floor // factor) and hr.shape == (3, floor, floor)
    assert equal(levels(hr), square(photo, floor))


def test_a_crop_below_the_factor_is_refused(tmp_path):
    save(noise(32, 32), tmp_path / "a.png")
    with pytest.raises(InputError, match="--crop_size 4 is smaller .*upscale.factor"):
        TrainDatasetFromFolder(tmp_path, 4, 8)


def test_whole_frames(tmp_path):
    photo = noise(43, 30)
    save(photo, tmp_path / "a.png")
    lr, restored, hr = ValidDatasetFromFolder(tmp_path, 0, 8)[0]
    assert equal(levels(hr), photo[:24, :40])
    assert equal(levels(lr), resized(photo[:24, :40], 5, 3))
    assert restored.shape == hr.shape


def test_other_framings_of_the_same_photographs(tmp_path):
    photo = noise(43, 31)
    save(photo, tmp_path / "a.png")
    dataset = ValidDatasetFromFolder(tmp_path, 16, 8)
    shifted = levels(dataset.framed(16, shift=3)[0][2])
    assert equal(shifted, photo[10:26, 16:32])  # the centre crop begins at 7 and 13
    smaller = levels(dataset.framed(0, scale=0.6)[0][2])
    assert equal(smaller, resized(photo, 26, 19)[:16, :24])
    assert equal(levels(dataset.framed(0)[0][2]), photo[:24, :40])
    assert equal(levels(dataset[0][2]), photo[7:23, 13:29])  # unchanged by the others


@pytest.mark.parametrize("flips", [False, True])
def test_random_crops(tmp_path, flips):
    y, x = np.mgrid[:18, :20]
    photo = np.stack([x, y, noise(20, 18, channels=1)], 2).astype(np.uint8)  # knows its places
    for name in "abc":
        save(photo, tmp_path / f"{name}.png")

    def corners(seed, epochs):
        dataset = TrainDatasetFromFolder(tmp_path, 16, 4, "random", seed, flips=flips)
        found = {}
        for epoch in epochs:
            dataset.set_epoch(epoch)
            for index in (2, 0, 1) if epoch % 2 else (0, 1, 2):  # the order does not matter
                lr, hr = map(levels, dataset[index])
                mirrored = bool(hr[0, 0, 0] > hr[0, 1, 0])
                left, top = hr[0, -1 if mirrored else 0, :2]
                expected = photo[top:top + 16, left:left + 16]
                assert equal(hr, expected[:, ::-1] if mirrored else expected)
                assert equal(lr, resized(hr.astype(np.uint8), 4, 4), within=1)
                found[epoch, index] = left, top, mirrored
        return found

    first = corners(0, range(40))
    assert corners(0, reversed(range(40))) == first
    assert {key: first[key] for key in corners(0, [7])} == corners(0, [7])
    assert corners(1, range(40)) != first
    for index in range(3):
        assert len({first[epoch, index] for epoch in range(40)}) > 5  # another one each epoch
    assert any(len({first[epoch, index] for index in range(3)}) > 1 for epoch in range(40))
    places = {place[:2] for place in first.values()}
    assert places == {(x, y) for x in range(5) for y in range(3)}  # edges too
    assert 40 < sum(mirrored for _, _, mirrored in first.values()) < 80 or not flips
    assert flips or not any(mirrored for _, _, mirrored in first.values())


def test_mixed_crops(tmp_path):
    """Shares as in MIX; a ramp of 2 levels a pixel is as much flatter as the crop is enlarged."""
    y, x = np.mgrid[:64, :64]
    save(np.stack([2 * x, 2 * y, 0 * x], 2).astype(np.uint8), tmp_path / "0.png")
    for i in range(1, 400):
        os.link(tmp_path / "0.png", tmp_path / f"{i}.png")
    dataset = TrainDatasetFromFolder(tmp_path, 32, 8, "mixed", flips=False)
    uncached = TrainDatasetFromFolder(tmp_path, 32, 8, "mixed", cache_gb=0, flips=False)
    dataset.set_epoch(3), uncached.set_epoch(3)
    steps = []
    for index in range(400):
        if index % 40 == 0:
            assert equal(uncached.crop(index), dataset.crop(index))
        if dataset.recoloured[index]:
            continue
        _, hr = dataset[index]
        hr = levels(hr).astype(float)
        across, down = (hr[4:-4, 4:-4, channel] for channel in (0, 1))
        step = (across[0, -1] - across[0, 0]) / 23 / 2
        assert step == pytest.approx((down[-1, 0] - down[0, 0]) / 23 / 2, abs=0.05)
        steps.append(1 / step)
        assert dataset.centered[index] == (equal(hr[0, 0, :2], [32, 32])
                                          and dataset.scales[index] == 1 and bool(step == 1))
        assert (dataset.cache_keys([index]) == [(index, False)]) == dataset.centered[index]
    steps = np.array(steps)
    assert np.sum(steps != 1) / 400 == pytest.approx(data_utils.MIX["rescaled"], abs=0.06)
    assert np.mean(dataset.centered) == pytest.approx(data_utils.MIX["center"], abs=0.05)
    assert np.mean(dataset.recoloured) == pytest.approx(data_utils.MIX["recoloured"], abs=0.05)
    low, high = data_utils.SCALES
    assert low - 0.02 <= steps.min() < low + 0.1 and high - 0.1 < steps.max() <= high + 0.05


def test_recoloured_crops(tmp_path):
    """A white line on black shows each channel's two levels; all four corners of RGB are met."""
    photo = np.zeros((16, 16, 3), np.uint8)
    photo[:, 8] = 255
    for i in range(300):
        save(photo, tmp_path / f"{i}.png")
    dataset = TrainDatasetFromFolder(tmp_path, 16, 8, "mixed")
    seen = [dataset.crop(i).numpy() for i in np.flatnonzero(dataset.recoloured)]
    assert len(seen) > 15
    for crop in seen:
        black, white = crop[0, 0].astype(int), crop[0, 8].astype(int)
        assert (white - black >= 0.2 * 255 - 1).all() and (crop[:, 7] == black).all()
        assert (crop[:, 8] == white).all()
    levels_of_black = np.array([crop[0, 0] for crop in seen])
    assert levels_of_black.max() > 120 and levels_of_black.min() < 10
    assert np.abs(np.corrcoef(levels_of_black.T)[0, 1]) < 0.5  # each channel by itself
    contrasts = np.array([crop[0, 8] for crop in seen]).astype(int) - levels_of_black
    assert np.abs(np.corrcoef(contrasts.T)[0, 1]) < 0.5  # the contrast of each channel, too
    assert equal(levels_of_black, np.rint(dataset.offsets[dataset.recoloured]))


def test_a_centre_crop_in_training_is_validations(tmp_path):
    """Where no place is in the very middle, too; targets of it are kept from epoch to epoch."""
    save(noise(64, 63), tmp_path / "0.png")
    for i in range(1, 40):
        os.link(tmp_path / "0.png", tmp_path / f"{i}.png")
    train = TrainDatasetFromFolder(tmp_path, 32, 8, "mixed")
    expected = levels(ValidDatasetFromFolder(tmp_path, 32, 8)[0][2])
    train.set_epoch(1)
    assert 0 < train.centered.sum() < 20
    for index in np.flatnonzero(train.centered):
        assert equal(train.crop(index), expected)
    uncached = TrainDatasetFromFolder(tmp_path, 32, 8, "mixed", cache_gb=0)
    uncached.set_epoch(1)
    assert set(uncached.cache_keys(range(40))) == {None}


def test_mirrored_crops_are_the_others_in_a_mirror(tmp_path):
    for i in range(30):
        save(noise(48, 40, seed=i), tmp_path / f"{i:02}.png")
    plain, *mirrored = (TrainDatasetFromFolder(tmp_path, 32, 8, "mixed", cache_gb=cache_gb,
                                               flips=flips)
                        for flips, cache_gb in ((False, 4.0), (True, 4.0), (True, 0)))
    plain.set_epoch(5)
    for dataset in mirrored:
        dataset.set_epoch(5)
        assert (dataset.flipped & (dataset.scales != 1)).any() and not dataset.flipped.all()
        for index in np.flatnonzero(~dataset.flipped | (dataset.scales != 1)):
            crop = plain.crop(index)
            assert equal(dataset.crop(index), crop.flip(1) if dataset.flipped[index] else crop)


@pytest.mark.parametrize("world", [1, 2])
def test_an_epoch_shows_every_photograph_once(world):
    """In an order of its own, which seed and epoch tell; over both ranks together."""
    orders = {}
    for seed, epoch in ((0, 1), (0, 2), (7, 1)):
        ranks = [epoch_order(40, 8, seed, epoch, rank, world) for rank in range(world)]
        assert all([len(batch) for batch in rank] == [8 // world] * 5 for rank in ranks)
        orders[seed, epoch] = [i for rank in ranks for batch in rank for i in batch]
        assert sorted(orders[seed, epoch]) == [*range(40)] != orders[seed, epoch]
        assert ranks == [epoch_order(40, 8, seed, epoch, rank, world) for rank in range(world)]
    assert len({tuple(order) for order in orders.values()}) == 3
    assert [len(batch) for batch in epoch_order(10, 8, 0, 1, 0, 1)] == [8, 2]


def test_no_seeds_order_is_anothers_in_another_epoch():
    orders = {str(epoch_order(50, 50, seed, epoch, 0, 1)) for seed in range(5)
              for epoch in range(5)}
    assert len(orders) == 25


def test_batches_are_the_pairs(tmp_path):
    for i in range(5):
        save(noise(40, 48, seed=i), tmp_path / f"{i}.png")
    for cache_gb in (4.0, 0):
        dataset = TrainDatasetFromFolder(tmp_path, 32, 8, "mixed", cache_gb=cache_gb)
        dataset.set_epoch(2)
        batches = list(dataset.batches([[3, 0, 1], [4, 2]], torch.device("cpu")))
        for indices, (lr, hr) in zip([[3, 0, 1], [4, 2]], batches):
            assert lr.is_contiguous(memory_format=torch.channels_last)
            assert hr.is_contiguous(memory_format=torch.channels_last)
            for index, *pair in zip(indices, lr, hr):
                assert all(torch.equal(a, b) for a, b in zip(pair, dataset[index]))


def test_cached_and_uncached_agree(tmp_path):
    for i, size in enumerate([(40, 40), (300, 280), (33, 50)]):
        save(noise(*size, seed=i), tmp_path / f"{i}.png")
    for make in (lambda gb: TrainDatasetFromFolder(tmp_path, 32, 8, cache_gb=gb),
                 lambda gb: TrainDatasetFromFolder(tmp_path, 32, 8, "random", 3, gb, flips=True),
                 lambda gb: ValidDatasetFromFolder(tmp_path, 32, 8, cache_gb=gb),
                 lambda gb: ValidDatasetFromFolder(tmp_path, 0, 8, cache_gb=gb)):
        cached, uncached = make(4.0), make(0)
        assert cached.cached and not uncached.cached and len(cached) == len(uncached) == 3
        assert cached.hashes == uncached.hashes and cached.digest() == uncached.digest()
        assert same(cached, uncached)
        assert same(uncached, list(DataLoader(uncached, batch_size=None, num_workers=1)))


def test_cache_limit(tmp_path):
    for name in "ab":
        save(noise(40, 40), tmp_path / f"{name}.png")
    need = 2 * 3 * 32 ** 2 / 2 ** 30  # two crops of 32 px, 8-bit RGB
    assert TrainDatasetFromFolder(tmp_path, 32, 8, cache_gb=need).cached
    assert not TrainDatasetFromFolder(tmp_path, 32, 8, cache_gb=need * 0.999).cached
    # mirrored pictures lie beside the others
    assert TrainDatasetFromFolder(tmp_path, 32, 8, cache_gb=2 * need, flips=True).cached
    assert not TrainDatasetFromFolder(tmp_path, 32, 8, cache_gb=1.999 * need, flips=True).cached


# ---------------------------------------------------------------------------------------------
# What photographers have


@pytest.mark.parametrize("suffix", [*LOSSLESS, "PNG", "TIF", "Bmp", "WebP"])
def test_lossless_formats(tmp_path, suffix):
    photo = noise(32, 24)
    path = save(photo, tmp_path / f"a.{suffix}", **LOSSLESS[suffix.lower()])
    assert equal(whole(path), photo)


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "jpe", "jfif", "JPG", "JPEG", "webp", "WEBP"])
def test_lossy_formats(tmp_path, suffix):
    photo = smooth(32, 24)
    path = save(photo, tmp_path / f"a.{suffix}", quality=95)
    assert equal(whole(path), photo, within=8)
    assert equal(whole(path), Image.open(path).convert("RGB"))


@pytest.mark.parametrize("content, suffix", [("PNG", "jpg"), ("BMP", "png"), ("TIFF", "webp"),
                                             ("PNG", "tif")])
def test_wrong_suffix(tmp_path, content, suffix):
    photo = noise(32, 24)
    assert equal(whole(save(photo, tmp_path / f"a.{suffix}", format=content)), photo)


@pytest.mark.parametrize("suffix", LOSSLESS)
def test_grey(tmp_path, suffix):
    photo = noise(32, 24, channels=1)
    path = save(photo, tmp_path / f"a.{suffix}", **LOSSLESS[suffix])
    assert equal(whole(path), np.dstack([photo] * 3))


def test_black_and_white(tmp_path):
    photo = noise(32, 24, channels=1) > 127
    assert equal(whole(save(Image.fromarray(photo), tmp_path / "a.png")),
                 np.dstack([photo] * 3) * 255)


def on_white(colour, alpha):
    alpha = alpha[..., None] / 255
    return colour * alpha + 255 * (1 - alpha)


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_transparency_is_laid_on_white(tmp_path, suffix):
    rgba = noise(32, 24, channels=4)
    rgba[:4, :, 3], rgba[4:8, :, 3] = 0, 255
    path = save(rgba, tmp_path / f"a.{suffix}", **LOSSLESS[suffix],
                **({"exact": True} if suffix == "webp" else {}))
    result = whole(path)
    assert equal(result, on_white(rgba[..., :3], rgba[..., 3]), within=1)
    assert (result[:4] == 255).all() and equal(result[4:8], rgba[4:8, :, :3])


def test_grey_with_alpha(tmp_path):
    la = noise(32, 24, channels=2)
    path = save(Image.merge("LA", [Image.fromarray(la[..., i]) for i in (0, 1)]),
                tmp_path / "a.png")
    assert Image.open(path).mode == "LA"
    assert equal(whole(path), on_white(np.dstack([la[..., 0]] * 3), la[..., 1]), within=1)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
@pytest.mark.parametrize("transparency", [None, 3, bytes(range(0, 160, 10))])
def test_palette(tmp_path, suffix, transparency):
    colours, index = noise(16, 1)[0], noise(32, 24, channels=1) % 16
    image = Image.frombytes("P", (32, 24), index.tobytes())
    image.putpalette(colours.tobytes())
    options = {"transparency": transparency} if transparency is not None and suffix == "png" else {}
    path = save(image, tmp_path / f"a.{suffix}", **options)
    assert Image.open(path).mode == "P"
    alpha = np.full(16, 255)
    if options:
        alpha[:] = list(transparency) if isinstance(transparency, bytes) else np.arange(16) != 3
        alpha[:] *= 1 if isinstance(transparency, bytes) else 255
    assert equal(whole(path), on_white(colours, alpha)[index], within=1 if options else 0)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_transparent_colour(tmp_path, channels):
    photo = noise(32, 24, channels=channels) // 128 * 255  # few colours
    key = 0 if channels == 1 else (255, 0, 0)
    expected = photo.reshape(24, 32, -1) * np.ones(3)
    expected[(photo.reshape(24, 32, -1) == key).all(2)] = 255
    assert not equal(expected, photo.reshape(24, 32, -1) * np.ones(3))
    assert equal(whole(save(photo, tmp_path / "a.png", transparency=key)), expected)


@pytest.mark.parametrize("suffix, within", [("jpg", 6), ("tif", 0)])
def test_cmyk(tmp_path, suffix, within):
    inks = {(0, 0, 0, 0): (255, 255, 255), (255, 0, 0, 0): (0, 255, 255),
            (0, 255, 0, 0): (255, 0, 255), (0, 0, 255, 0): (255, 255, 0),
            (0, 0, 0, 255): (0, 0, 0), (255, 255, 0, 0): (0, 0, 255)}
    stripes = np.repeat(np.array([list(inks)], np.uint8), 16, axis=1).repeat(16, axis=0)
    image = Image.frombytes("CMYK", (96, 16), stripes.tobytes())
    path = save(image, tmp_path / f"a.{suffix}", **({"quality": 95} if suffix == "jpg" else {}))
    assert Image.open(path).mode == "CMYK"
    expected = np.repeat(np.array([list(inks.values())]), 16, axis=1).repeat(16, axis=0)
    assert equal(whole(path), expected, within=within)


def deep(width=32, height=24):
    """16-bit grey noise with black, white and the middle in its corner."""
    values = np.random.default_rng(0).integers(0, 65536, (height, width)).astype(np.uint16)
    values[0, :3] = 0, 65535, 32768
    return values


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey(tmp_path, suffix):
    result = whole(save(deep(), tmp_path / f"a.{suffix}"))
    assert result[0, :3, 0].tolist() == [0, 255, 128]
    assert equal(result, np.dstack([np.floor(deep() * (255 / 65535) + 0.5)] * 3))


def test_16_bit_grey_tiff_with_the_high_byte_first(tmp_path):
    fields = [(256, 4, 32), (257, 4, 24), (258, 3, 16 << 16), (259, 3, 1 << 16),
              (262, 3, 1 << 16), (273, 4, 8), (277, 3, 1 << 16), (278, 4, 24),
              (279, 4, 2 * 32 * 24)]
    pixels = deep().astype(">u2").tobytes()
    entries = b"".join(struct.pack(">HHII", tag, kind, 1, value) for tag, kind, value in fields)
    path = tmp_path / "a.tif"
    path.write_bytes(struct.pack(">2sHI", b"MM", 42, 8 + len(pixels)) + pixels
                     + struct.pack(">H", len(fields)) + entries + bytes(4))
    assert equal(whole(path)[..., 0], np.floor(deep() * (255 / 65535) + 0.5))


def test_16_bit_grey_with_a_transparent_grey(tmp_path):
    photo = deep()
    photo[5:9], photo[9:12] = 1000, 1001
    result = whole(save(photo, tmp_path / "a.png", transparency=1000))
    assert (result[5:9] == 255).all() and (result[9:12] == 4).all()  # 1001 / 257 = 3.9
    assert result[0, :3, 0].tolist() == [0, 255, 128]


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour, data):
    """The bytes of a PNG, without a library."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data))
            + chunk(b"IEND", b""))


@pytest.mark.parametrize("colour, channels", [(2, 3), (4, 2), (6, 4)])
def test_16_bit_colour_and_alpha(tmp_path, colour, channels):
    values = noise(32, 24, channels=channels).astype(">u2") * 257
    values[0, 0], values[0, 1, :-1], values[0, 1, -1] = 65535, 0, 65535
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    (tmp_path / "a.png").write_bytes(png(32, 24, 16, colour, rows))
    result = whole(tmp_path / "a.png")
    if channels == 3:
        assert equal(result, values / 257, within=1)
    else:
        expected = on_white(values[..., :-1] / 257 * np.ones(3), values[..., -1] / 257)
        assert equal(result, expected, within=1)


# By the EXIF standard: where row 0 and column 0 of the stored picture belong
UPRIGHT = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1],
           4: lambda a: a[::-1], 5: lambda a: a.transpose(1, 0, 2),
           6: lambda a: a[::-1].transpose(1, 0, 2),
           7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
           8: lambda a: a[:, ::-1].transpose(1, 0, 2)}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_exif_orientation(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = smooth(32, 20)
    options = {"quality": 95} if suffix == "jpg" else LOSSLESS[suffix]
    path = save(photo, tmp_path / f"a.{suffix}", exif=exif, **options)
    assert equal(whole(path), UPRIGHT[orientation](photo), within=8 if suffix == "jpg" else 0)


def test_orientation_comes_before_the_crop(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = noise(300, 512)
    save(photo, tmp_path / "a.png", exif=exif)
    upright = np.ascontiguousarray(np.rot90(photo, -1))
    assert equal(levels(TrainDatasetFromFolder(tmp_path, 128, 8)[0][1]),
                 square(resized(upright, 437, 256), 128))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_damaged_exif_data_are_passed_over(tmp_path, suffix):
    path = save(smooth(32, 20), tmp_path / f"a.{suffix}", exif=b"Exif\0\0MM\0\0\0\0\0\0damaged")
    assert equal(whole(path), Image.open(path).convert("RGB"))


def test_what_a_folder_holds(tmp_path):
    names = ["b.PNG", "a10.png", "a2.jpg", "Z.bmp", "a1.webp"]
    for name in names:
        save(noise(16, 16), tmp_path / name)
    save(noise(16, 16), tmp_path / "sub.png" / "c.png")  # a folder with an image's name
    save(noise(16, 16), tmp_path / "sub" / "d.png")
    save(noise(16, 16), tmp_path / ".hidden.png")
    save(noise(16, 16), tmp_path / "e.gif")
    (tmp_path / "notes.txt").write_text("not a photograph")
    (tmp_path / "a1.png.txt").write_text("not a photograph")
    (tmp_path / "png").write_text("not a photograph")
    for dataset in (TrainDatasetFromFolder(tmp_path, 16, 4),
                    ValidDatasetFromFolder(str(tmp_path), 16, 4)):
        assert [path.name for path in dataset.files] == sorted(names)
        assert len(dataset) == 5


# ---------------------------------------------------------------------------------------------
# What cannot be used


def encoded(picture, kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind, **options)
    return buffer.getvalue()


def declare(data, kind, width, height):
    """The file's bytes with another size in its header, as consistent as a liar makes it."""
    data = bytearray(data)
    if kind == "PNG":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif kind == "BMP":
        data[18:26] = struct.pack("<ii", width, height)
    elif kind == "JPEG":
        at = re.search(rb"\xff[\xc0\xc2]\x00\x11\x08", data).end()
        data[at:at + 4] = struct.pack(">HH", min(height, 65535), min(width, 65535))
    elif kind == "WEBP":  # 14 bits at most
        size = min(width, 16383), min(height, 16383)
        if b"VP8L" in data:
            at = data.index(b"VP8L") + 9
            bits = struct.unpack("<I", data[at:at + 4])[0] >> 28 << 28
            data[at:at + 4] = struct.pack("<I", bits | size[0] - 1 | size[1] - 1 << 14)
        else:
            at = data.index(b"\x9d\x01\x2a") + 3
            data[at:at + 4] = struct.pack("<HH", *size)
    else:
        at = struct.unpack("<I", data[4:8])[0]
        for entry in range(at + 2, at + 2 + 12 * struct.unpack("<H", data[at:at + 2])[0], 12):
            tag = struct.unpack("<H", data[entry:entry + 2])[0]
            if tag in (256, 257, 278):  # width, height, rows in a strip
                data[entry + 2:entry + 4] = struct.pack("<H", 4)
                data[entry + 8:entry + 12] = struct.pack("<I", width if tag == 256 else height)
    return bytes(data)


BAD = {
    "truncated.jpg": encoded(noise(48, 48), "JPEG")[:1000],
    "truncated.png": encoded(noise(48, 48), "PNG")[:3000],
    "truncated.bmp": encoded(noise(48, 48), "BMP")[:-1],
    "text.png": b"not an image",
    "empty.webp": b"",
    "zeros.tif": bytes(1000),
    "narrow.png": encoded(noise(15, 48), "PNG"),
    "low.jpg": encoded(noise(48, 15), "JPEG"),
    "gif.jpg": encoded(noise(48, 48), "GIF"),
    **{f"bomb{size}.{kind}".lower(): declare(encoded(noise(48, 48), kind), kind, size, size)
       for size in (60000, 9400) for kind in ("PNG", "BMP", "TIFF", "JPEG", "WEBP")},
}


@pytest.mark.parametrize("make", [
    lambda d: TrainDatasetFromFolder(d, 16, 8), lambda d: ValidDatasetFromFolder(d, 16, 8),
    lambda d: TrainDatasetFromFolder(d, 16, 8, crop="random", cache_gb=0)])
def test_all_bad_files_in_one_message(tmp_path, capfd, make):
    for name, data in BAD.items():
        (tmp_path / name).write_bytes(data)
    save(noise(16, 16), tmp_path / "good.png")
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: make(tmp_path))
    assert stop.value.code == 2
    lines = capfd.readouterr().err[:-1].split("\n")
    first = next(i for i, line in enumerate(lines) if line.startswith("error: "))
    assert lines[first].startswith(f"error: {len(BAD)} file(s) cannot be used")
    assert "Traceback" not in "".join(lines)
    named = dict(line.strip().split(": ", 1) for line in lines[first + 1:])
    assert list(named) == [str(tmp_path / name) for name in sorted(BAD)]
    reasons = {Path(path).name: reason for path, reason in named.items()}
    assert reasons["narrow.png"] == "15x48 px is smaller than the crop of 16 px"
    assert reasons["text.png"] == reasons["empty.webp"] == (
        "not a picture of a known format (JPEG, PNG, WebP, BMP and TIFF)")
    assert "truncated" in reasons["truncated.jpg"]
    assert all("bomb" in reasons[name] for name in BAD if name.startswith("bomb")), reasons


def test_large_photographs_are_no_bombs(tmp_path):
    # Flat grey packs tightest, and above 16 Mpx the size of the file begins to count
    save(Image.new("RGB", (4200, 4000), "#808080"), tmp_path / "a.jpg", progressive=True)
    lr, hr = TrainDatasetFromFolder(tmp_path, 128, 8)[0]
    assert (levels(lr) == 128).all() and (levels(hr) == 128).all()


@pytest.mark.parametrize("make, flag", [
    (lambda d: TrainDatasetFromFolder(d, 16, 8), "--train_dir"),
    (lambda d: ValidDatasetFromFolder(d, 16, 8), "--valid_dir"),
    (lambda d: ValidDatasetFromFolder(d, 16, 8, flag="--data_dir"), "--data_dir")])
def test_no_photographs(tmp_path, make, flag):
    (tmp_path / "notes.txt").write_text("no photograph")
    for folder in (tmp_path, tmp_path / "missing", tmp_path / "notes.txt"):
        with pytest.raises(InputError, match=f"set {flag} to a folder") as error:
            make(folder)
        assert str(folder) in str(error.value) and "\n" not in str(error.value)
        if not folder.is_dir():
            assert "prepare_celeba_hq.py" in str(error.value) and "--demo" in str(error.value)


def test_overlap(tmp_path):
    large = noise(512, 300, seed=9)
    train = {"a.png": noise(32, 24, 1), "b.bmp": noise(32, 24, 2), "c.png": noise(32, 24, 3),
             "d.png": large}
    valid = {"1.webp": noise(32, 24, 1), "2.tif": noise(32, 24, 2), "3.png": noise(32, 24, 4),
             "a.png": noise(32, 24, 5), "4.png": resized(large, 437, 256)}
    for folder, files in (("train", train), ("valid", valid)):
        for name, photo in files.items():
            options = LOSSLESS[name.split(".")[1]]
            save(photo, tmp_path / folder / name, **options)
    train = TrainDatasetFromFolder(tmp_path / "train", 16, 8)
    with pytest.raises(InputError, match="3 validation photograph.*--allow_overlap") as error:
        check_no_overlap(train, ValidDatasetFromFolder(tmp_path / "valid", 16, 8))
    pairs = [line.strip() for line in str(error.value).split("\n")[1:]]
    assert pairs == [f"{tmp_path}/valid/{v} = {tmp_path}/train/{t}"
                     for v, t in (("1.webp", "a.png"), ("2.tif", "b.bmp"), ("4.png", "d.png"))]
    for name in ("1.webp", "2.tif", "4.png"):
        (tmp_path / "valid" / name).unlink()
    check_no_overlap(train, ValidDatasetFromFolder(tmp_path / "valid", 16, 8))


def test_digest_tells_data_sets_apart(tmp_path):
    photos = [noise(16, 16, seed) for seed in range(3)]

    def digest(folder, *pictures):
        for i, photo in enumerate(pictures):
            save(photo, tmp_path / folder / f"{i}.png")
        return TrainDatasetFromFolder(tmp_path / folder, 16, 8).digest()

    first = digest("a", *photos)
    assert digest("b", *photos) == first
    changed = photos[2].copy()
    changed[0, 0, 0] ^= 1
    assert len({first, digest("c", *photos[:2]), digest("d", *photos[::-1]),
                digest("e", *photos[:2], changed)}) == 4


@pytest.fixture
def three(tmp_path):
    for name in "abc":
        save(noise(16, 16), tmp_path / f"{name}.bmp")
    return tmp_path


def vanish(path):
    path.unlink()


def replace(path):
    stat = os.stat(path)
    save(noise(16, 16, seed=1), path)  # as many bytes, a second later
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10 ** 9))


def shorten(path):
    stat = os.stat(path)
    path.write_bytes(path.read_bytes()[:-1])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def load_all(dataset, workers):
    try:
        list(DataLoader(dataset, num_workers=workers))
    except InputError as error:
        traceback.clear_frames(error.__traceback__)  # else torch waits 5 s for the worker to end
        raise


@pytest.mark.parametrize("harm, word", [(vanish, "vanished"), (replace, "changed"),
                                        (shorten, "changed")])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_does_not_stay(three, capfd, harm, word, workers):
    dataset = TrainDatasetFromFolder(three, 16, 8, cache_gb=0)
    cached = TrainDatasetFromFolder(three, 16, 8)
    before = list(cached)
    harm(three / "b.bmp")
    assert same(cached, before)
    assert same([dataset[0], dataset[2]], [before[0], before[2]])
    message = (f"{three / 'b.bmp'}: {word} after the run had started; put it back and run the "
               "command again (a training: with --resume)")
    with pytest.raises(InputError) as error:
        load_all(dataset, workers)
    assert str(error.value) == message

    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: load_all(dataset, workers))
    assert stop.value.code == 2
    assert capfd.readouterr().err == f"error: {message}\n"


class Unusable(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        unusable(["a.png: truncated", "b.png: InputError: empty"])


def test_long_messages_from_a_worker_stay_whole():
    expected = ("2 file(s) cannot be used; repair or remove them:\n  a.png: truncated\n"
                "  b.png: InputError: empty")
    for workers in (0, 1):
        with pytest.raises(InputError) as error:
            load_all(Unusable(), workers)
        assert str(error.value) == expected


@pytest.mark.parametrize("dtype, scale", [("float32", 1), ("int32", 2 ** 31 - 1), ("int32", 255),
                                          ("int16", 2 ** 15 - 1)])
@pytest.mark.parametrize("keep_mode", [False, True])
def test_what_has_no_known_white_is_refused(tmp_path, dtype, scale, keep_mode):
    """Floats in [0, 1] and 32-bit numbers were read as black."""
    picture = (np.linspace(0, 0.99, 1024).reshape(32, 32) * scale).astype(dtype)
    path = tmp_path / "a.tif"
    if dtype == "int16":  # Pillow writes none: the tag says that the numbers have a sign
        Image.fromarray(picture.astype("uint16")).save(path, tiffinfo={339: 2})
    else:
        Image.fromarray(picture).save(path)
    with pytest.raises(InputError, match="a.tif: holds 32-bit or signed pixels"):
        read_image(path, keep_mode)


def test_a_pipe_is_not_waited_for(tmp_path):
    save(noise(16, 16), tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    assert len(TrainDatasetFromFolder(tmp_path, 16, 8)) == 1
    with pytest.raises(InputError, match="b.png: not a file"):
        read_image(tmp_path / "b.png")
    with pytest.raises(InputError, match="c.png: .*No such file"):
        read_image(tmp_path / "c.png")


class Killed(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_one_line(capfd):
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: load_all(Killed(), 1))
    error = capfd.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "--resume" in error

    def other():
        raise RuntimeError("another")

    with pytest.raises(RuntimeError, match="another"):
        run_script(other)


# ---------------------------------------------------------------------------------------------
# 500 fuzzed files

EXIF = Image.Exif()
EXIF[0x0112] = 6
SEEDS = [("JPEG", "jpg", {"exif": EXIF}), ("JPEG", "jpeg", {"progressive": True}),
         ("PNG", "png", {}), ("PNG", "png", {"exif": EXIF}), ("WEBP", "webp", {}),
         ("WEBP", "webp", {"exif": EXIF}), ("WEBP", "webp", {"lossless": True}),
         ("BMP", "bmp", {}), ("TIFF", "tif", {}),
         ("TIFF", "tiff", {"compression": "tiff_lzw"}),
         ("TIFF", "tif", {"compression": "tiff_adobe_deflate"}),
         ("TIFF", "tiff", {"compression": "jpeg"})]
HUGE = [(60000, 60000), (9400, 9400), (80000, 1100), (3000, 3000), (48, 60000)]


def fuzz(folder, n):
    """Write n damaged image files into `folder`, the same ones each time."""
    rng = np.random.default_rng(0)
    photos = [(kind, suffix, encoded(smooth(48, 48), kind, **options))
              for kind, suffix, options in SEEDS]
    suffixes = [suffix for _, suffix, _ in SEEDS]
    for i in range(n):
        kind, suffix, data = photos[i % len(photos)]
        harm = ("cut", "flip", "flip", "suffix", "huge", "zero")[i // len(photos) % 6]
        if harm == "cut":
            data = data[:rng.integers(len(data))]
        elif harm == "flip":
            data = bytearray(data)
            for bit in rng.integers(8 * len(data), size=2 ** rng.integers(8)):
                data[bit // 8] ^= 1 << bit % 8
        elif harm == "suffix":
            suffix = rng.choice(suffixes)
        elif harm == "huge":
            data = declare(data, kind, *HUGE[rng.integers(len(HUGE))])
        elif rng.random() < 0.5:
            data = b""
        else:
            start = rng.integers(len(data))
            stop = start + rng.integers(1, 200)
            data = data[:start] + bytes(len(data[start:stop])) + data[stop:]
        (folder / f"{i:03d}_{harm}.{suffix}").write_bytes(data)


def usable(path):
    """Whether Pillow alone loads all of it and it is no bomb (1000 px in a byte, over 16 Mpx)."""
    try:
        with Image.open(path, formats=["JPEG", "PNG", "WEBP", "BMP", "TIFF"]) as image:
            pixels = image.width * image.height
            if pixels > 2 ** 24 and pixels > 1000 * path.stat().st_size:
                return False
            image.load()
            return min(image.convert("RGB").size) >= 16
    except Exception:  # decoders raise anything
        return False


# In a process of its own: what it must not do is to crash, to hang or to fill the memory
CHILD = """
import json, resource, sys, time
from data_utils import TrainDatasetFromFolder
from support.cli import InputError
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start, message = time.process_time(), ""
try:
    TrainDatasetFromFolder(sys.argv[1], 16, 8)
except InputError as error:
    message = str(error)
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used
json.dump({"message": message, "used": used, "seconds": time.process_time() - start}, sys.stdout)
"""


@pytest.mark.filterwarnings("ignore")  # Pillow's, about the files
def test_500_fuzzed_files(tmp_path):
    fuzz(tmp_path, 500)
    child = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], cwd=ROOT, timeout=60,
                           capture_output=True, text=True, errors="replace")
    assert child.returncode == 0, child.stderr[-2000:]
    result = json.loads(child.stdout)
    assert result["seconds"] < 10
    assert result["used"] < 2 ** 20 * (1024 if sys.platform == "darwin" else 1)  # 1 GiB
    head, *lines = result["message"].split("\n")
    named = [Path(line.strip().split(": ")[0]).name for line in lines]
    expected = [path.name for path in sorted(tmp_path.iterdir()) if not usable(path)]
    assert named == expected
    assert head.startswith(f"{len(expected)} file(s) cannot be used")
    assert 200 < len(expected) < 450  # of both kinds there are many


# ---------------------------------------------------------------------------------------------
# Synthetic portraits


def test_synthetic_portraits():
    people = synthetic_portraits(12, 64, seed=0)
    assert people.shape == (12, 64, 64, 3) and people.dtype == np.uint8
    assert np.array_equal(people, synthetic_portraits(12, 64, seed=0))
    assert np.array_equal(people[:3], synthetic_portraits(3, 64, seed=0))
    assert synthetic_portraits(2, 40, seed=0).shape == (2, 40, 40, 3)

    everyone = np.concatenate([people, synthetic_portraits(12, 64, seed=1)]).astype(float)
    faces = everyone[:, 16:52, 18:46]  # without the background, which makes it easy
    for a in range(len(everyone)):
        for b in range(a):
            # in levels; the median pair differs by 50 and 40
            assert np.abs(everyone[a] - everyone[b]).mean() > 12, (a, b)
            assert np.abs(faces[a] - faces[b]).mean() > 5, (a, b)


def test_rescaled_crops_are_pillows_of_their_places(tmp_path):
    for i in range(40):
        save(noise(80, 64, seed=i), tmp_path / f"{i:02}.png")
    dataset = TrainDatasetFromFolder(tmp_path, 32, 8, "mixed")
    found = np.flatnonzero(dataset.scales != 1)
    assert len(found) > 5
    for index in found:
        side = 32 / dataset.scales[index]  # of the square that becomes 32 px
        down, right = dataset.places[index]  # shares of the room that it leaves
        top, left = down * (64 - side), right * (80 - side)
        expected = Image.open(dataset.files[index]).resize(
            (32, 32), BICUBIC, box=(left, top, left + side, top + side))
        assert equal(dataset.crop(index), np.asarray(expected))


def test_equal_keys_are_equal_crops(tmp_path):
    """What is kept of a crop is another's than its mirror image's."""
    for i in range(3):
        save(noise(24, 24, seed=i), tmp_path / f"{i}.png")
    dataset, seen = TrainDatasetFromFolder(tmp_path, 16, 8, "center", flips=True), {}
    for epoch in range(20):
        dataset.set_epoch(epoch)
        for index, key in enumerate(dataset.cache_keys(range(3))):
            assert equal(dataset.crop(index), seen.setdefault(key, dataset.crop(index)))
    assert len(seen) == 6
