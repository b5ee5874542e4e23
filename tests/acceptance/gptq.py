"""Acceptance of `gptq`: the checks of its specification that are not about speed (that is `benchmarks/gptq.py`).

1 blocked equals unblocked; 2 layer errors and held-out perplexity below plain rounding, on the default model and on
weights that never saw a grid; 3 an identity Hessian gives plain rounding; 4 packed output equals
dequantise-then-multiply; 5 bytes read per token shrink with the bits; 6 work grows as in^2 (out + in).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hasten.core import paths
from hasten.core.corpus import Corpus
from hasten.core.errors import ModelError
from hasten.models.checkpoint import LinearSource, load_decoder, open_checkpoint
from hasten.models.context import BuildContext
from hasten.models.decoder import Decoder
from hasten.models.store import resolve
from hasten.weights.calibrate import FixedLinear
from hasten.weights.calibrate_data import draw_segments
from hasten.weights.gptq import GPTQ, read_reports
from hasten.weights.gptq_grid import Grid, TernaryGrid, UniformGrid
from hasten.weights.gptq_pack import pack_weight
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


def test_smaller_groups_help_at_two_bits() -> None:
    """The extreme regime: 2 bits want small groups, and groups of 8 carry three values."""
    w_OI, hessian_II, _ = layer(192, 768)
    cases: list[tuple[Grid, int]] = [(UniformGrid(2), size) for size in (128, 64, 32)] + [(TernaryGrid(), 8)]
    reports = [quantize(w_OI, hessian_II, grid, size)[1] for grid, size in cases]
    errors = [report.error for report in reports]
    assert errors == sorted(errors, reverse=True)
    assert all(report.error < 0.9 * report.rtn_error for report in reports), reports


# 2, on the default model ----------------------------------------------------------------------------------------------

# All 210 layers of the finest and of the coarsest grid; `benchmarks/gptq.py` has those between them.
MODEL_GRIDS = {
    "4 bits, symmetric, groups of 64": {"bits": 4, "symmetric": True, "group_size": 64},
    "2 bits, groups of 32": {"bits": 2, "group_size": 32},
}
SETTINGS = {"samples": 8, "sample_length": 512, "quantize_head": "float32"}  # the head exact on both sides


@pytest.fixture(scope="module")
def build(default_model_path: Path, documentation: Corpus) -> BuildContext:
    return context_of(default_model_path)


def context_of(path: Path) -> BuildContext:
    """A model with its artefacts where the engine keeps them, so that they are calibrated once."""
    checkpoint = open_checkpoint(path)
    return BuildContext.of(checkpoint, paths.home() / "artefacts")


@pytest.fixture(scope="module")
def held_out(build: BuildContext, documentation: Corpus) -> Tensor:
    return held_out_tokens(build, documentation)


def held_out_tokens(build: BuildContext, documentation: Corpus) -> Tensor:
    """3072 tokens of documents that calibration never draws from."""
    documents = documentation.documents("test")
    calibration = {document.name for document in documentation.documents("calibration")}
    assert not calibration & {document.name for document in documents}
    return draw_segments(
        [len(document.text) for document in documents],
        lambda i: build.tokenizer.encode(documents[i].text),
        samples=6,
        length=512,
        seed=1,
    )


def perplexity(decoder: Decoder, token_ids_NL: Tensor) -> float:
    total = 0.0
    with torch.no_grad():
        for ids_L in token_ids_NL:
            logits_LV = decoder(ids_L[None])[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits_LV, ids_L[1:]))
    return math.exp(total / len(token_ids_NL))


@pytest.fixture(scope="module")
def exact(build: BuildContext, held_out: Tensor) -> float:
    """The unquantised model's perplexity."""
    return perplexity(load_decoder(build.checkpoint), held_out)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("grid", MODEL_GRIDS.values(), ids=MODEL_GRIDS)
def test_model_below_rounding(
    build: BuildContext, held_out: Tensor, exact: float, grid: dict[str, Any]
) -> None:
    ours, theirs = (perplexity(decoder, held_out) for decoder in both(build, grid))
    print(f"perplexity: model {exact:.2f}, GPTQ {ours:.2f}, rounding {theirs:.2f}")
    assert exact < ours < theirs


def both(build: BuildContext, grid: dict[str, Any]) -> tuple[Decoder, Decoder]:
    """The model in GPTQ and rounded on the same grid, after the layers' errors were compared."""
    technique = GPTQ(**SETTINGS, **grid)
    reports = read_reports(technique.prepare(build))
    assert len(reports) == 4 * build.config.num_layers
    assert sum(r["error"] < r["rtn_error"] for r in reports) >= 0.98 * len(reports)
    assert sum(r["error"] for r in reports) < 0.8 * sum(r["rtn_error"] for r in reports)

    def rounded(source: LinearSource) -> FixedLinear:
        weight_OI = source.dense()
        if source.name != "lm_head":
            weight_OI = round_to_nearest(weight_OI, technique.grid(), technique.group).dequantize()
        return FixedLinear(weight_OI, source.bias_O)

    packed = load_decoder(build.checkpoint, pack=technique.provide("weight_format", build).pack)
    return packed, load_decoder(build.checkpoint, pack=rounded)


# 2, on weights that never saw a grid ----------------------------------------------------------------------------------

