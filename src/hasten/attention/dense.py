"""`DenseKernel`: the default attention kernel. Exact; reads what the policy chose, straight from the pages.

The plan holds the step's rows and, per kind of layer (head counts, sliding window) and per choice of sparse rows, one
balanced piece list, made when a layer first asks for it and shared by all layers that ask for the same. While
the same sequences decode within the same pages, a step takes over the lists of the step before and moves their limits.

Legend: T rows, S sequences, H query heads, G kv heads, D head size, L cached tokens, X heads of a selection.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hasten.attention.blocks import attend_selection
from hasten.attention.kernel import AttentionKernel
from hasten.attention.layout import AttentionSpec, KVPages, StepLayout
from hasten.attention.pieces import (
    PiecePlan,
    Pieces,
    Rows,
    depths,
    finish,
    sequence_pieces,
    tree_pieces,
    windowed,
    without_rows,
)
from hasten.attention.policy import BlockSelection, Dense, DenseScores, Selection, TokenSelection
from hasten.core.errors import UnsupportedError
from hasten.kernels.attention import attend_tokens
from hasten.kernels.pages import dequantise
from hasten.kernels.schedule import default_workers


@dataclass(eq=False)
class DensePlan:
    """Work of one step: its rows, its pieces, and the balanced lists made so far.

    earlier: lists of earlier steps with the same pages; only their limits are out of date.
    tables: page tables of sparse rows. workers: virtual workers to plan for; None for the default.
    """

    rows: Rows
    pieces: Pieces
    parts: dict[Hashable, PiecePlan] = field(default_factory=dict)
    earlier: dict[Hashable, PiecePlan] = field(default_factory=dict)
    tables: dict[bytes, Tensor] = field(default_factory=dict)
    workers: int | None = None
    deepest: int = 0  # rows of the longest path of a token tree

    def after(self, rows: Rows) -> DensePlan:
        """The plan of a later step whose rows read the same pages."""
        limit = rows.limit_T[self.pieces.row_E] - self.pieces.base_J[self.pieces.piece_of_entry()]
        capacity = (np.diff(self.pieces.page_start_J1) * rows.page)[self.pieces.piece_of_entry()]
        pieces = replace(self.pieces, limit_E=np.minimum(limit, capacity))
        return DensePlan(rows, pieces, {}, self.earlier | self.parts, self.tables, self.workers)

    @property
    def count(self) -> int:
        return len(self.rows.limit_T)

    def part(self, spec: AttentionSpec, sparse: bytes = b"") -> PiecePlan:
        """The balanced piece list for ``spec`` without the rows ``sparse`` (int64 bytes)."""
        heads, kv_heads, workers = spec.shape.heads, spec.shape.kv_heads, self.workers or default_workers()
        key = (heads, kv_heads, spec.window, workers, sparse)
        found = self.parts.get(key)
        if found is None and (old := self.earlier.get(key)) is not None:
            found = self.parts[key] = old.moved(self.rows.limit_T, spec.window)
        if found is None:
            if spec.window is not None and spec.window <= self.deepest:
                raise UnsupportedError(
                    f"a token tree of {self.deepest} levels is deeper than the sliding window of {spec.window} tokens"
                )
            pieces = windowed(self.pieces, self.rows.limit_T, spec.window)
            if sparse:
                pieces = without_rows(pieces, np.frombuffer(sparse, np.int64), self.count)
            found = finish(pieces, self.count, self.rows.page, heads, kv_heads, workers)
            self.parts[key] = found
        return found


class DenseKernel(AttentionKernel):
    """One piece per sequence, cut over the context when there are fewer sequences than work for the threads."""

    reads_int8 = True
    workers: int | None = None  # virtual workers to plan for; None for the default
    _last: tuple[tuple[int, ...], DensePlan] | None = None

    @property
    def trees(self) -> bool:
        # A subclass with a ``plan`` or ``run`` of its own may know nothing of them.
        return type(self).plan is DenseKernel.plan and type(self).run is DenseKernel.run

    def plan(self, layout: StepLayout) -> DensePlan:
        rows = Rows.of(layout)
        if layout.trees:
            self._last = None
            deepest = max(int(depths(parents).max()) + 1 for parents in layout.trees.values())
            return DensePlan(rows, tree_pieces(rows, layout.trees), workers=self.workers, deepest=deepest)
        last = self._last
        if last is not None and last[0] == layout.sequence_ids and rows.same_pages(last[1].rows):
            plan = last[1].after(rows)
        else:
            plan = DensePlan(rows, self.pieces(rows, layout), workers=self.workers)
        self._last = (layout.sequence_ids, plan)
        return plan

    def pieces(self, rows: Rows, layout: StepLayout) -> Pieces:
        """How the rows share the pages; subclasses share more."""
        return sequence_pieces(rows)

    def run(
        self,
        plan: DensePlan,
        layer: int,
        q_THD: Tensor,
        pages: KVPages,
        layout: StepLayout,
        spec: AttentionSpec,
        selection: Selection,
        observe: Any = None,
    ) -> Tensor:
        q_THD = q_THD.contiguous()
        if isinstance(selection, Dense):
            return plan.part(spec).attend(q_THD, pages.k_NGPD, pages.v_NGPD, spec.scale, spec.softcap)[0]
        if isinstance(selection, TokenSelection):
            return self._tokens(plan, q_THD, pages, layout, spec, selection)
        if isinstance(selection, DenseScores):
            out, lse = plan.part(spec).attend(q_THD, pages.k_NGPD, pages.v_NGPD, spec.scale, spec.softcap)
            if observe is not None:
                observe(layer, scores(q_THD, lse, pages, layout, spec), layout)
            return out
        if isinstance(selection, tuple) and all(isinstance(part, BlockSelection) for part in selection):
            return self._blocks(plan, q_THD, pages, spec, selection)
        raise UnsupportedError(f"{type(self).__name__} cannot read a {type(selection).__name__}")

    def reading(self, plan: DensePlan, spec: AttentionSpec) -> PiecePlan | None:
        # A subclass with a ``run`` of its own reads in its own way.
        return plan.part(spec) if type(self).run is DenseKernel.run else None

    def _tokens(
        self,
        plan: DensePlan,
        q_THD: Tensor,
        pages: KVPages,
        layout: StepLayout,
        spec: AttentionSpec,
        selection: TokenSelection,
    ) -> Tensor:
        row = selection.row_R
        key = row.numpy().tobytes()
        table = plan.tables.get(key)
        if table is None:
            table = plan.tables[key] = layout.page_table_SM[layout.row_sequence_T()[row]].contiguous()
        every = row.numel() == plan.count  # rows are distinct, so all of them, in order
        chosen, _ = attend_tokens(
            q_THD if every else q_THD[row],
            pages.k_NGPD,
            pages.v_NGPD,
            table,
            selection.index_RXK,
            selection.count_RX,
            spec.scale,
            spec.softcap,
        )
        if every:
            return chosen
        out, _ = plan.part(spec, key).attend(q_THD, pages.k_NGPD, pages.v_NGPD, spec.scale, spec.softcap)
        out[row] = chosen
        return out

    def _blocks(
        self,
        plan: DensePlan,
        q_THD: Tensor,
        pages: KVPages,
        spec: AttentionSpec,
        selection: tuple[BlockSelection, ...],
    ) -> Tensor:
        start = plan.rows.start_S1
        spans = [slice(int(start[part.sequence]), int(start[part.sequence + 1])) for part in selection]
        sparse = np.concatenate(
            [np.arange(span.start, span.stop) for span in spans] or [np.zeros(0, np.int64)]
        )
        if len(sparse) == plan.count:
            out = torch.empty_like(q_THD)
        else:
            part = plan.part(spec, sparse.tobytes())
            out, _ = part.attend(q_THD, pages.k_NGPD, pages.v_NGPD, spec.scale, spec.softcap)
        for choice, span in zip(selection, spans, strict=True):
            out[span] = attend_selection(plan.rows, choice, q_THD[span], pages, spec)
        return out


def scores(q_THD: Tensor, lse_TH: Tensor, pages: KVPages, layout: StepLayout, spec: AttentionSpec) -> Tensor:
    """probs_THL [T, H, max kv_len]: each row's attention mass per cached token, zero where not visible."""
    rows = Rows.of(layout)
    heads, groups = spec.shape.heads, spec.shape.kv_heads
    longest = int(layout.kv_len_S.max()) if layout.sequences else 0
    probs = torch.zeros(q_THD.shape[0], heads, longest)
    limit = torch.from_numpy(rows.limit_T)
    for s in range(layout.sequences):  # ragged: one dense product per sequence
        begin, end, length = int(rows.start_S1[s]), int(rows.start_S1[s + 1]), int(rows.length_S[s])
        ids = layout.page_table_SM[s, : -(-length // layout.page_size)].long()
        k_NGPD = pages.k_NGPD[ids]
        k_NGPD = dequantise(k_NGPD) if k_NGPD.dtype is torch.int8 else k_NGPD.float()
        k = k_NGPD.transpose(0, 1).reshape(groups, -1, q_THD.shape[2])[:, :length]
        q = q_THD[begin:end].reshape(end - begin, groups, heads // groups, -1)
        logits = torch.einsum("tgrd,gld->tgrl", q, k).reshape(end - begin, heads, length) * spec.scale
        if spec.softcap is not None:
            logits = spec.softcap * torch.tanh(logits / spec.softcap)
        span = torch.arange(length)
        seen = span < limit[begin:end, None]
        if spec.window is not None:
            seen &= span >= limit[begin:end, None] - spec.window
        mass = torch.exp(logits - lse_TH[begin:end, :, None])
        probs[begin:end, :, :length] = mass.masked_fill(~seen[:, None], 0.0)
    return probs
