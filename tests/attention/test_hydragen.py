"""The prefix tree of a step, and attention over it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from attention_steps import make_layout, naive_attention, random_pages, random_queries, random_step
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.attention import pieces as planning
from hasten.attention.dense import DenseKernel
from hasten.attention.hydragen import Hydragen, HydragenKernel, prefix_tree
from hasten.attention.layout import AttentionSpec, HeadShape, StepLayout
from hasten.attention.policy import Dense
from hasten.core.errors import SettingError, UnknownNameError


def tree_of(tables: list[list[int]], **limits: int) -> tuple[list[tuple[int, int, list[int]]], list[int]]:
    """[(begin, end, members)], covered pages per sequence."""
    width = max(map(len, tables)) + 1
    table = np.full((len(tables), width), -1, np.int32)
    for s, pages in enumerate(tables):
        table[s, : len(pages)] = pages
    tree = prefix_tree(table, np.array([len(t) for t in tables]), **limits)
    cut = tree.member_start_I1
    nodes = [
        (int(a), int(b), sorted(tree.member_Z[cut[i] : cut[i + 1]].tolist()))
        for i, (a, b) in enumerate(zip(tree.begin_I, tree.end_I, strict=True))
    ]
    return sorted(nodes), tree.base_S.tolist()


def test_one_level() -> None:
    assert tree_of([[7, 8, 1], [7, 8, 2], [7, 8, 3]]) == ([(0, 2, [0, 1, 2])], [2, 2, 2])


def test_three_levels_of_ragged_nodes_in_any_order() -> None:
    tables = [[9, 5, 6, 1], [2, 3], [9, 5, 4], [9, 5, 6, 8], [2, 7], [9, 11], [30]]
    nodes = [(0, 1, [0, 2, 3, 5]), (0, 1, [1, 4]), (1, 2, [0, 2, 3]), (2, 3, [0, 3])]
    assert tree_of(tables) == (nodes, [3, 1, 2, 3, 1, 1, 0])


def test_identical_and_contained_sequences() -> None:
    assert tree_of([[1, 2], [1, 2], [1]]) == ([(0, 1, [0, 1, 2]), (1, 2, [0, 1])], [2, 2, 1])


def test_same_page_at_another_place_is_not_a_prefix() -> None:
    assert tree_of([[1, 2, 3], [2, 1, 3], [4, 1]]) == ([], [0, 0, 0])


def test_limits() -> None:
    tables = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6], [1, 7]]
    assert tree_of(tables, min_pages=2) == ([(0, 2, [0, 1, 2])], [2, 2, 2, 0])
    assert tree_of(tables, min_sharers=3) == ([(0, 1, [0, 1, 2, 3]), (1, 2, [0, 1, 2])], [2, 2, 2, 1])
    assert tree_of(tables, max_levels=1) == ([(0, 1, [0, 1, 2, 3])], [1, 1, 1, 1])
    # A node too short to be read for the group belongs to its children.
    assert tree_of([[1, 2, 3], [1, 2, 3], [1, 9]], min_pages=3) == ([(0, 3, [0, 1])], [3, 3, 0])


def test_no_sequences_and_empty_tables() -> None:
    assert len(prefix_tree(np.zeros((0, 4), np.int32), np.zeros(0, np.int64)).begin_I) == 0
    assert tree_of([[], []]) == ([], [0, 0])


@given(
    st.lists(st.lists(st.integers(0, 2), max_size=5), min_size=1, max_size=8),
    st.integers(2, 4),
    st.sampled_from([1, 1, 2, 3]),
    st.sampled_from([8, 8, 2, 1]),
)
@settings(max_examples=200, deadline=None)
def test_every_node_is_shared_and_covers_each_member_once(
    tables: list[list[int]], min_sharers: int, min_pages: int, max_levels: int
) -> None:
    nodes, base = tree_of(tables, min_sharers=min_sharers, min_pages=min_pages, max_levels=max_levels)
    covered: list[list[int]] = [[] for _ in tables]
    for begin, end, members in nodes:
        assert len(members) >= min_sharers
        assert end - begin >= min_pages
        assert len({tuple(tables[s][:end]) for s in members}) == 1
        assert all(len(tables[s]) >= end for s in members)
        for s in members:
            covered[s] += range(begin, end)
    for s, pages in enumerate(covered):
        assert sorted(pages) == list(range(base[s]))
        assert sum(s in members for _, _, members in nodes) <= max_levels
    if min_pages == 1 and max_levels == 8:
        # Nothing that enough sequences share is left to the suffixes.
        for s, table in enumerate(tables):
            deepest = max(
                (n for n in range(len(table) + 1) if sum(t[:n] == table[:n] for t in tables) >= min_sharers),
                default=0,
            )
            assert base[s] == deepest


@given(
    seed=st.integers(0, 2**32),
    page=st.sampled_from([1, 4]),
    sequences=st.integers(1, 9),
    shape=st.sampled_from([(1, 1, 8), (6, 2, 16), (3, 3, 16)]),
    window=st.sampled_from([None, 3, 20]),
    limits=st.fixed_dictionaries(
        {
            "min_prefix": st.sampled_from([1, 1, 6]),
            "min_sharers": st.integers(2, 3),
            "max_levels": st.integers(1, 8),
        }
    ),
    small=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_attention_equals_plain(
    seed: int,
    page: int,
    sequences: int,
    shape: tuple[int, int, int],
    window: int | None,
    limits: dict[str, int],
    small: bool,
) -> None:
    layout, pool = random_step(random.Random(seed), page=page, sequences=sequences)
    spec = AttentionSpec(HeadShape(*shape), 0.3, window)
    pages = random_pages(seed, pool, page, spec.shape, torch.float32)
    q = random_queries(seed + 1, layout.rows, spec.shape)
    kernel = HydragenKernel(Hydragen(**limits))
    with pytest.MonkeyPatch.context() as patch:
        if small:
            patch.setattr(planning, "MIN_CHUNK", 4)
            patch.setattr(torch, "get_num_threads", lambda: 2)
        out = kernel.run(kernel.plan(layout), 0, q, pages, layout, spec, Dense())
    torch.testing.assert_close(out.double(), naive_attention(q, pages, layout, spec), atol=1e-5, rtol=1e-5)


def decode_layout(lengths: list[int], ids: tuple[int, ...], shared: int = 8) -> StepLayout:
    """Sequences over ``shared`` common pages of 4 tokens; sequence ``i`` owns pages 100 i + 100 and on."""
    tables = [
        [*range(shared), *(100 + 100 * i + j for j in range(-(-n // 4) - shared))]
        for i, n in zip(ids, lengths, strict=True)
    ]
    return make_layout(tables, lengths, [1] * len(lengths), 4, ids)


def test_tree_is_kept_while_sequences_decode_and_made_anew_when_they_come_and_go() -> None:
    kernel = HydragenKernel(Hydragen(min_prefix=8))
    spec = AttentionSpec(HeadShape(6, 2, 16), 0.3)
    pages = random_pages(0, 600, 4, spec.shape, torch.float32)
    steps = [
        ([34, 37, 41], (0, 1, 2), 1),
        ([35, 38, 42], (0, 1, 2), 1),
        ([36, 39, 43], (0, 1, 2), 1),
        ([37, 40, 44], (0, 1, 2), 1),  # sequence 0 gets another page
        ([38, 45], (0, 2), 2),  # 1 leaves
        ([33, 39, 46], (3, 0, 2), 3),  # 3 joins, first in the batch
        ([34, 40, 47], (3, 0, 2), 3),
    ]
    for step, (lengths, ids, rebuilt) in enumerate(steps):
        layout = decode_layout(lengths, ids)
        q = random_queries(step, len(ids), spec.shape)
        plan = kernel.plan(layout)
        out = kernel.run(plan, 0, q, pages, layout, spec, Dense())
        torch.testing.assert_close(
            out.double(), naive_attention(q, pages, layout, spec), atol=1e-5, rtol=1e-5
        )
        assert kernel.rebuilt == rebuilt, step
        assert len(plan.pieces.page_C) == 8 + sum(-(-n // 4) - 8 for n in lengths)


def test_tree_is_made_anew_when_a_sequence_is_cut_back_into_it() -> None:
    kernel = HydragenKernel(Hydragen(min_prefix=4))
    spec = AttentionSpec(HeadShape(2, 1, 16), 0.3)
    pages = random_pages(0, 400, 4, spec.shape, torch.float32)
    for lengths in ([40, 41], [20, 42]):
        layout = decode_layout(lengths, (0, 1), shared=5)
        q = random_queries(1, 2, spec.shape)
        out = kernel.run(kernel.plan(layout), 0, q, pages, layout, spec, Dense())
        torch.testing.assert_close(
            out.double(), naive_attention(q, pages, layout, spec), atol=1e-5, rtol=1e-5
        )
    assert kernel.rebuilt == 2


def test_one_sequence_is_planned_as_the_dense_kernel_does() -> None:
    layout = decode_layout([300], (0,))
    spec = AttentionSpec(HeadShape(6, 2, 16), 0.3)
    kernel = HydragenKernel(Hydragen())
    ours, dense = (k.plan(layout).part(spec).schedule.facts() for k in (kernel, DenseKernel()))
    for name in ("task_K7", "worker_start_W1", "part_row_R", "first_E", "limit_E"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(dense, name))


def test_settings_are_checked() -> None:
    assert isinstance(Hydragen().provide("attention_kernel", None), HydragenKernel)  # type: ignore[arg-type]
    for bad in ({"min_sharers": 1}, {"min_prefix": 0}, {"max_levels": 0}):
        with pytest.raises(SettingError, match=next(iter(bad))):
            Hydragen(**bad)
    with pytest.raises(UnknownNameError, match="min_prefix"):
        Hydragen(min_prefx=3)
