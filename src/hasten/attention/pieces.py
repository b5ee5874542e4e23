"""Planning of exact attention: from the ragged batch of a step to balanced lists of KV pieces. NumPy only.

A planner makes `Pieces` (which rows read which runs of pages, absolute positions known), `windowed` and
`without_rows` narrow them, `balance` cuts long pieces over the context so that all threads have work, and `finish`
turns them into what the kernels read. Nothing here loops over sequences, rows or pages.

Legend: T rows, S sequences, J pieces, E entries (a row that reads a piece), C page references, P page size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hasten.attention.layout import StepLayout
from hasten.kernels.attention import PieceWork, attend_pieces, merge

Ints = npt.NDArray[np.int64]

# Fewer tokens than this per piece and the merge costs more than the balance gains.
MIN_CHUNK = 128
# Work items per thread that balancing aims for, so that dynamic scheduling evens them out.
ITEMS_PER_THREAD = 6
# Query vectors (rows x heads of a kv head) that one kernel task holds.
BLOCK_VECTORS = 96


@dataclass(frozen=True)
class Pieces:
    """Unbalanced work list, int64. ``base_J`` is the absolute index of a piece's first token."""

    page_C: Ints
    page_start_J1: Ints
    base_J: Ints
    row_start_J1: Ints
    row_E: Ints
    first_E: Ints
    limit_E: Ints

    def piece_of_entry(self) -> Ints:
        """int64 [E]: the piece that each entry reads."""
        return np.repeat(np.arange(len(self.base_J)), np.diff(self.row_start_J1))

    def keep(self, keep_E: npt.NDArray[np.bool_]) -> Pieces:
        """Only the entries where ``keep_E``."""
        if keep_E.all():
            return self
        kept = np.concatenate(([0], np.cumsum(keep_E)))
        return replace(
            self,
            row_start_J1=kept[self.row_start_J1],
            row_E=self.row_E[keep_E],
            first_E=self.first_E[keep_E],
            limit_E=self.limit_E[keep_E],
        )


def ranges(start: Ints, count: Ints) -> Ints:
    """Concatenation of ``start[i] .. start[i] + count[i]`` for all i."""
    total = np.cumsum(count)
    size = int(total[-1]) if len(total) else 0
    return np.repeat(start - total + count, count) + np.arange(size)


def prefix_sum(count: Ints) -> Ints:
    """[0, c0, c0 + c1, ...]."""
    out = np.zeros(len(count) + 1, np.int64)
    np.cumsum(count, out=out[1:])
    return out


