import subprocess
import sys

import pytest

from hasten import workloads
from hasten.core.errors import MeasureError, RequestError, SettingError, UnknownNameError
from hasten.lm.decoding.prompt_lookup import PromptLookup
from hasten.lm.llm import LLM
from hasten.lm.request import Score
from hasten.workloads.forks import score_forks
from hasten.workloads.language import agreement, generate, greedy, perplexity
from hasten.workloads.text import Text
from hasten.workloads.workload import Workload

# Small enough for the tiny model: 512 positions, about a token per character.
SMALL = {
    "decode": {
        "prompt_tokens": [5, 9],
        "tokens": 6,
        "quality_texts": 2,
        "quality_context": 4,
        "quality_tokens": 8,
    },
    "prefill": {"tokens": 20, "quality_texts": 2, "quality_tokens": 30, "answer_tokens": 4},
    "long-prefill": {"tokens": 90, "quality_tokens": 8, "answer_tokens": 4},
    "long-decode": {"context": 100, "tokens": 6, "quality_tokens": 8},
    "batch-decode": {
        "requests": 5,
        "prompt_tokens": 7,
        "tokens": 6,
        "quality_texts": 3,
        "quality_context": 4,
        "quality_tokens": 5,
    },
    "shared-prefix": {"prefix_tokens": 50, "questions": 4, "tokens": 5, "quality_tokens": 6},
    "edit": {"passages": 2, "passage_tokens": 20, "tokens": 6},
    "trace": {"requests": 5, "clients": 3, "prompt_tokens": 60, "tokens": 5, "quality_requests": 2},
    "offline": {
        "requests": 6,
        "group": 3,
        "prompt_tokens": 100,
        "answer_tokens": 3,
        "short_tokens": 70,
        "tokens": 6,
        "sharing": 0.1,
        "quality_requests": 3,
    },
    "retrieval": {
        "pages": 12,
        "page_characters": 40,
        "lists": 2,
        "probes": 2,
        "stages": 2,
        "documents": 1,
        "requests": 3,
        "tokens": 3,
        "quality_requests": 2,
    },
    "offload-decode": {
        "prompt_tokens": (9,),
        "tokens": 6,
        "quality_texts": 2,
        "quality_context": 4,
        "quality_tokens": 8,
        "reference": True,
    },
}


@pytest.fixture(params=sorted(SMALL))
def job(request, optional):
    if request.param == "retrieval":
        optional("faiss")
    return workloads.get(request.param)


@pytest.fixture
def session(job, tiny_plan, small_corpus):
    with job.open(tiny_plan(), SMALL[job.name]) as session:
        yield session


def test_all_are_registered_and_cost_nothing_to_list():
    assert set(workloads.names()) == {*SMALL, "document-qa"}  # which has a file of its own
    code = "import sys; from hasten import workloads; workloads.names(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(UnknownNameError, match="did you mean 'long-decode'"):
        workloads.get("long_decode")


def test_describes_itself(job):
    assert isinstance(job, Workload)
    assert job.title
    assert job.unit == ("requests" if job.name == "retrieval" else "tokens")
    assert job.metric.better == ("higher" if job.name in SHARES else "lower")
    assert job.baseline().dtype == "auto"
    assert job.baseline("other").model == "other"
    assert job.baseline().techniques == ()


# Tokens that the timed part of each small job makes or reads.
UNITS = {
    "decode": 2 * 5,
    "prefill": 2 * 20,
    "long-prefill": 90,
    "long-decode": 5,
    "shared-prefix": 4 * 5,
    "edit": 2 * 5,
    "trace": 1,
    "retrieval": 3,  # requests
    "offload-decode": 5,
}
# Jobs whose quality is a share of tokens, not a perplexity.
SHARES = ("edit", "trace", "offline", "retrieval")


def test_runs_again_and_again(job, session):
    runs = [session.run() for _ in range(3)]
    for run in runs:
        assert run.seconds > 0
        if job.name == "batch-decode":
            # Prompts are read in turn, so early requests are ahead when the last one starts.
            assert 0 < run.units <= 5 * 5
            assert run.detail["whole_tokens"] == 5 * 6
            assert run.detail["whole_seconds"] >= run.seconds
        elif job.name == "offline":
            assert run.units == sum(len(given.prompt) for given in session.job) + run.detail["generated"]
        else:
            assert run.units == UNITS[job.name]
    assert session.llm.engine.busy is False


def test_quality_is_the_models_perplexity(job, session):
    value = session.quality()
    assert value == session.quality()  # deterministic
    assert 0 < value <= 1 if job.name in SHARES else 1 < value < float("inf")


