from __future__ import annotations

import pytest

from hasten.lm.decoding.depth import _FRESH, Acceptance, Depth, StepCosts


def costs(depth: Depth, target: dict[int, float], draft: dict[int, float] | None = None) -> Depth:
    for rows, seconds in target.items():
        depth.target.add(rows, seconds)
    for rows, seconds in (draft or {}).items():
        depth.draft.add(rows, seconds)
    return depth


def tiled(rows: int) -> float:
    """Like kernels that read the weights once for every four rows."""
    return 1.0 + 0.1 * rows + -(-rows // 4)


def steps(cost) -> dict[int, float]:
    return {rows: cost(rows) for rows in range(1, 10)}


def test_acceptance_follows_what_happens():
    a = Acceptance()
    assert a.chance == pytest.approx(0.7)
    for _ in range(30):
        a.saw(4, 4)
    assert a.chance > 0.95
    for _ in range(60):
        a.saw(4, 0)
    low = a.chance
    assert low < 0.2
    for _ in range(100):
        a.fade()
    assert low < a.chance < 0.7


def test_guesses_after_the_first_rejection_say_nothing():
    a, b = Acceptance(), Acceptance()
    a.saw(8, 2)
    b.saw(3, 2)
    assert a.chance == b.chance


def test_costs_between_and_beyond_what_was_measured():
    c = StepCosts()
    assert c.at(3) == 0
    c.add(2, 1.0)
    assert (c.at(1), c.at(2), c.at(9)) == (1.0, 1.0, 1.0)
    c.add(4, 2.0)
    assert (c.at(3), c.at(4), c.at(6)) == (1.5, 2.0, 3.0)
    c.add(8, 1.0)  # noise: more rows do not take less
    assert c.at(6) == 2.0
    for _ in range(20):
        c.add(4, 5.0)
    assert c.at(4) == 5.0
    assert c.known(1, 2)
    assert not c.known(9)


def test_what_was_never_timed_is_tried():
    depth = Depth(drafts_cost=True)
    assert depth.choose([0.9], [4]) == [0]
    depth.target.add(1, 1.0)
    assert depth.choose([0.9], [4]) == [4]
    depth.target.add(5, 1.2)
    assert depth.choose([0.9], [4]) == [4]  # the draft's cost is still unknown
    depth.draft.add(1, 0.1)
    for k in (3, 2, 1):
        assert depth.choose([0.9], [4]) == [k]
        depth.target.add(k + 1, 1 + k / 20)
    assert depth.choose([0.9], [4]) == [4]
    assert depth.choose([], []) == []


def test_depth_grows_with_the_chance_and_falls_with_the_cost():
    cheap = costs(Depth(drafts_cost=True), steps(lambda rows: 1 + rows / 80), {1: 0.05})
    dear = costs(Depth(drafts_cost=True), steps(lambda rows: 1 + rows / 3), {1: 0.4})
    by_chance = [cheap.choose([a], [8])[0] for a in (0.1, 0.5, 0.8, 0.95)]
    assert by_chance == sorted(by_chance)
    assert by_chance[-1] == 8
    assert dear.choose([0.8], [8])[0] < cheap.choose([0.8], [8])[0]
    assert dear.choose([0.3], [8]) == [0]
    free = costs(Depth(drafts_cost=False), steps(lambda rows: 1 + rows / 80))
    assert free.choose([1.0], [8]) == [8]


def test_costs_that_were_seen_long_ago_do_not_count():
    c = StepCosts()
    c.add(5, 1.0)
    for _ in range(_FRESH + 1):
        c.add(1, 0.5)
    assert not c.known(5)
    assert c.at(5) == 0.5


@pytest.mark.parametrize("target", [lambda rows: 0.9 + 0.1 * rows, tiled])
@pytest.mark.parametrize("chance", [0.2, 0.6, 0.9])
def test_the_best_depth_of_one_request_is_the_best_of_all(chance, target):
    """Against the definition: expected tokens over seconds, at every depth."""
    draft = 0.2
    depth = costs(Depth(drafts_cost=True), steps(target), {1: draft})

    def rate(k: int) -> float:
        return sum(chance**i for i in range(k + 1)) / (target(k + 1) + k * draft)

    assert depth.choose([chance], [8]) == [max(range(9), key=rate)]


def test_a_request_that_is_rarely_right_drafts_less_than_its_neighbour():
    depth = costs(Depth(drafts_cost=True), {2: 1.0, 18: 2.6}, {1: 0.05, 2: 0.06})
    good, bad = depth.choose([0.95, 0.3], [8, 8])
    assert good > bad
    assert depth.choose([0.95, 0.95], [8, 2])[1] == 2
