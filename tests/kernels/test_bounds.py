"""Boxes around blocks of keys against the PyTorch reference, at every instruction-set level this CPU runs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.kernels import available_levels, bounds
from hasten.kernels.bounds import KeepRule
from hasten.kernels.native import _module
from hasten.kernels.pages import quantise
from hasten.kernels.reference import bounds as reference


@pytest.fixture(params=available_levels(), autouse=True, scope="module")
def level(request):
    """Run every test of this file with each level's module."""
    patch = pytest.MonkeyPatch()
    patch.setattr(bounds, "native", lambda: _module(request.param))
    yield request.param
    patch.undo()


def empty(pages, kv_heads, blocks, size, dtype):
    return torch.full((pages, kv_heads, blocks, 2, size), math.nan, dtype=dtype)


SHAPES = {
    "kv_heads": st.integers(1, 3),
    "size": st.sampled_from([1, 7, 8, 20, 64]),
    "block": st.sampled_from([1, 3, 16]),
    "per": st.integers(1, 3),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
    "seed": st.integers(0, 1000),
}


@settings(max_examples=25, deadline=None)
@given(length=st.integers(0, 130), cut=st.integers(0, 130), **SHAPES)
def test_appending_in_any_pieces_gives_the_reference_s_boxes(
    length, cut, kv_heads, size, block, per, dtype, seed
):
    generator = torch.Generator().manual_seed(seed)
    page = block * per
    pages = -(-length // page) + 1
    table = torch.randperm(pages, generator=generator)
    k_TGD = torch.randn(length, kv_heads, size, generator=generator)
    at = torch.arange(length)
    slot_T = table[at // page] * page + at % page
    got, want = empty(pages, kv_heads, per, size, dtype), empty(pages, kv_heads, per, size, dtype)
    for part in (slice(0, cut), slice(cut, None)):
        bounds.bounds_append(k_TGD[part], slot_T[part], got, page)
    reference.bounds_append(k_TGD, slot_T, want, page)
    assert torch.equal(got.nan_to_num(9e9), want.nan_to_num(9e9))
    if length:
        blocks = torch.arange(-(-length // block))
        assert torch.equal(got[table[blocks // per], :, blocks % per], reference.boxes(k_TGD, block, dtype))


@settings(max_examples=25, deadline=None)
@given(kind=st.sampled_from([torch.float32, torch.bfloat16, torch.int8]), count=st.integers(0, 9), **SHAPES)
def test_rebuilding_forgets_what_stood_there(kind, count, kv_heads, size, block, per, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    k_NGPD = torch.randn(4, kv_heads, block * per, size, generator=generator)
    k_NGPD = quantise(k_NGPD) if kind is torch.int8 else k_NGPD.to(kind)
    block_W = torch.randperm(4 * per, generator=generator)[:count]
    count_W = torch.randint(1, block + 1, block_W.shape, generator=generator, dtype=torch.int32)
    got = torch.full((4, kv_heads, per, 2, size), 100.0, dtype=dtype)
    want = got.clone()
    bounds.bounds_rebuild(k_NGPD, block_W, count_W, got)
    reference.bounds_rebuild(k_NGPD, block_W, count_W, want)
    assert torch.equal(got, want)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 3),
    group=st.integers(1, 4),
    ratio=st.sampled_from([0.05, 0.1, 0.5, 1.0]),
    least=st.integers(1, 9),
    local=st.integers(0, 2),
    longest=st.integers(1, 500),
    **SHAPES,
)
def test_the_most_promising_blocks_are_chosen(
    rows, group, ratio, least, local, longest, kv_heads, size, block, per, dtype, seed
):
    rule = KeepRule(ratio, max(least, local), local)
    generator = torch.Generator().manual_seed(seed)
    page = block * per
    each = -(-longest // page)
    table_RM = torch.randperm(max(rows, 1) * each, generator=generator).to(torch.int32).view(-1, each)[:rows]
    length_R = torch.randint(1, longest + 1, (rows,), generator=generator, dtype=torch.int32)
    sidecar = torch.randn(max(rows, 1) * each, kv_heads, per, 2, size, generator=generator).sort(3).values
    sidecar = sidecar.to(dtype)
    q_RHD = torch.randn(rows, group * kv_heads, size, generator=generator)
    index_RGK, count_RG = bounds.bounds_choose(q_RHD, table_RM, length_R, sidecar, page, rule)
    assert index_RGK.shape[:2] == count_RG.shape == (rows, kv_heads)
    for r in range(rows):
        length = int(length_R[r])
        blocks = -(-length // block)
        boxes = sidecar[table_RM[r].long()].transpose(1, 2).reshape(each * per, kv_heads, 2, size)[:blocks]
        score_GC = reference.bounds_score(q_RHD[r], boxes)
        for g in range(kv_heads):
            index = index_RGK[r, g, : count_RG[r, g]]
            chosen = (index // block).unique()
            assert len(chosen) == rule.kept(blocks)
            whole = torch.cat(
                [torch.arange(c * block, min(c * block + block, length)) for c in chosen.tolist()]
            )
            assert torch.equal(index.long(), whole)
            left = torch.ones(blocks, dtype=torch.bool)
            left[chosen.long()] = False
            assert not left[blocks - min(local, blocks) :].any()
            free = chosen[chosen < blocks - local].long()
            if left.any() and len(free):
                assert score_GC[g, free].min() >= score_GC[g, left].max() - 1e-4


def test_of_equal_blocks_the_later_ones_are_chosen_and_nan_has_no_chance():
    sidecar = torch.zeros(10, 1, 1, 2, 8)
    sidecar[9] = sidecar[8] = math.nan
    table, length = torch.arange(10, dtype=torch.int32)[None], torch.tensor([160], dtype=torch.int32)
    index, count = bounds.bounds_choose(torch.ones(1, 1, 8), table, length, sidecar, 16, KeepRule(0.1, 3, 0))
    assert count.tolist() == [[48]]
    assert (index[0, 0] // 16).unique().tolist() == [5, 6, 7]


@pytest.mark.parametrize("least", [1, 3, 16])
@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.5, 0.9, 0.95, 0.999])
def test_a_rule_says_from_where_on_it_leaves_blocks_out(ratio, least):
    rule = KeepRule(ratio, least, 1)
    whole = rule.whole
    assert all(rule.kept(n) == n for n in range(whole + 1))
    assert all(rule.kept(n) < n for n in range(whole + 1, whole + 2000))
    assert KeepRule(1.0, least, 1).whole is None


def test_a_tenth_of_thirty_blocks_is_three():
    assert [KeepRule(0.1, 1, 1).kept(n) for n in (10, 30, 31, 70)] == [1, 3, 4, 7]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"bounds": torch.zeros(2, 1, 2, 8)}, ValueError, r"\[N, G, P / B, 2, D\]"),
        ({"bounds": torch.zeros(2, 1, 2, 2, 8, dtype=torch.float16)}, TypeError, "float32 or bfloat16"),
        ({"page_size": 33}, ValueError, "do not divide"),
        ({"k": torch.zeros(3, 2, 8)}, ValueError, "k_TGD"),
        ({"k": torch.zeros(3, 1, 8, dtype=torch.float64)}, TypeError, "k_TGD"),
        ({"slot": torch.tensor([0, 1, 64])}, ValueError, "slot"),
        ({"slot": torch.tensor([0, 1])}, ValueError, "slot_T"),
    ],
)
def test_append_refuses_what_does_not_fit(change, error, match):
    good = {
        "k": torch.zeros(3, 1, 8),
        "slot": torch.arange(3),
        "bounds": torch.zeros(2, 1, 2, 2, 8),
        "page_size": 32,
    }
    with pytest.raises(error, match=match):
        bounds.bounds_append(*(good | change).values())


def test_choose_and_rebuild_refuse_what_does_not_fit():
    sidecar, rule = torch.zeros(2, 2, 2, 2, 8), KeepRule(0.5, 1, 1)
    table, length = torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([40], dtype=torch.int32)
    q = torch.zeros(1, 4, 8)
    for bad in (
        {"table": torch.tensor([[0, 2]], dtype=torch.int32)},
        {"length": torch.tensor([65], dtype=torch.int32)},
        {"length": torch.tensor([0], dtype=torch.int32)},
        {"q": torch.zeros(1, 3, 8)},
        {"q": torch.zeros(1, 4, 9)},
    ):
        call = {"q": q, "table": table, "length": length} | bad
        with pytest.raises(ValueError):
            bounds.bounds_choose(*call.values(), sidecar, 32, rule)
    k_NGPD = torch.zeros(2, 2, 32, 8)
    with pytest.raises(ValueError, match="outside the pool"):
        bounds.bounds_rebuild(k_NGPD, torch.tensor([4]), torch.tensor([1], dtype=torch.int32), sidecar)
    with pytest.raises(ValueError, match="one token at least"):
        bounds.bounds_rebuild(k_NGPD, torch.tensor([3]), torch.tensor([17], dtype=torch.int32), sidecar)
    with pytest.raises(ValueError, match="fit bounds"):
        bounds.bounds_rebuild(k_NGPD[:1], torch.tensor([0]), torch.tensor([1], dtype=torch.int32), sidecar)


@pytest.mark.parametrize("rule", [(0.0, 16, 1), (1.1, 16, 1), (math.nan, 16, 1), (0.1, 0, 0), (0.1, 2, 3)])
def test_a_rule_that_makes_no_sense_is_refused(rule):
    with pytest.raises(ValueError, match="must be"):
        KeepRule(*rule)


def test_a_selector_needs_something_to_leave_out():
    with pytest.raises(ValueError, match="nothing to select"):
        bounds.BoundsSelector(torch.zeros(2, 2, 2, 2, 8), 32, KeepRule(1.0, 16, 1), heads=4)
    with pytest.raises(ValueError, match="multiple of kv heads"):
        bounds.BoundsSelector(torch.zeros(2, 2, 2, 2, 8), 32, KeepRule(0.1, 16, 1), heads=5)
