"""Planning: what is cut still covers every visible token exactly once. Balance: test_flashinfer_plan.py."""

from __future__ import annotations

import random

import numpy as np
from attention_steps import make_layout, random_step
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.attention.pieces import (
    PiecePlan,
    Pieces,
    Rows,
    finish,
    join,
    prefix_sum,
    ranges,
    sequence_pieces,
    windowed,
)


def coverage(pieces: Pieces, rows: Rows) -> list[list[int]]:
    """For each row, the (page, offset) slots it reads, sorted."""
    every = [(j, e, 0, 1 << 30) for j, e in enumerate_entries(pieces)]
    return slots_read(every, pieces, rows)


def slots_read(parts: list[tuple[int, int, int, int]], pieces: Pieces, rows: Rows) -> list[list[int]]:
    """The slots of parts (piece, entry, first token, end token), per row and sorted."""
    seen: list[list[int]] = [[] for _ in rows.limit_T]
    for j, e, begin, end in parts:
        start = pieces.page_start_J1[j]
        for token in range(max(int(pieces.first_E[e]), begin), min(int(pieces.limit_E[e]), end)):
            page = int(pieces.page_C[start + token // rows.page])
            assert start + token // rows.page < pieces.page_start_J1[j + 1]
            seen[int(pieces.row_E[e])].append(page * rows.page + token % rows.page)
    return [sorted(slots) for slots in seen]


def scheduled(plan: PiecePlan, head: int) -> list[tuple[int, int, int, int]]:
    """The parts that a schedule reads for one kv head."""
    tasks = plan.schedule.facts().task_K7.tolist()
    return [(j, e, a, b) for j, begin, end, g, a, b, _ in tasks if g == head for e in range(begin, end)]


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
def test_a_schedule_reads_what_rows_see(
    seed: int, page: int, sequences: int, window: int | None, chunk: int, threads: int
) -> None:
    layout, _ = random_step(random.Random(seed), page=page, sequences=sequences)
    rows = Rows.of(layout)
    pieces = windowed(sequence_pieces(rows), rows.limit_T, window)
    plan = finish(pieces, len(rows.limit_T), page, 6, 2, 4 * threads, min_chunk=chunk)
    found = [slots_read(scheduled(plan, head), pieces, rows) for head in (0, 1)]
    assert found == [coverage(pieces, rows)] * 2
    table = layout.page_table_SM.numpy()
    for t, s in enumerate(layout.row_sequence_T().tolist()):
        limit = int(rows.limit_T[t])
        first = 0 if window is None else max(0, limit - window)
        expected = [int(table[s, i // page]) * page + i % page for i in range(first, limit)]
        assert found[0][t] == sorted(expected)


def test_one_worker_cuts_nothing() -> None:
    rows = Rows.of(make_layout([list(range(500))], [8000], [1], 16))
    facts = finish(sequence_pieces(rows), 1, 16, 9, 3, 1).schedule.facts()
    assert len(facts.task_K7) == 3
    assert facts.slots == 0


def test_pages_outside_a_window_are_not_read() -> None:
    rows = Rows.of(make_layout([list(range(500))], [8000], [1], 16))
    pieces = windowed(sequence_pieces(rows), rows.limit_T, 100)
    tasks = finish(pieces, 1, 16, 9, 3, 8).schedule.facts().task_K7
    assert tasks[:, 4].min() >= 8000 - 100 - 16


def test_ranges_and_prefix_sum() -> None:
    assert ranges(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert ranges(np.zeros(0, np.int64), np.zeros(0, np.int64)).tolist() == []
    assert prefix_sum(np.array([2, 0, 3])).tolist() == [0, 2, 2, 5]


def test_join_keeps_both() -> None:
    rows = Rows.of(make_layout([[3, 1], [2]], [7, 2], [2, 1], 4))
    pieces = sequence_pieces(rows)
    twice = join(pieces, pieces)
    assert coverage(twice, rows) == [sorted(slots * 2) for slots in coverage(pieces, rows)]
