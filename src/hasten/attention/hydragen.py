"""`hydragen`: attention over shared prefixes, read once for all sequences that share them.

Source: Juravsky, Brown, Ehrlich, Fu, Re, Mirhoseini, "Hydragen: High-Throughput LLM Inference with Shared Prefixes",
2024, arXiv 2402.05099, sections 3.1-3.3. Softmax attention over disjoint parts of the cache is exact when the parts'
(out, lse) are merged. So the query rows of all sequences under a node of the prefix tree are stacked and attend
to the node's pages together (matrix-matrix work instead of matrix-vector), each sequence attends to its own
suffix, and the parts are merged in float32.

The tree is read off the page tables: sequences that share a prefix name the same leading pages, whether through the
prefix store, parallel samples or beams. Nodes may have any length, sharers need not be neighbours in the batch, rows
per sequence may differ (decode and prefill together), and sequences may come and go between steps.

Legend: S sequences, T rows, M pages per sequence, I nodes, Z (node, member) pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import Field

from hasten.attention.dense import DenseKernel
from hasten.attention.kernel import AttentionKernel
from hasten.attention.layout import StepLayout
from hasten.attention.pieces import Ints, Pieces, Rows, join, prefix_sum, ranges, sequence_pieces
from hasten.core.technique import Technique

if TYPE_CHECKING:
    from hasten.models.context import BuildContext


class Hydragen(Technique):
    """Sequences that share leading KV pages read them together, level by level of the prefix tree."""

    slug = "hydragen"
    slots = ("attention_kernel",)
    lossless = True

    min_prefix: int = Field(128, ge=1, description="fewest tokens of a tree node that is read for the group")
    min_sharers: int = Field(2, ge=2, description="fewest sequences that read a node together")
    max_levels: int = Field(
        8, ge=1, description="most levels of the tree; deeper sharing is read per sequence"
    )

    def provide(self, slot: str, context: BuildContext) -> AttentionKernel:
        return HydragenKernel(self)


class TreeSettings(Protocol):
    """What `HydragenKernel` asks of a technique."""

    @property
    def min_prefix(self) -> int: ...

    @property
    def min_sharers(self) -> int: ...

    @property
    def max_levels(self) -> int: ...


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """Nodes of shared pages. Node i covers table columns [begin_I[i], end_I[i]) of its members.

    member_Z[member_start_I1[i]:member_start_I1[i + 1]] are node i's sequences; base_S is the number of leading pages of
    a sequence that nodes cover.
    """

    begin_I: Ints
    end_I: Ints
    member_start_I1: Ints
    member_Z: Ints
    base_S: Ints


def prefix_tree(
    table_SM: npt.NDArray[np.int32],
    shareable_S: Ints,
    *,
    min_pages: int = 1,
    min_sharers: int = 2,
    max_levels: int = 8,
) -> PrefixTree:
    """The tree of page runs that are shared by sequences, from the first ``shareable_S`` pages of each.

    Sequences are sorted by their pages; the common lengths of neighbours then bound every group. Each pass of the loop
    handles all groups of one depth at once, so there are as many passes as the tree has branchings in a row.
    """
    count = len(shareable_S)
    width = int(shareable_S.max()) if count else 0
    base_S = np.zeros(count, np.int64)
    begins: list[Ints] = []
    ends: list[Ints] = []
    sizes: list[Ints] = []
    members: list[Ints] = []
    if count >= 2 and width:
        # Pages past a sequence's own length become values that no other sequence has.
        own = -2 - np.arange(count, dtype=np.int32)[:, None]
        keys = np.where(np.arange(width) < shareable_S[:, None], table_SM[:, :width], own)
        keys = np.ascontiguousarray(keys, np.int32)
        # Any total order on the bytes brings equal prefixes together.
        order = np.argsort(keys.view(np.dtype((np.void, 4 * width))).ravel(), kind="stable")
        differ = keys[order[1:]] != keys[order[:-1]]
        # Pages that each sequence shares with the next one; a dummy follows the last.
        common = np.append(np.where(differ.any(1), differ.argmax(1), width), 0)
        low, high = np.array([0]), np.array([count])
        base, level = np.array([0]), np.array([0])
        for _ in range(4 * max_levels):
            live = (high - low >= min_sharers) & (level < max_levels)
            low, high, base, level = low[live], high[live], base[live], level[live]
            if not len(low):
                break
            depth = np.minimum.reduceat(common, np.stack((low, high - 1), 1).ravel())[::2]
            taken = depth - base >= min_pages
            at = ranges(low, high - low)
            group = np.repeat(np.arange(len(low)), high - low)
            member = order[at]
            begins.append(base[taken])
            ends.append(depth[taken])
            sizes.append((high - low)[taken])
            members.append(member[taken[group]])
            base = np.where(taken, depth, base)
            level = level + taken
            base_S[member] = base[group]
            # A group falls apart where neighbours share no more than the node.
            last = (common[at] == depth[group]) | (at == (high - 1)[group])
            low, high = at[np.append(True, last[:-1])], at[last] + 1
            base, level = base[group[last]], level[group[last]]
    empty = [np.zeros(0, np.int64)]
    return PrefixTree(
        np.concatenate(begins or empty),
        np.concatenate(ends or empty),
        prefix_sum(np.concatenate(sizes or empty)),
        np.concatenate(members or empty),
        base_S,
    )


def node_pieces(tree: PrefixTree, rows: Rows) -> Pieces:
    """One piece per node, read by all rows of its members, without a causal limit: all of it precedes every row."""
    pages = tree.end_I - tree.begin_I
    first = tree.member_Z[tree.member_start_I1[:-1]]
    count_Z = np.diff(rows.start_S1)[tree.member_Z]
    rows_I1 = prefix_sum(count_Z)[tree.member_start_I1]
    row_E = ranges(rows.start_S1[:-1][tree.member_Z], count_Z)
    width = rows.table_SM.shape[1]
    return Pieces(
        page_C=rows.table_SM.reshape(-1)[ranges(first * width + tree.begin_I, pages)].astype(np.int64),
        page_start_J1=prefix_sum(pages),
        base_J=tree.begin_I * rows.page,
        row_start_J1=rows_I1,
        row_E=row_E,
        first_E=np.zeros(len(row_E), np.int64),
        limit_E=np.repeat(pages * rows.page, np.diff(rows_I1)),
    )


@dataclass(frozen=True, eq=False)
class _Known:
    """The tree of earlier steps and what it was made from."""

    ids: tuple[int, ...]
    pages_SM: npt.NDArray[np.int32]
    tree: PrefixTree

    def holds(self, ids: tuple[int, ...], rows: Rows, shareable_S: Ints) -> bool:
        width = self.pages_SM.shape[1]
        return (
            ids == self.ids
            and rows.table_SM.shape[1] >= width
            and bool((self.tree.base_S <= shareable_S).all())
            and np.array_equal(rows.table_SM[:, :width], self.pages_SM)
        )


class HydragenKernel(DenseKernel):
    """Node pieces for shared pages, causal suffix pieces for the rest.

    Between steps the tree is kept while the same sequences run and the pages it covers are unchanged; what then
    changes from step to step are lengths, which only the suffix pieces see.
    """

    def __init__(self, settings: TreeSettings) -> None:
        self.settings = settings
        self._known: _Known | None = None
        self.rebuilt = 0  # how often the tree was made anew

    def pieces(self, rows: Rows, layout: StepLayout) -> Pieces:
        if len(rows.length_S) < self.settings.min_sharers:
            return sequence_pieces(rows)
        tree = self.tree(rows, layout.sequence_ids)
        if not len(tree.begin_I):
            return sequence_pieces(rows)
        return join(node_pieces(tree, rows), sequence_pieces(rows, tree.base_S * rows.page))

    def tree(self, rows: Rows, ids: tuple[int, ...]) -> PrefixTree:
        """The step's prefix tree. Only whole pages before a sequence's first row can be shared."""
        shareable_S = (rows.length_S - np.diff(rows.start_S1)) // rows.page
        known = self._known
        if known is not None and known.holds(ids, rows, shareable_S):
            return known.tree
        self.rebuilt += 1
        tree = prefix_tree(
            rows.table_SM,
            shareable_S,
            min_pages=-(-self.settings.min_prefix // rows.page),
            min_sharers=self.settings.min_sharers,
            max_levels=self.settings.max_levels,
        )
        width = int(tree.base_S.max()) if len(tree.base_S) else 0
        self._known = _Known(ids, rows.table_SM[:, :width].copy(), tree)
        return tree
