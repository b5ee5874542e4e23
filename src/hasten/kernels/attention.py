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
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hasten.kernels.native import native
from hasten.kernels.pages import page_kind

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

    def handle(self, page_size: int, module: ModuleType) -> Any:
        """The native work object for pages of ``page_size`` tokens: indices checked and copied once."""
        key = f"{module.__name__}/{page_size}"
        found = self.cache.get(key)
        if found is None:
            indices = []
            for name in ("page_C", "page_start_J1", "row_start_J1", "row_E", "first_E", "limit_E"):
                indices.append(index_array(name, getattr(self, name), 1))
            found = self.cache[key] = module.attend_work(*indices, page_size)
        return found


def index_array(name: str, value: Tensor, dims: int) -> Any:
    """``value`` as a NumPy view (which crosses the native border ten times faster than a torch tensor)."""
    if value.dtype is not torch.int32:
        raise TypeError(f"{name} must be int32, not {value.dtype}")
    if value.dim() != dims or not value.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous with {dims} dimension(s), not shape {tuple(value.shape)}"
        )
    return value.numpy()


def float_rows(name: str, value: Tensor) -> tuple[int, int, int]:
    """Shape of a contiguous float32 [rows, heads, size] tensor."""
    if value.dtype is not torch.float32:
        raise TypeError(f"{name} must be float32, not {value.dtype}")
    if value.dim() != 3 or not value.is_contiguous():
        raise ValueError(f"{name} must be contiguous [rows, heads, size], not shape {tuple(value.shape)}")
    rows, heads, size = value.shape
    return rows, heads, size


def pages_of(q: Tensor, k_NGPD: Tensor, v_NGPD: Tensor, *, int8: bool = True) -> tuple[int, int, int, int]:
    """(pages, kv heads, page size, kind) of a pool that fits the queries."""
    kind, tail = page_kind(k_NGPD, v_NGPD, int8=int8)
    if k_NGPD.dim() != 4 or k_NGPD.shape != v_NGPD.shape:
        raise ValueError(
            f"k_NGPD {tuple(k_NGPD.shape)} and v_NGPD {tuple(v_NGPD.shape)} must be equal [N, G, P, D]"
        )
    if not (k_NGPD.is_contiguous() and v_NGPD.is_contiguous()):
        raise ValueError("k_NGPD and v_NGPD must be contiguous")
    pages, groups, page, size = k_NGPD.shape
    if size - tail != q.shape[2] or size <= tail:
        raise ValueError(f"head size of the queries is {q.shape[2]}, of the pages {size - tail}")
    if groups == 0 or q.shape[1] % groups or q.shape[1] == 0:
        raise ValueError(f"{q.shape[1]} query heads do not share {groups} kv heads evenly")
    return pages, groups, page, kind


def cap_of(softcap: float | None) -> float:
    if softcap is None:
        return 0.0
    if not softcap > 0:
        raise ValueError(f"softcap must be positive, not {softcap}")
    return float(softcap)


