"""quantspec_pack and quantspec_attend against their references, and the quantiser's error bounds."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.core.errors import UnsupportedError
from hasten.kernels.native import _module, available_levels
from hasten.kernels.quantspec import Planes, Tails, quantspec_attend, quantspec_pack
from hasten.kernels.reference import quantspec as reference

LEVELS = [pytest.param(_module(name), id=name) for name in available_levels()]


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(k: Tensor, v: Tensor, pages: int, module: ModuleType | None = None) -> tuple[Planes, Tensor]:
    """Planes in which k and v [n, P, G, D] lie in pages of no order."""
    count, page, groups, size = k.shape
    planes = Planes.empty(pages, groups, page, size)
    for x in planes.tensors:
        x.zero_()
    ids = torch.randperm(pages, generator=torch.Generator().manual_seed(0))[:count]
    quantspec_pack(k, v, ids, planes, module=module)
    return planes, ids


@pytest.mark.parametrize("module", LEVELS)
@given(
    seed=st.integers(0, 2**32),
    count=st.sampled_from([0, 1, 3]),
    page=st.sampled_from([1, 4, 16, 24, 128]),
    groups=st.sampled_from([1, 3]),
    size=st.sampled_from([16, 64, 80]),
    offset=st.sampled_from([0.0, 100.0]),
)
@settings(max_examples=40, deadline=None)
def test_packing_equals_its_reference(
    module: ModuleType, seed: int, count: int, page: int, groups: int, size: int, offset: float
) -> None:
    k, v = randn(seed, count, page, groups, size) + offset, randn(seed + 1, count, page, groups, size)
    mine, ids = filled(k, v, count + 2, module)
    theirs = Planes.empty(*mine.shape)
    for x in theirs.tensors:
        x.zero_()
    reference.quantspec_pack(k, v, ids, theirs)
    assert all(torch.equal(a, b) for a, b in zip(mine.tensors, theirs.tensors, strict=True))


@given(
    seed=st.integers(0, 2**32), scale=st.sampled_from([1e-3, 1.0, 1e4]), offset=st.sampled_from([0.0, -7.0])
)
@settings(max_examples=20, deadline=None)
def test_errors_are_bounded_by_the_step(seed: int, scale: float, offset: float) -> None:
    """|x - x8| <= S / 32, S / 16 where L clips; |x - x4| <= S / 2; x8 equals the two steps of dequantisation."""
    k, v = ((randn(seed + i, 2, 128, 2, 64) + offset) * scale for i in range(2))
    planes, ids = filled(k, v, 2)
    for x, eight, four, step, dim in zip(
        (k.transpose(1, 2), v.transpose(1, 2)),
        reference.unpack(planes, ids, True),
        reference.unpack(planes, ids, False),
        (planes.k_scale[ids].float()[:, :, None], planes.v_scale[ids].float()[..., None]),
        (-2, -1),
        strict=True,
    ):
        slack = 1e-5 * x.abs().max()
        upper, lower, s, z = reference.quantise(x, dim)
        assert torch.equal(s.expand_as(x), step.expand_as(x))
        torch.testing.assert_close(eight, upper * s + z + lower * s / 16, rtol=0, atol=float(slack))
        error = (x - eight).abs()
        # What the lower plane cannot hold lies within a step of it above +7.
        clipped = (x - (upper * s + z)) / (s / 16) > 7.5
        assert (error <= torch.where(clipped, step / 16, step / 32) + slack).all()
        assert clipped.float().mean() < 0.06
        assert ((x - four).abs() <= step / 2 + slack).all()
        assert upper.min() == 0
        assert upper.max() >= 14


def test_constant_and_broken_groups() -> None:
    k, v = torch.full((1, 4, 1, 16), 3.0), torch.zeros(1, 4, 1, 16)
    k[0, 2, 0, 5], v[0, 1] = float("nan"), float("inf")
    planes, ids = filled(k, v, 1)
    key, value = reference.unpack(planes, ids, True)
    assert key[..., 5].isnan().all()
    assert torch.equal(key[..., :5], torch.full((1, 1, 4, 5), 3.0))
    assert value[0, 0, 1].isnan().all()
    assert torch.equal(value[0, 0, 0], torch.zeros(16))


def case(
    seed: int,
    lengths: list[tuple[int, int]],
    page: int,
    heads: int,
    groups: int,
    size: int,
    dtype: torch.dtype,
) -> tuple:
    """Sequences of (cached tokens, rows): q, planes, tails, start, position, bound, table."""
    need = [length // page for length, _ in lengths]
    total = sum(need)
    planes, ids = filled(
        randn(seed, total, page, groups, size), randn(seed + 1, total, page, groups, size), total + 1
    )
    table = torch.full((len(lengths), max([1, *need])), -1, dtype=torch.int32)
    keys, values, base, bound, at = [], [], [], [], 0
    for s, (length, rows) in enumerate(lengths):
        table[s, : need[s]] = ids[at : at + need[s]].int()
        at += need[s]
        row = torch.arange(length - rows, length)
        bound.append(((row + 1) // page - 1).clamp_min(0))
        low = int(bound[-1][0]) * page if rows else 0
        ring = s % 2 == 0
        capacity = length - low + 3
        keys.append(randn(seed + 2 + s, capacity, groups, size).to(dtype))
        values.append(randn(seed + 9 + s, capacity, groups, size).to(dtype))
        base.append(0 if ring else low)
    start = torch.tensor([0, *torch.tensor([r for _, r in lengths]).cumsum(0).tolist()], dtype=torch.int32)
    position = torch.tensor([length - rows for length, rows in lengths])
    q = randn(seed + 20, int(start[-1]), heads, size)
    tails = Tails(tuple(keys), tuple(values), tuple(base))
    return q, planes, tails, start, position, torch.cat(bound).int(), table


@pytest.mark.parametrize("module", LEVELS)
@given(
    seed=st.integers(0, 2**32),
    lengths=st.lists(
        st.sampled_from([(1, 1), (40, 1), (33, 33), (200, 5), (300, 40), (31, 2)]), min_size=1, max_size=3
    ),
    page=st.sampled_from([4, 16, 32]),
    heads=st.sampled_from([(1, 1), (9, 3), (4, 2), (5, 1)]),
    size=st.sampled_from([16, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    full=st.booleans(),
    softcap=st.sampled_from([None, 2.0]),
)
@settings(max_examples=25, deadline=None)
def test_attention_equals_its_reference(
    module: ModuleType, seed: int, lengths: list, page: int, heads: tuple[int, int], size: int,
    dtype: torch.dtype, full: bool, softcap: float | None,
) -> None:  # fmt: skip
    given_ = case(seed, lengths, page, *heads, size, dtype)
    out, lse = quantspec_attend(*given_, size**-0.5, softcap, full=full, module=module)
    want, want_lse = reference.quantspec_attend(*given_, size**-0.5, softcap, full=full)
    torch.testing.assert_close(out, want, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(lse, want_lse, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("module", LEVELS)
def test_a_row_does_not_depend_on_the_rows_beside_it(module: ModuleType) -> None:
    """Bit for bit: verification gives what decoding gives. Rows on both sides of a page's end, several parts."""
    q, planes, tails, start, position, bound, table = case(5, [(2500, 21)], 16, 9, 3, 64, torch.bfloat16)
    out, lse = quantspec_attend(
        q, planes, tails, start, position, bound, table, 0.125, full=True, module=module
    )
    assert len(set(bound.tolist())) > 1
    for row in range(21):
        alone, alone_lse = quantspec_attend(
            q[row : row + 1], planes, tails, torch.tensor([0, 1], dtype=torch.int32), position + row,
            bound[row : row + 1], table, 0.125, full=True, module=module,
        )  # fmt: skip
        assert torch.equal(alone[0], out[row])
        assert torch.equal(alone_lse[0], lse[row])


