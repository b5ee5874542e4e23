"""The column sweep against an independent elimination in float64, its invariants, and bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.core.errors import IntegrityError, SettingError, UnsupportedError
from hasten.weights.gptq_grid import TernaryGrid, UniformGrid, make_grid
from hasten.weights.gptq_sweep import quantize, round_to_nearest, sweep
from hasten.weights.hessian import Hessian, inverse_factor, quadratic

GRIDS = [UniformGrid(2), UniformGrid(3), UniformGrid(4, symmetric=True), UniformGrid(8), TernaryGrid()]


def problem(outputs: int, inputs: int, rows: int = 512, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and a Hessian of correlated inputs with a few loud channels, as real layers have."""
    random = torch.Generator().manual_seed(seed)
    mix_II = torch.randn(inputs, inputs, generator=random) / inputs**0.5 + 0.5 * torch.eye(inputs)
    loud_I = torch.exp(torch.randn(inputs, generator=random))
    hessian = Hessian(inputs)
    hessian.update(torch.randn(rows, inputs, generator=random) @ mix_II * loud_I)
    return torch.randn(outputs, inputs, generator=random) * 0.05, hessian.matrix_II


def eliminate(w_OI, hessian_II, grid, group_size, percdamp=0.01, order=None):
    """Optimal brain quantisation in a fixed order, the slow way: update the inverse Hessian after every column.

    Shares no code with the sweep but the grid: no Cholesky factor, no blocks, float64.
    """
    w, h = w_OI.double().clone(), hessian_II.double().clone()
    inputs = w.shape[1]
    h += percdamp * h.diagonal().mean() * torch.eye(inputs, dtype=torch.float64)
    inverse = torch.linalg.inv(h)
    group = inputs if group_size is None else group_size
    order = list(range(inputs)) if order is None else order
    values, loss = torch.zeros_like(w), 0.0
    a = b = None
    for visit, j in enumerate(order):
        if visit % group == 0:
            columns = order[visit : visit + group]
            a, b = grid.fit(w[:, columns].t().contiguous())
        values[:, j] = grid.decode(grid.encode(w[:, j], a, b), a, b)
        difference = w[:, j] - values[:, j]
        loss += float((difference**2).sum() / inverse[j, j]) / 2
        w -= torch.outer(difference / inverse[j, j], inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, :] = inverse[:, j] = 0
    return values.float(), loss


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("group_size", [None, 8, 12])
def test_equals_elimination(grid, group_size):
    w_OI, hessian_II = problem(7, 40)
    weight, report = quantize(w_OI, hessian_II, grid, group_size, blocksize=16)
    values_OI, loss = eliminate(w_OI, hessian_II, grid, group_size)
    same = (weight.dequantize() - values_OI).abs() < 1e-6
    assert same.all()
    assert report.loss == pytest.approx(loss, rel=1e-6)


