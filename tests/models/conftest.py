"""Tiny random checkpoints of every family, written by `transformers`, and a plain `Attend` that keeps keys in lists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
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


@pytest.fixture
def run_in_steps() -> Callable[[Decoder, Tensor, list[int]], Tensor]:
    """Run one sequence in steps of the given sizes through a `ListAttend`; logits of all rows."""

    def run(decoder: Decoder, token_ids_T: Tensor, sizes: list[int]) -> Tensor:
        assert sum(sizes) == len(token_ids_T)
        attend = ListAttend(decoder)
        rows, start = [], 0
        with torch.no_grad():
            for size in sizes:
                position_T = torch.arange(start, start + size)
                x_TE = decoder.embed(token_ids_T[start : start + size])
                for layer in decoder.layers:
                    x_TE = layer.mlp(layer.attention(x_TE, position_T, attend))
                rows.append(decoder.logits(x_TE))
                start += size
        return torch.cat(rows)

    return run
