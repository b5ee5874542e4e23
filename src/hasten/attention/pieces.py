"""Planning of exact attention: from the ragged batch of a step to lists of KV pieces.

A planner makes `Pieces` (which rows read which runs of pages, absolute positions known), `windowed` and
`without_rows` narrow them, and `finish` has them cut over the context and shared out evenly (`Schedule`). Nothing here
loops over sequences, rows or pages, but for the few rows of token trees.

Legend: T rows, S sequences, J pieces, E entries (a row that reads a piece), C page references, P page size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from torch import Tensor

from hasten.attention.layout import StepLayout
from hasten.kernels.schedule import MAX_TILE, MIN_CHUNK, Schedule

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pieces:
    """Work list as planned by hand, int64. ``base_J`` is the absolute index of a piece's first token."""

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
        for s, parents in layout.trees.items():  # as far as a node sees, counted in positions
            first = int(start[s + 1]) - len(parents)
            limit[first : start[s + 1]] = length[s] - len(parents) + 1 + depths(parents)
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


def depths(parents: Sequence[int]) -> Ints:
    """int64 [A]: how far below the last committed token each node of a tree lies, its children at 0."""
    out = np.zeros(len(parents), np.int64)
    for node, parent in enumerate(parents):
        out[node] = 0 if parent < 0 else out[parent] + 1
    return out


def tree_pieces(rows: Rows, trees: Mapping[int, tuple[int, ...]]) -> Pieces:
    """Like `sequence_pieces` where the last rows of some sequences are the nodes of trees (`StepLayout.trees`).

    The path to a node is a few runs of consecutive slots. A run that goes on where the committed tokens end is read
    with them; for each slot where other runs begin there is a piece, read by all rows whose path has such a run.
    """
    base = sequence_pieces(rows)
    limit = base.limit_E.copy()
    extra: list[
        tuple[int, int, list[tuple[int, int]]]
    ] = []  # sequence, first slot, [(row, slot after the run)]
    for s, parents in trees.items():
        count = len(parents)
        first_row, committed = int(rows.start_S1[s + 1]) - count, int(rows.length_S[s]) - count
        path: list[list[tuple[int, int]]] = []  # by node: its runs as (first, end)
        begun: dict[int, list[tuple[int, int]]] = {}
        for node, parent in enumerate(parents):
            runs = path[parent] if parent >= 0 else [(0, 0)]
            if runs[-1][1] == node:
                runs = [*runs[:-1], (runs[-1][0], node + 1)]
            else:
                runs = [*runs, (node, node + 1)]
            path.append(runs)
            limit[first_row + node] = committed + runs[0][1]
            for first, end in runs[1:]:
                begun.setdefault(first, []).append((first_row + node, committed + end))
        extra += [(s, committed + first, reads) for first, reads in begun.items()]
    own = replace(base, limit_E=limit)
    if not extra:
        return own
    pages, page_count, bases, row, first_E, limit_E = [], [], [], [], [], []
    for s, slot, reads in extra:
        from_page, to_page = slot // rows.page, -(-max(end for _, end in reads) // rows.page)
        pages += rows.table_SM[s, from_page:to_page].tolist()
        page_count.append(to_page - from_page)
        bases.append(from_page * rows.page)
        for r, end in reads:
            row.append(r)
            first_E.append(slot - bases[-1])
            limit_E.append(end - bases[-1])
    branches = Pieces(
        page_C=np.array(pages, np.int64),
        page_start_J1=prefix_sum(np.array(page_count)),
        base_J=np.array(bases, np.int64),
        row_start_J1=prefix_sum(np.array([len(reads) for *_, reads in extra])),
        row_E=np.array(row, np.int64),
        first_E=np.array(first_E, np.int64),
        limit_E=np.array(limit_E, np.int64),
    )
    return join(own, branches)


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


@dataclass(frozen=True, eq=False)
class PiecePlan:
    """What the kernels read: pieces, cut into chunks and given to workers."""

    pieces: Pieces
    schedule: Schedule

    def attend(
        self, q_THD: Tensor, k_NGPD: Tensor, v_NGPD: Tensor, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        """``(out_THD, lse_TH)`` of all rows; a row without entries gets 0 and -inf."""
        return self.schedule.run(q_THD, k_NGPD, v_NGPD, scale, softcap)

    def moved(self, limit_T: Ints, window: int | None) -> PiecePlan:
        """The same plan for rows that now see the tokens [limit - window, limit).

        Right as long as no sequence has more pages than when the pieces were made.
        """
        return replace(self, schedule=self.schedule.moved(limit_T, window))


def finish(
    pieces: Pieces,
    rows: int,
    page: int,
    heads: int,
    kv_heads: int,
    workers: int,
    *,
    min_chunk: int | None = None,
    tile: int = MAX_TILE,
    balanced: bool = True,
) -> PiecePlan:
    """Plan the pieces of ``rows`` query rows for ``workers``: see `hasten.kernels.schedule`."""
    schedule = Schedule(
        pieces.page_C,
        pieces.page_start_J1,
        pieces.base_J,
        pieces.row_start_J1,
        pieces.row_E,
        pieces.first_E,
        pieces.limit_E,
        page_size=page,
        rows=rows,
        heads=heads,
        kv_heads=kv_heads,
        workers=workers,
        min_chunk=MIN_CHUNK if min_chunk is None else min_chunk,
        tile=tile,
        balanced=balanced,
    )
    return PiecePlan(pieces, schedule)
