"""From what a caller gives (text, token ids, `Prompt`) to a checked `Prompt` with tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from hasten.core.errors import RequestError
from hasten.lm.context.transform import Prompt, PromptTransform
from hasten.models.tokenizer import Tokenizer

Given = str | Sequence[int] | Prompt


class Intake:
    """Runs the prompt transforms and the tokenizer, and refuses what cannot be served.

    vocabulary: number of embedding rows. hidden: their size. context: most tokens of prompt and output together.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        transforms: Sequence[PromptTransform],
        *,
        vocabulary: int,
        hidden: int,
        context: int,
    ) -> None:
        self.tokenizer, self.transforms = tokenizer, tuple(transforms)
        self.vocabulary, self.hidden, self.context = vocabulary, hidden, context

    def prompt(self, given: Given) -> Prompt:
        """Raises `RequestError` for an empty prompt, one that leaves no room in the context, or bad tokens."""
        prompt = self._read(given)
        for transform in self.transforms:
            prompt = transform.on_text(prompt)
        if not prompt.token_ids and prompt.text is None and prompt.contexts:
            prompt = prompt.replace(text=prompt.joined())
        if not prompt.token_ids and prompt.text is not None:
            # A chat template writes the start token itself.
            start = self.tokenizer.adds_bos and not prompt.extra.get("templated", False)
            prompt = prompt.replace(token_ids=tuple(self._encode(prompt.text, start)))
        for transform in self.transforms:
            prompt = transform.on_tokens(prompt)
        return self.check(prompt)

    def tokens(self, given: str | Sequence[int]) -> list[int]:
        """Token ids of a text or of checked ids, without transforms."""
        prompt = self._read(given)
        ids = (
            self._encode(prompt.text, self.tokenizer.adds_bos)
            if prompt.text is not None
            else list(prompt.token_ids)
        )
        self._check_ids(ids)
        return ids

    def _read(self, given: Given) -> Prompt:
        if isinstance(given, Prompt):
            return given
        if isinstance(given, str):
            return Prompt(text=given)
        if isinstance(given, bytes | bytearray):
            raise RequestError("the prompt is bytes; decode it to text first (it must be valid UTF-8)")
        try:
            ids = tuple(given)
        except TypeError:
            raise RequestError(
                f"a prompt is text, token ids or a Prompt, not {type(given).__name__}"
            ) from None
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            bad = next(i for i in ids if not isinstance(i, int) or isinstance(i, bool))
            raise RequestError(f"token ids must be integers, found {bad!r}")
        return Prompt(token_ids=ids)

    def _encode(self, text: str, start: bool) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the prompt holds a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}; "
                "it is not valid Unicode text"
            ) from None
        return self.tokenizer.encode(text, add_bos=start)

    def check(self, prompt: Prompt) -> Prompt:
        ids = prompt.token_ids
        if not ids:
            raise RequestError("the prompt is empty: give at least one token")
        if len(ids) >= self.context:
            raise RequestError(
                f"the prompt has {len(ids)} tokens, but the context holds {self.context} (prompt and output together); "
                "shorten it or raise max_context / the KV memory"
            )
        self._check_ids(ids)
        if prompt.position_ids is not None:
            if len(prompt.position_ids) != len(ids):
                raise RequestError(f"{len(prompt.position_ids)} position ids for {len(ids)} tokens")
            if min(prompt.position_ids) < 0:
                raise RequestError(f"position id {min(prompt.position_ids)} is negative")
        ends = (0, *prompt.segments, len(ids) + 1)
        if any(a >= b for a, b in pairwise(ends)):
            raise RequestError(
                f"segments {list(prompt.segments)} must be ascending token counts between 1 and {len(ids)}"
            )
        if prompt.embeddings_TE is not None:
            rows = torch.as_tensor(prompt.embeddings_TE)
            if rows.dim() != 2 or rows.shape[1] != self.hidden or rows.shape[0] > len(ids):
                raise RequestError(
                    f"embeddings of shape {tuple(rows.shape)}: want [at most {len(ids)}, {self.hidden}]"
                )
            if not bool(torch.isfinite(rows).all()):
                raise RequestError("embeddings hold NaN or infinity")
        return prompt

    def _check_ids(self, ids: Sequence[int]) -> None:
        low, high = (min(ids), max(ids)) if ids else (0, 0)
        if low < 0 or high >= self.vocabulary:
            bad = low if low < 0 else high
            raise RequestError(f"token id {bad} is not in the vocabulary (0..{self.vocabulary - 1})")
