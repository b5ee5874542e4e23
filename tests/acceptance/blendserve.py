"""Acceptance of `blendserve`: the checks of its specification that need no quiet machine (`benchmarks/blendserve.py`).

1 outputs are those of first come, first served; 2 sharing is kept, where a random order loses it; 3 steps are more even
than in depth-first order; 6 wrong lengths cost little, and nobody starves. 2, 3 and 6 are simulated: the scheduler, its
pages and prefix store are real, time is that of the resource model, with rates under which reading matters.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from hasten.core.artefact import ArtefactStore
from hasten.core.corpus import Corpus
from hasten.core.plan import Plan
from hasten.core.technique import Technique
from hasten.lm.llm import LLM
from hasten.lm.request import SamplingParams
from hasten.lm.scheduling.blendserve import BlendServe, DualScanner
from hasten.lm.scheduling.offline import FixedOrder, OfflineOrder, Order
from hasten.lm.scheduling.resources import Rates
from hasten.lm.scheduling.simulator import Asked, Simulated, Simulator
from hasten.lm.settings import EngineSettings
from hasten.workloads.mixes import Kind, job, synthetic
from hasten.workloads.offline import OfflineOptions, requests, serve, shapes
from hasten.workloads.text import Text

from ..lm.lm_tiny import write_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

RATES = Rates(token=2e-3, pair=6.5e-7, read=2e-5)
NOWHERE = ArtefactStore(Path("unused"), "simulated")  # nothing is measured, so nothing is kept
PAGES = 500  # of 16 tokens: some thirty requests


# 1 --------------------------------------------------------------------------------------------------------------------


def load(model: Path | str, *techniques: Technique, **engine: Any) -> LLM:
    return LLM(Plan(str(model), techniques, "float32", {"threads": 1, **engine}))


@pytest.mark.parametrize(
    "settings", [{}, {"lengths": "limit"}, {"even": False, "keep_sharing": 0.5}], ids=str
)
def test_outputs_are_those_of_first_come_first_served(
    tmp_path: Path, documentation: Corpus, settings: dict[str, Any]
) -> None:
    """A job of two kinds with few pages: retraction happens, and changes nothing."""
    tiny = write_checkpoint(tmp_path / "tiny")
    engine = {"page_size": 4, "max_batch": 6, "max_step_tokens": 32, "kv_tokens": 480}
    plain = load(tiny, **engine)
    options = OfflineOptions(
        requests=24, group=4, prompt_tokens=140, short_tokens=80, tokens=40, answer_tokens=3, sharing=0.2
    )
    asked = requests(plain.tokenizer, Text(plain.tokenizer), shapes(options))
    blended = load(tiny, BlendServe(**settings), **engine)
    assert serve(blended, asked)[0] == serve(plain, asked)[0]
    cache_ = blended.engine.cache
    blended.forget_prefixes()
    assert cache_.pool.free == cache_.pool.count


def test_outputs_of_the_default_model(default_model_path: Path, documentation: Corpus) -> None:
    """Float32; a token may differ only where the two best logits are closer than sums in another order move them."""
    options = OfflineOptions(
        requests=4, group=2, prompt_tokens=70, short_tokens=32, tokens=4, answer_tokens=2, sharing=0.1
    )
    answers = []
    for techniques in ((), (BlendServe(),)):
        llm = load(default_model_path, *techniques, max_context=512, max_batch=2, max_step_tokens=64)
        asked = requests(llm.tokenizer, Text(llm.tokenizer), shapes(options))
        params = [SamplingParams(g.tokens, temperature=0, ignore_eos=True, logprobs=2) for g in asked]
        answers.append([done.samples[0] for done in llm.generate([g.prompt for g in asked], params)])
    for want, got in zip(*answers, strict=True):
        different = [
            i for i, pair in enumerate(zip(want.token_ids, got.token_ids, strict=True)) if pair[0] != pair[1]
        ]
        if different:
            best, second = sorted(want.logprobs[different[0]].top.values(), reverse=True)[:2]
            assert best - second < 1e-4


# 2, 3 -----------------------------------------------------------------------------------------------------------------

MIXES = ((0.9, 0.35), (1.4, 0.05))  # the others: the benchmark


@cache
def mix(density: float, sharing: float, count: int) -> tuple[Asked, ...]:
    found = job(
        RATES,
        requests=count,
        density=density,
        sharing=sharing,
        classify=Kind(600, 8),
        write=Kind(60, 300),
        group=8,
    )
    return tuple(synthetic(found))


def simulate(scheduler: Any, asked: tuple[Asked, ...]) -> Simulated:
    if isinstance(scheduler, DualScanner):
        scheduler.rates = RATES
    settings = EngineSettings(page_size=16, max_batch=32, max_step_tokens=128)
    simulator = Simulator(scheduler, RATES, settings, PAGES)
    done = simulator.run(asked)
    simulator.cache.store.clear()
    assert simulator.cache.pool.free == PAGES  # pins too
    return done


@cache
def fixed(order: Order, density: float, sharing: float, count: int) -> Simulated:
    return simulate(FixedOrder(OfflineOrder(order=order)), mix(density, sharing, count))


def blended(asked: tuple[Asked, ...], **settings: Any) -> Simulated:
    return simulate(DualScanner(BlendServe(**settings), NOWHERE), asked)


@pytest.mark.parametrize("lengths", ["sampled", "limit"])
def test_sharing_is_kept(lengths: str) -> None:
    """Lengths are learned from 1% of a long job, hence its size."""
    count = 200 if lengths == "limit" else 800
    asked = mix(0.9, 0.35, count)
    best = fixed("dfs", 0.9, 0.35, count).sharing
    ours = blended(asked, lengths=lengths).sharing
    print(f"{lengths}: sharing {ours:.3f}, depth first {best:.3f}")
    assert ours >= 0.97 * best
    if lengths == "limit":
        assert fixed("random", 0.9, 0.35, count).sharing < 0.8 * best


@pytest.mark.parametrize(("density", "sharing"), MIXES)
def test_steps_are_more_even_than_in_depth_first_order(density: float, sharing: float) -> None:
    """Known lengths. Arithmetic per step varies half as much or less; reading does not become more even."""
    asked = mix(density, sharing, 200)
    ours, theirs = blended(asked, lengths="limit"), fixed("dfs", density, sharing, 200)
    print(f"{density}, {sharing}: {ours.variation(16)} against {theirs.variation(16)}")
    assert ours.variation(16)[0] <= theirs.variation(16)[0] / 2
    # Both resources at work at once is what even steps are for.
    assert ours.seconds(0.01, overlap=True) < 0.92 * theirs.seconds(0.01, overlap=True)
    # Without overlap a step costs the sum, whatever its parts: order may not cost anything either.
    assert ours.seconds(0.01) < 1.03 * theirs.seconds(0.01)


# 6 --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_wrong_lengths_cost_little_and_nobody_starves(factor: float) -> None:
    """One request in ten says it will generate ten times as much, or a tenth of it."""
    right = mix(0.9, 0.35, 200)
    rng = random.Random(0)
    wrong = tuple(
        replace(one, limit=max(1, round(one.output * factor))) if rng.random() < 0.1 else one for one in right
    )
    known = blended(right, lengths="limit").seconds(0.01, overlap=True)
    misled = blended(wrong, lengths="limit").seconds(0.01, overlap=True)  # returns: everybody has finished
    print(f"limits times {factor}: {misled / known - 1:+.1%}")
    assert misled < 1.1 * known
