"""Acceptance of `quik`: the checks of its specification that are not about speed (that is `benchmarks/quik.py`).

1 a layer's result is the formula's; 2 without outliers and rounded activations the weights are plain GPTQ's; 3 quality
in the order outliers and 8-bit down projection, outliers, none, rounding; 4 outlier columns take up errors and are
not rounded; 6 activations are rounded four times per block.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.core import paths
from hasten.core.corpus import Corpus
from hasten.kernels.quik import quantizations
from hasten.lm.llm import LLM
from hasten.lm.request import SamplingParams
from hasten.models.checkpoint import load_decoder, open_checkpoint
from hasten.models.context import BuildContext
from hasten.models.decoder import CausalAttend, Decoder, DecoderLayer
from hasten.weights.calibrate import SourceLinear, calibrate
from hasten.weights.calibrate_data import draw_segments
from hasten.weights.calibrate_work import WorkFolder
from hasten.weights.gptq import GPTQ, GPTQMethod
from hasten.weights.gptq_sweep import quantize
from hasten.weights.quik import QUIK, QuikMethod
from hasten.weights.quik_linear import QuikLinear
from hasten.weights.quik_sweep import (
    MixedWeight,
    OutlierStatistic,
    SignedGrid,
    outlier_features,
    quantize_mixed,
)

from ..weights.gptq_models import LLAMA, random_documents, write_model
from ..weights.gptq_models import context as tiny_context


def layer(outputs: int, inputs: int, seed: int = 0) -> tuple[Tensor, OutlierStatistic, Tensor]:
    """A weight, what calibration knows of its inputs and the inputs [T, I]: correlated, a few features far louder."""
    random = torch.Generator().manual_seed(seed)
    rank = inputs // 4
    x_TI = torch.randn(1024, rank, generator=random) @ torch.randn(rank, inputs, generator=random) / rank**0.5
    x_TI += 0.3 * torch.randn(1024, inputs, generator=random)
    x_TI *= torch.exp(0.9 * torch.randn(inputs, generator=random))
    statistic = OutlierStatistic(inputs)
    statistic.update(x_TI)
    return torch.randn(outputs, inputs, generator=random) * 0.05, statistic, x_TI


# 1 --------------------------------------------------------------------------------------------------------------------


def formula(x_TI: Tensor, weight: MixedWeight, bias_O: Tensor) -> Tensor:
    """Steps 5 and 7 of the specification as they are written; the rounding in float32, all else in float64."""
    inputs, half, top = x_TI.shape[1], 1 << (weight.bits - 1), (1 << weight.bits) - 1
    base = [i for i in range(inputs) if i not in set(weight.outlier_F.tolist())]
    y_TO = x_TI[:, weight.outlier_F].double() @ weight.outlier_OF.double().t() + bias_O
    if not base:
        return y_TO
    x_TK = x_TI[:, base]
    z_T, high_T = x_TK.amin(1), x_TK.amax(1)
    range_T = high_T - z_T
    # One base feature alone has no range: its code is the lowest, whatever it is divided by.
    code_TK = (
        ((x_TK - z_T[:, None]) * (torch.full_like(range_T, top) / range_T)[:, None]).nan_to_num(0).round()
    )
    q_x_TK = code_TK.clamp(0, top).double() - half
    s_T, z_T = range_T.double() / top, z_T.double()
    q_w_OK, s_O = weight.codes_OK.double() - half, weight.scale_O.double()
    wred_O = s_O * q_w_OK.sum(1)
    acc_TO = q_x_TK @ q_w_OK.t()
    return acc_TO * s_T[:, None] * s_O + (z_T + half * s_T)[:, None] * wred_O + y_TO


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 3, 130])
@pytest.mark.parametrize(
    ("outputs", "inputs", "outliers"),
    [(33, 97, 0), (33, 97, 5), (64, 97, 97), (64, 97, 96), (192, 576, 32), (40, 1536, 96)],
)
def test_layer_is_the_formula(bits: int, rows: int, outputs: int, inputs: int, outliers: int) -> None:
    w_OI, statistic, x_TI = layer(outputs, inputs)
    outlier_F = outlier_features(statistic.largest_I, outliers)
    weight, _ = quantize_mixed(w_OI, statistic.matrix_II, outlier_F, bits)
    bias_O = torch.randn(outputs, generator=torch.Generator().manual_seed(1))
    y_TO, expected_TO = QuikLinear(weight, bias_O)(x_TI[:rows]), formula(x_TI[:rows], weight, bias_O)
    assert float((y_TO - expected_TO).norm() / expected_TO.norm()) < 1e-3


# 2 --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mse", [True, False])
def test_without_outliers_a_layer_is_plain_gptq(mse: bool) -> None:
    w_OI, statistic, _ = layer(96, 320)
    none_F = outlier_features(statistic.largest_I, 0)
    ours, report = quantize_mixed(w_OI, statistic.matrix_II, none_F, 4, mse=mse)
    theirs, other = quantize(w_OI, statistic.matrix_II, SignedGrid(4, mse=mse))
    assert torch.equal(ours.dequantize(), theirs.dequantize())
    assert report == other


def test_without_outliers_and_rounded_activations_a_model_is_plain_gptq(tmp_path: Path) -> None:
    build = tiny_context(write_model(tmp_path / "model"))
    tokens = torch.tensor(random_documents())
    ours = load_decoder(build.checkpoint, pack=SourceLinear)
    settings = QUIK(outliers=0, down_bits=4, round_activations=False, act_order=False)
    calibrate(ours, tokens, QuikMethod(settings, LLAMA.hidden_size, WorkFolder(tmp_path / "a")))
    theirs = load_decoder(build.checkpoint, pack=SourceLinear)
    method = GPTQMethod(GPTQ(group_size=-1, act_order=False), WorkFolder(tmp_path / "b"))
    method.grid = SignedGrid(4, mse=True)
    calibrate(theirs, tokens, method)
    pairs = [
        (a, b)
        for (name, a), (_, b) in zip(ours.linears(), theirs.linears(), strict=True)
        if "head" not in name
    ]
    assert len(pairs) == 4 * LLAMA.num_layers
    for mine, plain in pairs:
        assert torch.equal(mine.weight, plain.weight)


# 3 --------------------------------------------------------------------------------------------------------------------

ARMS: dict[str, dict[str, Any]] = {
    "8-bit down": {},
    "4-bit down": {"down_bits": 4},
    "no outliers": {"down_bits": 4, "outliers": 0},
    "rounding": {"down_bits": 4, "outliers": 0, "sweep": False},
}
SETTINGS = {"samples": 8, "sample_length": 512, "quantize_head": "float32"}  # the head exact on both sides


@pytest.fixture(scope="module")
def build(default_model_path: Path, documentation: Corpus) -> BuildContext:
    """The default model with its artefacts where the engine keeps them."""
    checkpoint = open_checkpoint(default_model_path)
    return BuildContext.of(checkpoint, paths.home() / "artefacts")


def held_out(build: BuildContext, documentation: Corpus, samples: int) -> Tensor:
    """Segments of 512 tokens of documents that calibration never draws from."""
    documents = documentation.documents("test")
    return draw_segments(
        [len(document.text) for document in documents],
        lambda i: build.tokenizer.encode(documents[i].text),
        samples=samples,
        length=512,
        seed=1,
    )


def truncated(build: BuildContext, pack: Any = None) -> Decoder:
    """The first block of the default model."""
    decoder = load_decoder(build.checkpoint, pack=pack) if pack else load_decoder(build.checkpoint)
    decoder.layers = decoder.layers[:1]
    return decoder


@torch.no_grad()
def hidden_states(decoder: Decoder, ids_L: Tensor) -> Tensor:
    attend, position_T = CausalAttend(decoder), torch.arange(len(ids_L))
    x_TE = decoder.embed(ids_L)
    for block in decoder.layers:
        assert isinstance(block, DecoderLayer)
        x_TE = block.mlp(block.attention(x_TE, position_T, attend))
    # The first token's state is hundreds of times as large as the others', whatever the text.
    return x_TE[1:]


@pytest.mark.timeout(300)
def test_order_of_errors_after_a_block(build: BuildContext, documentation: Corpus, tmp_path: Path) -> None:
    ids_L = held_out(build, documentation, 1)[0]
    exact_TE = hidden_states(truncated(build), ids_L)
    tokens = QUIK(samples=2).calibration_tokens(build)
    errors = {}
    for name in ("8-bit down", "4-bit down", "no outliers"):
        settings = ARMS[name]
        decoder = truncated(build, SourceLinear)
        method = QuikMethod(QUIK(**settings), build.config.hidden_size, WorkFolder(tmp_path / name))
        (report,) = calibrate(decoder, tokens, method)
        assert all(linear.error < 0.9 * linear.reference for linear in report.linears)  # than rounding's
        difference_TE = hidden_states(decoder, ids_L) - exact_TE
        errors[name] = float((difference_TE.norm(dim=1) / exact_TE.norm(dim=1)).mean())
    assert 0 < errors["8-bit down"] < errors["4-bit down"] < errors["no outliers"], errors


@torch.no_grad()
def perplexity(decoder: Decoder, token_ids_NL: Tensor) -> float:
    losses = [
        float(torch.nn.functional.cross_entropy(decoder(ids_L[None])[0, :-1], ids_L[1:]))
        for ids_L in token_ids_NL
    ]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.timeout(300)
def test_order_of_perplexities(build: BuildContext, documentation: Corpus) -> None:
    """On the whole model; calibrating it four times takes longer than a test may."""
    techniques = {name: QUIK(**SETTINGS, **settings) for name, settings in ARMS.items()}
    for technique in techniques.values():
        if build.artefacts.find("quik", technique.made_from(build)) is None:
            pytest.skip("not calibrated yet: python -m benchmarks.quik --parts quality --samples 8")
    tokens = held_out(build, documentation, 4)
    exact = perplexity(load_decoder(build.checkpoint), tokens)
    found = {
        name: perplexity(
            load_decoder(build.checkpoint, pack=technique.provide("weight_format", build).pack), tokens
        )
        for name, technique in techniques.items()
    }
    print(f"perplexity: model {exact:.2f}, {found}")
    assert exact <= found["8-bit down"] < found["4-bit down"] <= found["no outliers"] < found["rounding"], (
        found
    )


# 4 --------------------------------------------------------------------------------------------------------------------


def test_outlier_columns_take_up_errors_and_are_not_rounded() -> None:
    w_OI, statistic, _ = layer(64, 256)
    outlier_F = outlier_features(statistic.largest_I, 16)
    loud = statistic.largest_I[outlier_F].min()
    assert float(loud) >= float(statistic.largest_I.sort().values[-16])
    weight, report = quantize_mixed(w_OI, statistic.matrix_II, outlier_F, 4)
    original_OF = w_OI[:, outlier_F]
    changed = (
        weight.outlier_OF - original_OF
    ).abs() > 2.0**-8 * original_OF.abs()  # beyond bfloat16's rounding
    assert float(changed.float().mean()) > 0.9
    # Not on the grid of their rows: a 4-bit row has 16 values.
    steps_OF = weight.outlier_OF / weight.scale_O[:, None]
    assert float(((steps_OF - steps_OF.round()).abs() > 0.01).float().mean()) > 0.9
    assert report.error < report.rtn_error
    # Nothing to take up where inputs are not correlated.
    weight, _ = quantize_mixed(w_OI, torch.eye(256), outlier_F, 4)
    assert torch.equal(weight.outlier_OF, original_OF.to(torch.bfloat16).float())


def test_what_outliers_take_up_makes_the_layer_better() -> None:
    w_OI, statistic, x_TI = layer(64, 256)
    outlier_F = outlier_features(statistic.largest_I, 16)
    weight, _ = quantize_mixed(w_OI, statistic.matrix_II, outlier_F, 4)
    exact_TO = x_TI @ w_OI.t()
    ours = float((x_TI @ weight.dequantize().t() - exact_TO).norm())
    untouched_OI = weight.dequantize()
    untouched_OI[:, outlier_F] = w_OI[:, outlier_F]
    assert ours < float((x_TI @ untouched_OI.t() - exact_TO).norm())


# 6 --------------------------------------------------------------------------------------------------------------------


def test_activations_are_rounded_four_times_per_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path / "home"))
    folder = write_model(tmp_path / "model")
    technique = QUIK(outliers=4, samples=4, sample_length=40, min_rows=8)
    llm = LLM(folder, (technique,), "float32", calibration=random_documents(), prefix_cache=False)
    prompt = list(range(3, 43))

    def counted(tokens: int) -> int:
        before = quantizations()
        llm.generate([prompt], SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True))
        return quantizations() - before

    assert counted(1) == 4 * LLAMA.num_layers
    assert counted(5) == 4 * LLAMA.num_layers  # rows of a single stream are not rounded
