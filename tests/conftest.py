"""What the test files share: the repository on the path, few threads, tiny photographs."""

import os
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Before torch is imported, and for the processes that tests start: tiny tensors only wait for a
# second thread, and weights agree to the bit at the same number of threads alone.
os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402
from torch import nn  # noqa: E402


class TinyFaces(nn.Module):
    """A face network of no account that takes no time: (N, 3, 160, 160) -> unit (N, 24)."""

    label = "tiny"

    def __init__(self):
        super().__init__()
        self.register_buffer("mix", torch.randn(24, 75, generator=torch.Generator().manual_seed(0)))

    def forward(self, faces):
        pooled = nn.functional.adaptive_avg_pool2d(faces, 5).flatten(1)
        return nn.functional.normalize(pooled @ self.mix.T)


@pytest.fixture(scope="session")
def faces(tmp_path_factory):
    """A folder with train/ (6) and valid/ (2) synthetic portraits of 32 px."""
    from support.portraits import synthetic_portraits
    folder = tmp_path_factory.mktemp("faces")
    for split, n, seed in (("train", 6, 1), ("valid", 2, 2)):
        (folder / split).mkdir()
        for i, portrait in enumerate(synthetic_portraits(n, 32, seed)):
            Image.fromarray(portrait).save(folder / split / f"{i}.png")
    return folder
