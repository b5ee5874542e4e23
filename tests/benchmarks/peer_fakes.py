"""Engines that need no package: they answer at stated speeds, or misbehave."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.peers.engines.engine import Answer, Engine, Limits

from hasten.core.errors import UnsupportedError


class Fake(Engine):
    """Says it took ``first`` + ``each`` seconds a step. Token i after a prompt: the sum of its ids plus i."""

    first: ClassVar[float] = 0.5
    each: ClassVar[float] = 0.01
    logprob: ClassVar[float] = -1.0

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        log = limits.files.get("log")
        self.log = Path(log) if log else None
        self.note("load")

    def note(self, what: str) -> None:
        if self.log:
            with self.log.open("a") as stream:
                stream.write(f"{type(self).__name__} {what}\n")

    def tokens(self, prompt: Sequence[int], count: int) -> list[int]:
        return [sum(prompt) + i for i in range(count)]

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int, shared: int = 0) -> Answer:
        cache = self.limits.prefix_cache
        self.note(f"generate {prompts[0][0]} {len(prompts)} {shared} {cache}")
        print("what a library prints is no answer")
        steps = tokens - 1
        total = self.first + self.each * steps
        return Answer([self.tokens(p, tokens) for p in prompts], self.first, total, steps * len(prompts))

    def score(self, texts: Sequence[Sequence[int]], context: int) -> list[list[float]]:
        return [[self.logprob] * (len(text) - context) for text in texts]

    def bandwidth(self) -> float:
        return 1e9

    def facts(self) -> dict[str, Any]:
        return {
            "version": "fake 1",
            "settings": type(self).__name__,
            "weight_bytes_per_token": 4e6,
            "kv_bytes_per_token": 1e4,
        }


class Slow(Fake):
    """Half the speed, other tokens after the second, no logits."""

    first = 1.0
    each = 0.02

    def tokens(self, prompt: Sequence[int], count: int) -> list[int]:
        return [token + 7 * (i >= 2) for i, token in enumerate(super().tokens(prompt, count))]

    def score(self, texts: Sequence[Sequence[int]], context: int) -> list[list[float]]:
        raise UnsupportedError("shows no logits")


class Cannot(Fake):
    def __init__(self, limits: Limits) -> None:
        raise UnsupportedError("reads no such weights")


class CannotBatch(Fake):
    def generate(self, prompts: Sequence[Sequence[int]], tokens: int, shared: int = 0) -> Answer:
        if len(prompts) > 1:
            raise UnsupportedError("one prompt at a time")
        return super().generate(prompts, tokens, shared)


class Dies(Fake):
    def generate(self, prompts: Sequence[Sequence[int]], tokens: int, shared: int = 0) -> Answer:
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
        raise AssertionError("unreachable")


class DiesLater(Fake):
    calls = 0

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int, shared: int = 0) -> Answer:
        self.calls += 1
        if self.calls == 4:
            os._exit(3)
        return super().generate(prompts, tokens, shared)


class Hangs(Fake):
    def generate(self, prompts: Sequence[Sequence[int]], tokens: int, shared: int = 0) -> Answer:
        time.sleep(600)
        raise AssertionError("unreachable")


class Garbage(Fake):
    def generate(self, prompts: Sequence[Sequence[int]], tokens: int, shared: int = 0) -> Answer:
        os.write(int(sys.argv[1]), b"}{ not json\n")
        return super().generate(prompts, tokens, shared)


class Number(Garbage):
    def generate(self, prompts: Sequence[Sequence[int]], tokens: int, shared: int = 0) -> Answer:
        os.write(int(sys.argv[1]), b"17\n")
        return Fake.generate(self, prompts, tokens, shared)


class TooFew(Fake):
    def tokens(self, prompt: Sequence[int], count: int) -> list[int]:
        return super().tokens(prompt, count - 1)


class NoTime(Fake):
    first = 0.0


class NaNTime(Fake):
    first = float("nan")


class Raises(Fake):
    def generate(self, prompts: Sequence[Sequence[int]], tokens: int, shared: int = 0) -> Answer:
        raise ValueError("bad sümething")
