"""The knowledge tree of RAGCache: documents by the sequence of documents before them, with what they are worth.

A node is a document (or the instructions before the first) *behind* the path that leads to it: its keys and values
depend on all of that, so [D1, D2] and [D2, D1] share nothing. A page that reaches over the end of a document belongs
to the next one. Nodes are found by their tokens, so a hit is exact.

Source: Jin et al., "RAGCache", 2024, arXiv 2404.12457, sections 4 and 5.1 (algorithm 1). The count of recent accesses
and the cost of a path are kept whether or not its pages are, for as long as its last access is recent.
"""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

Policy = Literal["pgdsf", "gdsf", "lru", "lfu"]
Tier = Literal[0, 1]
FAST: Tier = 0
HOST: Tier = 1


@dataclass(eq=False, slots=True)
class Stats:
    """What is known of a path. frequency: accesses among the recent ones. Costs are seconds per token computed."""

    frequency: int = 0
    total_cost: float = 0.0
    computed: int = 0  # accesses in which the document had to be computed
    forgotten: int = 0  # of its recent accesses, those that do not count
    node: Node | None = None  # while something of it is stored

    @property
    def counted(self) -> int:
        return self.frequency - self.forgotten

    @property
    def average_cost(self) -> float:
        return self.total_cost / self.computed if self.computed else 0.0


@dataclass(eq=False, slots=True)
class Node:
    """key: tokens, whole pages. pages: in the pool, or empty. slots: in the host tier, or empty.

    clock: of each tier when the node was last accessed. stamp: number of that access. swaps: copies to the host so far.
    pins: holders that keep it from eviction besides its pages' own users.
    """

    key: tuple[int, ...]
    digest: bytes
    parent: Node | None
    stats: Stats
    start: int = 0
    pages: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)
    fast_children: int = 0
    clock: list[float] = field(default_factory=lambda: [0.0, 0.0])
    stamp: int = 0
    swaps: int = 0
    pins: int = 0
    serial: list[int] = field(default_factory=lambda: [-1, -1])

    def leaf(self, tier: Tier) -> bool:
        """Whether eviction from ``tier`` may take it. A node that is in the pool never leaves the host tier."""
        if tier == FAST:
            return bool(self.pages) and self.fast_children == 0
        return bool(self.slots) and not self.pages and not self.children


