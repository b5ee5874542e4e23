"""The engine: requests in, steps, deltas out.

One step: reap what was cancelled -> drafter -> scheduler -> runner -> verify or sample -> stop -> stream. The engine is
single-threaded and does nothing between calls of `step`; every public method may be called from ``on_delta`` too.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from torch import Tensor

from hasten.attention.pieces import depths
from hasten.core.errors import IntegrityError, RequestError
from hasten.lm.chunk import Chunk
from hasten.lm.context.transform import Prompt, PromptTransform
from hasten.lm.decoding.rounds import ask, take, verify
from hasten.lm.decoding.speculate import Drafter, ExactVerifier, Verifier
from hasten.lm.decoding.stop import StopPolicy
from hasten.lm.intake import Given, Intake
from hasten.lm.kvcache.cache import KVCache, SequenceKV
from hasten.lm.processors import LogitProcessor, needs_processor
from hasten.lm.request import Delta, FinishReason, Ledger, SamplingParams, Speculation, TokenLogprob
from hasten.lm.runner import Runner
from hasten.lm.sampler import generator_for, non_finite_rows, sample, token_logprobs
from hasten.lm.scheduling.scheduler import Scheduler, Work
from hasten.lm.sequence import Request, Sequence, Status
from hasten.lm.settings import EngineSettings
from hasten.lm.text import TextStream
from hasten.models.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass
class Parts:
    """What an engine is made of besides the runner (see `hasten.lm.build`)."""

    scheduler: Scheduler
    transforms: SequenceOf[PromptTransform] = ()
    drafter: Drafter | None = None
    verifier: Verifier = field(default_factory=ExactVerifier)
    stop_policies: SequenceOf[StopPolicy] = ()


class Engine:
    """Continuous batching over one runner. See the module's text for the life of a step."""

    def __init__(self, runner: Runner, tokenizer: Tokenizer, settings: EngineSettings, parts: Parts) -> None:
        config = runner.decoder.config
        self.runner, self.tokenizer, self.settings, self.parts = runner, tokenizer, settings, parts
        self.cache: KVCache = runner.cache
        self.scheduler = parts.scheduler
        self.scheduler.policy = runner.policy
        self.scheduler.bind(self.cache, settings)
        self.scheduler.calibrate(runner)
        if parts.drafter is not None:
            parts.drafter.bind(self.cache, settings)
        self.context = self.cache.context
        self.vocabulary = config.vocab_size
        self.eos_ids = frozenset(config.eos_ids) | frozenset(tokenizer.eos_ids)
        for transform in parts.transforms:
            transform.bind(self)
        self.intake = Intake(
            tokenizer,
            parts.transforms,
            vocabulary=config.vocab_size,
            hidden=config.hidden_size,
            context=self.context,
        )
        self.speculation = Speculation()  # of all requests so far
        self._ids = itertools.count()
        self._requests: dict[int, Request] = {}
        self._cancelled: list[Request] = []
        self._stepping = False

    # -- requests ------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether some request is not finished."""
        return bool(self._requests)

    @property
    def requests(self) -> SequenceOf[Request]:
        """Requests that are not finished, oldest first."""
        return tuple(self._requests.values())

    def submit(
        self,
        prompt: Given,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        on_delta: Callable[[Delta], None] | None = None,
    ) -> Request:
        """Queue a request; higher ``priority`` runs first. Raises `RequestError` if it cannot be served.

        A ``max_tokens`` that the context cannot hold is no error: the sample ends with ``length`` when it is full.
        """
        params = params or SamplingParams()
        submitted = time.perf_counter()  # what the prompt's transforms take is the request's time too
        request = Request(next(self._ids), self.intake.prompt(prompt), params, priority, on_delta=on_delta)
        request.submitted_at, request.transforms = submitted, tuple(self.parts.transforms)
        return self._start(request)

    def fork(
        self,
        request: Request,
        params: SamplingParams | None = None,
        *,
        sample: int = 0,
        append: SequenceOf[int] = (),
        priority: int | None = None,
        on_delta: Callable[[Delta], None] | None = None,
    ) -> Request:
        """A new request whose prompt is everything sample ``sample`` holds so far, then ``append``.

        Shares the pages that are computed; neither request sees the other's later tokens. The source may be finished
        (then its pages are shared as far as the prefix store still has them).
        """
        source = request.sequences[sample]
        old = request.prompt
        if old.states is not None and request.done:
            raise RequestError("the states of this finished request's contexts are released; submit it anew")
        ids = (*source.token_ids, *append)
        positions = None if old.position_ids is None else tuple(source.positions(0, len(ids)))
        prompt = Prompt(
            token_ids=ids,
            position_ids=positions,
            embeddings_TE=old.embeddings_TE,
            segments=old.segments,
            states=old.states,
        )
        prompt = self.intake.check(prompt)
        kv = None
        if source.kv is not None and source.kv.length > 0:
            kv = self.cache.fork(source.kv, -1)
            if kv.length > len(ids) - 1:
                self.cache.truncate(kv, len(ids) - 1)
        new = Request(
            next(self._ids),
            prompt,
            params or request.params,
            request.priority if priority is None else priority,
            on_delta=on_delta,
        )
        return self._start(new, kv)

    def cancel(self, request: Request) -> None:
        """End a request now (or, from inside a step, when the step ends). Finished requests are left alone."""
        if self._stepping:
            self._cancelled.append(request)
        else:
            self._end(request, FinishReason.CANCELLED)

    def new_id(self) -> int:
        """An id no sequence of this engine has (for callers that drive the runner themselves)."""
        return next(self._ids)

    def cancel_all(self) -> None:
        for request in self.requests:
            self.cancel(request)

    def ledger(self, request: Request) -> Ledger:
        """What the request cost so far, in tokens."""
        return request.ledger

    def _start(self, request: Request, kv: SequenceKV | None = None) -> Request:
        params, ids = request.params, request.prompt.token_ids
        pages = len(ids) // self.cache.page_size + params.n
        if pages > self.cache.pool.count:
            if kv is not None:
                self.cache.close(kv)
            raise RequestError(
                f"n = {params.n}: the samples need at least {pages} KV pages, the cache has {self.cache.pool.count}; "
                "lower n or raise the KV memory"
            )
        bad = [t for t in params.stop_token_ids if not 0 <= t < self.vocabulary]
        if bad:
            raise RequestError(
                f"stop_token_ids: {bad[0]} is not in the vocabulary (0..{self.vocabulary - 1})"
            )
        seed = (self.settings.seed, request.id, 1) if params.seed is None else (params.seed,)
        for index in range(params.n):
            processor = LogitProcessor(params, self.vocabulary, ids) if needs_processor(params) else None
            request.sequences.append(
                Sequence(
                    id=next(self._ids),
                    index=index,
                    request=request,
                    token_ids=list(ids),
                    prompt_length=len(ids),
                    generator=generator_for(*seed, index),
                    text=TextStream(self.tokenizer.stream(continuing=True), params.stop),
                    key=(-request.priority, request.id, index),
                    processor=processor,
                    status=Status.HELD,
                )
            )
        if request.prompt.states is not None:
            self.cache.pool.retain(request.prompt.states.pages)
        request.ledger.prompt = len(ids)
        self._requests[request.id] = request
        first = request.sequences[0]
        if kv is not None:
            self.cache.rename(kv, first.id)
            first.kv = kv
        self.scheduler.add(first)
        return request

    # -- the step ------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Run one step; whether there is more to do. A request that fails ends with ``error``, alone if its logits or
        its draft are to blame; if the model's run raises, all requests of that step end."""
        self._stepping = True
        try:
            drafting = self._draft()
            work = self.scheduler.schedule()
            for sequence in drafting:
                if sequence.status is Status.WAITING and self.parts.drafter is not None:
                    self.parts.drafter.suspend(sequence.id)
            if work:
                self._run(work)
            elif self.scheduler.waiting:
                stuck = self.scheduler.waiting[0]
                self._fail(stuck.request, RequestError("the KV pages that are free do not hold the request"))
        finally:
            self._stepping = False
            while self._cancelled:
                self._end(self._cancelled.pop(), FinishReason.CANCELLED)
        return self.busy

    def run(self) -> None:
        """Step until every request is finished."""
        while self.busy:
            self.step()

    def _draft(self) -> SequenceOf[Sequence]:
        """Ask for guesses; the sequences that run."""
        drafter = self.parts.drafter
        if drafter is None:
            return ()
        running = tuple(self.scheduler.running)
        most, context = self.settings.draft_tokens, self.context
        asked = [(s, found) for s in running if (found := ask(s, most, context)) is not None]
        if not asked:
            return running
        try:
            proposals = drafter.propose_all([found for _, found in asked])
        except Exception as error:  # like the model's run: it answers for all of them
            for sequence, _ in asked:
                self._fail(sequence.request, error)
            return running
        for (sequence, found), proposal in zip(asked, proposals, strict=True):
            try:
                take(drafter, sequence, proposal, found.limit, self.vocabulary, self.runner.trees)
            except Exception as error:
                self._fail(sequence.request, error)
        return running

    def _run(self, work: list[Work]) -> None:
        now = time.perf_counter()
        for item in work:
            if item.sequence.request.started_at is None:
                item.sequence.request.started_at = now
        chunks = [_chunk(item) for item in work]
        try:
            logits_RV = self.runner.run(chunks)
        except Exception as error:
            for item in work:
                self._fail(item.sequence.request, error)
            return
        ran = sum(item.count for item in work)
        if self.parts.drafter is not None and ran == len(logits_RV):  # no prompt is read
            self.parts.drafter.timed(ran, time.perf_counter() - now)
        best = self.runner.best
        bad = set(
            non_finite_rows(logits_RV) if best is None else [i for i, token in enumerate(best) if token < 0]
        )
        rows: list[tuple[Sequence, int]] = []  # samples that take one token, and the row that says which
        guessed: list[tuple[Sequence, int]] = []
        row = 0
        for item, chunk in zip(work, chunks, strict=True):
            sequence = item.sequence
            first, row = row, row + chunk.logits
            if sequence.finish is not None:
                continue  # another sample of the same request failed
            sequence.request.ledger.computed += item.count
            if sequence.request.plain and item.start < sequence.prompt_length:
                self.cache.offer_prefix(chunk.kv, sequence.token_ids)
            if chunk.logits == 0:
                continue
            if not bad.isdisjoint(range(first, row)):
                problem = "the model's logits are not finite (NaN or infinity in weights or activations)"
                self._fail(
                    sequence.request, IntegrityError(f"{problem}; tokens {item.start}..{item.stop - 1}")
                )
            elif sequence.draft is not None:
                guessed.append((sequence, first))
            else:
                rows.append((sequence, first))
                rows += [(sibling, first) for sibling in self._release_siblings(sequence)]
        if rows:
            self._sample(rows, logits_RV, best)
        for sequence, first in guessed:
            if sequence.draft is not None:
                self._verify(sequence, logits_RV[first : first + len(sequence.draft.token_ids) + 1])

    def _release_siblings(self, sequence: Sequence) -> list[Sequence]:
        """The prompt of an n > 1 request is computed: let the other samples share its pages and start.

        Those that find no row of the batch wait like any request; returns the ones that run now.
        """
        started = []
        if sequence.index == 0 and sequence.output_length == 0 and sequence.kv is not None:
            for sibling in sequence.request.sequences[1:]:
                if sibling.status is not Status.HELD:
                    continue
                sibling.kv = self.cache.fork(sequence.kv, sibling.id)
                if self.scheduler.adopt(sibling):
                    started.append(sibling)
                else:
                    self.cache.close(sibling.kv)
                    sibling.kv = None
                    self.scheduler.add(sibling)
        return started

    def _sample(
        self, rows: list[tuple[Sequence, int]], logits_RV: Tensor, best: list[int] | None = None
    ) -> None:
        if [row for _, row in rows] != list(range(logits_RV.shape[0])):
            logits_RV = logits_RV[[row for _, row in rows]]
        sequences = [sequence for sequence, _ in rows]
        processed_RV = logits_RV
        if any(s.processor is not None for s in sequences):
            processed_RV, best = logits_RV.clone(), None
            for i, s in enumerate(sequences):
                if s.processor is not None:
                    s.processor.apply(processed_RV[i])
        if best is not None and all(s.params.temperature == 0 for s in sequences):
            tokens = [best[row] for _, row in rows]
        else:
            tokens = sample(processed_RV, [s.params for s in sequences], [s.generator for s in sequences])
        for i, (s, token) in enumerate(zip(sequences, tokens, strict=True)):
            if s.finish is not None:
                continue
            logprobs: list[TokenLogprob] = []
            if s.params.logprobs is not None:
                logprobs = token_logprobs(logits_RV[i : i + 1], [token], s.params.logprobs)
            self._append(s, [token], logprobs)

    def _verify(self, sequence: Sequence, logits_AV: Tensor) -> None:
        drafter, proposal = self.parts.drafter, sequence.draft
        assert drafter is not None and proposal is not None and sequence.kv is not None  # noqa: PT018
        try:
            tokens, path = verify(self.parts.verifier, sequence, logits_AV)
            self.cache.gather(sequence.kv, len(sequence.token_ids), path)
        except Exception as error:
            self._fail(sequence.request, error)
            return
        sequence.draft = None
        round = Speculation(1, len(proposal.token_ids), len(tokens) - 1)
        sequence.request.ledger.speculation += round
        self.speculation += round
        logprobs: list[TokenLogprob] = []
        if sequence.params.logprobs is not None:
            logprobs = token_logprobs(
                logits_AV[[0, *(i + 1 for i in path)]], tokens, sequence.params.logprobs
            )
        self._append(sequence, tokens, logprobs)
        if sequence.finish is None:
            self.cache.truncate(sequence.kv, len(sequence.token_ids) - 1)
            drafter.commit(sequence.id, sequence.token_ids)

    def _append(self, sequence: Sequence, tokens: SequenceOf[int], logprobs: list[TokenLogprob]) -> None:
        """Commit tokens until one of them ends the sample, and stream them."""
        request, params = sequence.request, sequence.params
        if request.first_token_at is None:
            request.first_token_at = time.perf_counter()
        text, taken = "", 0
        finish: FinishReason | None = None
        for token in tokens:
            taken += 1
            sequence.token_ids.append(token)
            if sequence.processor is not None:
                sequence.processor.commit(token)
            ends = token in params.stop_token_ids or (token in self.eos_ids and not params.ignore_eos)
            if not ends:
                text += sequence.text.feed(token)
            if ends or sequence.text.stopped or self._policy_stops(sequence):
                finish = FinishReason.STOP
            elif sequence.output_length >= params.max_tokens or len(sequence.token_ids) >= self.context:
                finish = FinishReason.LENGTH
            if finish is not None:
                break
        request.ledger.generated += taken
        sequence.logprobs += logprobs[:taken]
        if finish is not None:
            text += sequence.text.finish()
            self._close(sequence, finish)
        self._emit(
            request, Delta(sequence.index, text, tuple(tokens[:taken]), tuple(logprobs[:taken]), finish)
        )

    def _policy_stops(self, sequence: Sequence) -> bool:
        prompt, output = (
            sequence.request.prompt.token_ids,
            sequence.output_ids if self.parts.stop_policies else (),
        )
        return any(p.should_stop(sequence.id, prompt, output) for p in self.parts.stop_policies)

    def _emit(self, request: Request, delta: Delta) -> None:
        try:
            request.emit(delta)
        except Exception as error:  # the listener's fault must not stop the other requests
            logger.exception("on_delta of request %d raised", request.id)
            request.failure, request.on_delta = error, None
            self._cancelled.append(request)

    # -- endings -------------------------------------------------------------------------------------------------

    def _close(self, sequence: Sequence, finish: FinishReason) -> None:
        """Free everything a sample holds and note why it ended."""
        self.scheduler.remove(sequence)
        if sequence.kv is not None:
            if sequence.request.plain and finish is not FinishReason.ERROR:
                # The last token is not cached; after a verify pass its slot may hold a rejected guess.
                self.cache.offer_prefix(sequence.kv, sequence.token_ids[:-1])
            self.cache.close(sequence.kv)
            sequence.kv = None
        sequence.status, sequence.finish, sequence.draft = Status.FINISHED, finish, None
        self.runner.forget(sequence.id)
        if self.parts.drafter is not None:
            self.parts.drafter.forget(sequence.id)
        for policy in self.parts.stop_policies:
            policy.forget(sequence.id)
        request = sequence.request
        if request.done:
            if request.prompt.states is not None:
                self.cache.pool.release(request.prompt.states.pages)
            request.finished_at = time.perf_counter()
            self._requests.pop(request.id, None)

    def _end(self, request: Request, reason: FinishReason) -> None:
        for sequence in request.sequences:
            if sequence.finish is None:
                text = sequence.text.finish()
                self._close(sequence, reason)
                self._emit(request, Delta(sequence.index, text, (), (), reason))

    def _fail(self, request: Request, error: Exception) -> None:
        logger.debug("request %d failed", request.id, exc_info=error)
        if not request.done:
            request.failure = error
            self._end(request, FinishReason.ERROR)


def _chunk(work: Work) -> Chunk:
    """The rows that a piece of work stands for."""
    sequence, start, stop = work.sequence, work.start, work.stop
    assert sequence.kv is not None
    ids: SequenceOf[int] = sequence.token_ids[start:stop]
    positions, logits = sequence.positions(start, stop), 0
    tree: tuple[int, ...] = ()
    if sequence.draft is not None:
        ids = [*ids, *sequence.draft.token_ids]
        logits = len(sequence.draft.token_ids) + 1
        if not sequence.draft.is_chain():
            tree = sequence.draft.parent
            own = len(positions) - len(tree)
            # A node's place is its level.
            positions = [*positions[:own], *(positions[own + level] for level in depths(tree).tolist())]
    elif stop == len(sequence.token_ids):
        logits = 1
    rows_TE = sequence.request.prompt.embeddings_TE
    if rows_TE is not None:
        rows_TE = rows_TE[start:stop] if start < len(rows_TE) else None
    prompt = start < sequence.prompt_length
    return Chunk(sequence.kv, start, ids, positions, logits, rows_TE, tree, prompt)
