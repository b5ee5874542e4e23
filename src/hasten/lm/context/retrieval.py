"""Retrieval before generation, with the search and the reading of its documents overlapped where that pays.

A search that goes on in stages names provisional documents. When they change, the prompt they make is computed ahead,
unless enough other prompts are being read; if the final documents are the same, the result is used and the search
cost nothing. Source: dynamic speculative pipelining of RAGCache, Jin et al., 2024, arXiv 2404.12457, section 5.3.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

from hasten.lm.context.transform import Prompt
from hasten.lm.engine import Engine
from hasten.lm.request import SamplingParams
from hasten.lm.sequence import Request

Documents = tuple[int, ...]


@dataclass(frozen=True)
class Candidates:
    """What a search knows so far: documents, the best first. ``final``: the search is over."""

    documents: Documents
    final: bool


class StagedSearch(ABC):
    """One question's search. It makes progress by itself (an index elsewhere) or in `poll`."""

    @abstractmethod
    def poll(self) -> Candidates | None:
        """What is new since the last call, or None. The last answer is final; not called after it."""


class Clock:
    """Seconds that pass, of which waiting may be left out: `skip` moves the clock instead of sleeping."""

    def __init__(self) -> None:
        self._skipped = -time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() + self._skipped

    def skip(self, until: float) -> None:
        """Now is ``until``, if that is later."""
        self._skipped += max(0.0, until - self.now())


@dataclass(eq=False)
class Retrieval:
    """A question on its way: its search, then its request. Times are the clock's.

    documents: the final ones. request: computed for those, None before. guesses: prompts computed ahead; hit: whether
    the last of them was the one. first_token_at: when the answer's first token was there and known to be right.
    """

    compose: Callable[[Documents], Prompt]
    search: StagedSearch
    params: SamplingParams
    asked_at: float
    documents: Documents | None = None
    retrieved_at: float | None = None
    first_token_at: float | None = None
    finished_at: float | None = None
    request: Request | None = None
    guesses: int = 0
    hit: bool = False
    failure: Exception | None = None
    cancelled: bool = False
    _guess: tuple[Documents, Request] | None = field(default=None, repr=False)

    @property
    def done(self) -> bool:
        return self.cancelled or self.failure is not None or (self.request is not None and self.request.done)


class RetrievalPipeline:
    """Runs retrievals over one engine, which others may use too.

    guesses: compute ahead while fewer prompts than this are being read; None: what the engine's prefix store says
    (`PrefixStore.speculative_prefills`), since it is the store that keeps what wrong guesses computed.
    """

    def __init__(self, engine: Engine, *, guesses: int | None = None, clock: Clock | None = None) -> None:
        self.engine, self.clock = engine, clock or Clock()
        self.most = engine.cache.store.speculative_prefills if guesses is None else guesses
        self._searching: list[Retrieval] = []
        self._answering: list[Retrieval] = []

    @property
    def busy(self) -> bool:
        return bool(self._searching or self._answering)

    @property
    def computing(self) -> bool:
        """Whether `step` has something to compute; otherwise it only polls searches."""
        return self.engine.busy

    def submit(
        self,
        compose: Callable[[Documents], Prompt],
        search: StagedSearch,
        params: SamplingParams | None = None,
        asked_at: float | None = None,
    ) -> Retrieval:
        """Answer with the prompt that ``compose`` makes of the documents that ``search`` finds."""
        now = self.clock.now() if asked_at is None else asked_at
        found = Retrieval(compose, search, params or SamplingParams(), now)
        self._searching.append(found)
        return found

    def cancel(self, retrieval: Retrieval) -> None:
        """End a retrieval wherever it is. Finished ones are left alone."""
        if retrieval.done:
            return
        retrieval.cancelled = True
        for queue in (self._searching, self._answering):
            if retrieval in queue:
                queue.remove(retrieval)
        self._drop_guess(retrieval)
        if retrieval.request is not None:
            self.engine.cancel(retrieval.request)

    def step(self) -> bool:
        """Hear what the searches found, then one step of the engine; whether there is more to do.

        A retrieval whose search or prompt raises fails alone (`Retrieval.failure`).
        """
        for one in list(self._searching):
            try:
                self._advance(one)
            except Exception as error:
                self._drop_guess(one)
                one.failure = error
            if one.documents is not None or one.failure is not None:
                self._searching.remove(one)
                if one.failure is None:
                    self._answering.append(one)
        if self.engine.busy:
            self.engine.step()
        now = self.clock.now()
        for one in list(self._answering):
            request = one.request
            assert request is not None
            if one.first_token_at is None and request.first_token_at is not None:
                one.first_token_at = now
            if request.done:
                one.finished_at, one.failure = now, request.failure
                self._answering.remove(one)
        return self.busy

    def run(self) -> None:
        """Step until every retrieval is done. Searches that only wait keep the processor busy."""
        while self.step():
            pass

    def _advance(self, one: Retrieval) -> None:
        news = one.search.poll()
        if news is None:
            return
        right = one._guess is not None and one._guess[0] == news.documents
        if not right:
            self._drop_guess(one)
        if news.final:
            if one._guess is not None:
                one.request, one.hit, one._guess = one._guess[1], True, None
            else:
                one.request = self.engine.submit(one.compose(news.documents), one.params)
            one.documents, one.retrieved_at = news.documents, self.clock.now()
        elif not right and news.documents and self.prompts_in_work() < self.most:
            one._guess = (news.documents, self.engine.submit(one.compose(news.documents), one.params))
            one.guesses += 1

    def _drop_guess(self, one: Retrieval) -> None:
        """Stop computing for documents that turned out wrong; those that are complete stay in the prefix store."""
        if one._guess is not None:
            if not one._guess[1].done:
                self.engine.cancel(one._guess[1])
            one._guess = None

    def prompts_in_work(self) -> int:
        """Prompts that wait or are being read."""
        scheduler = self.engine.scheduler
        reading = sum(s.computed < s.prompt_length for s in scheduler.running)
        return len(scheduler.waiting) + reading
