"""Slot ``attention_policy``: which cached tokens a query reads.

A policy sees keys as they are appended (and may keep a per-page *sidecar* for them: codes, min/max,
latents, which the KV cache allocates, frees, copies on write and shares with the page), keeps state
across the layers of a step, and answers per layer with a `Selection`. Policies that need the scores of
a dense pass ask for them with `DenseScores` and receive them in `observe`.

Legend: T rows, S sequences, H query heads, G kv heads, D head size, K selected tokens, N pages, P page size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.attention.layout import AttentionSpec, KVPages, StepLayout
from hasten.kernels.block_list import Codes, Visits
from hasten.kernels.decode import Selector


@dataclass(frozen=True)
class SidecarSpec:
    """Extra storage per cached token (``per="token"``), per page, or per so many tokens; lives and dies with the page.

    The cache allocates one tensor per layer: [N, kv_heads, P, *shape] (token), [N, kv_heads, *shape] (page) or, for a
    number that has to divide the page size, [N, kv_heads, P / per, *shape].
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    per: str | int = "token"
    layers: tuple[int, ...] | None = None  # None: every layer


@dataclass(frozen=True)
class Dense:
    """Read every visible token."""


@dataclass(frozen=True)
class DenseScores:
    """Read every visible token and hand the policy each row's attention mass per cached token.

    The kernel calls ``observe(layer, probs_THL, layout)``; used by policies that reuse a dense layer's choice.
    """


@dataclass(frozen=True)
class TokenSelection:
    """Chosen rows read only chosen tokens; all other rows stay dense.

    row_R: int64 [R], rows of the step that are sparse.
    index_RXK: int32 [R, X, K], token indices (0..kv_len-1) in ascending order; X is G (one choice per kv
        head, shared by its query heads) or H (per query head).
    count_RX: int32 [R, X], how many of the K entries are valid.
    """

    row_R: Tensor
    index_RXK: Tensor
    count_RX: Tensor


@dataclass(frozen=True)
class BlockSelection:
    """Block-sparse attention of the rows of one sequence: query blocks read the key blocks that are kept.

    keep_XQB: bool [X, query blocks, key blocks]; X is 1, G or H. Key block ``b`` holds ``block`` tokens from
    ``b * block`` on. Query blocks are cut at multiples of ``query_block`` (default: ``block``) positions of the
    sequence; block 0 is the one that the first row lies in.
    Rows stay causal whatever is kept; each must be left something to read.
    order_XL (optional, int32): places the cached tokens in another order before they are cut into blocks; they rise
    within a block.
    floor_H, codes, visits: see `hasten.kernels.block_list.attend_blocks`.
    """

    sequence: int
    block: int
    keep_XQB: Tensor
    order_XL: Tensor | None = None
    query_block: int | None = None
    floor_H: Tensor | None = None
    codes: Codes | None = None
    visits: Visits | None = None


@dataclass(frozen=True)
class Repair:
    """What a policy asks of the scheduler: what decode rows have cached is computed again, densely and in place.

    every: after so many tokens of a sequence. dense: contexts of up to so many tokens are read densely in any case.
    """

    every: int
    dense: int = 0


@dataclass(frozen=True)
class CopySelection:
    """Rows read, causally, all of a copy that the policy made of the tokens it chose.

    q_THD: float32, the step's queries as the copy's keys want them (rotated to other positions, say). pages:
    the copy, of the
    pool's dtype. layout: which rows read which of its pages; the rows in the same order, cut as the policy
    likes. Layers
    with the same choice of lengths share one layout, so that it is planned once.
    """

    q_THD: Tensor
    pages: KVPages
    layout: StepLayout


Selection = Dense | DenseScores | TokenSelection | CopySelection | tuple[BlockSelection, ...]


class AttentionPolicy(ABC):
    """Decides per step and layer which cached tokens the rows read. One instance per loaded model.

    unrotated_keys: keys are cached before RoPE, and the policy is given queries and keys unrotated; it answers with a
        `CopySelection`. Only for pages that store plain float32 or bfloat16 numbers.
    grid: prompts are computed in chunks that end at multiples of it, wherever steps have the room, and share no less
        through the prefix store: for policies whose choice depends on which rows are computed together.
    """

    unrotated_keys: bool = False
    grid: int = 1

    @property
    def repair(self) -> Repair | None:
        """Whether, and how often, the scheduler has cached tokens computed again; those rows are
        `StepLayout.recomputed` and read densely. None: never."""
        return None

    def sidecars(self) -> tuple[SidecarSpec, ...]:
        """Storage the policy wants beside the pages. Asked once, before the cache is allocated."""
        return ()

    def bind(self, sidecars: Mapping[str, Mapping[int, Tensor]]) -> None:
        """Receive the sidecar tensors: name -> layer -> tensor (see `SidecarSpec`). Called once."""

    def begin_step(self, layout: StepLayout) -> None:
        """Called once per step before the first layer."""

    def on_append(self, layer: int, k_TGD: Tensor, layout: StepLayout) -> None:
        """The step's keys (as cached) were written at ``layout.slot_T``; update the sidecar."""

    @abstractmethod
    def select(
        self, layer: int, q_THD: Tensor, pages: KVPages, layout: StepLayout, spec: AttentionSpec
    ) -> Selection:
        """What the rows of this step read in ``layer``."""

    def selectors(self) -> Sequence[Selector | None]:
        """The policy in native form: per layer what chooses there (see native/src/kernels/select.h), None where the
        layer reads densely. Empty: the policy has none and is asked layer by layer.

        Then steps in which every sequence brings one row may run natively without calling the other methods: a
        policy with selectors keeps nothing but its sidecars from step to step. The same object as long as nothing
        that they choose by has changed.
        """
        return ()

    def observe(self, layer: int, probs_THL: Tensor, layout: StepLayout) -> None:
        """Attention mass of a `DenseScores` layer, [T, H, max kv_len], zero where not visible."""

    def end_step(self, layout: StepLayout) -> None:
        """Called once per step after the last layer."""

    def forget(self, sequence_id: int) -> None:
        """The sequence has ended; drop what was kept for it."""

    def figures(self) -> dict[str, float]:
        """What the policy counted since it was made, by name; part of `LLM.facts`."""
        return {}


class DensePolicy(AttentionPolicy):
    """The default: every row reads every visible token."""

    def select(
        self, layer: int, q_THD: Tensor, pages: KVPages, layout: StepLayout, spec: AttentionSpec
    ) -> Selection:
        return Dense()
