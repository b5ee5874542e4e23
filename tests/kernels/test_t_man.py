"""Bit planes, their tables and both paths of the product against their references on every instruction-set level."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.kernels import available_levels
from hasten.kernels.affine import OFFSET, SINGLE, Numbers, group_count, pack_groups
from hasten.kernels.native import _module
from hasten.kernels.packed import pad_rows
from hasten.kernels.reference import t_man as reference
from hasten.kernels.t_man import (
    BITS,
    TABLES,
    PlaneWeight,
    dequantize,
    multiply,
    pack_planes,
    share_tables,
    t_man,
    table_weights,
    tables_built,
    unpack_planes,
)

from .test_affine import LOWS, SCALES, numbers

LEVELS = pytest.mark.parametrize("level", available_levels())


def make(
    outputs: int,
    inputs: int,
    bits: int,
    size: int,
    scale: int = SINGLE,
    low: int = SINGLE,
    seed: int = 0,
    bias: bool = False,
    perm: bool = False,
    tables: str = "int16",
) -> PlaneWeight:
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (outputs, inputs), dtype=torch.uint8, generator=random)
    groups, nest = group_count(inputs, size), 3
    return PlaneWeight(
        inputs,
        outputs,
        bits,
        size,
        pack_planes(codes, bits),
        numbers(scale, outputs, groups, nest, random),
        numbers(low, outputs, groups, nest, random),
        nest,
        torch.randperm(inputs, generator=random).to(torch.int32) if perm else None,
        pad_rows(torch.randn(outputs, generator=random)).flatten() if bias else None,
        tables,
    )


def close(y: Tensor, wanted: Tensor, error: float) -> None:
    assert y.shape == wanted.shape
    assert float((y - wanted).norm()) <= error * float(wanted.norm())


@LEVELS
@settings(max_examples=40, deadline=None)
@given(
    outputs=st.integers(1, 40),
    inputs=st.integers(1, 400),
    bits=st.sampled_from(BITS),
    size=st.sampled_from([16, 32, 48, 64, 128, 512]),
    scale=st.sampled_from(SCALES),
    low=st.sampled_from(LOWS),
    rows=st.integers(0, 9),
    bias=st.booleans(),
    perm=st.booleans(),
    tables=st.sampled_from(TABLES),
    seed=st.integers(0, 99),
)
def test_both_paths_are_the_reference(
    level, outputs, inputs, bits, size, scale, low, rows, bias, perm, tables, seed
):
    weight = make(outputs, inputs, bits, size, scale, low, seed, bias, perm, tables)
    layer = t_man(weight, module=_module(level))
    x_TI = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))
    close(multiply(layer, x_TI, "lookup").double(), reference.t_man(x_TI, weight), 2e-6)
    close(multiply(layer, x_TI, "dequantize").double(), reference.exact(x_TI, weight), 2e-6)
    close(layer(x_TI).double(), reference.exact(x_TI, weight), 1e-3 if tables == "int16" else 5e-2)


@given(
    outputs=st.integers(1, 40),
    columns=st.integers(1, 70),
    bits=st.sampled_from(BITS),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_planes_hold_the_codes(outputs, columns, bits, seed):
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (outputs, columns), dtype=torch.uint8, generator=random)
    planes = pack_planes(codes, bits)
    assert torch.equal(unpack_planes(planes, outputs, columns), codes)
    assert planes.nbytes == -(-outputs // 16) * 16 * -(-columns // 16) * 16 * bits // 8


@LEVELS
def test_a_row_does_not_depend_on_its_company(level):
    layer = t_man(make(48, 320, 3, 64, bias=True), module=_module(level))
    x_TI = torch.randn(7, 320)
    together = multiply(layer, x_TI, "lookup")
    assert torch.equal(torch.cat([multiply(layer, row, "lookup") for row in x_TI.split(1)]), together)


@LEVELS
def test_numbers_that_no_table_can_hold(level):
    layer = t_man(make(20, 300, 4, 64), module=_module(level))
    x_TI = torch.randn(5, 300)
    x_TI[1, 7], x_TI[2, 299], x_TI[3], x_TI[4] = float("nan"), float("inf"), 0.0, 1e-38
    y_TO = multiply(layer, x_TI, "lookup")
    assert bool(y_TO[0].isfinite().all())
    assert not bool(y_TO[1:3].isfinite().any())
    assert bool((y_TO[3] == 0).all())
    assert float(y_TO[4].abs().max()) < 1e-30
    huge_TI = torch.full((1, 300), 3e38)
    assert not bool(multiply(layer, huge_TI, "lookup").isfinite().any())


@LEVELS
def test_parts_share_the_tables_of_their_input(level):
    module = _module(level)
    weights = [make(32, 160, bits, 32 * bits, seed=bits, bias=True) for bits in (4, 2, 3)]
    parts = [t_man(weight, module=module) for weight in weights]
    shared = share_tables(parts)
    for rows in (1, 2, 40):
        x_TI = torch.randn(rows, 160)
        before = tables_built(module)
        y_TO = shared(x_TI)
        assert tables_built(module) - before == (rows if rows <= 2 else 0)
        how = "lookup" if rows <= 2 else "dequantize"
        assert torch.equal(y_TO, torch.cat([multiply(part, x_TI, how) for part in parts], dim=1))
    assert torch.equal(shared.row(40), parts[1].row(8))


def test_wrong_input_is_named():
    weight = make(20, 96, 4, 32)
    assert torch.equal(t_man(weight).row(17), table_weights(t_man(weight), 96)[17])
    for bad, error, message in (
        ({"bits": 5}, ValueError, "bits = 5"),
        ({"group_size": 24}, ValueError, "group_size = 24"),
        ({"tables": "int4"}, ValueError, "tables = 'int4'"),
        ({"planes": weight.planes[:1]}, ValueError, "planes must be contiguous"),
        ({"planes": weight.planes.int()}, TypeError, "planes must be"),
        ({"scale": Numbers(OFFSET, offset=1.0)}, ValueError, "multiples of themselves"),
        ({"low": Numbers(SINGLE, pack_groups(torch.zeros(20, 2), 2))}, ValueError, "low must be"),
        ({"bias_P": torch.zeros(20)}, ValueError, "bias must be"),
        ({"column_K": torch.full((96,), 96, dtype=torch.int32)}, ValueError, "outside"),
    ):
        with pytest.raises(error, match=message):
            t_man(replace(weight, **bad))
    for codes, bits, error, message in (
        (torch.full((4, 4), 4, dtype=torch.uint8), 2, ValueError, "codes reach 4"),
        (torch.zeros(4, 4), 2, TypeError, "uint8"),
        (torch.zeros(0, 4, dtype=torch.uint8), 2, ValueError, "non-empty"),
        (torch.zeros(4, 4, dtype=torch.uint8), 8, ValueError, "bits = 8"),
    ):
        with pytest.raises(error, match=message):
            pack_planes(codes, bits)
    with pytest.raises(ValueError, match="x_TI"):
        multiply(t_man(weight), torch.randn(2, 95), "lookup")
    with pytest.raises(ValueError, match="differ in inputs"):
        share_tables([t_man(weight), t_man(make(20, 80, 4, 16))])
    with pytest.raises(ValueError, match="at least one"):
        share_tables([])


def test_the_weight_is_that_of_the_codes():
    weight = make(33, 200, 3, 32, bias=True, perm=True)
    close(t_man(weight)(torch.eye(200)).t() - weight.bias_P[:33, None], dequantize(weight), 1e-5)
