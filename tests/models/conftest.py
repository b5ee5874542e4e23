"""Tiny random checkpoints of every family, written by `transformers`, and a plain `Attend` that keeps keys in lists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from torch import Tensor

from hasten.models.decoder import Decoder

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

_BASE = {"vocab_size": 131, "num_hidden_layers": 2, "max_position_embeddings": 128, "pad_token_id": 0}
_SMALL = _BASE | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_GEMMA = _SMALL | {"num_hidden_layers": 7, "head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 20}

FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama_gqa": ("Llama", _SMALL),
    "llama_mha_biases": (
        "Llama",
        _SMALL
        | {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama_odd_head": ("Llama", _SMALL | {"head_dim": 10, "hidden_size": 52, "num_key_value_heads": 1}),
    "smollm2_shape": (
        "Llama",
        _BASE
        | {
            "hidden_size": 576,
            "intermediate_size": 200,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        },
    ),
    "mistral": ("Mistral", _SMALL | {"sliding_window": None}),
    "mistral_window": ("Mistral", _SMALL | {"sliding_window": 7, "head_dim": 12}),
    "qwen2": ("Qwen2", _SMALL),
    "qwen2_window": (
        "Qwen2",
        _SMALL
        | {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", _SMALL | {"head_dim": 24}),
    "qwen3_bias_tied": (
        "Qwen3",
        _SMALL | {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "gemma3": ("Gemma3Text", _GEMMA),
    "gemma3_softcap": (
        "Gemma3Text",
        _GEMMA
        | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0, "tie_word_embeddings": False},
    ),
}


def build(kind: str, settings: dict[str, object]) -> transformers.PreTrainedModel:
    """A random model of a family, with weights large enough that every part shows in the logits."""
    config = getattr(transformers, f"{kind}Config")(**settings)
    config._attn_implementation = "eager"
    name = {"Gemma3Text": "Gemma3"}.get(kind, kind)
    torch.manual_seed(sum(map(ord, kind)))
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.normal_(std=0.2 if "bias" in name else 1.5 * parameter.shape[-1] ** -0.5)
    return model


@dataclass(frozen=True)
class Tiny:
    """A saved model: its folder and the `transformers` model that gives the reference."""

    path: Path
    model: transformers.PreTrainedModel

    def logits(self, token_ids_BT: Tensor) -> Tensor:
        # transformers' Gemma 3 reads attn_logit_softcapping but does not hand it to its own attention function.
        cap = getattr(self.model.config, "attn_logit_softcapping", None)
        with torch.no_grad():
            return self.model(
                token_ids_BT, use_cache=False, **({"softcap": cap} if cap else {})
            ).logits.float()


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Tiny]:
    """Build and save a model: ``tiny("qwen3", dtype=..., max_shard_size=..., rope_parameters=...)``."""

    def make(
        family: str = "llama_gqa",
        dtype: torch.dtype = torch.float32,
        max_shard_size: str = "1GB",
        **settings: object,
    ) -> Tiny:
        kind, base = FAMILIES[family]
        path = tmp_path / family
        build(kind, base | settings).to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
        # Read again: converting a model in place would round its rotary frequencies too.
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        )
        return Tiny(path, model.eval())

    return make


class ListAttend:
    """Causal attention of one sequence over keys kept in lists, written out step by step."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.keys: dict[int, list[Tensor]] = {}
        self.values: dict[int, list[Tensor]] = {}
        self.positions: dict[int, list[Tensor]] = {}

    def __call__(self, layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, position_T: Tensor) -> Tensor:
        spec, rope = self.decoder.config.attention(layer), self.decoder.rope(layer)
        self.keys.setdefault(layer, []).append(rope.rotate(k_TGD, position_T))
        self.values.setdefault(layer, []).append(v_TGD)
        self.positions.setdefault(layer, []).append(position_T)
        repeat = spec.shape.heads // spec.shape.kv_heads
        k_SHD = torch.cat(self.keys[layer]).repeat_interleave(repeat, dim=1)
        v_SHD = torch.cat(self.values[layer]).repeat_interleave(repeat, dim=1)
        distance_TS = position_T[:, None] - torch.cat(self.positions[layer])[None]
        score_HTS = torch.einsum("thd,shd->hts", rope.rotate(q_THD, position_T), k_SHD) * spec.scale
        if spec.softcap is not None:
            score_HTS = spec.softcap * torch.tanh(score_HTS / spec.softcap)
        hidden_TS = distance_TS < 0
        if spec.window is not None:
            hidden_TS |= distance_TS >= spec.window
        weight_HTS = score_HTS.masked_fill(hidden_TS, float("-inf")).softmax(dim=-1)
        return torch.einsum("hts,shd->thd", weight_HTS, v_SHD)


def step(decoder: Decoder, attend: ListAttend, token_ids_T: Tensor, start: int) -> Tensor:
    """Logits [T, V] of the next rows of a sequence."""
    position_T = torch.arange(start, start + len(token_ids_T))
    with torch.no_grad():
        x_TE = decoder.embed(token_ids_T)
        for layer in decoder.layers:
            x_TE = layer.mlp(layer.attention(x_TE, position_T, attend))
        return decoder.logits(x_TE)