def test_edit_judges_a_plan_by_the_plain_models_answers(tiny_plan, small_corpus):
    for techniques in ((), (PromptLookup(min_ngram=1, adaptive=False),)):
        with workloads.get("edit").open(
            tiny_plan(*techniques, dtype="auto"), {**SMALL["edit"], "tokens": 60}
        ) as session:
            assert session.quality() == 1.0
            run = session.run()
            assert ("acceptance_length" in run.detail) == bool(techniques)
    with workloads.get("edit").open(tiny_plan(dtype="auto"), SMALL["edit"]) as session:
        seen = []
        session.llm.generate = _record(session.llm.generate, seen)
        session.run()
        session.run()
        assert all(c.cached_tokens == 0 for c in seen)


def test_float32_is_its_own_reference(session):
    facts = session.facts()
    assert facts["greedy_agreement"] == 1.0
    assert facts["first_divergence"] == session.questions()[1]
    assert "/" not in facts["model"]


def test_reference_is_another_model_for_other_dtypes(job, tiny_plan, small_corpus, monkeypatch):
    from hasten.workloads import language

    opened = []

    class Spy(LLM):
        def __init__(self, plan):
            opened.append(plan.dtype)
            super().__init__(plan=plan)

    monkeypatch.setattr(language, "LLM", Spy)
    with job.open(tiny_plan(dtype="bfloat16"), SMALL[job.name]) as session:
        assert 0 <= session.facts()["greedy_agreement"] <= 1
        assert opened == ["bfloat16", "float32"]
    with job.open(tiny_plan(dtype="bfloat16"), {**SMALL[job.name], "reference": False}) as session:
        assert "greedy_agreement" not in session.facts()
        assert opened == ["bfloat16", "float32", "bfloat16"]


def test_bad_options_are_refused_before_a_model_is_loaded(job, tiny_plan):
    with pytest.raises(UnknownNameError, match=rf"option of {job.name} 'tokns'.*did you mean.*'tokens'"):
        job.open(tiny_plan(), {"tokns": 3})
    for bad in (0, -1, "many", None, 2.5):
        with pytest.raises(SettingError, match=rf"{job.name}: option tokens = "):
            job.open(tiny_plan(), {"tokens": bad})
    with pytest.raises(SettingError, match="reference"):
        job.open(tiny_plan(), {"reference": "perhaps"})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("decode", {"prompt_tokens": [100_000]}),
        ("prefill", {"tokens": 100_000}),
        ("batch-decode", {"prompt_tokens": 100_000}),
        ("shared-prefix", {"prefix_tokens": 100_000}),
        ("shared-prefix", {"questions": 100_000}),
        ("edit", {"passages": 100_000}),
        ("trace", {"prompt_tokens": 100_000}),
    ],
)
def test_jobs_larger_than_the_text_are_refused(name, options, tiny_plan, small_corpus):
    with (
        pytest.raises(MeasureError, match="windows"),
        workloads.get(name).open(tiny_plan(), options) as session,
    ):
        session.run()


def test_long_decode_must_fit_the_model(tiny_plan, small_corpus):
    for context in (513, 8192, 10):
        with pytest.raises(SettingError, match=f"context = {context}"):
            workloads.get("long-decode").open(tiny_plan(), {"context": context, "tokens": 10})


def test_prefill_never_reads_the_same_text_twice(tiny_plan, small_corpus):
    with workloads.get("prefill").open(tiny_plan(), SMALL["prefill"]) as session:
        seen = []
        session.llm.generate = _record(session.llm.generate, seen)
        for _ in range(5):
            session.run()
    assert len({tuple(c.prompt_token_ids) for c in seen}) == len(seen) == 10
    # Two windows may happen to begin with the same page of four tokens ("art "), never with more.
    assert all(c.cached_tokens <= 4 for c in seen)


def test_shared_prefix_shares_within_a_run_and_not_across_runs(tiny_plan, small_corpus):
    with workloads.get("shared-prefix").open(tiny_plan(), SMALL["shared-prefix"]) as session:
        session.quality()
        for _ in range(3):
            seen = []
            generate = session.llm.generate
            session.llm.generate = _record(generate, seen)
            session.run()
            session.llm.generate = generate
            assert len({tuple(c.prompt_token_ids[:50]) for c in seen}) == 1
            assert len({tuple(c.prompt_token_ids[50:]) for c in seen}) == 4
            assert min(c.cached_tokens for c in seen) == 0
            assert sorted(c.cached_tokens for c in seen)[1] >= 48


def _record(generate, seen):
    def recording(*args, **kwargs):
        done = generate(*args, **kwargs)
        seen.extend(done)
        return done

    return recording


def test_decode_times_only_the_decoding(tiny_plan, small_corpus):
    with workloads.get("decode").open(tiny_plan(), SMALL["decode"]) as session:
        seen = []
        session.llm.generate = _record(session.llm.generate, seen)
        run = session.run()
    assert run.seconds == pytest.approx(sum(c.timing.total - c.timing.first_token for c in seen))
    assert [len(c.prompt_token_ids) for c in seen] == [5, 9]


