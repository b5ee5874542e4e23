from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

import hasten
from hasten.core.errors import (
    IntegrityError,
    PlanError,
    RequestError,
    SettingError,
    UnknownNameError,
    UnsupportedError,
)
from hasten.core.plan import Plan
from hasten.core.technique import Technique
from hasten.lm.batch import Job
from hasten.lm.llm import LLM
from hasten.lm.openai import ChatBody, TextBody
from hasten.lm.request import Completion, FinishReason, SamplingParams
from hasten.lm.runner import Runner


def params(count: int = 6, **more) -> SamplingParams:
    return SamplingParams(**{"max_tokens": count, "temperature": 0, "ignore_eos": True, **more})


def idle(llm) -> None:
    assert not llm.engine.busy
    assert llm.engine.cache.pool.used == len(llm.engine.cache.store)
    assert llm.engine.cache.free_rows == llm.engine.settings.max_batch


# -- generate, stream, chat -------------------------------------------------------------------------------------------


def test_text_and_ids_are_the_same_prompt(llm):
    text = "The quick brown fox"
    ids = llm.tokenizer.encode(text)
    a = llm.generate(text, params())[0]
    b, c = llm.generate([text, ids], params())
    assert a.token_ids == b.token_ids == c.token_ids
    assert list(a.prompt_token_ids) == ids
    assert a.text == llm.tokenizer.decode(a.token_ids, continuing=True)
    assert llm.generate(ids, params())[0].token_ids == a.token_ids


def test_parameters_per_prompt(llm):
    found = llm.generate(["a", "b"], [params(2), params(5)])
    assert [len(c.token_ids) for c in found] == [2, 5]
    with pytest.raises(RequestError, match="3 sampling parameters for 1 prompts"):
        llm.generate(["a"], [params()] * 3)
    assert llm.generate([], params()) == []


def test_streaming_adds_up(llm):
    whole = llm.generate("Über allen Gipfeln", params(20))[0]
    deltas = list(llm.stream("Über allen Gipfeln", params(20)))
    assert "".join(d.text for d in deltas) == whole.text
    assert tuple(t for d in deltas for t in d.token_ids) == whole.token_ids
    assert [d.finish for d in deltas[:-1]] == [None] * 19
    assert deltas[-1].finish is FinishReason.LENGTH
    idle(llm)


def test_closing_a_stream_cancels(llm):
    stream = llm.stream("The quick", params(200))
    next(stream)
    stream.close()
    assert list(stream) == []
    assert stream.completion().samples[0].finish is FinishReason.CANCELLED
    with llm.stream("The quick", params(200)) as other:
        next(other)
    idle(llm)
    llm.stream("The quick", params(200))  # dropped unread: collected, cancelled
    idle(llm)


def test_two_streams_interleave(llm):
    a, b = llm.stream("The quick", params(5)), llm.stream("Rivers run", params(9))
    got = {"a": "", "b": ""}
    for delta in a:
        got["a"] += delta.text
        got["b"] += next(b).text
    got["b"] += "".join(d.text for d in b)
    assert [got["a"], got["b"]] == [
        llm.generate("The quick", params(5))[0].text,
        llm.generate("Rivers run", params(9))[0].text,
    ]


def test_chat_uses_the_template(llm):
    messages = [{"role": "user", "content": "Name a river."}]
    done = llm.chat(messages, params())
    prompt = "<|im_start|>user\nName a river.<|im_end|>\n<|im_start|>assistant\n"
    assert list(done.prompt_token_ids) == llm.tokenizer.encode(prompt)
    assert "".join(d.text for d in llm.chat(messages, params(), stream=True)) == done.text
    with pytest.raises(RequestError):
        llm.chat([{"role": "user"}], params())


def test_unicode_comes_back_whole(llm):
    text = "naïve 日本語 \U0001f600 e\u0301"
    ids = llm.tokenizer.encode(text)
    request = llm.engine.submit(ids[:3], params(len(ids)))
    stream = request.sequences[0].text
    pieces = [stream.feed(i) for i in ids] + [stream.finish()]
    assert "".join(pieces) == text
    assert all("\ufffd" not in p for p in pieces)
    llm.engine.cancel(request)


