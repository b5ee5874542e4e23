"""Request traces: who asks what when, the same for the same options everywhere."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

from pydantic import Field

from hasten.workloads.language import LanguageOptions
from hasten.workloads.text import Text

Arrivals = Literal["closed", "poisson", "bursty"]
_NORMAL = NormalDist()


class TrafficOptions(LanguageOptions):
    """Which requests come, and when."""

    arrivals: Arrivals = Field(
        "closed", description="closed: each client asks again when answered; poisson, bursty: at given times"
    )
    clients: int = Field(8, ge=1, description="clients of the closed loop")
    rate: float = Field(0.3, gt=0, description="requests per second that come on average (poisson, bursty)")
    burst: float = Field(4.0, ge=1, description="requests of a burst, on average (bursty)")
    requests: int = Field(24, ge=1, description="requests in all")
    prompt_tokens: int = Field(1200, ge=1, description="tokens of a prompt, on average")
    tokens: int = Field(60, ge=2, description="tokens to generate for a request, on average")
    spread: float = Field(
        0.3, ge=0, le=1, description="standard deviation of both, as a share of the average"
    )
    seed: int = Field(0, ge=0, description="of lengths and times")


@dataclass(frozen=True)
class Item:
    """One request. at: seconds after the start; 0 in a closed loop, where a client's turn decides."""

    prompt: list[int]
    tokens: int
    at: float


def traffic(text: Text, options: TrafficOptions) -> list[Item]:
    """The requests in the order of arrival; prompts are windows of real text, no two overlapping.

    Lengths are normal, cut at a tenth and at twice the average. Raises `MeasureError` when the text is too short.
    """
    # Only `random()` is promised to give the same numbers in every release.
    rng = random.Random(options.seed)
    prompts = [_length(rng, options.prompt_tokens, options.spread, 2) for _ in range(options.requests)]
    outputs = [_length(rng, options.tokens, options.spread, 2) for _ in range(options.requests)]
    times = _times(rng, options)
    return [
        Item(window, tokens, at)
        for window, tokens, at in zip(text.cuts(prompts), outputs, times, strict=True)
    ]


def _length(rng: random.Random, mean: int, spread: float, least: int) -> int:
    drawn = mean * (1 + spread * _NORMAL.inv_cdf(min(max(rng.random(), 1e-9), 1 - 1e-9)))
    return max(least, round(min(max(drawn, mean / 10), 2 * mean)))


def _times(rng: random.Random, options: TrafficOptions) -> list[float]:
    """Arrival times: 0 in a closed loop; exponential gaps between requests, or between bursts of geometric size."""
    if options.arrivals == "closed":
        return [0.0] * options.requests
    size = options.burst if options.arrivals == "bursty" else 1.0
    at = 0.0
    times: list[float] = []
    while len(times) < options.requests:
        at -= math.log(1 - rng.random()) * size / options.rate
        times.append(at)
        while len(times) < options.requests and rng.random() < 1 - 1 / size:
            times.append(at)
    first = times[0]
    return [at - first for at in times]
