"""Requests and what comes back. The engine's public vocabulary."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hasten.core.errors import RequestError

_LARGEST = 1e9  # logits are float32: beyond this, sums and products of settings are infinity or NaN


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. ``temperature=0`` is greedy (ties: lowest id).

    seed makes a request reproducible independent of what else is in the batch; sample i of ``n`` uses
    (seed, i). ``logprobs=k`` reports the chosen token's log-probability and the k best. ``stop`` strings may
    span tokens; the text ends before them. ``ignore_eos`` goes on past the end token.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, want: str) -> None:
            if not ok:
                raise RequestError(f"{name} = {getattr(self, name)!r}: {want}")

        def finite(value: object) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST

        def whole(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

        need(whole(self.max_tokens) and self.max_tokens > 0, "max_tokens", "must be at least 1")
        need(finite(self.temperature) and 0 <= self.temperature <= 100, "temperature", "must be in 0..100")
        need(whole(self.top_k) and self.top_k >= 0, "top_k", "must be 0 (off) or more")
        need(finite(self.top_p) and 0 < self.top_p <= 1, "top_p", "must be in (0, 1]")
        need(finite(self.min_p) and 0 <= self.min_p <= 1, "min_p", "must be in 0..1")
        need(
            finite(self.repetition_penalty) and self.repetition_penalty > 0,
            "repetition_penalty",
            "must be > 0",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            need(finite(getattr(self, name)), name, "must be a finite number (at most 1e9)")
        need(whole(self.n) and 1 <= self.n <= 128, "n", "must be in 1..128")
        need(
            self.logprobs is None or (whole(self.logprobs) and 0 <= self.logprobs <= 100),
            "logprobs",
            "must be in 0..100",
        )
        need(isinstance(self.stop, tuple | list), "stop", "must be a tuple of strings")
        need(all(isinstance(s, str) and s for s in self.stop), "stop", "must be non-empty strings")
        need(self.seed is None or whole(self.seed), "seed", "must be an integer")
        need(all(whole(t) for t in self.stop_token_ids), "stop_token_ids", "must be token ids")
        need(
            isinstance(self.logit_bias, Mapping)
            and all(whole(t) and finite(bias) for t, bias in self.logit_bias.items()),
            "logit_bias",
            "must map token ids to finite numbers",
        )


class FinishReason(enum.StrEnum):
    STOP = "stop"  # end token, stop string or stop policy
    LENGTH = "length"  # max_tokens or the context is full
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True)
class TokenLogprob:
    """Natural-log probability of a chosen token and of the most probable ones (id -> logprob)."""

    token: int
    logprob: float
    top: Mapping[int, float]


@dataclass(frozen=True)
class Delta:
    """One streamed increment of sample ``index``; ``finish`` is set on the last one."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None


@dataclass(frozen=True)
class Speculation:
    """What drafting did: verified rounds, tokens proposed in them, and tokens of those that were kept."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0

    def __add__(self, other: Speculation) -> Speculation:
        return Speculation(
            self.rounds + other.rounds, self.drafted + other.drafted, self.accepted + other.accepted
        )

    def __sub__(self, other: Speculation) -> Speculation:
        return Speculation(
            self.rounds - other.rounds, self.drafted - other.drafted, self.accepted - other.accepted
        )

    @property
    def acceptance_length(self) -> float:
        """Tokens that a verified round adds on average, the verified extra one included; 0 without rounds."""
        return (self.accepted + self.rounds) / self.rounds if self.rounds else 0.0

    def to_dict(self) -> dict[str, float]:
        return {
            "rounds": self.rounds,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "acceptance_length": round(self.acceptance_length, 3),
        }


@dataclass
class Ledger:
    """Tokens that a request cost so far, over all its samples.

    prompt: given. cached: prompt tokens whose pages existed. computed: rows run, recomputation and rejected drafts
    included. generated: committed to outputs. speculation: of its drafts. preemptions: times a sample lost its
    pages and was computed again.
    """

    prompt: int = 0
    cached: int = 0
    computed: int = 0
    generated: int = 0
    preemptions: int = 0
    speculation: Speculation = field(default_factory=Speculation)

    @property
    def drafted(self) -> int:
        return self.speculation.drafted

    @property
    def accepted(self) -> int:
        return self.speculation.accepted


@dataclass(frozen=True)
class Timing:
    """Seconds, measured by the engine with a monotonic clock."""

    queue: float
    first_token: float
    total: float


@dataclass(frozen=True)
class Sample:
    """What one sample produced. ``token_ids`` holds the end token it stopped at, ``text`` does not.

    ``error`` says why, when ``finish`` is ``error``.
    """

    token_ids: tuple[int, ...]
    text: str
    finish: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Completion:
    """Everything a request produced. ``samples`` has n entries; `text` and `token_ids` are sample 0's."""

    prompt_token_ids: tuple[int, ...]
    samples: tuple[Sample, ...]
    timing: Timing
    cached_tokens: int = 0  # prompt tokens whose KV pages already existed
    speculation: Speculation = field(default_factory=Speculation)

    @property
    def text(self) -> str:
        return self.samples[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.samples[0].token_ids


@dataclass(frozen=True)
class Score:
    """Teacher-forced log-likelihood of tokens. ``logprobs`` are natural logs, one per scored token."""

    token_ids: tuple[int, ...]
    logprobs: Sequence[float]

    @property
    def perplexity(self) -> float:
        return math.exp(-sum(self.logprobs) / len(self.logprobs))
