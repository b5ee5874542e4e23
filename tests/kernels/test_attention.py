"""attend_pieces and attend_tokens against their reference in float64, on every level of this CPU."""

from __future__ import annotations

import random
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.kernels.attention import PieceWork, attend_pieces, attend_tokens
from hasten.kernels.native import _module, available_levels
from hasten.kernels.pages import quantise
from hasten.kernels.reference import attention as reference

pytestmark = pytest.mark.usefixtures("one_thread")

LEVELS = [pytest.param(_module(name), id=name) for name in available_levels()]
SHAPES = st.tuples(
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 2, 3, 4, 5, 7, 9, 13]),
    st.sampled_from([1, 7, 8, 16, 24, 33, 40, 64, 72, 96, 128, 256]),
    st.sampled_from([1, 3, 5, 16, 64]),
)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int8])
SOFTCAPS = st.sampled_from([None, None, 5.0, 50.0])


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def random_work(rng: random.Random, rows: int, pool: int, page: int) -> PieceWork:
    """Pieces with shared, repeated and missing pages; entries that see all, some or none of them."""
    pages, starts, row_starts, row, first, limit = [], [0], [0], [], [], []
    for _ in range(rng.randint(0, 4)):
        count = rng.randint(0, 12 if page < 64 else 3)
        pages += [rng.randrange(pool) for _ in range(count)]
        starts.append(len(pages))
        row_starts.append(row_starts[-1] + rng.choice([0, 1, 2, 5, 20, 40]))
        tokens = count * page
        for _ in range(row_starts[-1] - row_starts[-2]):
            row.append(rng.randrange(rows))
            kind = rng.random()
            first.append(0 if kind < 0.4 else rng.randint(0, tokens))
            limit.append(tokens if kind < 0.2 else rng.randint(0, tokens))
    return PieceWork(int32(pages), int32(starts), int32(row_starts), int32(row), int32(first), int32(limit))


