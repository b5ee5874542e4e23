"""Rounded weights times rounded inputs with outlier features, against the formula on every instruction-set level."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.kernels import available_levels
from hasten.kernels.native import _module
from hasten.kernels.quik import (
    BITS,
    FUSIONS,
    MAX_WIDTH,
    NEVER,
    QuikWeight,
    dequantize,
    forward_stages,
    pack_quik,
    quantizations,
    quantize_rows,
    quik,
)
from hasten.kernels.reference import quik as reference

LEVELS = pytest.mark.parametrize("level", available_levels())
FUSED = pytest.mark.parametrize("fusion", FUSIONS)
EVERY_BITS = pytest.mark.parametrize("bits", BITS)


def make(
    outputs: int,
    inputs: int,
    outliers: int,
    bits: int,
    seed: int = 0,
    bias: bool = False,
    extreme: bool = False,
) -> QuikWeight:
    """A random weight; ``extreme``: all codes at an end of their range."""
    random = torch.Generator().manual_seed(seed)
    top = (1 << bits) - 1
    shape = (outputs, inputs - outliers)
    codes = torch.randint(0, top + 1, shape, dtype=torch.uint8, generator=random)
    if extreme:
        codes = torch.where(codes > top // 2, top, 0).to(torch.uint8) * (seed % 2) + (1 - seed % 2) * top
        codes = codes.to(torch.uint8)
    return pack_quik(
        codes,
        torch.rand(outputs, generator=random) * 0.02 + 0.001,
        torch.randperm(inputs, generator=random)[:outliers].sort().values,
        torch.randn(outputs, outliers, generator=random) * 0.1,
        bits=bits,
        bias_O=torch.randn(outputs, generator=random) if bias else None,
    )


def inputs_of(rows: int, weight: QuikWeight, seed: int) -> torch.Tensor:
    """Rows whose outlier features are ten times louder than the others, and not centred."""
    random = torch.Generator().manual_seed(seed + 1)
    x_TI = torch.randn(rows, weight.inputs, generator=random) + 0.3
    x_TI[:, weight.outlier_F.long()] *= 10
    return x_TI


def close(y: torch.Tensor, x: torch.Tensor, weight: QuikWeight) -> None:
    """Within float32 rounding of what the terms of the formula add up to."""
    expected = reference.quik(x.double(), weight)
    magnitude = (
        x.abs() @ dequantize(weight).abs().t() + x.abs().amax(1, keepdim=True) * weight.wred_P.abs().max()
    )
    assert y.shape == expected.shape
    assert bool(((y - expected).abs() <= magnitude * 3e-6 + 1e-6).all())


@LEVELS
@EVERY_BITS
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 150),
    outputs=st.integers(1, 70),
    inputs=st.integers(1, 700),
    share=st.sampled_from([0.0, 0.06, 0.5, 1.0]),
    bias=st.booleans(),
    extreme=st.booleans(),
    fusion=st.sampled_from(FUSIONS),
    seed=st.integers(0, 2**31),
)
def test_layer(
    level: str,
    bits: int,
    rows: int,
    outputs: int,
    inputs: int,
    share: float,
    bias: bool,
    extreme: bool,
    fusion: str,
    seed: int,
) -> None:
    weight = make(outputs, inputs, int(share * inputs), bits, seed, bias, extreme)
    layer, x = quik(weight, module=_module(level)), inputs_of(rows, weight, seed)
    y = layer(x)
    close(y, x, weight)
    if weight.words is not None:
        torch.testing.assert_close(forward_stages(layer, x, fusion), y, rtol=1e-5, atol=1e-4)


@LEVELS
@EVERY_BITS
def test_sums_that_would_overflow_16_bits_are_exact(level: str, bits: int) -> None:
    """Every code and every input at the end of its range, both signs, at the widest inputs of the default model."""
    for width in (544, 576, 1536):
        for top_code in (0, (1 << bits) - 1):
            codes = torch.full((16, width), top_code, dtype=torch.uint8)
            empty = torch.empty(0, dtype=torch.int64)
            weight = pack_quik(codes, torch.ones(16), empty, torch.empty(16, 0), bits=bits)
            for flipped in (1, -1):
                x = torch.full((5, width), 1.0 * flipped)
                x[:, 0] = -1.0 * flipped
                close(quik(weight, module=_module(level))(x), x, weight)


@LEVELS
@EVERY_BITS
@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 9),
    inputs=st.integers(1, 200),
    share=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 999),
)
def test_rounded_rows_are_those_of_the_reference(
    level: str, bits: int, rows: int, inputs: int, share: float, seed: int
) -> None:
    weight = make(3, inputs, int(share * inputs), bits, seed)
    x = inputs_of(rows, weight, seed)
    if rows > 2:
        x[1] = 0.25  # no range
        x[2] *= 1e-42  # a range that cannot be divided by
    ours = quantize_rows(quik(weight, module=_module(level)), x)
    for mine, theirs in zip(ours, reference.quantize_rows(x, weight), strict=True):
        assert torch.equal(mine.float(), theirs)


@LEVELS
@EVERY_BITS
def test_few_rows_are_not_rounded(level: str, bits: int) -> None:
    for outliers in (0, 7, 100):
        weight = replace(make(37, 100, outliers, bits, bias=True), min_rows=8)
        layer = quik(weight, module=_module(level))
        assert weight.bias_P is not None
        for rows in (0, 1, 7, 8, 20):
            x = inputs_of(rows, weight, rows)
            exact = x.double() @ dequantize(weight).double().t() + weight.bias_P[:37]
            before = quantizations(module=_module(level))
            y = layer(x)
            rounded = quantizations(module=_module(level)) - before
            assert rounded == int(rows >= 8 and outliers < 100)
            if rounded:
                close(y, x, weight)
            else:
                torch.testing.assert_close(y, exact.float(), rtol=1e-4, atol=1e-4)


@LEVELS
@EVERY_BITS
@FUSED
def test_a_bad_value_stays_in_its_row(level: str, bits: int, fusion: str) -> None:
    weight = make(20, 70, 6, bits)
    layer = quik(weight, module=_module(level))
    clean = inputs_of(6, weight, 0)
    expected = forward_stages(layer, clean, fusion)
    for value in (float("nan"), float("inf"), float("-inf"), 3e38):
        for feature in (int(weight.base_K[0]), int(weight.base_K[-1])):
            x = clean.clone()
            x[2, feature] = value
            x[2, int(weight.base_K[1])] = -3e38  # so that 3e38 makes the range overflow
            y = forward_stages(layer, x, fusion)
            assert bool(y[2].isnan().all())
            assert torch.equal(y[[0, 1, 3, 4, 5]], expected[[0, 1, 3, 4, 5]])
    x = clean.clone()
    x[2, int(weight.outlier_F[0])] = float("nan")
    assert bool(forward_stages(layer, x, fusion)[2].isnan().all())


@EVERY_BITS
def test_rows_and_threads_do_not_influence_each_other(bits: int) -> None:
    for outliers in (0, 20):
        weight = make(192, 300, outliers, bits)
        layer, x = quik(weight), inputs_of(300, weight, 0)
        y = layer(x)
        with ThreadPoolExecutor(4) as pool:
            assert all(torch.equal(z, y) for z in pool.map(layer, [x] * 8))
        for rows in (1, 2, 3, 5, 130):
            if outliers:  # the dense tile adds up few rows in another order
                torch.testing.assert_close(layer(x[:rows]), y[:rows], rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(layer(x[:rows]), y[:rows])


def test_wrong_arguments_are_named() -> None:
    codes, scale = torch.zeros(4, 6, dtype=torch.uint8), torch.ones(4)
    at, some = torch.tensor([1, 3]), torch.zeros(4, 2)

    def pack(codes=codes, scale=scale, at=at, some=some, bits=4, **more):
        return pack_quik(codes, scale, at, some, bits=bits, **more)

    with pytest.raises(ValueError, match="bits = 5"):
        pack(bits=5)
    with pytest.raises(TypeError, match="codes must be uint8"):
        pack(codes=codes.int())
    with pytest.raises(ValueError, match="outlier weights must be"):
        pack(some=some[:, :1])
    with pytest.raises(ValueError, match="ascend"):
        pack(at=torch.tensor([3, 1]))
    with pytest.raises(ValueError, match="ascend"):
        pack(at=torch.tensor([3, 8]))
    with pytest.raises(ValueError, match="scale must be float32"):
        pack(scale=scale.double())
    with pytest.raises(ValueError, match="scale holds NaN"):
        pack(scale=scale / 0)
    with pytest.raises(ValueError, match="bias must be"):
        pack(bias_O=torch.zeros(3))
    with pytest.raises(ValueError, match="codes reach 16"):
        pack(codes=codes + 16)
    with pytest.raises(ValueError, match="int32 sums of 8 bit"):
        pack(
            codes=torch.zeros(1, MAX_WIDTH[8] + 1, dtype=torch.uint8), scale=scale[:1], some=some[:1], bits=8
        )
    weight = pack()
    for change, word in (
        ({"min_rows": 0}, "min_rows"),
        ({"min_rows": NEVER + 1}, "min_rows"),
        ({"bits": 3}, "bits"),
        ({"base_K": weight.base_K.flip(0)}, "ascending"),
        ({"words": None}, "missing"),
        ({"wred_P": weight.wred_P[:4]}, "wred"),
        ({"outlier_NF16": weight.outlier_NF16.float()}, "outlier weights"),
    ):
        with pytest.raises((ValueError, TypeError), match=word):
            quik(replace(weight, **change))
    layer = quik(weight)
    with pytest.raises(ValueError, match="fusion"):
        forward_stages(layer, torch.zeros(2, 8), "some")
    with pytest.raises(ValueError, match="takes"):
        quantize_rows(layer, torch.zeros(2, 7))
    with pytest.raises(TypeError, match="float32"):
        forward_stages(layer, torch.zeros(2, 8, dtype=torch.float64))
