"""Packed codes and the group-quantised kernel against their references on every instruction-set level."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.kernels import available_levels
from hasten.kernels.affine import (
    BITS,
    HALF_KIND,
    NESTED,
    OFFSET,
    SINGLE,
    ZERO,
    AffineWeight,
    Numbers,
    affine,
    dequantize,
    expand,
    group_count,
    pack_codes,
    pack_groups,
    unpack_codes,
)
from hasten.kernels.native import _module
from hasten.kernels.packed import pad_rows
from hasten.kernels.reference import affine as reference

LEVELS = pytest.mark.parametrize("level", available_levels())
SCALES = (HALF_KIND, SINGLE, NESTED)
LOWS = (HALF_KIND, SINGLE, NESTED, OFFSET, ZERO)


def numbers(kind: int, outputs: int, groups: int, nest: int, random: torch.Generator) -> Numbers:
    """Random positive numbers of a kind."""
    value = torch.rand(outputs, groups, generator=random) * 0.05 + 0.01
    if kind == OFFSET:
        return Numbers(OFFSET, offset=7.0)
    if kind == ZERO:
        return Numbers(ZERO, pack_groups((value * 4000).to(torch.uint8), groups))
    if kind == NESTED:
        outer = torch.rand(outputs, -(-groups // nest), generator=random).half()
        return Numbers(
            NESTED,
            pack_groups((value * 1000 - 30).to(torch.int8), groups),
            pack_groups(outer, outer.shape[1]),
        )
    dtype = torch.float16 if kind == HALF_KIND else torch.float32
    return Numbers(kind, pack_groups(value.to(dtype), groups))


def make(
    outputs: int,
    inputs: int,
    bits: int,
    size: int,
    scale: int = HALF_KIND,
    low: int = SINGLE,
    seed: int = 0,
    bias: bool = False,
    perm: bool = False,
) -> AffineWeight:
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (outputs, inputs), dtype=torch.uint8, generator=random)
    groups, nest = group_count(inputs, size), 3
    return AffineWeight(
        inputs,
        outputs,
        bits,
        size,
        pack_codes(codes, bits),
        numbers(scale, outputs, groups, nest, random),
        numbers(low, outputs, groups, nest, random),
        nest,
        torch.randperm(inputs, generator=random).to(torch.int32) if perm else None,
        pad_rows(torch.randn(outputs, generator=random)).flatten() if bias else None,
    )


def close(y: torch.Tensor, x: torch.Tensor, weight: AffineWeight) -> None:
    """Within float32 rounding of the magnitudes that the factored sum adds up: codes and lows apart."""
    expected = reference.affine(x.double(), weight)
    x = reference.round_activations(x, weight)
    group_K = torch.arange(weight.width) // weight.group_size
    codes = unpack_codes(weight.words, weight.outputs, weight.width).float()
    scale = expand(weight.scale, weight.outputs, weight.nest)
    low = expand(weight.low, weight.outputs, weight.nest, scale)
    magnitude_OK = codes * scale.abs()[:, group_K] + low.abs()[:, group_K]
    stored = x if weight.column_K is None else x[:, weight.column_K.long()]
    bound = stored.abs() @ magnitude_OK.t() * 2e-6 + 1e-6
    assert y.shape == expected.shape
    assert bool(((y - expected).abs() <= bound).all())


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=25, deadline=None)
@given(outputs=st.integers(1, 40), columns=st.integers(1, 100), seed=st.integers(0, 2**31))
def test_codes_survive_packing(bits: int, outputs: int, columns: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (outputs, columns), dtype=torch.uint8, generator=random)
    words = pack_codes(codes, bits)
    # Dense: no bit of a full block and chunk is unused.
    assert words.nbytes == -(-outputs // 16) * 16 * -(-columns // 32) * 32 * bits // 8
    assert torch.equal(unpack_codes(words, outputs, columns), codes)
    assert torch.equal(reference.unpack_codes(words, outputs, columns), codes)


@pytest.mark.parametrize("bits", BITS)
def test_every_packed_bit_is_used(bits: int) -> None:
    full = torch.full((16, 32), (1 << bits) - 1, dtype=torch.uint8)
    assert bool((pack_codes(full, bits) == -1).all())


@LEVELS
@settings(max_examples=100, deadline=None)
@given(
    outputs=st.integers(1, 40),
    inputs=st.one_of(st.integers(1, 200), st.integers(500, 600)),
    rows=st.integers(0, 40),
    bits=st.sampled_from(BITS),
    size=st.sampled_from((16, 32, 48, 64, 128, 192, 1024)),
    scale=st.sampled_from(SCALES),
    low=st.sampled_from(LOWS),
    bias=st.booleans(),
    perm=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_matches_reference(
    level: str,
    outputs: int,
    inputs: int,
    rows: int,
    bits: int,
    size: int,
    scale: int,
    low: int,
    bias: bool,
    perm: bool,
    seed: int,
) -> None:
    weight = make(outputs, inputs, bits, size, scale, low, seed, bias, perm)
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))
    close(affine(weight, module=_module(level))(x), x, weight)


@LEVELS
@pytest.mark.parametrize("bits", BITS)
def test_every_row_count(level: str, bits: int) -> None:
    weight = make(50, 130, bits, 32)
    layer, x = affine(weight, module=_module(level)), torch.randn(40, 130)
    for rows in (*range(1, 18), 40):
        close(layer(x[:rows]), x[:rows], weight)


@LEVELS
def test_enough_work_for_threads(level: str) -> None:
    weight = make(1000, 576, 4, 64)
    layer = affine(weight, module=_module(level))
    for rows in (1, 3, 20, 200):
        x = torch.randn(rows, 576)
        close(layer(x), x, weight)


@LEVELS
@settings(max_examples=60, deadline=None)
@given(
    outputs=st.integers(1, 40),
    inputs=st.one_of(st.integers(1, 200), st.integers(500, 600)),
    rows=st.one_of(st.integers(0, 20), st.just(140)),
    size=st.sampled_from((32, 64, 192, 1024)),
    scale=st.sampled_from(SCALES),
    low=st.sampled_from(LOWS),
    bias=st.booleans(),
    perm=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_int8_activations_match_reference(
    level: str,
    outputs: int,
    inputs: int,
    rows: int,
    size: int,
    scale: int,
    low: int,
    bias: bool,
    perm: bool,
    seed: int,
) -> None:
    weight = make(outputs, inputs, 4, size, scale, low, seed, bias, perm)
    weight = replace(weight, activations="int8")
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=random) * torch.randn(rows, 1, generator=random).exp()
    close(affine(weight, module=_module(level))(x), x, weight)


@LEVELS
@settings(max_examples=100, deadline=None)
@given(
    outputs=st.integers(1, 40),
    inputs=st.one_of(st.integers(1, 200), st.integers(500, 600)),
    rows=st.one_of(st.integers(0, 20), st.just(140)),
    bits=st.sampled_from((4, 5, 6, 8)),
    size=st.sampled_from((16, 32, 48, 64, 80, 192, 1024)),
    scale=st.sampled_from(SCALES),
    low=st.sampled_from(LOWS),
    bias=st.booleans(),
    perm=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_int16_activations_match_reference(
    level: str,
    outputs: int,
    inputs: int,
    rows: int,
    bits: int,
    size: int,
    scale: int,
    low: int,
    bias: bool,
    perm: bool,
    seed: int,
) -> None:
    weight = make(outputs, inputs, bits, size, scale, low, seed, bias, perm)
    weight = replace(weight, activations="int16")
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=random) * torch.randn(rows, 1, generator=random).exp()
    close(affine(weight, module=_module(level))(x), x, weight)


@LEVELS
@pytest.mark.parametrize(("activations", "bits"), [("int8", 4), ("int16", 4), ("int16", 8)])
def test_integer_sums_do_not_overflow(level: str, activations: str, bits: int) -> None:
    for code in (0, (1 << bits) - 1):
        weight = make(20, 64, bits, 64, low=OFFSET)
        codes = torch.full((20, 64), code, dtype=torch.uint8)
        weight = replace(weight, words=pack_codes(codes, bits), activations=activations)
        for sign in (1.0, -1.0):
            x = torch.full((5, 64), sign)
            close(affine(weight, module=_module(level))(x), x, weight)
        x = torch.zeros(1, 64)
        close(affine(weight, module=_module(level))(x), x, weight)


def test_rounded_activations_lose_little() -> None:
    weight, x = make(64, 576, 4, 32, low=OFFSET), torch.randn(3, 576)
    exact = dequantize(weight).double() @ x.double().t()
    error = {
        name: float((affine(replace(weight, activations=name))(x).t() - exact).norm() / exact.norm())
        for name in ("float32", "int16", "int8")
    }
    error["bfloat16"] = float(
        (dequantize(weight).double() @ x.bfloat16().double().t() - exact).norm() / exact.norm()
    )
    assert error["float32"] < 1e-6
    assert error["int16"] < error["bfloat16"] / 10
    assert error["bfloat16"] < error["int8"] < 0.01


@LEVELS
@pytest.mark.parametrize("bits", [4, 5, 6, 8])
@pytest.mark.parametrize("size", [16, 32])
def test_rows_do_not_influence_each_other(level: str, bits: int, size: int) -> None:
    layer = affine(replace(make(20, 300, bits, size), activations="int16"), module=_module(level))
    x = torch.randn(11, 300) * torch.logspace(-3, 3, 11)[:, None]
    together = layer(x)
    for rows in (1, 2, 3, 4, 7):
        assert torch.equal(layer(x[:rows]), together[:rows])


def test_columns_left_out_multiply_nothing() -> None:
    weight = make(20, 64, 4, 16)
    column = torch.arange(64, dtype=torch.int32)
    column[[3, 60]] = -1
    weight = replace(weight, column_K=column)
    x = torch.randn(2, 64)
    x[:, [3, 60]] = float("nan")
    y = affine(weight)(x)
    assert bool((dequantize(weight)[:, [3, 60]] == 0).all())
    torch.testing.assert_close(y, x.nan_to_num() @ dequantize(weight).t(), rtol=1e-4, atol=1e-4)


@LEVELS
@pytest.mark.parametrize("activations", ["float32", "int8", "int16"])
@pytest.mark.parametrize("rows", [1, 4, 20])
def test_nan_and_infinity_reach_the_output(level: str, rows: int, activations: str) -> None:
    weight = replace(make(20, 40, 4, 32), activations=activations)
    layer = affine(weight, module=_module(level))
    for bad in (float("nan"), float("inf")):
        x = torch.ones(rows, 40)
        x[-1, 5] = bad
        y = layer(x)
        assert not bool(torch.isfinite(y[-1]).any())
        assert bool(torch.isfinite(y[:-1]).all())


@LEVELS
def test_tiny_and_huge_activations(level: str) -> None:
    weight = make(20, 64, 8, 32, low=OFFSET)
    layer = affine(weight, module=_module(level))
    for factor in (1e-30, 1e30):
        x = torch.randn(3, 64) * factor
        torch.testing.assert_close(layer(x) / factor, layer(x / factor), rtol=1e-3, atol=1e-3)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="bits = 7"):
        pack_codes(torch.zeros(1, 1, dtype=torch.uint8), 7)
    with pytest.raises(ValueError, match="codes reach 9; 3 bits end at 7"):
        pack_codes(torch.full((1, 40), 9, dtype=torch.uint8), 3)
    with pytest.raises(TypeError, match="codes must be uint8"):
        pack_codes(torch.zeros(1, 1), 4)
    with pytest.raises(ValueError, match="non-empty"):
        pack_codes(torch.zeros(0, 4, dtype=torch.uint8), 4)
    weight = make(20, 64, 4, 32)
    with pytest.raises(ValueError, match="words must be contiguous"):
        unpack_codes(weight.words, 40, 64)
    with pytest.raises(ValueError, match="groups are multiples of 16"):
        affine(replace(weight, group_size=24))
    with pytest.raises(ValueError, match="scale must be contiguous"):
        affine(replace(weight, group_size=16))
    with pytest.raises(TypeError, match=r"low must be torch\.float16"):
        affine(replace(weight, low=replace(weight.low, kind=HALF_KIND)))
    with pytest.raises(ValueError, match="do not go together"):
        affine(replace(weight, low=Numbers(ZERO)))
    with pytest.raises(ValueError, match="multiples of themselves"):
        affine(replace(weight, scale=Numbers(OFFSET, offset=1.0)))
    with pytest.raises(ValueError, match="column names an input outside"):
        affine(replace(weight, column_K=torch.full((64,), 64, dtype=torch.int32)))
    with pytest.raises(ValueError, match="activations = 'int4'"):
        affine(replace(weight, activations="int4"))
    for activations, bits, size in (("int8", 8, 32), ("int8", 4, 48), ("int16", 2, 32), ("int16", 3, 32)):
        with pytest.raises(
            ValueError, match=f"no kernel for {activations} activations, {bits} bits and groups"
        ):
            affine(replace(make(20, 64, bits, size), activations=activations))
    with pytest.raises(ValueError, match="bias must be contiguous"):
        affine(replace(weight, bias_P=torch.ones(20)))


def test_concurrent_calls_do_not_share_scratch() -> None:
    layer = affine(make(50, 700, 4, 64))
    xs = [torch.randn(rows, 700) for rows in range(1, 25)]
    alone = [layer(x) for x in xs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for y, expected in zip(pool.map(layer, xs), alone, strict=True):
                assert torch.equal(y, expected)
