"""``retrieval``: questions about a knowledge base, answered from the documents that a vector search finds."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import Field

from hasten.core.errors import MeasureError
from hasten.core.plan import Plan
from hasten.lm.context.retrieval import Clock, Documents, Retrieval, RetrievalPipeline
from hasten.lm.context.transform import Prompt
from hasten.lm.llm import LLM
from hasten.workloads.knowledge import IndexSearch, Knowledge
from hasten.workloads.language import LanguageOptions, LanguageSession, LanguageWorkload, agreement, greedy
from hasten.workloads.retrieval_trace import Asked, trace
from hasten.workloads.workload import Metric, Run, Session

_HERE = "<<here>>"
_INSTRUCTION = "Answer the question in a few words from the documentation below."
_QUESTION = '\n\nQuestion: what does the documentation of {title} say about "{heading}"?'


class RetrievalOptions(LanguageOptions):
    pages: int = Field(2000, ge=1, description="pages of the knowledge base")
    page_characters: int = Field(
        1200, ge=1, description="least characters of a page; the longest has 5 times as many"
    )
    lists: int = Field(128, ge=1, description="inverted lists of the index")
    probes: int = Field(16, ge=1, description="lists that a search looks at")
    stages: int = Field(4, ge=1, description="stages of a search")
    search_seconds: float = Field(
        0.0, ge=0, description="how long a search takes beyond its own work (emulated)"
    )
    documents: int = Field(2, ge=1, description="documents of a prompt")
    requests: int = Field(24, ge=1, description="requests of one run")
    rate: float = Field(1.0, ge=0, description="requests per second (Poisson); 0: all at once")
    tokens: int = Field(4, ge=1, description="tokens of an answer")
    quality_requests: int = Field(16, ge=1, description="requests whose answers are compared")
    seed: int = Field(0, ge=0, description="of popularity and arrivals")


class RetrievalQuestions(LanguageWorkload[RetrievalOptions]):
    """An open loop: requests arrive by a Poisson process whether or not earlier ones are answered; 3% of the pages
    get 60% of them. Counted: requests, over the sum of their waits for the first token (search, queue and prefill),
    so that a ratio of speeds is a ratio of mean times to first token. Every run goes on in the trace where the last
    one stopped. Waiting for an arrival or a stage of the search is left out of the run, not of the times.

    Quality: share of answer tokens that equal those of the same model without techniques and without prefix cache.
    """

    name = "retrieval"
    title = "retrieval-augmented questions"
    unit = "requests"
    metric = Metric("answer_agreement", "higher")

    def baseline(self, model: str | None = None) -> Plan:
        """The ordinary prefix cache, in a page pool of 256 MB, with batches of at most 4."""
        return Plan.of(model=model, engine={"kv_memory_mb": 256, "max_batch": 4})

    def open(self, plan: Plan, options: Mapping[str, Any] | None = None) -> Session:
        return RetrievalSession(plan, RetrievalOptions.read(self.name, options))


class RetrievalSession(LanguageSession[RetrievalOptions]):
    runs = 0

    def __init__(self, plan: Plan, options: RetrievalOptions) -> None:
        self.knowledge = Knowledge(
            options.pages, options.lists, options.page_characters
        )  # first: it may refuse
        super().__init__(plan, options)
        self.composer = Composer(self.llm, self.knowledge)
        self.found = self.asked = 0

    def run(self) -> Run:
        o = self.options
        requests = trace(
            o.requests, o.pages, o.rate, o.seed, skip=o.quality_requests + self.runs * o.requests
        )
        self.runs += 1
        done, seconds = self.serve(self.llm, requests)
        waits = np.array([float(one.first_token_at or 0) - one.asked_at for one in done])
        ledgers = [one.request.ledger for one in done if one.request is not None]
        detail = {
            "mean_first_token_seconds": float(waits.mean()),
            "p99_first_token_seconds": float(np.quantile(waits, 0.99)),
            "requests_per_second": len(done) / seconds,
            "cached_share": sum(ledger.cached for ledger in ledgers)
            / sum(ledger.prompt for ledger in ledgers),
            "guesses": float(sum(one.guesses for one in done)),
            "guesses_used": float(sum(one.hit for one in done)),
        }
        return Run(len(done), float(waits.sum()), detail)

    def serve(self, llm: LLM, requests: Sequence[Asked]) -> tuple[list[Retrieval], float]:
        """Answer ``requests`` as they arrive; what became of each, and the seconds until the last answer."""
        o, clock = self.options, Clock()
        pipeline = RetrievalPipeline(llm.engine, clock=clock)
        start = clock.now()
        coming = deque(requests)
        done: list[Retrieval] = []
        while coming or pipeline.busy:
            if not pipeline.computing:
                events = [start + coming[0].at] if coming else []
                events += [
                    one.search.due
                    for one in done
                    if one.documents is None and isinstance(one.search, IndexSearch)
                ]
                if events:
                    clock.skip(min(events))
            while coming and start + coming[0].at <= clock.now():
                asked = coming.popleft()
                at, (_, heading) = start + asked.at, self.composer.subject(asked)
                search = IndexSearch(
                    self.knowledge,
                    heading,
                    k=o.documents,
                    probes=o.probes,
                    stages=o.stages,
                    clock=clock,
                    asked_at=at,
                    seconds=o.search_seconds,
                )
                done.append(pipeline.submit(self.composer.of(asked), search, greedy(o.tokens), at))
            pipeline.step()
        seconds = clock.now() - start
        for number, (one, asked) in enumerate(zip(done, requests, strict=True)):
            if one.failure is not None or one.request is None or one.first_token_at is None:
                raise MeasureError(f"request {number} was not answered: {one.failure}")
            self.asked += 1
            self.found += asked.page in (one.documents or ())
        return done, seconds

    def quality(self) -> float:
        """The answers come from whatever cache the runs have left, to requests that none of them asked."""
        o = self.options
        requests = trace(o.quality_requests, o.pages, 0, o.seed)
        answers = [_answer(one) for one in self.serve(self.llm, requests)[0]]
        engine = {**self.plan.engine, "prefix_cache": False}
        with LLM(plan=Plan(model=self.plan.model, dtype=self.plan.dtype, engine=engine)) as plain:
            wanted = [_answer(one) for one in self.serve(plain, requests)[0]]
        return agreement(answers, wanted)[0]

    def facts(self) -> Mapping[str, Any]:
        """Also how often the page that a question is about was among the documents found."""
        return {
            **super().facts(),
            "retrieval_recall": round(self.found / self.asked, 4) if self.asked else None,
        }

    def questions(self) -> tuple[list[list[int]], int]:
        asked = trace(min(4, self.options.quality_requests), self.options.pages, 0, self.options.seed)
        prompts = [self.composer.of(one)((one.page,)) for one in asked]
        return [list(prompt.token_ids) for prompt in prompts], self.options.tokens


class Composer:
    """Prompts of one model: instructions, documents, question, in the chat template, tokenised part by part."""

    def __init__(self, llm: LLM, knowledge: Knowledge) -> None:
        self.pages, self.encode = knowledge.pages, llm.tokenizer.encode
        chat = llm.tokenizer.apply_chat([{"role": "user", "content": _INSTRUCTION + _HERE}])
        head, tail = chat.split(_HERE)
        self.head, self.tail = self.encode(head), self.encode(tail)
        self._documents: dict[int, list[int]] = {}

    def subject(self, asked: Asked) -> tuple[Any, str]:
        """The page that is asked about, and the heading."""
        page = self.pages[asked.page]
        return page, page.headings[asked.question % len(page.headings)]

    def of(self, asked: Asked) -> Callable[[Documents], Prompt]:
        page, heading = self.subject(asked)
        question = _QUESTION.format(title=page.title, heading=heading)

        def compose(documents: Documents) -> Prompt:
            ids, ends = list(self.head), [len(self.head)]
            for number in documents:
                if number not in self._documents:
                    self._documents[number] = self.encode("\n\n" + self.pages[number].text)
                ids += self._documents[number]
                ends.append(len(ids))
            ids += self.encode(question) + self.tail
            texts = tuple(self.pages[number].text for number in documents)
            return Prompt(token_ids=tuple(ids), segments=tuple(ends), question=question, contexts=texts)

        return compose


def _answer(one: Retrieval) -> tuple[int, ...]:
    assert one.request is not None
    return one.request.completion().token_ids
