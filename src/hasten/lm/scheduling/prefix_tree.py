"""A prefix tree over all prompts of a job that knows what its subtrees cost.

Source: BlendServe (Zhao et al., 2024, arXiv 2411.16102), section 4. Children are ordered by falling density (time of
arithmetic over time of reading), so a walk through the leaves goes from the requests that compute most to those that
read most, while requests with a common prefix stay together. A group whose density belongs elsewhere is moved there, at
the price of computing its prefix twice (*splitting*), as long as nearly all sharing is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hasten.lm.scheduling.resources import Rates


@dataclass
class Entry:
    """One request of the job.

    tokens: its prompt. output: tokens it is expected to generate. shares: whether equal tokens mean equal pages.
    known: whether ``output`` is what it did generate.
    """

    tokens: Sequence[int]
    output: float = 0.0
    shares: bool = True
    known: bool = False


class Node:
    """Tokens [start, stop) that all requests below share; a leaf is one request, with the rest of its prompt.

    comp, mem: seconds of the subtree, shared tokens counted once. count, saved: its requests, and the prompt tokens
    that sharing saves them. seen, total: requests below that have ended, and the tokens they made.
    """

    __slots__ = (
        "children", "comp", "count", "expected", "mem", "parent", "request", "saved", "seen", "start", "stop", "total",
    )  # fmt: skip

    def __init__(self, parent: Node | None, start: int, stop: int, request: int = -1) -> None:
        self.parent, self.start, self.stop, self.request = parent, start, stop, request
        self.children: list[Node] = []
        self.comp = self.mem = self.expected = 0.0
        self.count = self.saved = self.seen = self.total = 0

    @property
    def density(self) -> float:
        """Time of arithmetic over time of reading; infinite where nothing is read."""
        return self.comp / self.mem if self.mem > 0 else math.inf


class PrefixTree:
    """The tree of a list of requests, which it refers to by index.

    granule: sharing counts in whole multiples of so many tokens (a KV page). Building sorts the prompts and compares
    neighbours: n log n comparisons of token lists.
    """

    def __init__(self, entries: Sequence[Entry], granule: int = 1) -> None:
        self.entries, self.granule = entries, granule
        self.root = Node(None, 0, 0)
        self.leaves: list[Node] = [self.root] * len(entries)
        self.sharing: int | None = None  # prompt tokens that sharing saved before anything was moved
        self._build()

    def _build(self) -> None:
        """Insert the prompts in sorted order: each leaves the path of the one before where the two part."""
        keys = [e.tokens if isinstance(e.tokens, list) else list(e.tokens) for e in self.entries]
        path = [self.root]
        before: list[int] = []
        for index in sorted(range(len(keys)), key=keys.__getitem__):
            tokens = keys[index]
            # At least the last token of a prompt is its own: its logits are needed.
            most = min(len(before), len(tokens) - 1) if self.entries[index].shares else 0
            depth = common_prefix(before, tokens, most) // self.granule * self.granule
            while len(path) > 1 and path[-1].start >= depth:
                path.pop()
            top = path[-1]
            if top.stop > depth or top.request >= 0:  # a leaf, or an edge followed only in part: cut it there
                top = self._cut(top, depth)
                path[-1] = top
            leaf = Node(top, top.stop, len(tokens), index)
            top.children.append(leaf)
            self.leaves[index] = leaf
            path.append(leaf)
            before = tokens if self.entries[index].shares else []

    @staticmethod
    def _cut(node: Node, depth: int) -> Node:
        """Put a node that ends at ``depth`` above ``node``; it takes its place."""
        parent = node.parent
        assert parent is not None
        upper = Node(parent, node.start, depth)
        parent.children[-1] = upper  # prompts come sorted: what is cut lies on the last path
        upper.children.append(node)
        node.parent, node.start = upper, depth
        return upper

    # -- costs ---------------------------------------------------------------------------------------------------

    def nodes(self) -> list[Node]:
        """All nodes, parents before children."""
        found, at = [self.root], 0
        while at < len(found):
            found += found[at].children
            at += 1
        return found

    def cost(self, rates: Rates) -> None:
        """Add up the costs of all subtrees for the outputs that are expected now."""
        order = self.nodes()
        for node in order:
            node.comp, node.mem, node.count, node.saved = rates.prompt(node.start, node.stop), 0.0, 0, 0
            if node.request >= 0:
                output = self.entries[node.request].output
                node.comp += rates.decode(output)
                node.mem, node.count = rates.memory(node.stop, output), 1
        for node in reversed(order):
            if node.request < 0:
                node.saved += (node.stop - node.start) * max(0, node.count - 1)
            if node.parent is not None:
                node.parent.comp += node.comp
                node.parent.mem += node.mem
                node.parent.count += node.count
                node.parent.saved += node.saved

    def sort(self) -> None:
        """Order the children of every node by falling density."""
        for node in self.nodes():
            node.children.sort(key=lambda child: -child.density)

    def walk(self) -> list[int]:
        """Requests in the order of the leaves, depth first."""
        found, stack = [], [self.root]
        while stack:
            node = stack.pop()
            if node.request >= 0:
                found.append(node.request)
            stack += reversed(node.children)
        return found

    # -- outputs -------------------------------------------------------------------------------------------------

    @staticmethod
    def observe(leaf: Node, entry: Entry, output: int) -> None:
        """A request ended after ``output`` tokens: that is known now, and its subtrees know one more."""
        entry.output, entry.known = float(output), True
        node: Node | None = leaf
        while node is not None:
            node.seen += 1
            node.total += output
            node = node.parent

    def estimate(self, prior: float) -> None:
        """Expect of every request the mean of the nearest subtree that has seen some end, or ``prior``."""
        for node in self.nodes():
            above = prior if node.parent is None else node.parent.expected
            node.expected = node.total / node.seen if node.seen else above
            if node.request >= 0 and not self.entries[node.request].known:
                self.entries[node.request].output = node.expected

    # -- splitting -----------------------------------------------------------------------------------------------

    def split(self, rates: Rates, keep: float) -> int:
        """Move groups to where their density belongs while ``keep`` of the sharing stays; how many were moved.

        Needs `cost` and `sort`; leaves both done. A group may move if, among the subtrees of the root, its density lies
        beyond that of a neighbour of the subtree it is in. The one that gains most (its time x how far its density is
        off, as a logarithm) for a token computed twice goes first.
        """
        if self.sharing is None:
            self.sharing = self.root.saved
        allowed = self.root.saved - keep * self.sharing
        candidates = sorted(self._misplaced(), key=lambda found: -found[0])
        moved: set[Node] = set()
        for _, group in candidates:
            parent = group.parent
            assert parent is not None
            if group.start > allowed or len(parent.children) < 2 or self._below(group, moved):
                continue
            allowed -= group.start
            parent.children.remove(group)
            root_child = Node(self.root, 0, group.start) if group.request < 0 else group
            if root_child is group:
                group.parent, group.start = self.root, 0
            else:
                root_child.children.append(group)
                group.parent = root_child
            self.root.children.append(root_child)
            moved.add(group)
        if moved:
            self.cost(rates)
            self.sort()
        return len(moved)

    def _misplaced(self) -> Iterator[tuple[float, Node]]:
        """(gain per token computed twice, group) of the groups that belong elsewhere."""
        tops = self.root.children
        for place, top in enumerate(tops):
            above = tops[place - 1].density if place else math.inf
            below = tops[place + 1].density if place + 1 < len(tops) else 0.0
            stack = list(top.children)
            while stack:
                group = stack.pop()
                stack += group.children
                if group.start > 0 and not below <= group.density <= above:
                    off = abs(math.log(max(_finite(group.density), 1e-12) / max(_finite(top.density), 1e-12)))
                    yield (group.comp + group.mem) * off / group.start, group

    @staticmethod
    def _below(node: Node, moved: set[Node]) -> bool:
        at: Node | None = node
        while at is not None:
            if at in moved:
                return True
            at = at.parent
        return False


def _finite(density: float) -> float:
    return min(density, 1e12)


def common_prefix(a: Sequence[int], b: Sequence[int], limit: int) -> int:
    """Length of the common prefix of two token lists, at most ``limit``."""
    if a[:limit] == b[:limit]:
        return limit
    low, high = 0, limit
    while low < high:  # bisect over slice comparisons: they run at C speed
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def dfs_order(entries: Sequence[Entry], granule: int = 1) -> list[int]:
    """Requests with common prefixes next to each other, and nothing else: the order of the plain tree."""
    return PrefixTree(entries, granule).walk()


def order_by(entries: Sequence[Entry], key: Callable[[Entry], float]) -> list[int]:
    """Requests by rising ``key``, the first of equals first."""
    return sorted(range(len(entries)), key=lambda index: key(entries[index]))
