"""The two networks of the report: SRGAN's generator and discriminator.

Ledig et al., "Photo-Realistic Single Image Super-Resolution Using a Generative Adversarial
Network", CVPR 2017, Figure 4, in the size that the report uses (five residual blocks, BatchNorm,
one-parameter PReLUs, adaptive pooling in the discriminator).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from support.fast_layers import PReLU, SubPixelConv2d


class ResidualBlock(nn.Module):
    """3x3 conv, BN, PReLU, 3x3 conv, BN, sum. (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.prelu = PReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        return x + self.bn2(self.conv2(self.prelu(self.bn1(self.conv1(x)))))


class UpsampleBlock(nn.Module):
    """Sub-pixel convolution (Shi et al. 2016) before its shuffle. (N, C, H, W) -> (N, 4C, H, W).

    PReLU has one parameter, so it commutes with the pixel shuffle to (N, C, 2H, 2W) that follows.
    """

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4 * channels, 3, padding=1)
        self.prelu = PReLU()

    def forward(self, x):
        return self.prelu(self.conv(x))


class Generator(nn.Module):
    """The super-resolution network: LR (N, 3, h, w) in [0, 1] -> SR (N, 3, s*h, s*w) in [0, 1].

    SR is fp32, also under autocast.

    `scale_factor` s is a power of two from 2 up and takes log2(s) sub-pixel blocks: three at the
    report's 8x. `icnr` starts each sub-pixel convolution as a nearest-neighbour upsampling
    (Aitken et al. 2017), so that no checkerboard has to be unlearned. `back_projection`: whether
    SR is corrected by `back_project`; a buffer of that name in a checkpoint says so.
    Raises ValueError on another factor.
    """

    def __init__(self, scale_factor, icnr=True, back_projection=True):
        super().__init__()
        if scale_factor < 2 or scale_factor & (scale_factor - 1):
            raise ValueError(f"scale_factor must be 2, 4, 8, ...; got {scale_factor}")
        self.scale_factor = scale_factor
        self.first = nn.Sequential(nn.Conv2d(3, 64, 9, padding=4), PReLU())
        self.residual = nn.Sequential(*[ResidualBlock(64) for _ in range(5)])
        self.skip = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64))
        self.upsample = nn.ModuleList(
            [UpsampleBlock(64) for _ in range(int(math.log2(scale_factor)))])
        self.last = SubPixelConv2d(64, 3, 9, padding=4)
        self.register_buffer("back_projection", torch.zeros(()) if back_projection else None)
        if icnr:
            for block in self.upsample:
                icnr_(block.conv.weight)
                icnr_(block.conv.bias)

    def forward(self, lr, checkpoint_chunk=None):
        """checkpoint_chunk: gradient checkpointing of the upsampling, that many images at a time.

        Its activations are computed again in the backward pass: less memory, the same result.
        """
        x = self.first(lr)                              # (N, 64, h, w)
        x = x + self.skip(self.residual(x))             # (N, 64, h, w), the long skip
        if checkpoint_chunk:
            sr = torch.cat([checkpoint(self.enlarge, part, use_reentrant=False)
                            for part in x.split(checkpoint_chunk)])
        else:
            sr = self.enlarge(x)
        return sr if self.back_projection is None else back_project(sr, lr)

    def enlarge(self, x):
        """The part without BatchNorm: (N, 64, h, w) -> SR (N, 3, s*h, s*w)."""
        for block in self.upsample[:-1]:
            x = F.pixel_shuffle(block(x), 2)            # (N, 64, 2h, 2w), then 4h, 4w
        x = self.upsample[-1](x)                        # (N, 256, s*h/2, s*w/2)
        x = self.last(x).float()                        # shuffled; 8 bits of bf16 are too few here
        return (torch.tanh(x) + 1) / 2                  # (N, 3, s*h, s*w)


class Discriminator(nn.Module):
    """Real HR or generated SR? Images (N, 3, H, W) in [0, 1] -> logits (N,).

    The sigmoid is in the loss; `probability` gives D(x). Up to 16 px the last
    map is one pixel, which BatchNorm cannot standardise for one image alone.
    """

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(3, 64, 3, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        for c_in, c_out, stride in [(64, 64, 2), (64, 128, 1), (128, 128, 2), (128, 256, 1),
                                    (256, 256, 2), (256, 512, 1), (512, 512, 2)]:
            layers += [nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1),
                       nn.BatchNorm2d(c_out), nn.LeakyReLU(0.2, inplace=True)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(512, 1024, 1),
                                        nn.LeakyReLU(0.2), nn.Conv2d(1024, 1, 1))

    def forward(self, image):
        return self.classifier(self.features(image)).flatten()


def probability(logits):
    """D(x): the probability in [0, 1] that the discriminator gives to "real"."""
    return torch.sigmoid(logits)


def back_project(sr, lr):
    """SR + enlarge(LR - reduce(SR)): (N, 3, s*h, s*w), (N, 3, h, w) -> like sr, in [0, 1].

    One step of back-projection (Irani and Peleg, "Improving resolution by image registration",
    1991): LR tells the coarse colours of SR exactly, so none of them need be guessed. Bicubic and
    antialiased like `data_utils.downscale`.
    """
    def resize(images, like):
        return F.interpolate(images, size=like.shape[2:], mode="bicubic", antialias=True)

    return (sr + resize(lr - resize(sr, lr), sr)).clamp(0, 1)


@torch.no_grad()
def icnr_(weight):
    """Make the four sub-pixels of each output channel start equal, in place.

    weight: (4C, C_in, k, k), or a bias (4C,), of a convolution before PixelShuffle(2). Aitken et
    al. 2017, "Checkerboard artifact free sub-pixel convolution". Keeps the variance of the
    initialisation.
    """
    weight.copy_(weight[::4].repeat_interleave(4, dim=0))


@torch.no_grad()
def remove_stripes_(weight):
    """Make a convolution blind to lines that alternate from pixel to pixel, in place.

    weight: (..., k, k). Projects each kernel onto those whose response at half the sampling rate
    (the Nyquist frequency) is zero, along the rows and along the columns: the kernels that are a
    2x2 mean followed by something smaller (Sugawara et al. 2018, "Super-resolution using
    convolutional neural networks without any checkerboard artifacts"). Whatever comes in, what
    comes out has no part at exactly that rate, but for the zeros beyond the border. The gradients
    of VGG16 and InceptionResnetV1, both full of strides of two, ask for such lines.
    """
    signs = torch.ones(weight.shape[-1], device=weight.device, dtype=weight.dtype)
    signs[1::2].fill_(-1)  # an assignment would fill from a tensor of the CPU
    for axis, line in ((-1, signs), (-2, signs[:, None])):
        weight.addcmul_((weight * line).mean(axis, keepdim=True), line, value=-1)