def pool_of(
    seed: int, pages: int, groups: int, page: int, size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (pages, groups, page, size)
    k, v = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    return (quantise(k), quantise(v)) if dtype is torch.int8 else (k.to(dtype), v.to(dtype))


def assert_close(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    out, lse = expected
    assert torch.equal(torch.isinf(lse), torch.isinf(got[1]))
    assert (got[0][torch.isinf(lse)] == 0).all()
    torch.testing.assert_close(got[0].double(), out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[1].double(), lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("module", LEVELS)
@given(seed=st.integers(0, 2**32), shape=SHAPES, dtype=DTYPES, softcap=SOFTCAPS)
@settings(max_examples=30, deadline=None)
def test_pieces_equal_reference(
    module: ModuleType,
    seed: int,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    softcap: float | None,
) -> None:
    groups, repeat, size, page = shape
    rng = random.Random(seed)
    rows, pages = rng.randint(1, 30), rng.randint(1, 20)
    k, v = pool_of(seed, pages, groups, page, size, dtype)
    q = torch.randn(rows, groups * repeat, size, generator=torch.Generator().manual_seed(seed + 1))
    work = random_work(rng, rows, pages, page)
    scale = size**-0.5 * rng.choice([0.5, 1.0, 2.0])
    expected = reference.attend_pieces(q.double(), k, v, work, scale, softcap)
    assert_close(attend_pieces(q, k, v, work, scale, softcap, module=module), expected)


@pytest.mark.parametrize("module", LEVELS)
@given(seed=st.integers(0, 2**32), shape=SHAPES, dtype=DTYPES, softcap=SOFTCAPS, per_head=st.booleans())
@settings(max_examples=30, deadline=None)
def test_tokens_equal_reference(
    module: ModuleType,
    seed: int,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    softcap: float | None,
    per_head: bool,
) -> None:
    groups, repeat, size, page = shape
    rng = random.Random(seed)
    heads, pages, width = groups * repeat, rng.randint(1, 30), rng.randint(1, 20)
    rows, most = rng.randint(0, 4), rng.choice([0, 1, 5, 64, 65, 200])
    generator = torch.Generator().manual_seed(seed + 1)
    k, v = pool_of(seed, pages, groups, page, size, dtype)
    q = torch.randn(rows, heads, size, generator=generator)
    choices = heads if per_head else groups
    table = torch.randint(0, pages, (rows, width), generator=generator).int()
    index = torch.randint(0, width * page, (rows, choices, most), generator=generator).int()
    count = torch.randint(0, most + 1, (rows, choices), generator=generator).int()
    scale = size**-0.5
    expected = reference.attend_tokens(q.double(), k, v, table, index, count, scale, softcap)
    assert_close(attend_tokens(q, k, v, table, index, count, scale, softcap, module=module), expected)


@pytest.mark.parametrize("module", LEVELS)
def test_unwritten_tail_is_not_read(module: ModuleType) -> None:
    """Slots past a row's limit may hold anything, NaN included."""
    for rows in (1, 40):
        k, v = pool_of(0, 3, 2, 16, 64, torch.float32)
        k[2, :, 5:], v[2, :, 5:] = float("nan"), float("inf")
        q = torch.randn(rows, 6, 64, generator=torch.Generator().manual_seed(1))
        limit = int32([37] * rows)
        work = PieceWork(
            int32([0, 1, 2]), int32([0, 3]), int32([0, rows]), int32([*range(rows)]), limit * 0, limit
        )
        expected = reference.attend_pieces(q.double(), k, v, work, 0.125)
        assert_close(attend_pieces(q, k, v, work, 0.125, module=module), expected)


@pytest.mark.parametrize("module", LEVELS)
def test_nan_query_gives_nan_in_its_rows_only(module: ModuleType) -> None:
    for rows in (2, 40):
        k, v = pool_of(0, 3, 1, 16, 64, torch.float32)
        q = torch.randn(rows, 1, 64)
        q[1, 0, 3] = float("nan")
        limit = int32([48] * rows)
        work = PieceWork(
            int32([0, 1, 2]), int32([0, 3]), int32([0, rows]), int32([*range(rows)]), limit * 0, limit
        )
        out, lse = attend_pieces(q, k, v, work, 0.125, module=module)
        assert torch.isnan(out[1]).all()
        assert torch.isnan(lse[1]).all()
        assert not torch.isnan(out[[i for i in range(rows) if i != 1]]).any()


@pytest.mark.parametrize("module", LEVELS)
def test_large_logits(module: ModuleType) -> None:
    """Softmax stays finite where exp of the logits would overflow, and a far smaller score counts as nothing."""
    for rows in (1, 40):
        k = torch.zeros(8, 1, 16, 8)
        k[0, 0, 3, 0] = 1.0
        k[1, 0, 2, 0] = -1.0
        v = torch.randn(8, 1, 16, 8)
        q = torch.zeros(rows, 1, 8)
        q[:, 0, 0] = 3000.0
        limit = int32([128] * rows)
        work = PieceWork(
            int32([*range(8)]), int32([0, 8]), int32([0, rows]), int32([*range(rows)]), limit * 0, limit
        )
        out, lse = attend_pieces(q, k, v, work, 1.0, module=module)
        torch.testing.assert_close(out, v[0, 0, 3].expand(rows, 1, 8))
        torch.testing.assert_close(lse, torch.full((rows, 1), 3000.0))


@pytest.mark.parametrize("module", LEVELS)
def test_same_bits_with_one_and_two_threads(module: ModuleType) -> None:
    rng = random.Random(3)
    k, v = pool_of(3, 20, 3, 16, 64, torch.bfloat16)
    q = torch.randn(30, 9, 64)
    work = random_work(rng, 30, 20, 16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = attend_pieces(q, k, v, work, 0.125, module=module)
        torch.set_num_threads(2)
        two = attend_pieces(q, k, v, work, 0.125, module=module)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])


@pytest.mark.parametrize("module", LEVELS)
@pytest.mark.parametrize("choices", [2, 6])
def test_tokens_split_over_threads(module: ModuleType, choices: int) -> None:
    """One row with many tokens on two threads: its parts are merged inside the kernel."""
    k, v = pool_of(5, 40, 2, 16, 64, torch.bfloat16)
    generator = torch.Generator().manual_seed(6)
    q = torch.randn(1, 6, 64, generator=generator)
    table = torch.randperm(40, generator=generator)[None].int()
    index = torch.stack([torch.randperm(640, generator=generator)[:500] for _ in range(choices)])[None].int()
    count = torch.tensor([500, 431, 0, 64, 1, 499][:choices], dtype=torch.int32)[None]
    try:
        torch.set_num_threads(2)
        got = attend_tokens(q, k, v, table, index, count, 0.125, module=module)
    finally:
        torch.set_num_threads(1)
    assert_close(got, reference.attend_tokens(q.double(), k, v, table, index, count, 0.125))


def small() -> dict[str, object]:
    k, v = pool_of(0, 4, 2, 8, 16, torch.float32)
    work = PieceWork(int32([0, 3]), int32([0, 2]), int32([0, 1]), int32([1]), int32([0]), int32([16]))
    return {"q_THD": torch.randn(2, 4, 16), "k_NGPD": k, "v_NGPD": v, "work": work, "scale": 0.25}


def work_with(**changed: list[int]) -> PieceWork:
    fields = {
        "page_C": [0, 3],
        "page_start_J1": [0, 2],
        "row_start_J1": [0, 1],
        "row_E": [1],
        "first_E": [0],
        "limit_E": [16],
    }
    return PieceWork(**{name: int32(value) for name, value in (fields | changed).items()})


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"work": work_with(limit_E=[17])}, ValueError, "limit_E"),
        ({"work": work_with(first_E=[-1])}, ValueError, "first_E"),
        ({"work": work_with(row_E=[2])}, ValueError, "row_E"),
        ({"work": work_with(row_E=[-1])}, ValueError, "row_E"),
        ({"work": work_with(page_C=[0, 4])}, ValueError, "page_C"),
        ({"work": work_with(page_C=[0, -1])}, ValueError, "page_C"),
        ({"work": work_with(page_start_J1=[0, 3])}, ValueError, "page_start_J1"),
        ({"work": work_with(page_start_J1=[])}, ValueError, "differ in length"),
        ({"work": work_with(row_start_J1=[1, 1])}, ValueError, "row_start_J1"),
        ({"work": work_with(limit_E=[1, 2])}, ValueError, "differ in length"),
        ({"q_THD": torch.randn(2, 4, 16).double()}, TypeError, "q_THD must be float32"),
        ({"q_THD": torch.randn(2, 3, 16)}, ValueError, "do not share 2 kv heads"),
        ({"q_THD": torch.randn(2, 4, 8)}, ValueError, "head size"),
        ({"q_THD": torch.randn(2, 16, 4).transpose(1, 2)}, ValueError, "q_THD must be contiguous"),
        ({"v_NGPD": torch.randn(4, 2, 8, 16).half()}, TypeError, "float32 or bfloat16"),
        ({"v_NGPD": torch.randn(4, 2, 9, 16)}, ValueError, "must be equal"),
        ({"softcap": -1.0}, ValueError, "softcap"),
    ],
)
def test_bad_pieces_are_refused(change: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        attend_pieces(**(small() | change))  # type: ignore[arg-type]


def test_work_dtype_is_checked() -> None:
    work = work_with()
    wrong = PieceWork(work.page_C.long(), *(getattr(work, n) for n in list(work.__dataclass_fields__)[1:6]))
    with pytest.raises(TypeError, match="page_C must be int32"):
        attend_pieces(**(small() | {"work": wrong}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("table", "index", "count", "match"),
    [
        ([[0, 1]], [[[16], [0]]], [[1, 1]], "without a page"),
        ([[0, 1]], [[[-1], [0]]], [[1, 1]], "without a page"),
        ([[0, -1]], [[[8], [0]]], [[1, 1]], "without a page"),
        ([[0, 4]], [[[8], [0]]], [[1, 1]], "without a page"),
        ([[0, 1]], [[[0], [0]]], [[2, 1]], "count_RX"),
        ([[0, 1]], [[[0], [0], [0]]], [[1, 1, 1]], "per kv head or per query head"),
        ([[0, 1]], [[[0], [0]]], [[1]], "differ"),
    ],
)
def test_bad_tokens_are_refused(
    table: list[list[int]], index: list[list[list[int]]], count: list[list[int]], match: str
) -> None:
    k, v = pool_of(0, 4, 2, 8, 16, torch.float32)
    q = torch.randn(1, 4, 16)
    tensors = [torch.tensor(x, dtype=torch.int32) for x in (table, index, count)]
    with pytest.raises(ValueError, match=match):
        attend_tokens(q, k, v, *tensors, 0.25)


def test_unused_entries_of_a_choice_are_not_looked_at() -> None:
    k, v = pool_of(0, 4, 2, 8, 16, torch.float32)
    q = torch.randn(1, 4, 16)
    table, count = int32([[0, 1]]), int32([[1, 1]])  # type: ignore[list-item]
    index = torch.tensor([[[3, -9], [4, 1 << 30]]], dtype=torch.int32)
    out, _ = attend_tokens(q, k, v, table, index, count, 0.25)
    torch.testing.assert_close(out[0, 0], v[0, 0, 3])