class KnowledgeTree:
    """Nodes, their statistics and one queue of leaves per tier. Knows nothing of how pages are stored.

    cost: seconds for new tokens behind cached ones. window: document accesses that count as recent. history: whether
    what is known of a path outlives its node.
    """

    def __init__(
        self, policy: Policy, window: int, cost: Callable[[float, float], float], history: bool = True
    ) -> None:
        self.policy, self.window, self.cost, self.history = policy, window, cost, history
        self.root = Node((), b"", None, Stats())
        self.clocks = [0.0, 0.0]
        self.count = 0
        self._stats: dict[bytes, Stats] = {}
        self._recent: deque[bytes] = deque()
        self._queues: tuple[list[tuple[float, int, int, Node]], ...] = ([], [])
        self._serial = self._stamp = 0

    # -- walking -------------------------------------------------------------------------------------------------

    def walk(self, token_ids: Sequence[int], cuts: Sequence[int]) -> Iterator[Node]:
        """The stored nodes along a prompt, from the first document on, until one is missing."""
        node, start = self.root, 0
        for stop in cuts:
            if stop > len(token_ids):
                return
            found = node.children.get(tuple(token_ids[start:stop]))
            if found is None:
                return
            yield found
            node, start = found, stop

    def child(self, parent: Node, key: tuple[int, ...]) -> Node:
        """The node of ``key`` behind ``parent``, made if it is missing (the caller gives it pages)."""
        found = parent.children.get(key)
        if found is None:
            digest = _digest(parent.digest, key)
            stats = self._stats.get(digest)
            start = parent.start + len(parent.key)
            if stats is None:  # nobody announced it: as if it were accessed and computed now, alone
                stats = self._stats[digest] = Stats()
                self._saw(digest, stats)
                stats.total_cost, stats.computed = self.cost(start, len(key)) / len(key), 1
            self._stamp += 1
            found = Node(key, digest, parent, stats, start, clock=list(self.clocks), stamp=self._stamp)
            parent.children[key] = stats.node = found
            self.count += 1
        return found

    def remove(self, node: Node) -> None:
        """Forget a node without children. What is known of its path stays while it is recent."""
        assert node.parent is not None
        assert not node.children
        del node.parent.children[node.key]
        node.serial[:] = [-1, -1]
        node.stats.node = None
        self.count -= 1
        if node.stats.frequency == 0:
            self._stats.pop(node.digest, None)
        elif not self.history:
            node.stats.total_cost, node.stats.computed = 0.0, 0
            node.stats.forgotten = node.stats.frequency
        self.queue(node.parent, HOST)

    # -- worth ---------------------------------------------------------------------------------------------------

    def access(self, token_ids: Sequence[int], cuts: Sequence[int], cached: int) -> None:
        """A request reads this prompt, the first ``cached`` tokens from the cache: count it and what it costs.

        Every document that has to be computed is charged the request's cost per computed token (T(alpha, beta) / beta).
        """
        self._stamp += 1
        beta = len(token_ids) - cached
        per_token = self.cost(cached, beta) / beta if beta > 0 else 0.0
        node: Node | None = self.root
        digest, start = b"", 0
        for stop in cuts:
            if stop > len(token_ids):
                break
            key = tuple(token_ids[start:stop])
            node = None if node is None else node.children.get(key)
            digest = _digest(digest, key) if node is None else node.digest
            stats = self._stats.setdefault(digest, Stats())
            if stop > cached:
                stats.total_cost += per_token
                stats.computed += 1
            self._saw(digest, stats)
            if node is not None:
                node.clock[:] = self.clocks
                node.stamp = self._stamp
                self.queue(node, FAST)
                self.queue(node, HOST)
            start = stop

    def _saw(self, digest: bytes, stats: Stats) -> None:
        stats.frequency += 1
        self._recent.append(digest)
        if len(self._recent) > self.window:
            old = self._recent.popleft()
            gone = self._stats[old]
            gone.frequency -= 1
            gone.forgotten = max(0, gone.forgotten - 1)  # the oldest are those
            if gone.node is not None:
                self.queue(gone.node, FAST)
                self.queue(gone.node, HOST)
            elif gone.frequency == 0:
                del self._stats[old]

    def value(self, node: Node, tier: Tier) -> float:
        """What the policy holds a node for: the lowest is evicted first."""
        if self.policy == "pgdsf":
            return node.clock[tier] + node.stats.counted * node.stats.average_cost
        if self.policy == "gdsf":  # the cost of the document alone
            return node.clock[tier] + node.stats.counted * self.cost(0, len(node.key)) / len(node.key)
        return float(node.stamp if self.policy == "lru" else node.stats.counted)

    # -- the queues of leaves ------------------------------------------------------------------------------------

    def queue(self, node: Node, tier: Tier) -> None:
        """Call whenever a node's worth changed or it may have become a leaf of ``tier``."""
        if node.parent is None or not node.leaf(tier):
            node.serial[tier] = -1
            return
        self._serial += 1
        node.serial[tier] = self._serial
        heap = self._queues[tier]
        heapq.heappush(heap, (self.value(node, tier), node.stamp, self._serial, node))
        if len(heap) > 4 * self.count + 64:
            heap[:] = [entry for entry in heap if entry[3].serial[tier] == entry[2]]
            heapq.heapify(heap)

    def victims(self, tier: Tier) -> Generator[Node, None, None]:
        """Leaves of ``tier``, the least worth first, leaves that eviction uncovers included.

        A node that is still a leaf when the next one is asked for was refused: it is in use, and stays in the queue.
        """
        heap, refused = self._queues[tier], []
        try:
            while heap:
                entry = heapq.heappop(heap)
                node = entry[3]
                if node.serial[tier] != entry[2]:
                    continue  # an older state of it
                yield node
                if node.serial[tier] == entry[2] and node.leaf(tier):
                    refused.append(entry)
        finally:
            for entry in refused:
                if entry[3].serial[tier] == entry[2]:
                    heapq.heappush(heap, entry)

    def evicted(self, node: Node, tier: Tier) -> None:
        """A leaf leaves ``tier``: time moves on to what it was worth. Call before its pages or slots are given up."""
        self.clocks[tier] = max(self.clocks[tier], self.value(node, tier))

    # -- facts ---------------------------------------------------------------------------------------------------

    def nodes(self) -> Iterator[Node]:
        """Every node, parents before their children."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())


def _digest(before: bytes, key: tuple[int, ...]) -> bytes:
    return hashlib.blake2b(before + array("q", key).tobytes(), digest_size=16).digest()
