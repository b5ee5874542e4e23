"""Exact attention over pages: query rows x pieces (runs of pages), their merge, and gathered attention.

Every exact kernel of hasten is this template: a plan says which rows read which pieces, `attend_pieces` gives a
partial ``(out, lse)`` per (row, piece) and `merge` joins the parts of a row (online softmax; Milakov and Gimelshein,
arXiv 1805.02867; the merge is equation-level the same as split-KV FlashAttention and Hydragen section 3.1).
``lse`` is a natural logarithm; an empty part has out 0 and lse -inf.

Legend: T query rows, H query heads, G kv heads, D head size, N pages, P page size, J pieces, E entries
(one per row that reads a piece), C page references, R chosen rows, X heads of a selection (G or H),
K selected tokens, M pages per row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hasten.kernels.reference import attention as reference

__all__ = ["PieceWork", "attend_pieces", "attend_tokens", "merge"]


@dataclass(frozen=True, eq=False)
class PieceWork:
    """Which query rows read which runs of pages. All tensors int32, contiguous, on the CPU.

    Piece j reads pages ``page_C[page_start_J1[j]:page_start_J1[j + 1]]`` in this order; its tokens are
    numbered from 0. It is read by entries ``row_start_J1[j]:row_start_J1[j + 1]``. Entry e is query row
    ``row_E[e]`` and sees the piece's tokens ``[first_E[e], limit_E[e])``; ``limit <= first`` is an empty part.
    """

    page_C: Tensor
    page_start_J1: Tensor
    row_start_J1: Tensor
    row_E: Tensor
    first_E: Tensor
    limit_E: Tensor
    cache: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def pieces(self) -> int:
        return self.page_start_J1.numel() - 1

    @property
    def entries(self) -> int:
        return self.row_E.numel()


def attend_pieces(
    q_THD: Tensor, k_NGPD: Tensor, v_NGPD: Tensor, work: PieceWork, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of every entry of ``work``: ``(out_EHD float32, lse_EH float32)``."""
    return reference.attend_pieces(q_THD, k_NGPD, v_NGPD, work, scale, softcap)


def merge(out_EHD: Tensor, lse_EH: Tensor, entry_start_T1: Tensor, entry_E: Tensor) -> tuple[Tensor, Tensor]:
    """Join the parts of each row: row t owns entries ``entry_E[entry_start_T1[t]:entry_start_T1[t + 1]]``."""
    return reference.merge(out_EHD, lse_EH, entry_start_T1, entry_E)


def attend_tokens(
    q_RHD: Tensor,
    k_NGPD: Tensor,
    v_NGPD: Tensor,
    page_table_RM: Tensor,
    index_RXK: Tensor,
    count_RX: Tensor,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over chosen tokens, read straight from the pages: ``(out_RHD, lse_RH)``."""
    return reference.attend_tokens(q_RHD, k_NGPD, v_NGPD, page_table_RM, index_RXK, count_RX, scale, softcap)
