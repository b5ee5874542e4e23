"""`flash_attention2`: FlashAttention with rows outside, deferred normalisation and threads over the sequence.

Source: Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", ICLR 2024, arXiv
2307.08691. Every difference from `flash_attention` is a switch of `Schedule`, on by default here: blocks of rows in the
outer loop whose output stays in cache (algorithm 1), powers of two, one division at the end and one log-sum-exp per row
(section 3.1), tasks over rows forward and over keys backward (3.2), rows rather than keys split inside a task (3.3),
causal tiles left out. With few rows over many keys ``splits`` computes parts of the keys apart and merges them.

Legend: B sequences, H query heads, G kv heads, T query tokens, S key tokens, D head size, Q, K blocks, R packed tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import Field
from torch import Tensor

from hasten.attention.flash_attention import FlashKernel, Starts, flash_attention
from hasten.attention.kernel import AttentionKernel
from hasten.core.technique import Technique
from hasten.kernels.flash_terms import VERSION_2, Schedule

if TYPE_CHECKING:
    from hasten.models.context import BuildContext

__all__ = ["FlashAttention2", "flash_attention2"]


def flash_attention2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias_BHTS: Tensor | None = None,
    alibi_H: Tensor | None = None,
    keep_BHQK: Tensor | None = None,
    block: int = 64,
    dropout: float = 0.0,
    seed: int | None = None,
    cu_q: Starts | None = None,
    cu_k: Starts | None = None,
    deterministic: bool = False,
    splits: int = 1,
    schedule: Schedule = VERSION_2,
    return_lse: bool = False,
) -> Any:
    """Softmax attention in the order of FlashAttention-2; arguments and result as of `flash_attention`.

    The output has the same bits for any number of threads, and packed sequences have the bits they have alone.
    deterministic: so have the gradients; then only batch and heads are shared among threads. splits: parts of the keys
    that are computed apart and merged, so that a few rows over many keys occupy all threads.
    """
    return flash_attention(
        q,
        k,
        v,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        bias_BHTS=bias_BHTS,
        alibi_H=alibi_H,
        keep_BHQK=keep_BHQK,
        block=block,
        dropout=dropout,
        seed=seed,
        cu_q=cu_q,
        cu_k=cu_k,
        schedule=replace(schedule, deterministic=deterministic, splits=splits),
        return_lse=return_lse,
    )


class FlashAttention2(Technique):
    """Prompts are read in FlashAttention-2's order: blocks of rows, output kept in cache, threads over the sequence.

    Source: Dao, ICLR 2024, arXiv 2307.08691.
    """

    slug = "flash_attention2"
    slots = ("attention_kernel",)
    lossless = True

    lanes: int = Field(VERSION_2.lanes, ge=1, le=4096, description="query vectors per block of rows (Br)")
    tile: int = Field(VERSION_2.tile, ge=1, le=256, description="keys per tile (Bc)")
    min_rows: int = Field(
        64,
        ge=1,
        description="fewest rows of a sequence in a step that are tiled; fewer are read as in decoding",
    )

    def schedule(self) -> Schedule:
        """Version 2 with this technique's tiles."""
        return Schedule(lanes=self.lanes, tile=self.tile)

    def provide(self, slot: str, context: BuildContext) -> AttentionKernel:
        return FlashKernel(self.schedule(), self.min_rows)
