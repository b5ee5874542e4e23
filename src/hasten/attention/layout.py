"""What one engine step looks like to attention: which query rows read which cached tokens.

Legend: T tokens (query rows) of the step, S sequences, M pages per sequence (padded), N pages of the pool,
H query heads, G key/value heads, P page size (tokens), D head size.

A step is ragged: the tokens of all sequences (prefill chunks and single decode tokens alike) lie in one
flat axis T; ``query_start_S1`` cuts it. Everything is planned once per step and shared by all layers
unless a technique gives a layer its own view (`StepLayout.layer`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hasten.models.config import AttentionSpec, HeadShape

__all__ = ["AttentionSpec", "Extent", "HeadShape", "KVPages", "StepLayout"]


@dataclass(frozen=True)
class Extent:
    """Slots ``[start, start + length)`` of a sequence that hold tokens computed apart from it, from a page's start on.

    context: they belong to one of several texts that a prompt reads side by side, not to what all of them follow.
    """

    start: int
    length: int
    context: bool


@dataclass(frozen=True)
class KVPages:
    """Keys (rotated, unless the format says otherwise) and values of one layer's page pool.

    ``k_NGPD``, ``v_NGPD``: [pages, kv heads, page size, head size], float32 or bfloat16, contiguous;
    or int8 as `hasten.kernels.pages` describes it.
    """

    k_NGPD: Tensor
    v_NGPD: Tensor


@dataclass(frozen=True)
class StepLayout:
    """The ragged batch of one step. Index tensors live on the CPU.

    query_start_S1: int32 [S+1], prefix sums of query rows per sequence; last = T.
    kv_len_S: int32 [S], cached tokens per sequence *including* this step's (the rows are the last ones).
    page_table_SM: int32 [S, M], page ids in token order; entries past the length are -1.
    position_T: int64 [T], rotary position of each row.
    slot_T: int64 [T], where each row's key and value are written: page * P + offset.
    sequence_ids: stable ids, so that kernels and policies can keep state across steps.
    layers: per-layer layouts for techniques that keep different tokens in different layers.
    trees: by sequence (0..S-1), the parent of each of its last rows that are nodes of a tree: an earlier node, or -1
        for the row before the nodes. A node sees what the row before the nodes sees, its ancestors and itself.
    extents: by sequence (0..S-1), where its first pages hold tokens (`KVCache.open` with states). The slots between
        extents hold nothing and are never read; the sequence's own tokens begin at the page after the last extent.
    recomputed: sequences (0..S-1) whose rows are cached tokens computed again in place; they read densely.
    reading: sequences (0..S-1) that bring tokens of a prompt: no decode rows, be it a single one.
    """

    query_start_S1: Tensor
    kv_len_S: Tensor
    page_table_SM: Tensor
    position_T: Tensor
    slot_T: Tensor
    page_size: int
    sequence_ids: tuple[int, ...]
    layers: Mapping[int, StepLayout] = field(default_factory=dict)
    trees: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    extents: Mapping[int, tuple[Extent, ...]] = field(default_factory=dict)
    recomputed: frozenset[int] = frozenset()
    reading: frozenset[int] = frozenset()

    def layer(self, index: int) -> StepLayout:
        """The layout that layer ``index`` sees."""
        return self.layers.get(index, self)

    @property
    def rows(self) -> int:
        return int(self.position_T.numel())

    @property
    def sequences(self) -> int:
        return len(self.sequence_ids)

    def decode_rows(self) -> Tensor:
        """bool [S]: sequences that bring exactly one row, a new one (decode), not a prefill chunk."""
        one_S = (self.query_start_S1[1:] - self.query_start_S1[:-1]) == 1
        if self.recomputed or self.reading:
            one_S[list(self.recomputed | self.reading)] = False
        return one_S

    def row_sequence_T(self) -> Tensor:
        """int64 [T]: the sequence (0..S-1) of each row."""
        counts = (self.query_start_S1[1:] - self.query_start_S1[:-1]).long()
        return torch.repeat_interleave(torch.arange(self.sequences), counts)
