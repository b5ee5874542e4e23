"""The merge of partial attention results: one part is the identity, order and nesting do not matter, empties vanish."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.kernels.attention import merge
from hasten.kernels.native import _module, available_levels
from hasten.kernels.reference import attention as reference

pytestmark = pytest.mark.usefixtures("one_thread")

LEVELS = [pytest.param(_module(name), id=name) for name in available_levels()]
EMPTY = float("-inf")


def parts_of(seed: int, parts: int, heads: int, size: int, empty: float = 0.2) -> tuple[Tensor, Tensor]:
    """Random parts; some are empty (out 0, lse -inf), lse is spread over a wide range."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(parts, heads, size, generator=generator)
    lse = 20 * torch.randn(parts, heads, generator=generator)
    gone = torch.rand(parts, heads, generator=generator) < empty
    return out.masked_fill(gone[..., None], 0.0), lse.masked_fill(gone, EMPTY)


def one_row(parts: int) -> tuple[Tensor, Tensor]:
    return torch.tensor([0, parts], dtype=torch.int32), torch.arange(parts, dtype=torch.int32)


@pytest.mark.parametrize("module", LEVELS)
@given(
    seed=st.integers(0, 2**32),
    counts=st.lists(st.integers(0, 5), max_size=8),
    heads=st.integers(1, 9),
    size=st.sampled_from([1, 7, 8, 40, 64]),
)
@settings(max_examples=60, deadline=None)
def test_equals_reference(module: ModuleType, seed: int, counts: list[int], heads: int, size: int) -> None:
    out, lse = parts_of(seed, sum(counts), heads, size)
    start = torch.tensor([0, *torch.tensor(counts, dtype=torch.int32).cumsum(0)], dtype=torch.int32)
    entry = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed)).int()
    expected = reference.merge(out.double(), lse.double(), start, entry)
    got = merge(out, lse, start, entry, module=module)
    torch.testing.assert_close(got[0].double(), expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[1].double(), expected[1], atol=1e-5, rtol=1e-5)
    empty = torch.isinf(expected[1])
    assert (got[0][empty] == 0).all()
    assert (got[1][empty] == EMPTY).all()


@pytest.mark.parametrize("module", LEVELS)
@given(seed=st.integers(0, 2**32), heads=st.integers(1, 5), size=st.sampled_from([3, 8, 64]))
@settings(max_examples=30, deadline=None)
def test_one_part_is_identity(module: ModuleType, seed: int, heads: int, size: int) -> None:
    out, lse = parts_of(seed, 1, heads, size)
    merged = merge(out, lse, *one_row(1), module=module)
    assert torch.equal(merged[0], out)
    assert torch.equal(merged[1], lse)


@pytest.mark.parametrize("module", LEVELS)
@given(seed=st.integers(0, 2**32), parts=st.integers(2, 6), cut=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_order_and_nesting_do_not_matter(module: ModuleType, seed: int, parts: int, cut: int) -> None:
    cut = min(cut, parts - 1)
    out, lse = parts_of(seed, parts, 3, 16)
    start, entry = one_row(parts)
    flat = merge(out, lse, start, entry, module=module)
    shuffled = merge(out, lse, start, entry[torch.randperm(parts)].contiguous(), module=module)
    left = merge(out[:cut].contiguous(), lse[:cut].contiguous(), *one_row(cut), module=module)
    right = merge(out[cut:].contiguous(), lse[cut:].contiguous(), *one_row(parts - cut), module=module)
    nested = merge(torch.cat((left[0], right[0])), torch.cat((left[1], right[1])), *one_row(2), module=module)
    for other in (shuffled, nested):
        torch.testing.assert_close(other[0], flat[0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(other[1], flat[1], atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("module", LEVELS)
def test_all_empty_and_no_parts(module: ModuleType) -> None:
    out, lse = torch.randn(2, 2, 8), torch.full((2, 2), EMPTY)
    start, entry = torch.tensor([0, 2, 2], dtype=torch.int32), torch.arange(2, dtype=torch.int32)
    merged, total = merge(out, lse, start, entry, module=module)
    assert (merged == 0).all()
    assert (total == EMPTY).all()


@pytest.mark.parametrize("module", LEVELS)
def test_empty_part_may_hold_rubbish_and_nan_shows(module: ModuleType) -> None:
    out, lse = torch.randn(2, 1, 8), torch.tensor([[EMPTY], [1.0]])
    out[0] = float("nan")
    merged, _ = merge(out, lse, *one_row(2), module=module)
    assert torch.equal(merged[0], out[1])
    lse[0] = float("nan")
    merged, total = merge(out, lse, *one_row(2), module=module)
    assert torch.isnan(merged).all()
    assert torch.isnan(total).all()


@pytest.mark.parametrize(
    ("start", "entry", "match"),
    [
        ([0, 3], [0, 1], "entry_start_T1"),
        ([1, 2], [0, 1], "entry_start_T1"),
        ([0, 2, 1], [0, 1], "entry_start_T1"),
        ([0, 2], [0, 2], "entry_E"),
        ([0, 2], [0, -1], "entry_E"),
        ([], [], "entry_start_T1"),
    ],
)
def test_bad_indices_are_refused(start: list[int], entry: list[int], match: str) -> None:
    out, lse = parts_of(0, 2, 2, 8)
    with pytest.raises(ValueError, match=match):
        merge(out, lse, torch.tensor(start, dtype=torch.int32), torch.tensor(entry, dtype=torch.int32))


def test_bad_shapes_are_refused() -> None:
    out, lse = parts_of(0, 2, 2, 8)
    with pytest.raises(ValueError, match="lse_EH"):
        merge(out, lse[:1], *one_row(2))
    with pytest.raises(TypeError, match="lse_EH"):
        merge(out, lse.double(), *one_row(2))
