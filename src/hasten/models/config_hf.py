"""`DecoderConfig` from a Hugging Face ``config.json`` (the spelling before and since transformers 5).

Defaults are the families' own: published files leave out what equals them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hasten.core.errors import ModelError, UnsupportedError
from hasten.models.config import MAX_LAYERS, DecoderConfig, HeadShape, RopeSpec
from hasten.models.rope import scaling_kind


@dataclass(frozen=True)
class Family:
    """What a model family does differently from Llama, and its configuration's defaults."""

    name: str
    defaults: dict[str, Any]
    qkv_bias: bool | None = None  # None: ``attention_bias`` says (output projection included)
    mlp_bias: bool = False  # whether ``mlp_bias`` is read
    qk_norm: bool = False
    gemma: bool = False


_COMMON: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
_QWEN: dict[str, Any] = _COMMON | {"max_position_embeddings": 32768, "max_window_layers": 28}
_GEMMA: dict[str, Any] = _COMMON | {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
FAMILIES = {
    family.name: family
    for family in (
        Family("llama", _COMMON | {"max_position_embeddings": 2048}, mlp_bias=True),
        Family(
            "mistral",
            _COMMON | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
            qkv_bias=False,
        ),
        Family("qwen2", _QWEN, qkv_bias=True),
        Family("qwen3", _QWEN | {"head_dim": 128}, qk_norm=True),
        Family("gemma3", _GEMMA, qk_norm=True, gemma=True),
    )
}
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",
}
_MODEL_TYPES = {"gemma3_text": "gemma3"} | {name: name for name in FAMILIES}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


class _Fields:
    """Typed look-ups in a configuration, the family's defaults behind it; errors name the key."""

    def __init__(self, data: dict[str, Any], defaults: dict[str, Any], where: str) -> None:
        self.data, self.defaults, self.where = data, defaults, where

    def get(self, key: str) -> Any:
        return self.data[key] if key in self.data else self.defaults.get(key)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ModelError(f"{self.where}: {key!r} must be a positive integer, got {value!r}")
        return value

    def number(self, key: str) -> float:
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ModelError(f"{self.where}: {key!r} must be a positive number, got {value!r}")
        return float(value)

    def optional(self, key: str) -> float | None:
        return None if self.get(key) is None else self.number(key)


def family_of(data: dict[str, Any], where: str) -> Family:
    """The family of a configuration. Raises `ModelError` naming the supported architectures."""
    architectures = data.get("architectures") or []
    named = [ARCHITECTURES[name] for name in architectures if name in ARCHITECTURES]
    kind = named[0] if named else None if architectures else _MODEL_TYPES.get(str(data.get("model_type")))
    if kind is None:
        what = ", ".join(map(str, architectures)) or repr(data.get("model_type"))
        raise ModelError(f"{where}: unsupported architecture {what} (supported: {', '.join(ARCHITECTURES)})")
    return FAMILIES[kind]


