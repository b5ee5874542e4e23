from __future__ import annotations

import pytest
import torch

from hasten.attention.layout import KVPages, StepLayout
from hasten.core.errors import UnsupportedError
from hasten.kernels.pages import dequantise
from hasten.lm.kvcache.format import KVFormat, PlainKV
from hasten.lm.kvcache.int8 import Int8KV
from hasten.models.config import HeadShape, RopeSpec
from hasten.models.rope import Rope

SLOT = "kv_format"
DEFAULTS = {"float32": PlainKV, "bfloat16": lambda: PlainKV(torch.bfloat16), "int8": Int8KV}
SHAPE = HeadShape(heads=4, kv_heads=2, size=32)


def layout(slots: list[int], size: int = 4) -> StepLayout:
    count = len(slots)
    return StepLayout(
        torch.tensor([0, count], dtype=torch.int32),
        torch.tensor([count], dtype=torch.int32),
        torch.tensor([sorted({s // size for s in slots})], dtype=torch.int32),
        torch.arange(count),
        torch.tensor(slots),
        size,
        (0,),
    )


def numbers(pages: torch.Tensor) -> torch.Tensor:
    return dequantise(pages) if pages.dtype is torch.int8 else pages.float()


def keys(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, SHAPE.kv_heads, SHAPE.size, generator=torch.Generator().manual_seed(seed))


def test_bytes_are_known_before_anything_is_allocated(provider):
    one = provider().page_bytes(1, 4, SHAPE)
    assert one > 0
    assert provider().page_bytes(3, 4, SHAPE) == 3 * one
    assert provider().page_bytes(1, 8, SHAPE) > one


def test_pages_hold_what_was_appended(provider):
    """Formats whose pages are plain tensors: exact up to their dtype. Others are judged through their own kernel."""
    format = provider()
    format.allocate(2, 6, 4, SHAPE)
    if not isinstance(format.pages(0), KVPages):
        pytest.skip("pages of its own, read by its own kernel")
    slots = [9, 10, 11, 20]
    k, v = keys(4), keys(4, 1)
    format.append(1, k, v, layout(slots))
    pages = format.pages(1)
    held_k, held_v = numbers(pages.k_NGPD), numbers(pages.v_NGPD)
    assert held_k.shape == held_v.shape == (6, 2, 4, 32)
    for i, slot in enumerate(slots):
        torch.testing.assert_close(held_k[slot // 4, :, slot % 4], k[i], atol=2e-2, rtol=1e-2)
        torch.testing.assert_close(held_v[slot // 4, :, slot % 4], v[i], atol=2e-2, rtol=1e-2)


def test_pages_are_copied_in_every_layer_and_move_out_and_in(provider):
    format = provider()
    format.allocate(2, 6, 4, SHAPE)
    for layer in range(2):
        format.append(layer, keys(4, layer), keys(4, 9 + layer), layout([4, 5, 6, 7]))
    format.copy_page(1, 3)
    try:
        content = format.read_page(1)
    except UnsupportedError:
        return  # says so; such a format has no tiers
    copied = format.read_page(3)
    assert all(torch.equal(a, b) for a, b in zip(content, copied, strict=True))
    format.write_page(5, content)
    assert all(torch.equal(a, b) for a, b in zip(content, format.read_page(5), strict=True))
    format.append(0, keys(1, 5), keys(1, 6), layout([12]))
    assert all(torch.equal(a, b) for a, b in zip(content, format.read_page(1), strict=True))
    assert not torch.equal(format.read_page(3)[0], content[0])


def test_rotating_and_appending_equals_the_two_one_after_the_other(provider):
    """A format may fuse them; what it returns and what its pages hold must be the same."""
    fused, plain = provider(), provider()
    for format in (fused, plain):
        format.allocate(1, 6, 4, SHAPE)
    rope = Rope(RopeSpec(10000.0, SHAPE.size), 512)
    cos, sin = rope.tables(torch.tensor([7, 8, 30]))
    qkv = torch.randn(3, 4 + 2 + 2, SHAPE.size, generator=torch.Generator().manual_seed(3))
    step = layout([5, 6, 7])
    want_q, want_k = KVFormat.rotate_append(plain, 0, qkv[:, :4], qkv[:, 4:6], qkv[:, 6:], cos, sin, step)
    mine = qkv.clone()
    q, k = fused.rotate_append(0, mine[:, :4], mine[:, 4:6], mine[:, 6:], cos, sin, step)
    torch.testing.assert_close(q, want_q)
    torch.testing.assert_close(k, want_k)
    torch.testing.assert_close(want_q, rope.rotate(qkv[:, :4], torch.tensor([7, 8, 30])))
    try:
        pairs = list(zip(fused.read_page(1), plain.read_page(1), strict=True))
    except UnsupportedError:
        return
    for a, b in pairs:
        # A last bit of the rotation may move a code of an int8 page.
        close = {"atol": 0.05, "rtol": 0} if a.dtype is torch.int8 else {}
        torch.testing.assert_close(numbers(a)[..., 1:, :], numbers(b)[..., 1:, :], **close)
