"""``edit``: documents given back with one small change. The answer repeats its input, as in editing and quoting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from hasten.core.plan import Plan
from hasten.lm.llm import LLM
from hasten.workloads.language import LanguageOptions, LanguageSession, LanguageWorkload, agreement, generate
from hasten.workloads.workload import Metric, Run, Session

_TASK = (
    "Copy the following passage of a manual word for word. Change nothing but this: write AND instead of "
    "and.\n\n{passage}"
)


class EditOptions(LanguageOptions):
    passages: int = Field(3, ge=1, description="passages, edited one after another")
    passage_tokens: int = Field(192, ge=4, description="tokens of each passage")
    tokens: int = Field(128, ge=2, description="tokens to generate for each passage")


class Edit(LanguageWorkload[EditOptions]):
    """Single-stream decoding of answers that quote their prompt. Timed: from each first token to the last.

    No run finds pages of the one before it, so what a drafter has to read is timed too. Quality is the share of answer
    tokens that equal, place by place, what the same model answers without any technique: 1 for a lossless plan.
    """

    name = "edit"
    title = "giving passages back with a small change"
    metric = Metric("greedy_agreement", "higher")

    def open(self, plan: Plan, options: Mapping[str, Any] | None = None) -> Session:
        return EditSession(plan, EditOptions.read(self.name, options))


class EditSession(LanguageSession[EditOptions]):
    def __init__(self, plan: Plan, options: EditOptions) -> None:
        super().__init__(plan, options)
        tokenizer = self.llm.tokenizer
        self.prompts = [
            tokenizer.encode(
                tokenizer.apply_chat(
                    [{"role": "user", "content": _TASK.format(passage=tokenizer.decode(ids))}]
                )
            )
            for ids in self.text.windows(options.passage_tokens, options.passages)
        ]

    def run(self) -> Run:
        units, seconds, detail = 0, 0.0, {}
        before = self.llm.engine.speculation
        for number, prompt in enumerate(self.prompts):
            self.llm.forget_prefixes()
            done = generate(self.llm, [prompt], self.options.tokens)[0]
            decoding = done.timing.total - done.timing.first_token
            units += len(done.token_ids) - 1
            seconds += decoding
            detail[f"seconds_of_{number}"] = decoding
        rounds = self.llm.engine.speculation - before
        if rounds.rounds:
            detail["acceptance_length"] = rounds.acceptance_length
        return Run(units, seconds, detail)

    def quality(self) -> float:
        own = [done.token_ids for done in generate(self.llm, self.prompts, self.options.tokens)]
        plain = Plan(model=self.plan.model, engine=self.plan.engine)
        if plain == self.plan:
            return 1.0
        reference = LLM(plan=plain)
        try:
            wanted = [done.token_ids for done in generate(reference, self.prompts, self.options.tokens)]
        finally:
            reference.close()
        return agreement(own, wanted)[0]

    def questions(self) -> tuple[list[list[int]], int]:
        return self.prompts, self.options.tokens
