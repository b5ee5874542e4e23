"""Schedulers that others are measured against: only what a step holds differs, engine and kernels are the same.

* `prefill_first`: whole prompts before any decoding, as vLLM did in 2023 (Kwon et al., SOSP 2023, arXiv 2309.06180).
* `orca`: whole prompts in the step of the decode rows (Yu et al., OSDI 2022, section 4).
* `static_batch`: a batch is formed, read and decoded to its end before the next one starts.

A prompt longer than a step may be (``max_step_tokens``) is read in consecutive steps that hold nothing else; to
everybody who waits that is one long step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from hasten.core.technique import Technique
from hasten.lm.scheduling.queues import QueueScheduler, Step

if TYPE_CHECKING:
    from hasten.lm.kvcache.cache import KVCache
    from hasten.lm.scheduling.scheduler import Scheduler
    from hasten.lm.settings import EngineSettings
    from hasten.models.context import BuildContext


class PrefillFirst(Technique):
    """Whole prompts run before any decoding does: the first token comes soon, the next ones wait for newer prompts."""

    slug: ClassVar[str] = "prefill_first"
    slots: ClassVar[tuple[str, ...]] = ("scheduler",)
    lossless: ClassVar[bool] = True

    def provide(self, slot: str, context: BuildContext) -> Scheduler:
        return PromptsFirst()


class Orca(Technique):
    """Whole prompts join the step in which the others decode, which lasts as long as the prompts do."""

    slug: ClassVar[str] = "orca"
    slots: ClassVar[tuple[str, ...]] = ("scheduler",)
    lossless: ClassVar[bool] = True

    def provide(self, slot: str, context: BuildContext) -> Scheduler:
        return WholePrompts()


class StaticBatch(Technique):
    """A batch runs to its end before the next one starts."""

    slug: ClassVar[str] = "static_batch"
    slots: ClassVar[tuple[str, ...]] = ("scheduler",)
    lossless: ClassVar[bool] = True

    def provide(self, slot: str, context: BuildContext) -> Scheduler:
        return Batches()


class PromptsFirst(QueueScheduler):
    """Steps of prompts while there are any that fit, else steps of decode rows."""

    stalls = True

    def plan(self, step: Step) -> None:
        self.grow(self.reading(), step)
        if not step.short:
            self.admit(step, whole=True)
        if not step.work:
            self.grow(self.decoding(), step)


class WholePrompts(QueueScheduler):
    """Decode rows and whole prompts in one step."""

    stalls = True

    def plan(self, step: Step) -> None:
        decoding = self.decoding()
        self.grow(decoding, step)
        if step.short:
            return
        prompts = Step(step.room)  # decode rows are no company: a prompt that starts alone may be cut
        self.grow(self.reading(), prompts, evict=False)
        self.admit(prompts, whole=True)
        step.work |= prompts.work
        step.room = prompts.room
        if any(work.stop < len(s.token_ids) for s, work in prompts.work.items()):
            for sequence in decoding:  # the step goes on: nobody's next token comes before the prompt's end
                step.take_back(sequence)


class Batches(QueueScheduler):
    """One batch at a time: its prompts, then its decode rows."""

    stalls = True

    def bind(self, cache: KVCache, settings: EngineSettings) -> None:
        super().bind(cache, settings)
        self._forming = False

    def plan(self, step: Step) -> None:
        self._forming = self._forming or not self._running
        self.grow(self.reading(), step)
        if self._forming and not step.short:
            self.admit(step)
            # A full step says nothing; room that is left says that rows, pages or requests ran out.
            self._forming = step.room == 0
        if not step.work:
            self.grow(self.decoding(), step)