# -- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        ([], "empty|prompts"),
        ([[]], "empty"),
        ("x" + chr(0xD800), "lone surrogate U\\+D800 at character 1"),
        (b"caf\xe9", "bytes"),
        ([1, 2, 400], "token id 400 is not in the vocabulary"),
        ([[1, -2]], "token id -2"),
        ([[1, 2.5]], "integers, found 2.5"),
        ([3.5], "not float"),
        (7, "not int"),
        (list(range(3, 310)) * 2, "614 tokens, but the context holds 512"),
    ],
)
def test_bad_prompts(llm, prompt, message):
    if prompt == []:
        assert llm.generate(prompt, params()) == []
        with pytest.raises(RequestError, match="empty"):  # one prompt without tokens
            llm.stream(prompt, params())
        return
    with pytest.raises(RequestError, match=message):
        llm.generate(prompt, params())
    idle(llm)


def test_one_bad_prompt_stops_the_call_and_leaves_nothing(llm):
    with pytest.raises(RequestError, match="empty"):
        llm.generate(["fine", "", "fine"], params())
    idle(llm)


@pytest.mark.parametrize("text", ["x" * 1_000_000, "lorem ipsum " * 85_000])
def test_a_megabyte_in_one_line_is_refused_quickly(llm, text):
    start = time.perf_counter()
    with pytest.raises(RequestError, match="context holds 512"):
        llm.generate(text, params())
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("count", [0, -1])
def test_max_tokens_must_be_positive(count):
    with pytest.raises(RequestError, match=f"max_tokens = {count}: must be at least 1"):
        SamplingParams(max_tokens=count)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"n": 0}, "n = 0"),
        ({"stop": "end"}, "stop = 'end'"),
        ({"stop": ("",)}, "non-empty"),
        ({"logprobs": -1}, "logprobs"),
        ({"seed": "x"}, "seed"),
        ({"logit_bias": {1: float("inf")}}, "logit_bias"),
    ],
)
def test_bad_sampling_parameters(settings, message):
    with pytest.raises(RequestError, match=message):
        SamplingParams(**settings)


def test_bad_engine_settings(make_llm, tiny_path):
    with pytest.raises(UnknownNameError, match="did you mean 'max_batch'"):
        make_llm(max_bach=3)
    with pytest.raises(SettingError, match=r"engine\.page_size = 0"):
        make_llm(page_size=0)
    with pytest.raises(SettingError, match="not both"):
        make_llm(kv_tokens=100, kv_memory_mb=3)
    with pytest.raises(SettingError, match=r"kv_memory_mb = 0\.001"):
        make_llm(kv_memory_mb=0.001)
    with pytest.raises(UnknownNameError, match="dtype"):
        LLM(tiny_path, dtype="float16")
    with pytest.raises(PlanError, match="a plan says which model"):
        LLM("x", plan=Plan(str(tiny_path)))


def test_plan_as_object_file_and_arguments(tiny_path, tmp_path):
    plan = Plan(str(tiny_path), dtype="float32", engine={"max_batch": 3})
    file = tmp_path / "plan.toml"
    file.write_text(plan.to_toml())
    for llm in (
        LLM(plan),
        LLM(plan=plan),
        LLM(file),
        LLM(plan=str(file)),
        LLM(tiny_path, dtype="float32", max_batch=3),
    ):
        assert llm.engine.settings.max_batch == 3
        assert llm.plan.dtype == "float32"
    assert LLM(file, max_batch=5).engine.settings.max_batch == 5


class Misplaced(Technique):
    slug = "misplaced"
    slots = ("kv_format",)
    lossless = True

    def provide(self, slot, context):
        return object()


class Elsewhere(Technique):
    slug = "elsewhere"
    slots = ("update_rule",)
    lossless = True


class Router(Technique):
    slug = "router"
    slots = ("expert_router",)
    lossless = False

    def provide(self, slot, context):
        raise AssertionError("never asked")