def config_from_hf(data: dict[str, Any], where: str) -> DecoderConfig:
    """Read a ``config.json``'s contents; ``where`` names the file in errors.

    Raises `ModelError` for missing or impossible values, `UnsupportedError` for features no family here has.
    """
    family = family_of(data, where)
    outer = data
    if isinstance(data.get("text_config"), dict):
        data = {"tie_word_embeddings": outer.get("tie_word_embeddings", True), **data["text_config"]}
    fields = _Fields(data, family.defaults, where)
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ModelError(f"{where}: {heads} query heads do not divide among {kv_heads} key/value heads")
    size = fields.integer("head_dim", hidden // heads)
    layers = fields.integer("num_hidden_layers")
    if layers > MAX_LAYERS:
        raise ModelError(f"{where}: 'num_hidden_layers' is {layers}; no model has more than {MAX_LAYERS}")
    activation = str(data.get("hidden_activation") or fields.get("hidden_act"))
    if activation not in ACTIVATIONS:
        raise UnsupportedError(f"{where}: activation {activation!r} (supported: {', '.join(ACTIVATIONS)})")
    if data.get("use_bidirectional_attention"):
        raise UnsupportedError(f"{where}: a model with bidirectional attention is not a decoder")
    qkv_bias = bool(data.get("attention_bias")) if family.qkv_bias is None else family.qkv_bias
    window, window_layers = _windows(fields, family, layers)
    rope, local_rope = _ropes(fields, family, size)
    eos = data.get("eos_token_id", outer.get("eos_token_id"))
    return DecoderConfig(
        family=family.name,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=layers,
        shape=HeadShape(heads, kv_heads, size),
        max_positions=fields.integer("max_position_embeddings"),
        rope=rope,
        norm_eps=fields.number("rms_norm_eps"),
        activation=ACTIVATIONS[activation],
        tie_embeddings=bool(fields.get("tie_word_embeddings")),
        qkv_bias=qkv_bias,
        o_bias=qkv_bias and family.qkv_bias is None,
        mlp_bias=family.mlp_bias and bool(data.get("mlp_bias")),
        qk_norm=family.qk_norm,
        sandwich_norm=family.gemma,
        norm_offset=1.0 if family.gemma else 0.0,
        embedding_scale=hidden**0.5 if family.gemma else 1.0,
        attention_scale=fields.number("query_pre_attn_scalar") ** -0.5 if family.gemma else None,
        attention_softcap=fields.optional("attn_logit_softcapping") if family.gemma else None,
        logit_softcap=fields.optional("final_logit_softcapping") if family.gemma else None,
        window=window,
        window_layers=window_layers,
        local_rope=local_rope,
        bos_id=data.get("bos_token_id", outer.get("bos_token_id")),
        eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
    )


def _windows(fields: _Fields, family: Family, layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """The sliding window in tokens and which layers slide (empty: all)."""
    qwen = family.name in ("qwen2", "qwen3")
    if family.name == "llama" or fields.get("sliding_window") is None:
        return None, ()
    if qwen and not fields.get("use_sliding_window"):
        return None, ()
    window = fields.integer("sliding_window")
    kinds = fields.get("layer_types")
    if kinds is not None:
        unknown = set(kinds) - {"full_attention", "sliding_attention"}
        if unknown or len(kinds) != layers:
            raise UnsupportedError(
                f"{fields.where}: 'layer_types' must name {layers} layers as full_attention or sliding_attention"
            )
        slides = tuple(kind == "sliding_attention" for kind in kinds)
    elif qwen:
        slides = tuple(layer >= int(fields.get("max_window_layers")) for layer in range(layers))
    elif family.gemma:
        pattern = int(fields.get("sliding_window_pattern") or fields.get("_sliding_window_pattern") or 6)
        slides = tuple((layer + 1) % pattern != 0 for layer in range(layers))
    else:
        return window, ()
    return (window, slides) if any(slides) else (None, ())


def _ropes(fields: _Fields, family: Family, size: int) -> tuple[RopeSpec, RopeSpec | None]:
    """The rotary embedding of full-attention layers, and that of sliding layers where the family has its own."""
    given = fields.get("rope_parameters") or {}
    if "full_attention" in given:
        full, local = given["full_attention"], given.get("sliding_attention")
    else:
        legacy = fields.get("rope_scaling") or {}
        full, local = {"rope_theta": fields.get("rope_theta"), **legacy, **given}, None
    if family.gemma and local is None:
        local = {"rope_theta": fields.get("rope_local_base_freq")}
    return _rope(full, fields, size), _rope(local, fields, size) if family.gemma and local else None


def _rope(parameters: dict[str, Any], fields: _Fields, size: int) -> RopeSpec:
    theta = parameters.get("rope_theta") or fields.get("rope_theta")
    if isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 0:
        raise ModelError(f"{fields.where}: 'rope_theta' must be a positive number, got {theta!r}")
    partial = parameters.get("partial_rotary_factor") or fields.get("partial_rotary_factor") or 1.0
    if partial != 1:
        raise UnsupportedError(
            f"{fields.where}: RoPE over a part of the head (partial_rotary_factor {partial!r})"
        )
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    if scaling_kind(scaling) == "default":
        return RopeSpec(float(theta), size)
    if fields.get("original_max_position_embeddings"):
        scaling.setdefault("original_max_position_embeddings", fields.get("original_max_position_embeddings"))
    return RopeSpec(float(theta), size, scaling)
