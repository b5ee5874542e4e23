"""Two-bit Hadamard codes against NumPy/SciPy references, at every instruction-set level this CPU runs."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.kernels import available_levels, codes
from hasten.kernels.native import _module
from hasten.kernels.reference import codes as reference


@pytest.fixture(params=available_levels(), autouse=True, scope="module")
def level(request):
    """Run every test of this file with each level's module."""
    patch = pytest.MonkeyPatch()
    patch.setattr(codes, "native", lambda: _module(request.param))
    yield request.param
    patch.undo()


def paged(code_RLGB: torch.Tensor, page_size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scatter token codes [R, L, G, B] over shuffled pages: (codes_NGPB, table_RM)."""
    rows, length, kv_heads, size = code_RLGB.shape
    pages = -(-length // page_size)
    generator = torch.Generator().manual_seed(seed)
    table_RM = torch.randperm(rows * pages, generator=generator).view(rows, pages).to(torch.int32)
    pool = torch.full((rows * pages, kv_heads, page_size, size), 255, dtype=torch.uint8)
    for row in range(rows):
        for token in range(length):
            pool[table_RM[row, token // page_size].long(), :, token % page_size] = code_RLGB[row, token]
    return reference.blocked(pool), table_RM


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 3),
    heads=st.integers(1, 5),
    size=st.sampled_from([8, 16, 32, 64, 128, 256, 1024]),
    cut=st.floats(0.05, 5),
    seed=st.integers(0, 1000),
)
def test_encode_equals_bucketised_hadamard_product(rows, heads, size, cut, seed):
    x = torch.randn(rows, heads, size, generator=torch.Generator().manual_seed(seed)) * 2
    got = reference.unpack(codes.hadamard_encode(x, cut))
    want = reference.bucketise(x, cut)
    if rows:
        y = x.double() @ (torch.from_numpy(scipy.linalg.hadamard(size)).double() / size**0.5)
        assert torch.equal(want, (y > -cut).long() + (y > 0).long() + (y > cut).long())
        close = (y.abs() < 1e-4) | ((y.abs() - cut).abs() < 1e-4)  # on a cut point rounding decides
        assert ((got == want) | close).all()
        assert close.float().mean() < 0.01


@pytest.mark.parametrize("size", [32, 64, 128, 256])
@pytest.mark.parametrize("corrected", [True, False])
def test_distance_of_random_codes_equals_numpy(size, corrected):
    rng = np.random.default_rng(size)
    tokens, kv_heads, group = 100_000 // size, 2, 3
    key = torch.from_numpy(rng.integers(0, 4, (1, tokens, kv_heads, size)))
    query = torch.from_numpy(rng.integers(0, 4, (1, kv_heads * group, size)))
    pool, table = paged(reference.pack(key), 32, seed=1)
    got = codes.hadamard_distance(
        reference.pack(query), pool, table, torch.tensor([tokens], dtype=torch.int32), corrected=corrected
    )
    repeated = np.repeat(key.numpy(), group, axis=2)[0]  # L, H, D
    difference = np.abs(query.numpy() - repeated) if corrected else query.numpy() ^ repeated
    np.testing.assert_array_equal(got[0].numpy().T.astype(int), difference.sum(-1))


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 140), min_size=1, max_size=3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    size=st.sampled_from([8, 64, 128]),
    page_size=st.sampled_from([1, 7, 16, 32, 48, 64]),
    budget=st.integers(1, 80),
    per_head=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_select_takes_the_nearest_and_recent_ties(
    lengths, kv_heads, group, size, page_size, budget, per_head, seed
):
    rng = np.random.default_rng(seed)
    rows, longest = len(lengths), max(lengths)
    key = torch.from_numpy(rng.integers(0, 4, (rows, longest, kv_heads, size)))
    key[:, 1::2] = key[:, :1]  # many equal distances
    query = torch.from_numpy(rng.integers(0, 4, (rows, kv_heads * group, size)))
    pool, table = paged(reference.pack(key), page_size, seed)
    length = torch.tensor(lengths, dtype=torch.int32)
    index, count = codes.hadamard_select(
        reference.pack(query), pool, table, length, budget, per_head=per_head
    )
    distance = reference.hadamard_distance(query, key)
    if not per_head:
        distance = distance.view(rows, kv_heads, group, longest).sum(2)
    for row, long in enumerate(lengths):
        want = reference.hadamard_select(distance[row, :, :long], budget)
        got = [index[row, x, : int(count[row, x])].tolist() for x in range(len(want))]
        assert got == want


@pytest.mark.parametrize("page_size", [8, 16, 32, 48])
def test_append_writes_only_its_slots(page_size):
    k = torch.randn(3, 2, 64)
    pool = torch.full((4, 2, page_size, 16), 7, dtype=torch.uint8)
    slots = torch.tensor([0, page_size + 5, 4 * page_size - 1])
    codes.hadamard_append(k, 0.7, pool, slots)
    want = codes.hadamard_encode(k, 0.7)
    flat = reference.token_major(pool).transpose(1, 2).reshape(4 * page_size, 2, 16)
    assert torch.equal(flat[slots], want)
    rest = torch.ones(4 * page_size, dtype=torch.bool)
    rest[slots] = False
    assert (flat[rest] == 7).all()


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("corrected", [True, False])
def test_nearest_is_encode_and_select(per_head, corrected):
    q, k = torch.randn(2, 6, 64), torch.randn(200, 2, 64)
    pool = torch.empty(7, 2, 32, 16, dtype=torch.uint8)
    codes.hadamard_append(k, 0.7, pool, torch.arange(200))
    table = torch.arange(7, dtype=torch.int32).repeat(2, 1)
    length = torch.tensor([200, 77], dtype=torch.int32)
    named = {"per_head": per_head, "corrected": corrected}
    got = codes.hadamard_nearest(q, 0.6, pool, table, length, 40, **named)
    want = codes.hadamard_select(codes.hadamard_encode(q, 0.6), pool, table, length, 40, **named)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("group", [7, 22, 42])
def test_summed_distances_of_many_heads_do_not_overflow(group):
    """Every key is as far as can be from every query: 3 per coordinate and head."""
    key, query = torch.zeros(1, 100, 1, 64, dtype=torch.int64), torch.full((1, group, 64), 3)
    key[:, 40:50] = 3
    pool, table = paged(reference.pack(key), 32, 0)
    length = torch.tensor([100], dtype=torch.int32)
    index, _ = codes.hadamard_select(reference.pack(query), pool, table, length, 21, per_head=False)
    assert index[0, 0].tolist() == [*range(40, 50), *range(89, 100)]


def test_long_context_uses_every_block():
    length = 5000
    key = torch.randint(0, 4, (1, length, 1, 64), generator=torch.Generator().manual_seed(0))
    query = torch.randint(0, 4, (1, 2, 64), generator=torch.Generator().manual_seed(1))
    pool, table = paged(reference.pack(key), 32, 0)
    index, count = codes.hadamard_select(
        reference.pack(query), pool, table, torch.tensor([length], dtype=torch.int32), 100, per_head=True
    )
    want = reference.hadamard_select(reference.hadamard_distance(query, key)[0], 100)
    assert index[0].tolist() == want
    assert count.tolist() == [[100, 100]]


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="power of two"):
        codes.hadamard_encode(torch.randn(1, 1, 48), 1.0)
    for cut in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="cut"):
            codes.hadamard_encode(torch.randn(1, 1, 64), cut)
    pool = torch.zeros(2, 1, 8, 16, dtype=torch.uint8)
    query = torch.zeros(1, 1, 16, dtype=torch.uint8)
    table = torch.tensor([[0, 5]], dtype=torch.int32)
    with pytest.raises(ValueError, match="outside the pool"):
        codes.hadamard_select(query, pool, table, torch.tensor([16], dtype=torch.int32), 4, per_head=True)
    with pytest.raises(ValueError, match="pages"):
        codes.hadamard_select(query, pool, table, torch.tensor([99], dtype=torch.int32), 4, per_head=True)
    with pytest.raises(ValueError, match="outside the pool"):
        codes.hadamard_append(torch.randn(1, 1, 64), 1.0, pool, torch.tensor([16]))
    with pytest.raises(ValueError, match="budget"):
        codes.hadamard_select(query, pool, table, torch.tensor([1], dtype=torch.int32), 0, per_head=True)
    with pytest.raises(ValueError, match="head size"):
        codes.hadamard_select(
            query[..., :4], pool, table, torch.tensor([1], dtype=torch.int32), 4, per_head=True
        )
    one = torch.tensor([1], dtype=torch.int32)
    with pytest.raises(ValueError, match="budget"):
        codes.hadamard_nearest(torch.randn(1, 1, 64), 1.0, pool, table, one, 0, per_head=True)
    with pytest.raises(ValueError, match="do not fit"):
        codes.hadamard_nearest(torch.randn(1, 1, 32), 1.0, pool, table, one, 1, per_head=True)
    with pytest.raises(TypeError, match=r"q_RHD must be torch\.float32"):
        codes.hadamard_nearest(torch.randn(1, 1, 64).bfloat16(), 1.0, pool, table, one, 1, per_head=True)
    long = torch.tensor([16], dtype=torch.int32)
    with pytest.raises(ValueError, match="outside the pool"):
        codes.hadamard_nearest(torch.randn(1, 1, 64), 1.0, pool, table, long, 1, per_head=True)
    many = torch.zeros(1, 43, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match="42 query heads"):
        codes.hadamard_select(many, pool, table, one, 4, per_head=False)
    with pytest.raises(ValueError, match="do not fit"):
        codes.hadamard_append(torch.randn(1, 2, 64), 1.0, pool, torch.tensor([0]))
