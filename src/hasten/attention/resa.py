"""`resa`: block-sparse attention at decode, and dense repair of what it cached.

Source: Sun et al., "Rectified Sparse Attention", 2025, arXiv 2506.04108.

Decode rows (section 2.1) read the blocks of keys whose boxes promise the highest scores, one choice per kv head for all
of its query heads. What they cache carries the error of what they did not read, and the error feeds on itself. So
every ``every`` tokens the sequence's last tokens are run again (section 2.2) as one chunk that reads densely: their
keys and values are overwritten, the boxes made anew, the logits dropped. Tokens that were emitted stay. After a repair
the cache is what a dense model would hold for the same tokens. Prefill is dense.

`Rectified` adds the repair to any policy that is sparse for decode rows only; the scheduler carries it out
(`AttentionPolicy.repair`).

Legend: T rows, S sequences, R sparse rows, H query heads, G kv heads, D head size, N pages, P page size,
M pages of a row, B block, W blocks, K tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from hasten.attention.layout import AttentionSpec, HeadShape, KVPages, StepLayout
from hasten.attention.policy import (
    AttentionPolicy,
    Dense,
    Repair,
    Selection,
    SidecarSpec,
    TokenSelection,
)
from hasten.catalog import loader
from hasten.core.errors import ConflictError, SettingError, UnsupportedError
from hasten.core.plan import parse_use
from hasten.core.technique import Technique
from hasten.kernels import bounds
from hasten.kernels.decode import Selector

if TYPE_CHECKING:
    from hasten.models.context import BuildContext

SIDECAR = "resa_bounds"


class Resa(Technique):
    """Decode rows read the most promising blocks; every few tokens the cache is repaired by a dense pass."""

    slug = "resa"
    slots = ("attention_policy",)
    lossless = False
    # Dense decoding, and the same sparsity without repairs: what a repair costs in time and gives in quality.
    baselines: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"use": {"resa": {"every": 0}}})

    block: int = Field(16, ge=1, le=1024, description="tokens of a block; must divide the page size")
    ratio: float = Field(0.1, gt=0, le=1, description="share of its blocks that a decode row reads")
    local: int = Field(1, ge=0, description="last blocks that are always read")
    min_blocks: int = Field(16, ge=1, description="blocks that a decode row reads at least")
    every: int | None = Field(32, ge=0, description="tokens between repairs; 0 or None: never")
    over: str | None = Field(
        None,
        description="another decode policy to repair instead, e.g. adamas:budget=512; None: the blocks above",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Resa:
        if self.local > self.min_blocks:
            raise ValueError(f"local = {self.local} must not be above min_blocks = {self.min_blocks}")
        return self

    def provide(self, slot: str, context: BuildContext) -> AttentionPolicy:
        inner = self._blocks(context) if self.over is None else self._other(self.over, context)
        return Rectified(inner, self.every) if self.every else inner

    def _blocks(self, context: BuildContext) -> BlockPolicy:
        rule = bounds.KeepRule(self.ratio, self.min_blocks, self.local)
        dtype = torch.float32 if context.kv_dtype is torch.float32 else torch.bfloat16
        config = context.config
        # A sliding window bounds what a layer reads better than a selection would.
        sparse = [layer for layer in range(config.num_layers) if config.attention(layer).window is None]
        if not sparse:
            raise UnsupportedError(
                "resa: all layers of this model read a sliding window; there is nothing to select from"
            )
        return BlockPolicy(
            rule, self.block, dtype, layers=config.num_layers, sparse=sparse, shape=config.shape
        )

    def _other(self, over: str, context: BuildContext) -> AttentionPolicy:
        other = parse_use(over, loader.technique)
        if "attention_policy" not in other.slots or other.slug == self.slug:
            raise SettingError(
                f"resa.over = {over!r}: must name another technique of slot 'attention_policy'"
            )
        policy: AttentionPolicy = other.provide("attention_policy", context)
        return policy


class BlockPolicy(AttentionPolicy):
    """Group block-sparse attention at decode (section 2.1), for one model.

    rule: which share of the blocks is read. block: their tokens. dtype: of the boxes, that of the pages. sparse: the
    layers that select, of all ``layers``.
    """

    def __init__(
        self,
        rule: bounds.KeepRule,
        block: int,
        dtype: torch.dtype,
        *,
        layers: int,
        sparse: Sequence[int],
        shape: HeadShape,
    ) -> None:
        self._rule, self.block, self.dtype = rule, block, dtype
        self.layers, self.sparse, self.shape = layers, tuple(sparse), shape
        self.bounds: Mapping[int, Tensor] = {}
        self._selectors: tuple[Selector | None, ...] = ()
        self._chosen: tuple[Tensor, Tensor, Tensor] | None = (
            None  # row_R, length_R, table_RM of the sparse rows
        )
        self._widening: Tensor | None = None  # rows of the step that widen boxes; None: all of them
        self._rebuilt: tuple[Tensor, Tensor] | None = None  # block_W, count_W that are made anew in this step

    @property
    def rule(self) -> bounds.KeepRule:
        """Which blocks are read; may be changed between steps."""
        return self._rule

    @rule.setter
    def rule(self, rule: bounds.KeepRule) -> None:
        self._rule, self._selectors = rule, ()

    def sidecars(self) -> tuple[SidecarSpec, ...]:
        """Two keys' worth of numbers per block and kv head."""
        return (SidecarSpec(SIDECAR, (2, self.shape.size), self.dtype, self.block, self.sparse),)

    def bind(self, sidecars: Mapping[str, Mapping[int, Tensor]]) -> None:
        self.bounds, self._selectors = sidecars[SIDECAR], ()

    def selectors(self) -> Sequence[Selector | None]:
        if not self._selectors and self.rule.whole is not None:
            self._selectors = tuple(self._selector(layer) for layer in range(self.layers))
        return self._selectors

    def _selector(self, layer: int) -> Selector | None:
        box = self.bounds.get(layer)
        if box is None:
            return None
        return bounds.BoundsSelector(box, box.shape[2] * self.block, self.rule, heads=self.shape.heads)

    def begin_step(self, layout: StepLayout) -> None:
        """Decode rows that see more blocks than are read in any case choose; other rows make boxes anew."""
        decode_S = layout.decode_rows()
        self._plan_boxes(layout, decode_S)
        chosen_S = decode_S & (layout.kv_len_S > self.whole)
        self._chosen = None
        if bool(chosen_S.any()):
            row_R = layout.query_start_S1[:-1][chosen_S].long()
            self._chosen = (
                row_R,
                layout.kv_len_S[chosen_S].contiguous(),
                layout.page_table_SM[chosen_S].contiguous(),
            )

    @property
    def whole(self) -> int:
        """Contexts of up to so many tokens are read whole."""
        blocks = self.rule.whole
        return 2**31 - 1 if blocks is None else blocks * self.block

    def _plan_boxes(self, layout: StepLayout, decode_S: Tensor) -> None:
        """Boxes of decode rows are widened by the new key; all others are made anew from the pages, because what
        stood there before (before a repair, or a rejected draft) would make them wider than the keys are."""
        self._widening = self._rebuilt = None
        if bool(decode_S.all()):
            return
        per = layout.page_size // self.block
        blocks, counts = [], []
        for s in torch.nonzero(~decode_S)[:, 0].tolist():
            rows = int(layout.query_start_S1[s + 1] - layout.query_start_S1[s])
            length = int(layout.kv_len_S[s])
            block_W = torch.arange((length - rows) // self.block, -(-length // self.block))
            blocks.append(layout.page_table_SM[s].long()[block_W // per] * per + block_W % per)
            counts.append((length - block_W * self.block).clamp_max(self.block).to(torch.int32))
        self._rebuilt = torch.cat(blocks), torch.cat(counts)
        self._widening = layout.query_start_S1[:-1][decode_S].long()

    def on_append(self, layer: int, k_TGD: Tensor, layout: StepLayout) -> None:
        if layer not in self.bounds:
            return
        row, slot_T = self._widening, layout.slot_T
        if row is not None:
            k_TGD, slot_T = k_TGD[row], slot_T[row]
        bounds.bounds_append(k_TGD, slot_T, self.bounds[layer], layout.page_size)

    def select(
        self, layer: int, q_THD: Tensor, pages: KVPages, layout: StepLayout, spec: AttentionSpec
    ) -> Selection:
        if layer not in self.bounds:
            return Dense()
        if not isinstance(pages, KVPages):
            raise UnsupportedError(
                f"resa cannot read keys from {type(pages).__name__}; remove the KV format of the plan"
            )
        if self._rebuilt is not None:
            bounds.bounds_rebuild(pages.k_NGPD, *self._rebuilt, self.bounds[layer])
        if self._chosen is None:
            return Dense()
        row_R, length_R, table_RM = self._chosen
        every = row_R.numel() == layout.rows  # rows are distinct, so all of them, in order
        q_RHD = q_THD if every else q_THD[row_R]
        return TokenSelection(
            row_R,
            *bounds.bounds_choose(q_RHD, table_RM, length_R, self.bounds[layer], layout.page_size, self.rule),
        )


class Rectified(AttentionPolicy):
    """``policy``, with what its decode rows cached computed again after every ``every`` tokens (section 2.2).

    Raises `ConflictError` when the policy asks for repairs of its own. Rows of a repair always read densely, whatever
    the policy answers for them.
    """

    def __init__(self, policy: AttentionPolicy, every: int) -> None:
        if every < 1:
            raise SettingError(f"every = {every}: must be at least 1")
        if policy.repair is not None:
            raise ConflictError(f"{type(policy).__name__} has its cached tokens computed again already")
        if policy.unrotated_keys:
            raise ConflictError(
                f"{type(policy).__name__} rotates keys as it reads them; rows of a repair read cached keys as they are"
            )
        self.policy, self.every, self.grid = policy, every, policy.grid
        self._repair: Repair | None = None
        self._of: Sequence[Selector | None] = ()  # the selectors that the repair was made for

    @property
    def repair(self) -> Repair | None:
        found = self.policy.selectors()
        if self._repair is None or found is not self._of:
            budgets = [selector.budget for selector in found if selector is not None]
            self._repair, self._of = Repair(self.every, min(budgets, default=0)), found
        return self._repair

    def sidecars(self) -> tuple[SidecarSpec, ...]:
        return self.policy.sidecars()

    def bind(self, sidecars: Mapping[str, Mapping[int, Tensor]]) -> None:
        self.policy.bind(sidecars)

    def selectors(self) -> Sequence[Selector | None]:
        return self.policy.selectors()

    def begin_step(self, layout: StepLayout) -> None:
        self.policy.begin_step(layout)

    def on_append(self, layer: int, k_TGD: Tensor, layout: StepLayout) -> None:
        self.policy.on_append(layer, k_TGD, layout)

    def select(
        self, layer: int, q_THD: Tensor, pages: KVPages, layout: StepLayout, spec: AttentionSpec
    ) -> Selection:
        selection = self.policy.select(layer, q_THD, pages, layout, spec)
        return _spared(selection, layout) if layout.recomputed else selection

    def observe(self, layer: int, probs_THL: Tensor, layout: StepLayout) -> None:
        self.policy.observe(layer, probs_THL, layout)

    def end_step(self, layout: StepLayout) -> None:
        self.policy.end_step(layout)

    def forget(self, sequence_id: int) -> None:
        self.policy.forget(sequence_id)

    def figures(self) -> dict[str, float]:
        return self.policy.figures()


def _spared(selection: Selection, layout: StepLayout) -> Selection:
    """The selection without the rows of repairs."""
    if isinstance(selection, TokenSelection):
        again_S = torch.zeros(layout.sequences, dtype=torch.bool)
        again_S[list(layout.recomputed)] = True
        kept_R = ~again_S[layout.row_sequence_T()[selection.row_R]]
        if bool(kept_R.all()):
            return selection
        return TokenSelection(
            selection.row_R[kept_R], selection.index_RXK[kept_R], selection.count_RX[kept_R]
        )
    if isinstance(selection, tuple):
        return tuple(part for part in selection if part.sequence not in layout.recomputed)
    return selection
