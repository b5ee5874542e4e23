"""TokenSelect's kernels against their references, at every instruction-set level this CPU runs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.kernels import available_levels, token_select
from hasten.kernels.native import _module
from hasten.kernels.reference import token_select as reference
from hasten.kernels.token_select import Ballot, Kept, Turns


@pytest.fixture(params=available_levels(), autouse=True, scope="module")
def level(request):
    """Run every test of this file with each level's module."""
    patch = pytest.MonkeyPatch()
    patch.setattr(token_select, "native", lambda: _module(request.param))
    yield request.param
    patch.undo()


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def pool(seed: int, units: int, width: int, groups: int, page: int, size: int, dtype: torch.dtype):
    """(keys, values, table_UM): shuffled pages, ``width`` for each unit."""
    random = torch.Generator().manual_seed(seed)
    shape = (units * width + 1, groups, page, size)
    k, v = (torch.randn(shape, generator=random).to(dtype) for _ in range(2))
    table = torch.randperm(shape[0], generator=random)[: units * width].view(units, width).int()
    return k, v, table


def turns(units: int, positions: int, rotated: int) -> Turns:
    """Tables of each unit's own, with angles that tell positions apart."""
    angle = torch.arange(units * positions).float()[:, None] * (1 + torch.arange(rotated // 2)) * 0.01
    cos, sin = (torch.cat((x, x), 1).contiguous() for x in (angle.cos(), angle.sin()))
    return Turns(cos, sin, torch.arange(units) * positions)


shapes = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 1000),
        "units": st.integers(1, 3),
        "groups": st.integers(1, 3),
        "page": st.sampled_from([1, 5, 16]),
        "size": st.sampled_from([2, 12, 16, 64]),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
    }
)


