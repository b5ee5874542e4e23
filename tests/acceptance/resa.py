"""Acceptance of `resa` (checks 1-4 and 6 of its specification; 5 is speed: `benchmarks/resa.py`)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from hasten.attention.resa import SIDECAR, BlockPolicy, Rectified, Resa
from hasten.core.errors import ConflictError, SettingError, UnsupportedError
from hasten.kernels.bounds import KeepRule
from hasten.kernels.pages import dequantise
from hasten.kernels.reference import bounds as reference
from hasten.lm.chunk import Chunk
from hasten.lm.kvcache.cache import SequenceKV
from hasten.lm.kvcache.repair import repair_from
from hasten.lm.llm import LLM
from hasten.lm.native import DecodeRound
from hasten.lm.request import SamplingParams
from hasten.lm.runner import Runner
from hasten.lm.scheduling.continuous import ContinuousBatching

from ..lm.lm_tiny import write_checkpoint

BLOCK = 16


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_checkpoint(
        tmp_path_factory.mktemp("resa") / "tiny", layers=4, heads=6, kv_heads=2, head_size=32
    )


def resa(**settings: object) -> Resa:
    """Sparse from 49 tokens on."""
    return Resa(**{"min_blocks": 3, "every": 8, **settings})


def greedy(tokens: int, **more: object) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0, **{"ignore_eos": True, **more})


def prompts(count: int, low: int = 60, high: int = 200) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, 300, int(n)).tolist() for n in rng.integers(low, high, count)]


def run(model: Path, use: list[object], given: list[list[int]], tokens: int = 40, **engine: object):
    with LLM(model, use=use, dtype="float32", **engine) as llm:
        out = [c.token_ids for c in llm.generate(given, greedy(tokens))]
        assert llm.engine.cache.pool.used == llm.facts()["pages_stored"]
    return out


def cached(llm: LLM, kv: SequenceKV, length: int) -> torch.Tensor:
    """Keys and values of the first ``length`` tokens, float32 [layers, 2, G, length, D]."""
    cache = llm.engine.cache
    ids = torch.tensor(kv.pages[: -(-length // cache.page_size)])
    out = []
    for layer in range(cache.layers):
        pages = cache.format.pages(layer)
        for part in (pages.k_NGPD, pages.v_NGPD):
            part = part[ids]
            part = dequantise(part) if part.dtype is torch.int8 else part.float()
            out.append(part.transpose(0, 1).flatten(1, 2)[:, :length])
    return torch.stack(out).unflatten(0, (cache.layers, 2))


class Dense:
    """The cache that the model without techniques holds after a prefill of given tokens."""

    def __init__(self, model: Path | str, **plan: object) -> None:
        self.llm = LLM(model, **plan)

    def prefill(self, ids: list[int]) -> torch.Tensor:
        engine = self.llm.engine
        kv = engine.cache.open(engine.new_id())
        assert engine.cache.reserve(kv, 0, len(ids))
        engine.cache.attach(kv)
        for start in range(0, len(ids), 512):
            part = ids[start : start + 512]
            engine.runner.run([Chunk(kv, start, part, range(start, start + len(part)), 0)])
        found = cached(self.llm, kv, len(ids))
        engine.cache.close(kv)
        return found


@pytest.fixture(scope="module")
def dense(tiny) -> Iterator[Dense]:
    made = Dense(tiny, dtype="float32")
    yield made
    made.llm.close()


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference over the largest number, of each layer's keys and values."""
    most = want.abs().amax((-3, -2, -1))
    return float(((got - want).abs().amax((-3, -2, -1)) / most).max())


def watch(
    llm: LLM, given: list[list[int]], params: SamplingParams, look: Callable[[object, SequenceKV], None]
):
    """Generate, and look at every sequence whose cache is as after a repair, whenever a step ends. How often it was."""
    engine, seen = llm.engine, 0
    requests = [engine.submit(ids, params) for ids in given]
    while engine.busy:
        engine.step()
        for request in requests:
            for sequence in request.sequences:
                kv = sequence.kv
                if kv is not None and kv.exact == kv.length and sequence.output_length > 1:
                    look(sequence, kv)
                    seen += 1
    assert all(request.failure is None for request in requests)
    return seen


