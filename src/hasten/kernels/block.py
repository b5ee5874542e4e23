"""Decoder layers and whole stacks of them on packed weights: a few native calls instead of some twenty per layer.

`Block` is one layer (hasten.models.decoder.DecoderLayer is the definition), cut where attention comes in between;
`Stack` runs all layers of a step at once when every layer reads what a schedule says.

Legend: T rows, E hidden size, I inner size of the MLP, H query heads, G kv heads, D head size, W = (H + 2 G) D,
R rotated dimensions, N pages, P page size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hasten.kernels.native import native
from hasten.kernels.packed import Packed, address
from hasten.kernels.pages import page_kind
from hasten.kernels.schedule import Schedule

__all__ = ["Block", "Norms", "Reading", "Stack", "gated", "rms_norm"]


def _rows(name: str, value: Tensor, width: int) -> int:
    """How many rows a contiguous float32 [T, width] tensor has."""
    if value.dtype is not torch.float32:
        raise TypeError(f"{name} must be float32, not {value.dtype}")
    if value.dim() != 2 or value.shape[1] != width or not value.is_contiguous():
        raise ValueError(f"{name} must be contiguous [T, {width}], not shape {tuple(value.shape)}")
    return value.shape[0]


def rms_norm(x_TE: Tensor, weight_E: Tensor, eps: float, *, module: ModuleType | None = None) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` per row, float32 (Zhang and Sennrich, arXiv 1910.07467, equation 4).

    Raises TypeError for a wrong dtype and ValueError for a wrong shape.
    """
    lib = native() if module is None else module
    width = x_TE.shape[-1]
    rows = _rows("x_TE", x_TE, width)
    weight = address("weight_E", weight_E, (width,), torch.float32)
    y_TE = torch.empty_like(x_TE)
    lib.rms_norm(x_TE.data_ptr(), rows, width, weight, eps, y_TE.data_ptr())
    return y_TE


