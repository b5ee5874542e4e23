"""Passes over logits, a row per sequence, as wide as the vocabulary.

Legend: R rows, V vocabulary.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from hasten.kernels.native import native

__all__ = ["all_finite", "argmax", "sample", "truncate"]


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


def truncate(
    logits_RV: Tensor,
    top_k_R: Tensor,
    top_p_R: Tensor,
    log_min_p_R: Tensor,
    *,
    module: ModuleType | None = None,
) -> None:
    """Set to -inf, in place, what top-k, then top-p, then min-p exclude from each row, without sorting it.

    logits_RV: float32, contiguous; +inf counts as the largest number.
    top_k_R: int64; 0, or V and more, keep all. Logits equal to the k-th largest stay too (arXiv 1805.04833).
    top_p_R: float64 in (0, 1]: the fewest most probable tokens whose mass reaches it, of equal ones the lowest ids
        (nucleus, arXiv 1904.09751, section 3.1).
    log_min_p_R: float32, log of min-p (-inf: off), the least share of the best token's probability (arXiv 2407.01082).

    Raises TypeError for a wrong dtype; ValueError for a wrong shape or value, and for a row with NaN or with nothing
    above -inf (other rows may be truncated then).
    """
    lib = native() if module is None else module
    if not logits_RV.is_contiguous():
        raise ValueError("logits_RV must be contiguous: it is changed in place")
    logits_RV = _rows(logits_RV)
    settings = _settings(logits_RV, top_k_R, top_p_R, log_min_p_R)
    bad = lib.truncate(logits_RV.data_ptr(), *logits_RV.shape, *(t.data_ptr() for t in settings))
    _refuse(bad)


def sample(
    logits_RV: Tensor,
    temperature_R: Tensor,
    top_k_R: Tensor,
    top_p_R: Tensor,
    log_min_p_R: Tensor,
    stream_R: Tensor,
    *,
    module: ModuleType | None = None,
) -> Tensor:
    """int64 [R]: a token per row, drawn from softmax(logits / temperature) truncated as by `truncate`.

    The token with the highest sum of logit and Gumbel noise wins (lowest id if equal), the noise being a hash of
    (``stream_R``, token id): so a token that is excluded takes nothing from the chances of the others.

    temperature_R: float32, positive; stream_R: int64 random bits. Others and errors as in `truncate`; ``logits_RV``
    is not changed.
    """
    lib = native() if module is None else module
    logits_RV = _rows(logits_RV)
    settings = _settings(logits_RV, top_k_R, top_p_R, log_min_p_R)
    temperature_R = _per_row("temperature_R", temperature_R, torch.float32, logits_RV)
    if not bool((temperature_R > 0).all()):
        raise ValueError("temperature_R must be positive; a temperature of 0 is `argmax`")
    stream_R = _per_row("stream_R", stream_R, torch.int64, logits_RV)
    token_R = torch.empty(logits_RV.shape[0], dtype=torch.int64)
    given = (temperature_R, *settings, stream_R, token_R)
    _refuse(lib.sample(logits_RV.data_ptr(), *logits_RV.shape, *(t.data_ptr() for t in given)))
    return token_R


def _per_row(name: str, value: Tensor, dtype: torch.dtype, logits_RV: Tensor) -> Tensor:
    if value.dtype is not dtype:
        raise TypeError(f"{name} must be {dtype}, not {value.dtype}")
    if value.shape != logits_RV.shape[:1]:
        raise ValueError(f"{name} must be [{logits_RV.shape[0]}], not shape {tuple(value.shape)}")
    return value.contiguous()


def _settings(logits_RV: Tensor, top_k_R: Tensor, top_p_R: Tensor, log_min_p_R: Tensor) -> tuple[Tensor, ...]:
    if logits_RV.shape[1] >= 2**31 or (logits_RV.shape[0] and not logits_RV.shape[1]):
        raise ValueError(f"logits_RV must have 1 to 2^31 - 1 columns, not {logits_RV.shape[1]}")
    top_k_R = _per_row("top_k_R", top_k_R, torch.int64, logits_RV)
    top_p_R = _per_row("top_p_R", top_p_R, torch.float64, logits_RV)
    log_min_p_R = _per_row("log_min_p_R", log_min_p_R, torch.float32, logits_RV)
    if not bool((top_k_R >= 0).all()):
        raise ValueError("top_k_R must not be negative")
    if not bool(((top_p_R > 0) & (top_p_R <= 1)).all()):
        raise ValueError("top_p_R must be in (0, 1]")
    if not bool((log_min_p_R <= 0).all()):
        raise ValueError("log_min_p_R must be the logarithm of a number in 0..1")
    return top_k_R, top_p_R, log_min_p_R


def _refuse(row: int) -> None:
    if row >= 0:
        raise ValueError(f"row {row} of logits_RV holds NaN, or no token that is not -inf")
