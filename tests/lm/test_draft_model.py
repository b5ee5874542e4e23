from __future__ import annotations

import json
import shutil

import pytest
import torch

from hasten.core.errors import ConflictError, ModelError, SettingError
from hasten.lm.context.transform import Prompt
from hasten.lm.decoding.draft_model import DraftModel
from hasten.lm.decoding.speculate import Ask
from hasten.lm.request import SamplingParams

from .lm_tiny import write_checkpoint, write_tokenizer
from .test_speculation import idle, ids_of, params

PROMPTS = [ids_of(9, 1), ids_of(23, 2), ids_of(5, 3), ids_of(40, 4)]


@pytest.fixture(scope="session")
def other_path(tmp_path_factory):
    """Another model with the same vocabulary, its embedding padded to 352 rows."""
    path = write_checkpoint(tmp_path_factory.mktemp("models") / "other", layers=1, vocabulary=352, seed=3)
    write_tokenizer(path, 320)
    return path


@pytest.fixture
def drafted(make_llm, tiny_path, other_path):
    """``drafted(same, engine settings..., technique settings)``: with itself as the draft model, or another one."""

    def make(same: bool, engine=None, **settings):
        settings = {"min_confidence": 0.0, "adaptive": False, **settings}
        return make_llm(
            DraftModel(model=str(tiny_path if same else other_path), **settings), **(engine or {})
        )

    return make


def all_free(llm) -> None:
    drafter = llm.engine.parts.drafter
    idle(llm)
    assert not drafter._states
    assert not drafter._past
    drafter.cache.store.clear()
    assert drafter.cache.pool.used == 0
    assert drafter.cache.free_rows == llm.engine.settings.max_batch


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("same", [True, False])
def test_lossless_under_greedy(drafted, greedy, same, adaptive):
    llm = drafted(same, adaptive=adaptive)
    found = llm.generate(PROMPTS, params(20))
    assert [list(c.token_ids) for c in found] == [greedy(llm, p, 20) for p in PROMPTS]
    done = llm.engine.speculation
    assert done.rounds > 0
    if same and not adaptive:
        assert done.accepted == done.drafted
        assert done.acceptance_length > 3.5
    all_free(llm)


def test_its_own_model_saves_nearly_all_steps(drafted):
    """Everything is accepted, also after rounds that kept all (their last guess is not read yet)."""
    llm = drafted(True, draft_tokens=4)
    request, steps = llm.engine.submit(PROMPTS[0], params(31)), 0
    while llm.engine.step():
        steps += 1
    assert steps <= 8  # the prompt with the first token, then 5 tokens a round
    assert request.ledger.accepted == request.ledger.drafted == 24


@pytest.mark.parametrize("same", [True, False])
def test_preempted_forked_and_cancelled_together(drafted, greedy, same):
    llm = drafted(same, {"kv_tokens": 88})
    prompts = [ids_of(9, n) for n in range(4)]
    requests = [llm.engine.submit(p, params(20)) for p in prompts]
    several = llm.engine.submit(ids_of(8, 9), params(12, n=3))
    gone = llm.engine.submit(ids_of(8, 10), params(12))
    for _ in range(3):
        llm.engine.step()
    llm.engine.cancel(gone)
    while llm.engine.step():
        running = {s.id for s in llm.engine.scheduler.running}
        assert set(llm.engine.parts.drafter._states) <= running
    assert sum(r.ledger.preemptions for r in requests) > 0
    assert [list(r.completion().token_ids) for r in requests] == [greedy(llm, p, 20) for p in prompts]
    want = tuple(greedy(llm, ids_of(8, 9), 12))
    assert [s.token_ids for s in several.completion().samples] == [want] * 3
    all_free(llm)


def test_a_shared_prefix_is_read_once(drafted):
    llm = drafted(True)
    drafter, rows = llm.engine.parts.drafter, []
    run = drafter.runner.run
    drafter.runner.run = lambda chunks: rows.append(sum(len(c.token_ids) for c in chunks)) or run(chunks)
    prefix = ids_of(40, 5)
    llm.generate([prefix + ids_of(3, 6)], params(8))
    first = sum(rows)
    rows.clear()
    llm.generate([prefix + ids_of(3, 7)], params(8))
    assert first - sum(rows) >= 36


def test_long_prompts_are_read_within_the_row_budget(drafted, greedy):
    llm = drafted(False, {"max_step_tokens": 16})
    drafter, rows = llm.engine.parts.drafter, []
    run = drafter.runner.run
    drafter.runner.run = lambda chunks: rows.append(sum(len(c.token_ids) for c in chunks)) or run(chunks)
    prompts = [ids_of(60, n) for n in range(3)]
    found = llm.generate(prompts, params(24))
    assert [list(c.token_ids) for c in found] == [greedy(llm, p, 24) for p in prompts]
    assert max(rows) <= 16
    assert llm.engine.speculation.rounds > 0


def test_a_draft_that_the_scheduler_dropped_leaves_no_trace(drafted, greedy):
    """Guesses that were never verified are not taken for text: the next ones are as good as ever."""
    llm = drafted(True)
    request = llm.engine.submit(PROMPTS[1], params(24))
    while llm.engine.step():
        if request.ledger.generated in range(6, 12):
            for sequence in llm.engine.scheduler.running:
                asked = Ask(sequence.id, sequence.token_ids, 4)
                assert llm.engine.parts.drafter.propose_all([asked])[0] is not None
    assert list(request.completion().token_ids) == greedy(llm, PROMPTS[1], 24)
    assert request.ledger.accepted == request.ledger.drafted > 0