@settings(max_examples=25, deadline=None)
@given(
    rows_U=st.lists(st.integers(0, 5), max_size=4),
    heads=st.integers(1, 3),
    size=st.sampled_from([2, 12, 16, 64]),
    whole=st.booleans(),
    far=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_rows_turn_to_the_end_of_what_they_read(rows_U, heads, size, whole, far, seed):
    random = torch.Generator().manual_seed(seed)
    units, rows = len(rows_U), sum(rows_U)
    start = torch.tensor([0, *rows_U]).cumsum(0).int()
    length = ints(*rows_U) + torch.randint(0, 7, (units,), generator=random).int()
    judged = torch.randint(0, 2, (units,), generator=random).int()
    q = torch.randn(rows, heads + 2, size, generator=random)[:, :heads]  # rows lie apart
    tables = turns(units, 16, size if whole or size == 2 else size // 4 * 2)
    got = token_select.token_turn(q, start, length, judged, far, tables)
    for ours, want in zip(got, reference.token_turn(q, start, length, judged, far, tables), strict=True):
        torch.testing.assert_close(ours, want, atol=1e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    shape=shapes,
    repeat=st.integers(1, 6),
    first=st.integers(0, 4),
    vote=st.sampled_from(["soft", "sum", "topk"]),
    pool_width=st.sampled_from([0, 3, 5]),
)
def test_votes_equal_the_reference(shape, repeat, first, vote, pool_width):
    keys, _, table = pool(width=9, **shape)
    units, size = shape["units"], shape["size"]
    random = torch.Generator().manual_seed(shape["seed"])
    mean = torch.randn(units, repeat * shape["groups"], size, generator=random)
    end = torch.randint(0, 9 * shape["page"] + 1, (units,), generator=random).int()
    ballot = Ballot(3, vote, 0.7, pool_width)
    got = token_select.token_votes(mean, keys, table, first, end, ballot)
    want = reference.token_votes(mean, keys, table, first, end, ballot)
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("vote", ["soft", "sum", "topk"])
def test_the_winners_are_the_reference_s(vote):
    """2,000 tokens, several units, one of which is not asked and one of which keeps what it had."""
    keys, _, table = pool(3, 4, 125, 2, 16, 32, torch.float32)
    mean = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(1))
    length, judged, reusable, slot = (
        ints(2000, 1500, 900, 1200),
        ints(1, 0, 1, 1),
        ints(0, 0, 1, 1),
        ints(2, 0, 0, 1),
    )
    local = ints(32, 0, 30, 32)
    found = []
    for choose in (token_select.token_choose, reference.token_choose):
        kept = Kept(torch.zeros(3, 6 * 32), torch.full((3, 40), 7, dtype=torch.int32), ints(0, 1190, 0))
        kept.known_CF[1] = mean[3].flatten() * 2
        lists = torch.zeros(4, 80, dtype=torch.int32)
        ballot = Ballot(40, vote)
        hits = choose(
            mean, keys, table, length, local, judged, reusable, slot, lists, kept, ballot, first=8, theta=0.9
        )
        found.append((hits, lists, kept.kept_CK, kept.known_CF, kept.made_C))
    assert found[0][0] == found[1][0] == 1
    for ours, want in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(ours, want)
    assert found[0][1][3, 8:48].tolist() == [7] * 40
    chosen = found[0][1][0, 8:48]
    assert (chosen.diff() > 0).all()
    assert chosen.min() >= 8
    assert chosen.max() < 2000 - 32


def test_equal_and_infinite_and_undefined_scores_still_give_k_tokens():
    """Keys of zeros: all candidates tie, and the last win. NaN never wins while there is anything else."""
    keys, _, table = pool(0, 1, 4, 1, 8, 16, torch.float32)
    mean = torch.ones(1, 2, 16)

    def choose(vote: str) -> list[int]:
        lists = torch.zeros(1, 32, dtype=torch.int32)
        kept = Kept(torch.zeros(1, 32), torch.zeros(1, 5, dtype=torch.int32), ints(0))
        one, no = ints(1), ints(0)
        ballot = Ballot(5, vote)
        token_select.token_choose(
            mean, keys, table, ints(32), ints(10), one, no, no, lists, kept, ballot, first=2, theta=1
        )
        return lists[0, 2:7].tolist()

    keys.zero_()
    for vote in ("soft", "sum", "topk"):
        assert choose(vote) == [17, 18, 19, 20, 21]
    keys[table[0, 2].long(), :, 3] = float("nan")  # token 19
    assert choose("sum") == [16, 17, 18, 20, 21]
    keys[table[0, 0].long(), :, 4] = float("inf")  # token 4
    assert 4 in choose("sum")
    keys.fill_(float("nan"))
    assert choose("soft") == [17, 18, 19, 20, 21]


@settings(max_examples=25, deadline=None)
@given(shape=shapes, seed=st.integers(0, 99), whole=st.booleans())
def test_copies_are_the_chosen_tokens_at_their_ranks(shape, seed, whole):
    keys, values, table = pool(width=5, **shape)
    units, page, size = shape["units"], shape["page"], shape["size"]
    random = torch.Generator().manual_seed(seed)
    tokens = 5 * page
    width = max(1, tokens - 1)
    lists = torch.stack(
        [torch.randperm(tokens, generator=random)[:width].sort().values for _ in range(units)]
    ).int()
    count = torch.randint(0, width + 1, (units,), generator=random).int()
    tables = turns(units, width, size if whole or size == 2 else size // 4 * 2)
    target = -(-width // page)
    copies = []
    for gather in (token_select.token_gather, reference.token_gather):
        k, v = (
            torch.zeros(units * target, *keys.shape[1:]).to(keys.dtype),
            torch.zeros_like(keys)[: units * target],
        )
        gather(lists, count, keys, values, table, tables, k, v.resize_(k.shape), target)
        copies.append((k.float(), v.float()))
    close = {"atol": 1e-5, "rtol": 1e-5} if keys.dtype is torch.float32 else {"atol": 1e-3, "rtol": 1e-2}
    torch.testing.assert_close(copies[0][0], copies[1][0], **close)
    torch.testing.assert_close(copies[0][1], copies[1][1], atol=0, rtol=0)


def test_what_does_not_fit_is_refused():
    keys, values, table = pool(0, 1, 4, 2, 8, 16, torch.float32)
    mean, tables = torch.ones(1, 4, 16), turns(1, 32, 16)
    with pytest.raises(TypeError, match="float32 or bfloat16"):
        token_select.token_votes(mean, keys.to(torch.int8), table, 0, ints(9), Ballot(2))
    with pytest.raises(TypeError, match="mean_UHD"):
        token_select.token_votes(mean.double(), keys, table, 0, ints(9), Ballot(2))
    with pytest.raises(ValueError, match="do not fit"):
        token_select.token_votes(torch.ones(1, 3, 16), keys, table, 0, ints(9), Ballot(2))
    with pytest.raises(ValueError, match="length_U exceeds the pages"):
        token_select.token_votes(mean, keys, table, 0, ints(33), Ballot(2))
    with pytest.raises(ValueError, match="outside the pool"):
        token_select.token_votes(mean, keys, torch.full_like(table, 99), 0, ints(9), Ballot(2))
    with pytest.raises(ValueError, match="too few positions"):
        token_select.token_turn(torch.ones(1, 4, 16), ints(0, 1), ints(33), ints(0), 0, tables)
    with pytest.raises(ValueError, match="from 0 to the rows"):
        token_select.token_turn(torch.ones(1, 4, 16), ints(0, 2), ints(3), ints(0), 0, tables)
    copy = torch.zeros(4, 2, 8, 16)
    with pytest.raises(ValueError, match="without a page"):
        token_select.token_gather(ints(32)[None], ints(1), keys, values, table, tables, copy, copy.clone(), 4)
    with pytest.raises(ValueError, match="count_U exceeds"):
        token_select.token_gather(ints(3)[None], ints(2), keys, values, table, tables, copy, copy.clone(), 4)
    with pytest.raises(TypeError, match="like k_NGPD"):
        token_select.token_gather(
            ints(3)[None], ints(1), keys, values, table, tables, copy.bfloat16(), copy, 4
        )
    for wrong in ({"vote": "loud"}, {"k": -1}, {"pool": 2}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Ballot(**{"k": 3, **wrong})
