from __future__ import annotations

import time

import pytest
import torch

from hasten.core.errors import RequestError
from hasten.core.technique import Technique
from hasten.lm.context.transform import Prompt, PromptTransform
from hasten.lm.decoding.stop import StopPolicy
from hasten.lm.layers.hook import LayerHook
from hasten.lm.request import FinishReason, SamplingParams


def params(count: int = 8, **more) -> SamplingParams:
    return SamplingParams(**{"max_tokens": count, "temperature": 0, "ignore_eos": True, **more})


def ids_of(count: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 320, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def idle(llm) -> None:
    """Nothing runs, no row is taken, and every used page is the prefix store's."""
    engine = llm.engine
    assert not engine.busy
    assert not engine.scheduler.running
    assert not engine.scheduler.waiting
    assert engine.cache.free_rows == engine.settings.max_batch
    assert engine.cache.pool.used == len(engine.cache.store)
    engine.cache.store.clear()
    assert engine.cache.pool.free == engine.cache.pool.count


def test_greedy_equals_the_plain_forward(llm, greedy):
    prompts = [ids_of(n, n) for n in (1, 5, 33, 90)]
    found = llm.generate(prompts, params(12))
    assert [list(c.token_ids) for c in found] == [greedy(llm, p, 12) for p in prompts]
    assert all(c.samples[0].finish is FinishReason.LENGTH for c in found)
    idle(llm)


@pytest.mark.parametrize("budget", [1, 3, 7, 64])
def test_chunked_prefill_changes_nothing(make_llm, budget):
    prompts = [ids_of(n, n) for n in (2, 41, 17)]
    want = [c.token_ids for c in make_llm(max_step_tokens=500).generate(prompts, params())]
    assert [c.token_ids for c in make_llm(max_step_tokens=budget).generate(prompts, params())] == want


def test_prefix_pages_are_reused_and_change_nothing(make_llm):
    shared = ids_of(30)
    prompts = [shared + ids_of(n, n) for n in (3, 5, 6, 9)]
    off = make_llm(prefix_cache=False)
    want = [c.token_ids for c in off.generate(prompts, params())]
    assert all(c.cached_tokens == 0 for c in off.generate(prompts, params()))
    idle(off)
    llm = make_llm()
    found = llm.generate(prompts, params())
    assert [c.token_ids for c in found] == want
    # Submitted together: the first computes the shared part, the others wait one step and take its pages.
    assert [c.cached_tokens for c in found] == [0, 28, 28, 28]
    again = llm.generate(prompts, params())
    assert [c.token_ids for c in again] == want
    assert [c.cached_tokens for c in again] == [(len(p) - 1) // 4 * 4 for p in prompts]
    idle(llm)


def test_a_conversation_reuses_its_own_answer(llm):
    first = llm.generate([ids_of(10)], params(10))[0]
    turn = llm.generate([ids_of(10) + list(first.token_ids) + [7, 8]], params(2))[0]
    assert turn.cached_tokens == 16  # whole pages of 4 of the 19 cached tokens


def test_more_requests_than_rows(make_llm, greedy):
    llm = make_llm(max_batch=3)
    prompts = [ids_of(4 + n % 5, n) for n in range(11)]
    found = llm.generate(prompts, params(5))
    assert [list(c.token_ids) for c in found] == [greedy(llm, p, 5) for p in prompts]
    idle(llm)


def test_preemption_when_pages_run_out(make_llm, greedy):
    llm = make_llm(kv_tokens=64)
    prompts = [ids_of(10, n) for n in range(5)]
    requests = [llm.engine.submit(p, params(30)) for p in prompts]
    llm.engine.run()
    assert sum(r.ledger.preemptions for r in requests) > 0
    assert [r.completion().token_ids for r in requests] == [tuple(greedy(llm, p, 30)) for p in prompts]
    idle(llm)


def test_higher_priority_runs_first(make_llm):
    llm = make_llm(max_batch=1)
    order = []
    for name, priority in [("low", 0), ("high", 5), ("middle", 1)]:
        llm.engine.submit(
            ids_of(4), params(2), priority=priority, on_delta=lambda d, n=name: d.finish and order.append(n)
        )
    llm.engine.run()
    assert order == ["high", "middle", "low"]


def test_first_come_first_served(make_llm):
    llm = make_llm(max_batch=2, max_step_tokens=8)
    order = []
    for n in range(6):
        llm.engine.submit(ids_of(6, n), params(4), on_delta=lambda d, n=n: d.finish and order.append(n))
    llm.engine.run()
    assert order == [0, 1, 2, 3, 4, 5]


def test_cancel_takes_effect_within_a_step(llm):
    engine = llm.engine
    requests = [engine.submit(ids_of(40, n), params(50)) for n in range(3)]
    for _ in range(6):
        engine.step()
    used = engine.cache.pool.used
    engine.cancel(requests[1])
    assert requests[1].done
    assert engine.cache.pool.used < used or len(engine.cache.store) > 0
    assert requests[1].deltas[-1].finish is FinishReason.CANCELLED
    produced = len(requests[1].sequences[0].output_ids)
    engine.cancel(requests[1])  # again: nothing
    engine.run()
    assert len(requests[1].sequences[0].output_ids) == produced
    assert all(len(r.completion().token_ids) == 50 for r in (requests[0], requests[2]))
    idle(llm)


def test_cancel_from_a_listener(llm):
    engine = llm.engine
    requests = []

    def stop_the_other(delta):
        if len(requests[0].sequences[0].output_ids) == 3:
            engine.cancel(requests[1])
            engine.cancel(requests[0])

    requests.append(engine.submit(ids_of(5), params(20), on_delta=stop_the_other))
    requests.append(engine.submit(ids_of(5, 1), params(20)))
    engine.run()
    assert [r.sequences[0].finish for r in requests] == [FinishReason.CANCELLED] * 2
    assert len(requests[0].completion().token_ids) == 3
    idle(llm)


def test_a_listener_that_raises_ends_its_own_request_only(llm, greedy):
    def broken(delta):
        raise KeyError("listener")

    bad = llm.engine.submit(ids_of(5), params(6), on_delta=broken)
    good = llm.engine.submit(ids_of(6), params(6))
    llm.engine.run()
    assert isinstance(bad.failure, KeyError)
    assert list(good.completion().token_ids) == greedy(llm, ids_of(6), 6)
    idle(llm)


def test_n_samples_share_the_prompts_pages(make_llm):
    llm = make_llm(prefix_cache=False)
    request = llm.engine.submit(ids_of(22), params(6, n=4, temperature=1.0, seed=3))
    llm.engine.step()
    # 22 tokens are 5 whole pages and a half-full one; the step after, each of four samples copies only that one.
    assert llm.engine.cache.pool.used <= 6 + 4
    llm.engine.step()
    assert llm.engine.cache.pool.used <= 5 + 4 * 2
    llm.engine.run()
    completion = request.completion()
    assert len({s.token_ids for s in completion.samples}) > 1
    assert request.ledger.computed == 22 + 4 * 5
    idle(llm)
    alone = make_llm(max_batch=1, prefix_cache=False)  # no row for the forks: they run one after the other
    again = alone.generate([ids_of(22)], params(6, n=4, temperature=1.0, seed=3))[0]
    assert [s.token_ids for s in again.samples] == [s.token_ids for s in completion.samples]
    idle(alone)


def test_seed_makes_a_request_independent_of_the_batch(make_llm):
    wanted = params(12, temperature=0.9, top_p=0.95, seed=1234)
    alone = make_llm().generate([ids_of(9)], wanted)[0]
    llm = make_llm()
    others = [llm.engine.submit(ids_of(5 + n, n), params(20, temperature=1.0)) for n in range(4)]
    for _ in range(3):
        llm.engine.step()
    request = llm.engine.submit(ids_of(9), wanted)
    llm.engine.run()
    assert request.completion().token_ids == alone.token_ids
    assert len({o.completion().token_ids for o in others}) == 4
    other_seed = make_llm().generate([ids_of(9)], params(12, temperature=0.9, top_p=0.95, seed=1235))[0]
    assert other_seed.token_ids != alone.token_ids


def test_requests_without_seed_differ_and_follow_the_engines(make_llm):
    prompt, wanted = ids_of(6), params(10, temperature=1.0)
    a, b = make_llm(seed=1).generate([prompt, prompt], wanted)
    assert a.token_ids != b.token_ids
    assert make_llm(seed=1).generate([prompt], wanted)[0].token_ids == a.token_ids
    assert make_llm(seed=2).generate([prompt], wanted)[0].token_ids != a.token_ids


def test_logprobs_are_the_models_own(llm):
    prompt = ids_of(7)
    shaped = params(5, temperature=1.5, top_k=5, seed=0, logprobs=3, presence_penalty=0.5)
    sample = llm.generate([prompt], shaped)[0].samples[0]
    with torch.inference_mode():
        logits = llm._loaded.decoder(torch.tensor([[*prompt, *sample.token_ids]]))[0]
    expected = logits[len(prompt) - 1 : -1].log_softmax(-1)
    for i, entry in enumerate(sample.logprobs):
        assert entry.token == sample.token_ids[i]
        assert entry.logprob == pytest.approx(float(expected[i, entry.token]), abs=1e-4)
        assert list(entry.top) == expected[i].topk(3).indices.tolist()
    assert len(sample.logprobs) == 5


def test_fork_goes_on_from_the_same_tokens(llm, greedy):
    engine = llm.engine
    source = engine.submit(ids_of(9), params(12))
    for _ in range(6):
        engine.step()
    so_far = list(source.sequences[0].token_ids)
    child = engine.fork(source, params(5))
    branch = engine.fork(source, params(5), append=[40, 41, 42])
    engine.run()
    assert list(source.completion().token_ids) == greedy(llm, ids_of(9), 12)
    assert list(child.completion().token_ids) == greedy(llm, so_far, 5)
    assert list(branch.completion().token_ids) == greedy(llm, [*so_far, 40, 41, 42], 5)
    assert child.ledger.computed == 5  # its prompt was computed already
    late = engine.fork(source, params(3))  # from a finished request: what the prefix store still has
    engine.run()
    assert list(late.completion().token_ids) == greedy(
        llm, so_far + greedy(llm, so_far, 12)[: 21 - len(so_far)], 3
    )
    idle(llm)


def test_ledger_counts_tokens(llm):
    request = llm.engine.submit(ids_of(10), params(6))
    llm.engine.run()
    ledger = llm.engine.ledger(request)
    assert (ledger.prompt, ledger.cached, ledger.computed, ledger.generated) == (10, 0, 15, 6)
    again = llm.engine.submit(ids_of(10), params(6))
    llm.engine.run()
    assert (again.ledger.cached, again.ledger.computed) == (8, 7)


def test_non_finite_logits_fail_alone(llm, greedy, monkeypatch):
    decoder = llm._loaded.decoder
    original = decoder.embed

    def poisoned(ids):
        rows = original(ids).clone()
        rows[ids == 77] = float("nan")
        return rows

    monkeypatch.setattr(decoder, "embed", poisoned)
    prompts = [ids_of(6, 1), [5, 77, 6], ids_of(8, 2)]
    prompts = [[t for t in p if t != 77] if i != 1 else p for i, p in enumerate(prompts)]
    bad = llm.generate(prompts, params(4))
    monkeypatch.setattr(decoder, "embed", original)
    assert bad[1].samples[0].finish is FinishReason.ERROR
    assert "not finite" in bad[1].samples[0].error
    assert [list(bad[i].token_ids) for i in (0, 2)] == [greedy(llm, prompts[i], 4) for i in (0, 2)]
    idle(llm)


def test_a_step_that_raises_ends_its_requests_and_the_engine_goes_on(llm, greedy, monkeypatch):
    def broken(chunks):
        raise RuntimeError("kernel fault")

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "run", broken)
        with pytest.raises(RuntimeError, match="kernel fault"):
            llm.generate([ids_of(5), ids_of(6)], params(4))
    idle(llm)
    assert list(llm.generate([ids_of(5)], params(4))[0].token_ids) == greedy(llm, ids_of(5), 4)


def test_limits(make_llm):
    llm = make_llm(max_context=20)
    assert len(llm.generate([ids_of(15)], params(10**9))[0].token_ids) == 5
    assert llm.generate([ids_of(15)], params(10**9))[0].samples[0].finish is FinishReason.LENGTH
    with pytest.raises(RequestError, match=r"20 tokens, but the context holds 20"):
        llm.generate([ids_of(20)], params())
    small = make_llm(kv_tokens=40)
    assert small.engine.context == 40
    with pytest.raises(RequestError, match="n = 20"):
        small.generate([ids_of(3)], params(n=20))
    idle(llm)
    idle(small)


def test_pinned_pages_end_a_request_that_cannot_run_instead_of_hanging(make_llm):
    llm = make_llm(kv_tokens=40)
    cache = llm.engine.cache
    kv = cache.open(-5)
    assert cache.reserve(kv, 0, 30)
    kv.length = 30
    request = llm.engine.submit(ids_of(15), params(4))
    llm.engine.run()
    assert request.sequences[0].finish is FinishReason.ERROR
    assert "KV pages" in str(request.failure)
    cache.close(kv)
    assert llm.generate([ids_of(15)], params(4))[0].samples[0].finish is FinishReason.LENGTH


def test_stop_tokens_and_end_token(llm, greedy):
    prompt = ids_of(6)
    want = greedy(llm, prompt, 10)
    at = next(i for i in range(2, 10) if want[i] not in want[:i])
    sample = llm.generate([prompt], params(10, stop_token_ids=(want[at],)))[0].samples[0]
    assert list(sample.token_ids) == want[: at + 1]
    assert sample.finish is FinishReason.STOP
    assert sample.text == llm.tokenizer.decode(want[:at], continuing=True)
    llm.engine.eos_ids = frozenset({want[at]})
    assert len(llm.generate([prompt], params(10, ignore_eos=False))[0].token_ids) == at + 1
    assert len(llm.generate([prompt], params(10))[0].token_ids) == 10
    with pytest.raises(RequestError, match="stop_token_ids: 320"):
        llm.generate([prompt], params(stop_token_ids=(320,)))


def test_stop_strings_span_tokens(llm):
    prompt = ids_of(6)
    free = llm.generate([prompt], params(12))[0]
    pieces = [llm.tokenizer.decode(free.token_ids[: i + 1], continuing=True) for i in range(12)]
    stop = free.text[len(pieces[4]) - 1 : len(pieces[5]) + 1]  # ends inside the seventh token
    assert free.text.find(stop) == len(pieces[4]) - 1
    sample = llm.generate([prompt], params(12, stop=(stop,)))[0].samples[0]
    assert sample.text == free.text[: len(pieces[4]) - 1]
    assert sample.finish is FinishReason.STOP
    assert len(sample.token_ids) <= 8
    streamed = "".join(d.text for d in llm.stream(prompt, params(12, stop=(stop,))))
    assert streamed == sample.text


class AfterThree(StopPolicy):
    def __init__(self):
        self.forgotten = []

    def should_stop(self, sequence_id, prompt_ids, output_ids):
        return len(output_ids) == 3

    def forget(self, sequence_id):
        self.forgotten.append(sequence_id)


class Reverse(PromptTransform):
    def on_text(self, prompt):
        return prompt.replace(text=prompt.text[::-1]) if prompt.text else prompt

    def on_tokens(self, prompt):
        return prompt.replace(token_ids=prompt.token_ids[1:])


class Both(Technique):
    slug = "both"
    slots = ("stop_policy", "prompt_transform")
    lossless = False

    def provide(self, slot, context):
        return AfterThree() if slot == "stop_policy" else Reverse()


def test_stop_policy_and_prompt_transform(make_llm):
    llm = make_llm(Both())
    done = llm.generate(["abcdef"], params(9))[0]
    assert len(done.token_ids) == 3
    assert done.samples[0].finish is FinishReason.STOP
    assert list(done.prompt_token_ids) == llm.tokenizer.encode("fedcba")[1:]
    assert len(llm.engine.parts.stop_policies[0].forgotten) == 1


def test_positions_and_embeddings_enter_through_the_prompt(llm, greedy):
    ids = ids_of(9)
    with torch.inference_mode():
        rows = llm._loaded.decoder.embed(torch.tensor(ids[:5]))
    prompt = Prompt(
        token_ids=(0, 0, 0, 0, 0, *ids[5:]), embeddings_TE=rows, position_ids=tuple(range(100, 109))
    )
    for _ in range(2):  # such pages are not shared
        found = llm.generate([prompt], params(6))[0]
        assert list(found.token_ids) == greedy(llm, ids, 6)
        assert found.cached_tokens == 0
    for bad, message in [
        (Prompt(token_ids=tuple(ids), position_ids=(1, 2)), "2 position ids for 9 tokens"),
        (Prompt(token_ids=(1,), position_ids=(-1,)), "negative"),
        (Prompt(token_ids=tuple(ids), embeddings_TE=rows[:, :3]), "want"),
        (Prompt(token_ids=tuple(ids), embeddings_TE=rows * float("nan")), "NaN"),
    ]:
        with pytest.raises(RequestError, match=message):
            llm.generate([bad], params(2))


def test_a_hook_that_skips_a_layer_still_shares_prefixes(make_llm):
    class SkipOne(LayerHook):
        def skip(self, layer, layout):
            return layer == 1, False

    llm = make_llm()
    llm.engine.runner.hooks = (SkipOne(),)
    llm.engine.runner._hooks_at = {1: llm.engine.runner.hooks}
    first = llm.generate([ids_of(20)], params(8))[0]
    again = llm.generate([ids_of(20)], params(8))[0]
    assert again.token_ids == first.token_ids
    assert again.cached_tokens == 16
    idle(llm)


def test_step_time_of_a_waiting_crowd_is_small(make_llm):
    """Hundreds of waiting requests must not slow down each step."""
    llm = make_llm(max_batch=2, kv_tokens=2000)
    shared = ids_of(60)
    requests = [llm.engine.submit([*shared, n % 300 + 3], params(2)) for n in range(600)]
    start = time.perf_counter()
    for _ in range(20):
        llm.engine.step()
    assert (time.perf_counter() - start) / 20 < 0.25
    for request in requests:
        llm.engine.cancel(request)
    idle(llm)