class TestForks:
    def test_equals_scoring_each_text_alone(self, tiny_plan, small_corpus):
        llm = LLM(plan=tiny_plan())
        prefix = llm.tokenizer.encode("A river runs to the sea, and")  # ends inside a page
        questions = [llm.tokenizer.encode(q) for q in (" why?", " where to, and when?", " x")]
        answers = [llm.tokenizer.encode(a) for a in ("Because.", "y", "The sea is never full.")]
        together = score_forks(llm.engine, prefix, questions, answers)
        for question, answer, score in zip(questions, answers, together, strict=True):
            alone = llm.score([*prefix, *question, *answer], context=len(prefix) + len(question))
            assert score.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
            assert score.token_ids == tuple(answer)

    def test_shares_the_prefix_and_gives_every_page_back(self, tiny_plan):
        llm = LLM(plan=tiny_plan(kv_tokens=80))
        free, most = llm.engine.cache.pool.free, []
        run = llm.engine.runner.run
        llm.engine.runner.run = lambda chunks: most.append(llm.engine.cache.pool.used) or run(chunks)
        score_forks(llm.engine, [5] * 40, [[7], [8], [9]], [[3, 4]] * 3)
        assert max(most) <= 10 + 3  # ten pages of the prefix, one of each fork
        assert llm.engine.cache.pool.free == free
        with pytest.raises(RequestError, match="do not fit"):
            score_forks(llm.engine, [5] * 70, [[7]] * 4, [[3] * 8] * 4)
        assert llm.engine.cache.pool.free == free

    def test_refuses_what_it_cannot_do(self, tiny_plan):
        llm = LLM(plan=tiny_plan())
        with pytest.raises(RequestError, match="must not be empty"):
            score_forks(llm.engine, [5], [[6], []], [[7], [8]])
        with pytest.raises(RequestError, match="9 forks"):
            score_forks(llm.engine, [5], [[6]] * 9, [[7]] * 9)
        with pytest.raises(RequestError, match="do not fit"):
            score_forks(llm.engine, [5] * 600, [[6]], [[7]])


class TestText:
    def test_windows_are_exact_distinct_and_mixed(self, tiny_plan, small_corpus):
        text = Text(LLM(plan=tiny_plan()).tokenizer)
        placed = text.placed(50, 6)
        assert [document.name for document, _ in placed] == ["alpha", "beta", "gamma"] * 2
        assert all(len(ids) == 50 for _, ids in placed)
        assert text.windows(50, 4, skip=2) == [ids for _, ids in placed][2:]
        assert len({tuple(ids) for _, ids in placed}) == 6

    def test_a_start_token_is_put_first_where_the_model_wants_it(self, tiny_plan, small_corpus):
        tokenizer = LLM(plan=tiny_plan()).tokenizer
        tokenizer.adds_bos, tokenizer.bos_id = True, 1
        first, second = Text(tokenizer, only=lambda d: d.name == "alpha").windows(10, 2)
        assert first[0] == second[0] == 1
        assert len(first) == 10
        assert first[1:] + second[1:] == tokenizer.encode(small_corpus[0].text)[:18]
        with pytest.raises(MeasureError, match="holds no text"):
            Text(tokenizer).windows(1, 1)

    def test_only_admitted_documents(self, tiny_plan, small_corpus):
        text = Text(LLM(plan=tiny_plan()).tokenizer, only=lambda d: d.name == "beta")
        assert {d.name for d, _ in text.placed(50, 5)} == {"beta"}

    def test_names_how_many_there_are(self, tiny_plan, small_corpus):
        text = Text(LLM(plan=tiny_plan()).tokenizer)
        with pytest.raises(MeasureError, match=r"has \d+ windows of 200 tokens, 1000 are needed"):
            text.windows(200, 1000)


@pytest.mark.parametrize(
    ("answers", "reference", "expected"),
    [
        ([[1, 2, 3]], [[1, 2, 3]], (1.0, 3.0)),
        ([[1, 2, 3]], [[1, 9, 3]], (0.6667, 1.0)),
        ([[1, 2], [5, 6]], [[1, 2], [7, 8]], (0.5, 1.0)),
        ([[1]], [[1, 2, 3, 4]], (0.25, 1.0)),
    ],
)
def test_agreement(answers, reference, expected):
    assert agreement(answers, reference) == expected


def test_perplexity_weighs_tokens_not_texts():
    assert perplexity([Score((1,), [-1.0]), Score((1, 2, 3), [0.0] * 3)]) == pytest.approx(2.718281828**0.25)
    with pytest.raises(MeasureError, match="no token"):
        perplexity([])
    with pytest.raises(MeasureError, match="overflows"):
        perplexity([Score((1,), [-1e6])])


def test_a_failed_answer_is_not_measured(tiny_plan):
    llm = LLM(plan=tiny_plan())
    llm.engine.runner.decoder.norm.weight.data.fill_(float("nan"))
    with pytest.raises(MeasureError, match="prompt 0 ended with 'error'"):
        generate(llm, [[5, 6]], 3)


def test_greedy_goes_on_past_the_end():
    params = greedy(7)
    assert (params.max_tokens, params.temperature, params.ignore_eos) == (7, 0.0, True)
