from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.core.errors import SettingError
from hasten.lm.decoding.prompt_lookup import _MANY, LookupDrafter, NgramIndex, PromptLookup, _hash
from hasten.lm.decoding.speculate import Ask
from hasten.lm.request import SamplingParams

from .test_speculation import REPEATING, idle, params


def scan(ids: list[int], count: int, low: int, high: int) -> tuple[list[int], int]:
    """The definition: look at every place for the longest suffix, latest place first; cycles go on."""
    for n in range(min(high, len(ids) - 1), low - 1, -1):
        for end in range(len(ids) - 1, n - 1, -1):
            if ids[end - n : end] == ids[len(ids) - n :]:
                whole = list(ids)
                for i in range(count):
                    whole.append(whole[end + i])
                return whole[len(ids) :], n
    return [], 0


@settings(max_examples=150, deadline=None)
@given(
    parts=st.lists(st.lists(st.integers(0, 3), max_size=2 * _MANY), max_size=6),
    low=st.integers(1, 3),
    more=st.integers(0, 3),
    count=st.integers(1, 9),
)
def test_the_index_finds_what_a_scan_finds(parts, low, more, count):
    """However the text arrives: token by token, in long parts, or empty ones."""
    index, ids = NgramIndex(low, low + more), []
    for part in parts:
        index.extend(part)
        ids += part
        assert index.find(count) == scan(ids, count, low, low + more)


def test_a_hash_collision_finds_nothing():
    index = NgramIndex(1, 1)
    index.extend([7, 8, 9])
    index._after[1][_hash([9])] = 1  # as if 7 had the hash of 9
    assert index.find(4) == ([], 0)


def test_big_ids_and_both_ways_of_hashing_agree():
    ids = [2**31 - 1, 0, 5, 2**31 - 1, 0] * _MANY
    one, many = NgramIndex(2, 4), NgramIndex(2, 4)
    for token in ids:
        one.extend([token])
    many.extend(ids)
    assert one._after == many._after


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("budget", [64, 6])
def test_lossless_under_greedy(make_llm, greedy, budget, adaptive):
    llm = make_llm(PromptLookup(min_ngram=1, adaptive=adaptive), max_step_tokens=budget)
    found = llm.generate(REPEATING, params())
    assert [list(c.token_ids) for c in found] == [greedy(llm, p, 24) for p in REPEATING]
    done = llm.engine.speculation
    assert done.drafted >= done.accepted
    assert done.rounds > 0
    assert sum(c.speculation.drafted for c in found) == done.drafted
    assert llm.facts()["speculation"] == done.to_dict()
    assert not llm.engine.parts.drafter._states
    idle(llm)


def test_what_was_rejected_is_guessed_less(make_llm):
    """Wrong guesses lower the estimate of their suffix length only; guesses stop when rows are costly."""
    drafter = LookupDrafter(PromptLookup(draft_tokens=6, max_ngram=2, min_ngram=1))
    ids = [1, 2, 3, 4, 5, 6, 7, 8, 1, 2]
    assert drafter.propose(0, ids, 6) is None  # how long a plain step takes is not known yet
    drafter.timed(1, 1.0)
    for _ in range(40):
        proposal = drafter.propose(0, ids, 6)
        if proposal is None:
            break
        assert proposal.token_ids == tuple((3, 4, 5, 6, 7, 8, 1, 2)[: len(proposal.token_ids)])
        drafter.timed(1 + len(proposal.token_ids), 1.0 + 0.5 * len(proposal.token_ids))
        drafter.commit(0, [*ids, 99])
    assert proposal is None
    state = drafter._states[0]
    assert state.chance(2).chance < 0.5 < state.chance(1).chance


def test_cost_per_step_does_not_grow_with_the_text(monkeypatch):
    """After the prompt, a step enters its new n-grams only."""
    drafter, calls = LookupDrafter(PromptLookup(adaptive=False)), []
    ids = list(range(5000))
    drafter.propose(0, ids, 4)
    import hasten.lm.decoding.prompt_lookup as module

    monkeypatch.setattr(module, "_hash", lambda x: calls.append(1) or _hash(x))
    ids.append(17)
    drafter.propose_all([Ask(0, ids, 4)])
    assert len(calls) <= 2 * (4 - 2 + 1)


def test_settings_are_checked(make_llm):
    with pytest.raises(SettingError, match="min_ngram = 5 is above max_ngram = 3"):
        PromptLookup(min_ngram=5, max_ngram=3)
    with pytest.raises(SettingError, match="draft_tokens"):
        PromptLookup(draft_tokens=0)
    with pytest.raises(SettingError, match="draft_tokens = 9 is above the engine's draft_tokens = 8"):
        make_llm(PromptLookup(draft_tokens=9))


def test_samples_of_one_request_have_their_own_index(make_llm):
    llm = make_llm(PromptLookup(min_ngram=1, adaptive=False))
    (found,) = llm.generate(
        [[5, 6, 7, 8] * 4], SamplingParams(max_tokens=20, temperature=0.8, n=3, seed=1, ignore_eos=True)
    )
    assert len({s.token_ids for s in found.samples}) == 3
    assert found.speculation.drafted > 0
    idle(llm)