def gated(gate_up_TI2: Tensor, *, gelu: bool = False, module: ModuleType | None = None) -> None:
    """The gate half of every row becomes ``activation(gate) * up``, in place; float32 [T, 2 I].

    The activation is SiLU, or GELU with its tanh form (Shazeer, arXiv 2002.05202, section 2).
    Raises TypeError for a wrong dtype and ValueError for an odd width or rows that are not contiguous.
    """
    lib = native() if module is None else module
    width = gate_up_TI2.shape[-1]
    rows = _rows("gate_up_TI2", gate_up_TI2, width)
    if width % 2:
        raise ValueError(f"gate_up_TI2 must hold a gate and an up half, not {width} columns")
    lib.gated(gate_up_TI2.data_ptr(), rows, width // 2, gelu)


@dataclass(frozen=True)
class Norms:
    """RMSNorm weights of a layer, float32: [E], those of queries and keys [D]; None where the family has none."""

    input_E: Tensor
    mlp_E: Tensor
    q_D: Tensor | None = None
    k_D: Tensor | None = None
    post_attention_E: Tensor | None = None
    post_mlp_E: Tensor | None = None


class Block:
    """One decoder layer over packed linears. Float32 in and out; new tensors are returned.

    Raises ValueError or TypeError when the parts do not fit each other; the calls raise them for wrong inputs.
    """

    __slots__ = ("_handle", "heads", "hidden", "keep", "kv_heads", "module", "size", "width")

    def __init__(
        self,
        qkv: Packed,
        o: Packed,
        gate_up: Packed,
        down: Packed,
        norms: Norms,
        *,
        heads: int,
        kv_heads: int,
        size: int,
        eps: float,
        gelu: bool = False,
    ) -> None:
        self.module = qkv.module
        self.hidden, self.heads, self.kv_heads, self.size = qkv.inputs, heads, kv_heads, size
        self.width = (heads + 2 * kv_heads) * size
        self.keep = (qkv, o, gate_up, down, norms)
        hidden, head, single = (self.hidden,), (size,), torch.float32
        self._handle = self.module.block(
            qkv.handle,
            o.handle,
            gate_up.handle,
            down.handle,
            address("norms.input_E", norms.input_E, hidden, single),
            address("norms.mlp_E", norms.mlp_E, hidden, single),
            address("norms.q_D", norms.q_D, head, single),
            address("norms.k_D", norms.k_D, head, single),
            address("norms.post_attention_E", norms.post_attention_E, hidden, single),
            address("norms.post_mlp_E", norms.post_mlp_E, hidden, single),
            heads,
            kv_heads,
            size,
            eps,
            gelu,
        )

    def attention_in(self, x_TE: Tensor) -> Tensor:
        """Norm, projections and QK-norm: [T, W], rows of queries, keys and values."""
        rows = _rows("x_TE", x_TE, self.hidden)
        qkv_TW = torch.empty(rows, self.width)
        self.module.block_attention_in(self._handle, x_TE.data_ptr(), rows, qkv_TW.data_ptr())
        return qkv_TW

    def attention_out(self, out_TV: Tensor, x_TE: Tensor) -> Tensor:
        """``x`` plus the projected (and normed) attention output ``out_TV`` [T, H D]."""
        rows = _rows("x_TE", x_TE, self.hidden)
        if _rows("out_TV", out_TV, self.heads * self.size) != rows:
            raise ValueError(f"out_TV has {out_TV.shape[0]} rows, x_TE {rows}")
        y_TE = torch.empty_like(x_TE)
        self.module.block_attention_out(
            self._handle, out_TV.data_ptr(), x_TE.data_ptr(), rows, y_TE.data_ptr()
        )
        return y_TE

    def mlp(self, x_TE: Tensor) -> Tensor:
        """``x`` plus the feed-forward half: norm, gated projections, (norm)."""
        rows = _rows("x_TE", x_TE, self.hidden)
        y_TE = torch.empty_like(x_TE)
        self.module.block_mlp(self._handle, x_TE.data_ptr(), rows, y_TE.data_ptr())
        return y_TE


@dataclass(frozen=True)
class Reading:
    """What the layers of one kind read in a step."""

    schedule: Schedule
    scale: float
    softcap: float | None


class Stack:
    """All layers of a decoder over plain pages. ``rope_of`` and ``reading_of`` say which of a step's tables and
    readings each layer uses (counted from 0, without gaps).

    k_NGPD, v_NGPD: per layer, contiguous, of one dtype (`hasten.kernels.pages`); the stack keeps them alive.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        k_NGPD: Sequence[Tensor],
        v_NGPD: Sequence[Tensor],
        rope_of: Sequence[int],
        reading_of: Sequence[int],
    ) -> None:
        first = k_NGPD[0]
        pages, _, page, _ = first.shape
        kind, tail = page_kind(first, first)
        for pool in (*k_NGPD, *v_NGPD):
            if pool.dtype is not first.dtype:
                raise TypeError(f"pages of all layers must be {first.dtype}, not {pool.dtype}")
        for block, keys, values in zip(blocks, k_NGPD, v_NGPD, strict=True):
            shape = (pages, block.kv_heads, page, block.size + tail)
            address("k_NGPD", keys, shape, first.dtype)
            address("v_NGPD", values, shape, first.dtype)
        self.module, self.page, self.hidden = blocks[0].module, page, blocks[0].hidden
        self.keep = (tuple(blocks), tuple(k_NGPD), tuple(v_NGPD))
        self._handle: Any = self.module.stack(
            [block._handle for block in blocks],
            [keys.data_ptr() for keys in k_NGPD],
            [values.data_ptr() for values in v_NGPD],
            list(rope_of),
            list(reading_of),
            pages,
            page,
            kind,
        )

    @property
    def handle(self) -> Any:
        """The native object."""
        return self._handle

    def step(
        self,
        x_TE: Tensor,
        slot_T: Tensor,
        tables: Sequence[tuple[Tensor, Tensor]],
        readings: Sequence[Reading],
    ) -> None:
        """Run all layers on ``x_TE`` (float32, overwritten); keys and values are cached at ``slot_T`` (int64).

        tables: cos and sin per rope, float32 [T, R]. Raises ValueError or TypeError for what does not fit.
        """
        rows = _rows("x_TE", x_TE, self.hidden)
        ropes = []
        for cos_TR, sin_TR in tables:
            shape = (rows, cos_TR.shape[1])
            cos = address("cos_TR", cos_TR, shape, torch.float32)
            ropes.append((cos, address("sin_TR", sin_TR, shape, torch.float32), shape[1]))
        reads = []
        for reading in readings:
            if reading.softcap is not None and not reading.softcap > 0:
                raise ValueError(f"softcap must be positive, not {reading.softcap}")
            reads.append((reading.schedule.handle, reading.scale, reading.softcap or 0.0))
        if slot_T.dtype is not torch.int64 or slot_T.dim() != 1 or not slot_T.is_contiguous():
            raise ValueError(f"slot_T must be contiguous int64 [T], not {slot_T.dtype} {tuple(slot_T.shape)}")
        self.module.stack_step(self._handle, x_TE.data_ptr(), rows, slot_T.numpy(), ropes, reads)
