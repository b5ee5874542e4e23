"""The dense kernel against its reference on every instruction-set level."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.kernels import available_levels
from hasten.kernels.dense import dense, pack_dense, unpack_dense
from hasten.kernels.native import _module
from hasten.kernels.packed import pad_rows, stack
from hasten.kernels.reference.dense import dense_linear

LEVELS = pytest.mark.parametrize("level", available_levels())


def close(y: torch.Tensor, reference: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Within float32 rounding of the sum of magnitudes."""
    bound = (x.abs() @ weight.abs().t()) * 1e-6 * (1 + weight.shape[1] ** 0.5 / 8) + 1e-30
    assert y.shape == reference.shape
    assert bool(((y - reference).abs() <= bound).all())


@LEVELS
@settings(max_examples=60, deadline=None)
@given(
    outputs=st.integers(1, 70),
    inputs=st.one_of(st.integers(1, 90), st.integers(1000, 1100)),
    rows=st.one_of(st.integers(0, 40), st.just(200)),
    bf16=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_matches_reference(
    level: str, outputs: int, inputs: int, rows: int, bf16: bool, bias: bool, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=random).to(torch.bfloat16 if bf16 else torch.float32)
    bias_O = torch.randn(outputs, generator=random) if bias else None
    bias_P = None if bias_O is None else pad_rows(bias_O).flatten()
    x = torch.randn(rows, inputs, generator=random)
    packed = pack_dense(weight)
    assert torch.equal(unpack_dense(packed, outputs), weight)
    y = dense(packed, outputs, bias_P, module=_module(level))(x)
    reference = dense_linear(x.double().float(), packed, outputs, bias_P)
    close(
        y,
        reference,
        torch.cat([x, torch.ones(rows, 1)], 1),
        torch.cat([weight.float(), torch.ones(outputs, 1)], 1),
    )


@LEVELS
def test_many_rows_are_cut_into_tasks_without_seams(level: str) -> None:
    weight, x = torch.randn(33, 2100), torch.randn(401, 2100)
    y = dense(pack_dense(weight), 33, module=_module(level))(x)
    close(y, x @ weight.t(), x, weight)


def test_strided_rows_and_slices() -> None:
    weight, wide = torch.randn(20, 30), torch.randn(8, 61)
    layer = dense(pack_dense(weight), 20)
    for x in (wide[:, 1::2], wide[::2, :30], torch.randn(30, 5).t()):
        close(layer(x), x @ weight.t(), x, weight)


def test_stack_writes_side_by_side() -> None:
    weights = [torch.randn(outputs, 24) for outputs in (5, 16, 1)]
    layer = stack([dense(pack_dense(weight), weight.shape[0]) for weight in weights])
    x = torch.randn(3, 24)
    close(layer(x), x @ torch.cat(weights).t(), x, torch.cat(weights))
    with pytest.raises(ValueError, match="at least one part"):
        stack([])
    with pytest.raises(ValueError, match="differ in inputs"):
        stack([dense(pack_dense(torch.ones(1, 2)), 1), dense(pack_dense(torch.ones(1, 3)), 1)])


def test_bad_arguments_are_named() -> None:
    packed = pack_dense(torch.ones(20, 8))
    with pytest.raises(TypeError, match="weight must be float32 or bfloat16"):
        pack_dense(torch.ones(2, 2, dtype=torch.float16))
    with pytest.raises(ValueError, match="non-empty"):
        pack_dense(torch.ones(0, 2))
    with pytest.raises(ValueError, match="do not hold 40 outputs"):
        dense(packed, 40)
    with pytest.raises(ValueError, match="bias must be contiguous"):
        dense(packed, 20, torch.ones(20))
    with pytest.raises(TypeError, match="bias must be"):
        dense(packed, 20, torch.ones(32, dtype=torch.float64))
    with pytest.raises(ValueError, match="packed weight must be contiguous"):
        dense(packed.expand(2, 8, 16)[:, :, ::1].transpose(0, 0)[:, ::2], 20)
    layer = dense(packed, 20)
    with pytest.raises(TypeError, match="x must be float32"):
        layer(torch.ones(1, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"x has shape \(1, 7\); the layer takes \[rows, 8\]"):
        layer(torch.ones(1, 7))
    with pytest.raises(ValueError, match="x has shape"):
        layer(torch.ones(8))


def test_concurrent_calls_do_not_share_scratch() -> None:
    weight = torch.randn(50, 700)
    layer = dense(pack_dense(weight), 50)
    xs = [torch.randn(rows, 700) for rows in range(1, 17)]
    alone = [layer(x) for x in xs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for y, expected in zip(pool.map(layer, xs), alone, strict=True):
                assert torch.equal(y, expected)
