"""The Hugging Face GPTQ layout: bits, foreign checkpoints, saving and reloading, damage."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))

from gptq_models import LLAMA, QWEN, TIED, context, write_model

from hasten.core.errors import IntegrityError, ModelFormatError, SettingError, UnsupportedError
from hasten.models.checkpoint import load_decoder, open_checkpoint
from hasten.models.gptq_layout import pack_words, unpack_words
from hasten.weights.gptq import GPTQ
from hasten.weights.gptq_files import stored_linear
from hasten.weights.native import NativeFormat
from hasten.weights.packed import StackedLinear

QUICK = {"samples": 6, "sample_length": 24, "group_size": 32}
IDS = torch.arange(40)[None] * 5 % 256
Q_PROJ = "model.layers.0.self_attn.q_proj"


def logits(ctx, technique: GPTQ) -> torch.Tensor:
    decoder = load_decoder(ctx.checkpoint, pack=technique.provide("weight_format", ctx).pack)
    with torch.no_grad():
        return decoder(IDS)


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    rows=st.integers(1, 3),
    words=st.integers(1, 9),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_words_are_little_endian_bit_streams(bits, rows, words, seed):
    """Against arbitrary-precision integers: value n takes bits [n * bits, (n + 1) * bits) of the row."""
    count = words * 32 // bits
    values = torch.randint(0, 1 << bits, (rows, count), generator=torch.Generator().manual_seed(seed))
    packed = pack_words(values, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, -(-count * bits // 32))
    for row, stored in zip(values.tolist(), packed.tolist(), strict=True):
        expected = sum(value << (n * bits) for n, value in enumerate(row))
        assert sum((word & 0xFFFFFFFF) << (32 * n) for n, word in enumerate(stored)) == expected
    assert torch.equal(unpack_words(packed, bits, count).long(), values)


def foreign(
    stem: str, w: np.ndarray, bits: int, group: np.ndarray, zero_minus_one: bool
) -> tuple[dict, np.ndarray]:
    """A linear quantised and stored the way AutoGPTQ does, in plain numpy loops; and the weight it stands for."""
    outputs, inputs = w.shape
    top = 2**bits - 1
    groups = int(group.max()) + 1
    scale, zero = np.zeros((groups, outputs), np.float16), np.zeros((groups, outputs), np.int64)
    code = np.zeros((inputs, outputs), np.int64)
    value = np.zeros_like(w)
    for g in range(groups):
        part = w[:, group == g]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        scale[g] = (high - low) / top
        zero[g] = np.clip(np.round(-low / scale[g].astype(np.float32)), 1, top)
    for i in range(inputs):
        s, z = scale[group[i]].astype(np.float32), zero[group[i]]
        code[i] = np.clip(np.round(w[:, i] / s) + z, 0, top)
        value[:, i] = s * (code[i] - z)

    def words(rows: np.ndarray) -> np.ndarray:  # packs along axis 0
        out = np.zeros((rows.shape[0] * bits // 32, rows.shape[1]), np.uint64)
        for n, row in enumerate(rows):
            word, shift = divmod(n * bits, 32)
            out[word] |= (row.astype(np.uint64) << shift) & 0xFFFFFFFF
            if shift + bits > 32:
                out[word + 1] |= row.astype(np.uint64) >> (32 - shift)
        return out.astype(np.uint32).view(np.int32)

    stored = zero - 1 if zero_minus_one else zero
    tensors = {
        f"{stem}.qweight": words(code),
        f"{stem}.qzeros": np.ascontiguousarray(words(np.ascontiguousarray(stored.T)).T),
        f"{stem}.scales": scale,
        f"{stem}.g_idx": group.astype(np.int32),
        f"{stem}.bias": np.zeros(outputs, np.float16),  # AutoGPTQ writes one for every linear
    }
    return {name: torch.from_numpy(np.ascontiguousarray(t)) for name, t in tensors.items()}, value


def foreign_model(folder: Path, bits: int, scattered: bool, fmt: str) -> tuple[Path, dict[str, np.ndarray]]:
    write_model(folder, replace(LLAMA, num_layers=1))
    tensors, values = load_file(folder / "model.safetensors"), {}
    random = np.random.default_rng(0)
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        weight = tensors.pop(name).numpy()
        group = np.arange(weight.shape[1]) // 32
        if scattered:
            # q, k and v agree, as they do when they were quantised under one Hessian; gate and up do not.
            own = np.random.default_rng(1) if "self_attn" in name else random
            group = own.permutation(group)
        stem = name.removesuffix(".weight")
        packed, values[stem] = foreign(stem, weight, bits, group, fmt == "gptq")
        tensors |= packed
    save_file(tensors, folder / "model.safetensors")
    edit_config(folder, bits=bits, group_size=32, desc_act=scattered, sym=False, checkpoint_format=fmt)
    return folder, values


def edit_config(folder: Path, **quantization) -> None:
    file = folder / "config.json"
    data = json.loads(file.read_text())
    base = data.get("quantization_config", {"quant_method": "gptq"})
    data["quantization_config"] = {k: v for k, v in (base | quantization).items() if v is not None}
    file.write_text(json.dumps(data))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("scattered", [False, True], ids=["plain", "desc_act"])
@pytest.mark.parametrize("fmt", ["gptq", "gptq_v2"])
def test_reads_foreign_checkpoints(tmp_path, bits, scattered, fmt):
    folder, values = foreign_model(tmp_path / "model", bits, scattered, fmt)
    ctx = context(folder)
    weights = GPTQ().provide("weight_format", ctx)
    for leaf, parts in {
        "qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "o_proj": ("self_attn.o_proj",),
        "gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        "down_proj": ("mlp.down_proj",),
    }.items():
        expected_OI = torch.from_numpy(np.concatenate([values[f"model.layers.0.{part}"] for part in parts]))
        source = ctx.checkpoint.linear(f"layers.0.{leaf}")
        layer = weights.pack(source)
        assert isinstance(layer, StackedLinear) == (scattered and leaf == "gate_up_proj")
        assert torch.equal(layer.dequantize(), expected_OI)
        assert torch.equal(source.dense(), expected_OI)  # so that float32 and bfloat16 plans run it too
        assert torch.equal(
            NativeFormat().pack(source).dequantize(), expected_OI
        )  # dtype auto, without a technique
        x_TI = torch.randn(3, layer.inputs)
        assert torch.allclose(layer(x_TI), x_TI @ expected_OI.t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "more",
    [
        {"symmetric": True},
        {},
        {"static_groups": False},
        {"group_size": -1, "symmetric": True},
        {"group_size": 48, "act_order": False},
    ],
    ids=["symmetric", "asymmetric", "perm", "row", "short"],
)
def test_saved_folder_reloads_bit_identically(tmp_path, bits, more):
    ctx = context(write_model(tmp_path / "model", replace(QWEN, num_layers=2)))
    technique = GPTQ(**{**QUICK, "bits": bits, **more})
    before = logits(ctx, technique)
    saved = technique.save(ctx, tmp_path / "saved")
    again = context(saved, calibration=[])  # nothing to calibrate on: the stored weights must do
    assert torch.equal(logits(again, GPTQ()), before)
    assert torch.equal(logits(again, technique), before)
    data = json.loads((saved / "config.json").read_text())
    stored = data["quantization_config"]
    assert stored["bits"] == bits
    assert stored["checkpoint_format"] == ("gptq" if more.get("symmetric") else "gptq_v2")
    assert stored["desc_act"] == (more.get("static_groups") is False)


def test_transformers_understands_the_folder(tmp_path):
    technique = GPTQ(**QUICK, symmetric=True)
    saved = technique.save(context(write_model(tmp_path / "model", TIED)), tmp_path / "saved")
    config = transformers.AutoConfig.from_pretrained(saved)
    assert config.model_type == "llama"
    parsed = transformers.GPTQConfig.from_dict(config.quantization_config)
    assert (parsed.bits, parsed.group_size, parsed.sym, parsed.desc_act) == (4, 32, True, False)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(saved)
    assert theirs.encode("Hello world") == context(saved).tokenizer.encode("Hello world")
    shapes = {name: tuple(t.shape) for name, t in load_file(saved / "model.safetensors").items()}
    assert shapes[f"{Q_PROJ}.qweight"] == (64 * 4 // 32, 64)
    assert shapes[f"{Q_PROJ}.qzeros"] == (2, 64 * 4 // 32)
    assert shapes[f"{Q_PROJ}.scales"] == (2, 64)
    assert shapes[f"{Q_PROJ}.g_idx"] == (64,)
    assert "lm_head.weight" not in shapes
    assert not any(name.endswith("_proj.weight") for name in shapes)


def test_half_precision_tensors_stay_as_they_are(tmp_path):
    ctx = context(write_model(tmp_path / "model", dtype=torch.bfloat16))
    saved = load_file(GPTQ(**QUICK).save(ctx, tmp_path / "saved") / "model.safetensors")
    original = load_file(tmp_path / "model" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert saved[name].dtype == torch.bfloat16
        assert torch.equal(saved[name], original[name])


class TestSaveRefuses:
    def test_a_folder_in_use(self, tmp_path):
        ctx = context(write_model(tmp_path / "model"))
        with pytest.raises(SettingError, match="not an empty folder"):
            GPTQ(**QUICK).save(ctx, tmp_path / "model")
        assert (tmp_path / "model" / "model.safetensors").exists()
        (tmp_path / "empty").mkdir()
        assert GPTQ(**QUICK).save(ctx, tmp_path / "empty").is_dir()

    def test_ternary(self, tmp_path):
        with pytest.raises(UnsupportedError, match="cannot hold ternary weights"):
            GPTQ(**QUICK, bits="ternary").save(context(write_model(tmp_path / "model")), tmp_path / "saved")
        assert not (tmp_path / "saved").exists()

    def test_sides_that_do_not_fill_words(self, tmp_path):
        odd = replace(LLAMA, intermediate_size=100, num_layers=1)
        ctx = context(write_model(tmp_path / "model", odd))
        with pytest.raises(UnsupportedError, match="100x64 cannot be stored with 3 bits"):
            GPTQ(**QUICK, bits=3).save(ctx, tmp_path / "saved")


class TestBadFolders:
    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        return foreign_model(tmp_path / "model", 4, scattered=True, fmt="gptq")[0]

    def change(self, folder: Path, edit) -> None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")

    def pack(self, folder: Path, name: str = "layers.0.qkv_proj"):
        ctx = context(folder)
        return stored_linear(ctx.checkpoint.linear(name))

    @pytest.mark.parametrize(
        ("quantization", "error", "match"),
        [
            ({"bits": 5}, UnsupportedError, "bits = 5 is not supported"),
            ({"bits": None}, UnsupportedError, "bits = None"),
            ({"group_size": 0}, ModelFormatError, "group_size must be -1 or a positive integer"),
            ({"group_size": "64"}, ModelFormatError, "not '64'"),
            ({"checkpoint_format": "marlin"}, UnsupportedError, "checkpoint_format 'marlin'"),
            ({"is_marlin_format": True}, UnsupportedError, "'marlin' is not supported"),
            ({"dynamic": {"+:.*": {"bits": 8}}}, UnsupportedError, "per-module overrides"),
        ],
    )
    def test_configuration(self, folder, quantization, error, match):
        edit_config(folder, **quantization)
        with pytest.raises(error, match=match):
            GPTQ().provide("weight_format", context(folder))

    def test_bits_that_do_not_fit_the_tensors(self, folder):
        edit_config(folder, bits=8)
        with pytest.raises(
            ModelFormatError, match=r"q_proj\.qweight' is torch\.int32 \(8, 64\).*needs .* \(16, 64\)"
        ):
            self.pack(folder)

    def test_missing_group_index(self, folder):
        self.change(folder, lambda t: t.pop(f"{Q_PROJ}.g_idx"))
        with pytest.raises(ModelFormatError, match=r"q_proj\.g_idx' is missing; .* desc_act needs it"):
            self.pack(folder)

    def test_group_index_may_be_left_out_of_ordered_models(self, tmp_path):
        folder, values = foreign_model(tmp_path / "model", 4, scattered=False, fmt="gptq")
        self.change(folder, lambda t: t.pop(f"{Q_PROJ}.g_idx"))
        assert torch.equal(self.pack(folder).dequantize()[:64], torch.from_numpy(values[Q_PROJ]))

    @pytest.mark.parametrize(
        ("leaf", "damage", "error", "match"),
        [
            ("qzeros", lambda t: t[:1].contiguous(), ModelFormatError, r"qzeros' is torch\.int32 \(1, 8\)"),
            ("qweight", lambda t: t.float(), ModelFormatError, r"qweight' is torch\.float32"),
            ("scales", lambda t: t * float("nan"), IntegrityError, "scales' holds NaN"),
            ("g_idx", lambda t: t + 1, ModelFormatError, r"groups outside \[0, 2\)"),
            ("g_idx", lambda t: t * 0, ModelFormatError, "unequal sizes"),
            ("g_idx", lambda t: t[:5].clone(), ModelFormatError, r"g_idx' is torch\.int32 \(5,\)"),
            ("bias", lambda t: t + 1, ModelFormatError, "has no bias there"),
        ],
    )
    def test_tensors(self, folder, leaf, damage, error, match):
        self.change(folder, lambda t: t.update({f"{Q_PROJ}.{leaf}": damage(t[f"{Q_PROJ}.{leaf}"])}))
        with pytest.raises(error, match=match):
            self.pack(folder)

    def test_only_part_of_a_fused_linear_packed(self, folder):
        def unpack(tensors):
            for leaf in ("qweight", "qzeros", "scales", "g_idx", "bias"):
                del tensors[f"{Q_PROJ}.{leaf}"]
            tensors[f"{Q_PROJ}.weight"] = torch.randn(64, 64)

        self.change(folder, unpack)
        with pytest.raises(
            UnsupportedError, match=r"layers\.0\.q_proj is not GPTQ-packed but its neighbours are"
        ):
            self.pack(folder)

    def test_an_unquantised_linear_is_used_as_it_is(self, folder):
        exact_OI = torch.randn(64, 64)

        def unpack(tensors):
            for leaf in ("qweight", "qzeros", "scales", "g_idx", "bias"):
                del tensors[f"model.layers.0.self_attn.o_proj.{leaf}"]
            tensors["model.layers.0.self_attn.o_proj.weight"] = exact_OI

        self.change(folder, unpack)
        ctx = context(folder)
        layer = GPTQ().provide("weight_format", ctx).pack(ctx.checkpoint.linear("layers.0.o_proj"))
        assert torch.equal(layer.dequantize(), exact_OI)

    def test_truncated_file(self, folder):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-50])
        with pytest.raises(ModelFormatError, match="truncated"):
            open_checkpoint(folder)
