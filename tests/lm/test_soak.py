"""A short run of the random requests of `lm_soak`; ``make soak-engine`` runs ten thousand."""

from __future__ import annotations

from pathlib import Path

from lm_soak import Found, soak


def test_random_requests_leak_nothing_and_say_what_they_say_alone(tiny_path: Path) -> None:
    found = Found()
    for seed in (2, 3, 4, 14):
        soak(tiny_path, 30, seed, found)
    assert not found.problems
    counts = (found.finished, found.stopped, found.cancelled, found.forked, found.preempted, found.cached)
    assert min(counts) > 5, found
    assert found.accepted > 0
