"""``shared-prefix``: many questions about one document, asked at once."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from hasten.core.plan import Plan
from hasten.models.tokenizer import Tokenizer
from hasten.workloads.corpus import sections
from hasten.workloads.forks import score_forks
from hasten.workloads.language import LanguageOptions, LanguageSession, LanguageWorkload, generate, perplexity
from hasten.workloads.text import Text
from hasten.workloads.workload import Run, Session

_QUESTION = '\n\nQuestion: what does the documentation say about "{heading}"?\nAnswer:'


class SharedPrefixOptions(LanguageOptions):
    prefix_tokens: int = Field(2048, ge=1, description="tokens of the document that all questions share")
    questions: int = Field(16, ge=1, description="questions asked at once")
    tokens: int = Field(64, ge=1, description="tokens to answer to each question")
    quality_documents: int = Field(1, ge=1, description="documents scored for perplexity")
    quality_tokens: int = Field(48, ge=1, description="most tokens scored of each question's true answer")


class SharedPrefix(LanguageWorkload[SharedPrefixOptions]):
    """The whole job: read the document, read the questions, answer all. Counted: the answers' tokens.

    Every run has a document of its own, so the prefix cache helps within a run and never across runs. Perplexity is
    that of the documentation's own words about each heading, after the shared document and the question, all
    questions decoded together on shared pages (teacher forced).
    """

    name = "shared-prefix"
    title = "many questions about one document"

    def open(self, plan: Plan, options: Mapping[str, Any] | None = None) -> Session:
        return SharedPrefixSession(plan, SharedPrefixOptions.read(self.name, options))


@dataclass(frozen=True)
class Task:
    """A document's window with questions and true answers, all as token ids."""

    prefix: list[int]
    questions: list[list[int]]
    answers: list[list[int]]

    def prompts(self) -> list[list[int]]:
        return [self.prefix + question for question in self.questions]


def documents(tokenizer: Tokenizer, questions: int) -> Text:
    """The documents that have enough sections to ask about."""
    return Text(tokenizer, only=lambda document: len(list(sections(document))) >= questions)


def task(text: Text, number: int, options: SharedPrefixOptions) -> Task:
    """The ``number``-th task: each has a window of its own."""
    document, prefix = text.placed(options.prefix_tokens, 1, skip=number)[0]
    encode = text.tokenizer.encode
    found = list(sections(document))[: options.questions]
    return Task(
        prefix,
        [encode(_QUESTION.format(heading=section.heading)) for section in found],
        [encode(" " + section.passage)[: options.quality_tokens] for section in found],
    )


class SharedPrefixSession(LanguageSession[SharedPrefixOptions]):
    runs = 0

    def __init__(self, plan: Plan, options: SharedPrefixOptions) -> None:
        super().__init__(plan, options)
        self.text = documents(self.llm.tokenizer, options.questions)

    def run(self) -> Run:
        # The first tasks are kept for quality and facts: a timed run must not find them in the prefix cache.
        prompts = task(self.text, self.options.quality_documents + self.runs, self.options).prompts()
        self.runs += 1
        began = time.perf_counter()
        done = generate(self.llm, prompts, self.options.tokens)
        seconds = time.perf_counter() - began
        first = max(completion.timing.first_token for completion in done)
        cached = float(sum(completion.cached_tokens for completion in done))
        units = sum(len(completion.token_ids) for completion in done)
        return Run(units, seconds, {"last_first_token_seconds": first, "cached_tokens": cached})

    def quality(self) -> float:
        scores = []
        for number in range(self.options.quality_documents):
            asked = task(self.text, number, self.options)
            scores += score_forks(self.llm.engine, asked.prefix, asked.questions, asked.answers)
        return perplexity(scores)

    def questions(self) -> tuple[list[list[int]], int]:
        return task(self.text, 0, self.options).prompts(), self.options.tokens
