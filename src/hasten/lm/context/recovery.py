"""Which characters of a text were kept, and the way back: answers that quote a shortened text get its full words.

Source: Jiang et al., "LongLLMLingua", ACL 2024, arXiv 2310.06839, section 4.4 (subsequence recovery). There the span
of the original is searched token by token; here the compressor notes where every kept character stood: it is known.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

_WORD = re.compile(r"\w+|[^\w\s]")
MOST_GAP = 10  # tokens left out between two kept ones that still count as one span


@dataclass(frozen=True)
class Shortened:
    """A text of which some tokens were kept.

    original: the whole text. at: by kept character, its place in ``original``, ascending. token: by kept character, the
    number of its token in ``original``.
    """

    original: str
    at: tuple[int, ...]
    token: tuple[int, ...]

    @property
    def text(self) -> str:
        return "".join(self.original[i] for i in self.at)

    @classmethod
    def of(cls, original: str, spans: Sequence[tuple[int, int]], kept: Sequence[int]) -> Shortened:
        """``spans``: characters of each token (tokens may share one); ``kept``: numbers of kept tokens, ascending."""
        owner: dict[int, int] = {}
        for number in kept:
            for place in range(*spans[number]):
                owner.setdefault(place, number)
        at = tuple(sorted(owner))
        return cls(original, at, tuple(owner[place] for place in at))

    def span(self, begin: int, end: int) -> tuple[int, int] | None:
        """Where kept characters [begin, end) stood; None if more than `MOST_GAP` tokens were left out in between."""
        numbers = self.token[begin:end]
        if any(b - a > MOST_GAP + 1 for a, b in pairwise(numbers)):
            return None
        return self.at[begin], self.at[end - 1] + 1


def recover(answer: str, texts: Sequence[Shortened]) -> str:
    """``answer`` with every longest run of words that also stands in a shortened text written as the original has it.

    Of several places the one with the shortest span counts. An answer that shares nothing is returned as it is.
    """
    words = [[(m.group(), *m.span()) for m in _WORD.finditer(text.text)] for text in texts]
    places: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for number, found in enumerate(words):
        for i, (word, _, _) in enumerate(found):
            places[word].append((number, i))
    given = [(m.group(), *m.span()) for m in _WORD.finditer(answer)]
    out, done, i = [], 0, 0
    while i < len(given):
        best: tuple[int, int, str] | None = None  # words, minus characters of the span, the span
        for number, start in places.get(given[i][0], ()):
            own, count = words[number], 1
            while (
                i + count < len(given)
                and start + count < len(own)
                and given[i + count][0] == own[start + count][0]
            ):
                count += 1
            span = texts[number].span(own[start][1], own[start + count - 1][2])
            while span is None and count > 1:
                count -= 1
                span = texts[number].span(own[start][1], own[start + count - 1][2])
            if span is not None:
                found_text = texts[number].original[slice(*span)]
                best = max(best or (0, 0, ""), (count, -len(found_text), found_text))
        if best is None:
            i += 1
            continue
        count, _, text = best
        begin, end = given[i][1], given[i + count - 1][2]
        whole = "".join(word for word, _, _ in given[i : i + count])
        if "".join(_WORD.findall(text)) != whole:  # nothing was left out: the answer's own spacing stays
            out += [answer[done:begin], text]
            done = end
        i += count
    return "".join((*out, answer[done:]))
