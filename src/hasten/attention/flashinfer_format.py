"""The KV cache as a block-sparse matrix, and sums of such matrices (FlashInfer sections 3.1.1 and 3.1.2).

Rows of the matrix are query rows (ragged), columns are cached tokens; a non-zero block is a row block times a page.
One format covers paged caches, shared prefixes, token trees and chosen pages, down to pages of one token. *Composable*
formats are several matrices whose sum is the whole: a level with tall row blocks for what requests share, one with a
block per request for the rest. Only index arrays differ; keys and values stay where they are.

Legend: B row blocks (requests), C page references, T rows of the format, P page size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce

import numpy as np
import numpy.typing as npt

from hasten.attention.hydragen import PrefixTree
from hasten.attention.layout import StepLayout
from hasten.attention.pieces import Ints, Pieces, Rows, join, prefix_sum, ranges

__all__ = ["BlockSparse", "levels", "pieces_of"]


def _ints(name: str, values: npt.ArrayLike) -> Ints:
    out = np.asarray(values)
    if out.ndim != 1 or (out.size and out.dtype.kind not in "iu"):
        raise ValueError(f"{name} must be a list of integers, not {out.dtype} of shape {out.shape}")
    integers: Ints = out.astype(np.int64)
    return integers


def _starts(name: str, values: Ints, end: int, what: str) -> None:
    if not len(values) or values[0] != 0 or values[-1] != end or (np.diff(values) < 0).any():
        raise ValueError(f"{name} must rise from 0 to {end}, the number of {what}")


@dataclass(frozen=True, eq=False)
class BlockSparse:
    """One block-sparse matrix.

    Row block b holds the query rows ``row_T[qo_indptr[b]:qo_indptr[b + 1]]`` and reads the pages
    ``kv_indices[kv_indptr[b]:kv_indptr[b + 1]]`` in order; the last of them holds ``last_page_len[b]`` tokens (1 to P;
    0 when there is no page), so a block reads P (pages - 1) + last tokens. ``causal``: the rows are the last tokens of
    what the block reads, and each sees the tokens up to itself; otherwise every row sees all. base_B: absolute index
    of a block's first token (0 by default). row_T: query row of each row (by default themselves, in order).
    Raises ValueError for arrays that do not fit each other.
    """

    qo_indptr_B1: Ints
    kv_indptr_B1: Ints
    kv_indices_C: Ints
    last_page_len_B: Ints
    page_size: int
    causal: bool = True
    base_B: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    row_T: Ints = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        for name in ("qo_indptr_B1", "kv_indptr_B1", "kv_indices_C", "last_page_len_B", "base_B", "row_T"):
            object.__setattr__(self, name, _ints(name, getattr(self, name)))
        if self.page_size < 1:
            raise ValueError(f"page_size must be positive, not {self.page_size}")
        blocks = len(self.last_page_len_B)
        if len(self.qo_indptr_B1) != blocks + 1 or len(self.kv_indptr_B1) != blocks + 1:
            raise ValueError(f"qo_indptr and kv_indptr need {blocks + 1} entries for {blocks} blocks")
        rows = int(self.qo_indptr_B1[-1])
        if not len(self.row_T) and rows > 0:
            object.__setattr__(self, "row_T", np.arange(rows))
        if not len(self.base_B):
            object.__setattr__(self, "base_B", np.zeros(blocks, np.int64))
        _starts("qo_indptr_B1", self.qo_indptr_B1, len(self.row_T), "rows in row_T")
        _starts("kv_indptr_B1", self.kv_indptr_B1, len(self.kv_indices_C), "pages in kv_indices_C")
        if len(self.base_B) != blocks:
            raise ValueError(f"base_B has {len(self.base_B)} entries for {blocks} blocks")
        for name in ("kv_indices_C", "base_B", "row_T"):
            if (getattr(self, name) < 0).any():
                raise ValueError(f"{name} holds a negative number")
        last, pages = self.last_page_len_B, np.diff(self.kv_indptr_B1)
        if ((last < np.minimum(pages, 1)) | (last > np.minimum(pages, 1) * self.page_size)).any():
            raise ValueError(
                f"last_page_len_B must be 1 to {self.page_size}, and 0 for a block without pages"
            )

    @property
    def kv_len_B(self) -> Ints:
        """Tokens that each block reads."""
        full: Ints = np.maximum(np.diff(self.kv_indptr_B1) - 1, 0) * self.page_size
        return full + self.last_page_len_B

    @classmethod
    def of_rows(cls, rows: Rows, base_S: Ints | None = None) -> BlockSparse:
        """One row block per sequence of a step, from token ``base_S`` (a multiple of the page size; 0) on."""
        base = np.zeros_like(rows.length_S) if base_S is None else base_S
        skip = base // rows.page
        pages = -(-rows.length_S // rows.page) - skip
        width = rows.table_SM.shape[1]
        at = ranges(np.arange(len(pages)) * width + skip, pages)
        return cls(
            rows.start_S1,
            prefix_sum(pages),
            rows.table_SM.reshape(-1)[at].astype(np.int64),
            rows.length_S - base - np.maximum(pages - 1, 0) * rows.page,
            rows.page,
            base_B=base,
        )

    @classmethod
    def of_layout(cls, layout: StepLayout) -> BlockSparse:
        """The step as the engine's runner lays it out."""
        return cls.of_rows(Rows.of(layout))

    def pieces(self) -> Pieces:
        """The format as the list that the scheduler reads."""
        count, length = np.diff(self.qo_indptr_B1), self.kv_len_B
        if self.causal:
            start = length - count + 1 - self.qo_indptr_B1[:-1]
            limit = np.maximum(np.repeat(start, count) + np.arange(len(self.row_T)), 0)
        else:
            limit = np.repeat(length, count)
        return Pieces(
            page_C=self.kv_indices_C,
            page_start_J1=self.kv_indptr_B1,
            base_J=self.base_B,
            row_start_J1=self.qo_indptr_B1,
            row_E=self.row_T,
            first_E=np.zeros(len(self.row_T), np.int64),
            limit_E=limit,
        )


def levels(rows: Rows, tree: PrefixTree) -> list[BlockSparse]:
    """A step over a tree of shared pages: a format per depth of the tree, then the sequences' own suffixes."""
    out: list[BlockSparse] = []
    if len(tree.begin_I):
        size = np.diff(tree.member_start_I1)
        node_Z = np.repeat(np.arange(len(size)), size)
        # A node's depth: how many nodes of its (first) member begin before it.
        order = np.lexsort((tree.begin_I[node_Z], tree.member_Z))
        member = tree.member_Z[order]
        first = np.concatenate(([True], member[1:] != member[:-1]))
        rank = np.arange(len(order)) - np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))
        depth = np.zeros(len(size), np.int64)
        depth[node_Z[order]] = rank
        for level in range(int(depth.max()) + 1):
            out.append(_level(rows, tree, np.flatnonzero(depth == level)))
    out.append(BlockSparse.of_rows(rows, tree.base_S * rows.page))
    return out


def _level(rows: Rows, tree: PrefixTree, node: Ints) -> BlockSparse:
    """The nodes as row blocks that are read by all rows of their members, without a causal limit."""
    begin, pages = tree.begin_I[node], (tree.end_I - tree.begin_I)[node]
    start, size = tree.member_start_I1[node], np.diff(tree.member_start_I1)[node]
    member = tree.member_Z[ranges(start, size)]
    count = np.diff(rows.start_S1)[member]
    width = rows.table_SM.shape[1]
    at = ranges(tree.member_Z[start] * width + begin, pages)
    return BlockSparse(
        prefix_sum(count)[prefix_sum(size)],
        prefix_sum(pages),
        rows.table_SM.reshape(-1)[at].astype(np.int64),
        np.full(len(node), rows.page),
        rows.page,
        causal=False,
        base_B=begin * rows.page,
        row_T=ranges(rows.start_S1[:-1][member], count),
    )


def pieces_of(formats: Sequence[BlockSparse]) -> Pieces:
    """The sum of the formats. Raises ValueError when their page sizes differ or there is none."""
    if not formats:
        raise ValueError("at least one format is needed")
    if len({part.page_size for part in formats}) > 1:
        raise ValueError("formats over one pool must have one page size")
    return reduce(join, (part.pieces() for part in formats))
