"""What a step holds: under Dynamic SplitFuse, and under the schedulers it is compared with."""

from __future__ import annotations

import pytest

from hasten.core.errors import ArtefactError, SettingError
from hasten.lm.request import SamplingParams
from hasten.lm.scheduling import latency
from hasten.lm.scheduling.fastgen import FastGen
from hasten.lm.scheduling.latency import LatencyCurve, measure_curve, sizes
from hasten.lm.scheduling.rivals import Orca, PrefillFirst, StaticBatch


def ask(llm, length, tokens, start=3):
    ids = [3 + (start * 31 + 7 * i) % 300 for i in range(length)]
    return llm.engine.submit(ids, SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True))


def steps(llm):
    """Run to the end; per step, (number of request, start, count, whether it decodes) of each piece of work."""
    found = []
    number = {request: i for i, request in enumerate(llm.engine.requests)}
    schedule = llm.engine.scheduler.schedule

    def watch():
        work = schedule()
        found.append(
            [
                (number[w.sequence.request], w.start, w.count, w.start >= w.sequence.prompt_length)
                for w in work
            ]
        )
        return work

    llm.engine.scheduler.schedule = watch
    llm.engine.run()
    return found


# -- fastgen ---------------------------------------------------------------------------------------------------------


def test_a_step_is_decode_rows_then_prompts_in_order_cut_to_the_budget(make_llm):
    llm = make_llm(FastGen(budget=10), prefix_cache=False)
    for length in (4, 25, 3):
        ask(llm, length, 4, length)
    assert steps(llm)[:5] == [
        [(0, 0, 4, False), (1, 0, 6, False)],
        [(0, 4, 1, True), (1, 6, 9, False)],
        [(0, 5, 1, True), (1, 15, 9, False)],
        [
            (0, 6, 1, True),
            (1, 24, 1, False),
            (2, 0, 3, False),
        ],  # the cut prompt ends before a newer one starts
        [(1, 25, 1, True), (2, 3, 1, True)],
    ]


def test_a_prompt_starts_only_where_all_of_it_fits(make_llm):
    llm = make_llm(FastGen(budget=8), prefix_cache=False, kv_tokens=40)
    for length, tokens in ((16, 9), (20, 3), (2, 2)):
        ask(llm, length, tokens, length)
    seen = steps(llm)
    first, second, third = (step_of(seen, request, 0) for request in range(3))
    ends = max(i for i, step in enumerate(seen) if 0 in [w[0] for w in step])
    assert first == 0
    assert second == ends + 1  # 20 and a page do not fit beside 24
    assert third >= second  # and nobody overtakes


def step_of(seen, request, start, after=-1):
    """The first step after ``after`` in which ``request`` computes its token ``start``."""
    return next(
        i for i, step in enumerate(seen) if i > after and (request, start) in [work[:2] for work in step]
    )


def test_the_last_holder_gives_up_its_pages_and_waits_behind_the_others(make_llm, greedy):
    llm = make_llm(FastGen(budget=16), prefix_cache=False, kv_tokens=48)
    requests = [ask(llm, 16, 20, 1), ask(llm, 16, 20, 2), ask(llm, 30, 3, 3)]
    seen = steps(llm)
    assert [request.ledger.preemptions for request in requests] == [0, 1, 0]
    assert step_of(seen, 1, 0, after=step_of(seen, 1, 0)) > step_of(seen, 2, 0)
    for request in requests:
        (sequence,) = request.sequences
        prompt = sequence.token_ids[: sequence.prompt_length]
        assert sequence.output_ids == greedy(llm, prompt, sequence.output_length)


def test_more_decode_rows_than_the_budget(make_llm):
    llm = make_llm(FastGen(budget=2), prefix_cache=False)
    for start in range(5):
        ask(llm, 2, 3, start)
    seen = steps(llm)
    assert all(sum(w[2] for w in step) <= 2 for step in seen)
    assert sum(w[2] for step in seen for w in step) == 5 * (2 + 2)


def test_budget_above_what_the_engine_allows_is_refused(make_llm):
    with pytest.raises(SettingError, match=r"fastgen.budget = 33.*max_step_tokens = 32"):
        make_llm(FastGen(budget=33))
    for bad in (0, -1, "many"):
        with pytest.raises(SettingError, match=r"fastgen.budget = "):
            FastGen(budget=bad)
    with pytest.raises(SettingError, match=r"fastgen.efficiency = "):
        FastGen(efficiency=1.5)


