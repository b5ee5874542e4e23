"""Acceptance of `marlin`: the checks of its specification that are not about speed (that is `benchmarks/marlin.py`).

1 packed equals dequantise-then-multiply for 1..130 rows and ragged shapes, 2:4 too, whose bytes are counted; 4 the
striped partition (also tests/kernels/test_marlin.py); 5 many clients get the tokens of sequential runs; and the recipe:
a stable covariance, clipping in the sweep's own measure, samples of varying length, 2:4 pruning.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.core.errors import SettingError, UnsupportedError
from hasten.kernels.marlin import stripes
from hasten.lm.llm import LLM
from hasten.lm.request import SamplingParams
from hasten.models.checkpoint import load_decoder
from hasten.weights.calibrate import BlockMethod, FixedLinear, LinearReport, SourceLinear, calibrate
from hasten.weights.gptq import GPTQ
from hasten.weights.gptq_grid import UniformGrid
from hasten.weights.gptq_sweep import QuantizedWeight, quantize, round_to_nearest
from hasten.weights.hessian import Hessian, inverse_factor
from hasten.weights.marlin import Marlin
from hasten.weights.marlin_layers import MarlinLinear, SparseMarlinLinear, pack_marlin

from ..lm.lm_tiny import write_checkpoint
from ..weights.gptq_models import context, write_model

GRID = UniformGrid(4, symmetric=True)
SHAPES = [(192, 576), (77, 300), (576, 1536)]


def correlated(outputs: int, inputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A heavy-tailed weight and the Hessian of its correlated inputs."""
    random = torch.Generator().manual_seed(seed)
    mix_II = torch.randn(inputs, inputs, generator=random) / inputs**0.5 + 0.5 * torch.eye(inputs)
    loud_I = torch.exp(0.7 * torch.randn(inputs, generator=random))
    hessian = Hessian(inputs)
    hessian.update(torch.randn(2 * inputs, inputs, generator=random) @ mix_II * loud_I)
    return 0.05 * torch.randn(outputs, inputs, generator=random), hessian.matrix_II


def two_of_four(weight_OI: Tensor, size: int | None) -> QuantizedWeight:
    """Magnitude pruning, then rounding: a 2:4 weight to multiply with."""
    four = weight_OI.unflatten(1, (-1, 4))
    keep = torch.zeros_like(four, dtype=torch.bool).scatter(-1, four.abs().topk(2, -1).indices, True)
    return round_to_nearest((four * keep).flatten(1), GRID, size)


# 1 --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 64, 128, None])
@pytest.mark.parametrize("how", ["float32", "int16", "sparse"])
def test_packed_equals_the_dequantised_product(how: str, size: int | None) -> None:
    for outputs, inputs in SHAPES:
        random = torch.Generator().manual_seed(inputs)
        weight_OI, bias_O = (
            torch.randn(outputs, inputs, generator=random),
            torch.randn(outputs, generator=random),
        )
        quantised = (
            two_of_four(weight_OI, size) if how == "sparse" else round_to_nearest(weight_OI, GRID, size)
        )
        layer = pack_marlin(quantised, bias_O, "float32" if how == "sparse" else how, how == "sparse")
        assert torch.equal(layer.dequantize(), quantised.dequantize())
        x_TI = torch.randn(130, inputs, generator=random)
        expected_TO = (x_TI.double() @ quantised.dequantize().double().t() + bias_O).float()
        top = float(expected_TO.abs().max())
        for rows in range(1, 131) if outputs < 100 else (1, 2, 3, 5, 8, 12, 13, 16, 17, 64, 96, 97, 130):
            error = (layer(x_TI[:rows]) - expected_TO[:rows]).abs().max()
            assert float(error) < 1e-4 * top, (rows, outputs, inputs)


def test_bits_per_weight() -> None:
    weight_OI = torch.randn(512, 1024)
    dense = pack_marlin(round_to_nearest(weight_OI, GRID, 64), None, "int16", False)
    sparse = pack_marlin(two_of_four(weight_OI, 64), None, "float32", True)
    assert dense.weight_bytes() * 8 / weight_OI.numel() == 4.25
    assert sparse.weight_bytes() * 8 / weight_OI.numel() == 3.25
    per_column = pack_marlin(round_to_nearest(weight_OI, GRID, None), None, "int16", False)
    assert per_column.weight_bytes() * 8 / weight_OI.numel() == pytest.approx(4, abs=0.02)


# 4 --------------------------------------------------------------------------------------------------------------------


def test_one_split_column_per_boundary_and_every_item_once() -> None:
    for columns, panels, count in ((36, 3, 2), (13, 16, 5), (1, 16, 7), (256, 16, 2), (3, 1, 8)):
        seen = stripes(columns, panels, count)
        assert sum(s.last - s.first for s in seen) == columns * panels
        split = [s for s in seen if s.first > 0]
        assert len(split) <= count - 1
        assert len({s.stripe for s in split}) == len(split)


