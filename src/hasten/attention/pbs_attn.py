"""`pbs_attn`: block-sparse prefill after a permutation of the keys.

Source: Wang et al., "Sparser Block-Sparse Attention via Token Permutation", 2025, arXiv 2510.21270.

Attention does not care in which order it meets keys. So, within segments of a few blocks, the keys that the end of the
prompt attends to most are gathered in the same blocks; then fewer blocks hold the mass that has to be kept. Per query
head: (1) the last rows attend to all keys of whole segments, their mean attention is each key's importance; (2) each
segment's keys are ordered by it and cut into blocks; (3) mean queries meet mean keys per block; (4) each query block
keeps the heaviest blocks that hold ``threshold`` of that mass, (5) the block that token 0 moved to, and all of its own
segment; (6) exact attention over what is kept. The cache keeps its order and decode rows stay dense.

A query block reads all of its own segment, so there the order of keys changes nothing: only which tokens of earlier
segments share a block matters, and those precede every row. `BlockSelection` lists a block's tokens by position, which
makes the causal mask inside the segment a limit per row.

A prompt read in chunks (engine setting ``max_step_tokens``) is probed by the last rows of each chunk, so what is chosen
depends on the chunks. The probe reads as many keys as those rows do: steps of several thousand rows make it cheap.

Legend: T rows of a sequence, H query heads, D head size, L cached tokens, Q query blocks, B key blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from hasten.attention.blocks import BlockPrefillPolicy
from hasten.attention.layout import AttentionSpec
from hasten.attention.policy import AttentionPolicy, BlockSelection
from hasten.core.errors import SettingError
from hasten.core.technique import Technique
from hasten.kernels.block_list import Cached, order_blocks, pool_keys, pool_rows, probe_keys

if TYPE_CHECKING:
    from hasten.models.context import BuildContext


class PbsAttn(Technique):
    """Prompts read, per query block, the key blocks that hold most of the mass after keys are sorted in segments."""

    slug = "pbs_attn"
    slots = ("attention_policy",)
    lossless = False

    threshold: float = Field(
        0.9,
        gt=0,
        le=1,
        description="share of the estimated mass that a query block keeps; 1 keeps everything",
    )
    block: int = Field(128, ge=1, description="tokens of a query block and of a key block")
    segment: int = Field(256, ge=2, description="tokens that are permuted among themselves; whole blocks")
    permute: bool = Field(True, description="False: the same selection in cache order (the paper's ablation)")
    min_rows: int = Field(64, ge=2, description="sequences that bring fewer rows to a step stay dense")

    def provide(self, slot: str, context: BuildContext) -> AttentionPolicy:
        if self.segment % self.block:
            raise SettingError(
                f"pbs_attn: segment = {self.segment} must be whole blocks of {self.block} tokens"
            )
        return PbsPolicy(self, context.config.num_layers)


class PbsPolicy(BlockPrefillPolicy):
    """The policy for one model. ``settings`` may be changed between steps."""

    def __init__(self, settings: PbsAttn, layers: int) -> None:
        self.settings = settings
        super().__init__(layers)

    @property
    def fewest(self) -> tuple[int, int]:
        return self.settings.min_rows, self.settings.segment

    def choose(
        self, sequence: int, layer: int, q_THD: Tensor, cached: Cached, spec: AttentionSpec
    ) -> BlockSelection:
        """What the rows ``q_THD``, the last of the cached tokens, read."""
        o = self.settings
        length, (rows, heads, _) = cached.length, q_THD.shape
        whole = length // o.segment * o.segment
        order_HL = None
        if o.permute and whole:
            q_last = q_THD[-o.block :]
            score_HL = probe_keys(q_last, cached, whole, spec.scale, spec.softcap)
            order_HL = order_blocks(score_HL, length, o.block, o.segment)
        first = length - rows
        blocks = -(-length // o.block)
        per_segment = o.segment // o.block
        low = first // o.block
        query_Q = torch.arange(low, (length - 1) // o.block + 1)
        segment_Q, segment_B = query_Q // per_segment, torch.arange(blocks) // per_segment
        earlier_QB = segment_B < segment_Q[:, None]
        if o.threshold == 1:  # a sum of rounded shares may never reach it
            keep_HQB = earlier_QB.expand(heads, -1, -1).clone()
        else:
            # Blocks are padded with zeros, as in the paper: a partly filled query block has a shorter mean.
            edge_Q = torch.clamp((query_Q + 1) * o.block, max=length) - torch.clamp(
                query_Q * o.block, min=first
            )
            q_HQD = pool_rows(q_THD, first, o.block)[0] * (edge_Q / o.block)[:, None]
            k_XBD, _ = pool_keys(cached, o.block, choices=heads, order_XL=order_HL)
            score_HQB = torch.bmm(q_HQD, k_XBD.transpose(1, 2)) * spec.scale
            keep_HQB = heaviest(score_HQB, earlier_QB, o.threshold)
        sink_H = torch.zeros(heads, dtype=torch.int64)
        if order_HL is not None:
            sink_H = (order_HL[:, : o.segment] == 0).int().argmax(1) // o.block
        keep_HQB.scatter_(2, sink_H[:, None, None].expand(-1, len(query_Q), 1), True)
        keep_HQB |= segment_B == segment_Q[:, None]
        return BlockSelection(sequence, o.block, keep_HQB, order_HL)


def heaviest(score_HQB: Tensor, visible_QB: Tensor, threshold: float) -> Tensor:
    """bool [H, Q, B]: per row the fewest visible blocks, heaviest first, whose softmax adds up to ``threshold``."""
    share = score_HQB.masked_fill(~visible_QB, -torch.inf).softmax(-1).nan_to_num(0.0)
    value, index = share.sort(-1, descending=True)
    before = value.cumsum(-1) - value
    chosen = (before < threshold) & (value > 0)
    return torch.zeros_like(chosen).scatter_(2, index, chosen) & visible_QB
