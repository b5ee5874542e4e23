"""Linear layers of bit planes, multiplied by table look-up (T-MAN, arXiv 2511.11248): w = scale * code + low.

Codes of 1 to 4 bits are cut into planes (native/src/kernels/t_man.h has the layout); one copy serves few and many rows.
Few rows: tables hold the 16 signed sums of every four activations, once per row, and each nibble of a plane looks one
up. With codes u of b bits, sum_k u_k x_k = sum_i 2^(i-1) c_i + (2^b - 1) / 2 sum_k x_k, c_i being what plane i found.
Many rows: nibbles are looked up as partial codes and codes as float32 weights, a panel at a time, before a dense
product.

Tables are rounded to int16 with a scale per 256 stored columns, or to int8 with a scale per 64; weights never.

Legend: T rows, I inputs, O outputs, K stored columns, N blocks of 16 outputs, U units of 16 columns, B bits, G groups,
P outputs filled up to whole blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from hasten.kernels.affine import (
    HALF,
    OFFSET,
    ZERO,
    AffineWeight,
    Numbers,
    checked_codes,
    group_count,
    number_address,
)
from hasten.kernels.affine import dequantize as affine_dequantize
from hasten.kernels.native import native
from hasten.kernels.packed import BLOCK, Packed, address

BITS = (1, 2, 3, 4)
UNIT = 16  # columns
TABLES = ("int16", "int8")
_VECTOR = 32  # bytes


@dataclass(frozen=True, eq=False)
class PlaneWeight:
    """A packed weight. planes: uint8 [N, U, B, 32]. group_size: stored columns per group, a multiple of 16.

    scale, low, nest, column_K, bias_P: as in `AffineWeight`. tables: "int16" or "int8".
    """

    inputs: int
    outputs: int
    bits: int
    group_size: int
    planes: Tensor
    scale: Numbers
    low: Numbers
    nest: int = 1
    column_K: Tensor | None = None
    bias_P: Tensor | None = None
    tables: str = "int16"

    @property
    def width(self) -> int:
        """Stored columns."""
        return self.inputs if self.column_K is None else self.column_K.numel()


def pack_planes(codes_OK: Tensor, bits: int) -> Tensor:
    """Cut uint8 codes [O, K] into planes, uint8 [N, U, B, 32].

    Raises `TypeError` (dtype) or `ValueError` (shape, or a code that exceeds ``bits``).
    """
    codes_OK = checked_codes(codes_OK, bits, BITS)
    outputs, columns = codes_OK.shape
    planes = torch.empty(-(-outputs // BLOCK), -(-columns // UNIT), bits, _VECTOR, dtype=torch.uint8)
    if not native().tman_pack(codes_OK.data_ptr(), outputs, columns, bits, planes.data_ptr()):
        raise ValueError(f"codes reach {int(codes_OK.max())}; {bits} bits end at {(1 << bits) - 1}")
    return planes


def unpack_planes(planes: Tensor, outputs: int, columns: int) -> Tensor:
    """The codes uint8 [O, K] that `pack_planes` cut."""
    blocks, units, bits, _ = planes.shape
    address("planes", planes, (-(-outputs // BLOCK), -(-columns // UNIT), bits, _VECTOR), torch.uint8)
    place = torch.arange(4, dtype=torch.uint8)
    code_NUvRhj = torch.zeros(blocks, units, 2, BLOCK, 2, 4, dtype=torch.uint8)
    for plane in range(bits):
        if plane < bits // 2 * 2:
            first = plane // 2 * 2
            byte_NUvR = planes[:, :, first : first + 2].unflatten(-1, (BLOCK, 2))[..., plane % 2]
        else:
            byte_NUvR = planes[:, :, plane].unflatten(-1, (2, BLOCK))
        nibble_NUvRh = torch.stack([byte_NUvR & 15, byte_NUvR >> 4], dim=-1)
        code_NUvRhj |= (nibble_NUvRh[..., None] >> place & 1) << plane
    codes_PK = code_NUvRhj.permute(0, 3, 1, 2, 4, 5).flatten(2).flatten(0, 1)
    return codes_PK[:outputs, :columns].contiguous()


def dequantize(weight: PlaneWeight) -> Tensor:
    """The exact float32 weight [O, I]: `hasten.kernels.affine.dequantize` of the planes' codes."""
    codes_OK = unpack_planes(weight.planes, weight.outputs, weight.width)
    return affine_dequantize(_grid(weight), codes_OK)