def test_act_order_equals_elimination_in_that_order():
    w_OI, hessian_II = problem(6, 32)
    order = torch.argsort(hessian_II.diagonal(), descending=True).tolist()
    assert order != sorted(order)
    weight, _ = quantize(w_OI, hessian_II, UniformGrid(4), 8, act_order=True)
    values_OI, _ = eliminate(w_OI, hessian_II, UniformGrid(4), 8, order=order)
    assert ((weight.dequantize() - values_OI).abs() < 1e-6).all()
    assert [int(weight.group_I[j]) for j in order] == [i // 8 for i in range(32)]
    assert not weight.ordered


@pytest.mark.parametrize("act_order", [False, True])
def test_static_groups_are_those_of_the_original_weight(act_order):
    w_OI, hessian_II = problem(6, 32)
    grid = UniformGrid(4)
    weight, _ = quantize(w_OI, hessian_II, grid, 8, act_order=act_order, static_groups=True)
    nearest = round_to_nearest(w_OI, grid, 8)
    assert torch.equal(weight.a_OG, nearest.a_OG)
    assert torch.equal(weight.b_OG, nearest.b_OG)
    assert torch.equal(weight.group_I, torch.arange(32) // 8)  # so no gather at run time
    dynamic, _ = quantize(w_OI, hessian_II, grid, 8, act_order=act_order)
    assert not torch.equal(dynamic.a_OG, weight.a_OG)


@given(
    outputs=st.integers(1, 20),
    inputs=st.integers(1, 70),
    group_size=st.sampled_from([None, 1, 8, 24, 64, 100]),
    blocksize=st.sampled_from([1, 5, 32, 128]),
    grid=st.sampled_from(GRIDS),
    act_order=st.booleans(),
    static_groups=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_any_shape(outputs, inputs, group_size, blocksize, grid, act_order, static_groups, seed):
    """Codes are in range, on the grid, and the loss is the quadratic form that the sweep minimises."""
    w_OI, hessian_II = problem(outputs, inputs, rows=96, seed=seed)
    kwargs = {"blocksize": blocksize, "act_order": act_order, "static_groups": static_groups}
    weight, report = quantize(w_OI, hessian_II, grid, group_size, **kwargs)
    assert weight.codes_OI.shape == w_OI.shape
    assert int(weight.codes_OI.max()) < (3 if isinstance(grid, TernaryGrid) else 1 << grid.code_bits)
    assert torch.equal(weight.a_OG, weight.a_OG.half().float())  # what is stored is what was used
    d_OI = w_OI - weight.dequantize()
    damped_II = hessian_II + inverse_factor(hessian_II).damping * torch.eye(inputs)
    assert report.loss == pytest.approx(quadratic(d_OI, damped_II) / 2, rel=2e-3, abs=1e-7)


def test_column_itself_is_written_and_upper_factor_is_used():
    """Two traps: a lower factor, or leaving the rounded column as it was, both break H^-1 = U^T U."""
    _, hessian_II = problem(1, 50)
    factor = inverse_factor(hessian_II)
    damped_II = hessian_II.double() + factor.damping * torch.eye(50)
    upper_II = factor.upper_II.double()
    assert torch.equal(upper_II, upper_II.triu())
    assert torch.allclose(upper_II.t() @ upper_II @ damped_II, torch.eye(50).double(), atol=1e-4)


def test_dead_inputs_become_zero():
    w_OI, _ = problem(5, 16)
    x_TI = torch.randn(200, 16)
    x_TI[:, [3, 9]] = 0
    hessian = Hessian(16)
    hessian.update(x_TI)
    weight, report = quantize(w_OI, hessian.matrix_II, UniformGrid(4), 8, act_order=True)
    assert report.dead == 2
    assert torch.equal(weight.dequantize()[:, [3, 9]], torch.zeros(5, 2))


def test_grid_contains_zero_and_extremes():
    w_KO = torch.tensor([[0.0, -3.0, 1.0], [4.0, -1.0, 2.0]])
    grid = UniformGrid(4)
    scale_O, zero_O = grid.fit(w_KO)
    assert zero_O.tolist() == [0, 15, 0]
    q_KO = grid.decode(grid.encode(w_KO, scale_O, zero_O), scale_O, zero_O)
    assert torch.allclose(q_KO, w_KO, atol=float(scale_O.max()) / 2 + 1e-6)
    assert grid.decode(zero_O, scale_O, zero_O).tolist() == [0, 0, 0]


def test_mse_search_never_widens_the_error():
    w_KO = torch.randn(64, 30, generator=torch.Generator().manual_seed(1))
    w_KO[0] *= 8  # outliers, which min-max spends its codes on
    for symmetric in (False, True):
        errors = []
        for mse in (False, True):
            grid = UniformGrid(3, symmetric, mse)
            a_O, b_O = grid.fit(w_KO)
            errors.append((grid.decode(grid.encode(w_KO, a_O, b_O), a_O, b_O) - w_KO).abs().pow(2.4).sum(0))
        assert (errors[1] <= errors[0]).all()
        assert (errors[1] < errors[0]).any()


def test_ternary_thresholds():
    grid = TernaryGrid()
    w_KO = torch.tensor([[1.0], [0.51], [0.49], [-0.15], [-0.4], [-0.19]])
    a_O, b_O = grid.fit(w_KO)
    codes_KO = grid.encode(w_KO, a_O, b_O)
    expected = torch.tensor([1.0, 1.0, 0.0, 0.0, float(b_O), 0.0])
    assert torch.allclose(grid.decode(codes_KO, a_O, b_O)[:, 0], expected)


def test_all_zero_weight_stays_zero():
    for grid in GRIDS:
        weight, _ = quantize(torch.zeros(4, 16), problem(1, 16)[1], grid, 8)
        assert torch.equal(weight.dequantize(), torch.zeros(4, 16))


class TestHessian:
    def test_is_the_mean_whatever_the_cut(self):
        x_TI = torch.randn(10_000, 6)
        once, cut = Hessian(6), Hessian(6)
        once.update(x_TI)
        for part_TI in x_TI.split(333):
            cut.update(part_TI.reshape(1, -1, 6))
        expected_II = 2 * x_TI.double().t() @ x_TI.double() / 10_000
        assert torch.allclose(once.matrix_II.double(), expected_II, atol=1e-5)
        assert torch.allclose(cut.matrix_II.double(), expected_II, atol=1e-5)
        assert once.rows == cut.rows == 10_000

    def test_accumulates_in_float32_from_bfloat16(self):
        hessian = Hessian(2)
        for _ in range(300):
            hessian.update(torch.ones(1, 2, dtype=torch.bfloat16))
        assert hessian.matrix_II.dtype == torch.float32
        assert torch.allclose(hessian.matrix_II, torch.full((2, 2), 2.0), atol=1e-4)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_refuses_non_finite(self, bad):
        with pytest.raises(IntegrityError, match="NaN or infinity"):
            Hessian(3).update(torch.tensor([[1.0, bad, 0.0]]))

    def test_refuses_wrong_width_and_emptiness(self):
        hessian = Hessian(3)
        with pytest.raises(UnsupportedError, match="width 4"):
            hessian.update(torch.ones(2, 4))
        hessian.update(torch.ones(0, 3))
        with pytest.raises(SettingError, match="must not be empty"):
            hessian.require_rows()

    def test_dampening_grows_until_it_factorises(self):
        indefinite_II = torch.tensor([[1.0, 1.5], [1.5, 1.0]])  # smallest eigenvalue -0.5
        factor = inverse_factor(indefinite_II, percdamp=0.01)
        assert factor.percdamp == pytest.approx(1.0)
        singular_II = torch.ones(4, 4)
        assert inverse_factor(singular_II, percdamp=0.0).percdamp in (0.0, 0.01)

    def test_raises_when_nothing_helps(self):
        hopeless_II = torch.tensor([[1.0, 1e6], [1e6, 1.0]])
        with pytest.raises(UnsupportedError, match="cannot be factorised even with dampening 100"):
            inverse_factor(hopeless_II)
        with pytest.raises(UnsupportedError, match="cannot be factorised"):
            quantize(torch.ones(1, 2), hopeless_II, UniformGrid(4))

    def test_refuses_bad_arguments(self):
        with pytest.raises(IntegrityError, match="NaN"):
            inverse_factor(torch.full((2, 2), float("nan")))
        with pytest.raises(UnsupportedError, match="square"):
            inverse_factor(torch.ones(2, 3))
        with pytest.raises(SettingError, match="percdamp"):
            inverse_factor(torch.eye(2), percdamp=-1)


def test_refuses_bad_weights_and_settings():
    hessian_II = torch.eye(4)
    with pytest.raises(IntegrityError, match="NaN or infinity"):
        quantize(torch.full((2, 4), float("nan")), hessian_II, UniformGrid(4))
    with pytest.raises(UnsupportedError, match="non-empty"):
        quantize(torch.ones(0, 4), hessian_II, UniformGrid(4))
    with pytest.raises(UnsupportedError, match="4 inputs cannot quantise a weight of 5"):
        sweep(torch.ones(2, 5), inverse_factor(hessian_II), UniformGrid(4))
    with pytest.raises(SettingError, match="group_size"):
        quantize(torch.ones(2, 4), hessian_II, UniformGrid(4), 0)
    with pytest.raises(SettingError, match="blocksize"):
        quantize(torch.ones(2, 4), hessian_II, UniformGrid(4), blocksize=0)
    with pytest.raises(SettingError, match="bits"):
        make_grid(5, False, False)
    with pytest.raises(SettingError, match="no MSE search"):
        make_grid("ternary", False, True)
    with pytest.raises(UnsupportedError, match="65504"):
        quantize(torch.full((2, 4), 3e6), hessian_II, UniformGrid(2))
