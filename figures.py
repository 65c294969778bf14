"""Every picture and plot that the scripts write."""

import numpy as np
from PIL import Image, ImageDraw

from checkpoints import replacing
from data_utils import to_image


def save_image(image, path):
    """A PIL picture to `path`, atomically."""
    with replacing(path) as temporary:
        image.save(temporary)


def grid(rows, headings, gap=4):
    """Rows of equally large PIL pictures -> one picture with a heading over each column."""
    width, height = rows[0][0].size
    top = 18
    sheet = Image.new("RGB", ((width + gap) * len(rows[0]) + gap,
                              top + (height + gap) * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, heading in enumerate(headings):
        draw.text((gap + (width + gap) * column, 3), heading, fill="black")
    for r, row in enumerate(rows):
        for column, image in enumerate(row):
            sheet.paste(image, (gap + (width + gap) * column, top + (height + gap) * r))
    return sheet


def save_samples(path, restored, sr, hr):
    """samples/epoch_N.png: a row of bicubic | SR | HR per image; (N, 3, H, W) in [0, 1] each."""
    rows = [[to_image(image) for image in row] for row in zip(restored, sr, hr)]
    save_image(grid(rows, ("LR (bicubic)", "SR", "HR")), path)


def save_curves(table, path):
    pass