def _grid(weight: PlaneWeight) -> AffineWeight:
    """The same scales and lows, without codes."""
    words = torch.empty(-(-weight.outputs // BLOCK), 0, 0, BLOCK, dtype=torch.int32)
    return AffineWeight(
        weight.inputs,
        weight.outputs,
        weight.bits,
        weight.group_size,
        words,
        weight.scale,
        weight.low,
        weight.nest,
        weight.column_K,
        weight.bias_P,
    )


def t_man(weight: PlaneWeight, *, module: ModuleType | None = None) -> Packed:
    """The layer of a packed weight.

    module: a native module of another level than the best (tests). Raises `TypeError` or `ValueError` naming the
    tensor that does not fit the others.
    """
    width, bits, size = weight.width, weight.bits, weight.group_size
    if bits not in BITS:
        raise ValueError(f"bits = {bits}: bit planes hold {', '.join(map(str, BITS))} bits")
    if size < 1 or size % HALF or weight.nest < 1:
        raise ValueError(f"group_size = {size}, nest = {weight.nest}: groups are multiples of {HALF} columns")
    if weight.scale.kind in (OFFSET, ZERO):
        raise ValueError("scales cannot be multiples of themselves")
    if weight.tables not in TABLES:
        raise ValueError(f"tables = {weight.tables!r}: choose one of {', '.join(TABLES)}")
    if weight.column_K is not None and (
        int(weight.column_K.max()) >= weight.inputs or int(weight.column_K.min()) < -1
    ):
        raise ValueError(f"column names an input outside [0, {weight.inputs})")
    blocks, groups = -(-weight.outputs // BLOCK), group_count(width, size)
    grid = _grid(weight)
    scale, outer_scale = number_address("scale", weight.scale, grid, groups)
    low, outer_low = number_address("low", weight.low, grid, groups)
    lib = native() if module is None else module
    handle = lib.packed_tman(
        weight.inputs,
        weight.outputs,
        bits,
        width,
        size // HALF,
        groups,
        weight.nest,
        address("planes", weight.planes, (blocks, -(-width // UNIT), bits, _VECTOR), torch.uint8),
        weight.scale.kind,
        scale,
        outer_scale,
        weight.low.kind,
        low,
        outer_low,
        weight.low.offset,
        address("bias", weight.bias_P, (blocks * BLOCK,), torch.float32),
        address("column", weight.column_K, (width,), torch.int32),
        weight.tables == "int16",
    )
    return Packed(lib, handle, weight.inputs, weight.outputs, (weight,))


def share_tables(parts: Sequence[Packed]) -> Packed:
    """One layer of several `t_man` layers that meet the same input, whose tables are then built once.

    Raises `ValueError` for parts that differ in inputs or tables, or that reorder their inputs.
    """
    if not parts:
        raise ValueError("a stack needs at least one part")
    handle = parts[0].module.packed_tman_shared([part.handle for part in parts])
    return Packed(parts[0].module, handle, parts[0].inputs, sum(part.outputs for part in parts), tuple(parts))


def tables_built(module: ModuleType | None = None) -> int:
    """Rows for which tables were built in this process so far: one per row and distinct input of layers."""
    return int((native() if module is None else module).tman_tables_built())


def multiply(layer: Packed, x_TI: Tensor, how: str) -> Tensor:
    """``x_TI @ W^T + bias`` on one path whatever the number of rows: "lookup" or "dequantize". For measuring."""
    if how not in ("lookup", "dequantize"):
        raise ValueError(f"how = {how!r}: lookup or dequantize")
    x = address("x_TI", x_TI, (x_TI.shape[0], layer.inputs), torch.float32)
    y_TO = torch.empty(x_TI.shape[0], layer.outputs)
    layer.module.tman_by(layer.handle, how == "lookup", x, x_TI.shape[0], y_TO.data_ptr())
    return y_TO


def table_weights(layer: Packed, width: int) -> Tensor:
    """The weights in stored order that the two dequantisation tables give, float32 [O, K]."""
    weight_OK = torch.empty(layer.outputs, width)
    layer.module.tman_dequantize(layer.handle, weight_OK.data_ptr())
    return weight_OK


__all__ = [
    "BITS",
    "TABLES",
    "UNIT",
    "PlaneWeight",
    "dequantize",
    "multiply",
    "pack_planes",
    "share_tables",
    "t_man",
    "table_weights",
    "tables_built",
    "unpack_planes",
]
