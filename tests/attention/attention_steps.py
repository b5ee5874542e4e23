"""Random engine steps over shared and private pages, and attention written down plainly for them.

Legend: T rows, S sequences, H query heads, G kv heads, D head size, N pages, P page size, L cached tokens.
"""

from __future__ import annotations

import random
from itertools import accumulate

import torch
from torch import Tensor

from hasten.attention.layout import AttentionSpec, HeadShape, KVPages, StepLayout


def make_layout(
    tables: list[list[int]],
    lengths: list[int],
    rows: list[int],
    page: int,
    ids: tuple[int, ...] | None = None,
) -> StepLayout:
    """The layout of sequences with these pages, cached tokens (the step's included) and rows of the step."""
    width = max([len(t) for t in tables], default=0) + 1
    table = torch.full((len(tables), width), -1, dtype=torch.int32)
    for s, pages in enumerate(tables):
        table[s, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
    position = [i for length, count in zip(lengths, rows, strict=True) for i in range(length - count, length)]
    owner = [s for s, count in enumerate(rows) for _ in range(count)]
    slot = [tables[s][i // page] * page + i % page for s, i in zip(owner, position, strict=True)]
    return StepLayout(
        query_start_S1=torch.tensor([0, *accumulate(rows)], dtype=torch.int32),
        kv_len_S=torch.tensor(lengths, dtype=torch.int32),
        page_table_SM=table,
        position_T=torch.tensor(position, dtype=torch.int64),
        slot_T=torch.tensor(slot, dtype=torch.int64),
        page_size=page,
        sequence_ids=tuple(range(len(tables))) if ids is None else ids,
    )


def random_step(
    rng: random.Random, *, page: int, sequences: int, levels: int = 3, most_rows: int = 7
) -> tuple[StepLayout, int]:
    """Sequences that branch off a random tree of shared pages (ragged nodes, any order), and the pool size."""
    pool = 40 * (sequences + levels + 1)
    free = list(range(pool))
    rng.shuffle(free)
    chains: list[list[int]] = [[]]
    for _ in range(2 * levels):
        chains.append(rng.choice(chains) + [free.pop() for _ in range(rng.randint(1, 4))])
    tables, lengths, rows = [], [], []
    for _ in range(sequences):
        chain = rng.choice(chains)
        chain = chain[: rng.randint(0, len(chain))]
        count = rng.choice([1, 1, rng.randint(1, most_rows)])
        length = len(chain) * page + rng.randint(0, 3 * page) + count
        tables.append(chain + [free.pop() for _ in range(-(-length // page) - len(chain))])
        lengths.append(length)
        rows.append(count)
    return make_layout(tables, lengths, rows, page), pool


def random_pages(seed: int, pool: int, page: int, shape: HeadShape, dtype: torch.dtype) -> KVPages:
    """Pages of normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    size = (pool, shape.kv_heads, page, shape.size)
    k = torch.randn(size, generator=generator).to(dtype)
    return KVPages(k, torch.randn(size, generator=generator).to(dtype))


def random_queries(seed: int, rows: int, shape: HeadShape) -> Tensor:
    """Queries of normal numbers [T, H, D]."""
    return torch.randn(rows, shape.heads, shape.size, generator=torch.Generator().manual_seed(seed))


def naive_scores(q_THD: Tensor, pages: KVPages, layout: StepLayout, spec: AttentionSpec) -> Tensor:
    """Attention weights in float64 [T, H, max kv_len], row by row from the definition."""
    repeat = spec.shape.heads // spec.shape.kv_heads
    probs = torch.zeros(layout.rows, spec.shape.heads, int(layout.kv_len_S.max()), dtype=torch.float64)
    for t, s in enumerate(layout.row_sequence_T().tolist()):
        token = torch.arange(int(layout.kv_len_S[s]) - int(layout.query_start_S1[s + 1]) + t + 1)
        if spec.window is not None:
            token = token[-spec.window :]
        page = layout.page_table_SM[s, token // layout.page_size].long()
        k = pages.k_NGPD[page, :, token % layout.page_size].double().repeat_interleave(repeat, 1)
        logits = torch.einsum("hd,lhd->hl", q_THD[t].double(), k) * spec.scale
        if spec.softcap is not None:
            logits = spec.softcap * torch.tanh(logits / spec.softcap)
        probs[t][:, token] = torch.softmax(logits, -1)
    return probs


def naive_attention(q_THD: Tensor, pages: KVPages, layout: StepLayout, spec: AttentionSpec) -> Tensor:
    """The exact output in float64 [T, H, D]."""
    return weighted_values(naive_scores(q_THD, pages, layout, spec), pages, layout, spec)


def weighted_values(probs_THL: Tensor, pages: KVPages, layout: StepLayout, spec: AttentionSpec) -> Tensor:
    """Sum of values under given weights, float64 [T, H, D]."""
    repeat = spec.shape.heads // spec.shape.kv_heads
    out = torch.zeros(layout.rows, spec.shape.heads, spec.shape.size, dtype=torch.float64)
    for t, s in enumerate(layout.row_sequence_T().tolist()):
        token = torch.arange(int(layout.kv_len_S[s]))
        page = layout.page_table_SM[s, token // layout.page_size].long()
        v = pages.v_NGPD[page, :, token % layout.page_size].double().repeat_interleave(repeat, 1)
        seen = probs_THL[t][:, token]
        v = v.masked_fill((seen == 0).all(0)[:, None, None], 0.0)
        out[t] = torch.einsum("hl,lhd->hd", seen, v)
    return out
