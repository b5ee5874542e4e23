"""What `flashinfer` is compared with: attention kernels of the engine's slot that do the same work in plainer ways.

Legend: T rows, H query heads, G kv heads, D head size, L cached tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hasten.attention.flashinfer import BatchAttention, FlashInfer, FlashInferKernel
from hasten.attention.flashinfer_format import BlockSparse
from hasten.attention.kernel import AttentionKernel
from hasten.attention.layout import AttentionSpec, HeadShape, KVPages, StepLayout
from hasten.attention.pieces import PiecePlan, Pieces, Rows, finish, join, sequence_pieces, windowed
from hasten.kernels.rope import rope_append
from hasten.kernels.variants_known import ROPE


class GatherSDPA(AttentionKernel):
    """Baseline (a): gather each sequence's pages, then PyTorch's fused attention. Ragged: nothing is padded."""

    def plan(self, layout: StepLayout) -> Rows:
        return Rows.of(layout)

    def run(
        self,
        plan: Rows,
        layer: int,
        q_THD: Tensor,
        pages: KVPages,
        layout: StepLayout,
        spec: AttentionSpec,
        *rest: Any,
        **named: Any,
    ) -> Tensor:
        groups, size = spec.shape.kv_heads, spec.shape.size
        out = torch.empty_like(q_THD)
        for s in range(layout.sequences):
            begin, end, length = (int(x) for x in (plan.start_S1[s], plan.start_S1[s + 1], plan.length_S[s]))
            ids = layout.page_table_SM[s, : -(-length // layout.page_size)].long()
            k, v = (
                x[ids].transpose(0, 1).reshape(groups, -1, size)[None, :, :length].float()
                for x in (pages.k_NGPD, pages.v_NGPD)
            )
            rows, mask = end - begin, None
            if rows > 1:
                mask = torch.ones(rows, length, dtype=torch.bool).tril(length - rows)
            out[begin:end] = scaled_dot_product_attention(
                q_THD[begin:end].transpose(0, 1)[None], k, v, mask, scale=spec.scale, enable_gqa=True
            )[0].transpose(0, 1)
        return out


@dataclass
class _Static:
    rows: Rows
    parts: dict[HeadShape, PiecePlan] = field(default_factory=dict)


class Static(AttentionKernel):
    """Baseline (b): one task per (request, kv head) in table order, the same number for every thread, nothing split.

    ``packed=False``: one task per (request, query head), each of which reads keys and values for itself.
    """

    def __init__(self, *, packed: bool) -> None:
        self.packed = packed

    def plan(self, layout: StepLayout) -> _Static:
        return _Static(Rows.of(layout))

    def part(self, plan: _Static, spec: AttentionSpec) -> PiecePlan:
        found = plan.parts.get(spec.shape)
        if found is None:
            pieces = windowed(sequence_pieces(plan.rows), plan.rows.limit_T, spec.window)
            rows, heads = len(plan.rows.limit_T), spec.shape.heads
            if not self.packed:
                pieces = _apart(pieces, heads // spec.shape.kv_heads)
                rows, heads = rows * heads // spec.shape.kv_heads, spec.shape.kv_heads
            threads = torch.get_num_threads()
            found = finish(pieces, rows, plan.rows.page, heads, spec.shape.kv_heads, threads, balanced=False)
            plan.parts[spec.shape] = found
        return found

    def run(
        self,
        plan: _Static,
        layer: int,
        q_THD: Tensor,
        pages: KVPages,
        layout: StepLayout,
        spec: AttentionSpec,
        *rest: Any,
        **named: Any,
    ) -> Tensor:
        part, rows = self.part(plan, spec), q_THD.shape[0]
        repeat, groups = spec.shape.heads // spec.shape.kv_heads, spec.shape.kv_heads
        if self.packed:
            return part.attend(q_THD.contiguous(), pages.k_NGPD, pages.v_NGPD, spec.scale, spec.softcap)[0]
        q = (
            q_THD.reshape(rows, groups, repeat, -1)
            .transpose(1, 2)
            .reshape(rows * repeat, groups, -1)
            .contiguous()
        )
        out, _ = part.attend(q, pages.k_NGPD, pages.v_NGPD, spec.scale, spec.softcap)
        return out.view(rows, repeat, groups, -1).transpose(1, 2).reshape(q_THD.shape)

    def reading(self, plan: _Static, spec: AttentionSpec) -> PiecePlan | None:
        return self.part(plan, spec) if self.packed else None


def _apart(pieces: Pieces, repeat: int) -> Pieces:
    """Query head r of the group becomes row ``t * repeat + r``, in a piece of its own."""
    return reduce(join, (replace(pieces, row_E=pieces.row_E * repeat + r) for r in range(repeat)))


class PerLayer(FlashInferKernel):
    """`flashinfer` called layer by layer, as kernels are that a native step does not know: for fair step times."""

    def reading(self, plan: Any, spec: AttentionSpec) -> None:
        return None


def per_layer(*, composable: bool) -> PerLayer:
    return PerLayer(FlashInfer(composable=composable))


def random_pool(pages: int, shape: HeadShape, page: int, dtype: torch.dtype) -> KVPages:
    """Pages of normal numbers."""
    size = (pages, shape.kv_heads, page, shape.size)
    return KVPages(torch.randn(size).to(dtype), torch.randn(size).to(dtype))


class Streaming:
    """A decode step's attention over a sink page and the recent pages of each sequence, layer after layer.

    Keys are cached as they were before rotation, and turned by their place in the window: on read (``fused``), or in a
    pass over the window's keys before (``separate``).
    """

    def __init__(self, batch: int, window: int, dtype: torch.dtype, layers: int = 30, page: int = 32) -> None:
        self.shape, self.page, self.window, count = HeadShape(9, 3, 64), page, window, window // page
        self.half = self.shape.size // 2
        start = np.arange(batch)[:, None] * (count + 4)
        ids = np.concatenate((start, start + 5 + np.arange(count - 1)), 1)
        self.format = BlockSparse(
            np.arange(batch + 1), np.arange(batch + 1) * count, ids.ravel(), np.full(batch, page), page
        )
        self.attention = BatchAttention(self.shape)
        self.attention.plan([self.format], batch)
        self.pool = [random_pool(batch * (count + 4), self.shape, page, dtype) for _ in range(layers)]
        angle = torch.arange(window)[:, None] / 10000.0 ** (torch.arange(self.half) / self.half)
        self.cos, self.sin = torch.cos(angle), torch.sin(angle)
        self.at = torch.from_numpy(ids.ravel())
        # The pass over the window is native too: keys of a page's head are rows of a pool with one head.
        groups, slots = self.shape.kv_heads, batch * (count + 4) * self.shape.kv_heads
        self.one_head = (slots, 1, page, self.shape.size)
        head = (self.at[:, None] * groups + torch.arange(groups)).reshape(-1, 1)
        self.slot = (head * page + torch.arange(page)).reshape(-1)
        whole = [torch.cat((x, x), 1).view(count, 1, page, -1) for x in (self.cos, self.sin)]
        self.rows = [
            x.expand(-1, groups, -1, -1).repeat(batch, 1, 1, 1).reshape(-1, 2 * self.half) for x in whole
        ]
        self.turned, self.unused = (torch.zeros_like(self.pool[0].k_NGPD) for _ in range(2))
        self.none = torch.zeros(len(self.slot), 0, self.shape.size)
        self.q = torch.randn(batch, self.shape.heads, self.shape.size)

    def fused(self) -> list[Tensor]:
        scale = self.shape.size**-0.5
        return [
            self.attention.run(self.q, pages, scale, ROPE, cos=self.cos, sin=self.sin)[0]
            for pages in self.pool
        ]

    def separate(self) -> list[Tensor]:
        scale, half, out = self.shape.size**-0.5, self.half, []
        for pages in self.pool:
            k = pages.k_NGPD[self.at].float().view(-1, 1, self.shape.size)
            pools = (self.turned.view(self.one_head), self.unused.view(self.one_head))
            rope_append(self.none, k, k, *self.rows, self.slot, *pools)
            q = _turn(self.q, self.cos[-1], self.sin[-1], half)
            out.append(self.attention.run(q, KVPages(self.turned, pages.v_NGPD), scale)[0])
        return out

    def check(self) -> None:
        """Both ways give the same, up to the rounding of turned keys to the cache's dtype."""
        for a, b in zip(self.fused(), self.separate(), strict=True):
            torch.testing.assert_close(a, b, atol=0.05, rtol=0.05)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, half: int) -> Tensor:
    left, right = x[..., :half], x[..., half:]
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)
