"""The scheduler: every (entry, kv head, token) is read once, on every level; bad lists are refused."""

from __future__ import annotations

import random
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.kernels.attention import PieceWork
from hasten.kernels.native import _module, available_levels
from hasten.kernels.reference import attention as reference
from hasten.kernels.schedule import Schedule

pytestmark = pytest.mark.usefixtures("one_thread")

LEVELS = [pytest.param(_module(name), id=name) for name in available_levels()]
NAMES = ("page_C", "page_start_J1", "base_J", "row_start_J1", "row_E", "first_E", "limit_E")


def random_lists(rng: random.Random, rows: int, pool: int, page: int) -> dict[str, list[int]]:
    """Pieces with shared and missing pages; entries that see all, some or none of them."""
    lists: dict[str, list[int]] = {name: [] for name in NAMES}
    lists["page_start_J1"], lists["row_start_J1"] = [0], [0]
    for _ in range(rng.randint(0, 5)):
        pages = rng.randint(0, 12)
        lists["page_C"] += [rng.randrange(pool) for _ in range(pages)]
        lists["page_start_J1"].append(len(lists["page_C"]))
        lists["base_J"].append(rng.randint(0, 100))
        for row in rng.sample(range(rows), min(rows, rng.choice([0, 1, 2, 5, 40]))):
            lists["row_E"].append(row)
            lists["first_E"].append(rng.choice([0, 0, rng.randint(0, pages * page)]))
            lists["limit_E"].append(rng.choice([pages * page, rng.randint(0, pages * page)]))
        lists["row_start_J1"].append(len(lists["row_E"]))
    return lists


def schedule_of(lists: dict[str, Any], **named: Any) -> Schedule:
    settings = {"page_size": 4, "rows": 45, "heads": 6, "kv_heads": 2, "workers": 4, "min_chunk": 8}
    return Schedule(*(np.asarray(lists[name], np.int64) for name in NAMES), **(settings | named))


