"""PyTorch reference of `hasten.kernels.flash`: the plain definition, with the scores written out in full.

Computes in the dtype of the queries, so float64 tensors give a float64 answer, and differentiates by autograd.

Legend: B sequences, H query heads, G kv heads, T query tokens, S key tokens, D head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hasten.kernels.flash_terms import Masking


def visible(
    masking: Masking, shape: tuple[int, int, int, int], sequence: int | None = None
) -> tuple[Tensor, Tensor]:
    """bool [B, H, T, S] seen, and the keys' distance from each row [T, S]."""
    batch, heads, rows, keys = shape
    distance = torch.arange(keys) - torch.arange(rows)[:, None] - (keys - rows)
    seen = torch.ones(rows, keys, dtype=torch.bool)
    if masking.left is not None:
        seen &= distance >= -masking.left
    if masking.right is not None:
        seen &= distance <= masking.right
    seen = seen.expand(shape)
    if (keep := masking.keep_BHQK) is not None:
        row, key = torch.arange(rows) // masking.block, torch.arange(keys) // masking.block
        if sequence is not None and keep.shape[0] > 1:
            keep = keep[sequence : sequence + 1]
        seen = seen & keep.expand(batch, heads, -1, -1)[:, :, row[:, None], key]
    return seen, distance


def _mix(x: Tensor) -> Tensor:
    return _second_half(_first_half(x))


def _first_half(x: Tensor) -> Tensor:
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & 0xFFFFFFFF
    return x ^ (x >> 15)


def _second_half(x: Tensor) -> Tensor:
    x = (x * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def dropout_mask(masking: Masking, shape: tuple[int, int, int, int], sequence: int = 0) -> Tensor:
    """bool [B, H, T, S]: the weights that stay, from the counter (seed, sequence, head, row, key)."""
    batch, heads, rows, keys = shape
    b = (torch.arange(sequence, sequence + batch) * 0x9E3779B9) & 0xFFFFFFFF
    h = (torch.arange(heads) * 0x85EBCA6B) & 0xFFFFFFFF
    x = _mix(b ^ (masking.seed & 0xFFFFFFFF))
    x = _mix(x[:, None] ^ h)
    first = _mix(x[..., None] ^ torch.arange(rows))
    second = _mix(first ^ (masking.seed >> 32))
    counter = (torch.arange(keys) * 0x9E3779B9) & 0xFFFFFFFF
    bits = (_first_half(first[..., None] ^ counter) + second[..., None]) & 0xFFFFFFFF
    return _second_half(bits) >= masking.threshold


def flash_attention(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, masking: Masking, *, sequence: int | None = None
) -> tuple[Tensor, Tensor]:
    """``(out_BHTD, lse_BHT)``. ``sequence``: the one tensors hold, of a batch that ``masking`` is about."""
    batch, heads, rows, _ = q_BHTD.shape
    keys = k_BGSD.shape[2]
    repeat = heads // k_BGSD.shape[1]
    k, v = k_BGSD.repeat_interleave(repeat, 1), v_BGSD.repeat_interleave(repeat, 1)
    scores = q_BHTD @ k.transpose(-1, -2) * masking.scale
    if masking.softcap is not None:
        scores = masking.softcap * torch.tanh(scores / masking.softcap)
    seen, distance = visible(masking, (batch, heads, rows, keys), sequence)
    if masking.bias_BHTS is not None:
        bias = masking.bias_BHTS
        if sequence is not None and bias.shape[0] > 1:
            bias = bias[sequence : sequence + 1]
        bias = bias[..., : min(rows, bias.shape[-2]), : min(keys, bias.shape[-1])]  # of a shorter sequence
        seen = seen & ~torch.isneginf(bias)  # hidden, rather than a score whose gradient would be NaN
        scores = scores + bias.masked_fill(torch.isneginf(bias), 0.0).to(q_BHTD.dtype)
    if masking.alibi_H is not None:
        scores = scores - masking.alibi_H.to(q_BHTD.dtype)[:, None, None] * distance.abs()
    scores = scores.masked_fill(~seen, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    # A row that sees nothing: subtract 0, so that neither its weights nor their gradients are NaN.
    weight = torch.exp(scores - lse.masked_fill(torch.isneginf(lse), 0.0)[..., None])
    if masking.threshold:
        stays = dropout_mask(masking, (batch, heads, rows, keys), sequence or 0)
        weight = weight * stays / (1 - masking.threshold / 2**32)
    return weight @ v, lse