def attend_pieces(
    q_THD: Tensor,
    k_NGPD: Tensor,
    v_NGPD: Tensor,
    work: PieceWork,
    scale: float,
    softcap: float | None = None,
    *,
    module: ModuleType | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of every entry of ``work``: ``(out_EHD float32, lse_EH float32)``.

    q_THD: float32, contiguous. Pages: `hasten.kernels.pages`, contiguous; H a multiple of G. Logits are
    ``scale * q . k``, with ``softcap`` then ``softcap * tanh(logits / softcap)``. ``module`` is a native module of
    another level (tests).

    Raises TypeError for a wrong dtype and ValueError for shapes that do not fit, an index outside ``q`` or the
    pool, or a limit past a piece's pages.
    """
    lib = native() if module is None else module
    rows, heads, size = float_rows("q_THD", q_THD)
    pages, groups, page, kind = pages_of(q_THD, k_NGPD, v_NGPD)
    entries = work.entries
    out = torch.empty((entries, heads, size))
    lse = torch.empty((entries, heads))
    lib.attend_pieces(
        work.handle(page, lib),
        q_THD.data_ptr(),
        k_NGPD.data_ptr(),
        v_NGPD.data_ptr(),
        out.data_ptr(),
        lse.data_ptr(),
        rows,
        heads,
        groups,
        size,
        pages,
        page,
        kind,
        scale,
        cap_of(softcap),
    )
    return out, lse


def merge(
    out_EHD: Tensor,
    lse_EH: Tensor,
    entry_start_T1: Tensor,
    entry_E: Tensor,
    *,
    module: ModuleType | None = None,
) -> tuple[Tensor, Tensor]:
    """Join the parts of each row: ``(out_THD, lse_TH)``, float32.

    Row t owns the parts ``entry_E[entry_start_T1[t]:entry_start_T1[t + 1]]`` (int32): with M = max lse_j and
    w_j = exp(lse_j - M), out = sum w_j out_j / sum w_j and lse = M + log sum w_j. A row without parts, or with only
    empty ones, gives 0 and -inf. Associative and commutative up to rounding, so merges may nest.

    Raises TypeError for a wrong dtype and ValueError for shapes or indices that do not fit.
    """
    lib = native() if module is None else module
    entries, heads, size = float_rows("out_EHD", out_EHD)
    if lse_EH.dtype is not torch.float32:
        raise TypeError(f"lse_EH must be float32, not {lse_EH.dtype}")
    if lse_EH.shape != (entries, heads) or not lse_EH.is_contiguous():
        raise ValueError(f"lse_EH must be contiguous {(entries, heads)}, not shape {tuple(lse_EH.shape)}")
    rows = entry_start_T1.numel() - 1
    if rows < 0:
        raise ValueError("entry_start_T1 is empty; it needs one element more than there are rows")
    out = torch.empty((rows, heads, size))
    lse = torch.empty((rows, heads))
    lib.merge(
        out_EHD.data_ptr(),
        lse_EH.data_ptr(),
        index_array("entry_start_T1", entry_start_T1, 1),
        index_array("entry_E", entry_E, 1),
        out.data_ptr(),
        lse.data_ptr(),
        entries,
        heads,
        size,
    )
    return out, lse


def attend_tokens(
    q_RHD: Tensor,
    k_NGPD: Tensor,
    v_NGPD: Tensor,
    page_table_RM: Tensor,
    index_RXK: Tensor,
    count_RX: Tensor,
    scale: float,
    softcap: float | None = None,
    *,
    module: ModuleType | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over chosen tokens, read straight from the pages: ``(out_RHD, lse_RH)``, float32.

    Row r attends to tokens ``index_RXK[r, x, :count_RX[r, x]]`` (int32) of the sequence whose pages are
    ``page_table_RM[r]`` (int32); X is G (the query heads of a kv head share a choice)
    or H. A count of 0 gives 0 and -inf.

    Raises TypeError for a wrong dtype and ValueError for shapes that do not fit or a token that has no page.
    """
    lib = native() if module is None else module
    rows, heads, size = float_rows("q_RHD", q_RHD)
    pages, groups, page, kind = pages_of(q_RHD, k_NGPD, v_NGPD)
    if page_table_RM.shape[0] != rows:
        raise ValueError(f"page_table_RM has {page_table_RM.shape[0]} rows, q_RHD {rows}")
    out = torch.empty((rows, heads, size))
    lse = torch.empty((rows, heads))
    lib.attend_tokens(
        q_RHD.data_ptr(),
        k_NGPD.data_ptr(),
        v_NGPD.data_ptr(),
        index_array("page_table_RM", page_table_RM, 2),
        index_array("index_RXK", index_RXK, 3),
        index_array("count_RX", count_RX, 2),
        out.data_ptr(),
        lse.data_ptr(),
        heads,
        groups,
        size,
        pages,
        page,
        kind,
        scale,
        cap_of(softcap),
    )
    return out, lse
