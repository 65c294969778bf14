"""The report's "Evaluation Metrics": PSNR-Y, SSIM and the cosine of face embeddings."""

import pytorch_ssim
import torch
import torch.nn.functional as F
from torch.utils.data import default_collate

from loss_identity import embed


def luma(images):
    """Y of RGB: (N, 3, H, W) in [0, 1] -> (N, H, W); ITU-R BT.601, full range."""
    red, green, blue = images.float().unbind(1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def psnr_y(sr, hr):
    """PSNR in dB on Y, peak 1, one value per image: (N, 3, H, W) in [0, 1] twice -> (N,)."""
    return -10 * torch.log10((luma(sr) - luma(hr)).square().mean((1, 2)))


class _FlooredInt(int):
    """pytorch-ssim 0.1 halves its window with `/`, which Python 2 floored; this int still does."""

    def __truediv__(self, other):
        return int(self) // other


def ssim(sr, hr):
    """Mean SSIM per image (Wang et al. 2004; pytorch-ssim: RGB, 11x11 Gaussian, sigma 1.5) -> (N,)."""
    return pytorch_ssim.ssim(sr.float(), hr.float(), window_size=_FlooredInt(11),
                             size_average=False)


def cosine(embeddings_a, embeddings_b):
    """Cosine similarity of embeddings, row by row: (N, D) twice -> (N,) in [-1, 1]."""
    return F.cosine_similarity(embeddings_a.float(), embeddings_b.float())


def batches(dataset, batch_size, device, indices=None):
    """Yield (indices, LR, bicubic, HR) of a ValidDatasetFromFolder, batched, channels last.

    Whole frames may differ in size; a batch holds one size only. `indices`: a part of the data set.
    """
    group, size = [], None
    for index in [*(range(len(dataset)) if indices is None else indices), None]:
        item = dataset[index] if index is not None else None
        if group and (item is None or len(group) == batch_size or item[2].shape != size):
            images = default_collate([images for _, images in group])
            yield [i for i, _ in group], *(
                x.to(device).contiguous(memory_format=torch.channels_last) for x in images)
            group = []
        if item is not None:
            group.append((index, item))
            size = item[2].shape


@torch.no_grad()
def validate(netG, netD, dataset, face_network, known_embeddings, batch_size, device, indices):
    """What training logs of its validation images after an epoch.

    -> (n, 6) tensor, one row per index: PSNR-Y (dB), SSIM, cosine, D(x), D(G(z)) as logits, and
    the index. `known_embeddings` keeps HR's embeddings between epochs ({index: (512,)}). The
    networks are put into eval mode and left there.
    """
    netG.eval()
    netD.eval()
    rows = []
    for group, lr, _, hr in batches(dataset, batch_size, device, indices):
        sr = netG(lr).float()
        if any(i not in known_embeddings for i in group):
            known_embeddings.update(zip(group, embed(face_network, hr)))
        hr_embeddings = torch.stack([known_embeddings[i] for i in group])
        rows.append(torch.stack([psnr_y(sr, hr), ssim(sr, hr),
                                 cosine(embed(face_network, sr), hr_embeddings),
                                 netD(hr).float(), netD(sr).float(),
                                 torch.tensor(group, device=device).float()], dim=1))
    return torch.cat(rows) if rows else torch.empty(0, 6, device=device)
