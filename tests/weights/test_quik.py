"""Settings, precision policy, outlier choice, pruning and artefacts of quik (kernels: tests/kernels/test_quik.py)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hasten.core.errors import ArtefactError, IntegrityError, SettingError, UnsupportedError
from hasten.kernels.quik import MAX_WIDTH
from hasten.models.checkpoint import load_decoder
from hasten.weights.dense import DenseLinear
from hasten.weights.quik import QUIK, Precision
from hasten.weights.quik_linear import QuikLinear, from_tensors, to_tensors
from hasten.weights.quik_sweep import (
    MixedWeight,
    OutlierStatistic,
    SignedGrid,
    outlier_features,
    quantize_mixed,
    round_mixed,
)

from .gptq_models import QWEN, context, write_model

SMALL = {"samples": 4, "sample_length": 40, "outliers": 6}
NONE = torch.empty(0, dtype=torch.int64)


def test_precision_of_a_linear() -> None:
    technique = QUIK(
        outliers=32,
        zero_threshold=3.0,
        layers=(r"layers\.0\..*=8", r"layers\.\d\.o_proj=16", "layers.9.down_proj=4:7"),
    )
    assert technique.precision("layers.1.qkv_proj", 576, 576) == Precision(4, 32, 3.0, False)
    assert technique.precision("layers.1.down_proj", 1536, 576) == Precision(8, 64, 6.0, False)
    assert technique.precision("layers.0.o_proj", 576, 576) == Precision(8, 32, 3.0, False)
    assert technique.precision("layers.1.o_proj", 576, 576).bits == 16
    assert technique.precision("layers.9.down_proj", 1536, 576) == Precision(4, 7, 3.0, False)
    assert technique.precision("layers.1.qkv_proj", 20, 576).outliers == 20
    assert QUIK(outliers=32, fp_relative=False).precision("layers.1.down_proj", 1536, 576).outliers == 32
    sparse = QUIK(sparse=True, act_order=False)
    assert sparse.precision("layers.1.qkv_proj", 576, 576).sparse
    assert not sparse.precision("layers.1.down_proj", 1536, 576).sparse


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"layers": ("o_proj",)}, "REGEX=BITS"),
        ({"layers": ("o_proj=5",)}, "REGEX=BITS"),
        ({"layers": ("(=8",)}, "regular expression"),
        ({"bits": 3}, "bits"),
        ({"outliers": -1}, "outliers"),
        ({"sparse": True, "act_order": True}, "act_order"),
        ({"sparse": True, "act_order": False, "sweep": False}, "sweep"),
        ({"sparse": True, "act_order": False, "blocksize": 6}, "blocksize"),
    ],
)
def test_impossible_settings_are_named(settings: dict, word: str) -> None:
    with pytest.raises(SettingError, match=word):
        QUIK(**settings)


def test_outliers_are_the_loudest_features_that_calibration_saw() -> None:
    statistic = OutlierStatistic(5)
    statistic.update(torch.tensor([[0.0, -9.0, 1.0, 2.0, 2.0], [3.0, 0.0, 0.0, 0.0, 0.0]]))
    statistic.update(torch.zeros(2, 0, 5))
    statistic.update(torch.tensor([[[0.0, 0.0, -4.0, 0.0, 0.0]]]))
    assert statistic.largest_I.tolist() == [3, 9, 4, 2, 2]
    assert outlier_features(statistic.largest_I, 0).tolist() == []
    assert outlier_features(statistic.largest_I, 2).tolist() == [1, 2]
    assert outlier_features(statistic.largest_I, 4).tolist() == [0, 1, 2, 3]  # of equals, the first
    assert outlier_features(statistic.largest_I, 9).tolist() == [0, 1, 2, 3, 4]
    # The zero-outlier rule.
    assert outlier_features(statistic.largest_I, 2, threshold=9.0).tolist() == [1, 2]
    assert outlier_features(statistic.largest_I, 2, threshold=9.5).tolist() == []
    with pytest.raises(SettingError, match="outliers = -1"):
        outlier_features(statistic.largest_I, -1)
    with pytest.raises(IntegrityError):
        statistic.update(torch.full((1, 5), float("nan")))


def test_grid_uses_the_base_columns_alone() -> None:
    grid = SignedGrid(4)
    w_OI = torch.tensor([[0.5, -3.5, 1.0, 100.0], [-0.7, 0.2, 0.1, 3.0]])
    weight = round_mixed(w_OI, torch.tensor([3]), 4, mse=False)
    assert weight.scale_O.tolist() == [0.5, float(torch.tensor(0.1).half())]
    assert weight.codes_OK.tolist() == [[9, 1, 10], [1, 10, 9]]
    assert weight.dequantize()[:, 3].tolist() == [100.0, 3.0]
    scale, zero = grid.fit(torch.zeros(4, 2, dtype=torch.float64))  # any positive scale holds zeros
    assert bool((scale > 0).all())
    assert grid.encode(torch.zeros(2, dtype=torch.float64), scale, zero).tolist() == [8, 8]


def test_two_of_four_base_weights_are_pruned_and_outliers_are_not() -> None:
    random = torch.Generator().manual_seed(0)
    x_TI, w_OI = torch.randn(500, 70, generator=random), torch.randn(16, 70, generator=random)
    statistic = OutlierStatistic(70)
    statistic.update(x_TI)
    outlier_F = outlier_features(statistic.largest_I, 8)
    weight, _ = quantize_mixed(w_OI, statistic.matrix_II, outlier_F, 4, sparse=True)
    zeros_OK = weight.codes_OK == 8
    assert bool((zeros_OK[:, :60].unflatten(1, (-1, 4)).sum(-1) >= 2).all())
    assert bool((zeros_OK[:, 60:].sum(-1) >= 1).all())  # what is left over loses half as well
    assert bool((weight.outlier_OF != 0).all())
    dense, _ = quantize_mixed(w_OI, statistic.matrix_II, outlier_F, 4)
    assert float((dense.codes_OK == 8).float().mean()) < 0.3
    # Which weights go is a choice by saliency: better than the first two of every four.
    blind = dense.codes_OK.clone()
    blind[:, :60].view(16, 15, 4)[..., :2] = 8
    blind_error = (x_TI @ (replace(dense, codes_OK=blind).dequantize() - w_OI).t()).norm()
    assert float((x_TI @ (weight.dequantize() - w_OI).t()).norm()) < 0.8 * float(blind_error)
    with pytest.raises(UnsupportedError, match="act_order"):
        quantize_mixed(w_OI, statistic.matrix_II, outlier_F, 4, sparse=True, act_order=True)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("outliers", [0, 5, 30])
def test_tensors_of_an_artefact_give_the_weight_back(bits: int, outliers: int) -> None:
    w_OI = torch.randn(7, 30, generator=torch.Generator().manual_seed(0))
    weight = round_mixed(w_OI, torch.arange(outliers), bits)
    tensors = to_tensors("a", weight)
    again = from_tensors("a", tensors)
    assert torch.equal(again.dequantize(), weight.dequantize())
    assert torch.equal(QuikLinear(again, None).dequantize(), weight.dequantize())
    del tensors["a.scale"]
    with pytest.raises(ArtefactError, match=r"a\.scale"):
        from_tensors("a", tensors)


def test_a_layer_that_int32_cannot_hold_is_refused() -> None:
    codes = torch.zeros(1, MAX_WIDTH[8] + 1, dtype=torch.uint8)
    with pytest.raises(UnsupportedError, match="int32"):
        QuikLinear(MixedWeight(8, codes, torch.ones(1), NONE, torch.empty(1, 0)), None)


def test_model_is_packed_as_the_policy_says_and_artefacts_are_used_again(tmp_path: Path) -> None:
    build = context(write_model(tmp_path / "model", QWEN))
    technique = QUIK(**SMALL, layers=(r"layers\.1\.o_proj=16", "layers.2.qkv_proj=8:3"))
    folder = technique.prepare(build)
    kept = {file.name: file.read_bytes() for file in folder.iterdir()}
    decoder = load_decoder(build.checkpoint, pack=technique.provide("weight_format", build).pack)
    linears = dict(decoder.linears())
    assert isinstance(linears["layers.1.o_proj"], DenseLinear)
    assert isinstance(linears["lm_head"], DenseLinear)
    for name, bits, outliers in (
        ("layers.0.qkv_proj", 4, 6),
        ("layers.0.down_proj", 8, 6),
        ("layers.2.qkv_proj", 8, 3),
    ):
        weight = linears[name].weight
        assert (weight.bits, weight.outlier_F.numel(), weight.min_rows) == (bits, outliers, 8)
    # Settings that are not part of the artefact find it; others do not.
    other = technique.model_copy(update={"min_rows": 3, "quantize_head": "int8"})
    assert other.prepare(build) == folder
    assert technique.model_copy(update={"outliers": 5}).prepare(build) != folder
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == kept


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = context(write_model(tmp_path / "model", QWEN))
    technique = QUIK(**SMALL)
    whole = {f.name: load_file(f) for f in technique.prepare(build).glob("block-*")}
    elsewhere = context(write_model(tmp_path / "again" / "model", QWEN))
    import hasten.weights.quik as module

    plain = module.QuikMethod.process

    def breaks(self, name, *rest):  # type: ignore[no-untyped-def]
        if name == "layers.1.down_proj":
            raise KeyboardInterrupt
        return plain(self, name, *rest)

    monkeypatch.setattr(module.QuikMethod, "process", breaks)
    with pytest.raises(KeyboardInterrupt):
        technique.prepare(elsewhere)
    seen: list[str] = []

    def watched(self, name, *rest):  # type: ignore[no-untyped-def]
        seen.append(name)
        return plain(self, name, *rest)

    monkeypatch.setattr(module.QuikMethod, "process", watched)
    resumed = technique.prepare(elsewhere)
    assert "layers.0.qkv_proj" not in seen
    assert "layers.1.qkv_proj" in seen
    # The tensors alone: the reports beside them hold seconds.
    again = {f.name: load_file(f) for f in resumed.glob("block-*")}
    assert again.keys() == whole.keys()
    for name, tensors in whole.items():
        assert again[name].keys() == tensors.keys()
        for key, value in tensors.items():
            assert torch.equal(again[name][key], value), key
    ours, theirs = (
        load_decoder(c.checkpoint, pack=technique.provide("weight_format", c).pack)
        for c in (build, elsewhere)
    )
    for (name, a), (_, b) in zip(ours.linears(), theirs.linears(), strict=True):
        assert torch.equal(a.dequantize(), b.dequantize()), name


def test_queries_keys_and_values_share_one_outlier_set(tmp_path: Path) -> None:
    build = context(write_model(tmp_path / "model", QWEN))
    decoder = load_decoder(build.checkpoint, pack=QUIK(**SMALL).provide("weight_format", build).pack)
    qkv = decoder.layers[0].qkv_proj
    assert isinstance(qkv, QuikLinear)
    assert qkv.outputs == 64 + 2 * 32
    assert qkv.outlier_F.shape == (6,)
