"""``prefill``: how long a prompt takes until the first token of its answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from hasten.core.plan import Plan
from hasten.workloads.language import LanguageOptions, LanguageSession, LanguageWorkload, generate, perplexity
from hasten.workloads.workload import Run, Session


class PrefillOptions(LanguageOptions):
    tokens: int = Field(512, ge=2, description="tokens of a prompt; 512 and 2048 are the published sizes")
    prompts: int = Field(2, ge=1, description="prompts of one run, one after another")
    quality_texts: int = Field(4, ge=1, description="texts scored for perplexity")
    quality_tokens: int = Field(1024, ge=2, description="tokens of each text")
    answer_tokens: int = Field(32, ge=1, description="answer length when comparing with the reference")


class Prefill(LanguageWorkload[PrefillOptions]):
    """Reading prompts. Timed: from submission to the first token. Every run reads text it has not seen, so no
    prompt is found in the prefix cache.
    """

    name = "prefill"
    title = "reading a prompt"

    def open(self, plan: Plan, options: Mapping[str, Any] | None = None) -> Session:
        return PrefillSession(plan, PrefillOptions.read(self.name, options))


class PrefillSession(LanguageSession[PrefillOptions]):
    runs = 0

    def run(self) -> Run:
        o = self.options
        prompts = self.text.windows(o.tokens, o.prompts, skip=self.runs * o.prompts)
        self.runs += 1
        seconds = 0.0
        for prompt in prompts:
            done = generate(self.llm, [prompt], 1)[0]
            seconds += done.timing.first_token
        return Run(o.tokens * o.prompts, seconds)

    def quality(self) -> float:
        o = self.options
        return perplexity(
            self.llm.score(self.text.windows(o.quality_tokens, o.quality_texts), mode="prefill")
        )

    def questions(self) -> tuple[list[list[int]], int]:
        return self.text.windows(self.options.tokens, self.options.prompts), self.options.answer_tokens
