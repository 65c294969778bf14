"""How fast, against a straightforward loop and against what this machine can do.

    python benchmark.py                    # under five minutes on two cores
    python benchmark.py --json bench.json

Two training steps alternate, A/B/A/B: the project's (`train_identity.train_step`) and `reference_step`
below, which has the structure of the report's published script (an extra generator and
discriminator pass per step, targets computed anew, NCHW, fp32) around the same networks and losses.
The same mathematics twice: `tests/test_train.py` compares their losses and updates.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import checkpoints
import evaluate
import train_identity
from data_utils import run_script, synthetic_portraits, to_tensor
from loss_identity import adversarial_loss, discriminator_loss, embed, pixel_loss
from model import SubPixelConv2d

# Multiply-adds per 128 px image of one forward pass at 8x, in GMAC, counted by `count_gmac`.


# ---------------------------------------------------------------------------------------------
# The reference: what the report's published script does


def plain_generator(netG, lr):
    """The generator as Ledig et al. draw it: shuffle first, then the 9x9 convolution."""
    x = netG.first(lr)
    x = x + netG.skip(netG.residual(x))
    for block in netG.upsample:
        x = block(x)
    x = F.conv2d(x, netG.last.weight, netG.last.bias, padding=4)
    return (torch.tanh(x) + 1) / 2


def reference_step(run, lr, hr):
    """One update of both networks, every term of L_total on the whole batch at once."""
    netG, netD = run.netG, run.netD
    sr = plain_generator(netG, lr)
    real_logits, fake_logits = netD(hr), netD(sr)
    loss_d = discriminator_loss(run.loss.gan_loss, fake_logits, real_logits, run.smoothing)
    run.optimizerD.zero_grad()
    loss_d.backward(retain_graph=True)

    run.optimizerG.zero_grad()
    total, terms = run.loss(sr, hr, fake_logits, real_logits)
    total.backward()
    run.optimizerD.step()
    run.optimizerG.step()

    netD(plain_generator(netG, lr)).mean().item()  # the published script's pass for its log
    return {name: term.item() for name, term in terms.items()}


def reference_pixel_step(run, lr, hr):
    """One update with the pixel loss alone."""
    run.optimizerG.zero_grad()
    pixel_loss(plain_generator(run.netG, lr), hr).backward()
    run.optimizerG.step()
