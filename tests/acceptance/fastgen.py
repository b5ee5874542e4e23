"""Acceptance of `fastgen`: the checks of its specification that are not about speed (that is `benchmarks/fastgen.py`).

1 tokens are those of the engine that reads prompts in one piece; 2 steps hold exactly the budget, and no decode row is
left out for a prompt; 5 few pages, many clients: everybody finishes and no page leaks; 6 curve and budget are stored.
Of check 6, the server that survives a client's disconnect is not built yet; a request that is cancelled mid-stream is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.core.corpus import Corpus
from hasten.core.plan import Plan
from hasten.core.technique import Technique
from hasten.lm.engine import Engine
from hasten.lm.llm import LLM
from hasten.lm.request import SamplingParams
from hasten.lm.scheduling.fastgen import FastGen
from hasten.lm.scheduling.scheduler import Work
from hasten.lm.sequence import Request
from hasten.workloads.language import greedy
from hasten.workloads.text import Text
from hasten.workloads.traffic import TrafficOptions, traffic

from ..lm.lm_tiny import write_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


def load(model: Path, *techniques: Technique, **engine: Any) -> LLM:
    engine = {"prefix_cache": False, "threads": 1, **engine}
    return LLM(Plan(str(model), techniques, "float32", engine))


# 1 --------------------------------------------------------------------------------------------------------------------

LENGTHS, TOKENS = (20, 90, 270), 6
TIE = 1e-4  # logits closer than this may change places when float32 sums run in another order


def test_tokens_are_those_of_the_unchunked_engine(default_model_path: Path, documentation: Corpus) -> None:
    whole = load(default_model_path, max_step_tokens=512, max_context=512, max_batch=4)
    prompts = Text(whole.tokenizer, "test").cuts(LENGTHS)
    params = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True, logprobs=2)
    wanted = [whole.generate([prompt], params)[0].samples[0] for prompt in prompts]
    for budget in (16, 64, 256):
        llm = load(default_model_path, FastGen(budget=budget), max_context=512, max_batch=4)
        for number, done in enumerate(llm.generate(prompts, params)):
            want, got = wanted[number], done.samples[0]
            different = [i for i in range(TOKENS) if want.token_ids[i] != got.token_ids[i]]
            if different:
                best, second = sorted(want.logprobs[different[0]].top.values(), reverse=True)[:2]
                print(
                    f"budget {budget}, prompt {number}: token {different[0]} differs, gap {best - second:.1e}"
                )
                assert best - second < TIE


# 2 --------------------------------------------------------------------------------------------------------------------


class Watched:
    """The steps of an engine, each with what could have run in it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.schedule = engine.scheduler.schedule
        self.steps: list[list[Work]] = []
        self.pending: list[int] = []
        self.cut: list[list[int]] = []  # places, in the step's work, of prompts that go on in the next one
        self.skipped = 0
        engine.scheduler.schedule = self  # type: ignore[method-assign, assignment]

    def __call__(self) -> list[Work]:
        scheduler = self.engine.scheduler
        ready = [s for s in scheduler.running if s.computed == len(s.token_ids) - 1]
        pending = sum(s.remaining for s in (*scheduler.running, *scheduler.waiting))
        work = self.schedule()
        ran = {item.sequence for item in work}
        if any(item.sequence not in ready for item in work):
            self.skipped += sum(sequence not in ran for sequence in ready)
        self.steps.append(work)
        self.pending.append(pending)
        self.cut.append([i for i, item in enumerate(work) if item.stop < len(item.sequence.token_ids)])
        return work


