"""document-qa: planted lines, questions about them, and the job on a tiny model."""

from __future__ import annotations

import pytest

from hasten.core.errors import MeasureError, RequestError, SettingError
from hasten.lm.context.ape import APE
from hasten.lm.context.longllmlingua import LongLLMLingua
from hasten.lm.llm import LLM
from hasten.workloads import get
from hasten.workloads.document_qa import Passage, Question, library, question

SMALL = {
    "library": 3,
    "passages": 2,
    "passage_tokens": 48,
    "questions": 2,
    "tokens": 3,
    "quality_questions": 2,
    "reference": False,
}


@pytest.fixture
def tokenizer(tiny_path):
    from hasten.models.checkpoint import open_checkpoint

    return open_checkpoint(tiny_path).tokenizer()


def test_every_passage_says_something_of_its_own(tokenizer, small_corpus):
    passages = library(tokenizer, 6, 64)
    assert len({p.subject for p in passages}) == 6
    for p in passages:
        line = f"The {p.subject} is {p.answer}."
        assert p.text.count(line) == 1
        assert line in p.text.split("\n")
    assert library(tokenizer, 6, 64) == passages
    assert library(tokenizer, 6, 64, seed=1) != passages
    with pytest.raises(RequestError, match="1 to 40 passages, not 41"):
        library(tokenizer, 41, 64)


def test_a_question_is_given_its_passage_among_others(tokenizer, small_corpus, tiny_plan):
    passages = library(tokenizer, 6, 64)
    asked = [question(passages, 2, 4, "seed", i) for i in range(8)]
    for one in asked:
        assert one.passage is passages[2]
        assert len(set(one.passages)) == 4
        assert passages[2].subject in one.text
    assert len({one.passages for one in asked}) > 4  # orders and companions differ
    assert question(passages, 2, 4, "seed", 0) == asked[0]
    with LLM(tiny_plan()) as llm:
        prompt = asked[0].prompt(llm)
        assert prompt.question == asked[0].text
        assert prompt.joined().endswith(f"The {passages[2].subject} is")
        assert [text.strip() for text in prompt.contexts] == [p.text for p in asked[0].passages]


@pytest.mark.parametrize(
    ("answer", "exact", "f1"),
    [
        (" amber falcon 47.", True, 1.0),
        (" Amber-Falcon 47, as", True, 1.0),
        (" amber falcon 4", False, 2 / 3),
        (" the amber falcon 47", False, 2 / 3),
        (" violet otter", False, 0.0),
        ("", False, 0.0),
    ],
)
def test_an_answer_is_judged_by_its_first_words(answer, exact, f1):
    asked = Question((Passage("", "label of the ship", "amber falcon 47"),), 0)
    assert asked.exact(answer) is exact
    assert asked.f1(answer) == pytest.approx(f1)


@pytest.mark.parametrize("use", [(), (APE(),), (LongLLMLingua(rate=0.5, slack=0, segment=16),)])
def test_the_job_runs_with_and_without_techniques(use, tiny_plan, small_corpus):
    plan = tiny_plan(*use, page_size=8, kv_tokens=4096)
    with get("document-qa").open(plan, SMALL) as session:
        runs = [session.run(), session.run()]
        assert [run.units for run in runs] == [6, 6]
        assert all(0 < run.detail["first_token_seconds"] < run.seconds for run in runs)
        assert 0 <= session.quality() <= 1
        facts = session.facts()
        assert facts["answer_loss"] > 0
        if use and use[0].slug == "ape":
            (transform,) = session.llm.engine.parts.transforms
            assert transform.store.encoded == 4  # three passages and the prefix, however many questions


def test_options_are_refused_by_name(tiny_plan, small_corpus):
    with pytest.raises(MeasureError, match="raise option library"):
        get("document-qa").open(tiny_plan(), {**SMALL, "passages": 5})
    with pytest.raises(SettingError, match="passage_tokens"):
        get("document-qa").open(tiny_plan(), {**SMALL, "passage_tokens": 1})