def test_bad_input_is_refused() -> None:
    q, planes, tails, start, position, bound, table = case(1, [(40, 2)], 4, 4, 2, 16, torch.float32)

    def run(**other: object) -> None:
        named = {
            "q_THD": q, "planes": planes, "tails": tails, "query_start_S1": start, "position_S": position,
            "bound_T": bound, "page_table_SM": table, "scale": 1.0, "full": True,
        }  # fmt: skip
        quantspec_attend(**(named | other))  # type: ignore[arg-type]

    run()
    for error, match, other in (
        (TypeError, "q_THD", {"q_THD": q.double()}),
        (ValueError, "kv heads", {"q_THD": q[:, :3].contiguous()}),
        (ValueError, "query_start_S1", {"query_start_S1": torch.tensor([0, 1], dtype=torch.int32)}),
        (TypeError, "position_S", {"position_S": position.int()}),
        (ValueError, "bound_T", {"bound_T": bound + 100}),
        (ValueError, "bound_T", {"bound_T": bound.flip(0) - torch.tensor([0, 1], dtype=torch.int32)}),
        (ValueError, "reach back", {"bound_T": bound - 4}),
        (ValueError, "page_table_SM", {"page_table_SM": table + 1000}),
        (ValueError, "tails", {"tails": Tails((q,), (q,), (0,))}),
        (TypeError, "tails", {"tails": Tails((tails.keys[0].half(),), (tails.values[0].half(),), (0,))}),
    ):
        with pytest.raises(error, match=match):
            run(**other)
    with pytest.raises(UnsupportedError, match="multiple of 16"):
        Planes.empty(2, 1, 4, 20)
    with pytest.raises(ValueError, match="page_n"):
        quantspec_pack(torch.zeros(1, 4, 2, 16), torch.zeros(1, 4, 2, 16), torch.tensor([1000]), planes)
    with pytest.raises(ValueError, match="k_nPGD"):
        quantspec_pack(torch.zeros(1, 5, 2, 16), torch.zeros(1, 4, 2, 16), torch.tensor([0]), planes)
    with pytest.raises(TypeError, match="v_nPGD"):
        quantspec_pack(torch.zeros(1, 4, 2, 16), torch.zeros(1, 4, 2, 16).half(), torch.tensor([0]), planes)
