"""Teacher-forced scoring of continuations that share a prefix, decoded together on shared KV pages.

`LLM.score` gives every text pages of its own. Here the prefix is computed once and forked, as it is when
requests share a document, so that whatever acts on shared pages is what is judged.

Legend: R forks in the step, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hasten.core.errors import IntegrityError, RequestError
from hasten.lm.chunk import Chunk
from hasten.lm.engine import Engine
from hasten.lm.kvcache.cache import SequenceKV
from hasten.lm.request import Score


def score_forks(
    engine: Engine,
    prefix: Sequence[int],
    questions: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
) -> list[Score]:
    """Log-probabilities of each answer's tokens after ``prefix`` and its question.

    The questions are read one by one, the answers fed one token per step, all forks together. Raises `RequestError`
    when the cache has too few rows or pages (or an empty part is given), `IntegrityError` for non-finite logits.
    """
    cache = engine.cache
    if not prefix or not all(questions) or not all(answers):
        raise RequestError("prefix, questions and answers must not be empty")
    if len(questions) > cache.free_rows:
        raise RequestError(
            f"{len(questions)} forks need as many rows; raise engine.max_batch ({cache.free_rows})"
        )
    opened: list[SequenceKV] = []
    try:
        root = _open(engine, opened, None, 0, len(prefix))
        for start in range(0, len(prefix), engine.settings.max_step_tokens):
            part = prefix[start : start + engine.settings.max_step_tokens]
            engine.runner.run([Chunk(root, start, part, range(start, start + len(part)), 0)])
        cache.detach(root)
        at = len(prefix)
        forks = [
            _open(engine, opened, root, at, at + len(question) + len(answer))
            for question, answer in zip(questions, answers, strict=True)
        ]
        logprobs: list[list[float]] = [[] for _ in forks]
        for number, (fork, question) in enumerate(zip(forks, questions, strict=True)):
            chunk = Chunk(fork, at, question, range(at, at + len(question)), 1)
            _feed(engine, [chunk], [answers[number][0]], [logprobs[number]])
        for turn in range(max(map(len, answers)) - 1):
            live = [n for n, answer in enumerate(answers) if turn + 1 < len(answer)]
            chunks = []
            for n in live:
                place = at + len(questions[n]) + turn
                chunks.append(Chunk(forks[n], place, [answers[n][turn]], [place], 1))
            _feed(engine, chunks, [answers[n][turn + 1] for n in live], [logprobs[n] for n in live])
        return [Score(tuple(a), tuple(p)) for a, p in zip(answers, logprobs, strict=True)]
    finally:
        for kv in opened:
            cache.close(kv)
            engine.runner.forget(kv.id)


def _open(
    engine: Engine, opened: list[SequenceKV], root: SequenceKV | None, start: int, stop: int
) -> SequenceKV:
    cache = engine.cache
    kv = cache.open(engine.new_id()) if root is None else cache.fork(root, engine.new_id())
    opened.append(kv)
    if stop > cache.context or not cache.reserve(kv, start, stop):
        raise RequestError(
            f"{stop} tokens of a fork do not fit the context ({cache.context}) or the free KV pages"
        )
    cache.attach(kv)
    return kv


def _feed(
    engine: Engine, chunks: Sequence[Chunk], targets: Sequence[int], into: Sequence[list[float]]
) -> None:
    logits_RV = engine.runner.run(chunks)
    wanted_R = logits_RV.gather(1, torch.tensor(targets)[:, None])[:, 0]
    logprob_R = wanted_R - logits_RV.logsumexp(-1)
    if not bool(logprob_R.isfinite().all()):
        raise IntegrityError("the model's logits are not finite (NaN or infinity in weights or activations)")
    for found, value in zip(into, logprob_R.tolist(), strict=True):
        found.append(value)
