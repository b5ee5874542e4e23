"""Acceptance of `gptq`: the checks of its specification that are not about speed (that is `benchmarks/gptq.py`).

1 blocked equals unblocked; 2 layer errors and held-out perplexity below plain rounding; 3 an identity Hessian gives
plain rounding; 4 packed output equals dequantise-then-multiply; 6 work grows as in^2 (out + in).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hasten.weights.gptq_grid import Grid, TernaryGrid, UniformGrid
from hasten.weights.gptq_sweep import quantize, round_to_nearest
from hasten.weights.hessian import Hessian

SHAPES = [(320, 576), (192, 576), (384, 576), (192, 1536)]  # the inputs of SmolLM2's linears, fewer outputs
GRIDS: list[tuple[Grid, int | None]] = [
    (UniformGrid(4, symmetric=True), 64),
    (UniformGrid(4, symmetric=True), None),
    (UniformGrid(3), 64),
    (UniformGrid(2), 32),
    (TernaryGrid(), 8),
]


def layer(outputs: int, inputs: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, its inputs' Hessian and the inputs themselves [T, I]: correlated, a few channels far louder."""
    random = torch.Generator().manual_seed(seed)
    rank = inputs // 4
    x_TI = torch.randn(2048, rank, generator=random) @ torch.randn(rank, inputs, generator=random) / rank**0.5
    x_TI += 0.3 * torch.randn(2048, inputs, generator=random)
    x_TI *= torch.exp(0.7 * torch.randn(inputs, generator=random))
    hessian = Hessian(inputs)
    hessian.update(x_TI)
    return torch.randn(outputs, inputs, generator=random) * 0.05, hessian.matrix_II, x_TI


# 1 --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "group_size"), GRIDS, ids=str)
@pytest.mark.parametrize("act_order", [False, True])
def test_blocked_sweep_equals_unblocked(grid: Grid, group_size: int | None, act_order: bool) -> None:
    w_OI, hessian_II, _ = layer(192, 576)
    results = [
        quantize(w_OI, hessian_II, grid, group_size, act_order=act_order, blocksize=blocksize)
        for blocksize in (128, 1, 576)
    ]
    for weight, report in results[1:]:
        equal = (weight.codes_OI == results[0][0].codes_OI).float().mean()
        assert equal >= 0.999
        assert report.loss == pytest.approx(results[0][1].loss, rel=1e-4)


# 2, on layers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "group_size"), GRIDS, ids=str)
def test_layer_error_below_rounding(grid: Grid, group_size: int | None) -> None:
    ours, theirs, wins = 0.0, 0.0, 0
    for seed, (outputs, inputs) in enumerate(SHAPES):
        w_OI, hessian_II, x_TI = layer(outputs, inputs, seed)
        weight, report = quantize(w_OI, hessian_II, grid, group_size)
        nearest = round_to_nearest(w_OI, grid, group_size)
        # The error itself, not the quadratic form that the report derives it from.
        energy = float((x_TI @ w_OI.t()).square().sum())
        error = float((x_TI @ (w_OI - weight.dequantize()).t()).square().sum()) / energy
        rtn_error = float((x_TI @ (w_OI - nearest.dequantize()).t()).square().sum()) / energy
        assert report.error == pytest.approx(error, rel=1e-2)
        assert report.rtn_error == pytest.approx(rtn_error, rel=1e-2)
        ours, theirs, wins = ours + error, theirs + rtn_error, wins + (error < rtn_error)
    assert wins == len(SHAPES)
    assert ours < 0.8 * theirs


# 3 --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "group_size"), GRIDS, ids=str)
@pytest.mark.parametrize("static_groups", [False, True])
def test_identity_hessian_is_rounding_exactly(
    grid: Grid, group_size: int | None, static_groups: bool
) -> None:
    w_OI, _, _ = layer(96, 320)
    weight, _ = quantize(w_OI, 7.5 * torch.eye(320), grid, group_size, static_groups=static_groups)
    nearest = round_to_nearest(w_OI, grid, group_size)
    assert torch.equal(weight.codes_OI, nearest.codes_OI)
    assert torch.equal(weight.dequantize(), nearest.dequantize())


# 6 --------------------------------------------------------------------------------------------------------------------


class Work(TorchDispatchMode):
    """Counts arithmetic as it is dispatched: two per multiply-add, one per element of everything else."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        matrices = [a for a in args if isinstance(a, Tensor)]
        if name in ("mm", "addmm_", "addmm"):
            (m, k), n = matrices[-2].shape, matrices[-1].shape[1]
            self.operations += 2.0 * m * k * n
        elif "cholesky" in name or "triangular" in name:
            self.operations += matrices[0].shape[0] ** 3 / (3 if "cholesky" in name else 1)
        elif isinstance(out, Tensor):
            self.operations += out.numel()
        return out


def operations(outputs: int, inputs: int, run: Callable[..., object]) -> float:
    w_OI = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))
    hessian_II = torch.eye(inputs) + 0.1
    with Work() as work:
        run(w_OI, hessian_II, UniformGrid(4), 32)
    return work.operations


def test_work_grows_as_inputs_squared_times_sides() -> None:
    sizes = [(o, i) for o in (64, 256) for i in (64, 128, 256)]
    ratios = [operations(o, i, quantize) / (i * i * (o + i)) for o, i in sizes]
    assert max(ratios) < 4 * min(ratios), dict(zip(sizes, ratios, strict=True))
    # The exponents themselves: doubling inputs at few outputs (cubic), and outputs at few inputs (linear).
    wide = operations(32, 512, quantize) / operations(32, 256, quantize)
    assert 2.5 <= math.log2(wide) <= 3.2
    tall = operations(4096, 128, quantize) / operations(2048, 128, quantize)
    assert 0.85 <= math.log2(tall) <= 1.05
