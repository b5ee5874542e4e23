"""BlendServe: offline requests ordered so that steps compute and read evenly, while prefixes stay shared.

Source: Zhao et al., "BlendServe: Optimizing Offline Inference for Auto-regressive Large Models with Resource-aware
Batching", 2024, arXiv 2411.16102 (ASPLOS 2026); algorithm details that the text leaves open are reconstructed.

The prompts of a job form a prefix tree whose subtrees know their time of arithmetic and of reading
(`hasten.lm.scheduling.prefix_tree`); sorted by the ratio of the two, its leaves go from requests that compute to
requests that read. Two cursors start at both ends. The KV memory is divided between them so that what runs has the
density of the whole job, and each side starts its next request when it has memory free. Output lengths are not known:
a sample of requests runs first, and every subtree expects the mean of what it saw, or what the one above it did;
estimates and order are renewed when it has ended, and each time the number of finished requests has doubled.

A cursor's next prefix is pinned in the prefix store while the other side runs. Memory that runs out takes pages from
the request that would run last; it is computed again, before any new one starts.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from hasten.core.technique import Technique
from hasten.lm.scheduling import resources
from hasten.lm.scheduling.offline import OfflineScheduler
from hasten.lm.scheduling.prefix_tree import Entry, Node, PrefixTree
from hasten.lm.scheduling.queues import Step
from hasten.lm.sequence import Sequence

if TYPE_CHECKING:
    from hasten.core.artefact import ArtefactStore
    from hasten.lm.runner import Runner
    from hasten.lm.scheduling.scheduler import Scheduler
    from hasten.models.context import BuildContext

Side = Literal["left", "right"]
_SAMPLE = 8  # requests that run first, at least
_QUIET, _HELD = (
    8,
    0.4,
)  # steps without a start, and share of the memory in use, that show it to be promised in vain


class BlendServe(Technique):
    """Requests of a job that compute much and requests that read much run together, prefixes stay shared."""

    slug: ClassVar[str] = "blendserve"
    slots: ClassVar[tuple[str, ...]] = ("scheduler",)
    lossless: ClassVar[bool] = True
    baselines: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"use": {"offline_order": {"order": "dfs"}}},
        {"use": {"offline_order": {"order": "random"}}},
        {},
    )

    lengths: Literal["sampled", "limit"] = Field(
        "sampled",
        description="where expected output lengths come from: requests that have ended, a sample first, or each "
        "request's max_tokens (where that is how long the answer is)",
    )
    sample: float = Field(
        0.01, gt=0, le=1, description="share of the requests that run first to learn lengths"
    )
    prior: float = Field(64.0, gt=0, description="tokens expected of a request before any has ended")
    keep_sharing: float = Field(
        0.99, ge=0, le=1, description="share of the shared prompt tokens that moving groups must leave shared"
    )
    even: bool = Field(
        True, description="a step reads no more of the prompts than balances what its decode rows read"
    )
    seed: int = Field(0, ge=0, description="of the sample")

    def provide(self, slot: str, context: BuildContext) -> Scheduler:
        return DualScanner(self, context.artefacts)


@dataclass
class Started:
    """A request of the job that was started and has not ended."""

    side: Side
    leaf: Node
    entry: Entry

    def need(self, sequence: Sequence) -> float:
        """KV tokens that it is expected to need at its end."""
        return max(sequence.prompt_length + self.entry.output, len(sequence.token_ids))


class DualScanner(OfflineScheduler):
    """The scheduler of one engine. rates: what requests cost here, nominal until the engine is measured."""

    def __init__(self, settings: BlendServe, artefacts: ArtefactStore) -> None:
        self.chosen, self.artefacts = settings, artefacts
        self.rates = resources.NOMINAL
        self.tree = PrefixTree([])
        self.moved = 0
        self._prior = settings.prior
        self._order: deque[int] = deque()  # between the cursors; the left one takes from its left
        self._sample: deque[int] = deque()
        self._started: dict[Sequence, Started] = {}
        self._pins: list[int] = []
        self._unheard: set[Sequence] = set()  # of the sample, who has not ended
        self._ended = self._renew_at = 0
        self._quiet = 0  # steps since a request was started
        self._need = 0.0  # KV tokens of a request, on average

    def calibrate(self, runner: Runner) -> None:
        """Measure what requests cost. Raises what `resources.measured` raises."""
        limit = min(self.settings.max_step_tokens, 128)
        self.rates = resources.measured(self.artefacts, self.chosen.slug, runner, limit)

    def facts(self) -> Mapping[str, Any]:
        return {
            "token_seconds": self.rates.token,
            "read_seconds": self.rates.read,
            "job_density": None if self.tree.root.mem == 0 else self.tree.root.density,
            "groups_moved": self.moved,
        }

    # -- the job's order -----------------------------------------------------------------------------------------

    def arrange(self, entries: list[Entry]) -> None:
        self._unpin()
        before = self.tree.root
        if before.seen:
            self._prior = before.total / before.seen
        self.tree = PrefixTree(entries, self.cache.page_size)
        self._ended = self.moved = 0
        self._sample = deque()
        if self.chosen.lengths == "limit":
            for sequence, one in zip(self.job, entries, strict=True):
                one.output = float(sequence.params.max_tokens)
        elif len(entries) > 1:
            # Evenly along the tree, so that every part of it is heard of; a few at least, which say something.
            count = min(len(entries), max(_SAMPLE, math.ceil(self.chosen.sample * len(entries))))
            walk, first = self.tree.walk(), random.Random(self.chosen.seed).random()
            self._sample = deque(walk[int((i + first) * len(walk) / count)] for i in range(count))
        self._unheard = {self.job[index] for index in self._sample}
        self._renew_at = max(_SAMPLE, len(self._sample))
        self._renew()

    def _renew(self) -> None:
        """Expect lengths, add up, sort, split; who has not started is put in the new order."""
        entries = self.tree.entries
        if self.chosen.lengths == "sampled":
            self.tree.estimate(self._prior)
        self.tree.cost(self.rates)
        self.tree.sort()
        self.moved += self.tree.split(self.rates, self.chosen.keep_sharing)
        self._order = deque(index for index in self.tree.walk() if self.startable(self.job[index]))
        ends = (leaf.stop + entry.output for leaf, entry in zip(self.tree.leaves, entries, strict=True))
        self._need = sum(ends) / len(entries)

    def remove(self, sequence: Sequence) -> None:
        super().remove(sequence)
        started = self._started.pop(sequence, None)
        if started is not None and sequence.output_length > 0:
            self.tree.observe(started.leaf, started.entry, sequence.output_length)
            self._ended += 1
        if sequence in self._unheard:
            self._unheard.discard(sequence)
            if not self._unheard:
                self._renew_at = self._ended
        if not self._crowd:
            self._unpin()

    # -- two cursors ---------------------------------------------------------------------------------------------

    def limit(self, step: Step) -> None:
        """Prompt rows so that the step's arithmetic is to its reading as the whole job's is."""
        density = self.tree.root.density
        if not self.chosen.even or not step.work or not math.isfinite(density):
            return
        if self._order and 2 * self.used("right") < self.shares()["right"]:
            return  # the job begins: nothing to balance yet
        reading = sum(self.rates.read * work.stop for work in step.work.values())
        balanced = density * reading / self.rates.token - len(step.work)
        step.room = min(step.room, max(self.cache.page_size, self.cache.grid, round(balanced)))

    def choose(self, step: Step) -> None:
        if self._ended >= self._renew_at:
            self._renew_at = 2 * self._ended
            self._renew()
        while self._sample and self._room(step):
            index = self._sample[0]
            if self.startable(self.job[index]) and not self._begin(index, step, "left"):
                break
            self._sample.popleft()
        self._quiet += 1
        for side in self._sides(step):
            self._begin_next(side, step)
        self._pin()

    def _room(self, step: Step) -> bool:
        return step.room > 0 and self.cache.free_rows > 0

    def _sides(self, step: Step) -> Iterator[Side]:
        """Which side starts a request next, until neither has memory free, one is refused, or the cursors meet."""
        refused: set[Side] = set()
        while self._room(step) and len(refused) < 2:
            self._trim()
            if not self._order:
                return
            shares = self.shares()
            free = [side for side in shares if side not in refused and self.used(side) < shares[side]]
            if not free:
                if self._running and not self._underused():
                    return
                free = [side for side in shares if side not in refused]
            side = max(free, key=lambda side: shares[side] - self.used(side))
            before = len(self._order)
            yield side
            if len(self._order) == before:
                refused.add(side)

    def _underused(self) -> bool:
        """Whether memory has been idle for some steps although it is all promised: lengths are overestimated."""
        if self._quiet < _QUIET:
            return False
        held = sum(len(sequence.token_ids) for sequence in self._started)
        return held < _HELD * self.capacity()

    def _trim(self) -> None:
        """Drop from both ends who was cancelled or ran with the sample."""
        for end, drop in ((0, self._order.popleft), (-1, self._order.pop)):
            while self._order and not self.startable(self.job[self._order[end]]):
                drop()

    def _begin_next(self, side: Side, step: Step) -> None:
        end = 0 if side == "left" else -1
        if self._begin(self._order[end], step, side):
            del self._order[end]

    def _begin(self, index: int, step: Step, side: Side) -> bool:
        sequence = self.job[index]
        if self._soon_shared(sequence, step) or not self.start(sequence, step):
            return False
        self._quiet = 0
        self._started[sequence] = Started(side, self.tree.leaves[index], self.tree.entries[index])
        return True

    def shares(self) -> dict[Side, float]:
        """KV tokens that each side may use: M_L rho_L + M_R rho_R = M rho(root), M_L + M_R = M.

        rho of a side is that of its running requests, or of its next one where none runs. M is the cache, or what a
        full batch uses of it. Raises nothing; where the two sides do not differ, each gets half.
        """
        memory = self.capacity()
        left, right, root = self.density("left"), self.density("right"), self.tree.root.density
        if not left > right:
            return {"left": memory / 2, "right": memory / 2}
        share = memory * min(1.0, max(0.0, (root - right) / (left - right)))
        return {"left": share, "right": memory - share}

    def capacity(self) -> float:
        """KV tokens that can be in use at once: all pages, or what as many average requests as a step has rows need."""
        return min(self.cache.pool.count * self.cache.page_size, self.settings.max_batch * self._need)

    def used(self, side: Side) -> float:
        """KV tokens that a side's requests are expected to need at their ends."""
        return sum(one.need(sequence) for sequence, one in self._started.items() if one.side == side)

    def density(self, side: Side) -> float:
        """Of what a side runs; of what it would start next where that is nothing."""
        leaves = [one.leaf for one in self._started.values() if one.side == side]
        if not leaves and self._order:
            leaves = [self.tree.leaves[self._order[0 if side == "left" else -1]]]
        mem = sum(leaf.mem for leaf in leaves)
        return sum(leaf.comp for leaf in leaves) / mem if mem > 0 else 0.0

    # -- pins ----------------------------------------------------------------------------------------------------

    def _pin(self) -> None:
        """Hold the stored pages of what each side starts next, so that the other side's run does not evict them."""
        self._unpin()
        size = self.cache.page_size
        for end in (0, -1) if self._order else ():
            sequence = self.job[self._order[end]]
            if sequence.request.plain:
                whole = (len(sequence.token_ids) - 1) // size * size
                pages = self.cache.store.match(sequence.token_ids[:whole], sequence.segments)
                self.cache.pool.retain(pages)
                self._pins += pages

    def _unpin(self) -> bool:
        """Let go of pinned pages; whether there were any."""
        pages, self._pins = self._pins, []
        self.cache.pool.release(pages)
        return bool(pages)

    def spare(self) -> bool:
        """Pages are short: pinned ones go before anybody who runs loses its own."""
        return self._unpin()
