"""``offline``: a job of many requests, all known at the start; only when the last one ends matters.

Two kinds of requests (`hasten.workloads.mixes`): *classify*, long prompts of real text of which groups share a
document, with a short answer, and *write*, short prompts with a long answer. Each kind begins with an instruction of
its own.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import Field

from hasten.core.plan import Plan
from hasten.lm.llm import LLM
from hasten.lm.scheduling.resources import NOMINAL
from hasten.models.tokenizer import Tokenizer
from hasten.workloads.language import (
    LanguageOptions,
    LanguageSession,
    LanguageWorkload,
    agreement,
    check_answer,
    greedy,
)
from hasten.workloads.mixes import Kind, Shape, job, saved
from hasten.workloads.text import Text
from hasten.workloads.trace import IDENTICAL
from hasten.workloads.workload import Run, Session

_CLASSIFY = "Say in a few words what the following text is about.\n\n"
_WRITE = "Go on with the following text, as long as you like.\n\n"


class OfflineOptions(LanguageOptions):
    requests: int = Field(64, ge=2, description="requests in all")
    writing: float = Field(0.5, ge=0, le=1, description="share of requests with long answers")
    density: float | None = Field(
        None, gt=0, description="arithmetic over reading, of a nominal machine; instead of writing"
    )
    sharing: float = Field(0.35, ge=0, lt=1, description="share of prompt tokens that sharing can save")
    group: int = Field(8, ge=2, description="requests that share a document")
    prompt_tokens: int = Field(512, ge=32, description="tokens of a prompt with a short answer, on average")
    answer_tokens: int = Field(8, ge=2, description="tokens of a short answer, on average")
    short_tokens: int = Field(64, ge=32, description="tokens of a prompt with a long answer, on average")
    tokens: int = Field(128, ge=2, description="tokens of a long answer, on average")
    seed: int = Field(0, ge=0, description="of lengths and order")
    quality_requests: int = Field(8, ge=1, description="requests whose tokens are compared, all at once")


class Offline(LanguageWorkload[OfflineOptions]):
    """The whole job, from the first request to the last token. Counted: all tokens of prompts and answers.

    Quality is the share of generated tokens that are those of first come, first served. The prefix cache is on, in all
    arms, and emptied before every run.
    """

    name = "offline"
    title = "a job of many requests, known at the start"
    metric = IDENTICAL

    def baseline(self, model: str | None = None) -> Plan:
        return Plan.of(model=model)

    def open(self, plan: Plan, options: Mapping[str, Any] | None = None) -> Session:
        return OfflineSession(plan, OfflineOptions.read(self.name, options))


@dataclass(frozen=True)
class Given:
    """A request of the job, as token ids, and how many tokens it generates."""

    prompt: list[int]
    tokens: int


def shapes(options: OfflineOptions) -> list[Shape]:
    """The job's lengths and groups. Raises `MeasureError` for a mix that does not exist."""
    return job(
        NOMINAL,
        requests=options.requests,
        writing=options.writing,
        density=options.density,
        sharing=options.sharing,
        classify=Kind(options.prompt_tokens, options.answer_tokens),
        write=Kind(options.short_tokens, options.tokens),
        group=options.group,
        seed=options.seed,
    )


def requests(tokenizer: Tokenizer, text: Text, chosen: Sequence[Shape]) -> list[Given]:
    """The job with real text: an instruction, the group's document, then text of its own; no two texts overlap.

    Raises `MeasureError` when the corpus has too little text.
    """
    classify, write = (tokenizer.encode(start) for start in (_CLASSIFY, _WRITE))
    common = {shape.group: shape.shared for shape in chosen if shape.group >= 0}
    wanted = [max(1, shared - len(classify)) for shared in common.values()]
    starts = [classify if shape.group >= 0 else write for shape in chosen]
    own = [
        max(2, shape.prompt - max(shape.shared, len(start)))
        for shape, start in zip(chosen, starts, strict=True)
    ]
    cut = text.cuts([*wanted, *own])
    documents = dict(zip(common, cut, strict=False))
    made = []
    for shape, start, rest in zip(chosen, starts, cut[len(wanted) :], strict=True):
        document = documents[shape.group] if shape.shared > len(start) else []
        made.append(Given([*start, *document, *rest], shape.output))
    return made


class OfflineSession(LanguageSession[OfflineOptions]):
    def __init__(self, plan: Plan, options: OfflineOptions) -> None:
        chosen = shapes(options)
        super().__init__(plan, options)
        self.job = requests(self.llm.tokenizer, self.text, chosen)
        self.possible = saved(chosen) / sum(shape.prompt for shape in chosen)

    def run(self) -> Run:
        began = time.perf_counter()
        answers, cached = serve(self.llm, self.job)
        seconds = time.perf_counter() - began
        prompts = sum(len(given.prompt) for given in self.job)
        generated = sum(map(len, answers))
        detail = {
            "generated": float(generated),
            "shared": cached / prompts,
            "shareable": self.possible,
        }
        return Run(prompts + generated, seconds, detail)

    def quality(self) -> float:
        asked = self.job[: self.options.quality_requests]
        others = tuple(t for t in self.plan.techniques if "scheduler" not in t.slots)
        with LLM(plan=replace(self.plan, techniques=others)) as plain:
            wanted, _ = serve(plain, asked)
        return agreement(serve(self.llm, asked)[0], wanted)[0]

    def questions(self) -> tuple[list[list[int]], int]:
        asked = self.job[: self.options.quality_requests]
        return [given.prompt for given in asked], self.options.answer_tokens


def serve(llm: LLM, job: Sequence[Given]) -> tuple[list[tuple[int, ...]], int]:
    """(tokens of every answer, prompt tokens taken from the prefix cache), from an empty prefix cache on."""
    llm.forget_prefixes()
    asked = [llm.engine.submit(given.prompt, greedy(given.tokens)) for given in job]
    llm.engine.run()
    answers = []
    for number, request in enumerate(asked):
        if request.failure is not None:
            raise request.failure
        completion = request.completion()
        check_answer(number, completion)
        answers.append(completion.token_ids)
    return answers, sum(request.ledger.cached for request in asked)
