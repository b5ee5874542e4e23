"""Slot ``prompt_transform``: which text or cached states enter the model. Transforms stack in plan order."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.lm.engine import Engine
    from hasten.lm.kvcache.cache import States


@dataclass(frozen=True)
class Prompt:
    """What a request asks the model to read.

    text: the prompt after the chat template, or None when only tokens or parts were given.
    token_ids: tokens, set by the tokeniser step if still empty.
    head / contexts / tail: the parts of the text, when the caller named them (retrieval, question answering): what
        comes first, the passages, what follows them (None: the question). Without a text the prompt is these in a row.
    question: the words of ``tail`` that ask.
    position_ids: explicit rotary positions, None for 0..n-1.
    embeddings_TE: rows to use instead of the embeddings of the first tokens (soft prompts), None for none; the
        tokens they replace are placeholders.
    segments: where the prompt's reusable parts (instructions, documents) end, in tokens, ascending; what follows the
        last is this request's own. A prefix store may keep such parts as wholes.
    states: keys and values of the first tokens, computed before; those tokens fill whole pages, and what lies in no
        extent is a placeholder. Whoever sets them holds no reference for the request; the engine takes one.
    """

    text: str | None = None
    token_ids: tuple[int, ...] = ()
    question: str | None = None
    contexts: tuple[str, ...] = ()
    position_ids: tuple[int, ...] | None = None
    embeddings_TE: Any = None
    segments: tuple[int, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)
    head: str = ""
    tail: str | None = None
    states: States | None = None

    def replace(self, **changes: Any) -> Prompt:
        return replace(self, **changes)

    def ending(self) -> str:
        """What follows the contexts."""
        return (self.question or "") if self.tail is None else self.tail

    def joined(self) -> str:
        """The parts in a row: what a model without any technique reads."""
        return self.head + "".join(self.contexts) + self.ending()


class PromptTransform(ABC):
    def bind(self, engine: Engine) -> None:
        """Called once, when the engine is complete but for its intake."""

    def on_text(self, prompt: Prompt) -> Prompt:
        """Rewrite the text before tokenisation."""
        return prompt

    def on_tokens(self, prompt: Prompt) -> Prompt:
        """Rewrite the tokens (and positions) after tokenisation."""
        return prompt

    def on_answer(self, prompt: Prompt, text: str) -> str:
        """The text of a finished sample as the caller gets it; ``prompt`` as this transform left it. Not streamed."""
        return text

    def forget_prefixes(self) -> None:
        """Drop what is kept of texts that were read and is not in use."""
