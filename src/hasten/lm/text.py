"""From committed tokens to text: incremental detokenisation and stop strings.

A stop string may begin in one token and end several tokens later. So text that could still turn out to be the beginning
of a stop string is held back, and nothing else is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class TokenDecoder(Protocol):
    """`hasten.models.tokenizer.StreamDecoder`."""

    def feed(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


class TextStream:
    """The text of one sample. ``stopped`` once a stop string was met; ``text`` then ends before it."""

    def __init__(self, decoder: TokenDecoder, stop: Sequence[str] = ()) -> None:
        self._decoder = decoder
        self._stop = tuple(stop)
        self._parts: list[str] = []
        self._held = ""
        self.stopped = False

    @property
    def text(self) -> str:
        """Everything released so far."""
        return "".join(self._parts)

    def feed(self, token_id: int) -> str:
        """Add a token; return the text that became certain."""
        return self._release(self._decoder.feed(token_id), final=False)

    def finish(self) -> str:
        """The sample is over: release what was held back."""
        return "" if self.stopped else self._release(self._decoder.finish(), final=True)

    def _release(self, new: str, final: bool) -> str:
        if not self._stop:
            out = new
        else:
            pending = self._held + new
            found = [at for s in self._stop if (at := pending.find(s)) >= 0]
            if found:
                self.stopped = True
                out, self._held = pending[: min(found)], ""
            else:
                keep = 0 if final else self._possible_start(pending)
                out, self._held = pending[: len(pending) - keep], pending[len(pending) - keep :]
        if out:
            self._parts.append(out)
        return out

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop string."""
        longest = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest
