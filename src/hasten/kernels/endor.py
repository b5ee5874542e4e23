"""Bitmap-compressed sparse tensors (Endor, arXiv 2406.11674): a bit per element and the values of those that are set.

What is left out are elements whose bits are all zero: +0.0. A stored -0.0 or NaN keeps its bits. Every `BLOCK_ELEMENTS`
elements note where their values begin, so that blocks are expanded independently of each other.

Legend: N elements, V values kept, C blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from hasten.kernels.native import native
from hasten.kernels.packed import address

BLOCK_ELEMENTS = 8192
_AS_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@dataclass(frozen=True, eq=False)
class Bitmap:
    """A compressed tensor of ``shape``. bits: uint8, element i is bit i % 8 of byte i // 8. values: [V] in the dtype.

    start: int32 [C + 1], index of each block's first value; the last is V.
    """

    shape: tuple[int, ...]
    bits: Tensor
    values: Tensor
    start: Tensor

    @property
    def count(self) -> int:
        """Elements."""
        return int(torch.Size(self.shape).numel())

    @property
    def nbytes(self) -> int:
        """Bytes of the three parts."""
        return self.bits.nbytes + self.values.nbytes + self.start.nbytes


def block_count(count: int) -> int:
    """Blocks of ``count`` elements."""
    return -(-count // BLOCK_ELEMENTS)


def compress(dense: Tensor, *, module: ModuleType | None = None) -> Bitmap:
    """Compress a tensor of 1-, 2- or 4-byte elements. Raises `TypeError` (dtype) or `ValueError` (not contiguous)."""
    size = dense.element_size()
    if size not in _AS_INTEGERS or dense.dtype is torch.bool:
        raise TypeError(f"elements must have 1, 2 or 4 bytes, not {dense.dtype}")
    if not dense.is_contiguous() or dense.device.type != "cpu":
        raise ValueError("dense must be contiguous and on the CPU")
    count = dense.numel()
    kept = int((dense.view(_AS_INTEGERS[size]) != 0).sum())
    bits = torch.empty(-(-count // 8), dtype=torch.uint8)
    values = torch.empty(kept, dtype=dense.dtype)
    start = torch.empty(block_count(count) + 1, dtype=torch.int32)
    lib = native() if module is None else module
    lib.bitmap_compress(dense.data_ptr(), count, size, bits.data_ptr(), values.data_ptr(), start.data_ptr())
    return Bitmap(tuple(dense.shape), bits, values, start)


def expand(
    bitmap: Bitmap, out: Tensor | None = None, *, parallel: bool = True, module: ModuleType | None = None
) -> Tensor:
    """The dense tensor, into ``out`` if given. Raises `ValueError` or `TypeError` naming the part that does not fit."""
    if out is None:
        out = torch.empty(bitmap.shape, dtype=bitmap.values.dtype)
    to = address("out", out, bitmap.shape, bitmap.values.dtype)
    _run(bitmap, 0, block_count(bitmap.count), to, parallel, module)
    return out


def expand_block(bitmap: Bitmap, block: int, *, module: ModuleType | None = None) -> Tensor:
    """Elements of one block, flat. Raises `ValueError` for a block that does not exist."""
    if not 0 <= block < block_count(bitmap.count):
        raise ValueError(f"block = {block}: there are {block_count(bitmap.count)}")
    out = torch.empty(min(BLOCK_ELEMENTS, bitmap.count - block * BLOCK_ELEMENTS), dtype=bitmap.values.dtype)
    _run(bitmap, block, 1, out.data_ptr(), False, module)
    return out


def _run(bitmap: Bitmap, first: int, blocks: int, to: int, parallel: bool, module: ModuleType | None) -> None:
    count, kept = bitmap.count, bitmap.values.numel()
    bits = address("bits", bitmap.bits, (-(-count // 8),), torch.uint8)
    values = address("values", bitmap.values, (kept,), bitmap.values.dtype)
    start = address("start", bitmap.start, (block_count(count) + 1,), torch.int32)
    begin = bitmap.start.numpy()
    if begin[0] != 0 or begin[-1] != kept or bool((begin[1:] < begin[:-1]).any()):
        raise ValueError(f"start: must rise from 0 to the {kept} values")
    lib = native() if module is None else module
    lib.bitmap_expand(bits, values, start, count, bitmap.values.element_size(), first, blocks, to, parallel)