def test_techniques_that_do_not_fit(make_llm):
    with pytest.raises(TypeError, match="misplaced provides a object for slot 'kv_format', not a KVFormat"):
        make_llm(Misplaced())
    with pytest.raises(PlanError, match="elsewhere fills slot 'update_rule'"):
        make_llm(Elsewhere())
    with pytest.raises(UnsupportedError, match="no experts"):
        make_llm(Router())


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("megabytes", [0.3, 2.0])
def test_memory_budget_is_honoured(make_llm, megabytes):
    llm = make_llm(kv_memory_mb=megabytes)
    pages = llm.engine.cache.format.layers
    real = sum(t.numel() * t.element_size() for kv in pages for t in (kv.k_NGPD, kv.v_NGPD))
    assert real == llm.facts()["kv_bytes"]
    assert 0.95 * megabytes * 1e6 <= real <= megabytes * 1e6
    assert llm.facts()["kv_bytes_per_token"] == 2 * 3 * 2 * 16 * 4


def test_facts(llm):
    facts = llm.facts()
    assert facts["weight_bytes_per_token"] == 4 * (
        3 * (64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 192) + 320 * 64
    )
    assert facts["context"] == 512
    llm.generate("The quick brown fox", params(20))
    assert llm.facts()["pages_stored"] == llm.facts()["pages_used"] > 0
    with llm:
        pass
    assert llm.facts()["pages_used"] == 0


# -- scoring ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def expected(llm):
    @torch.inference_mode()
    def run(ids, context=0):
        logprobs = llm._loaded.decoder(torch.tensor([ids]))[0].log_softmax(-1)
        return [float(logprobs[i - 1, ids[i]]) for i in range(max(context, 1), len(ids))]

    return run


@pytest.mark.parametrize("mode", ["prefill", "decode"])
@pytest.mark.parametrize("context", [0, 1, 7])
@pytest.mark.parametrize("chunk", [None, 3])
def test_scores_are_the_models_log_likelihoods(llm, expected, mode, context, chunk):
    texts = [list(range(3, 40)), list(range(50, 60)), list(range(100, 123))]
    found = llm.score(texts, context=context, mode=mode, chunk=chunk)
    for score, ids in zip(found, texts, strict=True):
        assert list(score.token_ids) == ids
        assert score.logprobs == pytest.approx(expected(ids, context), abs=1e-4)
    single = llm.score(texts[0], context=context, mode=mode, chunk=chunk)
    assert single.logprobs == pytest.approx(found[0].logprobs, abs=1e-4)
    assert single.perplexity > 1
    idle(llm)


def test_more_texts_than_fit_are_scored_in_turns(make_llm):
    llm = make_llm(kv_tokens=64, max_batch=2)
    texts = [[3 + i, *range(3, 30)] for i in range(5)]
    assert len(llm.score(texts, mode="decode")) == 5
    assert [s.logprobs for s in llm.score(texts)] == [
        pytest.approx(s.logprobs, abs=1e-4) for s in llm.score(texts, mode="decode")
    ]
    idle(llm)


def test_scoring_text_and_bad_requests(llm, make_llm):
    text = "The quick brown fox jumps"
    assert llm.score(text).token_ids == tuple(llm.tokenizer.encode(text))
    assert [s.token_ids for s in llm.score([text, text])] == [llm.score(text).token_ids] * 2
    for given, message, more in [
        ([5], "nothing to score", {}),
        ([5, 6], "nothing to score", {"context": 2}),
        ([5, 6], "mode = 'both'", {"mode": "both"}),
        ([5, 6], "chunk = 0", {"chunk": 0}),
        ([5, 6], "context = -1", {"context": -1}),
        ([5, 999], "token id 999", {}),
        ([5] * 600, "context of 512", {}),
    ]:
        with pytest.raises(RequestError, match=message):
            llm.score(given, **more)
    small = make_llm(kv_tokens=40, max_batch=1)
    small.stream([5] * 20, params())
    stream = small.stream([5] * 20, params())
    next(stream)
    with pytest.raises(RequestError, match="other requests are running"):
        small.score([5, 6, 7])
    stream.close()
    idle(small)


