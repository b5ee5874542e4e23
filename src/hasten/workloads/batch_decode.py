"""``batch-decode``: many requests decoded together, as a busy server does."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from hasten.core.errors import MeasureError
from hasten.core.plan import Plan
from hasten.lm.request import Delta
from hasten.workloads.language import (
    LanguageOptions,
    LanguageSession,
    LanguageWorkload,
    check_answer,
    greedy,
    perplexity,
)
from hasten.workloads.workload import Run, Session


class BatchDecodeOptions(LanguageOptions):
    requests: int = Field(32, ge=1, description="requests submitted together")
    prompt_tokens: int = Field(128, ge=1, description="tokens of each prompt")
    tokens: int = Field(64, ge=2, description="tokens to generate for each request")
    quality_texts: int = Field(32, ge=1, description="texts scored for perplexity, decoded together")
    quality_context: int = Field(64, ge=1, description="tokens before the first scored one of each text")
    quality_tokens: int = Field(64, ge=1, description="scored tokens of each text")


class BatchDecode(LanguageWorkload[BatchDecodeOptions]):
    """Decoding of many requests at once. Timed: from the moment when every request has its first token to the
    last token of all; counted: the tokens made in that time. Reading the prompts is `prefill`'s business.

    Perplexity is that of texts decoded together (teacher forced), so that batched kernels are what is judged.
    """

    name = "batch-decode"
    title = "decoding many requests together"

    def open(self, plan: Plan, options: Mapping[str, Any] | None = None) -> Session:
        return BatchDecodeSession(plan, BatchDecodeOptions.read(self.name, options))


class BatchDecodeSession(LanguageSession[BatchDecodeOptions]):
    def __init__(self, plan: Plan, options: BatchDecodeOptions) -> None:
        super().__init__(plan, options)
        self.prompts = self.text.windows(options.prompt_tokens, options.requests)

    def run(self) -> Run:
        engine = self.llm.engine
        heard: list[tuple[int, float, int]] = []  # request, time, tokens

        def listen(number: int) -> Any:
            def hear(delta: Delta) -> None:
                heard.append((number, time.perf_counter(), len(delta.token_ids)))

            return hear

        began = time.perf_counter()
        requests = [
            engine.submit(prompt, greedy(self.options.tokens), on_delta=listen(number))
            for number, prompt in enumerate(self.prompts)
        ]
        engine.run()
        for number, request in enumerate(requests):
            if request.failure is not None:
                raise request.failure
            check_answer(number, request.completion())
        first: dict[int, float] = {}
        for number, when, _ in heard:
            first.setdefault(number, when)
        start, end = max(first.values()), max(when for _, when, _ in heard)
        units = sum(tokens for _, when, tokens in heard if when > start)
        if units == 0:
            raise MeasureError(
                "no token was decoded after the last request had its first one; raise option tokens"
            )
        detail = {"whole_seconds": end - began, "whole_tokens": float(sum(tokens for *_, tokens in heard))}
        return Run(units, end - start, detail)

    def quality(self) -> float:
        o = self.options
        texts = self.text.windows(o.quality_context + o.quality_tokens, o.quality_texts)
        return perplexity(self.llm.score(texts, context=o.quality_context, mode="decode"))

    def questions(self) -> tuple[list[list[int]], int]:
        return self.prompts, self.options.tokens