@given(
    seed=st.integers(0, 2**32),
    page=st.sampled_from([1, 4, 16]),
    workers=st.sampled_from([1, 3, 8]),
    heads=st.sampled_from([(1, 1), (6, 2), (16, 1), (8, 8)]),
    tile=st.sampled_from([1, 24, 96]),
    balanced=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_everything_is_read_once(
    seed: int, page: int, workers: int, heads: tuple[int, int], tile: int, balanced: bool
) -> None:
    rng = random.Random(seed)
    lists = random_lists(rng, 45, 9, page)
    named = {"page_size": page, "heads": heads[0], "kv_heads": heads[1], "workers": workers}
    facts = schedule_of(lists, **named, tile=tile, balanced=balanced).facts()
    entries = len(lists["row_E"])
    seen = np.zeros((heads[1], entries, 12 * page), int)
    parts = np.zeros((heads[1], 45), int)
    for piece, begin, end, head, first, limit, slot in facts.task_K7.tolist():
        assert lists["row_start_J1"][piece] <= begin < end <= lists["row_start_J1"][piece + 1]
        for e in range(begin, end):
            seen[head, e, max(lists["first_E"][e], first) : min(lists["limit_E"][e], limit)] += 1
            parts[head, lists["row_E"][e]] += 1
        assert slot == -1 or slot + end - begin <= facts.slots
    for e in range(entries):
        wanted = np.zeros(12 * page, int)
        wanted[lists["first_E"][e] : lists["limit_E"][e]] = 1
        assert (seen[:, e] == wanted).all()
    # Rows in one part are written through or joined from one slot; all others are joined, in all their parts.
    joined = dict(zip(facts.part_row_R.tolist(), np.diff(facts.part_start_R1).tolist(), strict=True))
    for row in range(45):
        assert joined.get(row, 1) == parts[0, row]
    assert sorted(facts.part_slot.tolist()) == list(range(facts.slots))
    assert facts.worker_start_W1[-1] == len(facts.task_K7)
    loads = [
        facts.cost_K[a:b].sum()
        for a, b in zip(facts.worker_start_W1, facts.worker_start_W1[1:], strict=False)
    ]
    np.testing.assert_allclose(facts.load_W, loads, rtol=1e-5)
    if balanced:  # a worker's tasks come dearest first
        for a, b in zip(facts.worker_start_W1, facts.worker_start_W1[1:], strict=False):
            assert (np.diff(facts.cost_K[a:b]) <= 0).all()


@pytest.mark.parametrize("module", LEVELS)
@given(
    seed=st.integers(0, 2**32),
    page=st.sampled_from([1, 5, 16]),
    heads=st.sampled_from([(1, 1), (6, 2), (13, 1)]),
    size=st.sampled_from([1, 7, 16, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    softcap=st.sampled_from([None, 5.0]),
)
@settings(max_examples=15, deadline=None)
def test_equals_the_merged_reference(
    module: ModuleType,
    seed: int,
    page: int,
    heads: tuple[int, int],
    size: int,
    dtype: torch.dtype,
    softcap: float | None,
) -> None:
    rng = random.Random(seed)
    lists = random_lists(rng, 45, 9, page)
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(45, heads[0], size, generator=generator)
    k, v = (torch.randn(9, heads[1], page, size, generator=generator).to(dtype) for _ in range(2))
    ints = {name: torch.tensor(lists[name], dtype=torch.int32) for name in NAMES if name != "base_J"}
    parts = reference.attend_pieces(q.double(), k, v, PieceWork(**ints), 0.3, softcap)
    order = torch.argsort(ints["row_E"], stable=True).int()
    start = torch.bincount(ints["row_E"].long(), minlength=45).cumsum(0)
    expected = reference.merge(*parts, torch.cat((start.new_zeros(1), start)).int(), order)
    schedule = schedule_of(lists, page_size=page, heads=heads[0], kv_heads=heads[1], module=module)
    out, lse = schedule.run(q, k, v, 0.3, softcap)
    torch.testing.assert_close(out.double(), expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected[1], atol=1e-5, rtol=1e-5)


LISTS = {
    "page_C": [0, 3],
    "page_start_J1": [0, 2],
    "base_J": [0],
    "row_start_J1": [0, 1],
    "row_E": [1],
    "first_E": [0],
    "limit_E": [8],
}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"limit_E": [9]}, "limit_E"),
        ({"first_E": [-1]}, "first_E"),
        ({"row_E": [45]}, "row_E"),
        ({"row_E": [-1]}, "row_E"),
        ({"page_C": [0, -1]}, "page_C"),
        ({"page_C": [0, 2**31]}, "page_C is too large"),
        ({"limit_E": [2**40]}, "limit_E is too large"),
        ({"page_start_J1": [0, 3]}, "page_start_J1"),
        ({"page_start_J1": []}, "differ in length"),
        ({"row_start_J1": [1, 1]}, "row_start_J1"),
        ({"base_J": []}, "base_J"),
        ({"limit_E": [1, 2]}, "differ in length"),
        ({"workers": 0}, "needs workers"),
        ({"heads": 5}, "multiple of kv heads"),
        ({"tile": 97}, "tile at most 96"),
        ({"min_chunk": 0}, "min_chunk"),
        ({"costs": [1.0] * 5}, "six numbers"),
        ({"costs": [1.0] * 5 + [float("nan")]}, "finite"),
        ({"page_size": 0}, "page size"),
    ],
)
def test_bad_lists_are_refused(change: dict[str, Any], match: str) -> None:
    lists = {name: change.get(name, value) for name, value in LISTS.items()}
    named = {name: value for name, value in change.items() if name not in LISTS}
    with pytest.raises(ValueError, match=match):
        schedule_of(lists, **named)


def test_moving_needs_a_limit_per_row() -> None:
    with pytest.raises(ValueError, match="limit_T"):
        schedule_of(LISTS).moved(np.zeros(3, np.int64), None)
