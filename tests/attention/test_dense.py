"""The default kernel against attention written down plainly: ragged steps, windows, every kind of selection."""

from __future__ import annotations

import random
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from attention_steps import (
    make_layout,
    naive_attention,
    naive_scores,
    random_pages,
    random_queries,
    random_step,
    weighted_values,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.attention import pieces as planning
from hasten.attention.dense import DenseKernel
from hasten.attention.layout import AttentionSpec, HeadShape, KVPages, StepLayout
from hasten.attention.policy import BlockSelection, Dense, DenseScores, TokenSelection
from hasten.core.errors import UnsupportedError

SPECS = st.builds(
    lambda shape, window, cap: AttentionSpec(HeadShape(*shape), 0.3, window, cap),
    st.sampled_from([(1, 1, 8), (6, 2, 16), (3, 3, 16), (9, 3, 64)]),
    st.sampled_from([None, 1, 5, 40]),
    st.sampled_from([None, None, 20.0]),
)


def run(
    layout: StepLayout, q: Tensor, pages: KVPages, spec: AttentionSpec, choice: Any, observe: Any = None
) -> Tensor:
    kernel = DenseKernel()
    return kernel.run(kernel.plan(layout), 0, q, pages, layout, spec, choice, observe)


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert got.dtype is torch.float32
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.fixture(params=[4, 128])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Cut pieces as small as 4 tokens too, on two threads."""
    monkeypatch.setattr(planning, "MIN_CHUNK", request.param)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    return int(request.param)


@given(
    seed=st.integers(0, 2**32),
    spec=SPECS,
    page=st.sampled_from([1, 4, 16]),
    sequences=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    small=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_dense(
    seed: int, spec: AttentionSpec, page: int, sequences: int, dtype: torch.dtype, small: bool
) -> None:
    layout, pool = random_step(random.Random(seed), page=page, sequences=sequences)
    pages = random_pages(seed, pool, page, spec.shape, dtype)
    q = random_queries(seed + 1, layout.rows, spec.shape)
    with pytest.MonkeyPatch.context() as patch:
        if small:
            patch.setattr(planning, "MIN_CHUNK", 4)
            patch.setattr(torch, "get_num_threads", lambda: 2)
        assert_close(run(layout, q, pages, spec, Dense()), naive_attention(q, pages, layout, spec))


def test_empty_step() -> None:
    layout = make_layout([], [], [], 16)
    spec = AttentionSpec(HeadShape(2, 1, 8), 1.0)
    pages = random_pages(0, 4, 16, spec.shape, torch.float32)
    assert run(layout, torch.empty(0, 2, 8), pages, spec, Dense()).shape == (0, 2, 8)


def test_layers_with_different_windows_share_one_plan(chunk: int) -> None:
    layout, pool = random_step(random.Random(5), page=4, sequences=4)
    kernel = DenseKernel()
    plan = kernel.plan(layout)
    for window in (None, 3, None, 7, 3):
        spec = AttentionSpec(HeadShape(6, 2, 16), 0.3, window)
        pages = random_pages(1, pool, 4, spec.shape, torch.float32)
        q = random_queries(2, layout.rows, spec.shape)
        out = kernel.run(plan, 0, q, pages, layout, spec, Dense())
        assert_close(out, naive_attention(q, pages, layout, spec))
    assert len(plan.parts) == 3


def test_scores_are_observed(chunk: int) -> None:
    for window, cap in ((None, None), (5, 20.0)):
        layout, pool = random_step(random.Random(9), page=4, sequences=5)
        spec = AttentionSpec(HeadShape(6, 2, 16), 0.3, window, cap)
        pages = random_pages(3, pool, 4, spec.shape, torch.float32)
        q = random_queries(4, layout.rows, spec.shape)
        observe = Mock()
        out = run(layout, q, pages, spec, DenseScores(), observe)
        assert_close(out, naive_attention(q, pages, layout, spec))
        observe.assert_called_once()
        layer, probs, seen_layout = observe.call_args.args
        assert (layer, seen_layout) == (0, layout)
        assert_close(probs, naive_scores(q, pages, layout, spec))
        run(layout, q, pages, spec, DenseScores())  # nobody listens


@given(seed=st.integers(0, 2**32), per_head=st.booleans(), share=st.sampled_from([0.0, 0.5, 1.0]))
@settings(max_examples=40, deadline=None)
def test_tokens(seed: int, per_head: bool, share: float) -> None:
    """Chosen rows see their tokens only; the others stay dense."""
    rng = random.Random(seed)
    layout, pool = random_step(rng, page=4, sequences=5)
    spec = AttentionSpec(HeadShape(6, 2, 16), 0.3)
    pages = random_pages(seed, pool, 4, spec.shape, torch.float32)
    q = random_queries(seed + 1, layout.rows, spec.shape)
    chosen = [t for t in range(layout.rows) if rng.random() < share]
    choices, most = (6 if per_head else 2), 6
    index = torch.zeros(len(chosen), choices, most, dtype=torch.int32)
    count = torch.zeros(len(chosen), choices, dtype=torch.int32)
    probs = naive_scores(q, pages, layout, spec)
    for r, t in enumerate(chosen):
        visible = int((probs[t, 0] > 0).sum())
        for x in range(choices):
            tokens = sorted(rng.sample(range(visible), min(visible, rng.randint(1, most))))
            index[r, x, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
            count[r, x] = len(tokens)
            heads = slice(x, x + 1) if per_head else slice(3 * x, 3 * x + 3)
            hidden = torch.ones(probs.shape[2], dtype=torch.bool)
            hidden[tokens] = False
            probs[t, heads] = probs[t, heads].masked_fill(hidden, 0.0)
    probs /= probs.sum(-1, keepdim=True)
    selection = TokenSelection(torch.tensor(chosen, dtype=torch.int64), index, count)
    assert_close(run(layout, q, pages, spec, selection), weighted_values(probs, pages, layout, spec))


@given(
    seed=st.integers(0, 2**32),
    choices=st.sampled_from([1, 2, 6]),
    block=st.sampled_from([4, 8]),
    window=st.sampled_from([None, 6]),
    small=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_blocks(seed: int, choices: int, block: int, window: int | None, small: bool) -> None:
    """Two of three sequences are block-sparse, the third stays dense."""
    rng = random.Random(seed)
    rows = [rng.randint(1, 40), rng.randint(1, 5), rng.randint(1, 20)]
    lengths = [n + rng.randint(0, 30) for n in rows]
    free = list(range(80))
    rng.shuffle(free)
    tables = [[free.pop() for _ in range(-(-length // 4))] for length in lengths]
    layout = make_layout(tables, lengths, rows, 4)
    spec = AttentionSpec(HeadShape(6, 2, 16), 0.3, window)
    pages = random_pages(seed, 80, 4, spec.shape, torch.float32)
    q = random_queries(seed + 1, layout.rows, spec.shape)
    probs = naive_scores(q, pages, layout, spec)
    selection = []
    for s in (2, 0):
        keep = np.array([rng.random() < 0.5 for _ in range(choices * 12 * 20)]).reshape(choices, 12, 20)
        begin, first = int(layout.query_start_S1[s]), lengths[s] - rows[s]
        query = [(first + i) // block - first // block for i in range(rows[s])]
        for i in range(rows[s]):
            keep[:, query[i], (first + i) // block] = True
        for i in range(rows[s]):
            for h in range(6):
                gone = ~np.repeat(keep[h * choices // 6, query[i]], block)[: probs.shape[2]]
                probs[begin + i, h, torch.from_numpy(gone)] = 0.0
        selection.append(BlockSelection(s, block, torch.from_numpy(keep)))
    probs /= probs.sum(-1, keepdim=True)
    with pytest.MonkeyPatch.context() as patch:
        if small:
            patch.setattr(planning, "MIN_CHUNK", 4)
            patch.setattr(torch, "get_num_threads", lambda: 2)
        out = run(layout, q, pages, spec, tuple(selection))
    assert_close(out, weighted_values(probs, pages, layout, spec))


def test_block_selections_that_do_not_fit() -> None:
    layout = make_layout([[0, 1, 2, 3]], [16], [8], 4)
    spec = AttentionSpec(HeadShape(6, 2, 16), 0.3)
    pages = random_pages(0, 4, 4, spec.shape, torch.float32)
    q = random_queries(1, 8, spec.shape)
    keep = torch.ones(1, 2, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="at least one token"):
        run(layout, q, pages, spec, (BlockSelection(0, 0, keep),))
    with pytest.raises(ValueError, match="order_XL must be"):
        run(layout, q, pages, spec, (BlockSelection(0, 4, keep, torch.arange(8, dtype=torch.int32)[None]),))
    with pytest.raises(ValueError, match="too small"):
        run(layout, q, pages, spec, (BlockSelection(0, 4, keep[:, :1]),))
    with pytest.raises(ValueError, match="head groups"):
        run(layout, q, pages, spec, (BlockSelection(0, 4, keep.expand(3, -1, -1)),))
    with pytest.raises(ValueError, match="nothing to read"):
        run(layout, q, pages, spec, (BlockSelection(0, 4, keep & (torch.arange(4) > 2)),))
    with pytest.raises(UnsupportedError, match="cannot read a str"):
        run(layout, q, pages, spec, "everything")


def test_plan_is_taken_over_while_sequences_decode(chunk: int) -> None:
    """Every step of a decode equals a fresh kernel; within a page the lists of the first step are reused."""
    rng = random.Random(2)
    page, lengths = 4, [9, 30, 17]
    free = list(range(60))
    rng.shuffle(free)
    tables = [[free.pop() for _ in range(-(-n // page))] for n in lengths]
    pages = random_pages(7, 60, page, HeadShape(6, 2, 16), torch.float32)
    specs = [AttentionSpec(HeadShape(6, 2, 16), 0.3, window) for window in (None, 6)]
    kernel, reused = DenseKernel(), 0
    for step in range(12):
        lengths = [n + 1 for n in lengths]
        for table, length in zip(tables, lengths, strict=True):
            if len(table) * page < length:
                table.append(free.pop())
        layout = make_layout(tables, lengths, [1, 1, 1], page)
        plan = kernel.plan(layout)
        reused += bool(plan.earlier)
        for spec in specs:
            q = random_queries(step, 3, spec.shape)
            out = kernel.run(plan, 0, q, pages, layout, spec, Dense())
            assert_close(out, naive_attention(q, pages, layout, spec))
    assert reused >= 3


def test_taken_over_plan_notices_other_pages_and_other_sequences() -> None:
    spec = AttentionSpec(HeadShape(2, 1, 16), 0.3)
    pages = random_pages(7, 20, 4, spec.shape, torch.float32)
    kernel = DenseKernel()
    for step, (tables, ids) in enumerate(
        [([[0, 1], [2, 3]], (0, 1)), ([[0, 1], [2, 4]], (0, 1)), ([[5, 1], [2, 4]], (2, 1)), ([[5, 1]], (2,))]
    ):
        layout = make_layout(tables, [6 + step % 2] * len(tables), [1] * len(tables), 4, ids)
        q = random_queries(step, len(tables), spec.shape)
        out = kernel.run(kernel.plan(layout), 0, q, pages, layout, spec, Dense())
        assert_close(out, naive_attention(q, pages, layout, spec))
