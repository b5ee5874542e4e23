"""What every weight format promises, run over all of them: add a format to FORMATS when it is written."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from hasten.core.errors import UnsupportedError
from hasten.weights.affine import AffineFormat
from hasten.weights.dense import DenseFormat
from hasten.weights.format import LinearSource, PackedLinear, WeightFormat
from hasten.weights.gptq_grid import UniformGrid
from hasten.weights.gptq_sweep import round_to_nearest
from hasten.weights.marlin_layers import pack_marlin
from hasten.weights.native import NativeFormat
from hasten.weights.quik_linear import QuikLinear
from hasten.weights.quik_sweep import round_mixed
from hasten.weights.t_man import PlaneLinear


@dataclass(frozen=True)
class Source(LinearSource):
    """A source in memory."""

    weight_OI: Tensor = field(repr=False)

    def dense(self) -> Tensor:
        return self.weight_OI


class Marlin(WeightFormat):
    """MARLIN layers of rounded weights: the technique's own format calibrates."""

    def __init__(self, group_size: int | None) -> None:
        self.group_size = group_size

    def pack(self, source: LinearSource) -> PackedLinear:
        weight = round_to_nearest(source.dense(), UniformGrid(4, symmetric=True), self.group_size)
        return pack_marlin(weight, source.bias_O, "float32", False)


class QuikWeights(WeightFormat):
    """QUIK's packed codes without its calibration, inputs never rounded."""

    def pack(self, source: LinearSource) -> PackedLinear:
        weight = round_mixed(source.dense(), torch.empty(0, dtype=torch.int64), 4)
        return QuikLinear(weight, source.bias_O, None)


class Planes(WeightFormat):
    """Bit planes of rounded weights: the technique's own format takes codes that are there already."""

    def __init__(self, bits: int, group_size: int | None, grid: str) -> None:
        self.inner = AffineFormat(bits, group_size, grid, head_bits=None)

    def pack(self, source: LinearSource) -> PackedLinear:
        return PlaneLinear.of(self.inner.pack(source))


def rounding(layer: PackedLinear) -> float:
    """How much larger than float32's the error of a product may be: tables of sums are rounded to 16 bits."""
    return 10.0 if isinstance(layer, PlaneLinear) else 1.0


# Formats with a rough upper bound of bits per weight for the shapes below (what fills up blocks included).
FORMATS: dict[str, tuple[Callable[[], WeightFormat], float]] = {
    "dense-float32": (lambda: DenseFormat("float32"), 36),
    "dense-bfloat16": (lambda: DenseFormat("bfloat16"), 18),
    "native-plain": (NativeFormat, 18),
    "marlin-64": (lambda: Marlin(64), 5.4),
    "marlin-row": (lambda: Marlin(None), 4.7),
    "quik-weights": (QuikWeights, 5),
    "t_man-2": (lambda: Planes(2, 64, "float-min"), 3),
    "t_man-3": (lambda: Planes(3, 32, "asymmetric"), 4),
    "t_man-4": (lambda: Planes(4, None, "symmetric"), 4.4),
    **{
        f"affine-{bits}-{size}-{grid}": (
            lambda bits=bits, size=size, grid=grid: AffineFormat(bits, size, grid, head_bits=None),
            bits * 1.1 + 50 / (size or 576) + 0.2,
        )
        for bits, size, grid in (
            (2, 16, "float-min"),
            (3, 64, "asymmetric"),
            (4, 32, "asymmetric"),
            (4, 192, "symmetric"),
            (4, None, "float-min"),
            (5, 24, "symmetric"),
            (6, 128, "asymmetric"),
            (8, 32, "symmetric"),
        )
    },
}
SHAPES = [(192, 576), (160, 544)]  # the second leaves short last groups


def source(outputs: int, inputs: int, bias: bool = True) -> Source:
    random = torch.Generator().manual_seed(outputs * inputs)
    return Source(
        "layers.0.o_proj",
        outputs,
        inputs,
        None,
        torch.randn(outputs, generator=random) if bias else None,
        torch.randn(outputs, inputs, generator=random) * 0.05,
    )


@pytest.fixture(
    params=[(name, shape) for name in FORMATS for shape in SHAPES], ids=lambda p: f"{p[0]}-{p[1]}"
)
def case(request: pytest.FixtureRequest) -> tuple[PackedLinear, Source, float]:
    name, shape = request.param
    make, bits = FORMATS[name]
    linear_source = source(*shape)
    return make().pack(linear_source), linear_source, bits


Case = tuple[PackedLinear, Source, float]


def expected(layer: PackedLinear, linear_source: Source, x: Tensor) -> Tensor:
    y = x.double() @ layer.dequantize().double().t()
    return y if linear_source.bias_O is None else y + linear_source.bias_O


