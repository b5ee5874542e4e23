"""How KV pages store keys and values: float32, bfloat16, or int8 with a scale.

An int8 page holds, per kv head and token, D codes and then the four bytes of a float32 scale: [N, G, P, D + 4]. The
scale is the largest magnitude of the token's head over 127, so a number is off by at most half a scale. What is not
finite makes the scale infinite or NaN, and the token NaN.

Legend: N pages, G kv heads, P page size, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["TAIL", "dequantise", "page_kind", "quantise"]

TAIL = 4
"""Bytes after the codes of a token."""

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}  # PageKind in native/src/pages.h


def page_kind(k: Tensor, v: Tensor, *, int8: bool = True) -> tuple[int, int]:
    """What native kernels call the pages' dtype, and the elements of a token beyond D. Raises TypeError."""
    kind = _KINDS.get(k.dtype)
    if k.dtype is not v.dtype or kind is None or (kind == 2 and not int8):
        known = "int8, float32 or bfloat16" if int8 else "float32 or bfloat16"
        raise TypeError(f"pages must be {known}, not {k.dtype} and {v.dtype}")
    return kind, TAIL if k.dtype is torch.int8 else 0


def quantise(x: Tensor) -> Tensor:
    """int8 [..., D + 4] of float32 [..., D]."""
    most = x.abs().amax(-1, keepdim=True)
    # A plain number over a tensor would be rounded twice: reciprocal, then product.
    steps = torch.tensor(127.0) / most
    codes = (x * steps).round().masked_fill_(~((steps > 0) & (steps < 1e38)), 0)
    scale = torch.empty(most.shape).copy_(most / 127)  # in memory order, which a view of bytes asks for
    return torch.cat([codes.to(torch.int8), scale.view(torch.int8)], -1)


def dequantise(pages: Tensor) -> Tensor:
    """float32 [..., D] of int8 [..., D + 4]."""
    scale = pages[..., -TAIL:].contiguous().view(torch.float32)
    return pages[..., :-TAIL].float() * scale
