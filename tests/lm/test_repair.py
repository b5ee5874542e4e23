"""Which cached tokens are due to be computed again, and how the cache keeps track."""

from __future__ import annotations

import pytest
import torch

from hasten.attention.policy import Repair, SidecarSpec
from hasten.core.errors import UnsupportedError
from hasten.lm.kvcache.cache import KVCache, SequenceKV
from hasten.lm.kvcache.format import PlainKV
from hasten.lm.kvcache.prefix import RadixPrefixStore
from hasten.lm.kvcache.repair import note_exact, repair_from
from hasten.lm.kvcache.sidecar import page_bytes
from hasten.models.config import HeadShape


def sequence(length: int, exact: int | None = None) -> SequenceKV:
    return SequenceKV(0, length, [], exact=exact)


@pytest.mark.parametrize("every", [1, 5, 32])
@pytest.mark.parametrize("phase", [0, 3, 7_000_001])
def test_every_token_is_repaired_once_and_no_window_is_longer_than_every(every, phase):
    kv, repair = sequence(100, 100), Repair(every)
    done: list[int] = []
    for _ in range(200):
        start = repair_from(kv, repair, phase)
        if start is not None:
            assert (kv.length - phase) % every == 0
            assert kv.length - start <= every
            done += range(start, kv.length)
            note_exact(kv, repair, start, kv.length - start)
            assert kv.exact == kv.length
            assert repair_from(kv, repair, phase) is None
        note_exact(kv, repair, kv.length, 1)
        kv.length += 1
    assert done == list(range(100, done[-1] + 1))
    assert kv.length - kv.exact <= every


def test_several_rows_at_once_are_exact_only_after_exact_ones():
    kv, repair = sequence(0), Repair(8)
    for count, exact in ((40, 40), (1, 40), (3, 40)):  # prompt, decode row, verified draft
        note_exact(kv, repair, kv.length, count)
        kv.length += count
        assert kv.exact == exact
    note_exact(kv, repair, 40, 2)  # a repair in two pieces
    assert kv.exact == 42
    assert repair_from(kv, repair, 4) == 42
    note_exact(kv, repair, 42, 2)
    assert kv.exact == 44
    assert repair_from(kv, repair, 4) is None


def test_a_draft_that_skips_the_length_of_a_repair_is_repaired_after_it():
    kv, repair = sequence(30, 24), Repair(8)
    assert repair_from(kv, repair) is None
    kv.length = 34
    assert repair_from(kv, repair) == 24


def test_contexts_that_are_read_whole_are_exact():
    kv, repair = sequence(20, 10), Repair(8, dense=48)
    for length in range(20, 49):
        kv.length = length
        assert repair_from(kv, repair) is None
    kv.length = 56
    assert repair_from(kv, repair) == 48
    note_exact(kv, repair, 48, 8)
    assert kv.exact == 56


def test_nobody_keeps_track_without_a_policy_that_repairs():
    assert repair_from(sequence(100), Repair(8)) is None


def test_forks_snapshots_and_cuts_keep_track():
    cache = KVCache(
        PlainKV(),
        RadixPrefixStore(),
        layers=1,
        shape=HeadShape(1, 1, 2),
        pages=32,
        page_size=4,
        rows=2,
        context=64,
    )
    kv = cache.open(1)
    assert cache.reserve(kv, 0, 20)
    kv.length, kv.exact = 20, 13
    other, seen = cache.fork(kv, 2), cache.snapshot(kv)
    assert other.exact == 13
    cache.truncate(kv, 10)
    assert kv.exact == 10
    cache.rollback(kv, seen)
    assert (kv.length, kv.exact) == (20, 13)
    cache.offer_prefix(kv, list(range(20)))
    assert cache.open(3, list(range(20))).length == 12  # whole pages that are exact
    cache.release(seen)


def test_a_sidecar_of_blocks_divides_the_page():
    shape = HeadShape(4, 2, 8)
    spec = SidecarSpec("boxes", (2, 8), torch.float32, per=16)
    assert page_bytes([spec], 3, 32, shape) == 3 * 2 * 2 * 16 * 4
    with pytest.raises(UnsupportedError, match="multiple of 16"):
        page_bytes([spec], 3, 24, shape)
    with pytest.raises(UnsupportedError, match="must be"):
        page_bytes([SidecarSpec("boxes", (2,), torch.float32, per=0)], 3, 32, shape)
