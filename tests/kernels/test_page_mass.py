"""Attention mass by page against the PyTorch reference, at every instruction-set level this CPU runs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.kernels import available_levels, page_mass
from hasten.kernels.native import _module
from hasten.kernels.page_mass import PageRule
from hasten.kernels.pages import quantise
from hasten.kernels.reference import page_mass as reference


@pytest.fixture(params=available_levels(), autouse=True, scope="module")
def level(request):
    """Run every test of this file with each level's module."""
    patch = pytest.MonkeyPatch()
    patch.setattr(page_mass, "native", lambda: _module(request.param))
    yield request.param
    patch.undo()


def cached(lengths, kv_heads, repeat, size, page_size, kind, seed):
    random = torch.Generator().manual_seed(seed)
    width = max(1, -(-max(lengths, default=0) // page_size))
    k_NGPD = torch.randn(width * max(1, len(lengths)) + 1, kv_heads, page_size, size, generator=random)
    k_NGPD = quantise(k_NGPD) if kind == "int8" else k_NGPD.to(getattr(torch, kind))
    table = torch.randperm(len(k_NGPD), generator=random)[: width * len(lengths)].view(len(lengths), width)
    q_RHD = torch.randn(len(lengths), kv_heads * repeat, size, generator=random) * 2
    return q_RHD, k_NGPD, table.to(torch.int32), torch.tensor(lengths, dtype=torch.int32)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 700), max_size=3),
    kv_heads=st.integers(1, 3),
    repeat=st.integers(1, 5),
    size=st.sampled_from([1, 7, 16, 20, 64]),
    page_size=st.sampled_from([1, 16, 24, 64]),
    page=st.sampled_from([1, 5, 16, 1000]),
    kind=st.sampled_from(["float32", "bfloat16", "int8"]),
    softcap=st.sampled_from([None, 2.0]),
    seed=st.integers(0, 1000),
)
def test_masses_and_choices_are_the_reference_s(
    lengths, kv_heads, repeat, size, page_size, page, kind, softcap, seed
):
    given_ = cached(lengths, kv_heads, repeat, size, page_size, kind, seed)
    how = {"scale": size**-0.5, "softcap": softcap}
    got = page_mass.page_mass(*given_, page, **how)
    want = reference.page_mass(*given_, page, **how)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    rule = PageRule(page, 4, 2, first=True)
    index_RK, count_R = page_mass.page_choose(*given_, rule, **how)
    for row, length in enumerate(lengths):
        pages = -(-length // page)
        chosen = index_RK[row, : int(count_R[row])].tolist()
        read = sorted({t // page for t in chosen})
        assert chosen == [t for g in read for t in range(g * page, min(length, (g + 1) * page))]
        assert len(read) == min(4, pages)
        if (
            pages > 4
        ):  # the masses read are no smaller than the reference's, whichever of near equals were taken
            best = reference.top_pages(want[row : row + 1], torch.tensor([pages]), rule)[0]
            assert want[row, read].sum() >= want[row, best].sum() - 1e-4
            assert {0, pages - 2, pages - 1} <= set(read)


def test_nan_keys_are_read_last():
    q_RHD, k_NGPD, table_RM, length_R = cached([64], 1, 1, 8, 64, "float32", 0)
    k_NGPD[table_RM[0, 0], :, 3] = float("nan")
    index_RK, count_R = page_mass.page_choose(
        q_RHD, k_NGPD, table_RM, length_R, PageRule(16, 2, 1), scale=1.0
    )
    assert int(count_R[0]) == 32
    assert index_RK[0].tolist() == sorted(set(index_RK[0].tolist()))


def test_what_does_not_fit_is_refused():
    q_RHD, k_NGPD, table_RM, length_R = cached([40], 2, 2, 8, 16, "float32", 0)
    rule = PageRule(16, 2, 1)
    with pytest.raises(ValueError, match="pages"):
        page_mass.page_choose(q_RHD, k_NGPD, table_RM, length_R + 40, rule, scale=1.0)
    with pytest.raises(ValueError, match="outside the pool"):
        page_mass.page_choose(q_RHD, k_NGPD, table_RM + 99, length_R, rule, scale=1.0)
    with pytest.raises(ValueError, match="multiple of kv heads"):
        page_mass.page_choose(q_RHD[:, :3], k_NGPD, table_RM, length_R, rule, scale=1.0)
    with pytest.raises(ValueError, match="heads of size 7"):
        page_mass.page_choose(q_RHD[..., :7], k_NGPD, table_RM, length_R, rule, scale=1.0)
    with pytest.raises(TypeError, match="pages must be"):
        page_mass.page_choose(q_RHD, k_NGPD.half(), table_RM, length_R, rule, scale=1.0)
    with pytest.raises(ValueError, match="no choice of pages"):
        PageRule(16, 2, 2, first=True)
    with pytest.raises(ValueError, match="at least the 32 tokens"):
        page_mass.page_selectors([True], rule, 31, heads=2, kv_heads=1, size=8)
