"""`longllmlingua`: the contexts of a prompt, shortened by what is asked about them.

Source: Jiang, Wu, Luo, Li, Lin, Yang, Qiu, "LongLLMLingua: Accelerating and Enhancing LLMs in Long Context Scenarios
via Prompt Compression", ACL 2024, arXiv 2310.06839. Documents are ranked by how probable they make the question, the
best come first and keep more of their tokens, tokens stay where the question makes them more probable, and answers get
back the words that were cut out of what they quote. See `hasten.lm.context.compress` and `hasten.lm.context.recovery`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from hasten.core.errors import RequestError
from hasten.core.plan import Plan
from hasten.core.technique import Technique
from hasten.lm.context.compress import Compressor
from hasten.lm.context.recovery import Shortened, recover
from hasten.lm.context.transform import Prompt, PromptTransform

if TYPE_CHECKING:
    from hasten.lm.engine import Engine
    from hasten.models.context import BuildContext

_KEY = "longllmlingua"


class LongLLMLingua(Technique):
    """Contexts are compressed by the question before the model reads them."""

    slug = "longllmlingua"
    slots = ("prompt_transform",)
    lossless = False
    conflicts = {  # noqa: RUF012
        "ape": "what is left of a context depends on the question, so nothing could be reused"
    }

    rate: float = Field(0.25, gt=0, le=1, description="share of the contexts' tokens to keep")
    target: int | None = Field(None, ge=1, description="tokens of the contexts to keep, instead of rate")
    coarse: float = Field(
        1.0, ge=1, description="times the target that ranked documents may have before tokens go"
    )
    slack: int = Field(100, ge=0, description="tokens that they may have beyond that")
    delta: float = Field(
        0.3, ge=0, le=1, description="how much more of the best document stays than of the middle one"
    )
    segment: int = Field(200, ge=8, description="tokens judged at a time")
    ranking: Literal["question", "document", "none"] = Field(
        "question", description="rank by p(question | document), by p(document | question), or not"
    )
    order: Literal["sort", "original", "two_stage"] = Field(
        "sort", description="best first, as given, or best at both ends"
    )
    contrastive: bool = Field(True, description="judge tokens by the question; off: by their own perplexity")
    sentences: bool = Field(False, description="drop the least telling sentences before tokens")
    keep_breaks: bool = Field(False, description="keep every blank line")
    recover: bool = Field(
        True, description="give answers back the words that were cut out of what they quote"
    )
    compressor: str | None = Field(None, description="model that judges; None: the one that answers")

    def provide(self, slot: str, context: BuildContext) -> PromptTransform:
        return CompressedContexts(self)


class CompressedContexts(PromptTransform):
    """Compresses the contexts of a prompt; other prompts pass unchanged. head, question and tail are never touched."""

    compressor: Compressor

    def __init__(self, settings: LongLLMLingua) -> None:
        self.settings = settings

    def bind(self, engine: Engine) -> None:
        judge = engine
        if self.settings.compressor is not None:
            from hasten.lm.build import load  # it builds what this is a part of

            own = {"max_batch": 4, "page_size": engine.cache.page_size}
            judge = load(Plan(model=self.settings.compressor, engine=own).check()).engine
        self.engine, self.compressor = engine, Compressor(judge, self.settings)

    def on_text(self, prompt: Prompt) -> Prompt:
        """Raises `RequestError` for contexts without a question."""
        if not prompt.contexts or prompt.text is not None or prompt.token_ids:
            return prompt
        if not prompt.question:
            raise RequestError("longllmlingua compresses by what is asked: give the prompt a question")
        stripped = [text.strip() for text in prompt.contexts]
        if self.settings.rate >= 1 and self.settings.target is None:
            return prompt
        kept = self.compressor.compress(stripped, prompt.question)
        if sum(len(part.at) for part in kept) == sum(map(len, stripped)):
            return prompt
        return prompt.replace(
            contexts=tuple(f"{part.text.strip()}\n\n" for part in kept), extra={**prompt.extra, _KEY: kept}
        )

    def on_answer(self, prompt: Prompt, text: str) -> str:
        kept: list[Shortened] = prompt.extra.get(_KEY, [])
        return recover(text, kept) if kept and self.settings.recover else text

    def forget_prefixes(self) -> None:
        if self.compressor.engine is not self.engine:
            self.compressor.engine.cache.store.clear()