def test_scoring_refuses_numbers_that_are_none(llm, monkeypatch):
    original = Runner.run
    monkeypatch.setattr(Runner, "run", lambda self, chunks: original(self, chunks) * float("nan"))
    with pytest.raises(IntegrityError, match="not finite"):
        llm.score([5, 6, 7])
    idle(llm)


# -- batch files ------------------------------------------------------------------------------------------------------


def test_answer_jobs_streams_results_and_errors(llm):
    def job(n, body, error=None):
        return Job(f"j{n}", n, f"c{n}", body, error)

    jobs = [
        job(1, TextBody(prompt="The quick", max_tokens=40, temperature=0, ignore_eos=True)),
        job(2, TextBody(prompt="", max_tokens=2)),
        job(
            3,
            ChatBody(
                messages=[{"role": "user", "content": "hi"}], max_tokens=3, temperature=0, ignore_eos=True
            ),
        ),
        job(4, TextBody(prompt=[5, 6], max_tokens=0)),
        job(5, None, RequestError("line 5: broken")),
    ]
    results = {job.id: result for job, result in llm.answer_jobs(iter(jobs))}
    assert set(results) == {"j1", "j2", "j3", "j4", "j5"}
    assert isinstance(results["j1"], Completion)
    assert results["j1"].text == llm.generate("The quick", params(40))[0].text
    assert len(results["j3"].token_ids) == 3
    assert [type(results[k]) for k in ("j2", "j4", "j5")] == [RequestError] * 3
    order = [job.id for job, _ in llm.answer_jobs(jobs)]
    assert order.index("j3") < order.index("j1")  # the short one does not wait for the long one
    unfinished = llm.answer_jobs(jobs)
    next(unfinished)
    unfinished.close()
    idle(llm)


# -- interrupts -------------------------------------------------------------------------------------------------------


def interrupt_after(seconds: float) -> threading.Timer:
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    return timer


def test_interrupt_during_generate(make_llm, greedy, monkeypatch):
    llm = make_llm(max_context=500)
    inside = []
    original = llm.engine.runner.run

    def slow(chunks):
        inside.append(True)
        time.sleep(0.01)
        out = original(chunks)
        inside.pop()
        return out

    monkeypatch.setattr(llm.engine.runner, "run", slow)
    timer = interrupt_after(0.3)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[5, 6, 7], [8] * 40, [9, 10]], params(450, n=2))
    timer.join()
    assert inside == []  # never in the middle of a step
    idle(llm)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.undo()
    assert list(llm.generate([[5, 6, 7]], params(5))[0].token_ids) == greedy(llm, [5, 6, 7], 5)


def test_interrupt_during_a_stream_ends_the_answer(make_llm):
    llm = make_llm(max_context=500)
    stream = llm.stream([5, 6, 7], params(480))
    timer = interrupt_after(0.2)
    got = []

    def read():
        for delta in stream:
            got.append(delta)
            time.sleep(0.002)

    with pytest.raises(KeyboardInterrupt):
        read()
    timer.join()
    stream.close()
    idle(llm)
    assert got
    assert stream.completion().token_ids[: len(got)] == tuple(t for d in got for t in d.token_ids)


def test_generate_in_another_thread(llm):
    out = []
    thread = threading.Thread(target=lambda: out.extend(llm.generate("The quick", params(5))))
    thread.start()
    thread.join()
    assert out[0].token_ids == llm.generate("The quick", params(5))[0].token_ids


# -- the package ------------------------------------------------------------------------------------------------------


def test_import_is_light_and_lazy():
    code = (
        "import sys, hasten; assert 'torch' not in sys.modules; hasten.Plan; hasten.SamplingParams; "
        "assert 'torch' not in sys.modules; dir(hasten); hasten.LLM; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="Nonsense"):
        hasten.Nonsense  # noqa: B018
    with pytest.raises(ImportError):
        from hasten import nothing  # noqa: F401
