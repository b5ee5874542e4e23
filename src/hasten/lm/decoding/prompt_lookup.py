"""Prompt lookup: guesses copied from what the prompt or the answer already says. No model, no training.

Source: Saxena, "Prompt Lookup Decoding", 2023; also LLMA (Yang et al., 2023, arXiv 2304.04487, section 3). The longest
suffix of the text, of ``max_ngram`` down to ``min_ngram`` tokens, that occurred before is found, and the tokens that
followed its latest occurrence are proposed. Where they run into the end of the text, they go on with themselves: a text
that repeats a cycle is guessed for as long as asked.

Occurrences are kept in a hash table per length, which grows with the text: a step costs a few dictionary look-ups
however long the text is.

Legend: T tokens, N places of an n-gram.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field, model_validator

from hasten.core.errors import SettingError
from hasten.core.technique import Technique
from hasten.lm.decoding.depth import Acceptance, Depth
from hasten.lm.decoding.speculate import Ask, Drafter, Proposal

if TYPE_CHECKING:
    from hasten.lm.kvcache.cache import KVCache
    from hasten.lm.settings import EngineSettings
    from hasten.models.context import BuildContext

_MANY = 32  # new tokens from which on vectors beat a loop


class PromptLookup(Technique):
    """Proposes what followed the last occurrence of the latest tokens in the prompt or the answer."""

    slug = "prompt_lookup"
    slots = ("drafter",)
    lossless = True

    draft_tokens: int = Field(8, ge=1, le=1024, description="most tokens to guess at once")
    max_ngram: int = Field(4, ge=1, le=64, description="longest suffix that is looked up")
    min_ngram: int = Field(2, ge=1, le=64, description="shortest suffix that is looked up")
    adaptive: bool = Field(True, description="guess fewer tokens where few were kept, by measured step times")

    @model_validator(mode="after")
    def _ordered(self) -> PromptLookup:
        if self.min_ngram > self.max_ngram:
            raise ValueError(f"min_ngram = {self.min_ngram} is above max_ngram = {self.max_ngram}")
        return self

    def provide(self, slot: str, context: BuildContext) -> Drafter:
        return LookupDrafter(self)


class NgramIndex:
    """The latest place of every n-gram of a growing text, for lengths ``low`` to ``high``."""

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high
        self.token_ids: list[int] = []
        # length -> hash of the n-gram -> index of the token after it
        self._after: dict[int, dict[int, int]] = {n: {} for n in range(low, high + 1)}

    def extend(self, token_ids: Sequence[int]) -> None:
        """Add tokens at the end. N-grams are entered once a token follows them: a suffix must not find itself."""
        ids, old = self.token_ids, len(self.token_ids)
        ids.extend(token_ids)
        if len(token_ids) >= _MANY:
            self._extend_many(old)
            return
        for n, after in self._after.items():
            for end in range(max(n, old), len(ids)):
                after[_hash(ids[end - n : end])] = end

    def _extend_many(self, old: int) -> None:
        ids_T = np.array(self.token_ids[max(0, old - self.high) :], dtype=np.uint64)
        offset = len(self.token_ids) - len(ids_T)
        for n, after in self._after.items():
            places = len(ids_T) - n  # the last n-gram has no token after it
            if places <= 0:
                continue
            hash_N = np.zeros(places, np.uint64)
            for i in range(n):
                hash_N = hash_N * np.uint64(_BASE) + ids_T[i : i + places] + np.uint64(1)
            # Later places overwrite earlier ones.
            after.update(zip(hash_N.tolist(), range(offset + n, offset + n + places), strict=True))

    def find(self, count: int) -> tuple[list[int], int]:
        """(at most ``count`` tokens that followed the longest known suffix, the suffix's length); ([], 0) for none."""
        ids = self.token_ids
        for n in range(min(self.high, len(ids) - 1), self.low - 1, -1):
            suffix = ids[len(ids) - n :]
            at = self._after[n].get(_hash(suffix))
            if at is not None and ids[at - n : at] == suffix:  # different n-grams may share a hash
                found = ids[at : at + count]
                cycle = len(ids) - at
                while len(found) < count:
                    found.append(found[len(found) - cycle])
                return found, n
        return [], 0


_BASE, _MASK = 0x9E3779B97F4A7C15, 2**64 - 1


def _hash(ids: Sequence[int]) -> int:
    """The polynomial hash modulo 2^64 that `NgramIndex` computes with vectors too."""
    value = 0
    for token in ids:
        value = (value * _BASE + token + 1) & _MASK
    return value


@dataclass
class _State:
    """One sequence: its index, what became of guesses by the length of the suffix, and the last guess."""

    index: NgramIndex
    chances: dict[int, Acceptance] = field(default_factory=dict)
    guess: tuple[int, int] | None = None  # (length of the suffix, tokens guessed)

    def chance(self, n: int) -> Acceptance:
        return self.chances.setdefault(n, Acceptance())


class LookupDrafter(Drafter):
    """The drafter: an index per sequence."""

    def __init__(self, settings: PromptLookup) -> None:
        self.settings = settings
        self.depth = Depth(drafts_cost=False)
        self._states: dict[int, _State] = {}

    def bind(self, cache: KVCache, settings: EngineSettings) -> None:
        within_engine(self.settings, self.settings.draft_tokens, settings)

    def propose(self, sequence_id: int, token_ids: Sequence[int], limit: int) -> Proposal | None:
        return self.propose_all([Ask(sequence_id, token_ids, limit)])[0]

    def propose_all(self, asks: Sequence[Ask]) -> list[Proposal | None]:
        """Look the latest tokens of every sequence up."""
        states = [self._read(ask.sequence_id, ask.token_ids) for ask in asks]
        found = [
            state.index.find(min(ask.limit, self.settings.draft_tokens))
            for ask, state in zip(asks, states, strict=True)
        ]
        count_S = [len(guess) for guess, _ in found]
        if self.settings.adaptive:
            chance_S = [
                state.chance(n).chance if n else 0.0 for state, (_, n) in zip(states, found, strict=True)
            ]
            count_S = self.depth.choose(chance_S, count_S)
        out: list[Proposal | None] = []
        for state, (guess, n), count in zip(states, found, count_S, strict=True):
            state.guess = (n, count) if count else None
            if n and not count:
                state.chance(n).fade()
            out.append(Proposal(tuple(guess[:count]), tuple(range(-1, count - 1))) if count else None)
        return out

    def commit(self, sequence_id: int, token_ids: Sequence[int]) -> None:
        state = self._states.get(sequence_id)
        if state is None or state.guess is None:
            return
        n, count = state.guess
        state.guess = None
        state.chance(n).saw(count, len(token_ids) - len(state.index.token_ids) - 1)

    def timed(self, rows: int, seconds: float) -> None:
        self.depth.target.add(rows, seconds)

    def forget(self, sequence_id: int) -> None:
        self._states.pop(sequence_id, None)

    def _read(self, sequence_id: int, token_ids: Sequence[int]) -> _State:
        state = self._states.get(sequence_id)
        if state is None:
            state = _State(NgramIndex(self.settings.min_ngram, self.settings.max_ngram))
            self._states[sequence_id] = state
        state.index.extend(token_ids[len(state.index.token_ids) :])
        return state


def within_engine(technique: Technique, draft_tokens: int, settings: EngineSettings) -> None:
    """Raise `SettingError` if the engine would never let the technique propose ``draft_tokens``."""
    if draft_tokens > settings.draft_tokens:
        raise SettingError(
            f"{technique.slug}.draft_tokens = {draft_tokens} is above the engine's draft_tokens = "
            f"{settings.draft_tokens}; raise that (the [engine] table of a plan) or lower this"
        )
