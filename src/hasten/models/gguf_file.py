"""A GGUF file's metadata and tensor table, and its tensors as views of the mapped file.

The `gguf` package's own reader makes several array objects per metadata element, which takes seconds for a
vocabulary; this one reads the same layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) in one pass
with bounds checks, so that a truncated file is told from a damaged one. Types, sizes and dequantisation are the
package's.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize as gguf_dequantize
from torch import Tensor

from hasten.core.errors import ModelFormatError, UnsupportedError

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QUANTISED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")

_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


@dataclass(frozen=True)
class GGUFTensor:
    """One row of the tensor table. ``shape`` in row-major order (outputs first); ``start``, ``end`` in file bytes."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    end: int


class GGUFFile:
    """Metadata ``fields`` (arrays of strings as lists, of numbers as tuples) and the tensor table ``tensors``.

    Raises `ModelFormatError`: wrong magic, version, truncated, damaged table, file of a split model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        with path.open("rb") as stream:
            magic = stream.read(4)
            if magic != b"GGUF":
                raise ModelFormatError(f"{path}: not a GGUF file (begins with {magic!r}, not b'GGUF')")
            # A private mapping: nothing here writes, but torch wants a writable buffer.
            self.data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        self._at = 4
        version = self._scalar("I")
        if version not in (2, 3):
            what = "big-endian" if version & 0xFFFF == 0 else f"version {version}"
            raise ModelFormatError(f"{path}: {what} GGUF is not supported (versions 2 and 3, little-endian)")
        tensor_count, field_count = self._scalar("Q"), self._scalar("Q")
        self.fields: dict[str, Any] = {}
        for _ in range(field_count):
            key = self._string()
            if key in self.fields:
                raise ModelFormatError(f"{path}: metadata key {key!r} appears twice")
            self.fields[key] = self._value(self._scalar("I"))
        if (parts := self.fields.get("split.count", 1)) not in (0, 1):
            raise ModelFormatError(
                f"{path}: one of {parts} parts of a split model; merge them with llama-gguf-split --merge"
            )
        self.tensors = self._tensor_table(tensor_count)

    def _need(self, count: int) -> int:
        at = self._at
        if count < 0 or at + count > self.size:
            raise ModelFormatError(
                f"{self.path}: truncated: the header needs byte {at + count}, the file has {self.size}"
            )
        self._at = at + count
        return at

    def _scalar(self, code: str) -> Any:
        return struct.unpack_from("<" + code, self.data, self._need(struct.calcsize("<" + code)))[0]

    def _string(self) -> str:
        length = self._scalar("Q")
        at = self._need(length)
        return self.data[at : at + length].decode("utf-8", errors="surrogateescape")

    def _value(self, kind: int) -> Any:
        if kind == GGUFValueType.STRING:
            return self._string()
        if kind == GGUFValueType.ARRAY:
            item, count = self._scalar("I"), self._scalar("Q")
            if item == GGUFValueType.STRING:
                return self._strings(count)
            if item in _SCALARS:
                code = _SCALARS[GGUFValueType(item)]
                at = self._need(count * struct.calcsize("<" + code))
                return struct.unpack_from(f"<{count}{code}", self.data, at)
            raise ModelFormatError(f"{self.path}: metadata array of unknown type {item}")
        if kind not in _SCALARS:
            raise ModelFormatError(f"{self.path}: metadata value of unknown type {kind}")
        return self._scalar(_SCALARS[GGUFValueType(kind)])

    def _strings(self, count: int) -> list[str]:
        # Runs once per token of a vocabulary: locals, one slice per string, bounds checked as it goes.
        data, at, size = self.data, self._at, self.size
        self._need(8 * count)
        strings = []
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at + 8 > size:
                break
            end = at + 8 + unpack(data, at)[0]
            if end > size:
                break
            strings.append(data[at + 8 : end].decode("utf-8", errors="surrogateescape"))
            at = end
        if len(strings) != count:
            raise ModelFormatError(
                f"{self.path}: truncated: string {len(strings)} of {count} ends beyond the file's {self.size} bytes"
            )
        self._at = at
        return strings

    def _tensor_table(self, count: int) -> dict[str, GGUFTensor]:
        rows = []
        for _ in range(count):
            name, dims = self._string(), self._scalar("I")
            if dims > 8:
                raise ModelFormatError(
                    f"{self.path}: tensor {name!r} claims {dims} dimensions; damaged table"
                )
            shape = tuple(self._scalar("Q") for _ in range(dims))[::-1]
            rows.append((name, shape, self._scalar("I"), self._scalar("Q")))
        align = self.fields.get("general.alignment", 32)
        if not isinstance(align, int) or align <= 0 or align & (align - 1):
            raise ModelFormatError(f"{self.path}: alignment {align!r} is not a power of two")
        base = -(-self._at // align) * align
        tensors: dict[str, GGUFTensor] = {}
        for name, shape, number, offset in rows:
            try:
                kind = GGMLQuantizationType(number)
            except ValueError:
                raise ModelFormatError(f"{self.path}: tensor {name!r} has unknown type {number}") from None
            block, size = GGML_QUANT_SIZES[kind]
            if (shape[-1] if shape else 1) % block:
                raise ModelFormatError(
                    f"{self.path}: rows of {name!r} hold {shape[-1]} values, not a multiple of {kind.name}'s {block}"
                )
            start = base + offset
            end = start + math.prod(shape) // block * size
            if end > self.size:
                raise ModelFormatError(
                    f"{self.path}: truncated: tensor {name!r} ends at byte {end}, the file has {self.size}"
                )
            if offset % align or name in tensors:
                raise ModelFormatError(
                    f"{self.path}: tensor {name!r} is misaligned or listed twice; damaged table"
                )
            tensors[name] = GGUFTensor(name, kind.name, shape, start, end)
        return tensors

    def check_kind(self, tensor: GGUFTensor) -> None:
        """Raise `UnsupportedError` for a storage type that cannot be read."""
        if tensor.kind not in PLAIN and tensor.kind not in QUANTISED:
            raise UnsupportedError(
                f"{self.path}: tensor {tensor.name!r} is stored as {tensor.kind} "
                f"(supported: {', '.join((*PLAIN, *QUANTISED))})"
            )

    def read(self, name: str) -> Tensor:
        """A tensor as a view of the file: floating point in its shape, or uint8 [..., bytes per row]."""
        tensor = self.tensors[name]
        self.check_kind(tensor)
        if tensor.end == tensor.start:
            return torch.empty(tensor.shape)
        count = tensor.end - tensor.start
        raw = torch.frombuffer(self.data, dtype=torch.uint8, count=count, offset=tensor.start)
        if tensor.kind in PLAIN:
            return raw.view(PLAIN[tensor.kind]).view(tensor.shape)
        return raw.view(*tensor.shape[:-1], -1)


def dequantize(kind: str, data_OB: Tensor, inputs: int) -> Tensor:
    """Quantised rows as float32 [O, I], by the `gguf` package."""
    ggml = GGMLQuantizationType[kind]
    _, size = GGML_QUANT_SIZES[ggml]
    rows = data_OB.shape[0]
    if rows == 0:
        return torch.empty(0, inputs)
    # The package works through 16 rows at a time; blocks are independent, so wider rows mean fewer, larger steps.
    blocks = data_OB.numel() // size
    wide = math.gcd(blocks, 1 << 9)
    flat = gguf_dequantize(data_OB.contiguous().numpy().reshape(blocks // wide, wide * size), ggml)
    return torch.from_numpy(np.ascontiguousarray(flat)).view(rows, inputs)
