"""What a FlashAttention call computes (`Masking`), in which order (`Schedule`), and what it keeps per row (`Stats`).

Legend: B sequences, H query heads, T query tokens, S key tokens, Q blocks of rows, K blocks of keys, R packed tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LONGEST", "VERSION_1", "VERSION_2", "Masking", "Schedule", "Stats"]

LONGEST = 1 << 24  # tokens of a sequence: positions are exact in float32


@dataclass(frozen=True)
class Schedule:
    """In which order the tiles are computed; the defaults are version 2 (sections 3.1 to 3.3 of its paper).

    rows_outer: blocks of rows in the outer loop, their output in cache until it is done. False: blocks of keys, as in
        version 1, every output rewritten once per block.
    deferred: output unnormalised until the end, powers of two with the scale folded into the queries, one
        log-sum-exp per row. False: normalised at every tile, natural exponentials, maximum and sum both kept.
    sequence_parallel: threads share the rows of a head (backward: its keys). False: batch x heads only.
    skip: leave out tiles that no row sees, mask only tiles that a limit crosses, hand out long tasks first.
    deterministic: the gradient of the queries has the same bits for any number of threads, which then share heads only.
    lanes, tile: query vectors per block of rows, keys per tile (1 to 256). splits: parts of the keys that are
        computed apart and merged, for few rows over many keys (forward only, ``deferred`` only).
    """

    rows_outer: bool = True
    deferred: bool = True
    sequence_parallel: bool = True
    skip: bool = True
    deterministic: bool = False
    lanes: int = 96
    tile: int = 128
    splits: int = 1

    def __post_init__(self) -> None:
        for name, most in (("lanes", 1 << 16), ("tile", 256), ("splits", 1 << 10)):
            value = getattr(self, name)
            if not 1 <= value <= most:
                raise ValueError(f"{name} must be 1 to {most}, not {value}")
        if self.splits > 1 and not self.deferred:
            raise ValueError("splits > 1 needs deferred=True: parts are merged by their log-sum-exp")


VERSION_2 = Schedule()
VERSION_1 = Schedule(rows_outer=False, deferred=False, sequence_parallel=False)


@dataclass(frozen=True)
class Masking:
    """What a row sees and how its logits are made: ``scale * q . k``, soft-capped, biased.

    left, right: row at position p sees the keys [p - left, p + right]; None: no bound. Causal is right = 0.
    softcap: logits become softcap * tanh(logits / softcap).
    bias_BHTS: float32, broadcastable to [B, H, T, S] (packed batches: to [B, H, longest T, longest S], indexed from
        each sequence's start), added; -inf hides. No gradient.
    alibi_H: float32 slopes; -slope * |position - key| is added.
    keep_BHQK: bool, broadcastable over B and H: blocks of ``block`` x ``block`` tokens that are read.
    dropout: probability in [0, 1) that a weight is dropped; ``seed`` (0 to 2^64 - 1) and the element's place decide.
    """

    scale: float
    left: int | None = None
    right: int | None = None
    softcap: float | None = None
    bias_BHTS: Tensor | None = None
    alibi_H: Tensor | None = None
    keep_BHQK: Tensor | None = None
    block: int = 64
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"scale must be finite, not {self.scale}")
        for name in ("left", "right"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1 << 30:
                raise ValueError(f"{name} must be 0 to 2^30, not {value}")
        if self.softcap is not None and not (self.softcap > 0 and math.isfinite(self.softcap)):
            raise ValueError(f"softcap must be positive, not {self.softcap}")
        if self.block < 1:
            raise ValueError(f"block must be at least 1 token, not {self.block}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed must be 0 to 2^64 - 1, not {self.seed}")

    @property
    def threshold(self) -> int:
        """An element stays when its 32 random bits reach this."""
        return min(round(self.dropout * 2**32), 2**32 - 1)


@dataclass(frozen=True)
class Stats:
    """Per row, [B, H, T] or packed [H, R]: its log-sum-exp, or (version 1) the maximum and sum it is made of."""

    lse: Tensor
    sum: Tensor | None = None

    def log_sum_exp(self) -> Tensor:
        """Natural logarithm; -inf for a row that sees nothing."""
        return self.lse if self.sum is None else self.lse + torch.log(self.sum)
