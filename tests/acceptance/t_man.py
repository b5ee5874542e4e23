"""Acceptance of `t_man`: the checks of its specification that are not about speed (that is `benchmarks/t_man.py`).

1 look-up against the dequantised weight, exact on small integers; 2 the algebra of planes; 3 the two tables of the
dequantisation, exhaustively; 4 one copy of the weights for prompts and decoding; 5 teacher-forced agreement on the
default model's own codes; 6 tables built once per distinct input.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from hasten.core.errors import SettingError, UnsupportedError
from hasten.core.plan import Plan
from hasten.kernels.affine import HALF_KIND, OFFSET, SINGLE, Numbers, group_count, pack_groups
from hasten.kernels.reference.t_man import exact
from hasten.kernels.t_man import PlaneWeight, multiply, pack_planes, t_man, table_weights, tables_built
from hasten.lm.llm import LLM
from hasten.lm.request import SamplingParams
from hasten.models.checkpoint import load_decoder, open_checkpoint
from hasten.models.context import BuildContext
from hasten.models.decoder import LAYER_LINEARS
from hasten.models.store import resolve
from hasten.weights.gptq import GPTQ
from hasten.weights.native import NativeFormat
from hasten.weights.t_man import PlaneLinear, SharedLinear, TMan
from hasten.workloads.text import Text

from ..weights.gptq_models import context, write_model

MODEL = "smollm2-135m-instruct"


def weight(outputs: int, inputs: int, bits: int, size: int, symmetric: bool, seed: int = 0) -> PlaneWeight:
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (outputs, inputs), dtype=torch.uint8, generator=random)
    groups = group_count(inputs, size)
    scale_OG = torch.rand(outputs, groups, generator=random) * 0.1 + 0.01
    low = Numbers(OFFSET, offset=float(1 << (bits - 1)))
    if not symmetric:
        low = Numbers(SINGLE, pack_groups(-scale_OG * torch.rand(outputs, groups) * (1 << bits), groups))
    scale = Numbers(HALF_KIND, pack_groups(scale_OG.half(), groups))
    return PlaneWeight(inputs, outputs, bits, size, pack_planes(codes, bits), scale, low)


# 1 --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_lookup_is_the_product_with_the_dequantised_weight(bits: int, size: int) -> None:
    for outputs, inputs in ((576, 576), (77, 1537), (192, 300)):
        for symmetric in (False, True):
            stored = weight(outputs, inputs, bits, size, symmetric)
            x_TI = torch.randn(3, inputs)
            wanted_TO = exact(x_TI, stored)
            y_TO = multiply(t_man(stored), x_TI, "lookup").double()
            assert float((y_TO - wanted_TO).norm() / wanted_TO.norm()) < 1e-4  # asked: 1e-3


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_integers_are_exact(bits: int) -> None:
    """A quad of every 256 columns whose sizes add up to 32767 makes the table scale 1."""
    inputs, outputs = 512, 50
    x_TI = torch.randint(-9, 10, (4, inputs)).float()
    x_TI[:, ::256], x_TI[:, 1::256], x_TI[:, 2::256], x_TI[:, 3::256] = 32767.0, 0.0, 0.0, 0.0
    stored = weight(outputs, inputs, bits, 64, symmetric=True)
    ones = Numbers(HALF_KIND, pack_groups(torch.ones(outputs, 8, dtype=torch.float16), 8))
    stored = PlaneWeight(inputs, outputs, bits, 64, stored.planes, ones, stored.low)
    assert torch.equal(multiply(t_man(stored), x_TI, "lookup").double(), exact(x_TI, stored))


# 2 --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_planes_and_one_bias_make_the_sum(bits: int) -> None:
    """Plane weights 0.5, 1, 2, 4 and -0.5 (2 z + 1) sum x give sum (u - 2^(b-1) - z) x, in integers (doubled)."""
    random = torch.Generator().manual_seed(bits)
    u_K = torch.randint(0, 1 << bits, (256,), generator=random)
    x_K = torch.randint(-99, 100, (256,), generator=random)
    planes = [((u_K >> i & 1) * 2 - 1) @ x_K for i in range(bits)]
    for z in range(-(1 << (bits - 1)), 1 << (bits - 1)):
        doubled = sum(int(c) << i for i, c in enumerate(planes)) - (2 * z + 1) * int(x_K.sum())
        assert doubled == 2 * int((u_K - (1 << (bits - 1)) - z) @ x_K)


# 3 --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_both_dequantisation_tables_exhaustively(bits: int) -> None:
    """All 256 bytes of a plane against all 256 of the next: every pair of nibbles in every place, every code."""
    byte = torch.arange(256)
    columns = torch.arange(8)
    plane = byte[:, None] >> columns & 1  # [256, 8]
    for first in range(0, bits, 2):
        lower = plane << first
        upper = plane << (first + 1) if first + 1 < bits else torch.zeros(1, 8, dtype=torch.long)
        codes = (lower[:, None] | upper[None]).flatten(0, 1)
        codes = torch.cat([codes, codes.flip(0) ^ ((1 << bits) - 1)], dim=1).to(
            torch.uint8
        )  # both halves of a unit
        outputs = codes.shape[0]
        scale_OG = (torch.arange(outputs) % 97 + 1).float()[:, None] / 64
        low_OG = -(torch.arange(outputs) % 89).float()[:, None] / 8
        stored = PlaneWeight(
            16,
            outputs,
            bits,
            16,
            pack_planes(codes, bits),
            Numbers(SINGLE, pack_groups(scale_OG, 2)),
            Numbers(SINGLE, pack_groups(low_OG, 2)),
        )
        assert torch.equal(table_weights(t_man(stored), 16), codes.float() * scale_OG + low_OG)


# 4, 5, 6: the default model -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm():
    with LLM(Plan(MODEL, (TMan(),)), max_batch=2) as found:
        yield found


def layers(llm: LLM) -> list[PlaneLinear]:
    decoder = llm.engine.runner.decoder
    found = [getattr(layer, name) for layer in decoder.layers for name in LAYER_LINEARS]
    assert all(isinstance(linear, PlaneLinear) for linear in found)
    return found


def test_tables_are_built_once_per_distinct_input(llm: LLM) -> None:
    prompt = llm.tokenizer.encode("Bit planes are looked up once for queries, keys and values. " * 3)
    before = tables_built()
    llm.generate([prompt], SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True))
    assert (
        tables_built() - before == 8 * 4 * llm.engine.runner.decoder.config.num_layers
    )  # the prompt itself is dequantised


def test_one_copy_serves_prompts_and_decoding(llm: LLM) -> None:
    found = layers(llm)
    before = [(linear.planes.data_ptr(), int(linear.planes.sum(dtype=torch.int64))) for linear in found]
    stored = sum(linear.weight_bytes() for linear in found)
    dense = sum(linear.inputs * linear.outputs * 2 for linear in found)
    assert 0.25 < stored / dense < 0.33  # of bfloat16; with another copy it would be more than 1
    text = Text(llm.tokenizer, "test").windows(200, 1)[0]
    status = Path("/proc/self/statm")

    def resident() -> int:
        return int(status.read_text().split()[1]) * 4096

    llm.generate([text], SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
    size = resident()
    llm.generate([text[:150]], SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
    assert resident() - size < dense / 10
    after = [(linear.planes.data_ptr(), int(linear.planes.sum(dtype=torch.int64))) for linear in found]
    assert after == before


def test_the_conversion_is_lossless_and_agrees_token_by_token(llm: LLM) -> None:
    reference = load_decoder(open_checkpoint(resolve(MODEL)), pack=NativeFormat("float32").pack).eval()
    decoder = llm.engine.runner.decoder
    for ours, theirs in zip(decoder.layers[3:5], reference.layers[3:5], strict=True):
        for name in LAYER_LINEARS:
            assert torch.equal(getattr(ours, name).dequantize(), getattr(theirs, name).dequantize())
    ids = torch.tensor(Text(llm.tokenizer, "test").windows(110, 2))
    with torch.inference_mode():
        wanted_TV = reference(ids)[:, :-1].flatten(0, 1)
        for name, linear in decoder.linears():
            if name != "lm_head":
                reference.set_linear(name, LookedUp(linear))
        found_TV = reference(ids)[:, :-1].flatten(0, 1)
    assert not torch.equal(found_TV, wanted_TV)
    assert float((found_TV.argmax(-1) == wanted_TV.argmax(-1)).float().mean()) >= 0.99
    found, wanted = (cross_entropy(logits, ids[:, 1:].flatten()) for logits in (found_TV, wanted_TV))
    assert abs(math.exp(float(found - wanted)) - 1) < 1e-3


class LookedUp(torch.nn.Module):
    """A layer of the engine that looks up all its rows, as it does one by one at decode."""

    def __init__(self, linear: PlaneLinear) -> None:
        super().__init__()
        self.kernel = linear.kernel()

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        return multiply(self.kernel, x_TI.contiguous(), "lookup")


# The technique --------------------------------------------------------------------------------------------------------


def test_gptq_at_three_and_two_bits_runs_on_planes(tmp_path: Path) -> None:
    build = context(write_model(tmp_path / "model"))
    ids = torch.arange(40)[None] % 256
    for bits in (3, 2):
        settings = {
            "bits": bits,
            "group_size": 32,
            "samples": 2,
            "sample_length": 32,
            "quantize_head": "float32",
        }
        planes = load_decoder(build.checkpoint, pack=TMan(**settings).provide("weight_format", build).pack)
        codes = load_decoder(build.checkpoint, pack=GPTQ(**settings).provide("weight_format", build).pack)
        assert isinstance(planes.layers[0].qkv_proj, PlaneLinear)
        assert planes.layers[0].qkv_proj.weight.bits == bits
        with torch.no_grad():
            torch.testing.assert_close(planes(ids), codes(ids), rtol=1e-4, atol=1e-4)


def test_a_gptq_folder_runs_as_it_is_and_is_not_quantised_again(tmp_path: Path) -> None:
    build = context(write_model(tmp_path / "model"))
    saved = GPTQ(
        bits=2, group_size=32, act_order=True, static_groups=False, samples=2, sample_length=32
    ).save(build, tmp_path / "saved")
    adopted = context(saved)
    decoder = load_decoder(adopted.checkpoint, pack=TMan().provide("weight_format", adopted).pack)
    kept = load_decoder(adopted.checkpoint, pack=GPTQ().provide("weight_format", adopted).pack)
    assert (
        isinstance(decoder.layers[0].qkv_proj, PlaneLinear | SharedLinear) or decoder.layers[0].qkv_proj.parts
    )
    ids = torch.arange(40)[None] % 256
    with torch.no_grad():
        torch.testing.assert_close(decoder(ids), kept(ids), rtol=1e-4, atol=1e-4)
    with pytest.raises(UnsupportedError, match="already holds GPTQ"):
        TMan(bits=2).provide("weight_format", adopted)


def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    plain = BuildContext.of(open_checkpoint(write_model(tmp_path / "model")), tmp_path)
    with pytest.raises(UnsupportedError, match=r"set t_man\.bits"):
        TMan().provide("weight_format", plain)
    for bad, message in (
        ({"bits": 8}, "bits"),
        ({"group_size": 24, "bits": 2}, "multiple of 16"),
        ({"tables": "int4"}, "tables"),
    ):
        with pytest.raises(SettingError, match=message):
            TMan(**bad)