# -- 1. all blocks are dense attention ----------


def test_a_ratio_of_one_changes_nothing(tiny):
    given = prompts(4)
    assert run(tiny, [resa(ratio=1.0)], given) == run(tiny, [], given)


def test_choosing_every_block_through_the_sparse_path_is_dense_attention(tiny, monkeypatch):
    (ids,) = prompts(1, 150, 151)
    with LLM(tiny, dtype="float32") as llm:
        want = llm.score(ids, context=100, mode="decode").logprobs
    monkeypatch.setattr(BlockPolicy, "whole", 0)  # every decode row chooses
    monkeypatch.setattr(BlockPolicy, "selectors", lambda self: ())  # layer by layer
    with LLM(tiny, use=[resa(ratio=1.0, every=0)], dtype="float32") as llm:
        got = llm.score(ids, context=100, mode="decode").logprobs
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_steps_in_one_native_call_choose_what_the_layers_choose_one_by_one(tiny, monkeypatch):
    given, native = prompts(3), []
    run_round = DecodeRound.run

    def spy(self, chunks):
        found = run_round(self, chunks)
        native.append(found is not None)
        return found

    monkeypatch.setattr(DecodeRound, "run", spy)
    together = run(tiny, [resa()], given)
    assert sum(native) > 15
    monkeypatch.setattr(DecodeRound, "run", lambda self, chunks: None)
    assert run(tiny, [resa()], given) == together
    assert together != run(tiny, [], given)  # the sparsity is felt at all


# -- 2 and 3. after a repair the cache is the dense one ----------


