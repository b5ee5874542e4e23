"""Bitmap-compressed tensors: every bit comes back, whatever the sparsity, dtype and size, on every level."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.kernels import available_levels
from hasten.kernels.endor import BLOCK_ELEMENTS, Bitmap, block_count, compress, expand, expand_block
from hasten.kernels.native import _module
from hasten.kernels.reference import endor as reference

LEVELS = pytest.mark.parametrize("level", available_levels())
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.uint8, torch.int32)
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def random(count: int, sparsity: float, dtype: torch.dtype, seed: int) -> Tensor:
    """Any bits at all, so NaN payloads, infinities and -0.0 too."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator).view(
        dtype
    )
    dense = dense.clone()
    dense[torch.rand(count, generator=generator) < sparsity] = 0
    return dense


def same_bits(a: Tensor, b: Tensor) -> bool:
    kind = BITS[a.element_size()]
    return a.shape == b.shape and a.dtype is b.dtype and torch.equal(a.view(kind), b.view(kind))


@LEVELS
@settings(max_examples=60, deadline=None)
@given(
    count=st.one_of(st.integers(0, 300), st.integers(8000, 20000)),
    sparsity=st.sampled_from([0.0, 0.1, 0.5, 0.6, 0.9, 1.0]),
    dtype=st.sampled_from(DTYPES),
    parallel=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_bit_comes_back(level, count, sparsity, dtype, parallel, seed):
    module = _module(level)
    dense = random(count, sparsity, dtype, seed)
    bitmap = compress(dense, module=module)
    assert same_bits(expand(bitmap, parallel=parallel, module=module), dense)
    assert same_bits(reference.expand(bitmap), dense)
    kept = int((dense.view(BITS[dtype.itemsize]) != 0).sum())
    assert bitmap.nbytes == kept * dtype.itemsize + -(-count // 8) + 4 * (block_count(count) + 1)


@LEVELS
def test_minus_zero_and_nan_payloads_are_values(level):
    dense = torch.tensor([0x0000, 0x8000, 0x7FC1, 0x0000, 0x7F80, 0x0001], dtype=torch.int32)
    dense = dense.to(torch.int16).view(torch.bfloat16)
    bitmap = compress(dense, module=_module(level))
    assert bitmap.values.numel() == 4
    assert same_bits(expand(bitmap, module=_module(level)), dense)


@LEVELS
def test_blocks_are_independent(level):
    """Any block alone, with everything before it destroyed."""
    module = _module(level)
    dense = random(5 * BLOCK_ELEMENTS + 77, 0.5, torch.bfloat16, 3)
    bitmap = compress(dense, module=module)
    for block in (5, 0, 3):
        first = block * BLOCK_ELEMENTS
        broken = Bitmap(bitmap.shape, bitmap.bits.clone(), bitmap.values.clone(), bitmap.start)
        broken.bits[: first // 8] = 255
        broken.values[: int(bitmap.start[block])] = 7
        found = expand_block(broken, block, module=module)
        assert same_bits(found, dense[first : first + BLOCK_ELEMENTS])


def test_wrong_input_is_named():
    bitmap = compress(random(9000, 0.5, torch.float16, 0))
    for bad, error, message in (
        ({"bits": bitmap.bits[:-1]}, ValueError, "bits must be"),
        ({"values": bitmap.values[:-1]}, ValueError, "start: must rise"),
        ({"start": bitmap.start.long()}, TypeError, "start must be"),
        ({"start": bitmap.start.flip(0)}, ValueError, "start: must rise"),
        ({"shape": (9000, 2)}, ValueError, "bits must be"),
    ):
        with pytest.raises(error, match=message):
            expand(replace(bitmap, **bad))
    with pytest.raises(ValueError, match="out must be"):
        expand(bitmap, torch.empty(8999, dtype=torch.float16))
    with pytest.raises(TypeError, match="out must be"):
        expand(bitmap, torch.empty(9000))
    with pytest.raises(ValueError, match="block = 2"):
        expand_block(bitmap, 2)
    with pytest.raises(TypeError, match="1, 2 or 4 bytes"):
        compress(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="contiguous"):
        compress(torch.zeros(4, 4)[:, ::2])


@LEVELS
def test_bits_beyond_the_values_read_nothing(level):
    """A damaged bitmap with more ones than values gives zeros, not what lies behind the array."""
    bitmap = compress(random(200, 0.5, torch.bfloat16, 1))
    damaged = replace(bitmap, bits=torch.full_like(bitmap.bits, 255))
    found = expand(damaged, module=_module(level))
    kept = bitmap.values.numel()
    assert same_bits(found[:kept], bitmap.values)
    assert not bool(found[kept:].view(torch.int16).any())