# 5 --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"activations": "int8"}, {"sparse": True}], ids=str)
def test_clients_get_the_tokens_of_sequential_runs(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path / "home"))
    path = write_checkpoint(tmp_path / "tiny", layers=2, head_size=32)
    random = torch.Generator().manual_seed(7)
    calibration = torch.randint(3, 320, (8, 128), generator=random).tolist()
    prompts = torch.randint(3, 320, (64, 24), generator=random).tolist()
    prompts = [ids[: 4 + index % 20] for index, ids in enumerate(prompts)]
    technique = Marlin(group_size=32, samples=4, sample_length=64, **settings)
    greedy = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)

    def tokens(clients: int) -> list[list[int]]:
        llm = LLM(path, (technique,), "float32", calibration=calibration, max_batch=clients)
        return [answer.samples[0].token_ids for answer in llm.generate(prompts, greedy)]

    alone = tokens(1)
    assert all(tokens(clients) == alone for clients in (16, 64))


# The recipe -----------------------------------------------------------------------------------------------------------


def test_covariance_streams_stably() -> None:
    """A running mean: neither the number of samples nor how they are cut into calls leaves a trace in float32."""
    random = torch.Generator().manual_seed(0)
    x_TI = torch.randn(40000, 24, generator=random) * torch.logspace(-3, 3, 24) + 5 * torch.logspace(
        -3, 3, 24
    )
    hessian = Hessian(24)
    for part_TI in x_TI.split(7):
        hessian.update(part_TI)
    exact_II = 2 * x_TI.double().t() @ x_TI.double() / len(x_TI)
    assert float(((hessian.matrix_II - exact_II) / exact_II).abs().max()) < 1e-5


@pytest.mark.parametrize("size", [32, 64, 128, None])
@pytest.mark.parametrize("act_order", [False, True])
def test_clipping_lowers_the_layer_error(size: int | None, act_order: bool) -> None:
    options = {"percdamp": 0.1, "act_order": act_order, "static_groups": act_order}
    plain = clipped = nearest = 0.0
    for seed in range(3):
        w_OI, hessian_II = correlated(64, 256, seed)
        without = quantize(w_OI, hessian_II, GRID, size, **options)[1]
        report = quantize(w_OI, hessian_II, GRID, size, clip=True, **options)[1]
        assert report.error < without.error < without.rtn_error
        plain, clipped, nearest = (
            plain + without.error,
            clipped + report.error,
            nearest + without.rtn_error,
        )
    assert clipped < 0.9 * plain < 0.9 * nearest


def test_the_searched_scale_is_the_best_of_all_candidates() -> None:
    """|| (w - q) U^-1 ||^2 over the 76 shrinks, by an explicit inverse in float64."""
    w_OI, hessian_II = correlated(9, 64)
    upper_KK = inverse_factor(hessian_II, 0.1).upper_II[:32, :32]
    w_KO = w_OI.double().t()[:32]
    scale_O, zero_O = GRID.fit(w_KO, upper_KK)
    top_O = w_KO.abs().amax(0)
    errors = []
    for step in range(76):
        scale = (2 * top_O * (1 - step / 100) / 15).half().double()
        q_KO = (w_KO / scale).round().clamp(-8, 7) * scale
        errors.append(((w_KO - q_KO).t() @ torch.linalg.inv(upper_KK)).square().sum(1))
    q_KO = GRID.decode(GRID.encode(w_KO, scale_O, zero_O), scale_O, zero_O)
    found_O = ((w_KO - q_KO).t() @ torch.linalg.inv(upper_KK)).square().sum(1)
    best_O = torch.stack(errors).amin(0)
    assert bool((found_O <= best_O * (1 + 1e-4)).all())
    assert bool((best_O < errors[0]).any())


@pytest.mark.parametrize("size", [32, 64, None])
def test_two_of_four_in_the_same_sweep(size: int | None) -> None:
    w_OI, hessian_II = correlated(48, 256)
    weight, report = quantize(w_OI, hessian_II, GRID, size, percdamp=0.1, clip=True, two_of_four=True)
    assert int((weight.dequantize().unflatten(1, (-1, 4)) != 0).sum(-1).max()) <= 2
    assert report.error < 0.5 * report.rtn_error  # pruned by magnitude, then rounded
    layer = pack_marlin(weight, None, "float32", True)
    assert isinstance(layer, SparseMarlinLinear)
    assert torch.equal(layer.dequantize(), weight.dequantize())


