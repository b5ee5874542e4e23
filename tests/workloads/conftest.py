"""A tiny model and a tiny corpus, so that whole workloads run in a moment."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "lm"))


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory):
    from lm_tiny import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def tiny_plan(tiny_path):
    """``tiny_plan(dtype="float32", technique, ...)``: a plan of the tiny model."""
    from hasten.core.plan import Plan

    def make(*techniques, dtype="float32", **engine):
        engine = {"page_size": 4, "max_step_tokens": 32, "max_batch": 8, **engine}
        return Plan(str(tiny_path), techniques, dtype, engine)

    return make


@pytest.fixture
def small_corpus(monkeypatch, hasten_home):
    """Three documents of eight sections each stand for the corpus."""
    from hasten.core.corpus import Document
    from hasten.workloads import knowledge, text

    def section(document, number):
        # Words that never repeat: a prompt is found in the prefix cache only if it was really seen before.
        digests = (hashlib.sha256(f"{document} {number} {i}".encode()).hexdigest() for i in range(60))
        words = " ".join(digest[:5] for digest in digests)
        return f"## Part {number} of {document}\n\nPassage {number} of {document}. {words}\n\n"

    documents = [
        Document(name, f"{name}: a document\n\n" + "".join(section(name, number) for number in range(8)))
        for name in ("alpha", "beta", "gamma")
    ]

    class Small:
        sha256 = "small"

        def documents(self, split):
            return [*documents, Document("short", "Too short for anything.")]

    Small.all_documents = documents
    monkeypatch.setattr(text, "corpus", Small)
    monkeypatch.setattr(knowledge, "corpus", Small)
    return documents
