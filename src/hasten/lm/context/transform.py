"""Slot ``prompt_transform``: which text or cached states enter the model. Transforms stack in plan order."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """What a request asks the model to read.

    text: the prompt after the chat template, or None when only tokens were given.
    token_ids: tokens, set by the tokeniser step if still empty.
    question / contexts: the parts, when the caller named them (retrieval, question answering).
    position_ids: explicit rotary positions, None for 0..n-1.
    embeddings_TE: rows to use instead of the embeddings of the first tokens (soft prompts), None for none; the
        tokens they replace are placeholders.
    segments: where the prompt's reusable parts (instructions, documents) end, in tokens, ascending; what follows the
        last is this request's own. A prefix store may keep such parts as wholes.
    """

    text: str | None = None
    token_ids: tuple[int, ...] = ()
    question: str | None = None
    contexts: tuple[str, ...] = ()
    position_ids: tuple[int, ...] | None = None
    embeddings_TE: Any = None
    segments: tuple[int, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)

    def replace(self, **changes: Any) -> Prompt:
        return replace(self, **changes)


class PromptTransform(ABC):
    def on_text(self, prompt: Prompt) -> Prompt:
        """Rewrite the text before tokenisation."""
        return prompt

    def on_tokens(self, prompt: Prompt) -> Prompt:
        """Rewrite the tokens (and positions) after tokenisation."""
        return prompt
