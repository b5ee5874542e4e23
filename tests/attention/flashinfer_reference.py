"""Attention over block-sparse formats written down plainly, with a functor for the logits; and random formats.

Legend: T query rows, H query heads, G kv heads, D head size, L tokens that a row sees, B requests.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from hasten.attention.flashinfer_format import BlockSparse
from hasten.attention.layout import HeadShape, KVPages

# logits_HL, batch, qo, position of the row, kv_L -> logits_HL (a hidden token: -inf).
Logits = Callable[[Tensor, int, int, int, Tensor], Tensor]


def plain(logits_HL: Tensor, batch: int, qo: int, position: int, kv_L: Tensor) -> Tensor:
    return logits_HL


def random_format(
    rng: random.Random,
    *,
    page: int,
    requests: int,
    most_rows: int = 9,
    most_tokens: int = 60,
    empty: bool = True,
    causal: bool = True,
) -> tuple[BlockSparse, int]:
    """Ragged requests over shuffled pages, and the size of the pool. With ``empty`` some cache nothing."""
    rows, pages, last = [], [], []
    for _ in range(requests):
        tokens = rng.randint(0, most_tokens) if not (empty and rng.random() < 0.15) else 0
        count = rng.choice([1, 1, rng.randint(1, most_rows)])
        if causal:
            tokens = max(tokens, count) if tokens else 0
        rows.append(count)
        pages.append(-(-tokens // page))
        last.append(tokens - max(pages[-1] - 1, 0) * page)
    total = sum(pages)
    pool = total + 3
    ids = rng.sample(range(pool), total)
    return (
        BlockSparse(
            np.array([0, *accumulate(rows)]),
            np.array([0, *accumulate(pages)]),
            np.array(ids, np.int64),
            np.array(last),
            page,
            causal,
        ),
        pool,
    )


def random_pages(seed: int, pool: int, page: int, shape: HeadShape, dtype: torch.dtype) -> KVPages:
    generator = torch.Generator().manual_seed(seed)
    size = (pool, shape.kv_heads, page, shape.size)
    k = torch.randn(size, generator=generator).to(dtype)
    return KVPages(k, torch.randn(size, generator=generator).to(dtype))


def reference(
    q_THD: Tensor,
    pages: KVPages,
    format: BlockSparse,
    shape: HeadShape,
    scale: float,
    logits: Logits = plain,
    *,
    softmax: bool = True,
    window: int | None = None,
    sinks_H: Tensor | None = None,
    rotate: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(out_THD, lse_TH) in float64, row by row. ``rotate(x_LHD, position_L)`` turns queries and keys first."""
    repeat, page = shape.heads // shape.kv_heads, format.page_size
    out = torch.zeros(q_THD.shape, dtype=torch.float64)
    lse = torch.full(q_THD.shape[:2], float("-inf"), dtype=torch.float64)
    for b, length in enumerate(format.kv_len_B.tolist()):
        begin, end = (int(x) for x in format.qo_indptr_B1[b : b + 2])
        ids = torch.from_numpy(format.kv_indices_C[format.kv_indptr_B1[b] : format.kv_indptr_B1[b + 1]])
        for t in range(begin, end):
            position = length - (end - begin) + t - begin
            kv = torch.arange(max(position + 1, 0) if format.causal else length)
            if window is not None:
                kv = kv[-window:]
            if not len(kv):
                continue
            at, offset = ids[kv // page], kv % page
            k = pages.k_NGPD[at, :, offset].double().repeat_interleave(repeat, 1)
            v = pages.v_NGPD[at, :, offset].double().repeat_interleave(repeat, 1)
            q = q_THD[t].double()
            if rotate is not None:
                k, q = rotate(k, kv), rotate(q[None], torch.tensor([position]))[0]
            scores = logits(torch.einsum("hd,lhd->hl", q, k) * scale, b, t - begin, position, kv)
            if not softmax:
                out[t] = torch.einsum("hl,lhd->hd", scores, v)
                continue
            every = scores if sinks_H is None else torch.cat([scores, sinks_H.double()[:, None]], 1)
            lse[t] = torch.logsumexp(every, 1)
            weight = torch.exp(scores - lse[t].masked_fill(torch.isinf(lse[t]), 0.0)[:, None])
            out[t] = torch.einsum("hl,lhd->hd", weight, v)
    return out, lse


def pack_masks(masks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Bits (uint8) of all requests' masks [rows, tokens], lowest first; where each request begins (int64)."""
    flat = torch.cat([mask.flatten() for mask in masks]).numpy()
    start = np.cumsum([0, *(mask.numel() for mask in masks)])[:-1]
    return torch.from_numpy(np.packbits(flat, bitorder="little")), torch.from_numpy(start.astype(np.int64))


def tree_mask(rng: random.Random, rows: int, tokens: int) -> Tensor:
    """bool [rows, tokens]: all tokens before the rows, and of the rows a random tree's ancestors and the row itself."""
    mask = torch.zeros(rows, tokens, dtype=torch.bool)
    before = tokens - rows
    mask[:, :before] = True
    for i in range(rows):
        if i:
            mask[i, before:] = mask[rng.randrange(i), before:]
        mask[i, before + i] = True
    return mask
