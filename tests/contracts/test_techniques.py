"""What holds for every technique of the language-model engine, whatever it does."""

from __future__ import annotations

import math

import pytest
import torch

from hasten.catalog import loader
from hasten.core.errors import UnknownNameError
from hasten.core.plan import Plan
from hasten.core.slots import SLOTS
from hasten.lm.request import FinishReason, SamplingParams

from .conftest import built, technique

LENGTHS = (1, 3, 30, 70, 110)


def ids_of(count: int, seed: int) -> list[int]:
    return torch.randint(3, 320, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def prompts() -> list[list[int]]:
    """Mixed lengths, below and above a page, a chunk and the usual budgets; two share a long prefix."""
    alone = [ids_of(n, n) for n in LENGTHS]
    return [*alone, alone[-1][:80] + ids_of(7, 99)]


def greedy(count: int = 12, **more) -> SamplingParams:
    return SamplingParams(
        **{"max_tokens": count, "temperature": 0, "ignore_eos": True, "logprobs": 0, **more}
    )


def all_free(llm) -> bool:
    engine = llm.engine
    engine.cache.store.clear()
    return (
        engine.cache.pool.free == engine.cache.pool.count
        and engine.cache.free_rows == engine.settings.max_batch
    )


def test_there_is_something_to_test():
    assert built()


def test_record_and_class_agree(slug):
    record, kind = loader.record(slug), loader.technique(slug)
    assert kind.slug == slug
    assert set(kind.slots) == set(record.slots)
    assert kind.lossless == record.lossless
    assert kind.__doc__
    assert all(field.description for field in kind.model_fields.values())
    assert all(SLOTS[name].interface for name in kind.slots)


def test_settings_survive_a_plan_file(slug):
    plan = Plan(techniques=(technique(slug),)).check()
    assert Plan.from_toml(plan.to_toml(), loader.technique).techniques == plan.techniques
    with pytest.raises(UnknownNameError, match="no_such_setting"):
        loader.technique(slug)(no_such_setting=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_are_finite_complete_and_repeatable(slug, dtype, load):
    def run():
        llm = load(slug, dtype=dtype)
        return [llm.generate([p], greedy())[0].samples[0] for p in prompts()]

    first, second = run(), run()
    assert [s.token_ids for s in first] == [s.token_ids for s in second]
    for sample in first:
        assert len(sample.token_ids) == 12
        assert sample.finish is FinishReason.LENGTH
        assert all(math.isfinite(entry.logprob) and entry.logprob <= 0 for entry in sample.logprobs)
        assert all(0 <= token < 320 for token in sample.token_ids)


def test_pages_come_back_after_finish_cancel_and_preemption(slug, load):
    llm = load(slug, kv_tokens=240)
    requests = [llm.engine.submit(p, greedy(40)) for p in prompts()]
    requests.append(llm.engine.submit(ids_of(20, 7), greedy(20, n=3, temperature=1.0, seed=0)))
    for _ in range(8):
        llm.engine.step()
    llm.engine.cancel(requests[3])
    llm.engine.run()
    assert requests[3].sequences[0].finish is FinishReason.CANCELLED
    ended = [s.finish for r in requests if r is not requests[3] for s in r.sequences]
    assert ended == [FinishReason.LENGTH] * len(ended), [r.failure for r in requests]
    # A scheduler that makes decoding wait may start so few at a time that nobody ever runs short.
    assert sum(r.ledger.preemptions for r in requests) > 0 or llm.engine.scheduler.stalls
    assert all_free(llm)


def test_scores_are_finite_in_both_modes(slug, load):
    llm = load(slug)
    ids = [ids_of(60, 1), ids_of(35, 2)]
    for mode in ("prefill", "decode"):
        for score in llm.score(ids, context=20, mode=mode):
            assert all(math.isfinite(value) and value <= 0 for value in score.logprobs)
    assert all_free(llm)


def test_works_with_a_mixed_batch_as_it_does_alone(slug, load):
    """In float32 the company of other requests changes nothing: not even for lossy techniques."""
    llm = load(slug)
    together = [c.token_ids for c in llm.generate(prompts(), greedy())]
    fresh = load(slug, prefix_cache=False)
    assert together == [fresh.generate([p], greedy())[0].token_ids for p in prompts()]


def test_lossless_means_the_same_greedy_tokens(slug, load):
    if not loader.technique(slug).lossless:
        pytest.skip("lossy, and says so")
    want = [c.token_ids for c in load(None).generate(prompts(), greedy(24))]
    assert [c.token_ids for c in load(slug).generate(prompts(), greedy(24))] == want
    small = load(slug, kv_tokens=240, max_step_tokens=20)
    assert [c.token_ids for c in small.generate(prompts(), greedy(24))] == want
    samples = load(slug).generate([ids_of(30, 30)], greedy(24, n=3))[0].samples
    assert [s.token_ids for s in samples] == [want[2]] * 3


def test_memory_budget_includes_the_sidecars(slug, load):
    llm = load(slug, kv_memory_mb=1.5)
    cache, drafter = llm.engine.cache, llm.engine.parts.drafter
    beside = 0 if drafter is None else drafter.page_bytes(cache.page_size) * cache.pool.count
    assert 0.95 * 1.5e6 <= cache.bytes() + beside <= 1.5e6
    sidecars = sum(t.nbytes for layers in cache.sidecars.by_name.values() for t in layers.values())
    plain = cache.format.page_bytes(cache.layers, cache.page_size, cache.shape) * cache.pool.count
    assert cache.bytes() == plain + sidecars
