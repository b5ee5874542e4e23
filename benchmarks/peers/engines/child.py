"""One engine in its own process, answering the commands of `hasten.measure.wire`: load, generate, score, facts, ..."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.peers.engines.engine import Engine, Limits
from hasten.core.errors import MeasureError
from hasten.measure.wire import Server, reset_peak_rss, serve


def main() -> None:
    """Entry point: ``child REPLY_FD PARENT_PID THREADS CPU,CPU,...``."""
    serve(EngineServer(), int(sys.argv[1]), int(sys.argv[2]), sys.argv[4])


class EngineServer(Server):
    """Holds one engine."""

    engine: Engine | None = None

    def do_load(self, engine: str, limits: dict[str, Any]) -> float:
        """Make the engine ``module:Class``; answers the peak RSS of loading in MiB and starts a new peak."""
        module, _, name = engine.partition(":")
        made = getattr(importlib.import_module(module), name)
        self.engine = made(Limits(**limits | {"use": tuple(limits["use"])}))
        peak = float(self.do_peak())
        reset_peak_rss()
        return peak

    def do_generate(self, prompts: Sequence[Sequence[int]], tokens: int, shared: int = 0) -> dict[str, Any]:
        return asdict(self._loaded().generate(prompts, tokens, shared))

    def do_score(self, texts: Sequence[Sequence[int]], context: int) -> list[list[float]]:
        return self._loaded().score(texts, context)

    def do_bandwidth(self) -> float:
        return self._loaded().bandwidth()

    def do_facts(self) -> dict[str, Any]:
        return self._loaded().facts()

    def _loaded(self) -> Engine:
        if self.engine is None:
            raise MeasureError("no engine is loaded")
        return self.engine
