"""Random engine requests, and what has to hold of them.

An engine with few pages serves requests of mixed lengths, samples, seeds, stop strings, penalties, priorities and
shared prefixes; some are cancelled, from outside or by their own listener, some are forked as they run. After every
step each page has exactly as many references as owners. In the end no page and no row is left, and every request says
what it says when it runs alone, without prefix cache, with room for everything (what was cancelled: a beginning of it).

`test_soak.py` runs a few hundred; the long form is ``make soak-engine``, or

    python tests/lm/lm_soak.py --requests 10000 --seed 0
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from hasten.core.errors import RequestError
from hasten.core.plan import Plan
from hasten.core.technique import Technique
from hasten.lm.decoding.speculate import Drafter, Proposal
from hasten.lm.engine import Engine
from hasten.lm.llm import LLM
from hasten.lm.request import Delta, FinishReason, Sample, SamplingParams
from hasten.lm.sequence import Request
from hasten.models.tokenizer import Tokenizer

CONTEXT = 96
VOCABULARY = 320
ROUND = 500  # requests per engine


class LastBigram(Drafter):
    """Proposes what followed the last token the time before."""

    def propose(self, sequence_id: int, token_ids: Any, limit: int) -> Proposal | None:
        ids = list(token_ids)
        for at in range(len(ids) - 2, -1, -1):
            if ids[at] == ids[-1]:
                guess = ids[at + 1 : at + 1 + limit]
                return Proposal(tuple(guess), tuple(range(-1, len(guess) - 1)))
        return None


class Drafting(Technique):
    slug = "drafting"
    slots = ("drafter",)
    lossless = True

    def provide(self, slot: str, context: Any) -> LastBigram:
        return LastBigram()


@dataclass
class Found:
    """Counts over all requests."""

    requests: int = 0
    finished: int = 0  # samples
    stopped: int = 0
    cancelled: int = 0
    forked: int = 0
    preempted: int = 0
    cached: int = 0
    accepted: int = 0
    steps: int = 0
    problems: list[str] = field(default_factory=list)


def load(path: Path, *techniques: Technique, **engine: Any) -> LLM:
    return LLM(Plan(str(path), techniques, "float32", {"max_context": CONTEXT, **engine}))


def soak(path: Path, count: int, seed: int, found: Found | None = None) -> Found:
    """Run ``count`` random requests on one engine whose limits ``seed`` chooses; add to ``found``."""
    found = Found() if found is None else found
    rng = random.Random(seed)
    size = rng.choice([1, 4, 4, 7, 16])
    drafting = rng.random() < 0.25
    llm = load(
        path,
        *([Drafting()] if drafting else []),
        page_size=size,
        kv_tokens=CONTEXT + rng.choice([1, 1, 16, 40]),  # the longest request fits, a few of them do not
        max_batch=rng.choice([2, 6, 12]),
        max_step_tokens=rng.choice([3, 16, 50]),
        prefix_cache=rng.random() < 0.8,
        draft_tokens=3,
    )
    alone = load(path, page_size=32, kv_tokens=8 * CONTEXT, max_batch=8, prefix_cache=False)
    everything = _serve(llm.engine, count, rng, greedy=drafting, found=found)
    _idle(llm.engine)
    for request in everything:
        found.requests += 1
        found.preempted += request.ledger.preemptions
        found.cached += request.ledger.cached > 0
        found.accepted += request.ledger.accepted
        want = alone.generate([list(request.prompt.token_ids)], request.params)[0]
        for index, (got, expected) in enumerate(zip(request.completion().samples, want.samples, strict=True)):
            problem = _differ(request, index, got, expected, llm.tokenizer, found)
            if problem:
                found.problems.append(f"seed {seed}, request {request.id}, sample {index}: {problem}")
    return found


def _serve(engine: Engine, count: int, rng: random.Random, *, greedy: bool, found: Found) -> list[Request]:
    shared = [_ids(rng, 40) for _ in range(4)]
    said: list[Request] = []  # what a later request may repeat, with a stop string that it then must meet
    live: list[Request] = []
    everything: list[Request] = []
    while len(everything) < count or engine.busy:
        while len(everything) < count and rng.random() < 0.6:
            live.append(_submit(engine, rng, shared, said, greedy))
            everything.append(live[-1])
        if live and len(everything) < count and rng.random() < 0.05:
            live.append(_fork(engine, rng, rng.choice(everything[-30:])))
            everything.append(live[-1])
            found.forked += 1
        engine.step()
        found.steps += 1
        _owned(engine)
        if live and rng.random() < 0.04:
            engine.cancel(rng.choice(live))
        said += [r for r in live if r.done and r.completion().text]
        del said[:-50]
        live = [r for r in live if not r.done]
    return everything


def _ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(3, VOCABULARY) for _ in range(count)]


def _submit(
    engine: Engine, rng: random.Random, shared: list[list[int]], said: list[Request], greedy: bool
) -> Request:
    if said and rng.random() < 0.2:
        source = rng.choice(said)
        text = rng.choice(source.completion().samples).text or "a"
        at = rng.randrange(len(text))
        stop = (text[at : at + rng.randrange(1, 6)],)
        prompt, params = list(source.prompt.token_ids), replace(source.params, stop=stop)
    else:
        prompt = rng.choice(shared)[: rng.randrange(41)] if rng.random() < 0.6 else []
        prompt, params = prompt + _ids(rng, rng.choice([1, 1, 5, 12, 30])), _params(rng, greedy)
    after = rng.randrange(1, 8) if rng.random() < 0.05 else None
    request: Request | None = None

    def listen(delta: Delta) -> None:
        if after is not None and request is not None and request.ledger.generated >= after:
            engine.cancel(request)

    priority = rng.choice([0, 0, 0, 1])
    try:
        request = engine.submit(prompt, params, priority=priority, on_delta=listen)
    except RequestError:  # more samples than there are pages
        request = engine.submit(prompt, replace(params, n=1), priority=priority, on_delta=listen)
    return request


def _params(rng: random.Random, greedy: bool) -> SamplingParams:
    return SamplingParams(
        max_tokens=rng.choice([1, 12, 25, 10**6]) if rng.random() < 0.2 else rng.randrange(1, 12),
        temperature=0 if greedy else rng.choice([0, 0, 0.8, 1.2]),
        top_k=rng.choice([0, 0, 20, 3]),
        top_p=rng.choice([1.0, 1.0, 0.9]),
        min_p=rng.choice([0.0, 0.0, 0.05]),
        presence_penalty=rng.choice([0.0, 0.0, 0.5]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
        seed=rng.randrange(1000),
        n=rng.choice([1, 1, 1, 2, 4]),
        stop=rng.choice([(), (), ("e",), ("th", "\n")]),
        stop_token_ids=(rng.randrange(VOCABULARY),) if rng.random() < 0.2 else (),
        ignore_eos=rng.random() < 0.8,
        logprobs=rng.choice([None, None, None, 2]),
    )


def _fork(engine: Engine, rng: random.Random, source: Request) -> Request:
    sample = rng.randrange(len(source.sequences))
    room = CONTEXT - 1 - len(source.sequences[sample].token_ids)
    if room < 0:  # the source has filled its context
        return _submit(engine, rng, [[]], [], source.params.temperature == 0)
    append = _ids(rng, min(room, rng.choice([0, 1, 5])))
    try:
        return engine.fork(source, sample=sample, append=append)
    except RequestError:
        return engine.fork(source, replace(source.params, n=1), sample=sample, append=append)


def _owned(engine: Engine) -> None:
    """Every page has as many references as sequences and store hold of it; the page table says what sequences hold."""
    cache = engine.cache
    held: Counter[int] = Counter()
    rows = 0
    for request in engine.requests:
        for sequence in request.sequences:
            if sequence.kv is None:
                continue
            held.update(sequence.kv.pages)
            if sequence.kv.row >= 0:
                rows += 1
                table = cache.table_RM[sequence.kv.row]
                assert table[: len(sequence.kv.pages)].tolist() == sequence.kv.pages
                assert (table[len(sequence.kv.pages) :] == -1).all()
    held.update(node.page for node in getattr(cache.store, "_order", ()))
    assert {page: count for page, count in enumerate(cache.pool.refs) if count} == dict(held)
    assert cache.free_rows == engine.settings.max_batch - rows


def _idle(engine: Engine) -> None:
    assert not engine.busy
    assert not engine.scheduler.running
    assert not engine.scheduler.waiting
    engine.cache.store.clear()
    assert engine.cache.pool.free == engine.cache.pool.count
    assert engine.cache.free_rows == engine.settings.max_batch


def _differ(
    request: Request, index: int, got: Sample, want: Sample, tokenizer: Tokenizer, found: Found
) -> str:
    """What is wrong with a sample, or nothing."""
    deltas = [d for d in request.deltas if d.index == index]
    if "".join(d.text for d in deltas) != got.text or [d.finish for d in deltas if d.finish] != [got.finish]:
        return "the streamed text is not the sample's"
    if tuple(t for d in deltas for t in d.token_ids) != got.token_ids:
        return "the streamed tokens are not the sample's"
    if request.params.logprobs is not None and [p.token for p in got.logprobs] != list(got.token_ids):
        return "log-probabilities of other tokens than the sample's"
    if got.finish is FinishReason.CANCELLED:
        found.cancelled += 1
        # An end releases what was held back: half a character, or text that alone turned out to be a stop string's.
        text = tokenizer.decode(want.token_ids, continuing=True)
        same = got.token_ids == want.token_ids[: len(got.token_ids)] and text.startswith(
            got.text.rstrip("\ufffd")
        )
        return "" if same else f"cancelled after {got.token_ids}, alone {want.token_ids}"
    found.finished += 1
    found.stopped += got.finish is FinishReason.STOP
    same = (got.token_ids, got.text, got.finish) == (want.token_ids, want.text, want.finish)
    return "" if same else f"{got} ({request.failure!r}), alone {want}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Random engine requests against one-at-a-time runs.")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first engine; the next ones count on")
    given = parser.parse_args()
    torch.set_num_threads(1)
    from lm_tiny import write_checkpoint

    found, start = Found(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = write_checkpoint(Path(folder) / "tiny")
        seed = given.seed
        while found.requests < given.requests:
            soak(path, min(ROUND, given.requests - found.requests), seed, found)
            seed += 1
            print(
                f"{found.requests} requests, {time.perf_counter() - start:.0f} s, {len(found.problems)} problems"
            )
            sys.stdout.flush()
    print("\n".join(found.problems))
    print({name: value for name, value in vars(found).items() if name != "problems"})
    return 1 if found.problems else 0


if __name__ == "__main__":
    sys.exit(main())
