"""``decode``: one request at a time, answered token by token. What a chat on a laptop feels like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from hasten.core.plan import Plan
from hasten.workloads.language import LanguageOptions, LanguageSession, LanguageWorkload, generate, perplexity
from hasten.workloads.workload import Run, Session


class DecodeOptions(LanguageOptions):
    prompt_tokens: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (64, 256, 512), min_length=1, description="lengths of the prompts, answered one after another"
    )
    tokens: int = Field(64, ge=2, description="tokens to generate for each prompt")
    quality_texts: int = Field(8, ge=1, description="texts scored for perplexity")
    quality_context: int = Field(64, ge=1, description="tokens before the first scored one of each text")
    quality_tokens: int = Field(128, ge=1, description="scored tokens of each text")


class Decode(LanguageWorkload[DecodeOptions]):
    """Single-stream decoding. Timed: from each first token to the last; reading the prompts is not.

    Perplexity is measured through the decode path, so that whatever acts at decode shows in it.
    """

    name = "decode"
    title = "single-stream decoding"

    def open(self, plan: Plan, options: Mapping[str, Any] | None = None) -> Session:
        return DecodeSession(plan, DecodeOptions.read(self.name, options))


class DecodeSession(LanguageSession[DecodeOptions]):
    def __init__(self, plan: Plan, options: DecodeOptions) -> None:
        super().__init__(plan, options)
        self.prompts = [
            self.text.windows(length, 1, skip=number)[0]
            for number, length in enumerate(options.prompt_tokens)
        ]

    def run(self) -> Run:
        units, seconds = 0, 0.0
        detail = {}
        for prompt in self.prompts:
            done = generate(self.llm, [prompt], self.options.tokens)[0]
            decoding = done.timing.total - done.timing.first_token
            units += len(done.token_ids) - 1
            seconds += decoding
            detail[f"seconds_at_{len(prompt)}"] = decoding
        return Run(units, seconds, detail)

    def quality(self) -> float:
        o = self.options
        texts = self.text.windows(o.quality_context + o.quality_tokens, o.quality_texts)
        return perplexity(self.llm.score(texts, context=o.quality_context, mode="decode"))

    def questions(self) -> tuple[list[list[int]], int]:
        return self.prompts, self.options.tokens