BASE = "documentation-14m"
BASE_GRIDS = {
    "4 bits, symmetric, groups of 128": {"bits": 4, "symmetric": True, "group_size": 128},
    "4 bits, symmetric, per row": {"bits": 4, "symmetric": True, "group_size": -1},
    "3 bits, groups of 128": {"bits": 3, "group_size": 128},
    "2 bits, groups of 64": {"bits": 2, "group_size": 64},
    "ternary, groups of 8": {"bits": "ternary", "group_size": 8},
}


@pytest.fixture(scope="module")
def base(documentation: Corpus) -> BuildContext:
    try:
        return context_of(resolve(BASE, allow_pull=False))
    except ModelError:
        pytest.skip(f"{BASE} is not in the store: `hasten models pull {BASE}` trains it")


@pytest.fixture(scope="module")
def base_held_out(base: BuildContext, documentation: Corpus) -> Tensor:
    return held_out_tokens(base, documentation)


@pytest.fixture(scope="module")
def original(base: BuildContext) -> Decoder:
    return load_decoder(base.checkpoint)


def divergence(decoder: Decoder, original: Decoder, token_ids_NL: Tensor) -> float:
    """Mean KL(original || decoder) of the next token, nats."""
    total = 0.0
    with torch.no_grad():
        for ids_L in token_ids_NL:
            p_LV, q_LV = (torch.log_softmax(model(ids_L[None])[0], dim=-1) for model in (original, decoder))
            total += float((p_LV.exp() * (p_LV - q_LV)).sum(-1).mean())
    return total / len(token_ids_NL)


def test_the_base_has_learnt(base: BuildContext, base_held_out: Tensor, original: Decoder) -> None:
    """Quantisation of random weights would prove nothing."""
    record = json.loads((base.checkpoint.path / "training.json").read_text())
    assert record["test_loss"] < record["test_unigram_loss"] - 1
    assert math.log(perplexity(original, base_held_out)) < record["test_unigram_loss"] - 1
    assert {base.checkpoint.stored(name).dtype for name in base.checkpoint.names()} == {torch.float32}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("grid", BASE_GRIDS.values(), ids=BASE_GRIDS)
def test_base_below_rounding(
    base: BuildContext, base_held_out: Tensor, original: Decoder, grid: dict[str, Any]
) -> None:
    """A lightly trained model hardly notices fine grids: what is sure to show is the distance of its predictions."""
    decoders = both(base, grid)
    ours, theirs = (divergence(decoder, original, base_held_out) for decoder in decoders)
    exact, *quantised = (perplexity(decoder, base_held_out) for decoder in (original, *decoders))
    costs = [ppl / exact for ppl in quantised]
    print(f"KL {ours:.5f} {theirs:.5f}; perplexity {exact:.3f}, x {costs[0]:.4f} {costs[1]:.4f}")
    assert 0 < ours < theirs
    # Below a per cent the sample decides which perplexity is the lower one.
    assert costs[0] < max(costs[1], 1.01)


@pytest.mark.timeout(900)
def test_model_saved_in_the_hugging_face_layout_is_the_same(build: BuildContext, tmp_path: Path) -> None:
    technique = GPTQ(**SETTINGS, **MODEL_GRIDS["4 bits, symmetric, groups of 64"])
    saved = open_checkpoint(technique.save(build, tmp_path / "model"))
    prompt = "The quick brown fox — Größe, 你好 \n\tdef f(x):"
    ids = build.tokenizer.encode(prompt)
    assert saved.tokenizer().encode(prompt) == ids
    logits = []
    for checkpoint in (build.checkpoint, saved):
        weights = technique.provide("weight_format", replace(build, checkpoint=checkpoint))
        decoder = load_decoder(checkpoint, pack=weights.pack)
        with torch.no_grad():
            logits.append(decoder(torch.tensor([ids])))
    assert torch.equal(*logits)


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


# 4 --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(1, 64), (33, 96), (192, 576), (576, 1536)], ids=str)
@pytest.mark.parametrize("group_size", [32, 64, None])
@pytest.mark.parametrize("scattered", [False, True])
def test_packed_output_equals_dequantised_product(
    bits: int, shape: tuple[int, int], group_size: int | None, scattered: bool
) -> None:
    outputs, inputs = shape
    random = torch.Generator().manual_seed(bits)
    w_OI, bias_O = torch.randn(shape, generator=random) * 0.1, torch.randn(outputs, generator=random)
    weight = round_to_nearest(w_OI, UniformGrid(bits), group_size)
    if scattered:
        perm_I = torch.randperm(inputs, generator=random)
        weight = replace(weight, group_I=weight.group_I[perm_I], codes_OI=weight.codes_OI[:, perm_I])
    layer = pack_weight(weight, bias_O)
    assert torch.equal(layer.dequantize(), weight.dequantize())
    for rows in range(17):
        x_TI = torch.randn(rows, inputs, generator=random)
        expected_TO = (x_TI.double() @ weight.dequantize().double().t() + bias_O).float()
        scale = float(expected_TO.abs().max()) if rows else 1.0
        assert torch.allclose(layer(x_TI), expected_TO, rtol=1e-4, atol=1e-4 * scale)


# 5, what is not a speed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, None])
def test_bytes_read_per_token_shrink_with_the_bits(bits: int, group_size: int | None) -> None:
    layer = pack_weight(round_to_nearest(torch.randn(256, 1024), UniformGrid(bits), group_size), None)
    groups = 256 * (1024 // (group_size or 1024))
    codes = 256 * 1024 * bits / 8
    # Two parameters per group of at most 32 bits each, and at most a tile of padding.
    assert codes <= layer.weight_bytes() <= 1.05 * codes + 8 * groups


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