def test_forward_is_the_product_with_the_dequantised_weight(case: Case) -> None:
    layer, linear_source, _ = case
    assert (layer.inputs, layer.outputs) == (linear_source.inputs, linear_source.outputs)
    assert layer.dequantize().shape == (linear_source.outputs, linear_source.inputs)
    assert layer.dequantize().dtype is torch.float32
    for rows in (*range(1, 17), 33, 200):
        x = torch.randn(rows, layer.inputs, generator=torch.Generator().manual_seed(rows))
        y, reference = layer(x), expected(layer, linear_source, x)
        assert y.dtype is torch.float32
        assert y.shape == reference.shape
        assert float((y - reference).norm() / reference.norm()) < 1e-5 * rounding(layer)
        assert float((y - reference).abs().max() / reference.abs().max()) < 1e-4 * rounding(layer)


def test_no_rows(case: Case) -> None:
    layer, _, _ = case
    assert layer(torch.empty(0, layer.inputs)).shape == (0, layer.outputs)


def test_deterministic(case: Case) -> None:
    layer, _, _ = case
    for rows in (1, 7, 40):
        x = torch.randn(rows, layer.inputs)
        assert torch.equal(layer(x), layer(x.clone()))


def test_input_strides_and_leading_dimensions_do_not_matter(case: Case) -> None:
    layer, _, _ = case
    wide = torch.randn(6, 2 * layer.inputs)
    for x in (wide[:, ::2], wide[::2, : layer.inputs], torch.randn(layer.inputs, 3).t()):
        assert torch.equal(layer(x), layer(x.contiguous()))
    x = torch.randn(2, 3, layer.inputs)
    assert torch.equal(layer(x), layer(x.view(6, -1)).view(2, 3, -1))
    assert layer(torch.empty(2, 0, layer.inputs)).shape == (2, 0, layer.outputs)


def test_input_is_not_changed(case: Case) -> None:
    layer, _, _ = case
    x = torch.randn(5, layer.inputs)
    before = x.clone()
    layer(x)
    assert torch.equal(x, before)


def test_nan_stays_in_its_row(case: Case) -> None:
    layer, _, _ = case
    for rows in (2, 20):
        x = torch.randn(rows, layer.inputs)
        x[1, -1] = float("nan")
        y = layer(x)
        assert bool(y[1].isnan().all())
        assert bool(torch.isfinite(y[0]).all())


def test_wrong_input_is_named(case: Case) -> None:
    layer, _, _ = case
    with pytest.raises(ValueError, match=rf"takes \[rows, {layer.inputs}\]"):
        layer(torch.randn(2, layer.inputs + 1))
    with pytest.raises(TypeError, match="x must be float32"):
        layer(torch.randn(2, layer.inputs, dtype=torch.float64))


def test_a_gradient_is_refused_not_lost(case: Case) -> None:
    layer, _, _ = case
    x = torch.randn(2, layer.inputs, requires_grad=True)
    with pytest.raises(UnsupportedError, match="no backward pass"):
        layer(x)
    with torch.no_grad():
        layer(x)


def test_weight_bytes_are_the_bytes_that_are_kept(case: Case) -> None:
    layer, linear_source, bits = case
    kept = sum(buffer.nbytes for name, buffer in layer.named_buffers() if not name.endswith("bias_P"))
    kept += sum(parameter.nbytes for parameter in layer.parameters())
    assert layer.weight_bytes() == kept
    assert layer.weight_bytes() * 8 <= bits * linear_source.outputs * linear_source.inputs
    assert not list(layer.parameters())


def test_copies_and_state(case: Case) -> None:
    layer, _, _ = case
    x = torch.randn(3, layer.inputs)
    y = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.to("cpu")):
        assert torch.equal(other(x), y)
    zeroed = copy.deepcopy(layer)
    for buffer in zeroed.buffers():
        buffer.zero_()
    assert not torch.equal(zeroed(x), y)
    zeroed.load_state_dict(layer.state_dict())
    assert torch.equal(zeroed(x), y)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (17, 33), (3, 200)])
def test_ragged_shapes_with_and_without_bias(name: str, shape: tuple[int, int]) -> None:
    for bias in (False, True):
        linear_source = source(*shape, bias=bias)
        layer = FORMATS[name][0]().pack(linear_source)
        for rows in (1, 4, 20):
            x = torch.randn(rows, shape[1])
            reference = expected(layer, linear_source, x).float()
            atol = 1e-5 * rounding(layer)
            torch.testing.assert_close(layer(x), reference, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("name", [name for name in FORMATS if name.startswith("affine")])
def test_the_grid_is_close_to_the_weight(name: str) -> None:
    linear_source = source(192, 576)
    layer = FORMATS[name][0]().pack(linear_source)
    bits = int(name.split("-")[1])
    error = (layer.dequantize() - linear_source.dense()).abs().max()
    # Half a step of a grid over the whole weight's range; every group's grid is at most that wide.
    assert float(error) <= float(linear_source.dense().abs().max()) / ((1 << bits) - 1) * 1.02
