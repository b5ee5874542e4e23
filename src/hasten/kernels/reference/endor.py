"""Reference of the bitmap format: by its definition, in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.kernels.endor import Bitmap


def expand(bitmap: Bitmap) -> Tensor:
    """The dense tensor of a bitmap."""
    set_N = (bitmap.bits[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten()[: bitmap.count].bool()
    dense_N = torch.zeros(bitmap.count, dtype=bitmap.values.dtype)
    dense_N[set_N] = bitmap.values
    return dense_N.view(bitmap.shape)
