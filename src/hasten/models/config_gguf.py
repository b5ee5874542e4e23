"""`DecoderConfig` from a GGUF file's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hasten.core.errors import ModelError, UnsupportedError
from hasten.models.config import MAX_LAYERS, DecoderConfig, HeadShape, RopeSpec

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
_GEMMA_PATTERN = 6  # every sixth layer is global; the file does not say
_GEMMA_27B_LAYERS = 62  # the one size whose attention scale is not 1 / sqrt(head size)


class _Meta:
    """Typed look-ups under the architecture's prefix; errors name the key."""

    def __init__(self, fields: Mapping[str, Any], where: str) -> None:
        self.fields, self.where = fields, where
        self.arch = str(fields.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        return self.fields.get(f"{self.arch}.{key}", default)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if isinstance(value, tuple) and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, tuple):
            raise UnsupportedError(f"{self.where}: '{self.arch}.{key}' differs between layers")
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ModelError(f"{self.where}: '{self.arch}.{key}' must be a positive integer, got {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ModelError(f"{self.where}: '{self.arch}.{key}' must be a positive number, got {value!r}")
        return float(value)


def config_from_gguf(
    fields: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    rope_factors: tuple[float, ...] | None,
    where: str,
) -> DecoderConfig:
    """Read GGUF metadata; ``shapes`` are the file's tensors, ``rope_factors`` its ``rope_freqs.weight``.

    Raises `ModelError` for an unsupported architecture or impossible values, `UnsupportedError` for unknown features.
    """
    meta = _Meta(fields, where)
    if meta.arch not in ARCHITECTURES:
        raise ModelError(
            f"{where}: unsupported architecture {meta.arch!r} (supported: {', '.join(ARCHITECTURES)})"
        )
    if meta.get("expert_count", 0):
        raise UnsupportedError(f"{where}: mixture-of-experts models are not supported")
    hidden, heads = meta.integer("embedding_length"), meta.integer("attention.head_count")
    kv_heads = meta.integer("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise ModelError(f"{where}: {heads} query heads do not divide among {kv_heads} key/value heads")
    size = meta.integer("attention.key_length", hidden // heads)
    if meta.integer("attention.value_length", size) != size:
        raise UnsupportedError(f"{where}: keys and values of different sizes are not supported")
    rotated = meta.integer("rope.dimension_count", size)
    if rotated > size or (meta.arch == "llama" and rotated != size):
        raise UnsupportedError(f"{where}: RoPE over {rotated} of {size} dimensions is not supported")
    layers = meta.integer("block_count")
    if layers > MAX_LAYERS:
        raise ModelError(
            f"{where}: '{meta.arch}.block_count' is {layers}; no model has more than {MAX_LAYERS}"
        )
    gemma = meta.arch == "gemma3"
    embedding = shapes.get("token_embd.weight", (meta.get("vocab_size", 0), hidden))
    window: int | None = None
    window_layers: tuple[bool, ...] = ()
    local_rope: RopeSpec | None = None
    if gemma:
        window = meta.integer("attention.sliding_window")
        window_layers = tuple((layer + 1) % _GEMMA_PATTERN != 0 for layer in range(layers))
        local_rope = RopeSpec(meta.number("rope.freq_base_swa", 1e4), rotated)
    elif meta.arch == "llama" and meta.get("attention.sliding_window"):
        window = meta.integer("attention.sliding_window")
    theta = meta.number("rope.freq_base", 1e6 if gemma else 1e4)
    qkv_bias = "blk.0.attn_q.bias" in shapes
    return DecoderConfig(
        family=meta.arch,
        vocab_size=embedding[0],
        hidden_size=hidden,
        intermediate_size=meta.integer("feed_forward_length"),
        num_layers=layers,
        shape=HeadShape(heads, kv_heads, size),
        max_positions=meta.integer("context_length"),
        rope=RopeSpec(theta, rotated, _scaling(meta, rope_factors)),
        norm_eps=meta.number("attention.layer_norm_rms_epsilon"),
        activation="gelu_tanh" if gemma else "silu",
        tie_embeddings="output.weight" not in shapes,
        qkv_bias=qkv_bias,
        o_bias="blk.0.attn_output.bias" in shapes,
        mlp_bias="blk.0.ffn_down.bias" in shapes,
        qk_norm=meta.arch in ("qwen3", "gemma3"),
        sandwich_norm=gemma,
        embedding_scale=hidden**0.5 if gemma else 1.0,
        attention_scale=(hidden / heads) ** -0.5 if gemma and layers == _GEMMA_27B_LAYERS else None,
        attention_softcap=_softcap(meta, "attn_logit_softcapping") if gemma else None,
        logit_softcap=_softcap(meta, "final_logit_softcapping") if gemma else None,
        window=window,
        window_layers=window_layers,
        local_rope=local_rope,
        bos_id=fields.get("tokenizer.ggml.bos_token_id"),
        eos_ids=tuple(
            fields[key]
            for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
            if key in fields
        ),
    )


def _softcap(meta: _Meta, key: str) -> float | None:
    return meta.number(key) if meta.get(key) else None


def _scaling(meta: _Meta, rope_factors: tuple[float, ...] | None) -> dict[str, Any] | None:
    if rope_factors is not None:
        return {"rope_type": "factors", "factors": list(rope_factors)}
    kind = meta.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    factor = meta.number("rope.scaling.factor", 1.0)
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise UnsupportedError(f"{meta.where}: RoPE scaling {kind!r} is not supported (linear, yarn)")
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": meta.integer("rope.scaling.original_context_length"),
    }
    for key, ours in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
        if meta.get(f"rope.scaling.{key}") is not None:
            scaling[ours] = meta.number(f"rope.scaling.{key}")
    if meta.get("rope.scaling.attn_factor") is not None:
        scaling["attention_factor"] = meta.number("rope.scaling.attn_factor")
    return scaling