@pytest.fixture
def run_in_steps() -> Callable[[Decoder, Tensor, list[int]], Tensor]:
    """Run one sequence in steps of the given sizes through a `ListAttend`; logits of all rows."""

    def run(decoder: Decoder, token_ids_T: Tensor, sizes: list[int]) -> Tensor:
        assert sum(sizes) == len(token_ids_T)
        attend, rows, start = ListAttend(decoder), [], 0
        for size in sizes:
            rows.append(step(decoder, attend, token_ids_T[start : start + size], start))
            start += size
        return torch.cat(rows)

    return run


@pytest.fixture
def greedy() -> Callable[[Decoder, list[int], int], list[int]]:
    """Prefill, then decode one token at a time: the tokens of highest logit."""

    def run(decoder: Decoder, prompt: list[int], count: int) -> list[int]:
        attend, chosen = ListAttend(decoder), []
        logits_TV = step(decoder, attend, torch.tensor(prompt), 0)
        for position in range(len(prompt), len(prompt) + count):
            chosen.append(int(logits_TV[-1].argmax()))
            logits_TV = step(decoder, attend, torch.tensor(chosen[-1:]), position)
        return chosen

    return run


_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GGUF_GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def quantised(kind: str, weight_OI: np.ndarray, seed: int) -> np.ndarray:
    """Weights in a ggml type. The package cannot quantise to K types: those get random codes with modest scales."""
    ggml = GGMLQuantizationType[kind]
    if not kind.endswith("_K"):
        return quantize(weight_OI, ggml)
    block, size = GGML_QUANT_SIZES[ggml]
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (weight_OI.shape[0], weight_OI.shape[1] // block, size), dtype=np.uint8)
    offsets = (208,) if kind == "Q6_K" else (0, 2)
    for offset in offsets:
        scale = (
            rng.uniform(1e-5, 5e-5, data.shape[:2])
            if kind == "Q6_K"
            else rng.uniform(1e-4, 3e-4, data.shape[:2])
        )
        data[..., offset : offset + 2] = scale.astype(np.float16)[..., None].view(np.uint8)
    return data.reshape(weight_OI.shape[0], -1)


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head in the order of llama-architecture files: pair (i, i + D/2) side by side."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture
def write_gguf() -> Callable[..., Path]:
    """Write a `transformers` model as GGUF, its linears in type ``kind``, and set the model to those values.

    After the call the model holds exactly what the file holds. ``fields``: more metadata, by key; a value of None
    leaves a key out. ``edit`` may change the arrays by GGUF name before they are written.
    """

    def write(
        path: Path,
        model: transformers.PreTrainedModel,
        kind: str = "F32",
        embedding: str | None = None,
        fields: dict[str, object] | None = None,
        edit: Callable[[dict[str, np.ndarray]], None] | None = None,
        extra: dict[str, np.ndarray] | None = None,
    ) -> Path:
        config = model.config
        arch = {"mistral": "llama", "gemma3_text": "gemma3"}.get(config.model_type, config.model_type)
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        writer = GGUFWriter(str(path), arch)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_key_length(head_size)
        writer.add_value_length(head_size)
        rope = config.rope_parameters.get("full_attention", config.rope_parameters)
        writer.add_rope_freq_base(rope["rope_theta"])
        if arch == "gemma3" or (config.model_type == "mistral" and config.sliding_window):
            writer.add_sliding_window(config.sliding_window)
        for key, value in (fields or {}).items():
            _add_field(writer, key, value)
        names = _GGUF_NAMES | (_GGUF_GEMMA_NAMES if arch == "gemma3" else {})
        arrays: dict[str, np.ndarray] = {}
        kinds: dict[str, str] = {}
        with torch.no_grad():
            for seed, (name, parameter) in enumerate(model.named_parameters()):
                value = parameter.numpy()
                theirs = _gguf_name(name, names)
                if value.ndim == 1:
                    stored, stored_kind = value + (arch == "gemma3" and "norm" in name), "F32"
                else:
                    stored_kind = embedding or kind if "embed_tokens" in name else kind
                    stored = quantised(stored_kind, value, seed)
                    parameter.copy_(torch.from_numpy(dequantize(stored, GGMLQuantizationType[stored_kind])))
                if arch == "llama" and ("q_proj" in name or "k_proj" in name):
                    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
                    stored = interleave(stored, heads)
                arrays[theirs], kinds[theirs] = np.ascontiguousarray(stored), stored_kind
        if edit is not None:
            edit(arrays)
        for theirs, stored in (arrays | (extra or {})).items():
            stored_kind = kinds.get(theirs, "F32")
            raw = None if stored_kind in ("F32", "F16") else GGMLQuantizationType[stored_kind]
            writer.add_tensor(theirs, stored, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def _gguf_name(name: str, names: dict[str, str]) -> str:
    stem, _, suffix = name.removeprefix("model.").rpartition(".")
    top = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    if stem in top:
        return f"{top[stem]}.{suffix}"
    _, layer, leaf = stem.split(".", 2)
    return f"blk.{layer}.{names[leaf]}.{suffix}"


def _add_field(writer: GGUFWriter, key: str, value: object) -> None:
    match value:
        case None:
            writer.kv_data[0].pop(key, None)
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list() | tuple():
            writer.add_array(key, value)
        case _:
            raise TypeError(key)
