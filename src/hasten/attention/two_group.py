"""Attention in two groups: contexts that stand side by side, and everything else; joined by their log-sum-exps.

Source: Yang, Chen, Chen, "APE", ICLR 2025, arXiv 2502.05431, section 4.3. Per head and query, with temperature T and
scale S: the contexts' tokens are scored q.k / (T sqrt(d)) and give (o_c, l_c); prefix, question and generated tokens
are scored as ever, causally, and give (o_r, l_r); the output is w_c o_c + w_r o_r with weights softmax([S T l_c, l_r]).

Where the contexts lie is said by `StepLayout.extents`. Both groups are one schedule over two copies of the rows: the
first reads the rest with q, the second the contexts with q / T. (A logit softcap acts after the temperature.)

Legend: T query rows, H query heads, D head size.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hasten.attention.dense import DenseKernel
from hasten.attention.layout import AttentionSpec, KVPages, StepLayout
from hasten.attention.pieces import Ints, PiecePlan, Pieces, Rows, finish, prefix_sum
from hasten.attention.policy import Dense, Selection
from hasten.core.errors import UnsupportedError
from hasten.kernels.attention import merge
from hasten.kernels.schedule import default_workers


@dataclass(eq=False)
class TwoGroupPlan:
    """Work of a step in which some sequence starts with extents.

    pieces: over 2 T rows; row t is a query of the rest, row T + t the same query of the contexts.
    """

    pieces: Pieces
    rows: int
    page: int
    start_T1: Tensor
    entry_E: Tensor
    parts: dict[Hashable, PiecePlan] = field(default_factory=dict)

    def part(self, spec: AttentionSpec) -> PiecePlan:
        if spec.window is not None:
            raise UnsupportedError("contexts side by side cannot be read through a sliding window")
        heads, kv_heads, workers = spec.shape.heads, spec.shape.kv_heads, default_workers()
        key = (heads, kv_heads, workers)
        found = self.parts.get(key)
        if found is None:
            found = finish(self.pieces, 2 * self.rows, self.page, heads, kv_heads, workers)
            self.parts[key] = found
        return found


class TwoGroupKernel(DenseKernel):
    """`DenseKernel` for ordinary sequences; two groups for those that start with extents.

    temperature and scale: T and S, positive. With T = S = 1 it is softmax attention over all the tokens together.
    """

    def __init__(self, temperature: float, scale: float) -> None:
        self.temperature, self.scale = temperature, scale

    def plan(self, layout: StepLayout) -> Any:
        if not layout.extents:
            return super().plan(layout)
        self._last = None
        rows = Rows.of(layout)
        count = len(rows.limit_T)
        start_T1 = torch.arange(0, 2 * count + 1, 2, dtype=torch.int32)
        entry_E = torch.arange(count, dtype=torch.int32).repeat_interleave(2)
        entry_E[1::2] += count
        return TwoGroupPlan(group_pieces(rows, layout), count, rows.page, start_T1, entry_E)

    def run(
        self,
        plan: Any,
        layer: int,
        q_THD: Tensor,
        pages: KVPages,
        layout: StepLayout,
        spec: AttentionSpec,
        selection: Selection,
        observe: Any = None,
    ) -> Tensor:
        if not isinstance(plan, TwoGroupPlan):
            return super().run(plan, layer, q_THD, pages, layout, spec, selection, observe)
        if not isinstance(selection, Dense):
            raise UnsupportedError(
                f"contexts side by side are read densely, not by a {type(selection).__name__}; "
                "remove the attention policy from the plan"
            )
        both = torch.cat((q_THD, q_THD / self.temperature))
        out, lse = plan.part(spec).attend(both, pages.k_NGPD, pages.v_NGPD, spec.scale, spec.softcap)
        lse[plan.rows :] *= self.scale * self.temperature  # no context: stays -inf
        return merge(out, lse, plan.start_T1, plan.entry_E)[0]

    def reading(self, plan: Any, spec: AttentionSpec) -> PiecePlan | None:
        return None if isinstance(plan, TwoGroupPlan) else plan.part(spec)


def group_pieces(rows: Rows, layout: StepLayout) -> Pieces:
    """Pieces over 2 T rows: of each sequence the extents, whole, and its own tokens, causally."""
    count, size = len(rows.limit_T), rows.page
    pages: list[Ints] = []
    bases: list[int] = []
    row: list[Ints] = []
    limit: list[Ints] = []
    for s in range(len(rows.length_S)):
        row_R = np.arange(rows.start_S1[s], rows.start_S1[s + 1])
        own = 0
        for extent in layout.extents.get(s, ()):
            stop = -(-(extent.start + extent.length) // size)
            pages.append(rows.table_SM[s, extent.start // size : stop].astype(np.int64))
            bases.append(extent.start)
            row.append(row_R + count if extent.context else row_R)
            limit.append(np.full(len(row_R), extent.length))
            own = stop * size
        last = -(-int(rows.length_S[s]) // size)
        pages.append(rows.table_SM[s, own // size : last].astype(np.int64))
        bases.append(own)
        row.append(row_R)
        limit.append(rows.limit_T[row_R] - own)
    row_E = np.concatenate(row)
    return Pieces(
        page_C=np.concatenate(pages),
        page_start_J1=prefix_sum(np.array([len(part) for part in pages])),
        base_J=np.array(bases, np.int64),
        row_start_J1=prefix_sum(np.array([len(part) for part in row])),
        row_E=row_E,
        first_E=np.zeros(len(row_E), np.int64),
        limit_E=np.concatenate(limit).astype(np.int64),
    )
