"""Cached tokens that a policy wants computed again (`AttentionPolicy.repair`): which are due, which are done.

Decode rows may have read a selection; what they cached is a little wrong, and so is what was computed from it. A repair
computes the last tokens again as a chunk that reads densely and overwrites their keys and values in place. Repairs
happen at lengths that are ``phase`` modulo ``every``, so that sequences of different phases take turns.
"""

from __future__ import annotations

from hasten.attention.policy import Repair
from hasten.lm.kvcache.cache import SequenceKV


def repair_from(kv: SequenceKV, repair: Repair, phase: int = 0) -> int | None:
    """The first token to compute again, all cached ones after it included; None if no repair is due."""
    if kv.exact is None:
        return None
    exact = max(kv.exact, min(kv.length, repair.dense))
    due = kv.length - (kv.length - phase) % repair.every
    return exact if exact < due else None


def note_exact(kv: SequenceKV, repair: Repair, start: int, count: int, prompt: bool = False) -> None:
    """``count`` rows from token ``start`` on are being cached; ``kv.length`` does not count them yet."""
    exact = max(start if kv.exact is None else kv.exact, min(kv.length, repair.dense))
    dense = prompt or count > 1 or start < kv.length  # a single new row is a decode row
    kv.exact = max(exact, start + count) if dense and start <= exact else exact
