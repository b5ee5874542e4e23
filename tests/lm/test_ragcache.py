"""The parts of `ragcache` by themselves: tier, cost, ends of documents, bad input."""

from __future__ import annotations

import errno

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragcache_world import SIZE, check, context, documents, prompt, store

from hasten.core.errors import ArtefactError, RequestError, SettingError, UnsupportedError
from hasten.lm.context.transform import Prompt
from hasten.lm.kvcache import host_tier
from hasten.lm.kvcache.format import PlainKV
from hasten.lm.kvcache.host_tier import HostTier
from hasten.lm.kvcache.prefill_cost import PrefillCost
from hasten.lm.kvcache.ragcache import DocumentEnds, RagCache

LIKE = [torch.randn(2, 3), torch.arange(7, dtype=torch.int8), torch.randn(5).bfloat16()]


# -- the host tier ----------


@pytest.mark.parametrize("mapped", [False, True])
def test_pages_come_back_from_the_tier(tmp_path, mapped):
    tier = HostTier(LIKE, 10 * 192 / 1e6, tmp_path if mapped else None)
    assert (tier.capacity, tier.page_bytes, tier.free) == (10, 192, 10)
    other = [x * 0 for x in LIKE]
    slots = [tier.put(LIKE if i % 2 else other) for i in range(10)]
    assert tier.free == 0
    for i, slot in enumerate(slots):
        assert all(torch.equal(a, b) for a, b in zip(tier.get(slot), LIKE if i % 2 else other, strict=True))
    tier.drop(slots[3])
    assert tier.put(LIKE) == slots[3]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="the tier holds"):
        tier.drop(slots[3]) or tier.put([LIKE[0].T, *LIKE[1:]])


