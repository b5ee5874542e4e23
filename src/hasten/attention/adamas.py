"""`adamas`: Hadamard sparse attention at decode.

Source: Yan et al., "Adamas: Hadamard Sparse Attention for Efficient Long-Context Inference", 2025, arXiv 2510.18413.

Rotated keys are transformed by an orthonormal Hadamard matrix, cut into four buckets per coordinate and kept as 2-bit
codes in a sidecar of the KV pages. A decode row encodes its query the same way, ranks all cached tokens by the
Manhattan distance of the codes and attends, exactly, to the nearest ``budget`` tokens. Prefill and the first layers
stay dense. Keys and values in the cache are untouched.

Legend: T rows, R decode rows over budget, H query heads, G kv heads, D head size, N pages, P page size, K budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor

from hasten.attention.layout import AttentionSpec, KVPages, StepLayout
from hasten.attention.policy import AttentionPolicy, Dense, Selection, SidecarSpec, TokenSelection
from hasten.core.errors import UnsupportedError
from hasten.core.technique import Technique
from hasten.kernels import codes

if TYPE_CHECKING:
    from hasten.models.context import BuildContext

SIDECAR = "adamas_codes"


class Adamas(Technique):
    """Decode rows read the ``budget`` cached tokens whose 2-bit Hadamard codes are nearest to the query's."""

    slug = "adamas"
    slots = ("attention_policy",)
    lossless = False

    budget: int = Field(256, ge=1, description="cached tokens a decode row reads, the current one included")
    select: Literal["group", "per_head"] = Field(
        "per_head",
        description="one choice per query head (the paper's) or per kv head, its heads' distances summed",
    )
    dense_layers: int = Field(2, ge=0, description="first layers that stay dense")
    spread: float = Field(
        0.67, gt=0, description="outer cut points in standard deviations; 0.67 fills buckets evenly"
    )
    fixed_cut: float | None = Field(
        None, gt=0, description="use -x, 0, x as cut points instead of calibrating"
    )
    corrected: bool = Field(True, description="true Manhattan distance; False weighs the XOR bits (ablation)")
    calibration_tokens: int = Field(512, ge=32, description="tokens that the spread is measured on")

    def provide(self, slot: str, context: BuildContext) -> AttentionPolicy:
        size = context.config.shape.size
        if size < 8 or size & (size - 1):
            raise UnsupportedError(
                f"adamas needs a head size that is a power of two and at least 8, not {size} "
                "(the Sylvester Hadamard transform exists only there)"
            )
        layers, heads = context.config.num_layers, context.config.shape.heads
        if self.fixed_cut is not None:
            cut_L = torch.full((layers,), float(self.fixed_cut))
            return AdamasPolicy(self, layers, heads, size, cut_L, cut_L)
        from hasten.attention.calibration import coordinate_spread

        sigma_q_L, sigma_k_L = coordinate_spread(context, self.calibration_tokens)
        return AdamasPolicy(self, layers, heads, size, self.spread * sigma_q_L, self.spread * sigma_k_L)


class AdamasPolicy(AttentionPolicy):
    """The policy for one model. ``cut_q_L`` and ``cut_k_L`` are the outer cut points per layer (the inner one is 0)."""

    def __init__(
        self, settings: Adamas, layers: int, heads: int, size: int, cut_q_L: Tensor, cut_k_L: Tensor
    ) -> None:
        self._settings = settings
        self.layers, self.heads, self.size = layers, heads, size
        self.cut_q = [float(x) for x in cut_q_L]
        self.cut_k = [float(x) for x in cut_k_L]
        self.sparse = tuple(range(min(settings.dense_layers, layers), layers))
        self.codes: Mapping[int, Tensor] = {}
        self.row_R: Tensor | None = None
        self.length_R: Tensor | None = None
        self.table_RM: Tensor | None = None
        self._selectors: tuple[codes.HadamardSelector | None, ...] = ()

    @property
    def settings(self) -> Adamas:
        """What to choose by; may be changed between steps."""
        return self._settings

    @settings.setter
    def settings(self, settings: Adamas) -> None:
        self._settings, self._selectors = settings, ()

    def sidecars(self) -> tuple[SidecarSpec, ...]:
        """Two bits per coordinate: D / 4 bytes per token and kv head."""
        return (SidecarSpec(SIDECAR, (self.size // 4,), torch.uint8, layers=self.sparse),)

    def bind(self, sidecars: Mapping[str, Mapping[int, Tensor]]) -> None:
        self.codes, self._selectors = sidecars[SIDECAR], ()

    def selectors(self) -> tuple[codes.HadamardSelector | None, ...]:
        if not self._selectors:
            self._selectors = tuple(self._selector(layer) for layer in range(self.layers))
        return self._selectors

    def _selector(self, layer: int) -> codes.HadamardSelector | None:
        if layer not in self.codes:
            return None
        return codes.HadamardSelector(
            self.codes[layer],
            self.cut_q[layer],
            self.cut_k[layer],
            self.settings.budget,
            heads=self.heads,
            per_head=self.settings.select == "per_head",
            corrected=self.settings.corrected,
        )

    def begin_step(self, layout: StepLayout) -> None:
        """Choose the rows that are sparse in this step: decode rows whose context exceeds the budget."""
        chosen_S = layout.decode_rows() & (layout.kv_len_S > self.settings.budget)
        if not bool(chosen_S.any()):
            self.row_R = None
            return
        self.row_R = layout.query_start_S1[:-1][chosen_S].long()
        self.length_R = layout.kv_len_S[chosen_S].contiguous()
        self.table_RM = layout.page_table_SM[chosen_S].contiguous()

    def on_append(self, layer: int, k_TGD: Tensor, layout: StepLayout) -> None:
        if layer in self.codes:
            codes.hadamard_append(k_TGD, self.cut_k[layer], self.codes[layer], layout.slot_T)

    def select(
        self, layer: int, q_THD: Tensor, pages: KVPages, layout: StepLayout, spec: AttentionSpec
    ) -> Selection:
        if self.row_R is None or layer not in self.codes:
            return Dense()
        every = self.row_R.numel() == layout.rows  # rows are distinct, so all of them, in order
        index_RXK, count_RX = self.nearest(layer, q_THD if every else q_THD[self.row_R])
        return TokenSelection(self.row_R, index_RXK, count_RX)

    def nearest(self, layer: int, q_RHD: Tensor) -> tuple[Tensor, Tensor]:
        """(index_RXK, count_RX): the budget-1 nearest tokens of each row, and the current one."""
        assert self.table_RM is not None
        assert self.length_R is not None
        return codes.hadamard_nearest(
            q_RHD,
            self.cut_q[layer],
            self.codes[layer],
            self.table_RM,
            self.length_R,
            self.settings.budget,
            per_head=self.settings.select == "per_head",
            corrected=self.settings.corrected,
        )
