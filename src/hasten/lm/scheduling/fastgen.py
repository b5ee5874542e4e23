"""Dynamic SplitFuse: every step runs the same number of tokens, decode rows first, prompts cut to fill the rest.

Source: Holmes et al., "DeepSpeed-FastGen: High-throughput Text Generation for LLMs via MII and DeepSpeed-Inference",
2024, arXiv 2401.08671, section 3. What a step costs depends on its tokens, hardly on whose they are, and throughput is
concave in them; so P tokens over F steps run fastest when split evenly, in steps above the knee of that curve. The
knee is measured on the loaded model (`hasten.lm.scheduling.latency`): on a CPU it lies at tens of tokens, not hundreds.

Once per step: generating sequences in order, each where its last page has room or a page is free, else it is left
out. Then prompts, first come first served, until the step holds exactly the budget: the last one is cut, and goes on
before any newer one. A prompt starts only when pages for all of it are free; they are taken at once, so that no
continuation can fail. When nothing at all can run, the last sequence that holds pages gives them up, is a new
prompt (the old one and what was generated) and waits behind the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from hasten.core.errors import SettingError
from hasten.core.technique import Technique
from hasten.lm.scheduling.latency import LatencyCurve, kept_curve
from hasten.lm.scheduling.queues import QueueScheduler, Step
from hasten.lm.sequence import Sequence

if TYPE_CHECKING:
    from hasten.core.artefact import ArtefactStore
    from hasten.lm.kvcache.cache import KVCache
    from hasten.lm.runner import Runner
    from hasten.lm.scheduling.scheduler import Scheduler
    from hasten.lm.settings import EngineSettings
    from hasten.models.context import BuildContext


class FastGen(Technique):
    """Steps of one measured size: decode rows first, long prompts split, short ones fused, to fill the rest."""

    slug: ClassVar[str] = "fastgen"
    slots: ClassVar[tuple[str, ...]] = ("scheduler",)
    lossless: ClassVar[bool] = True
    baselines: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"use": {"prefill_first": {}}},
        {"use": {"orca": {}}},
        {"use": {"static_batch": {}}},
        {},
    )

    budget: int | None = Field(
        None, ge=1, description="tokens of a step; none: chosen from the measured latency of steps"
    )
    efficiency: float = Field(
        0.95, gt=0, le=1, description="share of the best measured throughput that the chosen step must reach"
    )

    def provide(self, slot: str, context: BuildContext) -> Scheduler:
        return SplitFuse(self, context.artefacts)


class SplitFuse(QueueScheduler):
    """The scheduler of one engine.

    budget: tokens of a step. curve: the measured latency, None where the budget was given or nothing is measured yet
    (until then a step may hold as much as the engine allows).
    """

    def __init__(self, settings: FastGen, artefacts: ArtefactStore) -> None:
        self.chosen, self.artefacts = settings, artefacts
        self.curve: LatencyCurve | None = None
        self._turns = itertools.count()
        self._turn: dict[Sequence, int] = {}

    def bind(self, cache: KVCache, settings: EngineSettings) -> None:
        super().bind(cache, settings)
        if self.chosen.budget is not None:
            if self.chosen.budget > settings.max_step_tokens:
                raise SettingError(
                    f"fastgen.budget = {self.chosen.budget}, but engine.max_step_tokens = {settings.max_step_tokens}: "
                    "raise max_step_tokens or lower the budget"
                )
            self.budget = self.chosen.budget

    def calibrate(self, runner: Runner) -> None:
        """Choose the budget from the latency curve, unless it was given. Raises what `kept_curve` raises."""
        if self.chosen.budget is None:
            self.curve = kept_curve(self.artefacts, self.chosen.slug, runner, self.settings.max_step_tokens)
            self.budget = self.curve.budget(self.chosen.efficiency)

    def facts(self) -> Mapping[str, Any]:
        found: dict[str, Any] = {"step_budget": self.budget}
        if self.curve is not None:
            found["step_latency"] = self.curve.to_dict()
        return found

    def order(self, sequence: Sequence) -> tuple[int, ...]:
        """Priority, then the turn in which it came, or came back."""
        return sequence.key[0], self._turn[sequence]

    def add(self, sequence: Sequence) -> None:
        self._turn[sequence] = next(self._turns)
        super().add(sequence)

    def adopt(self, sequence: Sequence) -> bool:
        self._turn[sequence] = next(self._turns)
        if super().adopt(sequence):
            return True
        del self._turn[sequence]
        return False

    def remove(self, sequence: Sequence) -> None:
        super().remove(sequence)
        self._turn.pop(sequence, None)

    def plan(self, step: Step) -> None:
        while True:
            self.grow(self.decoding(), step, evict=False)
            self.grow(self.reading(), step, evict=False)
            if not step.short:
                self.admit(step)
            if step.work:
                return
            holding = [s for s in (*self._running, *self._waiting) if s.kv is not None]
            if not holding:
                return
            self.preempt(holding[-1])
            step.short = False