@dataclass(frozen=True)
class Rows:
    """The query rows of a step: where each sequence starts, its length, and how far each row sees."""

    start_S1: Ints
    length_S: Ints
    limit_T: Ints  # a row sees the cached tokens [0, limit)
    table_SM: npt.NDArray[np.int32]
    page: int

    @classmethod
    def of(cls, layout: StepLayout) -> Rows:
        start = layout.query_start_S1.numpy().astype(np.int64)
        length = layout.kv_len_S.numpy().astype(np.int64)
        count = np.diff(start)
        if len(length) == 0:
            limit = np.zeros(0, np.int64)
        else:
            # Row i of a chunk of n sees all but the n - 1 - i tokens that follow it.
            limit = np.repeat(length - count + 1 - start[:-1], count) + np.arange(int(start[-1]))
        return cls(start, length, limit, layout.page_table_SM.numpy(), layout.page_size)

    def same_pages(self, other: Rows) -> bool:
        """Whether both steps bring as many rows per sequence and read the same pages, lengths aside."""
        pages_S = -(-self.length_S // self.page)
        width = int(pages_S.max()) if len(pages_S) else 0
        return (
            self.page == other.page
            and np.array_equal(self.start_S1, other.start_S1)
            and np.array_equal(pages_S, -(-other.length_S // other.page))
            and np.array_equal(self.table_SM[:, :width], other.table_SM[:, :width])
        )


def sequence_pieces(rows: Rows, base_S: Ints | None = None) -> Pieces:
    """One piece per sequence, from token ``base_S`` (a multiple of the page size; 0 by default) on, causal."""
    count = np.diff(rows.start_S1)
    skip = np.zeros_like(rows.length_S) if base_S is None else base_S // rows.page
    pages = -(-rows.length_S // rows.page) - skip
    width = rows.table_SM.shape[1]
    flat = rows.table_SM.reshape(-1)
    page_C = flat[ranges(np.arange(len(pages)) * width + skip, pages)].astype(np.int64)
    base = skip * rows.page
    return Pieces(
        page_C=page_C,
        page_start_J1=prefix_sum(pages),
        base_J=base,
        row_start_J1=rows.start_S1,
        row_E=np.arange(len(rows.limit_T)),
        first_E=np.zeros(len(rows.limit_T), np.int64),
        limit_E=rows.limit_T - np.repeat(base, count),
    )


def join(a: Pieces, b: Pieces) -> Pieces:
    """The pieces of ``a``, then those of ``b``."""
    return Pieces(
        page_C=np.concatenate((a.page_C, b.page_C)),
        page_start_J1=np.concatenate((a.page_start_J1, b.page_start_J1[1:] + len(a.page_C))),
        base_J=np.concatenate((a.base_J, b.base_J)),
        row_start_J1=np.concatenate((a.row_start_J1, b.row_start_J1[1:] + len(a.row_E))),
        row_E=np.concatenate((a.row_E, b.row_E)),
        first_E=np.concatenate((a.first_E, b.first_E)),
        limit_E=np.concatenate((a.limit_E, b.limit_E)),
    )


def windowed(pieces: Pieces, limit_T: Ints, window: int | None) -> Pieces:
    """Each row sees at most its last ``window`` tokens (its own included)."""
    if window is None:
        return pieces
    start = limit_T[pieces.row_E] - window - pieces.base_J[pieces.piece_of_entry()]
    out = replace(pieces, first_E=np.maximum(pieces.first_E, start))
    return out.keep(out.first_E < out.limit_E)


def without_rows(pieces: Pieces, row_R: Ints, rows: int) -> Pieces:
    """All entries but those of the rows ``row_R``."""
    stay = np.ones(rows, np.bool_)
    stay[row_R] = False
    return pieces.keep(stay[pieces.row_E])


def balance(pieces: Pieces, page: int, heads: int, kv_heads: int, threads: int) -> Pieces:
    """Cut pieces over the context until no kernel task is a large share of the whole work.

    Cuts lie on page boundaries; entries that see nothing of a part are dropped, and so are pages that nobody sees.
    """
    count = np.diff(pieces.row_start_J1)
    live = count > 0
    if not live.any():
        return pieces
    # What the rows of a piece see of it: [low, high).
    low = np.zeros(len(count), np.int64)
    high = np.zeros(len(count), np.int64)
    at = pieces.row_start_J1[:-1][live]
    low[live] = np.minimum.reduceat(pieces.first_E, at)
    high[live] = np.maximum.reduceat(pieces.limit_E, at)
    low -= low % page
    span = np.maximum(high - low, 0)
    block = np.minimum(count, max(1, BLOCK_VECTORS * kv_heads // heads))
    total = int((span * count).sum()) * kv_heads
    chunk = span.copy()
    if threads > 1:
        chunk = total // (threads * ITEMS_PER_THREAD) // np.maximum(block, 1)
        chunk = np.minimum(np.maximum(chunk, MIN_CHUNK), np.maximum(span, 1))
    parts = np.where(live, np.maximum(-(-span // np.maximum(chunk, 1)), 1), 0)
    if (parts == live).all() and not low.any():
        return pieces
    chunk = -(-span // np.maximum(parts, 1))
    chunk = -(-chunk // page) * page
    piece = np.repeat(np.arange(len(count)), parts)
    begin = low[piece] + ranges(np.zeros_like(parts), parts) * chunk[piece]
    end = np.minimum(begin + chunk[piece], high[piece])
    first_page = pieces.page_start_J1[:-1][piece] + begin // page
    pages = np.maximum(-(-(end - begin) // page), 0)
    entry = ranges(pieces.row_start_J1[:-1][piece], count[piece])
    part = np.repeat(np.arange(len(piece)), count[piece])
    out = Pieces(
        page_C=pieces.page_C[ranges(first_page, pages)],
        page_start_J1=prefix_sum(pages),
        base_J=pieces.base_J[piece] + begin,
        row_start_J1=prefix_sum(count[piece]),
        row_E=pieces.row_E[entry],
        first_E=np.maximum(pieces.first_E[entry] - begin[part], 0),
        limit_E=np.minimum(pieces.limit_E[entry], end[part]) - begin[part],
    )
    return out.keep(out.limit_E > out.first_E)


@dataclass(frozen=True, eq=False)
class PiecePlan:
    """What the kernels read. ``entry_E`` None: entry e is row e, so the parts are the result and nothing is merged."""

    work: PieceWork
    pieces: Pieces
    entry_start_T1: Tensor | None
    entry_E: Tensor | None

    def attend(
        self, q_THD: Tensor, k_NGPD: Tensor, v_NGPD: Tensor, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        """``(out_THD, lse_TH)`` of all rows; a row without entries gets 0 and -inf."""
        out, lse = attend_pieces(q_THD, k_NGPD, v_NGPD, self.work, scale, softcap)
        if self.entry_E is None or self.entry_start_T1 is None:
            return out, lse
        return merge(out, lse, self.entry_start_T1, self.entry_E)

    def moved(self, limit_T: Ints, window: int | None, page: int) -> PiecePlan:
        """The same pieces for rows that now see the tokens [limit - window, limit).

        Right as long as no sequence has more pages than when the pieces were made.
        """
        pieces = self.pieces
        piece = pieces.piece_of_entry()
        limit = limit_T[pieces.row_E] - pieces.base_J[piece]
        first = pieces.first_E if window is None else np.maximum(limit - window, 0)
        limit = np.minimum(limit, np.diff(pieces.page_start_J1)[piece] * page)
        work = replace(self.work, first_E=_int32(first), limit_E=_int32(limit), cache={})
        return replace(self, work=work)


def _int32(values: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.int32))


def finish(pieces: Pieces, rows: int) -> PiecePlan:
    """Make the kernels' tensors; ``rows`` is T."""
    work = PieceWork(
        page_C=_int32(pieces.page_C),
        page_start_J1=_int32(pieces.page_start_J1),
        row_start_J1=_int32(pieces.row_start_J1),
        row_E=_int32(pieces.row_E),
        first_E=_int32(pieces.first_E),
        limit_E=_int32(pieces.limit_E),
    )
    if len(pieces.row_E) == rows and (pieces.row_E == np.arange(rows)).all():
        return PiecePlan(work, pieces, None, None)
    order = np.argsort(pieces.row_E, kind="stable")
    start = prefix_sum(np.bincount(pieces.row_E, minlength=rows))
    return PiecePlan(work, pieces, _int32(start), _int32(order))
