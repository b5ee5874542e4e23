"""A decoding step in one native call, from token ids to logits, for sequences that bring one row each.

Legend: T rows, E hidden size, V vocabulary, M pages per sequence, N positions of a rotary table, R rotated dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hasten.kernels.block import Reading, Stack
from hasten.kernels.packed import Packed, address

__all__ = ["Ends", "Round", "Selector"]


class Selector(Protocol):
    """What a layer's decode rows read once their contexts exceed ``budget`` tokens; a native object."""

    budget: int

    @property
    def handle(self) -> Any: ...


class Ends:
    """What lies before the first layer and after the last: embedding, final RMSNorm, LM head.

    table: the embedding, float32 or bfloat16 [V, E], or the packed layer whose weights it shares. scale: factor on the
    embedded rows. Raises ValueError or TypeError for parts that do not fit each other.
    """

    __slots__ = ("_handle", "keep", "module", "vocabulary")

    def __init__(
        self, table: Tensor | Packed, norm_E: Tensor, head: Packed, *, scale: float = 1.0, eps: float
    ) -> None:
        hidden, self.vocabulary = head.inputs, head.outputs
        self.module, self.keep = head.module, (table, norm_E, head)
        packed, plain, bf16 = None, 0, False
        if isinstance(table, Packed):
            packed = table.handle
        else:
            plain = address("table_VE", table, (self.vocabulary, hidden), torch.float32, torch.bfloat16)
            bf16 = table.dtype is torch.bfloat16
        norm = address("norm_E", norm_E, (hidden,), torch.float32)
        self._handle: Any = self.module.decode_ends(
            packed, plain, bf16, self.vocabulary, scale, norm, eps, head.handle
        )

    @property
    def handle(self) -> Any:
        """The native object."""
        return self._handle


class Round:
    """Steps of the same sequences; what the first of them planned moves on with their lengths.

    readings: schedule, scale and soft cap per kind of layer, with its sliding window (None: none), for one row per
    sequence. table_TM: int32 page tables; a step may only write into pages that they name. selectors: what a policy
    chooses tokens with, per layer (None: the layer reads densely), or empty for no policy. Rows on both sides of a
    budget cannot be in one step.
    Raises ValueError for parts that do not fit each other.
    """

    __slots__ = ("_handle", "_module", "keep", "rows", "vocabulary")

    def __init__(
        self,
        stack: Stack,
        ends: Ends,
        readings: Sequence[tuple[Reading, int | None]],
        table_TM: Tensor,
        selectors: Sequence[Selector | None] = (),
    ) -> None:
        if table_TM.dtype is not torch.int32 or table_TM.dim() != 2:
            raise ValueError(f"table_TM must be int32 [T, M], not {table_TM.dtype} {tuple(table_TM.shape)}")
        self.rows, self.vocabulary = table_TM.shape[0], ends.vocabulary
        self.keep = (stack, ends, tuple(readings), tuple(selectors))
        self._handle: Any = stack.module.decode_round(
            stack.handle,
            ends.handle,
            [
                (part.schedule.handle, -1 if window is None else window, part.scale, part.softcap or 0.0)
                for part, window in readings
            ],
            table_TM.contiguous().numpy(),
            [None if selector is None else selector.handle for selector in selectors],
        )
        self._module = stack.module

    def extend(self, row: int, at: int, page: int) -> bool:
        """A row goes on in ``page``, the ``at``-th of its sequence; False if the round has to be planned anew."""
        return bool(self._module.decode_extend(self._handle, row, at, page))

    def step(
        self,
        ids: Sequence[int],
        positions: Sequence[int],
        slots: Sequence[int],
        lengths: Sequence[int],
        ropes: Sequence[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, list[int]]:
        """``(logits float32 [T, V], best)``; best: each row's highest logit's token, -1 where a logit is not finite.

        ids, rotary positions, slots (page * P + offset) and lengths (this token included) by row; ropes: cos and sin
        of all positions, float32 [N, R], per rope of the stack. Raises ValueError for what lies outside the tables.
        """
        logits_TV = torch.empty(self.rows, self.vocabulary)
        tables = [(cos.data_ptr(), sin.data_ptr(), cos.shape[1], cos.shape[0]) for cos, sin in ropes]
        best = self._module.decode_step(
            self._handle, ids, positions, slots, lengths, tables, logits_TV.data_ptr()
        )
        return logits_TV, best
