"""Runs a scheduler without a model: real queues, real pages and prefix store, time from the resource model.

For jobs too long to run, and for what does not depend on a clock: order, sharing, balance. Its results are *simulated*
and are called so wherever they are shown. What a step costs comes from `hasten.lm.scheduling.resources.Rates`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hasten.core.errors import RequestError
from hasten.lm.context.transform import Prompt
from hasten.lm.kvcache.cache import KVCache
from hasten.lm.kvcache.format import PlainKV
from hasten.lm.kvcache.prefix import RadixPrefixStore
from hasten.lm.request import SamplingParams
from hasten.lm.scheduling.resources import Rates
from hasten.lm.scheduling.scheduler import Scheduler, Work
from hasten.lm.sequence import Request, Sequence, Status
from hasten.lm.settings import EngineSettings
from hasten.models.config import HeadShape

_NEW = 1_000_000_000  # ids of generated tokens, all different from those of prompts


@dataclass(frozen=True)
class Asked:
    """One request: its prompt, how many tokens it generates, and what it says it may (None: the same)."""

    prompt: list[int]
    output: int
    limit: int | None = None


@dataclass
class Simulated:
    """A simulated run. Per step: compute, memory (seconds of each resource) and rows; then totals of the run.

    cached, prompts: prompt tokens taken from the prefix store, and all. scheduling: real processor seconds of the
    scheduler.
    """

    compute: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    cached: int = 0
    prompts: int = 0
    preemptions: int = 0
    scheduling: float = 0.0

    @property
    def sharing(self) -> float:
        """Share of prompt tokens that were not computed."""
        return self.cached / self.prompts

    def seconds(self, fixed: float = 0.0, *, overlap: bool = False) -> float:
        """Simulated time: ``fixed`` per step, then the two resources one after the other or, overlapped, the longer."""
        pairs = zip(self.compute, self.memory, strict=True)
        return sum(fixed + (max(pair) if overlap else sum(pair)) for pair in pairs)

    def variation(self, window: int = 1) -> tuple[float, float]:
        """Coefficients of variation of compute and memory, of means over ``window`` steps, without the last tenth.

        The end of a job, where nothing is left to start, is no matter of order.
        """
        found = []
        for series in (self.compute, self.memory):
            kept = np.array(series[: max(window, len(series) * 9 // 10)])
            means = kept[: len(kept) // window * window].reshape(-1, window).mean(axis=1)
            found.append(float(means.std() / means.mean()) if means.mean() > 0 else 0.0)
        return found[0], found[1]


class Simulator:
    """A cache of ``pages`` pages and a scheduler; `run` plays a job that is known from the start."""

    def __init__(self, scheduler: Scheduler, rates: Rates, settings: EngineSettings, pages: int) -> None:
        self.scheduler, self.rates, self.settings = scheduler, rates, settings
        self.cache = KVCache(
            PlainKV(),
            RadixPrefixStore(),
            layers=1,
            shape=HeadShape(1, 1, 1),
            pages=pages,
            page_size=settings.page_size,
            rows=settings.max_batch,
            context=pages * settings.page_size,
        )
        scheduler.bind(self.cache, settings)

    def run(self, job: SequenceOf[Asked]) -> Simulated:
        """Raises `RequestError` when the scheduler has nothing to run although requests wait."""
        done = Simulated()
        self._left: dict[Sequence, int] = {}
        for number, asked in enumerate(job):
            self._left[self._submit(number, asked)] = asked.output
        while self._left:
            began = time.thread_time()
            work = self.scheduler.schedule()
            done.scheduling += time.thread_time() - began
            if not work:
                raise RequestError(f"nothing runs although {len(self._left)} requests are not finished")
            compute = memory = 0.0
            for item in work:
                spent = self._carry_out(item, done)
                compute, memory = compute + spent[0], memory + spent[1]
            done.compute.append(compute)
            done.memory.append(memory)
            done.rows.append(sum(item.count for item in work))
        return done

    def _submit(self, number: int, asked: Asked) -> Sequence:
        params = SamplingParams(max_tokens=asked.limit or asked.output)
        request = Request(number, Prompt(token_ids=tuple(asked.prompt)), params)
        nobody: Any = None  # no text is made
        sequence = Sequence(
            number,
            0,
            request,
            list(asked.prompt),
            len(asked.prompt),
            _GENERATOR,
            nobody,
            (0, number, 0),
            status=Status.HELD,
        )
        request.sequences.append(sequence)
        self.scheduler.add(sequence)
        return sequence

    def _carry_out(self, item: Work, done: Simulated) -> tuple[float, float]:
        sequence, kv = item.sequence, item.sequence.kv
        assert kv is not None
        rates = self.rates
        decodes = item.count == 1 and item.start >= sequence.prompt_length
        spent = (
            (rates.token, rates.read * item.stop) if decodes else (rates.prompt(item.start, item.stop), 0.0)
        )
        kv.length = max(kv.length, item.stop)
        if item.start < sequence.prompt_length:
            self.cache.offer_prefix(kv, sequence.token_ids)
        if item.stop == len(sequence.token_ids):
            sequence.token_ids.append(_NEW + sequence.id)
            if sequence.output_length >= self._left[sequence]:
                self._end(sequence, done)
        return spent

    def _end(self, sequence: Sequence, done: Simulated) -> None:
        ledger = sequence.request.ledger
        done.cached += ledger.cached
        done.preemptions += ledger.preemptions
        done.prompts += sequence.prompt_length
        self.scheduler.remove(sequence)
        assert sequence.kv is not None
        self.cache.close(sequence.kv)
        sequence.kv, sequence.status = None, Status.FINISHED
        del self._left[sequence]


_GENERATOR = torch.Generator()  # nobody draws from it; one for each of 10^5 sequences would be gigabytes
