"""``document-qa``: questions whose answers stand in one of several passages of real documentation.

Every passage of a library of manual pages has a line planted that says something found nowhere else; a question asks
for the line of one of them and is given that passage among others, in an order of its own. So passages come again
from question to question, but seldom as the beginning of a prompt: an ordinary prefix cache finds little.

Legend: A tokens of an answer, V vocabulary.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from hasten.core.errors import MeasureError, RequestError
from hasten.core.plan import Plan
from hasten.lm.context.transform import Prompt
from hasten.lm.llm import LLM
from hasten.lm.scoring import answer_logprobs
from hasten.workloads.corpus import Split
from hasten.workloads.language import LanguageOptions, LanguageSession, LanguageWorkload, check_answer, greedy
from hasten.workloads.text import Text
from hasten.workloads.workload import Metric, Run, Session

if TYPE_CHECKING:
    from hasten.models.tokenizer import Tokenizer

_SYSTEM = "You answer questions about the passages below. Quote the passages word for word."
_FACT = "The {subject} is {answer}."
_QUESTION = "Question: what is the {subject}?"
_OPENING = "The {subject} is"

_SUBJECTS = (
    *("bridge", "harbour", "library", "station", "tower", "garden", "market", "museum", "theatre", "mill"),
    *("airport", "bakery", "castle", "chapel", "clinic", "factory", "farm", "fountain", "hotel", "island"),
    *(
        "kitchen",
        "laboratory",
        "lighthouse",
        "orchard",
        "palace",
        "pharmacy",
        "prison",
        "quarry",
        "restaurant",
        "river",
    ),
    *(
        "school",
        "ship",
        "stadium",
        "studio",
        "temple",
        "tunnel",
        "university",
        "valley",
        "village",
        "warehouse",
    ),
)
_KINDS = ("code name", "password", "nickname", "mascot", "call sign", "secret word", "emblem", "label")
_WORDS = (
    *("amber", "silver", "golden", "scarlet", "violet", "crimson", "ivory", "copper", "emerald", "indigo"),
    *("falcon", "tiger", "otter", "raven", "salmon", "badger", "heron", "lynx", "beaver", "panther"),
)


def _number(*parts: object) -> int:
    """A hash, because `random` may change between Python releases."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, parts)).encode()).digest()[:8])


def shuffled(items: Sequence[int], *seed: object) -> list[int]:
    """``items`` in an order that ``seed`` gives."""
    return sorted(items, key=lambda item: _number(*seed, item))


@dataclass(frozen=True)
class Passage:
    """A text with a planted line that says what the ``answer`` about ``subject`` is."""

    text: str
    subject: str
    answer: str


@dataclass(frozen=True)
class Question:
    """One request: passages in the order in which they are given; ``gold`` is the place of the one asked about."""

    passages: tuple[Passage, ...]
    gold: int

    @property
    def passage(self) -> Passage:
        return self.passages[self.gold]

    @property
    def text(self) -> str:
        return _QUESTION.format(subject=self.passage.subject)

    def prompt(self, llm: LLM) -> Prompt:
        """The chat prompt with its parts, and the opening words of the answer."""
        messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": self.text}]
        prompt = llm.chat_prompt(messages, [passage.text for passage in self.passages])
        opening = _OPENING.format(subject=self.passage.subject)
        return prompt.replace(tail=prompt.ending() + opening)

    def exact(self, answer: str) -> bool:
        """Whether ``answer`` begins with the right words."""
        wanted = self.passage.answer.split()
        return _words(answer)[: len(wanted)] == wanted

    def f1(self, answer: str) -> float:
        """Harmonic mean of precision and recall of the answer's first words, as many as are right."""
        wanted = self.passage.answer.split()
        given = _words(answer)[: len(wanted)]
        same = sum((Counter(wanted) & Counter(given)).values())
        return 2 * same / (len(wanted) + len(given)) if given else 0.0


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+|[0-9]+", text.lower())


def library(
    tokenizer: Tokenizer, count: int, length: int, split: Split = "test", seed: int = 0
) -> list[Passage]:
    """``count`` passages of about ``length`` tokens, from as many windows of ``split``, each with its own subject.

    Raises `RequestError` for more passages than there are subjects (40) or fewer than one.
    """
    if not 1 <= count <= len(_SUBJECTS):
        raise RequestError(f"a library has 1 to {len(_SUBJECTS)} passages, not {count}")
    order = shuffled(range(len(_SUBJECTS)), "subject", seed)
    out = []
    for number, (_, ids) in enumerate(Text(tokenizer, split).placed(length, count)):
        subject = f"{_KINDS[number % len(_KINDS)]} of the {_SUBJECTS[order[number]]}"
        first, second = (_WORDS[10 * i + _number("word", i, seed, number) % 10] for i in range(2))
        answer = f"{first} {second} {10 + _number('number', seed, number) % 90}"
        text = tokenizer.decode(ids).replace("\ufffd", "").strip()
        at = text.find("\n", _number("place", seed, number) % max(1, len(text)))
        at = len(text) if at < 0 else at
        fact = _FACT.format(subject=subject, answer=answer)
        out.append(Passage(f"{text[:at]}\n\n{fact}\n\n{text[at:].strip()}".strip(), subject, answer))
    return out


