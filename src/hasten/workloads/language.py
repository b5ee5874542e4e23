"""What the language-model workloads share: sessions on an `LLM`, perplexity, agreement with the reference.

All text comes from the corpus's test split. Generation is greedy and goes on past the end token, so that both
sides of a comparison do the same amount of work.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import Field

from hasten.core.errors import MeasureError
from hasten.core.plan import Plan
from hasten.lm.llm import LLM
from hasten.lm.request import Completion, FinishReason, SamplingParams, Score
from hasten.workloads.options import JobOptions
from hasten.workloads.text import Text
from hasten.workloads.workload import Metric, Session, Workload

PERPLEXITY = Metric("perplexity", "lower")


class LanguageOptions(JobOptions):
    """Options of every language-model workload."""

    reference: bool = Field(True, description="compare greedy answers with the float32 model's, as a fact")


O = TypeVar("O", bound=LanguageOptions)  # noqa: E741


class LanguageSession(Session, Generic[O]):
    """A plan's `LLM` and the job's text."""

    def __init__(self, plan: Plan, options: O) -> None:
        self.plan, self.options = plan, options
        self.llm = LLM(plan=plan)
        self.text = Text(self.llm.tokenizer)

    @abstractmethod
    def questions(self) -> tuple[list[list[int]], int]:
        """Prompts whose greedy answers are compared with the reference, and how many tokens to answer."""

    def facts(self) -> Mapping[str, Any]:
        """The engine's figures; with option ``reference`` also how far greedy answers equal the float32 model's.

        greedy_agreement: share of answer tokens equal to the reference's at the same place.
        first_divergence: mean number of answer tokens before the first that differs.
        """
        facts = dict(self.llm.facts())
        if "model" in facts:
            facts["model"] = Path(facts["model"]).name  # records are published: no folders of this machine
        if self.options.reference:
            prompts, tokens = self.questions()
            answers = generate(self.llm, prompts, tokens)
            facts["greedy_agreement"], facts["first_divergence"] = agreement(
                [a.token_ids for a in answers], reference_answers(self.plan, prompts, tokens, answers)
            )
        return facts

    def close(self) -> None:
        self.llm.close()


class LanguageWorkload(Workload, Generic[O]):
    """A workload whose baseline is the default plan: the weights as stored, bfloat16 KV, no technique."""

    unit = "tokens"
    metric = PERPLEXITY

    def baseline(self, model: str | None = None) -> Plan:
        return Plan.of(model=model)


def greedy(tokens: int) -> SamplingParams:
    """``tokens`` tokens, the most probable each time, whatever they are."""
    return SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)


def generate(llm: LLM, prompts: Sequence[Sequence[int]], tokens: int) -> list[Completion]:
    """Greedy completions of token-id prompts. `MeasureError` if one ends with an error or empty."""
    done = llm.generate([list(prompt) for prompt in prompts], greedy(tokens))
    for number, completion in enumerate(done):
        check_answer(number, completion)
    return done


def check_answer(number: int, completion: Completion) -> None:
    reason = completion.samples[0].finish
    if reason in (FinishReason.ERROR, FinishReason.CANCELLED) or not completion.token_ids:
        raise MeasureError(
            f"prompt {number} ended with {reason.value!r} after {len(completion.token_ids)} tokens"
        )


def perplexity(scores: Iterable[Score]) -> float:
    """Of all scored tokens together. `MeasureError` if there is none."""
    logprobs = [value for score in scores for value in score.logprobs]
    if not logprobs:
        raise MeasureError("no token was scored")
    try:
        return math.exp(-sum(logprobs) / len(logprobs))
    except OverflowError:
        raise MeasureError(f"perplexity overflows: mean logprob {sum(logprobs) / len(logprobs):g}") from None


def agreement(answers: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> tuple[float, float]:
    """(share of tokens equal at the same place, mean tokens before the first difference)."""
    same = total = 0
    before: list[int] = []
    for answer, wanted in zip(answers, reference, strict=True):
        equal = [a == w for a, w in zip(answer, wanted, strict=False)]
        length = max(len(answer), len(wanted))
        same += sum(equal)
        total += length
        before.append(equal.index(False) if False in equal else len(equal))
    if total == 0:
        raise MeasureError("there are no answers to compare")
    return round(same / total, 4), round(sum(before) / len(before), 2)


def reference_answers(
    plan: Plan, prompts: Sequence[Sequence[int]], tokens: int, own: Sequence[Completion]
) -> list[tuple[int, ...]]:
    """Greedy answers of the same model on the float32 path without techniques.

    ``own`` are the plan's own answers: what a float32 plan without techniques said *is* the reference.
    """
    if plan.dtype == "float32" and not plan.techniques:
        return [completion.token_ids for completion in own]
    reference = LLM(plan=Plan(model=plan.model, dtype="float32", engine=plan.engine))
    try:
        return [completion.token_ids for completion in generate(reference, prompts, tokens)]
    finally:
        reference.close()
