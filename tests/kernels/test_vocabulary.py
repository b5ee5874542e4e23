"""Passes over logits against PyTorch, on every instruction-set level."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.kernels.native import _module, available_levels
from hasten.kernels.vocabulary import all_finite, argmax

LEVELS = [pytest.param(_module(name), id=name) for name in available_levels()]
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("module", LEVELS)
@settings(max_examples=40, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 7]),
    width=st.one_of(st.integers(1, 70), st.just(50_000)),
    values=st.sampled_from([2, 1000]),
    seed=st.integers(0, 2**31),
)
def test_argmax_takes_the_lowest_of_equal_ids(
    module: ModuleType, rows: int, width: int, values: int, seed: int
) -> None:
    logits = torch.randint(0, values, (rows, width), generator=torch.Generator().manual_seed(seed)).float()
    want = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
    assert torch.equal(argmax(logits, module=module), want)


@pytest.mark.parametrize("module", LEVELS)
@pytest.mark.parametrize("width", [1, 7, 8, 33])
def test_minus_infinity_and_nan(module: ModuleType, width: int) -> None:
    logits = torch.full((3, width), -INF)
    logits[1, -1] = -1e30
    logits[2] = NAN
    logits[2, width // 2] = -3.0
    assert argmax(logits, module=module).tolist() == [0, width - 1, width // 2]
    assert argmax(torch.full((1, width), NAN), module=module).tolist() == [0]


@pytest.mark.parametrize("module", LEVELS)
@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 70), at=st.integers(0, 69), value=st.sampled_from([NAN, INF, -INF, 3e38]))
def test_all_finite(module: ModuleType, width: int, at: int, value: float) -> None:
    logits = torch.full((3, width), 3e38)
    logits[1, at % width] = value
    assert all_finite(logits, module=module).tolist() == [True, value == 3e38, True]


def test_wrong_logits_are_refused() -> None:
    with pytest.raises(TypeError, match="float32"):
        argmax(torch.zeros(2, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="shape"):
        all_finite(torch.zeros(3))
    with pytest.raises(ValueError, match="at least one"):
        argmax(torch.zeros(2, 0))
