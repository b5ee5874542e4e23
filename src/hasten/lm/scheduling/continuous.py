"""The default scheduler: continuous batching with chunked prefill, priorities and preemption by recomputation.

Every step runs the decoding sequences first (one row each, or a draft), then fills the row budget with prefill
chunks, first come first served within a priority (Orca, OSDI 2022, section 4; Sarathi, arXiv 2308.16369, section 4).
A sequence is admitted when its whole prompt fits into free pages, so half-computed prompts cannot block each other.
When a running sequence needs a page and none is left, the one that would run last loses its pages and waits; its
tokens, sampling state and text stay, so it goes on where it was.
"""

from __future__ import annotations

from hasten.lm.scheduling.queues import QueueScheduler, Step


class ContinuousBatching(QueueScheduler):
    """First come, first served within a priority; see the module's text."""

    def plan(self, step: Step) -> None:
        self.grow(self.decoding() + self.reading(), step)
        if not step.short:
            self.admit(step)
