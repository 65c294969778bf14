"""`train_identity.py --tensorboard`: train_results.csv and samples/ as TensorBoard's events."""

import math
from pathlib import Path

import numpy as np
from PIL import Image

from support.cli import InputError


def summary_writer():
    """PyTorch's SummaryWriter. Raises InputError where the package tensorboard is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
        return SummaryWriter
    except ImportError:
        raise InputError("--tensorboard needs the package tensorboard: pip install tensorboard"
                         ) from None


def write_epoch(folder, row):
    """Add an epoch's row of train_results.csv and its picture in samples/ to tensorboard/.

    Each epoch has a file of its own: a run that is killed and resumed loses none, and what it
    computes again takes the place of what was there (purge_step).
    """
    epoch = row["Epoch"]
    with summary_writer()(Path(folder, "tensorboard"), purge_step=epoch) as writer:
        for name, value in row.items():
            if isinstance(value, (int, float)) and not math.isnan(value):
                writer.add_scalar(name, value, epoch)
        picture = Image.open(Path(folder, "samples", f"epoch_{epoch}.png"))
        writer.add_image("samples (bicubic, SR, HR)", np.asarray(picture), epoch, dataformats="HWC")
