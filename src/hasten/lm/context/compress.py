"""Question-aware compression of documents: ranking, budget, and token by token removal, on one model's likelihoods.

Source: Jiang, Wu, Luo, Li, Lin, Yang, Qiu, "LongLLMLingua: Accelerating and Enhancing LLMs in Long Context Scenarios
via Prompt Compression", ACL 2024, arXiv 2310.06839, section 4; the iterative part is that of LLMLingua, 2023, arXiv
2310.05736, section 4.2.

Legend: K documents, N tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from hasten.core.errors import RequestError
from hasten.lm.context.likelihood import Reader, window
from hasten.lm.context.recovery import Shortened

if TYPE_CHECKING:
    from hasten.lm.engine import Engine
    from hasten.models.tokenizer import Tokenizer

RESTRICTIVE = " The answer to this question is contained in the given documents."
_SENTENCE = re.compile(r"[^.!?\n]*(?:[.!?\n]+|$)\s*")
_FIRST = 64  # tokens of a long history that stay when its oldest ones are given up


class CompressSettings(Protocol):
    """What `Compressor` asks of a technique; see `hasten.lm.context.longllmlingua.LongLLMLingua`."""

    @property
    def rate(self) -> float: ...

    @property
    def target(self) -> int | None: ...

    @property
    def coarse(self) -> float: ...

    @property
    def slack(self) -> int: ...

    @property
    def delta(self) -> float: ...

    @property
    def segment(self) -> int: ...

    @property
    def ranking(self) -> str: ...

    @property
    def order(self) -> str: ...

    @property
    def contrastive(self) -> bool: ...

    @property
    def sentences(self) -> bool: ...

    @property
    def keep_breaks(self) -> bool: ...


@dataclass(frozen=True)
class Encoded:
    """A document as the compressor's tokens, with the characters that each of them covers."""

    text: str
    token_ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer, text: str) -> Encoded:
        found = tokenizer.backend.encode(text, add_special_tokens=False)
        return cls(text, tuple(found.ids), tuple(found.offsets))

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens [start, stop) of document ``document`` of those that are kept, in one segment."""

    document: int
    start: int
    stop: int


class Compressor:
    """Compresses with the likelihoods of ``engine``'s model. Its prefix cache keeps what was read for the ranking."""

    def __init__(self, engine: Engine, settings: CompressSettings) -> None:
        self.engine, self.settings = engine, settings
        self.tokenizer = engine.tokenizer
        start = self.tokenizer.bos_id
        # Something has to stand before the first token, or nothing could predict it.
        self.start = [start] if start is not None else self.tokenizer.encode("\n")
        self.between = self.tokenizer.encode("\n\n")

    def compress(self, documents: Sequence[str], question: str) -> list[Shortened]:
        """What is kept of which documents, in the order in which they are to be read.

        All of them whole, in their own order, when the target asks for no less. Raises `RequestError` for an empty
        question or one that leaves the compressor no room.
        """
        if not question.strip():
            raise RequestError("longllmlingua compresses by what is asked: the question is empty")
        encoded = [Encoded.of(self.tokenizer, text) for text in documents]
        total = sum(map(len, encoded))
        target = self.target(total)
        if target >= total:
            return [Shortened.of(d.text, d.spans, range(len(d))) for d in encoded]
        kept = self.select(self.rank(encoded, question), encoded, target)
        chosen = [encoded[k] for k in kept]
        if self.settings.sentences:
            chosen = self.filtered(chosen, question, target)
        ratio_K = ratios([len(d) for d in chosen], target, self.settings.delta)
        order = arranged(len(chosen), kept, self.settings.order)
        return self.shorten([chosen[i] for i in order], [ratio_K[i] for i in order], question)

    def target(self, total: int) -> int:
        """Tokens of all documents that are to stay."""
        wanted = self.settings.target
        return math.floor(self.settings.rate * total) if wanted is None else wanted

    # -- which documents -----------------------------------------------------------------------------------------

    def rank(self, documents: Sequence[Encoded], question: str) -> list[int]:
        """Documents in descending importance; empty ones last. Equation 2 of the paper for ``ranking = "question"``."""
        if self.settings.ranking == "none":
            scores = [0.0] * len(documents)
        elif self.settings.ranking == "question":
            scores = [self.question_loss(d.token_ids, question) for d in documents]
        else:
            scores = [self.document_loss(d.token_ids, question) for d in documents]
        return sorted(range(len(documents)), key=lambda k: (not documents[k].token_ids, scores[k], k))

    def question_loss(self, document: Sequence[int], question: str) -> float:
        """Mean loss of the question (and the sentence that the documents hold its answer) after the document."""
        asked = self.tokenizer.encode(question + RESTRICTIVE)
        with Reader(self.engine, [*self.start, *self._fitting(document, len(asked))]) as reader:
            reader.read(self.between)
            loss_N = reader.read(asked)
            reader.remember()
        return float(loss_N.mean())

    def document_loss(self, document: Sequence[int], question: str) -> float:
        """Mean loss of the document after the question: the variant that the paper finds worse."""
        asked = self.tokenizer.encode(question)
        if not document:
            return math.inf
        with Reader(self.engine, [*self.start, *asked, *self.between]) as reader:
            return float(reader.read(self._fitting(document, len(asked))).mean())

    def _fitting(self, document: Sequence[int], beside: int) -> Sequence[int]:
        """The document's beginning, as far as the compressor's window goes."""
        most = window(self.engine)
        room = most - beside - len(self.start) - len(self.between)
        if room < 1:
            raise RequestError(f"the question of {beside} tokens leaves the compressor's {most} no room")
        return document[:room]

    def select(self, ranked: Sequence[int], documents: Sequence[Encoded], target: int) -> list[int]:
        """Documents in rank order until the coarse budget is used up; the best one always."""
        kept: list[int] = []
        used, budget = 0, self.settings.coarse * target + self.settings.slack
        for k in ranked:
            if kept and (used >= budget or not documents[k].token_ids):
                break
            kept.append(k)
            used += len(documents[k])
        return kept

    def filtered(self, documents: Sequence[Encoded], question: str, target: int) -> list[Encoded]:
        """The documents without their least telling sentences: 1.4 times the target is left for the tokens' turn."""
        parts: list[tuple[float, int, int, Encoded]] = []
        for number, document in enumerate(documents):
            for place, found in enumerate(_SENTENCE.findall(document.text)):
                if found:
                    sentence = Encoded.of(self.tokenizer, found)
                    parts.append((self.question_loss(sentence.token_ids, question), number, place, sentence))
        stay: list[tuple[float, int, int, Encoded]] = []
        left = 1.4 * target
        for part in sorted(parts, key=lambda part: part[:3]):
            if stay and left < len(part[3]):
                continue
            stay.append(part)
            left -= len(part[3])
        texts = ["" for _ in documents]
        for _, number, _, sentence in sorted(stay, key=lambda part: part[1:3]):
            texts[number] += sentence.text
        return [Encoded.of(self.tokenizer, text) for text in texts]

    # -- which tokens --------------------------------------------------------------------------------------------

    def shorten(
        self, documents: Sequence[Encoded], ratio_K: Sequence[float], question: str
    ) -> list[Shortened]:
        """Iterative token-level compression: segment after segment, each judged after what was kept before it."""
        flat = [(k, i) for k, document in enumerate(documents) for i in range(len(document))]
        kept: list[list[int]] = [[] for _ in documents]
        owed = [0.0] * len(documents)  # tokens that rounding has kept too few
        asked = [*self.start, *self.tokenizer.encode(question), *self.between]
        with Reader(self.engine, self.start) as plain, Reader(self.engine, asked) as told:
            tracks = (plain, told) if self.settings.contrastive else (plain,)
            for begin in range(0, len(flat), self.settings.segment):
                part = flat[begin : begin + self.settings.segment]
                ids = [documents[k].token_ids[i] for k, i in part]
                places = [self._room_for(track, len(ids), len(asked)) for track in tracks]
                score_N = self.scores(tracks, ids)
                stay: list[int] = []
                for piece in pieces_of(part):
                    inside = [n for n, (k, _) in enumerate(part) if k == piece.document]
                    document = documents[piece.document]
                    want = ratio_K[piece.document] * len(inside) + owed[piece.document]
                    must = [n for n in inside if self._must(document, part[n], begin + n, len(flat))]
                    chosen = best(score_N[inside], inside, must, math.floor(want + 0.5))
                    owed[piece.document] = want - len(chosen)
                    kept[piece.document] += [part[n][1] for n in chosen]
                    stay += chosen
                for track, place in zip(tracks, places, strict=True):
                    track.replace(place, [ids[n] for n in stay])
        return [
            Shortened.of(document.text, document.spans, which)
            for document, which in zip(documents, kept, strict=True)
            if which
        ]

    def scores(self, tracks: Sequence[Reader], ids: Sequence[int]) -> Tensor:
        """float32 [N]: contrastive perplexity s_i = L(x_i | x_<i) - L(x_i | q, x_<i) (equation 3), or L alone."""
        plain_N = tracks[0].read(ids)
        return plain_N - tracks[1].read(ids) if len(tracks) > 1 else plain_N

    def _room_for(self, track: Reader, count: int, prefix: int) -> int:
        """Where the segment will begin; a history that leaves it no room loses its oldest tokens after the first."""
        if track.room < count:
            first = max(_FIRST, prefix)
            most = len(track.token_ids) + track.room
            keep = max(0, (most - first) // 2)
            if first + keep + count > most:
                raise RequestError(
                    f"a segment of {count} tokens does not fit the compressor's context of {most}"
                )
            track.replace(first, track.token_ids[len(track.token_ids) - keep :] if keep else [])
        return len(track.token_ids)

    def _must(self, document: Encoded, place: tuple[int, int], at: int, total: int) -> bool:
        """Whether a token stays whatever its score: the first and last one, and a blank line if asked for."""
        if at in (0, total - 1):
            return True
        if not self.settings.keep_breaks:
            return False
        begin, end = document.spans[place[1]]
        return "\n\n" in document.text[begin:end]


def best(score_N: Tensor, places: Sequence[int], must: Sequence[int], count: int) -> list[int]:
    """``count`` of ``places``, ascending: those of ``must``, then by descending score (earlier first among equals)."""
    fixed = set(must)
    ranked = sorted(range(len(places)), key=lambda n: (places[n] not in fixed, -float(score_N[n]), places[n]))
    return sorted(places[n] for n in ranked[: max(count, len(fixed))])


def pieces_of(part: Sequence[tuple[int, int]]) -> list[Piece]:
    """The documents that a segment of (document, token) pairs overlaps, in order."""
    out: list[Piece] = []
    for k, i in part:
        if out and out[-1].document == k:
            out[-1] = Piece(k, out[-1].start, i + 1)
        else:
            out.append(Piece(k, i, i + 1))
    return out


def ratios(length_K: Sequence[int], target: int, delta: float) -> list[float]:
    """Share of tokens to keep of each document, best first: linear from +delta to -delta around a middle (equation 5).

    The middle is such that all together keep ``target`` tokens although shares are cut at 0 and 1.
    """
    count = len(length_K)
    tilt = [delta * (1 - 2 * i / (count - 1)) if count > 1 else 0.0 for i in range(count)]

    def shares(middle: float) -> list[float]:
        return [min(1.0, max(0.0, middle + t)) for t in tilt]

    low, high = -delta, 1 + delta
    for _ in range(50):
        middle = (low + high) / 2
        kept = sum(n * share for n, share in zip(length_K, shares(middle), strict=True))
        low, high = (middle, high) if kept < target else (low, middle)
    return shares(low)


def arranged(count: int, kept: Sequence[int], order: str) -> list[int]:
    """Ranks in the order of reading. ``kept[rank]`` is the document's own place."""
    ranks = list(range(count))
    if order == "original":
        return sorted(ranks, key=lambda rank: kept[rank])
    if order == "two_stage":  # the best ones at both ends
        return ranks[::2] + ranks[1::2][::-1]
    return ranks
