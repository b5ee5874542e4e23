"""The ends of a decoder on the native library: rows of packed layers, and what `Ends` and `Round` refuse."""

from __future__ import annotations

import pytest
import torch

from hasten.kernels.affine import (
    HALF_KIND,
    OFFSET,
    AffineWeight,
    Numbers,
    affine,
    dequantize,
    group_count,
    pack_codes,
    pack_groups,
)
from hasten.kernels.decode import Ends
from hasten.kernels.dense import dense, pack_dense
from hasten.kernels.native import _module, available_levels

LEVELS = [pytest.param(_module(name), id=name) for name in available_levels()]


@pytest.mark.parametrize("module", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_dense_layer(module, dtype):
    weight = torch.randn(37, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    layer = dense(pack_dense(weight), 37, module=module)
    for index in (0, 15, 16, 36):
        assert torch.equal(layer.row(index), weight[index].float())


@pytest.mark.parametrize("module", LEVELS)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_rows_of_a_quantised_layer(module, bits):
    """Also with columns in another order and with a group that ends within a chunk."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (37, 96), generator=generator, dtype=torch.uint8)
    scale = torch.rand(37, 6, generator=generator).half()
    groups = group_count(96, 16)
    column = torch.randperm(96, generator=generator).to(torch.int32)
    for order in (None, column):
        weight = AffineWeight(
            96,
            37,
            bits,
            16,
            pack_codes(codes, bits),
            Numbers(HALF_KIND, pack_groups(scale, groups)),
            Numbers(OFFSET, offset=1.0),
            column_K=order,
        )
        layer, exact = affine(weight, module=module), dequantize(weight)
        for index in (0, 15, 16, 36):
            torch.testing.assert_close(layer.row(index), exact[index], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("module", LEVELS)
def test_a_row_outside_the_layer_is_refused(module):
    layer = dense(pack_dense(torch.randn(5, 4)), 5, module=module)
    with pytest.raises(ValueError, match="outputs"):
        layer.row(5)


def test_ends_that_do_not_fit_are_refused():
    head = dense(pack_dense(torch.randn(10, 8)), 10)
    norm = torch.ones(8)
    with pytest.raises(ValueError, match="table_VE"):
        Ends(torch.randn(10, 7), norm, head, eps=1e-5)
    with pytest.raises(TypeError, match="table_VE"):
        Ends(torch.randn(10, 8).half(), norm, head, eps=1e-5)
    with pytest.raises(ValueError, match="norm_E"):
        Ends(torch.randn(10, 8), torch.ones(7), head, eps=1e-5)
    with pytest.raises(ValueError, match="embedding table"):
        Ends(dense(pack_dense(torch.randn(9, 8)), 9), norm, head, eps=1e-5)
