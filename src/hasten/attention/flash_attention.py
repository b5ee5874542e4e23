"""`flash_attention`: exact attention, tile by tile, forward and backward; memory linear in length.

Source: Dao, Fu, Ermon, Rudra, Re, "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness",
NeurIPS 2022, arXiv 2205.14135: algorithms 1 and 2 (forward), 4 (backward by recomputation), 5 (block-sparse), appendix
B (dropout from a counter, never stored). Blocks of keys are the outer loop, rows the inner one; the output is kept
normalised and rewritten once per block, with the maximum and the sum of every row; threads share batch x heads.

`flash_attention` is a differentiable function for training; `FlashAttention` puts the same kernel on the engine's path,
where it reads prompts (steps that bring many rows of a sequence). Single rows of decoding go to the default kernel.

Legend: B sequences, H query heads, G kv heads, T query tokens, S key tokens, D head size, Q, K blocks, R packed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor
from torch.autograd.function import once_differentiable

from hasten.attention.dense import DenseKernel, DensePlan
from hasten.attention.kernel import AttentionKernel
from hasten.attention.layout import AttentionSpec, KVPages, StepLayout
from hasten.attention.pieces import PiecePlan
from hasten.attention.policy import Dense, Selection
from hasten.core.technique import Technique
from hasten.kernels.flash import backward, forward
from hasten.kernels.flash_pages import PagesWork, flash_pages
from hasten.kernels.flash_terms import VERSION_1, Masking, Schedule, Stats

if TYPE_CHECKING:
    from hasten.models.context import BuildContext

__all__ = ["FlashAttention", "FlashKernel", "attend", "butterfly", "flash_attention", "masking_of"]

Starts = Tensor | Sequence[int]


class _Attend(torch.autograd.Function):
    """Saves inputs, output and one or two statistics per row; weights and dropout masks are made again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        masking: Masking,
        schedule: Schedule,
        cu_q: Starts | None,
        cu_k: Starts | None,
    ) -> tuple[Tensor, Tensor]:
        out, stats = forward(q, k, v, masking, schedule, cu_q=cu_q, cu_k=cu_k)
        lse = stats.log_sum_exp()
        if schedule.splits > 1:
            stats = Stats(lse)
        ctx.save_for_backward(q, k, v, out, stats.lse, stats.sum)
        ctx.settings = (masking, schedule, cu_q, cu_k)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, total = ctx.saved_tensors
        masking, schedule, cu_q, cu_k = ctx.settings
        gradients = backward(dout, q, k, v, out, Stats(lse, total), masking, schedule, cu_q=cu_q, cu_k=cu_k)
        return (*gradients, None, None, None, None)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    masking: Masking,
    schedule: Schedule,
    cu_q: Starts | None = None,
    cu_k: Starts | None = None,
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of `hasten.kernels.flash.forward`, with gradients for q, k and v. ``lse`` has none."""
    return _Attend.apply(q, k, v, masking, schedule, cu_q, cu_k)  # type: ignore[no-any-return, no-untyped-call]


def masking_of(
    size: int,
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
) -> Masking:
    """The settings of `flash_attention` for heads of ``size``, as the kernels read them."""
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 token, not {window}")
    if dropout and seed is None:
        seed = int(torch.randint(1 << 62, ()))
    return Masking(
        scale=size**-0.5 if scale is None else scale,
        left=None if window is None else window - 1,
        right=0 if causal else None if window is None else window - 1,
        softcap=softcap,
        bias_BHTS=bias_BHTS,
        alibi_H=alibi_H,
        keep_BHQK=keep_BHQK,
        block=block,
        dropout=dropout,
        seed=seed or 0,
    )


def flash_attention(
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
    schedule: Schedule = VERSION_1,
    return_lse: bool = False,
) -> Any:
    """Softmax attention in the order of FlashAttention; the output is shaped and typed like ``q``.

    q: [B, H, T, D]; k, v: [B, G, S, D], H a multiple of G; or packed [R, H, D], [R', G, D] with the prefix sums
    ``cu_q``, ``cu_k`` [B + 1] of the sequences' tokens. All float32 or all bfloat16 (sums are float32); differentiable.

    causal: a row sees the keys up to its own position; the last row is the last key (bottom right). window: how many
    tokens it sees, its own included (to both sides unless causal). scale: 1 / sqrt(D) by default. softcap: logits
    become softcap * tanh(logits / softcap). bias_BHTS, alibi_H: see `Masking`. keep_BHQK, block: block-sparse
    attention; only kept blocks are read. dropout: of the weights; ``seed`` decides it and is drawn from torch's
    generator when absent.

    Returns ``out``, or ``(out, lse)``: [B, H, T] or packed [H, R], natural logarithm, no gradient. A row that sees
    nothing gives 0 and -inf. Raises TypeError for a wrong dtype and ValueError for what does not fit.
    """
    masking = masking_of(
        q.shape[-1],
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
    )
    out, lse = attend(q, k, v, masking, schedule, cu_q, cu_k)
    return (out, lse) if return_lse else out


def butterfly(rows: int, keys: int, *, edge: int = 1) -> Tensor:
    """keep_BHQK [1, 1, rows, keys] of a fixed butterfly pattern (section 3.3): blocks on the diagonal, blocks whose
    indices differ in one bit, and the first ``edge`` rows and columns of blocks.
    """
    differ = torch.arange(rows)[:, None] ^ torch.arange(keys)
    keep = differ & (differ - 1) == 0
    keep[:edge] = True
    keep[:, :edge] = True
    return keep[None, None]


class FlashAttention(Technique):
    """Prompts are read in FlashAttention's order: keys in the outer loop, output rewritten per tile, heads in parallel.

    Source: Dao, Fu, Ermon, Rudra, Re, NeurIPS 2022, arXiv 2205.14135.
    """

    slug = "flash_attention"
    slots = ("attention_kernel",)
    lossless = True

    lanes: int = Field(VERSION_1.lanes, ge=1, le=4096, description="query vectors per block of rows (Br)")
    tile: int = Field(VERSION_1.tile, ge=1, le=256, description="keys per tile (Bc)")
    min_rows: int = Field(
        64,
        ge=1,
        description="fewest rows of a sequence in a step that are tiled; fewer are read as in decoding",
    )

    def schedule(self) -> Schedule:
        """Version 1 with this technique's tiles."""
        return Schedule(
            rows_outer=False, deferred=False, sequence_parallel=False, lanes=self.lanes, tile=self.tile
        )

    def provide(self, slot: str, context: BuildContext) -> AttentionKernel:
        return FlashKernel(self.schedule(), self.min_rows)


class FlashKernel(DenseKernel):
    """Sequences that bring many rows are read by the flash kernel; other rows, and selections, by the default one."""

    reads_int8 = False

    def __init__(self, schedule: Schedule, min_rows: int) -> None:
        self.schedule, self.min_rows = schedule, min_rows
        self._tiled: tuple[DensePlan, PagesWork, npt.NDArray[np.int64]] | None = None

    def tiled(self, plan: DensePlan) -> tuple[PagesWork, npt.NDArray[np.int64]]:
        """The sequences with many rows, and these rows. Found once per plan."""
        if self._tiled is None or self._tiled[0] is not plan:
            rows = plan.rows
            count = np.diff(rows.start_S1)
            many = count >= self.min_rows
            table = torch.from_numpy(np.ascontiguousarray(rows.table_SM[many]))
            work = PagesWork(table, rows.start_S1[:-1][many], count[many], rows.length_S[many])
            self._tiled = (plan, work, np.flatnonzero(np.repeat(many, count)))
        return self._tiled[1:]

    def reading(self, plan: DensePlan, spec: AttentionSpec) -> PiecePlan | None:
        # A step of decoding rows alone is read as the default kernel reads it.
        return None if len(self.tiled(plan)[1]) else plan.part(spec)

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
        work, row = self.tiled(plan)
        if not isinstance(selection, Dense) or not len(row):
            return super().run(plan, layer, q_THD, pages, layout, spec, selection, observe)
        q_THD = q_THD.contiguous()
        if len(row) == plan.count:
            out = torch.empty_like(q_THD)
        else:
            part = plan.part(spec, row.tobytes())
            out, _ = part.attend(q_THD, pages.k_NGPD, pages.v_NGPD, spec.scale, spec.softcap)
        left = None if spec.window is None else spec.window - 1
        masking = Masking(spec.scale, left, 0, spec.softcap)
        flash_pages(q_THD, pages.k_NGPD, pages.v_NGPD, work, masking, out, self.schedule)
        return out