@pytest.mark.parametrize("budget", [16, 64])
def test_every_step_holds_exactly_the_budget(tiny: Path, documentation: Corpus, budget: int) -> None:
    """A trace of prompts of 5 to 240 tokens, all pages there are: whatever is pending fits."""
    llm = load(tiny, FastGen(budget=budget), max_batch=12, kv_tokens=12 * 512)
    items = traffic(
        Text(llm.tokenizer), TrafficOptions(requests=12, prompt_tokens=120, tokens=12, spread=0.6)
    )
    for item in items:
        llm.engine.submit(item.prompt, greedy(item.tokens))
    watched = Watched(llm.engine)
    llm.engine.run()
    full = 0
    for work, pending, cut in zip(watched.steps, watched.pending, watched.cut, strict=True):
        assert sum(item.count for item in work) == min(budget, pending)
        full += pending >= budget
        assert cut in ([], [len(work) - 1])  # at most one, the last
    assert full > 12 * 120 / budget / 2
    assert watched.skipped == 0


def test_only_the_last_token_of_a_prompt_is_sampled(tiny: Path) -> None:
    llm = load(tiny, FastGen(budget=16))
    request = llm.engine.submit(list(range(3, 60)), greedy(2))
    rows: list[int] = []
    run = llm.engine.runner.run
    llm.engine.runner.run = lambda chunks: rows.append(sum(c.logits for c in chunks)) or run(chunks)  # type: ignore
    llm.engine.run()
    assert rows == [0, 0, 0, 1, 1]
    assert request.ledger.computed == 57 + 1


# 5 --------------------------------------------------------------------------------------------------------------------


def test_room_for_two_prompts_and_sixteen_clients(tiny: Path) -> None:
    whole = load(tiny, max_batch=16, max_step_tokens=128)
    generator = torch.Generator().manual_seed(4)
    prompts = torch.randint(3, 320, (16, 60), generator=generator).tolist()
    wanted = [whole.generate([prompt], greedy(30))[0].token_ids for prompt in prompts]
    llm = load(tiny, FastGen(budget=32), max_batch=16, page_size=4, kv_tokens=2 * 72)
    requests = [llm.engine.submit(prompt, greedy(30)) for prompt in prompts]
    llm.engine.run()
    assert [r.completion().token_ids for r in requests] == wanted
    assert sum(r.ledger.preemptions for r in requests) > 0
    assert sum(r.ledger.computed for r in requests) > 16 * (60 + 29)  # preempted ones were computed again
    assert_nothing_left(llm.engine)


def assert_nothing_left(engine: Engine) -> None:
    assert engine.cache.pool.free == engine.cache.pool.count
    assert engine.cache.free_rows == engine.settings.max_batch
    assert not engine.scheduler.running
    assert not engine.scheduler.waiting


# 6 --------------------------------------------------------------------------------------------------------------------


def test_curve_and_budget_are_stored(tiny: Path, hasten_home: Path) -> None:
    llm = load(tiny, FastGen(), max_batch=4, max_step_tokens=64, kv_tokens=512)
    facts = llm.facts()
    curve = facts["step_latency"]
    assert curve["tokens"] == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    rates = [t / s for t, s in zip(curve["tokens"], curve["seconds"], strict=True)]
    good = [t for t, rate in zip(curve["tokens"], rates, strict=True) if rate >= 0.95 * max(rates)]
    assert facts["step_budget"] == min(good)
    (kept,) = (hasten_home / "artefacts").glob("fastgen-latency-*/latency.json")
    assert json.loads(kept.read_text()) == curve


@pytest.mark.parametrize("after", [1, 3, 7])
def test_a_client_that_leaves_mid_stream_disturbs_nobody(tiny: Path, after: int) -> None:
    llm = load(tiny, FastGen(budget=16), kv_tokens=512)
    prompts = [list(range(3 + i, 60 + i)) for i in range(3)]
    wanted = [c.token_ids for c in llm.generate(prompts, greedy(12))]
    requests: list[Request] = [llm.engine.submit(prompt, greedy(12)) for prompt in prompts]
    for _ in range(after):
        llm.engine.step()
    llm.engine.cancel(requests[0])
    llm.engine.run()
    assert [r.completion().token_ids for r in requests[1:]] == wanted[1:]
    assert_nothing_left(llm.engine)
