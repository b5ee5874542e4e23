"""Native blocks against the gguf package, rounding grids, layers with permuted or odd groups, and bad input."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize as gguf_dequantize
from gguf.quants import quantize as gguf_quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.core.errors import ModelFormatError, SettingError, UnsupportedError
from hasten.kernels.affine import ACTIVATIONS, HALF_KIND, OFFSET, SINGLE, ZERO
from hasten.weights.affine import AffineFormat, AffineLinear, round_to_nearest
from hasten.weights.dense import DenseFormat, DenseLinear
from hasten.weights.format import LinearSource, QuantBlocks
from hasten.weights.native import NativeFormat, repack
from hasten.weights.packed import StackedLinear

# Bytes per block, columns per block, where float16 numbers lie, bits per weight once packed.
KINDS = {
    "Q4_0": (18, 32, (0,), 4.5),
    "Q4_1": (20, 32, (0, 2), 5),
    "Q5_0": (22, 32, (0,), 5.5),
    "Q5_1": (24, 32, (0, 2), 6),
    "Q8_0": (34, 32, (0,), 8.5),
    "Q4_K": (144, 256, (0, 2), 4.625),
    "Q5_K": (176, 256, (0, 2), 5.625),
    "Q6_K": (210, 256, (208,), 6.5625),
}


def blocks(kind: str, outputs: int, count: int, seed: int = 0) -> QuantBlocks:
    """Random bytes as blocks, with finite scales: every code and every sub-scale appears."""
    size, columns, halves, _ = KINDS[kind]
    random = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (outputs, count, size), dtype=torch.uint8, generator=random)
    for at in halves:
        half = (torch.randn(outputs, count, 1, generator=random) * 0.01).half()
        data[..., at : at + 2] = half.view(torch.uint8)
    return QuantBlocks(kind, data.flatten(1), count * columns)


def dequantized(part: QuantBlocks) -> Tensor:
    return torch.from_numpy(gguf_dequantize(part.data_OB.numpy(), GGMLQuantizationType[part.kind]).copy())


@dataclass(frozen=True)
class Source(LinearSource):
    weight_OI: Tensor | None = field(default=None, repr=False)

    def dense(self) -> Tensor:
        assert self.weight_OI is not None
        return self.weight_OI


def source(*parts: QuantBlocks, bias: bool = False, name: str = "layers.0.qkv_proj") -> Source:
    outputs = sum(part.data_OB.shape[0] for part in parts)
    bias_O = torch.randn(outputs, generator=torch.Generator().manual_seed(1)) if bias else None
    return Source(name, outputs, parts[0].inputs, parts, bias_O)


def near(y: Tensor, x: Tensor, weight: Tensor, bias_O: Tensor | None = None, bound: float = 1e-5) -> None:
    """Errors are compared with the size of outputs that do not cancel, not with what a cancellation left of them."""
    x, weight = x.double(), weight.double()
    expected = x @ weight.t() + (0 if bias_O is None else bias_O)
    size = x.norm(dim=1).outer(weight.norm(dim=1)).norm() / x.shape[1] ** 0.5
    assert float((y - expected).norm() / size) < bound


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(
    outputs=st.integers(1, 40), count=st.integers(1, 3), rows=st.integers(1, 20), seed=st.integers(0, 2**31)
)
def test_native_blocks_keep_every_weight(kind: str, outputs: int, count: int, rows: int, seed: int) -> None:
    part = blocks(kind, outputs, count, seed)
    weight = dequantized(part)
    x = torch.randn(rows, part.inputs, generator=torch.Generator().manual_seed(seed))
    for activations, bound in (("float32", 1e-5), ("int16", 3e-4)):
        layer = NativeFormat(activations).pack(source(part))
        assert torch.equal(layer.dequantize(), weight)
        near(layer(x), x, weight, bound=bound)


@pytest.mark.parametrize("kind", KINDS)
def test_native_layers_are_as_small_as_the_file(kind: str) -> None:
    part = blocks(kind, 32, 2)
    layer = NativeFormat().pack(source(part))
    bits = layer.weight_bytes() * 8 / (32 * part.inputs)
    assert bits == KINDS[kind][3]
    assert bits <= KINDS[kind][0] * 8 / KINDS[kind][1] + 0.13


def test_real_quantised_weights() -> None:
    weight = np.random.default_rng(0).normal(size=(24, 256)).astype(np.float32)
    for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
        data = torch.from_numpy(gguf_quantize(weight, GGMLQuantizationType[kind]))
        part = QuantBlocks(kind, data, 256)
        assert torch.equal(NativeFormat().pack(source(part)).dequantize(), dequantized(part))


def test_parts_of_one_kind_become_one_layer() -> None:
    parts = [blocks("Q4_1", outputs, 18) for outputs in (24, 8, 8)]
    layer = NativeFormat().pack(source(*parts, bias=True))
    assert isinstance(layer, AffineLinear)
    weight = torch.cat([dequantized(part) for part in parts])
    assert torch.equal(layer.dequantize(), weight)
    x = torch.randn(5, 576)
    near(layer(x), x, weight, source(*parts, bias=True).bias_O, 1e-4)


@pytest.mark.parametrize("rows", [0, 1, 3, 30])
def test_parts_of_different_kinds_write_side_by_side(rows: int) -> None:
    parts = [blocks("Q4_K", 24, 2), blocks("Q4_K", 8, 2), blocks("Q6_K", 9, 2)]
    linear_source = source(*parts, bias=True)
    layer = NativeFormat().pack(linear_source)
    assert isinstance(layer, StackedLinear)
    assert len(layer.parts) == 2
    weight = torch.cat([dequantized(part) for part in parts])
    assert torch.equal(layer.dequantize(), weight)
    assert layer.weight_bytes() == sum(part.weight_bytes() for part in layer.parts)
    x = torch.randn(rows, 512)
    y = layer(x)
    assert y.shape == (rows, 41)
    if rows:
        near(y, x, weight, linear_source.bias_O, 1e-4)


def test_plain_checkpoints_become_bfloat16() -> None:
    weight = torch.randn(20, 30)
    layer = NativeFormat().pack(Source("lm_head", 20, 30, None, None, weight))
    assert torch.equal(layer.dequantize(), weight.bfloat16().float())


def test_native_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(UnsupportedError, match="IQ4_NL weights cannot be repacked"):
        repack(QuantBlocks("IQ4_NL", torch.zeros(1, 18, dtype=torch.uint8), 32))
    with pytest.raises(ModelFormatError, match="Q4_1 rows of 64 weights take 40 bytes"):
        repack(QuantBlocks("Q4_1", torch.zeros(3, 39, dtype=torch.uint8), 64))
    with pytest.raises(ModelFormatError, match="Q4_K rows of 64"):
        repack(QuantBlocks("Q4_K", torch.zeros(3, 0, dtype=torch.uint8), 64))


@pytest.mark.parametrize("grid", ["asymmetric", "symmetric", "float-min"])
@settings(max_examples=25, deadline=None)
@given(
    bits=st.sampled_from((2, 3, 4, 8)),
    size=st.integers(1, 80),
    inputs=st.integers(1, 90),
    shift=st.sampled_from((0.0, 1.0, -1.0)),
    seed=st.integers(0, 2**31),
)
def test_rounding_picks_the_nearest_point_of_its_grid(
    grid: str, bits: int, size: int, inputs: int, shift: float, seed: int
) -> None:
    weight = torch.randn(6, inputs, generator=torch.Generator().manual_seed(seed)) + shift
    codes, scale, low = round_to_nearest(weight, bits, size, grid)
    group = torch.arange(inputs) // min(size, inputs)
    step, start = scale[:, group], low[:, group]
    points = start[..., None] + step[..., None] * torch.arange(1 << bits)
    best = (points - weight[..., None]).abs().amin(-1)
    mine = (start + step * codes - weight).abs()
    assert bool((mine <= best + step * 1e-3).all())
    if grid != "float-min":  # zero is a point of the grid
        torch.testing.assert_close((start / step).round() * step, start, rtol=0, atol=0)
        assert bool((start <= 0).all())


def test_rounding_of_special_weights() -> None:
    for grid in ("asymmetric", "symmetric", "float-min"):
        codes, scale, low = round_to_nearest(torch.zeros(2, 8), 4, 4, grid)
        assert bool((scale.repeat_interleave(4, 1) * codes + low.repeat_interleave(4, 1) == 0).all())
        with pytest.raises(UnsupportedError, match="NaN"):
            round_to_nearest(torch.full((1, 4), float("nan")), 4, 4, grid)
        with pytest.raises(UnsupportedError, match="too large"):
            round_to_nearest(torch.tensor([[1e9, -1e9]]), 4, 2, grid)
    with pytest.raises(SettingError, match="bits = 9"):
        round_to_nearest(torch.ones(1, 1), 9, 4)
    with pytest.raises(SettingError, match="grid = 'log'"):
        round_to_nearest(torch.ones(1, 1), 4, 4, "log")


def affine_tensors(outputs: int, inputs: int, bits: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(inputs)
    codes = torch.randint(0, 1 << bits, (outputs, inputs), dtype=torch.uint8, generator=random)
    groups = -(-inputs // min(size, inputs))
    return (
        codes,
        torch.rand(outputs, groups, generator=random),
        torch.randn(outputs, groups, generator=random),
    )


@pytest.mark.parametrize("size", [8, 24, 16, 32, 100, 1000])
@pytest.mark.parametrize("inputs", [7, 64, 100])
def test_any_group_size_and_any_order(size: int, inputs: int) -> None:
    codes, scale, low = affine_tensors(20, inputs, 3, size)
    perm = torch.randperm(inputs, generator=torch.Generator().manual_seed(3))
    group = torch.arange(inputs) // min(size, inputs)
    stored = codes * scale[:, group] + low[:, group]
    weight = torch.empty_like(stored)
    weight[:, perm] = stored
    for rows in (1, 6, 20):
        x = torch.randn(rows, inputs)
        plain = AffineLinear(codes, scale, low, bits=3, group_size=size)
        torch.testing.assert_close(plain.dequantize(), stored, rtol=1e-6, atol=1e-6)
        near(plain(x), x, stored)
        ordered = AffineLinear(codes, scale, low, bits=3, group_size=size, perm_I=perm)
        torch.testing.assert_close(ordered.dequantize(), weight, rtol=1e-6, atol=1e-6)
        near(ordered(x), x, weight)


def test_numbers_are_stored_in_the_smallest_exact_way() -> None:
    codes, scale, _ = affine_tensors(16, 64, 4, 16)
    half = scale.half().float()
    zero = torch.randint(0, 16, half.shape).float()
    zero[0, 0], zero[0, 1] = 3, 4

    def kinds(scale: Tensor, low: Tensor) -> tuple[int, int]:
        layer = AffineLinear(codes, scale, low, bits=4, group_size=16)
        expected = codes * scale.repeat_interleave(16, 1) + low.repeat_interleave(16, 1)
        torch.testing.assert_close(layer.dequantize(), expected, rtol=1e-6, atol=1e-6)
        return layer.weight.scale.kind, layer.weight.low.kind

    assert kinds(half, half * -8) == (HALF_KIND, OFFSET)
    assert kinds(half, half * -zero) == (HALF_KIND, ZERO)
    assert kinds(half, (half + 1).half().float()) == (HALF_KIND, HALF_KIND)
    assert kinds(scale, scale * -8) == (SINGLE, OFFSET)
    assert kinds(scale, scale + 0.123) == (SINGLE, SINGLE)


def test_affine_layers_refuse_what_does_not_fit() -> None:
    codes, scale, low = affine_tensors(4, 64, 4, 32)
    make = AffineLinear
    with pytest.raises(UnsupportedError, match="codes must be non-empty uint8"):
        make(codes.float(), scale, low, bits=4, group_size=32)
    with pytest.raises(UnsupportedError, match="codes reach 15; 3 bits end at 7"):
        make(codes.clamp_min(15), scale, low, bits=3, group_size=32)
    with pytest.raises(UnsupportedError, match="scale must be float32"):
        make(codes, scale[:, :1], low, bits=4, group_size=32)
    with pytest.raises(UnsupportedError, match="low must be float32"):
        make(codes, scale, low.double(), bits=4, group_size=32)
    with pytest.raises(UnsupportedError, match="scale holds NaN"):
        make(codes, scale * float("nan"), low, bits=4, group_size=32)
    with pytest.raises(UnsupportedError, match="perm must be a permutation"):
        make(codes, scale, low, bits=4, group_size=32, perm_I=torch.zeros(64, dtype=torch.int64))
    with pytest.raises(UnsupportedError, match="group_size = 0"):
        make(codes, scale, low, bits=4, group_size=0)


def test_settings_are_checked() -> None:
    for call, message in (
        (lambda: AffineFormat(7), "bits = 7"),
        (lambda: AffineFormat(4, 0), "group_size = 0"),
        (lambda: AffineFormat(4, 32, "log"), "grid = 'log'"),
        (lambda: AffineFormat(4, 32, head_bits=1), "head_bits = 1"),
        (lambda: DenseFormat("float16"), "dtype = 'float16'"),
    ):
        with pytest.raises(SettingError, match=message):
            call()


def test_rounded_activations_are_chosen_by_the_format() -> None:
    weight, x = torch.randn(32, 64), torch.randn(3, 64)
    linear_source = Source("layers.0.o_proj", 32, 64, None, None, weight)
    layers = {name: AffineFormat(4, 32, activations=name).pack(linear_source) for name in ACTIVATIONS}
    y = {name: layer(x) for name, layer in layers.items()}
    assert torch.equal(layers["float32"].dequantize(), layers["int16"].dequantize())
    error = {name: float((y[name] - y["float32"]).norm() / y["float32"].norm()) for name in ("int16", "int8")}
    assert 0 < error["int16"] < 1e-4 < error["int8"] < 0.02
    for bits, size, activations in ((3, 32, "int16"), (8, 32, "int8"), (4, 16, "int8")):
        with pytest.raises(
            SettingError, match=f"'{activations}' do not go with {bits} bits in groups of {size}"
        ):
            AffineFormat(bits, size, head_bits=None, activations=activations)
    codes, scale, low = affine_tensors(4, 64, 3, 32)
    with pytest.raises(UnsupportedError, match="no kernel multiplies int16 activations by 3 bits"):
        AffineLinear(codes, scale, low, bits=3, group_size=32, activations="int16")
    for make in (AffineFormat, NativeFormat):
        with pytest.raises(SettingError, match="activations = 'int4'"):
            make(activations="int4")


@pytest.mark.parametrize("kind", KINDS)
def test_every_native_layer_rounds_to_16_bits_unless_told_otherwise(kind: str) -> None:
    part = source(blocks(kind, 16, 8))
    assert NativeFormat().pack(part).weight.activations == "int16"
    assert NativeFormat("float32").pack(part).weight.activations == "float32"
    coarse = NativeFormat("int8").pack(part).weight
    assert coarse.activations == ("int8" if coarse.bits == 4 else "int16")


def test_the_head_keeps_its_own_bits() -> None:
    weight = torch.randn(32, 64)
    head = AffineFormat(3, 32).pack(Source("lm_head", 32, 64, None, None, weight))
    other = AffineFormat(3, 32).pack(Source("layers.0.o_proj", 32, 64, None, None, weight))
    assert (head.weight.bits, other.weight.bits) == (8, 3)


def test_changing_the_dtype_of_a_packed_layer_is_noticed() -> None:
    with pytest.raises(TypeError, match="packed weight must be"):
        DenseLinear(torch.ones(2, 2)).half()(torch.ones(1, 2))
