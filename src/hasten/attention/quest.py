"""Quest-style page selection: the rival that `adamas` is compared with. Not a system of the catalogue.

Source: Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", 2024, arXiv 2406.10774,
section 3. Each page keeps the coordinate-wise minimum and maximum of its keys; their product with the query bounds
every score of the page from above, and a decode row reads the pages with the highest bounds.

A Quest page is a page of the cache: run it with ``page_size=16`` (the paper's) in the plan's engine settings.

Legend: T rows, R decode rows over budget, H query heads, G kv heads, D head size, N pages, P page size, M pages of a
row, C chosen pages, K tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from hasten.attention.layout import AttentionSpec, KVPages, StepLayout
from hasten.attention.policy import AttentionPolicy, Dense, Selection, SidecarSpec, TokenSelection
from hasten.core.technique import Technique

if TYPE_CHECKING:
    from hasten.models.context import BuildContext

SIDECAR = "quest_bounds"


class Quest(Technique):
    """Decode rows read the ``budget / page size`` pages whose key bounds promise the highest scores."""

    slug = "quest"
    slots = ("attention_policy",)
    lossless = False

    budget: int = Field(256, ge=1, description="cached tokens a decode row reads, in whole pages")
    dense_layers: int = Field(2, ge=0, description="first layers that stay dense")

    def provide(self, slot: str, context: BuildContext) -> AttentionPolicy:
        return QuestPolicy(self, context.config.num_layers, context.config.shape.size)


class QuestPolicy(AttentionPolicy):
    """The policy for one model."""

    def __init__(self, settings: Quest, layers: int, size: int) -> None:
        self.settings = settings
        self.size = size
        self.sparse = tuple(range(min(settings.dense_layers, layers), layers))
        self.bounds: Mapping[int, Tensor] = {}
        self.chosen_S: Tensor | None = None

    def sidecars(self) -> tuple[SidecarSpec, ...]:
        """Minimum and maximum of each key coordinate per page: 8 D bytes per page and kv head."""
        return (SidecarSpec(SIDECAR, (2, self.size), torch.float32, per="page", layers=self.sparse),)

    def bind(self, sidecars: Mapping[str, Mapping[int, Tensor]]) -> None:
        self.bounds = sidecars[SIDECAR]

    def begin_step(self, layout: StepLayout) -> None:
        chosen_S = layout.decode_rows() & (layout.kv_len_S > self.settings.budget)
        self.chosen_S = chosen_S if bool(chosen_S.any()) else None

    def on_append(self, layer: int, k_TGD: Tensor, layout: StepLayout) -> None:
        if layer not in self.bounds:
            return
        low_NGD, high_NGD = self.bounds[layer].unbind(2)
        page_T = layout.slot_T // layout.page_size
        fresh = page_T[layout.slot_T % layout.page_size == 0]
        low_NGD[fresh], high_NGD[fresh] = float("inf"), float("-inf")
        low_NGD.index_reduce_(0, page_T, k_TGD, "amin")
        high_NGD.index_reduce_(0, page_T, k_TGD, "amax")

    def select(
        self, layer: int, q_THD: Tensor, pages: KVPages, layout: StepLayout, spec: AttentionSpec
    ) -> Selection:
        if self.chosen_S is None or layer not in self.bounds:
            return Dense()
        row_R = layout.query_start_S1[:-1][self.chosen_S].long()
        length_R = layout.kv_len_S[self.chosen_S].long()
        table_RM = layout.page_table_SM[self.chosen_S].long()
        return TokenSelection(row_R, *self.choose(layer, q_THD[row_R], table_RM, length_R, layout.page_size))

    def choose(
        self, layer: int, q_RHD: Tensor, table_RM: Tensor, length_R: Tensor, page_size: int
    ) -> tuple[Tensor, Tensor]:
        """(index_RHK, count_RH): the tokens of the best pages per query head; the last page is always read."""
        rows, heads, _ = q_RHD.shape
        used_R = (length_R + page_size - 1) // page_size
        table_RM = table_RM[:, : int(used_R.max())]
        bounds_RMG2D = self.bounds[layer][table_RM.clamp_min(0)]
        group = heads // bounds_RMG2D.shape[2]
        bounds_RMH2D = bounds_RMG2D.repeat_interleave(group, dim=2)
        score_RHM = (q_RHD[:, None, :, None] * bounds_RMH2D).amax(3).sum(-1).transpose(1, 2)
        page_M = torch.arange(table_RM.shape[1])
        score_RHM = score_RHM.masked_fill((page_M >= used_R[:, None])[:, None], float("-inf"))
        score_RHM.scatter_(2, (used_R - 1)[:, None, None].expand(rows, heads, 1), float("inf"))
        pages = min(max(self.settings.budget // page_size, 1), int(used_R.min()))
        best_RHC = score_RHM.topk(pages, dim=2).indices.sort(dim=2).values
        index_RHK = (best_RHC[..., None] * page_size + torch.arange(page_size)).flatten(2)
        count_RH = (index_RHK < length_R[:, None, None]).sum(2)
        return index_RHK.to(torch.int32), count_RH.to(torch.int32)
