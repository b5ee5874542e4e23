"""``trace``: a server under load, requests coming and going; real clock.

The benchmark protocol of Holmes et al., 2024 (DeepSpeed-FastGen, arXiv 2401.08671, section 4): clients ask again as
soon as they are answered, or requests come at given times. *Effective throughput* counts the requests that met a
service agreement: the first token within a time that grows with the prompt, and a rate of generation that never falls
below 2, 4 or 6 tokens per second.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from pydantic import Field

from hasten.core.errors import MeasureError
from hasten.core.plan import Plan
from hasten.lm.engine import Engine
from hasten.lm.llm import LLM
from hasten.lm.request import Delta
from hasten.lm.sequence import Request
from hasten.workloads.language import (
    LanguageSession,
    LanguageWorkload,
    agreement,
    check_answer,
    generate,
    greedy,
)
from hasten.workloads.traffic import Arrivals, Item, TrafficOptions, traffic
from hasten.workloads.workload import Metric, Run, Session

RATES = (2, 4, 6)  # tokens per second that a service agreement promises (the paper's)
WEIGHT = 0.2  # of the newest gap in the moving average of gaps between tokens
PERCENTILES = (50, 90, 95)
IDENTICAL = Metric("identical tokens", "higher")


class TraceOptions(TrafficOptions):
    figure: Literal["token_latency", "throughput"] = Field(
        "token_latency",
        description="what the ratio is of: 95th percentile of the time between tokens, or generated tokens per second",
    )
    patience: float = Field(
        4.0,
        gt=0,
        description="time to the first token that the agreement allows, in times of an idle machine",
    )
    prompt_rate: float | None = Field(
        None, gt=0, description="tokens per second an idle machine reads; none: measured before the first run"
    )
    quality_requests: int = Field(6, ge=1, description="requests whose tokens are compared, all at once")


class Trace(LanguageWorkload[TraceOptions]):
    """Requests of mixed lengths come and go. Timed: from the first arrival to the last token.

    Quality is the share of generated tokens that are those of an engine that reads every prompt in one piece, one
    request at a time. Prompts are the same in every run, so the prefix cache is off.
    """

    name = "trace"
    title = "serving requests as they come"
    metric = IDENTICAL

    def baseline(self, model: str | None = None) -> Plan:
        return Plan.of(model=model, engine={"prefix_cache": False})

    def open(self, plan: Plan, options: Mapping[str, Any] | None = None) -> Session:
        return TraceSession(plan, TraceOptions.read(self.name, options))


@dataclass
class Served:
    """What became of a request: when it came and when each of its tokens did (seconds of one clock)."""

    item: Item
    came: float
    request: Request | None = None
    at: list[float] = field(default_factory=list)

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.at[0] - self.came

    @property
    def gaps(self) -> list[float]:
        """Seconds between one token and the next."""
        return np.diff(self.at).tolist()

    def meets(self, rate: float, prompt_rate: float, patience: float) -> bool:
        """Whether the first token came in time and the moving average of the rate never fell below ``rate``."""
        if self.first > patience * len(self.item.prompt) / prompt_rate:
            return False
        average: float | None = None
        for gap in self.gaps:
            average = gap if average is None else WEIGHT * gap + (1 - WEIGHT) * average
            if average * rate > 1:
                return False
        return True


def play(engine: Engine, items: Sequence[Item], arrivals: Arrivals, clients: int) -> list[Served]:
    """Serve a trace on the real clock; the engine must be idle. Raises what ended a request, or `MeasureError`."""
    served: list[Served] = []
    start = time.perf_counter()
    waiting = list(items)
    open_ = 0
    while waiting or engine.busy:
        now = time.perf_counter()
        if arrivals == "closed":
            due = min(len(waiting), clients - open_)
        else:
            due = sum(start + item.at <= now for item in waiting)
        for item in waiting[:due]:
            one = Served(item, now if arrivals == "closed" else start + item.at)
            one.request = engine.submit(item.prompt, greedy(item.tokens), on_delta=_listener(one))
            served.append(one)
        del waiting[:due]
        if engine.busy:
            engine.step()
        elif waiting:
            time.sleep(max(0.0, start + waiting[0].at - time.perf_counter()))
        open_ = len(engine.requests)
    for number, one in enumerate(served):
        assert one.request is not None
        if one.request.failure is not None:
            raise one.request.failure
        check_answer(number, one.request.completion())
    return served


def _listener(one: Served) -> Any:
    def hear(delta: Delta) -> None:
        one.at += [time.perf_counter()] * len(delta.token_ids)

    return hear


def summary(served: Sequence[Served], prompt_rate: float, patience: float) -> dict[str, float]:
    """Seconds, throughput, percentiles and effective throughput of one run."""
    gaps = [gap for one in served for gap in one.gaps]
    if not gaps:
        raise MeasureError("no request had a second token; raise option tokens")
    seconds = max(one.at[-1] for one in served) - min(one.came for one in served)
    generated = sum(len(one.at) for one in served)
    found = {
        "seconds": seconds,
        "generated": float(generated),
        "tokens_per_second": generated / seconds,
        "all_tokens_per_second": (generated + sum(len(one.item.prompt) for one in served)) / seconds,
        "requests_per_second": len(served) / seconds,
        "latency_mean": float(np.mean([one.at[-1] - one.came for one in served])),
    }
    for percent in PERCENTILES:
        found[f"first_token_p{percent}"] = float(np.percentile([one.first for one in served], percent))
        found[f"token_latency_p{percent}"] = float(np.percentile(gaps, percent))
    for rate in RATES:
        met = sum(one.meets(rate, prompt_rate, patience) for one in served)
        found[f"effective_{rate}"] = met / seconds
        found[f"missed_{rate}"] = 1 - met / len(served)
    return found


class TraceSession(LanguageSession[TraceOptions]):
    def __init__(self, plan: Plan, options: TraceOptions) -> None:
        super().__init__(plan, options)
        self.items = traffic(self.text, options)
        self.prompt_rate = options.prompt_rate or unloaded_rate(self.llm, self.items[0].prompt)

    def run(self) -> Run:
        self.llm.forget_prefixes()
        options = self.options
        served = play(self.llm.engine, self.items, options.arrivals, options.clients)
        found = summary(served, self.prompt_rate, options.patience)
        detail = {**found, "prompt_rate": self.prompt_rate}
        if options.figure == "throughput":
            return Run(found["generated"], found["seconds"], detail)
        return Run(1, found["token_latency_p95"], detail)

    def quality(self) -> float:
        items = self.items[: self.options.quality_requests]
        self.llm.forget_prefixes()
        served = play(self.llm.engine, items, "closed", len(items))
        got = [one.request.completion().token_ids for one in served if one.request is not None]
        return agreement(got, unchunked(self.plan, items))[0]

    def questions(self) -> tuple[list[list[int]], int]:
        return [item.prompt for item in self.items[: self.options.quality_requests]], self.options.tokens


def unloaded_rate(llm: LLM, prompt: Sequence[int], rounds: int = 2) -> float:
    """Tokens per second at which an idle engine reads ``prompt`` in steps as large as it allows, no scheduler asked."""
    if len(prompt) < 2:
        raise MeasureError("a prompt of one token says nothing of reading; give option prompt_rate")
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        llm.score(list(prompt), context=len(prompt) - 1)
        best = min(best, time.perf_counter() - began)
    return len(prompt) / best


def unchunked(plan: Plan, items: Sequence[Item]) -> list[tuple[int, ...]]:
    """What the plan without its scheduler answers when every prompt is read in one piece, one request at a time."""
    longest = max(len(item.prompt) for item in items)
    engine = {**plan.engine, "max_step_tokens": longest, "max_batch": 1, "prefix_cache": False}
    others = tuple(t for t in plan.techniques if "scheduler" not in t.slots)
    with LLM(plan=replace(plan, techniques=others, engine=engine)) as llm:
        return [generate(llm, [item.prompt], item.tokens)[0].token_ids for item in items]