# -- the latency curve -----------------------------------------------------------------------------------------------


def test_the_knee_of_a_known_curve():
    """10 ms to read the weights, 1 ms per token: half the best rate at 10 tokens, 0.9 of it at 90."""
    curve = LatencyCurve.of(
        (1, 10, 30, 90, 100_000), tuple(0.01 + 0.001 * t for t in (1, 10, 30, 90, 100_000))
    )
    assert [curve.budget(e) for e in (0.5, 0.75, 0.9, 1.0)] == [10, 30, 90, 100_000]
    assert curve.line() == pytest.approx((0.01, 0.001), rel=1e-6)


def test_noise_cannot_make_more_tokens_cheaper():
    assert LatencyCurve.of((1, 2, 3), (5.0, 3.0, 4.0)).seconds == (3.0, 3.0, 4.0)


def test_sizes_end_at_the_limit():
    assert sizes(1) == (1,)
    assert sizes(12) == (1, 2, 3, 4, 6, 8, 12)
    assert sizes(200) == (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 200)


@pytest.mark.parametrize("sequences", [1, 4])
def test_measuring_leaves_the_cache_as_it_was(make_llm, sequences):
    llm = make_llm(kv_tokens=40)
    curve = measure_curve(llm.engine.runner, 32, sequences=sequences, rounds=1)
    assert curve.tokens == sizes(32)
    assert all(a <= b for a, b in zip(curve.seconds, curve.seconds[1:], strict=False))
    cache = llm.engine.cache
    assert cache.pool.free == cache.pool.count
    assert cache.free_rows == 8


def test_the_budget_is_measured_once_and_kept(make_llm, hasten_home, monkeypatch):
    llm = make_llm(FastGen())
    facts = llm.facts()
    assert facts["step_budget"] in facts["step_latency"]["tokens"]
    assert max(facts["step_latency"]["tokens"]) == 32
    monkeypatch.setattr(latency, "measure_curve", None)  # a second measurement would fail
    assert make_llm(FastGen()).facts()["step_latency"] == facts["step_latency"]
    (kept,) = (hasten_home / "artefacts").glob("fastgen-latency-*/latency.json")
    kept.write_text("{}")
    with pytest.raises(ArtefactError, match="damaged"):
        make_llm(FastGen())


# -- rivals ----------------------------------------------------------------------------------------------------------


def test_prefill_first_lets_decoding_wait(make_llm):
    llm = make_llm(PrefillFirst(), prefix_cache=False)
    for length in (4, 40, 30, 3):
        ask(llm, length, 3, length)
    assert steps(llm)[:6] == [
        [(0, 0, 4, False)],  # the next prompt does not fit as a whole
        [(1, 0, 32, False)],
        [(1, 32, 8, False)],
        [(2, 0, 30, False)],
        [(3, 0, 3, False)],
        [(0, 4, 1, True), (1, 40, 1, True), (2, 30, 1, True), (3, 3, 1, True)],
    ]


def test_orca_joins_whole_prompts_to_the_decode_rows(make_llm):
    llm = make_llm(Orca(), prefix_cache=False)
    for length in (4, 20, 40, 3):
        ask(llm, length, 5, length)
    assert steps(llm)[:4] == [
        [(0, 0, 4, False), (1, 0, 20, False)],
        [(2, 0, 30, False)],  # longer than a step: nobody decodes until it is read
        [(0, 4, 1, True), (1, 20, 1, True), (2, 30, 10, False), (3, 0, 3, False)],
        [(0, 5, 1, True), (1, 21, 1, True), (2, 40, 1, True), (3, 3, 1, True)],
    ]


def test_a_static_batch_runs_to_its_end(make_llm):
    llm = make_llm(StaticBatch(), prefix_cache=False, max_batch=2)
    for length, tokens in ((20, 2), (30, 4), (5, 2)):
        ask(llm, length, tokens, length)
    assert steps(llm) == [
        [(0, 0, 20, False), (1, 0, 12, False)],
        [(1, 12, 18, False)],
        [(0, 20, 1, True), (1, 30, 1, True)],
        [(1, 31, 1, True)],
        [(1, 32, 1, True)],
        [(2, 0, 5, False)],
        [(2, 5, 1, True)],
    ]