def test_a_tier_that_cannot_be_had_is_refused(tmp_path, monkeypatch):
    with pytest.raises(SettingError, match=r"host_folder.*No such file"):
        HostTier(LIKE, 1, tmp_path / "näht")
    with pytest.raises(SettingError, match="host_mb"):
        HostTier(LIKE, 1e9)
    assert HostTier(LIKE, 1e-5).capacity == 0

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(host_tier.os, "posix_fallocate", full)
    with pytest.raises(SettingError, match=r"no room.*lower host_mb"):
        HostTier(LIKE, 1, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_settings_and_formats_that_cannot_work_are_refused(tiny_path, tmp_path):
    for bad in ({"policy": "fifo"}, {"host_mb": -1}, {"reorder_window": 0}, {"frequency_window": 0}):
        with pytest.raises(SettingError, match=next(iter(bad))):
            RagCache(**bad)

    class Odd(PlainKV):
        def read_page(self, page: int) -> list[torch.Tensor]:
            raise UnsupportedError("Odd pages cannot be moved out of the cache")

    with pytest.raises(UnsupportedError, match=r"Odd pages.*ragcache:host_mb=0"):
        store(context(tiny_path, tmp_path), 10, Odd())
    store(context(tiny_path, tmp_path), 10, Odd(), host_mb=0)


# -- the tree ----------


def test_order_counts_and_a_part_must_be_whole(tiny_path, tmp_path):
    made, pool = store(context(tiny_path, tmp_path), 80)
    a, b, c = documents(3, 20, 30)
    asked = prompt(a, b, question=[1, 2, 3, 4, 5, 6, 7, 8])
    pages = [pool.allocate() for _ in range(len(asked.token_ids) // SIZE)]
    made.insert(asked.token_ids[: len(a) + 4], pages, asked.segments)  # in the middle of b
    assert len(made) == len(a) // SIZE
    made.insert(asked.token_ids, pages, asked.segments)
    assert len(made) == (len(a) + len(b)) // SIZE  # never the question
    check(made, pool)

    def found(*parts: list[int]) -> int:
        other = prompt(*parts, question=[9])
        return made.cached(other.token_ids, other.segments)

    assert found(a, b, c) == (len(a) + len(b)) // SIZE * SIZE
    assert found(a, c) == len(a) // SIZE * SIZE
    assert found(b, a) == 0
    assert found(a[:-5], b) == 0


def test_the_clock_moves_on_eviction_only(tiny_path, tmp_path):
    made, pool = store(context(tiny_path, tmp_path), 30, host_pages=6)
    for number, part in enumerate(documents(6, 16, 17)):
        asked = prompt(part, question=[1])
        made.accessed(asked.token_ids, asked.segments, 0)
        pages = [pool.allocate() for _ in range(4)]
        made.insert(asked.token_ids, pages, asked.segments)
        pool.release(pages)
        assert made.tree.clocks == [0, 0]
        assert number < 5 or len(made) == 24
    made.evict(4)
    first, host = made.tree.clocks
    assert first > 0
    assert host == 0  # it had room
    made.evict(4)  # the second copy drives out the first
    assert made.tree.clocks[1] > 0
    check(made, pool)


# -- the cost of prefill ----------


@given(st.floats(0, 5000), st.floats(1, 5000))
def test_bilinear_functions_are_met_exactly_and_cost_is_positive(alpha, beta):
    def work(a: float, b: float) -> float:
        return 2 * b + a * b / 100 + 3

    axes = ((0, 10, 700), (1, 50, 900))
    cost = PrefillCost(*axes, tuple(tuple(work(a, b) for b in axes[1]) for a in axes[0]))
    assert cost(alpha, beta) == pytest.approx(work(alpha, beta))
    noisy = PrefillCost((0, 100), (1, 100), ((1.0, 9.0), (50.0, 2.0)))
    assert noisy(alpha, beta) > 0


def test_bad_profiles_are_refused(tmp_path):
    good = ((0, 10), (1, 5), ((1.0, 2.0), (2.0, 3.0)))
    for i, bad in ((0, (10, 0)), (1, ()), (2, ((1.0, 2.0),)), (2, ((1.0, float("nan")), (1.0, 1.0)))):
        with pytest.raises(ValueError):
            PrefillCost(*(bad if j == i else part for j, part in enumerate(good)))
    PrefillCost(*good).save(tmp_path)
    assert PrefillCost.load(tmp_path) == PrefillCost(*good)
    for text in ("", "{}", '{"cached": [0], "new": [1], "seconds": [[-1]]}', "[1"):
        (tmp_path / "prefill.json").write_text(text)
        with pytest.raises(ArtefactError, match="not a prefill profile"):
            PrefillCost.load(tmp_path)


# -- where documents end ----------


def test_documents_are_found_in_the_text(make_llm):
    llm = make_llm()
    parts = ("Über allen Gipfeln ist Ruh.", "The quick brown fox \N{SNOWMAN}", "The quick")
    text = f"Read this:\n{parts[0]}\n\n{parts[1]}{parts[2]} Question?"
    ids = tuple(llm.tokenizer.encode(text))
    ends = DocumentEnds(llm.tokenizer)
    found = ends.on_tokens(Prompt(text=text, token_ids=ids, contexts=parts)).segments
    assert len(found) == 5  # instructions, three documents, what lies between the first two
    for place, end in zip((11, 11 + len(parts[0])), found, strict=False):
        spare = len(llm.tokenizer.decode(ids[:end])) - place
        assert 0 <= spare < 12  # a token may reach over the end
    assert ends.on_tokens(Prompt(text=text, token_ids=ids)).segments == ()
    moved = Prompt(text=text, token_ids=ids, contexts=("rewritten",))
    assert ends.on_tokens(moved).segments == ()
    given = Prompt(text=text, token_ids=ids, contexts=parts, segments=(3,))
    assert ends.on_tokens(given) is given


def test_segments_that_make_no_sense_are_refused(make_llm):
    llm = make_llm()
    for bad in ((0,), (3, 2), (2, 2), (9,)):
        with pytest.raises(RequestError, match="segments"):
            llm.engine.submit(Prompt(token_ids=(5, 6, 7), segments=bad))
    llm.engine.submit(Prompt(token_ids=(5, 6, 7), segments=(1, 3)))
