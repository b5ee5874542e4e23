"""``long-decode``: one request with a long context, answered token by token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from hasten.core.errors import SettingError
from hasten.core.plan import Plan
from hasten.workloads.language import LanguageOptions, LanguageSession, LanguageWorkload, generate, perplexity
from hasten.workloads.workload import Run, Session


class LongDecodeOptions(LanguageOptions):
    context: int | None = Field(
        None, ge=4, description="tokens of prompt and answer; None: 8192 or the model's limit if lower"
    )
    tokens: int = Field(64, ge=2, description="tokens to generate")
    quality_texts: int = Field(1, ge=1, description="long texts scored for perplexity")
    quality_tokens: int = Field(256, ge=1, description="tokens scored at the end of each text")


class LongDecode(LanguageWorkload[LongDecodeOptions]):
    """Decoding at the end of a long context. Timed: from the first token to the last.

    The prompt is the same in every run, so a plan with a prefix cache reads it once. Perplexity is that of the last
    tokens of texts as long as the context, fed one at a time (teacher forced) through the decode path.
    """

    name = "long-decode"
    title = "decoding at the end of a long context"

    def open(self, plan: Plan, options: Mapping[str, Any] | None = None) -> Session:
        return LongDecodeSession(plan, LongDecodeOptions.read(self.name, options))


class LongDecodeSession(LanguageSession[LongDecodeOptions]):
    def __init__(self, plan: Plan, options: LongDecodeOptions) -> None:
        super().__init__(plan, options)
        limit = self.llm.engine.context
        self.context = options.context or min(8192, limit)
        longest = max(options.tokens, options.quality_tokens)
        if not longest < self.context <= limit:
            raise SettingError(
                f"long-decode: context = {self.context} must be above tokens and quality_tokens ({longest}) and "
                f"within the model's {limit}"
            )
        self.prompt = self.text.windows(self.context - options.tokens, 1)[0]

    def run(self) -> Run:
        done = generate(self.llm, [self.prompt], self.options.tokens)[0]
        seconds = done.timing.total - done.timing.first_token
        detail = {"first_token_seconds": done.timing.first_token, "cached_tokens": float(done.cached_tokens)}
        return Run(len(done.token_ids) - 1, seconds, detail)

    def quality(self) -> float:
        texts = self.text.windows(self.context, self.options.quality_texts, skip=1)
        first = self.context - self.options.quality_tokens
        return perplexity(self.llm.score(texts, context=first, mode="decode"))

    def questions(self) -> tuple[list[list[int]], int]:
        return [self.prompt], self.options.tokens
