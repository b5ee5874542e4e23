"""rope_append against its reference: rotation in place, rounding, strided rows, slots."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.kernels.native import _module, available_levels
from hasten.kernels.pages import TAIL, dequantise, quantise
from hasten.kernels.reference import rope as reference
from hasten.kernels.rope import rope_append

LEVELS = [pytest.param(_module(name), id=name) for name in available_levels()]


def inputs(
    seed: int, rows: int, heads: int, groups: int, size: int, rotated: int, page: int, dtype: torch.dtype
) -> list[Tensor]:
    """q, k, v as slices of one fused projection, tables, distinct slots, pages."""
    generator = torch.Generator().manual_seed(seed)
    fused = torch.randn(rows, (heads + 2 * groups) * size, generator=generator)
    parts = (heads, groups, groups)
    split = fused.split([n * size for n in parts], 1)
    q, k, v = (x.view(rows, n, size) for n, x in zip(parts, split, strict=True))
    angle = 10 * torch.randn(rows, rotated, generator=generator)
    pages = rows // page + 2
    slot = torch.randperm(pages * page, generator=generator)[:rows]
    stored = size + TAIL if dtype is torch.int8 else size
    pool = torch.zeros(2, pages, groups, page, stored, dtype=dtype)
    return [q, k, v, angle.cos(), angle.sin(), slot, pool[0], pool[1]]


@pytest.mark.parametrize("module", LEVELS)
@given(
    seed=st.integers(0, 2**32),
    rows=st.sampled_from([0, 1, 5, 200]),
    heads=st.sampled_from([(1, 1), (9, 3), (4, 2)]),
    size=st.sampled_from([(2, 2), (16, 16), (33, 10), (64, 64), (80, 32), (128, 128)]),
    page=st.sampled_from([1, 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
    rotate_keys=st.booleans(),
)
@example(seed=744, rows=200, heads=(9, 3), size=(64, 64), page=1, dtype=torch.int8, rotate_keys=False)
@settings(max_examples=50, deadline=None)
def test_equals_reference(
    module: ModuleType,
    seed: int,
    rows: int,
    heads: tuple[int, int],
    size: tuple[int, int],
    page: int,
    dtype: torch.dtype,
    rotate_keys: bool,
) -> None:
    shape = (rows, *heads, *size, page, dtype)
    got, expected = inputs(seed, *shape), inputs(seed, *shape)
    rope_append(*got, rotate_keys=rotate_keys, module=module)
    reference.rope_append(*expected, rotate_keys=rotate_keys)
    for name, a, b in zip("qkv", got, expected, strict=False):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert torch.equal(got[7], expected[7])
    # A value on the border of two codes or bfloat16 numbers may round either way after a different last bit.
    if dtype is torch.int8:
        step = expected[6][..., -TAIL:].contiguous().view(torch.float32)
        assert ((dequantise(got[6]) - dequantise(expected[6])).abs() <= 1.01 * step).all()
        return
    close = {"atol": 1e-5, "rtol": 1e-5 if dtype is torch.float32 else 8e-3}
    torch.testing.assert_close(got[6], expected[6], **close)


@pytest.mark.parametrize("module", LEVELS)
def test_bfloat16_rounds_as_torch_does(module: ModuleType) -> None:
    bits = torch.randint(-(2**31), 2**31, (64, 1, 64), dtype=torch.int64).int()
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), -0.0, 3.4e38, 1e-40])
    v = bits.view(torch.float32).clone()
    v[0, 0, :6] = special
    q, k = torch.zeros(64, 1, 64), torch.zeros(64, 1, 64)
    table = torch.zeros(64, 0)
    pool = torch.zeros(2, 4, 1, 16, 64, dtype=torch.bfloat16)
    rope_append(q, k, v, table, table, torch.arange(64), pool[0], pool[1], module=module)
    expected = v.to(torch.bfloat16)
    got = pool[1].view(64, 1, 64)
    assert torch.equal(torch.isnan(got), torch.isnan(expected))
    number = ~torch.isnan(expected)
    assert torch.equal(got[number].view(torch.int16), expected[number].view(torch.int16))


@pytest.mark.parametrize("module", LEVELS)
def test_int8_is_within_half_a_step_and_keeps_what_is_not_finite(module: ModuleType) -> None:
    v = (
        torch.randn(64, 1, 33, generator=torch.Generator().manual_seed(0))
        * 10.0 ** torch.arange(-32, 32)[:, None, None]
    )
    v[0], v[1, 0, 3], v[2, 0, 4], v[3] = 0.0, float("nan"), float("inf"), 3e38
    q, k, table = torch.zeros(64, 1, 33), torch.zeros(64, 1, 33), torch.zeros(64, 0)
    pool = torch.zeros(2, 4, 1, 16, 33 + TAIL, dtype=torch.int8)
    rope_append(q, k, v, table, table, torch.arange(64), pool[0], pool[1], module=module)
    got = pool[1].view(64, 1, 33 + TAIL)
    assert torch.equal(got, quantise(v))
    value = dequantise(got)
    assert not value[1:3].isfinite().any()
    assert (value[0] == 0).all()
    half = v.abs().amax(-1, keepdim=True) / 127 / 2
    fine = v.isfinite().all(-1)[:, 0]
    assert ((value - v).abs() <= 1.001 * half + 1e-37)[fine].all()


def test_bad_input_is_refused() -> None:
    q, k, v, cos, sin, slot, kp, vp = inputs(0, 4, 4, 2, 16, 16, 8, torch.float32)
    for bad in (-1, 3 * 8):
        wrong = slot.clone()
        wrong[2] = bad
        with pytest.raises(ValueError, match="slot_T"):
            rope_append(q, k, v, cos, sin, wrong, kp, vp)
    with pytest.raises(TypeError, match="slot_T must be int64"):
        rope_append(q, k, v, cos, sin, slot.int(), kp, vp)
    with pytest.raises(ValueError, match="cos_TR"):
        rope_append(q, k, v, cos[:3], sin, slot, kp, vp)
    with pytest.raises(ValueError, match="even width"):
        rope_append(q, k, v, cos[:, :15].contiguous(), sin[:, :15].contiguous(), slot, kp, vp)
    with pytest.raises(ValueError, match="do not fit together"):
        rope_append(q, k, v[:, :1], cos, sin, slot, kp, vp)
    with pytest.raises(TypeError, match="pages must be"):
        rope_append(q, k, v, cos, sin, slot, kp.half(), vp.half())
    with pytest.raises(ValueError, match="contiguous heads"):
        rope_append(q.transpose(1, 2).contiguous().transpose(1, 2), k, v, cos, sin, slot, kp, vp)
    with pytest.raises(ValueError, match="pages"):
        rope_append(q, k, v, cos, sin, slot, kp[:, :1].contiguous(), vp[:, :1].contiguous())
