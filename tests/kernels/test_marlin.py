"""MARLIN kernels against their references on every instruction-set level, and the striped partition."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.kernels import available_levels
from hasten.kernels.affine import (
    CHUNK,
    HALF_KIND,
    OFFSET,
    SINGLE,
    ZERO,
    AffineWeight,
    Numbers,
    affine,
    group_count,
    pack_codes,
    pack_groups,
)
from hasten.kernels.marlin import (
    SparseWeight,
    dequantize_sparse,
    marlin,
    marlin_sparse,
    pack_two_of_four,
    stripes,
    unpack_two_of_four,
)
from hasten.kernels.native import _module
from hasten.kernels.packed import Packed, pad_rows
from hasten.kernels.reference import marlin as reference

LEVELS = pytest.mark.parametrize("level", available_levels())


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def scales(outputs: int, inputs: int, size: int, kind: int, random: torch.Generator) -> Numbers:
    groups = group_count(inputs, size)
    value = torch.rand(outputs, groups, generator=random) * 0.05 + 0.01
    return Numbers(kind, pack_groups(value.half() if kind == HALF_KIND else value, groups))


def whole(inputs: int) -> int:
    """Group size of one group for all inputs."""
    return -(-inputs // CHUNK) * CHUNK


def make(
    outputs: int, inputs: int, size: int | None, activations: str = "float32", kind: int = HALF_KIND
) -> AffineWeight:
    random = torch.Generator().manual_seed(outputs * 1000 + inputs)
    size = whole(inputs) if size is None else size
    codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8, generator=random)
    return AffineWeight(
        inputs,
        outputs,
        4,
        size,
        pack_codes(codes, 4),
        scales(outputs, inputs, size, kind, random),
        Numbers(OFFSET, offset=8.0),
        bias_P=pad_rows(torch.randn(outputs, generator=random)).flatten() if outputs % 2 else None,
        activations=activations,
    )


def sparse_codes(outputs: int, inputs: int, random: torch.Generator) -> Tensor:
    """Random codes of which at most two in each four are not 8."""
    codes = torch.randint(0, 16, (outputs, whole(inputs) // 4, 4), dtype=torch.uint8, generator=random)
    drop = torch.rand(codes.shape, generator=random).argsort(-1)[..., :2]
    return codes.scatter(-1, drop, 8).flatten(1)[:, :inputs].contiguous()


def make_sparse(outputs: int, inputs: int, size: int | None, kind: int = HALF_KIND) -> SparseWeight:
    random = torch.Generator().manual_seed(outputs * 1000 + inputs)
    size = whole(inputs) if size is None else size
    words = pack_two_of_four(sparse_codes(outputs, inputs, random))
    bias = pad_rows(torch.randn(outputs, generator=random)).flatten() if outputs % 2 else None
    return SparseWeight(inputs, outputs, size, words, scales(outputs, inputs, size, kind, random), bias)


def assert_close(layer: Packed, x_TI: Tensor, expected_TO: Tensor) -> None:
    y_TO = layer(x_TI)
    assert y_TO.shape == expected_TO.shape
    if y_TO.numel():
        top = expected_TO.abs().max()
        assert float((y_TO - expected_TO).abs().max() / top) < 1e-5


SHAPES = {
    "outputs": st.integers(1, 70),
    "inputs": st.integers(1, 700),
    "size": st.sampled_from([32, 64, 128, 256, None]),
}


@LEVELS
@settings(max_examples=25, deadline=None)
@given(
    **SHAPES,
    rows=st.integers(0, 40),
    activations=st.sampled_from(["float32", "int16", "int8"]),
    kind=st.sampled_from([HALF_KIND, SINGLE]),
    count=st.integers(1, 5),
)
def test_dense_equals_reference(level, outputs, inputs, size, rows, activations, kind, count):
    weight = make(outputs, inputs, size, activations, kind)
    x_TI = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows))
    with threads(count):
        assert_close(
            marlin(weight, module=_module(level)), x_TI, reference.marlin(x_TI.double(), weight).float()
        )


@LEVELS
@settings(max_examples=25, deadline=None)
@given(**SHAPES, rows=st.integers(0, 40), kind=st.sampled_from([HALF_KIND, SINGLE]), count=st.integers(1, 5))
def test_sparse_equals_reference(level, outputs, inputs, size, rows, kind, count):
    weight = make_sparse(outputs, inputs, size, kind)
    x_TI = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows))
    with threads(count):
        layer = marlin_sparse(weight, module=_module(level))
        assert_close(layer, x_TI, reference.marlin_sparse(x_TI.double(), weight).float())


@LEVELS
@pytest.mark.parametrize("activations", ["float32", "int16", "int8", "sparse"])
def test_many_rows_in_several_sub_problems(level, activations):
    sparse = activations == "sparse"
    weight = make_sparse(37, 300, 64) if sparse else make(37, 300, 64, activations)
    multiply, layer = (
        (reference.marlin_sparse, marlin_sparse(weight, module=_module(level)))
        if sparse
        else (reference.marlin, marlin(weight, module=_module(level)))
    )
    for rows in (95, 96, 97, 193, 301):
        x_TI = torch.randn(rows, 300)
        expected_TO = multiply(x_TI.double(), weight).float()
        for count in (1, 3):
            with threads(count):
                assert_close(layer, x_TI, expected_TO)


@settings(max_examples=100, deadline=None)
@given(columns=st.integers(0, 60), panels=st.integers(1, 20), count=st.integers(1, 40))
def test_stripes_cover_every_item_once_in_order(columns, panels, count):
    segments = stripes(columns, panels, count)
    items = [(s.column, panel) for s in segments for panel in range(s.first, s.last)]
    assert items == [(column, panel) for column in range(columns) for panel in range(panels)]
    sizes = [sum(s.last - s.first for s in segments if s.stripe == stripe) for stripe in range(count)]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) == -(-columns * panels // count)
    for stripe in range(count):
        mine = [s for s in segments if s.stripe == stripe]
        # Only at its two ends does a stripe share a column with others: one boundary, one split column.
        assert all(s.first == 0 for s in mine[1:])
        assert all(s.last == panels for s in mine[:-1])
    owners = [s.column for s in segments if s.first == 0]
    assert owners == list(range(columns))


def test_stripes_refuse_what_is_no_partition():
    for bad in ((-1, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(ValueError, match="are needed"):
            stripes(*bad)


@pytest.mark.parametrize("activations", ["float32", "int16", "int8", "sparse"])
def test_every_run_gives_the_same_bits(activations):
    layer = (
        marlin_sparse(make_sparse(100, 1500, 64))
        if activations == "sparse"
        else marlin(make(100, 1500, 64, activations))
    )
    for count in (1, 2, 3, 7):
        with threads(count):
            for rows in (1, 5, 20, 200):
                x_TI = torch.randn(rows, 1500)
                first = layer(x_TI)
                assert all(torch.equal(layer(x_TI), first) for _ in range(3))


@pytest.mark.parametrize("activations", ["int16", "int8"])
def test_rounded_rows_do_not_depend_on_their_company(activations):
    layer = marlin(make(100, 700, 64, activations))
    x_TI = torch.randn(96, 700)
    for count in (1, 3):
        with threads(count):
            whole_TO = layer(x_TI)
            for rows in (1, 2, 7, 8, 9, 33):
                assert torch.equal(layer(x_TI[:rows]), whole_TO[:rows])


@settings(max_examples=25, deadline=None)
@given(outputs=st.integers(1, 40), inputs=st.integers(1, 200), seed=st.integers(0, 9))
def test_two_of_four_codes_come_back(outputs, inputs, seed):
    codes = sparse_codes(outputs, inputs, torch.Generator().manual_seed(seed))
    words = pack_two_of_four(codes)
    assert words.shape == (-(-outputs // 16), -(-inputs // 32), 3, 16)
    assert torch.equal(unpack_two_of_four(words, outputs, inputs), codes)


def test_two_of_four_layout_is_the_reference_s():
    weight = make_sparse(33, 130, 64)
    assert torch.equal(dequantize_sparse(weight), reference.dequantize_sparse(weight))


def test_bad_codes_are_named():
    with pytest.raises(ValueError, match="output 1 keeps more than two of the inputs 4 to 7"):
        pack_two_of_four(torch.tensor([[8] * 8, [8] * 4 + [1, 2, 3, 8]], dtype=torch.uint8))
    with pytest.raises(ValueError, match="codes reach 16"):
        pack_two_of_four(torch.full((1, 4), 16, dtype=torch.uint8))
    with pytest.raises(TypeError, match="uint8"):
        pack_two_of_four(torch.zeros(1, 4))
    for empty in (torch.zeros(0, 4, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="non-empty"):
            pack_two_of_four(empty)


def test_what_does_not_fit_is_named():
    weight = make(20, 320, 64)
    outer = torch.zeros(2, 10, 16, dtype=torch.uint8)
    for bad, message in (
        (replace(weight, bits=8), "bits = 8"),
        (replace(weight, low=Numbers(OFFSET, offset=7.0)), "symmetric"),
        (replace(weight, low=Numbers(ZERO, outer)), "symmetric"),
        (replace(weight, column_K=torch.arange(320, dtype=torch.int32)), "own order"),
        (replace(weight, group_size=96), "group_size = 96"),
        (replace(weight, words=weight.words[:, :5].contiguous()), "words must be contiguous"),
        (replace(weight, words=torch.zeros(2 * 10 * 4 * 16 + 1, dtype=torch.int32)[1:]), "64 bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            marlin(bad)
    sparse = make_sparse(20, 320, 64)
    for bad, message in (
        (replace(sparse, group_size=48), "multiples of 32"),
        (replace(sparse, group_size=96), "group_size = 96"),
        (replace(sparse, words=sparse.words[:, :1].contiguous()), "words must be contiguous"),
        (replace(sparse, scale=Numbers(OFFSET, offset=1.0)), "scale"),
        (replace(sparse, bias_P=torch.zeros(3)), "bias"),
    ):
        with pytest.raises(ValueError, match=message):
            marlin_sparse(bad)
    with pytest.raises(ValueError, match="takes \\[rows, 320\\]"):
        marlin_sparse(sparse)(torch.zeros(1, 321))


@LEVELS
def test_the_native_border_refuses_other_layers(level):
    lib = _module(level)
    other = affine(replace(make(20, 320, 64), low=Numbers(OFFSET, offset=7.0)), module=lib)
    with pytest.raises(ValueError, match="the code of 0 must be 8"):
        lib.packed_marlin(other.handle)


@pytest.mark.parametrize("activations", ["float32", "int16", "int8", "sparse"])
def test_nan_stays_in_its_row(activations):
    layer = (
        marlin_sparse(make_sparse(40, 320, 64))
        if activations == "sparse"
        else marlin(make(40, 320, 64, activations))
    )
    for rows in (2, 20):
        x_TI = torch.randn(rows, 320)
        # A sparse weight meets only what it keeps: the whole row of inputs is damaged.
        x_TI[1, :] = float("nan")
        y_TO = layer(x_TI)
        assert bool(y_TO[1].isnan().all())
        assert bool(torch.isfinite(y_TO[0]).all())