def test_unsure_drafts_end_early(drafted, greedy):
    llm = drafted(False, min_confidence=0.9)
    found = llm.generate(PROMPTS, params(20))
    assert [list(c.token_ids) for c in found] == [greedy(llm, p, 20) for p in PROMPTS]
    bold = drafted(False)
    bold.generate(PROMPTS, params(20))
    done, more = llm.engine.speculation, bold.engine.speculation
    assert done.drafted < more.drafted
    assert done.accepted / max(1, done.drafted) >= more.accepted / more.drafted


@pytest.mark.parametrize("confidence", [0.0, 0.3])
@pytest.mark.parametrize("same", [True, False])
def test_sampling_keeps_the_distribution(drafted, make_llm, same, confidence):
    """Pairs of tokens of many seeded requests, with and without drafts: same frequencies (chi-square)."""
    wanted, count, prompt = {"temperature": 0.7, "top_k": 4}, 600, ids_of(6)
    engine = {"max_batch": 64, "max_step_tokens": 600}

    def pairs(llm, base):
        requests = [llm.engine.submit(prompt, params(4, **wanted, seed=base + i)) for i in range(count)]
        llm.engine.run()
        return [r.completion().token_ids[1:3] for r in requests]

    llm = drafted(same, engine, min_confidence=confidence)
    a, b = pairs(make_llm(**engine), 0), pairs(llm, 10_000)
    assert llm.engine.speculation.drafted > (count / 2 if confidence == 0 else 0)
    chi2 = degrees = 0
    for pair in sorted(set(a) | set(b)):
        x, y = a.count(pair), b.count(pair)
        if x + y >= 20:
            chi2, degrees = chi2 + (x - y) ** 2 / (x + y), degrees + 1
    assert degrees >= 4
    assert chi2 < degrees + 5 * (2 * degrees) ** 0.5
    all_free(llm)


def test_its_own_model_is_always_right_when_sampling_too(drafted):
    """p = q: every guess is kept, with temperature, truncation and penalties."""
    llm = drafted(True, draft_tokens=4)
    shaped = params(
        24, temperature=0.9, top_p=0.9, top_k=20, repetition_penalty=1.2, frequency_penalty=0.2, seed=3
    )
    found = llm.generate(PROMPTS, shaped)
    done = llm.engine.speculation
    assert all(len(c.token_ids) == 24 for c in found)
    assert done.accepted >= 0.97 * done.drafted > 0  # rounding apart


def test_a_vocabulary_of_its_own_is_refused(make_llm, tiny_path, tmp_path):
    path = write_checkpoint(tmp_path / "foreign", layers=1)
    backend = json.loads((path / "tokenizer.json").read_text())
    vocabulary = backend["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.get)
    vocabulary[tokens[40]], vocabulary[tokens[41]] = 41, 40
    (path / "tokenizer.json").write_text(json.dumps(backend))
    with pytest.raises(
        ConflictError, match=r"another vocabulary.*2 of 320 ids differ; id 40 is .*same family"
    ):
        make_llm(DraftModel(model=str(path)))
    with pytest.raises(ModelError):
        make_llm(DraftModel(model=str(tmp_path / "nowhere")))
    with pytest.raises(SettingError, match=r"draft_model\.model"):
        DraftModel()
    with pytest.raises(SettingError, match="min_confidence"):
        DraftModel(model="x", min_confidence=1.5)
    with pytest.raises(SettingError, match="above the engine's draft_tokens"):
        make_llm(DraftModel(model=str(shutil.copytree(tiny_path, tmp_path / "ünïcode")), draft_tokens=9))


def test_texts_that_the_draft_model_cannot_read_are_decoded_plainly(drafted, tiny_path):
    """A prompt with embeddings of its own, or longer than the draft model's context."""
    llm = drafted(True)
    rows = torch.randn(5, llm.engine.runner.decoder.config.hidden_size)
    request = llm.engine.submit(Prompt(token_ids=tuple(ids_of(9)), embeddings_TE=rows), params(8))
    llm.engine.run()
    assert len(request.completion().token_ids) == 8
    assert request.ledger.drafted == 0
    drafter = llm.engine.parts.drafter
    drafter.cache.context = 12
    request = llm.engine.submit(ids_of(9), params(16))
    llm.engine.run()
    assert request.ledger.drafted in (1, 2)  # up to token 12
    assert len(request.completion().token_ids) == 16
    all_free(llm)


def test_nan_from_the_draft_model_ends_the_draft(drafted, greedy):
    llm = drafted(False)
    llm.engine.parts.drafter.decoder.norm.weight.data.fill_(float("nan"))
    for temperature in (0, 0.8):
        (found,) = llm.generate([PROMPTS[0]], params(8, temperature=temperature))
        assert len(found.token_ids) == 8
        assert found.speculation.drafted == 0


def test_memory_of_both_models_is_in_the_budget(drafted):
    llm = drafted(False, {"kv_memory_mb": 1.0})
    facts = llm.facts()
    assert 0.95e6 <= facts["kv_bytes"] + facts["draft_kv_bytes"] <= 1e6
    cache = llm.engine.parts.drafter.cache
    assert cache.bytes() == facts["draft_kv_bytes"] > 0


def test_sampled_requests_can_ask_for_logprobs(drafted):
    llm = drafted(True)
    (found,) = llm.generate([PROMPTS[0]], SamplingParams(max_tokens=10, temperature=0.5, logprobs=1, seed=0))
    assert len(found.samples[0].logprobs) == len(found.token_ids)
