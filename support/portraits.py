"""Drawn portraits of people who do not exist, for the demo and the tests."""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

BACKGROUND, LIGHT = slice(0, 3), 29  # places in an identity's numbers, as `_portrait` takes them


def synthetic_portraits(n, size, seed):
    """n procedural portraits of n different people: uint8 array (n, size, size, 3).

    Each is drawn from one vector of random numbers (the identity): skin, hair, face shape, eyes,
    brows, nose, mouth and light. Same seed, same people. Eyes sit at 0.47 of the height, as in
    CelebA-HQ.
    """
    rng = np.random.default_rng(seed)
    return np.stack([_portrait(rng.random(32), size) for _ in range(n)])


def repeated_portraits(n, shots, size, seed):
    """n people, each drawn `shots` times: uint8 array (n, shots, size, size, 3).

    Pictures of one person differ in background, light, tilt of the head, place and size of the
    face; the people are those of `synthetic_portraits`.
    """
    people, rng = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    return np.stack([[_photograph(identity, size, rng) for _ in range(shots)]
                     for identity in (people.random(32) for _ in range(n))])


def _photograph(identity, size, rng):
    """One person under circumstances that `rng` draws: uint8 array (size, size, 3)."""
    identity = identity.copy()
    identity[BACKGROUND], identity[LIGHT] = rng.random(3), rng.random()
    picture = Image.fromarray(_portrait(identity, size))
    angle, zoom = rng.uniform(-6, 6), rng.uniform(0.92, 1.08)
    shift = tuple(rng.uniform(-0.02, 0.02, 2) * size)
    side = round(size * zoom)
    picture = picture.rotate(angle, Image.Resampling.BICUBIC, translate=shift,
                             fillcolor=picture.getpixel((0, 0)))
    sheet = Image.new("RGB", (size, size), picture.getpixel((0, 0)))
    sheet.paste(picture.resize((side, side), Image.Resampling.LANCZOS), ((size - side) // 2,) * 2)
    return np.clip(np.rint(np.asarray(sheet) * rng.uniform(0.85, 1.1)), 0, 255).astype(np.uint8)


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
