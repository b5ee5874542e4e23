"""PyTorch reference of `hasten.kernels.vocabulary`, row by row; the legend is there.

Legend: K kept tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

NOTHING = float("-inf")


def argmax(logits_RV: Tensor) -> Tensor:
    return (logits_RV == logits_RV.amax(-1, keepdim=True)).int().argmax(-1)


def all_finite(logits_RV: Tensor) -> Tensor:
    return logits_RV.isfinite().all(-1)


def truncate(logits_RV: Tensor, top_k_R: Tensor, top_p_R: Tensor, log_min_p_R: Tensor) -> None:
    for row_V, top_k, top_p, log_min_p in zip(
        logits_RV, top_k_R.tolist(), top_p_R.tolist(), log_min_p_R, strict=True
    ):
        top = row_V.max()
        if 0 < top_k < len(row_V):
            row_V.masked_fill_(row_V < row_V.topk(top_k).values[-1], NOTHING)
        if top_p < 1:
            best_V, index_V = row_V.sort(descending=True, stable=True)
            mass_V = (best_V - top).double().exp()
            before_V = mass_V.cumsum(0) - mass_V
            row_V[index_V[before_V >= top_p * mass_V.sum()]] = NOTHING
        row_V.masked_fill_(row_V < top + log_min_p, NOTHING)


def sample(
    logits_RV: Tensor,
    temperature_R: Tensor,
    top_k_R: Tensor,
    top_p_R: Tensor,
    log_min_p_R: Tensor,
    stream_R: Tensor,
) -> Tensor:
    scaled_RV = (logits_RV / temperature_R[:, None]).clamp_max(torch.finfo(torch.float32).max)
    truncate(scaled_RV, top_k_R, top_p_R, log_min_p_R)
    return (scaled_RV + gumbel(stream_R[:, None], torch.arange(logits_RV.shape[1]))).argmax(-1)


def gumbel(stream: Tensor, token: Tensor) -> Tensor:
    """Standard Gumbel noise, float64, by hashing (stream, token) with the SplitMix64 finaliser (Steele et al. 2014)."""
    z = stream + token * -0x61C8864680B583EB  # the constants are the published ones as signed numbers
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    z ^= (z >> 31) & 0x1FFFFFFFF
    uniform = (((z >> 11) & 0x1FFFFFFFFFFFFF).double() + 0.5) * 2.0**-53
    return uniform.log_().neg_().log_().neg_()
