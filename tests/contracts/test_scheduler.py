from __future__ import annotations

import random

import pytest
import torch

from hasten.lm.context.transform import Prompt
from hasten.lm.kvcache.cache import KVCache
from hasten.lm.kvcache.format import PlainKV
from hasten.lm.kvcache.prefix import RadixPrefixStore
from hasten.lm.request import SamplingParams
from hasten.lm.scheduling.continuous import ContinuousBatching
from hasten.lm.scheduling.scheduler import Scheduler
from hasten.lm.sequence import Request, Sequence, Status
from hasten.lm.settings import EngineSettings
from hasten.lm.text import TextStream
from hasten.models.config import HeadShape

SLOT = "scheduler"
DEFAULTS = {"continuous": ContinuousBatching}


class Silent:
    def feed(self, token_id):
        return ""

    def finish(self):
        return ""


class World:
    """An engine without a model: work is carried out by moving lengths, tokens are counted off."""

    def __init__(self, scheduler: Scheduler, pages: int, rows: int, budget: int) -> None:
        self.settings = EngineSettings(page_size=4, max_batch=rows, max_step_tokens=budget)
        self.cache = KVCache(
            PlainKV(),
            RadixPrefixStore(),
            layers=1,
            shape=HeadShape(1, 1, 2),
            pages=pages,
            page_size=4,
            rows=rows,
            context=10_000,
        )
        self.scheduler = scheduler
        scheduler.bind(self.cache, self.settings)
        self.live: list[Sequence] = []
        self.finished: list[Sequence] = []
        self.count = 0

    def add(self, tokens: list[int], output: int, priority: int = 0) -> Sequence:
        params = SamplingParams(max_tokens=output)
        request = Request(self.count, Prompt(token_ids=tuple(tokens)), params, priority)
        sequence = Sequence(
            self.count,
            0,
            request,
            list(tokens),
            len(tokens),
            torch.Generator(),
            TextStream(Silent()),
            (-priority, self.count, 0),
        )
        request.sequences.append(sequence)
        self.count += 1
        self.live.append(sequence)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> int:
        """Schedule, check every promise, carry out. Returns the rows run."""
        work = self.scheduler.schedule()
        assert sum(w.count for w in work) <= self.settings.max_step_tokens
        assert len({w.sequence for w in work}) == len(work)
        written: set[int] = set()
        for w in work:
            kv = w.sequence.kv
            assert w.count >= 1
            assert w.sequence in self.live
            assert w.sequence.status is Status.RUNNING
            assert w.start <= w.sequence.computed
            assert w.stop <= len(w.sequence.token_ids)
            assert kv.row >= 0
            assert len(kv.pages) * 4 >= w.stop
            own = set(kv.pages[w.start // 4 : -(-w.stop // 4)])
            assert all(self.cache.pool.refs[page] == 1 for page in own)
            assert not own & written
            written |= own
        for w in work:
            w.sequence.kv.length = max(w.sequence.kv.length, w.stop)
            if w.start < w.sequence.prompt_length:
                self.cache.offer_prefix(w.sequence.kv, w.sequence.token_ids)
            if w.stop == len(w.sequence.token_ids):
                w.sequence.token_ids.append(1000 + len(w.sequence.token_ids))
                if w.sequence.output_length == w.sequence.params.max_tokens:
                    self.end(w.sequence)
        return sum(w.count for w in work)

    def end(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        if sequence.kv is not None:
            self.cache.close(sequence.kv)
            sequence.kv = None
        sequence.status = Status.FINISHED
        self.live.remove(sequence)
        self.finished.append(sequence)

    def empty(self) -> bool:
        self.cache.store.clear()
        return (
            not self.scheduler.waiting
            and not self.scheduler.running
            and self.cache.pool.free == self.cache.pool.count
            and self.cache.free_rows == self.settings.max_batch
        )


@pytest.mark.parametrize("seed", range(12))
def test_everybody_finishes_and_nothing_leaks(provider, seed):
    rng = random.Random(seed)
    world = World(
        provider(), pages=rng.choice([16, 24, 60]), rows=rng.choice([1, 3, 8]), budget=rng.choice([1, 5, 40])
    )
    shared = [rng.randrange(50) for _ in range(30)]
    for _ in range(400):
        if world.count < 40 and rng.random() < 0.4:
            prompt = (shared[: rng.randrange(31)] if rng.random() < 0.5 else []) + [rng.randrange(50)]
            world.add(prompt, rng.randrange(1, 20), rng.choice([0, 0, 1]))
        world.step()
        if world.live and rng.random() < 0.05:
            world.end(rng.choice(world.live))
    for _ in range(40 * 60 * 20):
        if not world.live:
            break
        assert world.step() > 0, "nothing runs although somebody waits"
    assert not world.live
    assert world.empty()


def test_nothing_to_do_is_no_work(provider):
    world = World(provider(), pages=8, rows=2, budget=8)
    assert world.scheduler.schedule() == []
    assert world.empty()


def test_decoding_goes_on_while_long_prompts_are_read(provider):
    scheduler = provider()
    if scheduler.stalls:
        pytest.skip("lets decoding wait for prompts, and says so")
    world = World(scheduler, pages=200, rows=4, budget=8)
    talking = world.add([1, 2, 3], 50)
    world.step()
    world.add(list(range(300)), 5)
    for _ in range(20):
        before = talking.output_length
        world.step()
        assert talking.output_length == before + 1


def test_one_huge_request_does_not_starve_the_rest(provider):
    world = World(provider(), pages=40, rows=4, budget=64)
    world.add(list(range(150)), 5)
    small = [world.add([n], 3) for n in range(5)]
    for _ in range(200):
        if not world.live:
            break
        world.step()
    assert set(small) <= set(world.finished)


def test_removing_a_waiting_sequence(provider):
    world = World(provider(), pages=40, rows=1, budget=8)
    first, second = world.add([1, 2], 3), world.add([3, 4], 3)
    world.step()
    world.end(second)
    while world.live:
        world.step()
    assert world.finished == [second, first]
    assert world.empty()


def test_a_fork_can_join(provider):
    world = World(provider(), pages=40, rows=3, budget=8)
    parent = world.add([1, 2, 3, 4, 5], 9)
    while parent.output_length == 0:
        world.step()
    child = world.add([7], 4)
    world.scheduler.remove(child)
    child.token_ids = list(parent.token_ids)
    child.prompt_length = len(parent.token_ids)
    child.kv = world.cache.fork(parent.kv, child.id)
    assert world.scheduler.adopt(child)
    world.step()
    assert child.output_length == 1
    while world.live:
        world.step()
    assert world.empty()
