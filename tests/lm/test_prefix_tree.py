"""The prefix tree of `blendserve`: structure, costs, order, estimates, splitting."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.lm.scheduling.prefix_tree import Entry, PrefixTree, common_prefix, dfs_order
from hasten.lm.scheduling.resources import Rates

RATES = Rates(token=1.0, pair=0.01, read=0.02)
PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), max_size=20)


def computed(prompts, granule):
    """Prompt tokens computed one prompt after the other, in sorted order, on a cache of whole granules."""
    cached, total = set(), 0
    for prompt in sorted(prompts):
        whole = [tuple(prompt[:end]) for end in range(granule, len(prompt) + 1, granule)]
        usable = [block for block in whole if block in cached and len(block) < len(prompt)]
        total += len(prompt) - max(map(len, usable), default=0)
        cached.update(whole)
    return total


@settings(max_examples=150, deadline=None)
@given(PROMPTS, st.sampled_from([1, 3]))
def test_every_prompt_is_a_path_and_sharing_is_what_brute_force_says(prompts, granule):
    tree = PrefixTree([Entry(prompt, 2.0) for prompt in prompts], granule)
    tree.cost(RATES)
    assert sorted(tree.walk()) == list(range(len(prompts)))
    for index, prompt in enumerate(prompts):
        node, stop = tree.leaves[index], len(prompt)
        while node.parent is not None:
            assert node.stop == stop
            assert node.start <= node.stop
            stop, node = node.start, node.parent
        assert stop == 0
    for node in tree.nodes():
        if node.children and node is not tree.root:
            assert node.request < 0
            assert len({tuple(prompts[i][: node.stop]) for i in requests_below(node)}) == 1
            assert node.stop % granule == 0
    assert tree.root.saved == sum(map(len, prompts)) - computed(prompts, granule)
    alone = sum(RATES.prompt(0, len(p)) + RATES.decode(2.0) for p in prompts)
    assert tree.root.comp <= alone + 1e-6
    assert tree.root.mem == pytest.approx(sum(RATES.memory(len(p), 2.0) for p in prompts))
    assert tree.root.count == len(prompts)


def requests_below(node):
    found, stack = [], [node]
    while stack:
        at = stack.pop()
        stack += at.children
        if at.request >= 0:
            found.append(at.request)
    return found


def test_sharing_by_hand():
    prompts = [[1, 2, 3, i, i] for i in range(10, 14)] + [[1, 9, i] for i in range(10, 13)] + [[7]]
    tree = PrefixTree([Entry(prompt, 1.0) for prompt in prompts])
    tree.cost(RATES)
    assert tree.root.saved == 6 * 1 + 3 * 2 + 2 * 1  # [1], [2, 3] and [9]


@settings(max_examples=100, deadline=None)
@given(
    PROMPTS, st.lists(st.integers(1, 40), min_size=20, max_size=20), st.sampled_from([0.0, 0.9, 0.99, 1.0])
)
def test_sorted_children_fall_in_density_and_splitting_keeps_sharing(prompts, outputs, keep):
    tree = PrefixTree([Entry(p, float(o)) for p, o in zip(prompts, outputs, strict=False)])
    tree.cost(RATES)
    tree.sort()
    before = tree.root.saved
    for _ in range(2):  # again and again: the bound is about the sharing there was at first
        tree.split(RATES, keep)
        for node in tree.nodes():
            densities = [child.density for child in node.children]
            assert densities == sorted(densities, reverse=True)
        assert tree.root.saved >= keep * before - 1e-9
        assert sorted(tree.walk()) == list(range(len(prompts)))


def test_an_outlier_moves_to_where_its_density_belongs():
    """One request under a prefix of classifiers writes a long answer: it runs with those that write."""
    group = [Entry([1, 1, *range(10 * i, 10 * i + 30)], 1.0) for i in range(2, 12)]
    outlier = Entry([1, 1, 5, 6, 7], 400.0)
    writers = [Entry([3, i], 300.0) for i in range(4)]
    middle = [Entry([8, *range(i, i + 12)], 4.0) for i in (100, 200)]
    tree = PrefixTree([*group, outlier, *writers, *middle])
    tree.cost(RATES)
    tree.sort()
    together = tree.walk()
    assert abs(together.index(10) - together.index(9)) <= 10  # inside its group
    assert tree.split(RATES, 0.85) == 1
    place = {index: i for i, index in enumerate(tree.walk())}
    assert all(place[10] > place[i] for i in (*range(10), 15, 16))
    assert tree.split(RATES, 1.0) == 0


def test_estimates_come_from_the_nearest_subtree_that_has_seen_an_end():
    prompts = [[1, 2, 3], [1, 2, 4], [1, 5, 6], [9]]
    tree = PrefixTree([Entry(prompt) for prompt in prompts])
    tree.estimate(64.0)
    assert [entry.output for entry in tree.entries] == [64.0] * 4
    tree.observe(tree.leaves[0], tree.entries[0], 10)
    tree.estimate(64.0)
    assert [entry.output for entry in tree.entries] == [10.0] * 4  # the root has seen one
    tree.observe(tree.leaves[3], tree.entries[3], 100)
    tree.estimate(64.0)
    assert [entry.output for entry in tree.entries] == [10.0, 10.0, 10.0, 100.0]
    tree.observe(tree.leaves[2], tree.entries[2], 30)
    tree.estimate(64.0)
    assert [entry.output for entry in tree.entries] == [10.0, 10.0, 30.0, 100.0]


def test_what_shares_nothing_stays_alone():
    tree = PrefixTree([Entry([1, 2, 3], shares=False), Entry([1, 2, 3]), Entry([1, 2, 4])])
    tree.cost(RATES)
    assert tree.leaves[0].parent is tree.root
    assert tree.root.saved == 2


def test_neighbours_in_depth_first_order_share():
    rng = random.Random(1)
    prompts = [[group, group, *(rng.randrange(50) for _ in range(5))] for group in range(6) for _ in range(5)]
    rng.shuffle(prompts)
    order = dfs_order([Entry(prompt) for prompt in prompts])
    groups = [prompts[index][0] for index in order]
    assert sum(a != b for a, b in pairwise(groups)) == 5


def test_empty_and_readless_jobs():
    tree = PrefixTree([])
    tree.cost(RATES)
    tree.sort()
    assert tree.split(RATES, 0.9) == 0
    assert tree.walk() == []
    tree = PrefixTree([Entry([1, 2], 0.0), Entry([3], 1.0)])
    tree.cost(RATES)
    tree.sort()
    assert tree.leaves[0].density == math.inf
    assert tree.walk() == [0, 1]


@given(st.lists(st.integers(0, 1), max_size=30), st.lists(st.integers(0, 1), max_size=30))
def test_common_prefix(a, b):
    limit = min(len(a), len(b))
    want = next((i for i in range(limit) if a[i] != b[i]), limit)
    assert common_prefix(a, b, limit) == want
