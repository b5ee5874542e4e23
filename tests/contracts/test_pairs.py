"""Every pair of techniques that the slots allow runs, or says why it does not (see benchmarks/composition.py)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from benchmarks import composition
from hasten.lm.llm import LLM

from .conftest import technique

GIVEN = composition.prompts((1, 30, 70, 110), 320)


@cache
def allowed() -> list[tuple[str, str]]:
    found = composition.pairs(composition.built())
    return [pair for pair in found if composition.refusal([technique(slug) for slug in pair]) is None]


def test_pairs_of_one_exclusive_slot_are_refused_with_both_names() -> None:
    why = composition.refusal([technique("gptq"), technique("marlin")])
    assert why is not None
    assert "gptq" in why
    assert "marlin" in why
    assert "remove one" in why


@pytest.fixture(scope="module")
def plain(model: Path) -> list[tuple[int, ...]]:
    return composition.answers(LLM(model, dtype="float32", page_size=4), GIVEN)


@pytest.mark.parametrize(("first", "second"), allowed())
def test_a_pair_that_is_allowed_works_or_is_refused(
    first: str, second: str, load: Callable[..., LLM], plain: list[tuple[int, ...]]
) -> None:
    use = [technique(first), technique(second)]
    outcome = composition.check(lambda _: load(first, second), use, GIVEN, plain)
    assert outcome.state != "fails", outcome.why