@pytest.mark.parametrize("every", [1, 8, 32])
@pytest.mark.parametrize("ratio", [0.05, 0.4])
def test_after_a_repair_the_cache_equals_a_dense_prefill(tiny, dense, every, ratio):
    """With ``every=1`` that is after each token. The boxes then are those of the pages' keys."""

    def look(sequence, kv):
        got = cached(llm, kv, kv.length)
        assert error(got, dense.prefill(sequence.token_ids[: kv.length])) < 1e-4
        for layer, sidecar in llm.engine.cache.sidecars.by_name[SIDECAR].items():
            want = reference.boxes(got[layer, 0].transpose(0, 1), BLOCK, sidecar.dtype)
            found = sidecar[torch.tensor(kv.pages)].transpose(1, 2).flatten(0, 1)[: len(want)]
            assert torch.equal(found, want)

    with LLM(tiny, use=[resa(every=every, ratio=ratio)], dtype="float32") as llm:
        seen = watch(llm, prompts(1, 100, 101), greedy(20 if every == 1 else 70), look)
    assert seen >= (18 if every == 1 else 70 // every - 1)


def test_between_repairs_the_cache_does_differ(tiny, dense):
    """The checks above could not fail otherwise."""
    (ids,) = prompts(1, 150, 151)
    with LLM(tiny, use=[resa(every=None)], dtype="float32") as llm:
        request = llm.engine.submit(ids, greedy(40))
        while request.sequences[0].output_length < 30:
            llm.engine.step()
        kv, tokens = request.sequences[0].kv, request.sequences[0].token_ids
        assert error(cached(llm, kv, kv.length), dense.prefill(tokens[: kv.length])) > 1e-2
        llm.engine.cancel_all()


@pytest.mark.parametrize(("kv_dtype", "most"), [("bfloat16", 1e-2), ("int8", 2e-2)])
def test_repaired_pages_of_fewer_bits(tiny, kv_dtype, most):
    plain = Dense(tiny, dtype="float32", kv_dtype=kv_dtype)

    def look(sequence, kv):
        assert error(cached(llm, kv, kv.length), plain.prefill(sequence.token_ids[: kv.length])) < most

    with LLM(tiny, use=[resa()], dtype="float32", kv_dtype=kv_dtype) as llm:
        assert watch(llm, prompts(2), greedy(40), look) >= 8
    plain.llm.close()


# -- 6. batches, stop tokens, short prompts, forks, shared pages ----------


def repairs(monkeypatch) -> list[list[Chunk]]:
    """By step, the chunks that are computed again."""
    seen: list[list[Chunk]] = []
    run_step = Runner.run

    def spy(self, chunks):
        seen.append([c for c in chunks if c.start < c.kv.length])
        for c in seen[-1]:
            assert c.logits == 0
            assert c.start + len(c.token_ids) <= c.kv.length  # the newest token is not among them
        return run_step(self, chunks)

    monkeypatch.setattr(Runner, "run", spy)
    return seen


def test_sequences_of_a_batch_take_turns_and_do_not_feel_each_other(tiny, monkeypatch):
    given = prompts(8, 50, 90)
    alone = [run(tiny, [resa()], [ids], 30, prefix_cache=False)[0] for ids in given]
    seen = repairs(monkeypatch)
    assert run(tiny, [resa()], given, 30) == alone
    counts = [len(chunks) for chunks in seen if chunks]
    assert sum(counts) >= 8 * 3
    assert max(counts) <= 4  # of 8 sequences
    assert max(len(c.token_ids) for chunks in seen for c in chunks) <= 8
    assert run(tiny, [resa()], given, 30, max_step_tokens=33) == alone


def test_steps_too_small_for_a_repair_do_it_in_pieces(tiny, dense, monkeypatch):
    def look(sequence, kv):
        assert error(cached(llm, kv, kv.length), dense.prefill(sequence.token_ids[: kv.length])) < 1e-4

    seen = repairs(monkeypatch)
    with LLM(tiny, use=[resa()], dtype="float32", max_step_tokens=5) as llm:
        assert watch(llm, prompts(2, 60, 90), greedy(30), look) >= 5
    pieces = [c for chunks in seen for c in chunks if len(c.token_ids) < 8]
    assert max(len(c.token_ids) for c in pieces) == 5


def test_samples_of_one_prompt_take_turns(tiny, monkeypatch):
    seen = repairs(monkeypatch)
    with LLM(tiny, use=[resa()], dtype="float32") as llm:
        params = SamplingParams(max_tokens=40, temperature=1.0, n=4, seed=0, ignore_eos=True)
        done = llm.generate(prompts(1), params)[0]
    assert len({s.token_ids for s in done.samples}) == 4
    assert 1 <= max(len(chunks) for chunks in seen) <= 2


def test_a_stop_token_inside_a_window_ends_the_answer(tiny):
    (ids,) = prompts(1)
    whole = run(tiny, [resa()], [ids])[0]
    stop = next(t for i, t in enumerate(whole) if i >= 13 and t not in whole[:i])
    with LLM(tiny, use=[resa()], dtype="float32") as llm:
        done = llm.generate([ids], greedy(40, stop_token_ids=[stop]))[0]
        assert done.token_ids == whole[: whole.index(stop) + 1]
        assert llm.engine.cache.pool.used == llm.facts()["pages_stored"]


def test_contexts_that_are_read_whole_are_not_repaired(tiny, monkeypatch):
    (ids,) = prompts(1, 20, 21)
    seen = repairs(monkeypatch)
    with LLM(tiny, dtype="float32") as llm:
        want = llm.generate([ids], greedy(80))[0].token_ids
    short = run(tiny, [Resa()], [ids], 80)[0]
    assert short == want
    assert not any(seen)
    run(tiny, [resa()], [ids], 80)  # sparse from token 49 on
    first = next(chunks[0] for chunks in seen if chunks)
    assert first.start == 48


def test_forks_repair_their_own_pages(tiny, dense):
    """A fork in the middle of a window shares a page with its source; neither sees the other's repair."""
    (ids,) = prompts(1, 100, 101)
    want = run(tiny, [resa()], [ids])[0]
    seen = []

    def look(sequence, kv):
        seen.append(sequence.id)
        assert error(cached(llm, kv, kv.length), dense.prefill(sequence.token_ids[: kv.length])) < 1e-4

    with LLM(tiny, use=[resa()], dtype="float32") as llm:
        engine = llm.engine
        source = engine.submit(ids, greedy(40))
        while source.sequences[0].output_length < 13:
            engine.step()
        kv = source.sequences[0].kv
        assert kv.exact < kv.length
        other = engine.fork(source, greedy(30), append=[5, 6, 7])
        for _ in range(200):
            if not engine.busy:
                break
            engine.step()
            for request in (source, other):
                sequence = request.sequences[0]
                if sequence.kv is not None and sequence.kv.exact == sequence.kv.length > 0:
                    look(sequence, sequence.kv)
        assert source.failure is None
        assert other.failure is None
        assert tuple(source.sequences[0].output_ids) == want
        assert other.sequences[0].output_length == 30
    assert len(set(seen)) == 2


def test_only_repaired_pages_are_shared_with_later_requests(tiny, dense):
    (ids,) = prompts(1, 100, 101)
    with LLM(tiny, use=[resa()], dtype="float32", page_size=16) as llm:
        first = llm.generate([ids], greedy(60))[0].token_ids
        engine = llm.engine
        kv = engine.cache.open(engine.new_id(), [*ids, *first])
        assert kv.length > len(ids)
        assert error(cached(llm, kv, kv.length), dense.prefill([*ids, *first][: kv.length])) < 1e-4
        engine.cache.close(kv)


def test_preempted_sequences_are_repaired_too(tiny, dense):
    def look(sequence, kv):
        assert error(cached(llm, kv, kv.length), dense.prefill(sequence.token_ids[: kv.length])) < 1e-4

    with LLM(tiny, use=[resa()], dtype="float32", kv_tokens=320, page_size=16) as llm:
        assert watch(llm, prompts(4, 60, 110), greedy(40), look) > 10
        assert llm.engine.cache.pool.used == llm.facts()["pages_stored"]


def test_drafts_and_repairs(tiny, dense, monkeypatch):
    seen = repairs(monkeypatch)

    def look(sequence, kv):
        assert error(cached(llm, kv, kv.length), dense.prefill(sequence.token_ids[: kv.length])) < 1e-4

    (ids,) = prompts(1, 30, 31)
    with LLM(tiny, use=[resa(), "prompt_lookup"], dtype="float32") as llm:
        assert watch(llm, [ids * 4], greedy(60), look) >= 3
    assert any(seen)


def test_scores_are_repaired_like_generation(tiny, dense, monkeypatch):
    """Teacher-forced decoding, by which quality is judged, repairs as often."""
    seen = repairs(monkeypatch)
    (ids,) = prompts(1, 150, 151)
    with LLM(tiny, use=[resa()], dtype="float32") as llm:
        llm.score(ids, context=100, mode="decode")
    chunks = [chunk for step in seen for chunk in step]
    assert [c.start for c in chunks] == [100, *range(104, 144, 8)]
    assert [len(c.token_ids) for c in chunks] == [4, 8, 8, 8, 8, 8]


# -- the repair of another policy, and what is refused ----------


def test_any_decode_policy_can_be_repaired(tiny, dense):
    def look(sequence, kv):
        assert error(cached(llm, kv, kv.length), dense.prefill(sequence.token_ids[: kv.length])) < 1e-4

    technique = Resa(over="adamas:budget=48,fixed_cut=0.5", every=8)
    with LLM(tiny, use=[technique], dtype="float32") as llm:
        assert type(llm.engine.runner.policy) is Rectified
        assert watch(llm, prompts(2), greedy(40), look) >= 8


@pytest.mark.parametrize("over", ["resa", "gptq"])
def test_what_cannot_be_repaired_is_refused(tiny, over):
    with pytest.raises(SettingError, match="another technique of slot 'attention_policy'"):
        LLM(tiny, use=[Resa(over=over)], dtype="float32")


def test_keys_that_are_rotated_when_read_are_refused(tiny):
    with pytest.raises(ConflictError, match="rotates keys as it reads them"):
        LLM(tiny, use=[Resa(over="token_select")], dtype="float32")


def test_refuses_pages_that_hold_no_whole_blocks(tiny):
    with pytest.raises(UnsupportedError, match="set page_size to a multiple of 16"):
        LLM(tiny, use=[resa()], dtype="float32", page_size=24)


def test_layers_that_slide_a_window_stay_as_they_are(tiny, monkeypatch):
    config = json.loads((tiny / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 24}
    with pytest.raises(UnsupportedError, match="sliding window"):
        LLM(copied(tiny, config), use=[resa()], dtype="float32")
    sparse_only = BlockPolicy.__init__
    monkeypatch.setattr(
        BlockPolicy, "__init__", lambda self, *args, **kw: sparse_only(self, *args, **kw | {"sparse": [1, 3]})
    )
    given = prompts(2)
    with LLM(tiny, use=[resa()], dtype="float32") as llm:
        policy = llm.engine.runner.policy
        assert [s is not None for s in policy.selectors()] == [False, True, False, True]
        together = [c.token_ids for c in llm.generate(given, greedy(40))]
    monkeypatch.setattr(DecodeRound, "run", lambda self, chunks: None)
    assert run(tiny, [resa()], given) == together


def copied(model: Path, config: dict[str, object]) -> Path:
    """The checkpoint with another config."""
    folder = Path(shutil.copytree(model, model.with_name(f"{model.name}-copy")))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_refuses_more_local_blocks_than_are_read():
    with pytest.raises(SettingError, match="local = 5"):
        Resa(local=5, min_blocks=4)


def test_refuses_a_scheduler_that_repairs_nothing(tiny, monkeypatch):
    class Deaf(ContinuousBatching):
        def schedule(self):
            return super().schedule()

    monkeypatch.setattr("hasten.lm.build.ContinuousBatching", Deaf)
    assert not Deaf().repairs
    with pytest.raises(ConflictError, match="never repair"):
        LLM(tiny, use=[resa()], dtype="float32")
    LLM(tiny, use=[resa(every=0)], dtype="float32").close()


# -- 4. drift, on the default model ----------

TEXT, SCORED = 2048, 128


@pytest.mark.timeout(1800)
def test_repairs_hold_the_drift_down(default_model_path, documentation):
    """Mean KL to dense above that of a repair after every token: at most 0.8 times as much with a repair every 32.

    128 positions here; `benchmarks/resa.py --drift` gives 1,024 and more distances between repairs. After each repair
    the cache is within 1% of the dense one (its numbers are bfloat16).
    """
    with LLM(str(default_model_path), use=[Resa(every=1)], kv_tokens=TEXT + 32, prefix_cache=False) as llm:
        engine, policy = llm.engine, llm.engine.runner.policy
        text = max((d.text for d in documentation.documents("test")), key=len)
        ids = llm.tokenizer.encode(text[:20_000])[:TEXT]
        assert len(ids) == TEXT
        kv, first = engine.cache.open(engine.new_id()), TEXT - SCORED
        assert engine.cache.reserve(kv, 0, TEXT)
        engine.cache.attach(kv)
        for start in range(0, TEXT, 464):
            part = ids[start : start + 464]
            engine.runner.run([Chunk(kv, start, part, range(start, start + len(part)), 0)])
        prefilled = cached(llm, kv, TEXT)
        sparse, logprobs = policy.policy.rule, {}
        for every in (None, 1, 32, 10_000):
            policy.policy.rule = KeepRule(1.0, 16, 1) if every is None else sparse
            policy.every = every or 10_000
            engine.cache.truncate(kv, first)
            kv.exact = first
            assert engine.cache.reserve(kv, 0, TEXT)
            rows = []
            for at in range(first, TEXT):
                if every and (start := repair_from(kv, policy.repair)) is not None:
                    engine.runner.run([Chunk(kv, start, ids[start:at], range(start, at), 0)])
                    if every == 32:
                        assert error(cached(llm, kv, at), prefilled[..., :at, :]) < 1e-2
                rows.append(engine.runner.run([Chunk(kv, at, [ids[at]], [at], 1)]))
            logprobs[every] = torch.log_softmax(torch.cat(rows).float(), -1)
        engine.cache.close(kv)
    dense = logprobs.pop(None)
    kl = {every: float((dense.exp() * (dense - found)).sum(-1).mean()) for every, found in logprobs.items()}
    print(kl)
    assert kl[1] < kl[32] < kl[10_000]
    assert kl[32] - kl[1] <= 0.8 * (kl[10_000] - kl[1])
