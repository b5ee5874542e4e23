"""``long-prefill``: how long a prompt of thousands of tokens takes until its first answer token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from hasten.core.errors import SettingError
from hasten.core.plan import Plan
from hasten.workloads.language import LanguageOptions, LanguageSession, LanguageWorkload, generate, perplexity
from hasten.workloads.workload import Run, Session

STEP = 8192


class LongPrefillOptions(LanguageOptions):
    tokens: int = Field(7936, ge=4, description="tokens of the prompt")
    quality_texts: int = Field(1, ge=1, description="texts whose continuation is scored for perplexity")
    quality_tokens: int = Field(256, ge=1, description="tokens scored after the prompt of each text")
    answer_tokens: int = Field(32, ge=1, description="answer length when comparing with the reference")


class LongPrefill(LanguageWorkload[LongPrefillOptions]):
    """Reading a long prompt. Timed: from submission to the first token, the prompt in steps of up to 8192 rows.

    Every run reads the same prompt; there is no prefix cache to find it in. Perplexity is that of the tokens that
    follow prompts of this length, fed one at a time: what the prompt's reading left in the cache is what is judged.
    """

    name = "long-prefill"
    title = "reading a long prompt"

    def baseline(self, model: str | None = None) -> Plan:
        return Plan.of(model=model, engine={"prefix_cache": False, "max_step_tokens": STEP})

    def open(self, plan: Plan, options: Mapping[str, Any] | None = None) -> Session:
        return LongPrefillSession(plan, LongPrefillOptions.read(self.name, options))


class LongPrefillSession(LanguageSession[LongPrefillOptions]):
    def __init__(self, plan: Plan, options: LongPrefillOptions) -> None:
        super().__init__(plan, options)
        limit = self.llm.engine.context
        longest = max(options.quality_tokens, options.answer_tokens)
        self.tokens = options.tokens
        if self.tokens + longest > limit:
            raise SettingError(
                f"long-prefill: a prompt of {self.tokens} tokens and {longest} more (quality_tokens, answer_tokens) do "
                f"not fit the model's {limit}"
            )
        self.prompt = self.text.windows(self.tokens, 1)[0]

    def run(self) -> Run:
        done = generate(self.llm, [self.prompt], 1)[0]
        return Run(self.tokens, done.timing.first_token, {"cached_tokens": float(done.cached_tokens)})

    def quality(self) -> float:
        texts = self.text.windows(self.tokens + self.options.quality_tokens, self.options.quality_texts)
        return perplexity(self.llm.score(texts, context=self.tokens, mode="decode"))

    def questions(self) -> tuple[list[list[int]], int]:
        return [self.prompt], self.options.answer_tokens