def question(passages: Sequence[Passage], about: int, count: int, *seed: object) -> Question:
    """A question about passage ``about``, given among ``count`` of ``passages``; order and others are the seed's."""
    others = [number for number in shuffled(range(len(passages)), "others", *seed) if number != about]
    chosen = shuffled([about, *others[: count - 1]], "order", *seed)
    return Question(tuple(passages[number] for number in chosen), chosen.index(about))


class DocumentQAOptions(LanguageOptions):
    library: int = Field(16, ge=1, le=40, description="passages in all")
    passages: int = Field(10, ge=1, le=40, description="passages given with a question")
    passage_tokens: int = Field(256, ge=32, description="tokens of each passage, about")
    questions: int = Field(2, ge=1, description="questions of a run, asked one after another")
    tokens: int = Field(32, ge=1, description="tokens to answer to each question")
    quality_questions: int = Field(16, ge=1, description="questions judged for quality")
    reference: bool = Field(
        False,
        description="compare greedy answers with the float32 model's, passages read as one text, as a fact",
    )


class DocumentQA(LanguageWorkload[DocumentQAOptions]):
    """Timed: each question from its submission to the last token of the answer. Counted: the answers' tokens.

    Before the first run every passage was read once, whatever the plan keeps of that, and no two prompts are the same.
    Quality is the share of questions whose answer begins with the right words; facts hold their F1 and the mean loss of
    the right answer's tokens.
    """

    name = "document-qa"
    title = "questions about several passages"
    metric = Metric("exact_match", "higher")

    def open(self, plan: Plan, options: Mapping[str, Any] | None = None) -> Session:
        return DocumentQASession(plan, DocumentQAOptions.read(self.name, options))


class DocumentQASession(LanguageSession[DocumentQAOptions]):
    runs = 0
    _judged: dict[str, float] | None = None

    def __init__(self, plan: Plan, options: DocumentQAOptions) -> None:
        super().__init__(plan, options)
        if options.passages > options.library:
            raise MeasureError(
                f"{options.passages} passages of a library of {options.library}: raise option library"
            )
        self.passages = library(self.llm.tokenizer, options.library, options.passage_tokens)
        everything = range(options.library)
        for start in range(0, options.library, options.passages):  # what can be kept is kept now
            about = everything[start]
            shown = everything[start : start + options.passages]
            asked = Question(tuple(self.passages[number] for number in shown), about - start)
            self.llm.generate([asked.prompt(self.llm)], greedy(1))

    def questions_of(self, seed: str, count: int) -> list[Question]:
        of = self.options
        about = shuffled(range(of.library), "about", seed)
        return [question(self.passages, about[i % of.library], of.passages, seed, i) for i in range(count)]

    def run(self) -> Run:
        asked = self.questions_of(f"run {self.runs}", self.options.questions)
        self.runs += 1
        units, seconds, first, cached = 0, 0.0, 0.0, 0.0
        for number, one in enumerate(asked):
            done = self.llm.generate([one.prompt(self.llm)], greedy(self.options.tokens))[0]
            check_answer(number, done)
            units += len(done.token_ids)
            seconds += done.timing.total
            first += done.timing.first_token
            cached += done.cached_tokens
        count = len(asked)
        return Run(units, seconds, {"first_token_seconds": first / count, "cached_tokens": cached / count})

    def quality(self) -> float:
        return self.judged()["exact_match"]

    def judged(self) -> dict[str, float]:
        """Means over the quality questions: exact_match, f1, and answer_loss (nats per token of the right answer)."""
        if self._judged is not None:
            return self._judged
        asked = self.questions_of("quality", self.options.quality_questions)
        exact = f1 = loss = 0.0
        for number, one in enumerate(asked):
            prompt = one.prompt(self.llm)
            done = self.llm.generate([prompt], greedy(12))[0]
            check_answer(number, done)
            exact += one.exact(done.text)
            f1 += one.f1(done.text)
            loss += answer_loss(self.llm, one, prompt)
        sums = {"exact_match": exact, "f1": f1, "answer_loss": loss}
        self._judged = {name: value / len(asked) for name, value in sums.items()}
        return self._judged

    def facts(self) -> Mapping[str, Any]:
        return {**super().facts(), **{name: round(value, 4) for name, value in self.judged().items()}}

    def questions(self) -> tuple[list[list[int]], int]:
        asked = self.questions_of("quality", min(4, self.options.quality_questions))
        encode = self.llm.tokenizer.encode
        return [encode(one.prompt(self.llm).joined()) for one in asked], self.options.tokens


def answer_loss(llm: LLM, asked: Question, prompt: Prompt | None = None) -> float:
    """Mean negative log-likelihood of the right answer's tokens, nats."""
    ids = llm.tokenizer.encode(f" {asked.passage.answer}")
    logprob_AV = answer_logprobs(llm.engine, prompt or asked.prompt(llm), ids)
    return -float(logprob_AV[range(len(ids)), ids].mean())
