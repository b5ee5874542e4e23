"""Attention over block lists, pools, importance and order of keys against plain PyTorch, at every level."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.kernels import available_levels
from hasten.kernels import block_list as kernel
from hasten.kernels.block_list import TILE, BlockLists, Cached, Codes, Visits
from hasten.kernels.native import _module
from hasten.kernels.pages import quantise
from hasten.kernels.reference import block_list as reference


@pytest.fixture(params=available_levels(), autouse=True, scope="module")
def level(request):
    """Run every test of this file with each level's module."""
    patch = pytest.MonkeyPatch()
    patch.setattr(kernel, "native", lambda: _module(request.param))
    yield request.param
    patch.undo()


def make(seed: int, length: int, groups: int, size: int, page: int, dtype: torch.dtype) -> Cached:
    generator = torch.Generator().manual_seed(seed)
    used = -(-length // page)
    pool = torch.randn(2, used + 2, groups, page, size, generator=generator)
    k, v = (quantise(x) if dtype is torch.int8 else x.to(dtype) for x in pool)
    table = torch.randperm(used + 2, generator=generator)[: max(used, 1)].to(torch.int32)
    return Cached(k.contiguous(), v.contiguous(), table, length)


def lists_of(
    seed: int, rows: int, length: int, choices: int, block: int, query_block: int, ordered: bool, share: float
) -> BlockLists:
    """Random lists under which every row has something to read; in an order of their own if ``ordered``."""
    generator = torch.Generator().manual_seed(seed)
    queries, blocks = kernel.query_blocks(rows, length, query_block), -(-length // block)
    keep = torch.rand(choices, queries, blocks, generator=generator) < share
    order = None
    if ordered:
        score = torch.rand(choices, length, generator=generator)
        whole = length // (2 * block) * 2 * block
        order = reference.order_blocks(score[:, :whole], length, block, 2 * block).to(torch.int32)
    where = torch.zeros(choices, length, dtype=torch.int64) if order is None else order.long()
    for x in range(choices):
        inverse = where[x].argsort() if order is not None else torch.arange(length)
        keep[x, :, inverse[0] // block] = True  # the first token
    start = torch.zeros(choices * queries + 1, dtype=torch.int32)
    start[1:] = keep.sum(2).flatten().cumsum(0)
    return BlockLists(choices, block, query_block, start, keep.nonzero()[:, 2].to(torch.int32), order)


shapes = st.sampled_from([(1, 1, 8), (6, 2, 16), (3, 3, 20), (9, 3, 64)])


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    shape=shapes,
    rows=st.integers(0, 150),
    before=st.integers(0, 200),
    page=st.sampled_from([1, 4, 32]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
    blocks=st.sampled_from([(4, 4), (16, 32), (64, 128), (128, 128), (7, 5)]),
    choice=st.sampled_from(["one", "group", "head"]),
    ordered=st.booleans(),
    window=st.sampled_from([None, None, 33]),
    cap=st.sampled_from([None, None, 8.0]),
)
def test_attention_over_lists(
    seed, shape, rows, before, page, dtype, blocks, choice, ordered, window, cap
) -> None:
    heads, groups, size = shape
    length = rows + before
    if length == 0:
        return
    cached = make(seed, length, groups, size, page, dtype)
    q = torch.randn(rows, heads, size, generator=torch.Generator().manual_seed(seed + 1))
    choices = {"one": 1, "group": groups, "head": heads}[choice]
    share = 1.0 if window is not None else 0.4
    lists = lists_of(seed + 2, rows, length, choices, *blocks, ordered, share)
    out, lse = kernel.attend_blocks(q, cached, lists, 0.3, cap, window=window)
    want, want_lse = reference.attend_blocks(q, cached, lists, 0.3, cap, window=window)
    torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, atol=2e-5, rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    shape=st.sampled_from([(6, 2, 16), (9, 3, 64)]),
    rows=st.integers(1, 200),
    before=st.integers(0, 150),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    bits=st.sampled_from([4, 8, 12]),
)
def test_rounded_products(seed, shape, rows, before, dtype, bits) -> None:
    heads, groups, size = shape
    cached = make(seed, rows + before, groups, size, 16, dtype)
    center = torch.randn(groups, size, generator=torch.Generator().manual_seed(seed))
    codes = kernel.quantise_keys(cached, center, bits)
    assert codes.code_GWD2.abs().max() <= codes.limit == 2 ** (bits - 1) - 1
    got, want = (
        reference.decode(codes, cached.length),
        reference.quantise_keys(cached, center, codes.limit).double(),
    )
    step = codes.scale_GW.repeat_interleave(TILE, 1)[:, : cached.length, None]
    off = (got - want).abs()
    assert (off <= 1.001 * step).all()  # a tie may fall either way
    assert (off > 1e-5).float().mean() < 0.01
    q = torch.randn(rows, heads, size, generator=torch.Generator().manual_seed(seed + 1))
    lists = lists_of(seed, rows, cached.length, heads, 64, 128, False, 0.5)
    out, _ = kernel.attend_blocks(q, cached, lists, 0.2, codes=codes)
    expected, _ = reference.attend_blocks(q, cached, lists, 0.2, codes=codes)
    # Codes are exact up to ties of the queries' rounding.
    torch.testing.assert_close(out.double(), expected, atol=0.25 / codes.limit + 3e-2, rtol=1e-3)
    assert (out.double() - expected).abs().mean() < 1e-2 / codes.limit


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    shape=shapes,
    rows=st.integers(1, 100),
    length=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
    cap=st.sampled_from([None, 5.0]),
)
def test_importance_of_keys(seed, shape, rows, length, dtype, cap) -> None:
    heads, groups, size = shape
    cached = make(seed, length, groups, size, 16, dtype)
    q = torch.randn(rows, heads, size, generator=torch.Generator().manual_seed(seed + 1))
    count = max(1, length - seed % 5)
    got = kernel.probe_keys(q, cached, count, 0.3, cap)
    torch.testing.assert_close(
        got.double(), reference.probe_keys(q, cached, count, 0.3, cap), atol=1e-6, rtol=1e-4
    )


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    heads=st.integers(1, 4),
    length=st.integers(0, 300),
    block=st.sampled_from([1, 4, 16]),
    per=st.integers(1, 4),
    ties=st.booleans(),
)
def test_order_of_keys(seed, heads, length, block, per, ties) -> None:
    segment = block * per
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(heads, length // segment * segment, generator=generator)
    if ties:
        score = (4 * score).floor()
        score[score == 3] = torch.nan
    got = kernel.order_blocks(score, length, block, segment)
    assert torch.equal(got.long(), reference.order_blocks(score, length, block, segment))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    shape=shapes,
    length=st.integers(1, 300),
    block=st.sampled_from([1, 5, 64, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
    ordered=st.booleans(),
)
def test_pools_and_self_similarity(seed, shape, length, block, dtype, ordered) -> None:
    heads, groups, size = shape
    cached = make(seed, length, groups, size, 8, dtype)
    x = reference.tokens(cached.k_NGPD, cached.table_M, length)
    center = x.mean(1)
    choices = heads if ordered else groups
    x = (x - center[:, None]).repeat_interleave(choices // groups, 0)
    order = None
    if ordered:
        generator = torch.Generator().manual_seed(seed)
        order = torch.stack([torch.randperm(length, generator=generator) for _ in range(choices)])
        x = x.gather(1, order[..., None].expand_as(x))
        order = order.to(torch.int32)
    mean, similarity = kernel.pool_keys(
        cached, block, choices=choices, order_XL=order, center_GD=center, similarity=True
    )
    want, gram = reference.pool(x, block)
    torch.testing.assert_close(mean.double(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(similarity.double(), gram, atol=1e-5, rtol=1e-4)
    q = torch.randn(length, heads, size, generator=torch.Generator().manual_seed(seed + 1))
    first = seed % 200
    mean, similarity = kernel.pool_rows(q, first, block, similarity=True)
    want, gram = reference.pool(q.transpose(0, 1), block, first)
    torch.testing.assert_close(mean.double(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(similarity.double(), gram, atol=1e-5, rtol=1e-4)


def test_leaving_out_what_is_negligible() -> None:
    """Tiles far below are left out and counted; with no floor nothing is; what is left out hardly matters."""
    heads, size, length = 3, 16, 512
    cached = make(0, length, 1, size, 16, torch.float32)
    cached.k_NGPD[:, :, :, 0] = -6.0
    page = int(cached.table_M[0])
    cached.k_NGPD[page, :, :, 0] = 6.0  # the first 16 tokens get nearly everything
    q = torch.randn(length, heads, size, generator=torch.Generator().manual_seed(1))
    q[..., 0] = 6.0
    lists = lists_of(0, length, length, 1, 64, 128, False, 1.0)
    exact, filtered = Visits(), Visits()
    want, _ = kernel.attend_blocks(q, cached, lists, 0.5, visits=exact)
    got, _ = kernel.attend_blocks(q, cached, lists, 0.5, floor_H=torch.full((heads,), -20.0), visits=filtered)
    assert exact.skipped == 0
    assert filtered.met == exact.met
    assert filtered.share > 0.5
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)
    mild = Visits()
    kernel.attend_blocks(q, cached, lists, 0.5, floor_H=torch.full((heads,), -500.0), visits=mild)
    assert mild.skipped == 0


def test_a_group_of_rows_is_left_out_only_if_every_row_is() -> None:
    """One row of six still looks at the far tile: then the six of them do."""
    cached = make(0, 128, 1, 8, 16, torch.float32)
    cached.k_NGPD[:] = 0.0
    cached.k_NGPD[cached.table_M[:4].long(), :, :, 0] = 30.0  # the first tile
    q = torch.zeros(12, 1, 8)
    q[:, 0, 0] = 1.0
    q[8, 0, 0] = -1.0  # of the second group
    cached = Cached(cached.k_NGPD, cached.v_NGPD, cached.table_M, 128)
    lists = lists_of(0, 12, 128, 1, 64, 64, False, 1.0)
    visits = Visits()
    out, _ = kernel.attend_blocks(q, cached, lists, 1.0, floor_H=torch.full((1,), -20.0), visits=visits)
    assert (visits.met, visits.skipped) == (4, 1)
    want, _ = reference.attend_blocks(q, cached, lists, 1.0)
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)


def test_numbers_that_are_not_finite_are_passed_on() -> None:
    cached = make(0, 200, 2, 16, 16, torch.float32)
    q = torch.randn(200, 4, 16)
    q[150, 1, 3] = torch.nan
    lists = lists_of(0, 200, 200, 4, 64, 64, True, 1.0)
    out, _ = kernel.attend_blocks(q, cached, lists, 0.3)
    assert out[150, 1].isnan().all()
    assert out.isnan().sum() == 16


def test_what_does_not_fit_is_refused(level) -> None:
    cached = make(0, 64, 2, 16, 16, torch.float32)
    q = torch.randn(32, 4, 16)
    lists = lists_of(0, 32, 64, 4, 16, 16, False, 1.0)
    order = torch.arange(64, dtype=torch.int32).repeat(4, 1)

    def attempt(x: BlockLists = lists, y: Cached = cached, **changes: object) -> None:
        kernel.attend_blocks(q, y, x, 0.3, **changes)

    def with_lists(**changes: object) -> BlockLists:
        return BlockLists(**{**lists.__dict__, **changes})

    with pytest.raises(ValueError, match="rise from 0"):
        attempt(with_lists(start_J1=lists.start_J1[:-1]))
    with pytest.raises(ValueError, match="blocks of the sequence"):
        attempt(with_lists(block_C=lists.block_C + 1))
    with pytest.raises(ValueError, match="nothing to read"):
        attempt(with_lists(block_C=lists.block_C[:0], start_J1=lists.start_J1 * 0))
    with pytest.raises(ValueError, match="every token once"):
        attempt(with_lists(order_XL=order * 0))
    with pytest.raises(ValueError, match="rise within a block"):
        attempt(with_lists(order_XL=order.flip(1).contiguous()))
    with pytest.raises(ValueError, match="order_XL must be"):
        attempt(with_lists(order_XL=order[:, :-1]))
    with pytest.raises(ValueError, match="one per kv head"):
        attempt(with_lists(choices=3))
    with pytest.raises(TypeError, match="block_C must be int32"):
        attempt(with_lists(block_C=lists.block_C.long()))
    with pytest.raises(ValueError, match="fewer pages"):
        attempt(y=Cached(cached.k_NGPD, cached.v_NGPD, cached.table_M[:2], 64))
    with pytest.raises(ValueError, match="outside the pool"):
        attempt(y=Cached(cached.k_NGPD, cached.v_NGPD, cached.table_M + 50, 64))
    with pytest.raises(ValueError, match="more rows than tokens"):
        attempt(y=Cached(cached.k_NGPD, cached.v_NGPD, cached.table_M, 16))
    with pytest.raises(ValueError, match="softcap"):
        kernel.attend_blocks(q, cached, lists, 0.3, 5.0, floor_H=torch.full((4,), -1.0))
    with pytest.raises(ValueError, match="floor_H must be"):
        attempt(floor_H=torch.zeros(3))
    with pytest.raises(ValueError, match="codes of"):
        attempt(codes=Codes(torch.zeros(1, 1, 8, 64, 2, dtype=torch.int16), torch.zeros(1, 1), 127))
    with pytest.raises(ValueError, match="whole tiles"):
        attempt(codes=kernel.quantise_keys(cached, torch.zeros(2, 16)))
    with pytest.raises(ValueError, match="bits must be"):
        kernel.quantise_keys(cached, torch.zeros(2, 16), 13)
    with pytest.raises(ValueError, match="window"):
        attempt(window=0)
    with pytest.raises(ValueError, match="nothing to probe"):
        kernel.probe_keys(q, cached, 65, 0.3)
    with pytest.raises(ValueError, match="whole blocks"):
        kernel.order_blocks(torch.zeros(1, 64), 64, 16, 24)
    with pytest.raises(ValueError, match="whole segments"):
        kernel.order_blocks(torch.zeros(1, 60), 64, 16, 32)
    with pytest.raises(ValueError, match="center_GD must be"):
        kernel.pool_keys(cached, 16, center_GD=torch.zeros(3, 16))
    with pytest.raises(ValueError, match="past the end"):
        kernel.pool_keys(cached, 16, choices=4, order_XL=order + 1)
    with pytest.raises(ValueError, match="no rows"):
        kernel.pool_rows(q[:0], 0, 16)
