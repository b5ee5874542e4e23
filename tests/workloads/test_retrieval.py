from __future__ import annotations

import builtins

import numpy as np
import pytest

from hasten import workloads
from hasten.core.errors import RequestError, SettingError, UnsupportedError
from hasten.lm.context.retrieval import Clock
from hasten.lm.kvcache.ragcache import RagCache
from hasten.workloads.retrieval_trace import popularity, trace

from .test_language import SMALL


def test_a_trace_is_skewed_endless_and_the_same_for_everybody():
    weights = popularity(1000)
    assert weights.sum() == pytest.approx(1)
    assert weights[:30].sum() == pytest.approx(0.6, abs=1e-6)
    assert (np.diff(weights) <= 0).all()
    whole, rest = trace(300, 50, 2.0), trace(100, 50, 2.0, skip=200)
    assert [a.page for a in whole[200:]] == [a.page for a in rest]
    assert [a.question for a in whole[200:]] == [a.question for a in rest]
    assert rest[0].at == 0
    assert 0.3 < np.diff([a.at for a in whole]).mean() < 0.7
    assert {a.at for a in trace(9, 50, 0)} == {0.0}
    assert [a.page for a in trace(99, 50, 2.0, seed=1)] != [a.page for a in whole[:99]]
    with pytest.raises(SettingError, match="no Zipf law"):
        popularity(10, share=0.01)


def test_without_the_libraries_the_extra_is_named(tiny_plan, small_corpus, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "faiss":
            raise ImportError("No module named 'faiss'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UnsupportedError, match=r"faiss-cpu.*hasten\[retrieval\]"):
        workloads.get("retrieval").open(tiny_plan(), SMALL["retrieval"])


class TestIndex:
    @pytest.fixture
    def knowledge(self, small_corpus, optional):
        optional("faiss")
        from hasten.workloads.knowledge import Knowledge

        return Knowledge(20, 4, least=40)

    def test_a_question_finds_its_page(self, knowledge):
        from hasten.workloads.knowledge import IndexSearch

        for number, page in enumerate(knowledge.pages):
            clock, words = Clock(), " ".join(page.text.split()[10:16])
            search = IndexSearch(knowledge, words, k=3, probes=4, stages=2, clock=clock, asked_at=clock.now())
            found = search.poll()
            assert found.final
            assert number in found.documents
            assert len(found.documents) == 3

    def test_stages_come_when_they_are_due_and_end_like_one_search(self, knowledge):
        from hasten.workloads.knowledge import IndexSearch

        clock = Clock()
        options = {"k": 2, "probes": 4, "stages": 4, "clock": clock, "asked_at": clock.now()}
        search = IndexSearch(knowledge, "Part 3 of beta", seconds=400, **options)
        at_once = IndexSearch(knowledge, "Part 3 of beta", **options).poll()
        assert search.poll() is None
        seen = []
        for _ in range(4):
            clock.skip(search.due)
            seen.append(search.poll())
        assert clock.now() >= 400
        assert seen[-1] == at_once
        assert not any(found.final for found in seen[:-1] if found is not None)

    def test_it_is_built_once(self, knowledge, monkeypatch):
        from hasten.workloads.knowledge import Knowledge

        monkeypatch.setattr(Knowledge, "_build", None)
        again = Knowledge(20, 4, least=40)
        question = again.embed(["Part 3 of beta"])
        assert again.search(question, again.probe(question, 4), 5) == knowledge.search(
            question, knowledge.probe(question, 4), 5
        )
        assert np.isfinite(again.embed(["", "zzzz \N{SNOWMAN}"])).all()

    def test_what_does_not_fit_is_refused(self, small_corpus, optional):
        optional("faiss")
        from hasten.workloads.knowledge import Knowledge

        for count, lists in ((10_000, 4), (0, 1), (5, 9), (5, 0)):
            with pytest.raises(RequestError):
                Knowledge(count, lists, least=40)


def test_the_technique_changes_no_answer_and_guesses_while_searching(tiny_plan, small_corpus, optional):
    optional("faiss")
    options = {**SMALL["retrieval"], "search_seconds": 0.2, "rate": 0.1, "requests": 6, "reference": False}
    with workloads.get("retrieval").open(tiny_plan(RagCache(host_mb=4)), options) as session:
        runs = [session.run() for _ in range(2)]
        assert all(run.units == 6 for run in runs)
        assert runs[0].detail["guesses"] > 0
        assert runs[0].detail["guesses_used"] > 0
        assert runs[1].detail["cached_share"] > 0
        assert runs[0].detail["mean_first_token_seconds"] >= 0.2
        assert session.quality() == 1.0
        assert 0 < session.facts()["retrieval_recall"] <= 1
