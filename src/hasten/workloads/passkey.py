"""Passkey retrieval: a number hidden in real documentation text, asked for at the end.

Source of the task: Mohtashami and Jaggi, "Landmark Attention", 2023, arXiv 2305.16300, section 4.2. Here the filler is
documentation of the corpus instead of one repeated sentence, and prompt and question go through the model's chat
template. Prompts of one text share everything before their key, so a prefix cache reads that once.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hasten.core.errors import RequestError
from hasten.workloads.corpus import Document, Split
from hasten.workloads.text import Text

if TYPE_CHECKING:
    from hasten.models.tokenizer import Tokenizer

_TASK = "There is a pass key hidden in the text below. Find it and memorize it.\n\n"
_HIDDEN = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
_QUESTION = "\n\nWhat is the pass key?"
_ANSWER = "The pass key is"
_SHORTEST = 128

DEPTHS = (0.9, 0.7, 0.5, 0.3, 0.1)  # the deepest first: later prompts find their beginnings in a prefix cache


@dataclass(frozen=True)
class Passkey:
    """One prompt (token ids, with the opening words of the answer) and the digits that answer it.

    depth: where the key is hidden, as a share of the filler text (0: before it, 1: after it).
    """

    token_ids: tuple[int, ...]
    key: str
    depth: float
    document: str

    def found_in(self, answer: str) -> bool:
        """Whether the first number of ``answer`` is the key, digit for digit."""
        number = re.search(r"[0-9]+", answer)
        return number is not None and number.group() == self.key


def passkeys(
    tokenizer: Tokenizer,
    length: int,
    texts: int = 1,
    depths: Sequence[float] = DEPTHS,
    seed: int = 0,
    split: Split = "test",
) -> list[Passkey]:
    """``texts * len(depths)`` prompts of about ``length`` tokens (never more), the same for the same arguments.

    Text t is the t-th window of ``split`` (see `Text`), every prompt has its own key of five digits, and the key
    stands between two lines. Raises `RequestError` for a length under 128, no text, no depth or one outside 0..1.
    """
    if length < _SHORTEST:
        raise RequestError(f"a passkey prompt needs at least {_SHORTEST} tokens, not {length}")
    if texts < 1 or not depths:
        raise RequestError(
            f"passkey prompts need at least one text and one depth, not {texts} and {len(depths)}"
        )
    wrong = [depth for depth in depths if not 0 <= depth <= 1]
    if wrong:
        raise RequestError(f"depth {wrong[0]} of a passkey is not between 0 and 1")
    filler = Text(tokenizer, split)
    frame = len(_prompt(tokenizer, "", "00000", 0.0))
    out = []
    for number, (document, ids) in enumerate(filler.placed(length - frame, texts)):
        text = tokenizer.decode(ids)
        for depth in depths:
            key = _key(seed, number, depth, text)
            out.append(_fitted(tokenizer, text, key, depth, length, document))
    return out


def _fitted(
    tokenizer: Tokenizer, text: str, key: str, depth: float, length: int, document: Document
) -> Passkey:
    """The prompt, its filler shortened from the end until it fits (cutting a text can make it more tokens)."""
    while True:
        ids = _prompt(tokenizer, text, key, depth)
        if len(ids) <= length:
            return Passkey(tuple(ids), key, depth, document.name)
        text = text[: -4 * (len(ids) - length)]


def _prompt(tokenizer: Tokenizer, text: str, key: str, depth: float) -> list[int]:
    at = round(depth * len(text))
    cut = text.rfind("\n", 0, at + 1)
    cut = at if cut < 0 or depth == 1 else cut
    content = _TASK + text[:cut] + _HIDDEN.format(key=key) + text[cut:].lstrip("\n") + _QUESTION
    prompt = tokenizer.apply_chat([{"role": "user", "content": content}]) + _ANSWER
    return tokenizer.encode(prompt)


def _key(seed: int, number: int, depth: float, text: str) -> str:
    """Five digits that the text does not hold. A hash, because `random` may change between Python releases."""
    for attempt in range(1000):
        digest = hashlib.sha256(f"{seed} {number} {depth:.6f} {attempt}".encode()).digest()
        key = str(10_000 + int.from_bytes(digest[:8]) % 90_000)
        if key not in text:
            return key
    raise RequestError("the text holds every number that could be its pass key")
