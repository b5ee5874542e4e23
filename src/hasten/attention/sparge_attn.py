"""`sparge_attn`: prefill attention that reads the blocks that pooled scores promise, with integer products.

Source: Zhang et al., "SpargeAttn: Accurate and Training-free Sparse Attention Accelerating Any Model Inference", ICML
2025, arXiv 2502.18137; integer products from SageAttention, arXiv 2410.02367.

Per head: (1) keys lose their mean over the tokens, which changes no weight of the softmax; queries and keys are rounded
to integers per block: 8 bits in the paper, 12 here, because AVX2 multiplies 16-bit integers and the finer ones cost
the same. (2) The mean query of a block of 128 meets the mean key of each block of 64; the softmax over a row of
these scores says which blocks matter: the heaviest that hold ``tau`` of the mass, or a fixed share of them
(``topk``). A mean says something only about a block whose vectors are alike (mean cosine above ``theta``): other
query blocks read everything, other key blocks are read by everyone. (3) Exact attention over those blocks; (4)
within them, a tile that lies more than ``skip`` (base 2) below what a group of rows has seen adds nothing and is
left out.

The first block is always read (``sink``): one token inside a mean is invisible, and language models lean on the first.
Decode rows stay dense, the cache keeps its numbers. ``mode="calibrated"`` takes theta, tau and skip of every layer and
head from an artefact (`hasten.attention.sparge_calibration`); without one, ``topk`` is the mode that suits any head.

Blocks lie at fixed positions of a sequence, so a prompt may be read in chunks; ``topk`` counts the blocks so far.

Legend: T rows of a sequence, H query heads, G kv heads, D head size, L cached tokens, Q query blocks, B key blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor

from hasten.attention.blocks import BlockPrefillPolicy
from hasten.attention.layout import AttentionSpec
from hasten.attention.policy import AttentionPolicy, BlockSelection
from hasten.core.errors import SettingError, UnsupportedError
from hasten.core.technique import Technique
from hasten.kernels.block_list import Cached, Visits, pool_keys, pool_rows, quantise_keys

if TYPE_CHECKING:
    from hasten.models.context import BuildContext

QUERY_BLOCK, KEY_BLOCK = 128, 64


class SpargeAttn(Technique):
    """Prompts read the key blocks that pooled scores promise; integer products and a softmax filter inside them."""

    slug = "sparge_attn"
    slots = ("attention_policy",)
    lossless = False

    mode: Literal["topk", "cdf", "calibrated"] = Field(
        "topk", description="a share of the blocks, a share of the mass, or what calibration found per head"
    )
    topk: float = Field(0.25, gt=0, le=1, description="share of all key blocks, of mode topk")
    tau: float = Field(0.98, gt=0, le=1, description="share of the estimated mass, of mode cdf; 1 keeps all")
    theta: float = Field(
        -0.1,
        ge=-1,
        le=1,
        description="blocks whose mean cosine is not above it are always read; 1: every block",
    )
    skip: float = Field(
        50.0, ge=0, description="leave out tiles this far below what was seen (base 2); 0: never"
    )
    bits: int = Field(
        12,
        ge=0,
        le=12,
        description="of the integers that queries and keys are rounded to (the paper: 8); 0: not rounded",
    )
    sink: bool = Field(True, description="always read the first block (else each row's own)")
    min_rows: int = Field(64, ge=2, description="sequences that bring fewer rows to a step stay dense")
    l1: float = Field(0.07, gt=0, lt=1, description="relative L1 error that calibration allows block choice")
    l2: float = Field(0.08, gt=0, lt=1, description="and with the softmax filter; above l1")
    inputs: int = Field(5, ge=1, description="texts to calibrate on")
    input_tokens: int = Field(2048, ge=256, description="tokens of each")

    def provide(self, slot: str, context: BuildContext) -> AttentionPolicy:
        size = context.config.shape.size
        if self.bits == 1:
            raise SettingError(
                "sparge_attn: bits = 1 leaves only the sign; give 2 to 12, or 0 for float products"
            )
        if self.bits and size % 2:
            raise UnsupportedError(
                f"sparge_attn multiplies pairs of codes: give bits=0 for an odd head size ({size})"
            )
        layers, heads = context.config.num_layers, context.config.shape.heads
        if self.mode == "calibrated":
            from hasten.attention.sparge_calibration import calibrated

            return SpargePolicy(self, layers, calibrated(context, self))
        return SpargePolicy(self, layers, uniform(self, layers, heads))


@dataclass(frozen=True)
class HeadSettings:
    """Per layer and head, float32 [layers, H]: see `SpargeAttn`. A head with tau = theta = 1 is dense."""

    theta_LH: Tensor
    tau_LH: Tensor
    skip_LH: Tensor


def uniform(settings: SpargeAttn, layers: int, heads: int) -> HeadSettings:
    """The same for every head."""
    shape = (layers, heads)
    return HeadSettings(
        torch.full(shape, settings.theta), torch.full(shape, settings.tau), torch.full(shape, settings.skip)
    )


class SpargePolicy(BlockPrefillPolicy):
    """The policy for one model. ``settings`` and ``heads`` may be changed between steps.

    visits: what the softmax filter met and left out so far.
    """

    def __init__(self, settings: SpargeAttn, layers: int, heads: HeadSettings) -> None:
        self.settings, self.heads = settings, heads
        self.visits = Visits()
        super().__init__(layers)

    @property
    def fewest(self) -> tuple[int, int]:
        return self.settings.min_rows, QUERY_BLOCK

    def choose(
        self, sequence: int, layer: int, q_THD: Tensor, cached: Cached, spec: AttentionSpec
    ) -> BlockSelection:
        """What the rows ``q_THD``, the last of the cached tokens, read."""
        o = self.settings
        theta_H, tau_H = self.heads.theta_LH[layer], self.heads.tau_LH[layer]
        groups = spec.shape.kv_heads
        center_GD = pool_keys(cached, cached.length)[0].view(groups, -1)
        keep_HQB = choose_blocks(
            q_THD,
            cached,
            center_GD,
            spec.scale,
            theta_H,
            tau_H,
            topk=o.topk if o.mode == "topk" else None,
            sink=o.sink,
        )
        plain = (
            spec.softcap is None
        )  # the bound on scores, and what a mean key adds to them, are those of plain products
        return BlockSelection(
            sequence,
            KEY_BLOCK,
            keep_HQB,
            query_block=QUERY_BLOCK,
            floor_H=-self.heads.skip_LH[layer] if plain else None,
            codes=quantise_keys(cached, center_GD, o.bits) if o.bits and plain else None,
            visits=self.visits,
        )


def choose_blocks(
    q_THD: Tensor,
    cached: Cached,
    center_GD: Tensor,
    scale: float,
    theta_H: Tensor,
    tau_H: Tensor,
    *,
    topk: float | None,
    sink: bool,
) -> Tensor:
    """bool [H, Q, B]: stage 1, causal. ``topk`` (else ``tau_H``) says how much of each row is kept."""
    rows, heads, _ = q_THD.shape
    length, first = cached.length, cached.length - rows
    q_HQD, alike_HQ = pool_rows(q_THD, first, QUERY_BLOCK, similarity=True)
    k_GBD, alike_GB = pool_keys(cached, KEY_BLOCK, center_GD=center_GD, similarity=True)
    assert alike_HQ is not None
    assert alike_GB is not None
    repeat = heads // k_GBD.shape[0]
    alike_HQ, alike_HB = alike_HQ > theta_H[:, None], alike_GB.repeat_interleave(repeat, 0) > theta_H[:, None]
    query_Q = torch.arange(first // QUERY_BLOCK, (length - 1) // QUERY_BLOCK + 1)
    last_Q = torch.clamp((query_Q + 1) * QUERY_BLOCK, max=length) - 1  # position of a query block's last row
    visible_QB = torch.arange(k_GBD.shape[1]) * KEY_BLOCK <= last_Q[:, None]
    score_HQB = torch.bmm(q_HQD, k_GBD.repeat_interleave(repeat, 0).transpose(1, 2)) * scale
    score_HQB = score_HQB.masked_fill(~visible_QB | ~alike_HB[:, None], -torch.inf)
    # A row without any block of like keys has nothing to choose from; all of its blocks are read below.
    share_HQB = score_HQB.softmax(-1).nan_to_num(0.0)
    value, index = share_HQB.sort(dim=-1, descending=True, stable=True)
    blocks = k_GBD.shape[1]
    if topk is not None:
        kept = max(1, int(topk * blocks))
        chosen = (torch.arange(blocks) < kept).expand_as(value)
    else:
        tau_H11 = tau_H[:, None, None]
        # Those whose sum does not exceed tau, at least one; a sum of rounded shares may exceed 1.
        chosen = (value.cumsum(-1) <= tau_H11) | (tau_H11 >= 1) | (torch.arange(blocks) == 0)
    keep_HQB = torch.zeros_like(chosen).scatter_(2, index, chosen)
    keep_HQB |= ~alike_HB[:, None] | ~alike_HQ[:, :, None]
    if sink:
        keep_HQB[:, :, 0] = True
    else:  # a row may see none of what its query block chose
        first_Q = torch.clamp(query_Q * QUERY_BLOCK, min=first)
        span_B = torch.arange(blocks)
        keep_HQB |= (span_B >= (first_Q // KEY_BLOCK)[:, None]) & (span_B <= (last_Q // KEY_BLOCK)[:, None])
    return keep_HQB & visible_QB