def test_blocks_of_the_sweep_do_not_change_a_pruned_weight() -> None:
    w_OI, hessian_II = correlated(32, 192)
    results = [
        quantize(w_OI, hessian_II, GRID, 64, clip=True, two_of_four=True, blocksize=block)[0].codes_OI
        for block in (64, 128, 192, 4)
    ]
    assert all((codes == results[0]).float().mean() >= 0.999 for codes in results[1:])


def test_pruning_refuses_what_has_no_fours() -> None:
    w_OI, hessian_II = correlated(8, 64)
    with pytest.raises(SettingError, match="symmetric"):
        quantize(w_OI, hessian_II, UniformGrid(4), 32, two_of_four=True)
    with pytest.raises(SettingError, match="in order"):
        quantize(w_OI, hessian_II, GRID, 32, two_of_four=True, act_order=True)
    with pytest.raises(UnsupportedError, match="multiples of 4"):
        quantize(w_OI[:, :62], hessian_II[:62, :62], GRID, 32, two_of_four=True)


def test_samples_of_varying_length_leave_out_the_filling(tmp_path: Path) -> None:
    build = context(write_model(tmp_path / "model"))
    recipe = Marlin(group_size=32, samples=4, sample_length=32).recipe()
    ids_NL = recipe.calibration_tokens(build)
    lengths_N = recipe.calibration_lengths(ids_NL)
    assert lengths_N is not None
    assert len(set(lengths_N.tolist())) > 1
    assert 4 <= int(lengths_N.min()) <= int(lengths_N.max()) <= 32

    class Keep(BlockMethod):
        def __init__(self) -> None:
            self.seen: dict[str, Hessian] = {}

        def statistic(self, name: str, linear: Any) -> Hessian:
            return self.seen.setdefault(name, Hessian(linear.weight.shape[1]))

        def process(self, name: str, linear: Any, statistic: Hessian) -> Any:
            return FixedLinear(linear.weight, linear.bias), LinearReport(name, 0.0, 0.0, 0.0)

    def hessians(ids: Tensor, lengths: Tensor | None, sequential: bool) -> dict[str, Hessian]:
        method = Keep()
        decoder = load_decoder(build.checkpoint, pack=SourceLinear)
        calibrate(decoder, ids, method, lengths_N=lengths, true_sequential=sequential, chunk_tokens=64)
        return method.seen

    filled = ids_NL.clone()
    for row, length in zip(filled, lengths_N.tolist(), strict=True):
        row[length:] = 1
    for sequential in (True, False):
        ours = hessians(ids_NL, lengths_N, sequential)
        theirs = hessians(filled, lengths_N, sequential)
        for name, hessian in ours.items():
            assert hessian.rows == int(lengths_N.sum())
            torch.testing.assert_close(hessian.matrix_II, theirs[name].matrix_II)
    with pytest.raises(SettingError, match="one per sample"):
        hessians(ids_NL, lengths_N[:2], True)


# Settings and folders -------------------------------------------------------------------------------------------------


def test_settings_that_do_not_go_together_are_refused() -> None:
    for bad, message in (
        ({"sparse": True, "activations": "int8"}, "float32 activations only"),
        ({"sparse": True, "act_order": True}, "swept in order"),
        ({"group_size": 48}, "group_size"),
        ({"percdamp": 0.0}, "percdamp"),
        ({"samples": 0}, "samples"),
    ):
        with pytest.raises(SettingError, match=message):
            Marlin(**bad)


def test_a_gptq_folder_runs_on_these_kernels(tmp_path: Path) -> None:
    build = context(write_model(tmp_path / "model"))
    common: dict[str, Any] = {"samples": 2, "sample_length": 32, "group_size": 32}
    saved = GPTQ(symmetric=True, **common).save(build, tmp_path / "symmetric")
    adopted = context(saved)
    ids = torch.arange(40)[None] % 256
    with torch.no_grad():
        decoder = load_decoder(
            adopted.checkpoint,
            pack=Marlin(activations="float32", quantize_head="float32")
            .provide("weight_format", adopted)
            .pack,
        )
        kept = load_decoder(
            adopted.checkpoint,
            pack=GPTQ(quantize_head="float32").provide("weight_format", adopted).pack,
        )
        assert any(isinstance(layer, MarlinLinear) for _, layer in decoder.linears())
        torch.testing.assert_close(decoder(ids), kept(ids), rtol=1e-4, atol=1e-4)
    with pytest.raises(UnsupportedError, match="cannot be pruned"):
        Marlin(sparse=True).provide("weight_format", adopted)
    other = context(GPTQ(**common).save(build, tmp_path / "asymmetric"))
    with pytest.raises(UnsupportedError, match="use gptq"):
        load_decoder(other.checkpoint, pack=Marlin().provide("weight_format", other).pack)
