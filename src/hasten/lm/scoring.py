"""Teacher-forced scoring: the log-likelihood of given tokens, by prefill or through the decode path.

``prefill`` runs the tokens in chunks, as a prompt is run. ``decode`` feeds the scored tokens one at a time, several
sequences in a batch, so that what acts at decode (an attention policy, a KV format) shows in the figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from hasten.core.errors import IntegrityError, RequestError
from hasten.lm.chunk import Chunk
from hasten.lm.engine import Engine
from hasten.lm.intake import Given
from hasten.lm.interrupt import deferred_interrupt
from hasten.lm.kvcache.cache import SequenceKV
from hasten.lm.kvcache.repair import repair_from
from hasten.lm.request import Score

Mode = Literal["prefill", "decode"]


@dataclass
class _Job:
    token_ids: list[int]
    kv: SequenceKV | None = None
    logprobs: list[float] = field(default_factory=list)


def score(
    engine: Engine,
    sequences: Sequence[list[int]],
    context: int = 0,
    mode: Mode = "prefill",
    chunk: int | None = None,
) -> list[Score]:
    """Score each sequence's tokens from index ``max(context, 1)`` on, given all tokens before them.

    chunk: rows per step while prefilling, default ``max_step_tokens``. Raises `RequestError` for a sequence that is too
    short or does not fit the context, or when running requests hold the pages; `IntegrityError` for non-finite logits.
    """
    if mode not in ("prefill", "decode"):
        raise RequestError(f"mode = {mode!r}: must be 'prefill' or 'decode'")
    if context < 0:
        raise RequestError(f"context = {context}: must be 0 or more")
    rows = engine.settings.max_step_tokens if chunk is None else chunk
    if rows < 1:
        raise RequestError(f"chunk = {chunk}: must be at least 1")
    first = max(context, 1)
    for ids in sequences:
        if len(ids) <= first:
            raise RequestError(f"{len(ids)} tokens with a context of {context} leave nothing to score")
        if len(ids) > engine.context:
            raise RequestError(f"{len(ids)} tokens do not fit the context of {engine.context}")
    jobs = [_Job(list(ids)) for ids in sequences]
    waiting = list(jobs)
    while waiting:
        group: list[_Job] = []
        try:
            group = _open(engine, waiting)
            _run(engine, group, first, mode, rows)
        finally:
            with deferred_interrupt():
                for job in group:
                    _close(engine, job)
        waiting = waiting[len(group) :]
    return [Score(tuple(job.token_ids), tuple(job.logprobs)) for job in jobs]


def _open(engine: Engine, waiting: Sequence[_Job]) -> list[_Job]:
    """As many of the next jobs as find a row and pages for all their tokens."""
    cache = engine.cache
    group: list[_Job] = []
    with deferred_interrupt():
        for job in waiting:
            if cache.free_rows == 0:
                break
            kv = cache.open(engine.new_id())
            if not cache.reserve(kv, 0, len(job.token_ids)):
                cache.close(kv)
                break
            cache.attach(kv)
            job.kv = kv
            group.append(job)
    if not group:
        raise RequestError("no KV pages are free for scoring: other requests are running")
    return group


def _close(engine: Engine, job: _Job) -> None:
    if job.kv is not None:
        engine.cache.close(job.kv)
        engine.runner.forget(job.kv.id)
        job.kv = None


def _run(engine: Engine, group: Sequence[_Job], first: int, mode: Mode, rows: int) -> None:
    for job in group:
        last = len(job.token_ids) - 1  # the last token is only scored, never fed
        stop = last if mode == "prefill" else min(first, last)
        for start in range(0, stop, rows):
            end = min(start + rows, stop)
            _feed(engine, [(job, start, end, max(0, end - max(start, first - 1)))])
    if mode == "decode":
        longest = max(len(job.token_ids) for job in group)
        for index in range(first, longest - 1):
            _repair(engine, group)
            _feed(engine, [(job, index, index + 1, 1) for job in group if index < len(job.token_ids) - 1])


def _repair(engine: Engine, group: Sequence[_Job]) -> None:
    """Compute again what the attention policy wants to have computed again, as the scheduler does between tokens."""
    repair = None if engine.runner.policy is None else engine.runner.policy.repair
    if repair is None:
        return
    for job in group:
        assert job.kv is not None
        if (start := repair_from(job.kv, repair)) is not None:
            _feed(engine, [(job, start, job.kv.length, 0)])


def _feed(engine: Engine, pieces: Sequence[tuple[_Job, int, int, int]]) -> None:
    """Run tokens [start, end) of each job and note the log-probability of what follows the last ``wanted`` rows."""
    chunks, targets = [], []
    for job, start, end, wanted in pieces:
        assert job.kv is not None
        chunks.append(Chunk(job.kv, start, job.token_ids[start:end], range(start, end), wanted))
        targets.extend(job.token_ids[end - wanted + 1 : end + 1])
    with deferred_interrupt():
        logits_RV = engine.runner.run(chunks)
    logprobs = _logprobs(logits_RV, targets)
    at = 0
    for job, _, _, wanted in pieces:
        job.logprobs += logprobs[at : at + wanted]
        at += wanted


def _logprobs(logits_RV: Tensor, targets: Sequence[int]) -> list[float]:
    if not targets:
        return []
    chosen_R = logits_RV.gather(1, torch.tensor(targets)[:, None])[:, 0]
    logprob_R = (chosen_R - logits_RV.logsumexp(-1)).tolist()
    if not all(value == value and abs(value) != float("inf") for value in logprob_R):
        raise IntegrityError("the model's logits are not finite (NaN or infinity in weights or activations)")
    return list(logprob_R)


def answer_logprobs(engine: Engine, given: Given, answer: Sequence[int]) -> Tensor:
    """float32 [len(answer), V]: natural-log probabilities at each place of ``answer``, after the prompt and the
    answer's tokens before it.

    The prompt goes through the plan's transforms, as one that is submitted does. Raises `RequestError` when it cannot
    be served or finds no pages, `IntegrityError` for non-finite logits.
    """
    prompt = engine.intake.prompt(given)
    if not answer:
        raise RequestError("the answer is empty: give at least one token")
    cache, count = engine.cache, len(prompt.token_ids)
    if count + len(answer) > engine.context:
        raise RequestError(
            f"prompt and answer have {count + len(answer)} tokens, the context holds {engine.context}"
        )
    ids = [*prompt.token_ids, *answer[:-1]]
    places: Sequence[int] = range(len(ids))
    if prompt.position_ids is not None:
        after = max(prompt.position_ids) + 1
        places = [*prompt.position_ids, *range(after, after + len(answer) - 1)]
    kv = cache.open(engine.new_id(), states=prompt.states)
    try:
        begin, rows = kv.length, engine.settings.max_step_tokens
        if not cache.reserve(kv, begin, len(ids)):
            raise RequestError("no KV pages are free for scoring: other requests are running")
        cache.attach(kv, aside=True)
        parts = []
        for start in range(begin, len(ids), rows):
            stop = min(start + rows, len(ids))
            wanted = max(0, stop - max(start, count - 1))
            chunk = Chunk(kv, start, ids[start:stop], places[start:stop], wanted)
            with deferred_interrupt():
                parts.append(engine.runner.run([chunk]))
    finally:
        with deferred_interrupt():
            cache.close(kv)
            engine.runner.forget(kv.id)
    logits_AV = torch.cat(parts)
    if not bool(logits_AV.isfinite().all()):
        raise IntegrityError("the model's logits are not finite (NaN or infinity in weights or activations)")
    return torch.log_softmax(logits_AV, -1)
