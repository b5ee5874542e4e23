"""Planning: what is cut still covers every visible token exactly once, and no task is much larger than its share."""

from __future__ import annotations

import random

import numpy as np
import pytest
from attention_steps import make_layout, random_step
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.attention import pieces as planning
from hasten.attention.pieces import (
    Pieces,
    Rows,
    balance,
    finish,
    join,
    prefix_sum,
    ranges,
    sequence_pieces,
    windowed,
)


def coverage(pieces: Pieces, rows: Rows) -> list[list[int]]:
    """For each row, the (page, offset) slots it reads, sorted."""
    seen: list[list[int]] = [[] for _ in rows.limit_T]
    for j, e in enumerate_entries(pieces):
        start = pieces.page_start_J1[j]
        for token in range(int(pieces.first_E[e]), int(pieces.limit_E[e])):
            page = int(pieces.page_C[start + token // rows.page])
            assert start + token // rows.page < pieces.page_start_J1[j + 1]
            seen[int(pieces.row_E[e])].append(page * rows.page + token % rows.page)
    return [sorted(slots) for slots in seen]


def enumerate_entries(pieces: Pieces) -> list[tuple[int, int]]:
    return list(zip(pieces.piece_of_entry().tolist(), range(len(pieces.row_E)), strict=True))


@given(
    seed=st.integers(0, 2**32),
    page=st.sampled_from([1, 4]),
    sequences=st.integers(1, 6),
    window=st.sampled_from([None, 1, 9]),
    chunk=st.sampled_from([1, 4, 128]),
    threads=st.sampled_from([1, 2, 5]),
)
@settings(max_examples=80, deadline=None)
def test_balancing_keeps_what_rows_see(
    seed: int, page: int, sequences: int, window: int | None, chunk: int, threads: int
) -> None:
    layout, _ = random_step(random.Random(seed), page=page, sequences=sequences)
    rows = Rows.of(layout)
    pieces = windowed(sequence_pieces(rows), rows.limit_T, window)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "MIN_CHUNK", chunk)
        cut = balance(pieces, page, 6, 2, threads)
    assert coverage(cut, rows) == coverage(pieces, rows)
    table = layout.page_table_SM.numpy()
    for t, s in enumerate(layout.row_sequence_T().tolist()):
        limit = int(rows.limit_T[t])
        first = 0 if window is None else max(0, limit - window)
        expected = [int(table[s, i // page]) * page + i % page for i in range(first, limit)]
        assert coverage(cut, rows)[t] == sorted(expected)
    plan = finish(cut, len(rows.limit_T))
    if plan.entry_E is not None:
        assert plan.entry_start_T1 is not None
        row_E = cut.row_E[plan.entry_E.numpy()]
        assert (row_E == np.repeat(np.arange(len(rows.limit_T)), np.diff(plan.entry_start_T1.numpy()))).all()


@pytest.mark.parametrize("lengths", [[8000], [8000, 100, 100, 100], [4000, 4000, 4000], [2000] * 7, [500]])
def test_no_task_is_larger_than_a_fair_share(lengths: list[int]) -> None:
    tables = [list(range(-(-n // 16))) for n in lengths]
    rows = Rows.of(make_layout(tables, lengths, [1] * len(lengths), 16))
    cut = balance(sequence_pieces(rows), 16, 9, 3, threads=2)
    tokens = cut.limit_E - cut.first_E
    # Longest first on two workers, three kv heads per piece.
    load = [0, 0]
    for cost in sorted(np.repeat(tokens, 3), reverse=True):
        load[load.index(min(load))] += int(cost)
    assert max(load) / (sum(load) / 2) <= 1.1
    assert len(tokens) <= 4 * 2 * planning.ITEMS_PER_THREAD + len(lengths)


def test_one_thread_cuts_nothing() -> None:
    rows = Rows.of(make_layout([list(range(500))], [8000], [1], 16))
    pieces = sequence_pieces(rows)
    assert balance(pieces, 16, 9, 3, threads=1) is pieces
    assert finish(pieces, 1).entry_E is None


def test_pages_outside_a_window_are_dropped() -> None:
    rows = Rows.of(make_layout([list(range(500))], [8000], [1], 16))
    cut = balance(windowed(sequence_pieces(rows), rows.limit_T, 100), 16, 9, 3, threads=1)
    assert len(cut.page_C) <= 100 // 16 + 2


def test_ranges_and_prefix_sum() -> None:
    assert ranges(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert ranges(np.zeros(0, np.int64), np.zeros(0, np.int64)).tolist() == []
    assert prefix_sum(np.array([2, 0, 3])).tolist() == [0, 2, 2, 5]


def test_join_keeps_both() -> None:
    rows = Rows.of(make_layout([[3, 1], [2]], [7, 2], [2, 1], 4))
    pieces = sequence_pieces(rows)
    twice = join(pieces, pieces)
    assert coverage(twice, rows) == [sorted(slots * 2) for slots in coverage(pieces, rows)]
