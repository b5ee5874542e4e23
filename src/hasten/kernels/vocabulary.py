"""Passes over logits, a row per sequence, as wide as the vocabulary.

Legend: R rows, V vocabulary.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from hasten.kernels.native import native

__all__ = ["all_finite", "argmax"]


def _rows(logits_RV: Tensor) -> Tensor:
    if logits_RV.dtype is not torch.float32:
        raise TypeError(f"logits_RV must be float32, not {logits_RV.dtype}")
    if logits_RV.dim() != 2:
        raise ValueError(f"logits_RV must be [R, V], not shape {tuple(logits_RV.shape)}")
    return logits_RV.contiguous()


def argmax(logits_RV: Tensor, *, module: ModuleType | None = None) -> Tensor:
    """int64 [R]: the highest logit of each row, the lowest id among equal ones. NaN never wins over a number.

    Raises TypeError for a wrong dtype and ValueError for a wrong shape or rows without entries.
    """
    lib = native() if module is None else module
    logits_RV = _rows(logits_RV)
    token_R = torch.empty(logits_RV.shape[0], dtype=torch.int64)
    lib.argmax(logits_RV.data_ptr(), *logits_RV.shape, token_R.data_ptr())
    return token_R


def all_finite(logits_RV: Tensor, *, module: ModuleType | None = None) -> Tensor:
    """bool [R]: whether a row holds neither NaN nor infinity. Raises TypeError or ValueError as `argmax` does."""
    lib = native() if module is None else module
    logits_RV = _rows(logits_RV)
    finite_R = torch.empty(logits_RV.shape[0], dtype=torch.bool)
    lib.all_finite(logits_RV.data_ptr(), *logits_RV.shape, finite_R.data_ptr())
    return finite_R
