"""`RetrievalPipeline` where searches or prompts go wrong, or are given up (its answers: `acceptance/ragcache.py`)."""

from __future__ import annotations

import pytest
from ragcache_world import prompt

from hasten.core.errors import RequestError
from hasten.lm.context.retrieval import Candidates, Clock, RetrievalPipeline, StagedSearch
from hasten.lm.kvcache.ragcache import RagCache
from hasten.lm.request import SamplingParams

GREEDY = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)


class Now(StagedSearch):
    """Says something provisional, then (unless ``broken`` or ``stuck``) the same for good."""

    def __init__(self, broken: bool = False, stuck: bool = False) -> None:
        self.broken, self.stuck, self.polls = broken, stuck, 0

    def poll(self) -> Candidates | None:
        self.polls += 1
        if self.polls == 1:
            return Candidates((1,), False)
        if self.broken:
            raise ConnectionError("the index is gone")
        return None if self.stuck else Candidates((1,), True)


def compose(found):
    return prompt([5, 6, 7, 8, 9], question=[10, 11])


@pytest.fixture
def pipeline(make_llm):
    return RetrievalPipeline(make_llm(RagCache(host_mb=1)).engine)


def free(pipeline):
    cache = pipeline.engine.cache
    return cache.pool.used == len(cache.store) and not pipeline.engine.requests and not pipeline.busy


def test_what_fails_fails_alone(pipeline):
    def bad(found):
        return prompt([5] * 3000, question=[1])

    broken, good, long = (
        pipeline.submit(make, search, GREEDY)
        for make, search in ((compose, Now(broken=True)), (compose, Now()), (bad, Now()))
    )
    pipeline.run()
    assert isinstance(broken.failure, ConnectionError)
    assert isinstance(long.failure, RequestError)
    assert good.failure is None
    assert len(good.request.completion().token_ids) == 4
    assert good.asked_at <= good.retrieved_at <= good.first_token_at <= good.finished_at
    assert all(one.done for one in (broken, good, long))
    assert free(pipeline)


def test_retrievals_can_be_given_up_at_any_time(pipeline):
    searching, answering, finished = (
        pipeline.submit(compose, Now(stuck=stuck), GREEDY) for stuck in (True, False, False)
    )
    pipeline.cancel(searching)  # before its first poll
    while not finished.done:
        pipeline.step()
        if answering.request is not None:
            pipeline.cancel(answering)
    pipeline.cancel(finished)
    assert not finished.cancelled
    late = pipeline.submit(compose, Now(stuck=True), GREEDY)
    pipeline.step()
    assert late.guesses == 1
    pipeline.cancel(late)
    assert all(one.done and one.cancelled for one in (searching, answering, late))
    assert free(pipeline)


def test_the_clock_moves_forward_only():
    clock = Clock()
    clock.skip(50)
    assert 50 <= clock.now() < 60
    clock.skip(10)
    assert clock.now() >= 50
