"""`DecoderConfig`: the shape of a decoder-only language model, whatever file it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hasten.core.errors import ModelError

MAX_LAYERS = 4096
"""More than any model has: a larger number is a damaged file, refused before it costs memory."""


@dataclass(frozen=True)
class HeadShape:
    """Head counts and sizes of one model's attention. ``heads % kv_heads == 0`` (GQA; equal is MHA)."""

    heads: int
    kv_heads: int
    size: int


@dataclass(frozen=True)
class AttentionSpec:
    """What a layer asks of attention besides its inputs."""

    shape: HeadShape
    scale: float
    window: int | None = None  # sliding window in tokens (including the query's own), None = all
    softcap: float | None = None  # logits become softcap * tanh(logits / softcap)


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding of a layer. ``scaling`` is the checkpoint's dictionary (``rope_type``, factor, ...)."""

    theta: float
    size: int  # rotated dimensions
    scaling: dict[str, Any] | None = None


@dataclass(frozen=True)
class DecoderConfig:
    """One definition for Llama, SmolLM2, Mistral, Qwen2, Qwen3 and Gemma 3 text."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    shape: HeadShape
    max_positions: int
    rope: RopeSpec
    norm_eps: float = 1e-5
    activation: str = "silu"  # "silu" or "gelu_tanh"
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sandwich_norm: bool = False  # Gemma: norms after attention and after the MLP too
    norm_offset: float = 0.0  # what the reader adds to stored norm weights: Gemma multiplies by (1 + w)
    embedding_scale: float = 1.0
    attention_scale: float | None = None  # None: 1 / sqrt(head size)
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    window: int | None = None
    window_layers: tuple[bool, ...] = ()  # which layers slide; empty with a window = all of them
    local_rope: RopeSpec | None = None  # rotary embedding of sliding layers, if it differs
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)

    def slides(self, layer: int) -> bool:
        """Whether ``layer`` uses the sliding window."""
        return self.window is not None and (self.window_layers[layer] if self.window_layers else True)

    def attention(self, layer: int) -> AttentionSpec:
        """What ``layer`` asks of attention."""
        scale = self.attention_scale if self.attention_scale is not None else self.shape.size**-0.5
        return AttentionSpec(
            self.shape, scale, self.window if self.slides(layer) else None, self.attention_softcap
        )

    def rope_of(self, layer: int) -> RopeSpec:
        """The rotary embedding of ``layer``."""
        return self.local_rope if self.local_rope is not None and self.slides(layer) else self.rope

    def keeping(self, layers: Sequence[int]) -> DecoderConfig:
        """The shape with only ``layers``, renumbered in order; what belongs to a layer (its window) stays with it.

        Raises `ModelError` unless ``layers`` are ascending layers of this model, at least one.
        """
        given = list(layers)
        if not given or given != sorted(set(given)) or given[0] < 0 or given[-1] >= self.num_layers:
            raise ModelError(f"layers to keep must ascend within 0..{self.num_layers - 1}, not {given}")
        slides = tuple(self.window_layers[layer] for layer in given) if self.window_layers else ()
        return replace(self, num_layers=len(given), window_layers=slides)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor a checkpoint of this model holds, by hasten name, unfused, with its shape.

        A tied LM head is not listed: it is ``embed_tokens.weight``.
        """
        hidden, inner, shape = self.hidden_size, self.intermediate_size, self.shape
        query, key = shape.heads * shape.size, shape.kv_heads * shape.size
        linears: dict[str, tuple[int, int, bool]] = {
            "q_proj": (query, hidden, self.qkv_bias),
            "k_proj": (key, hidden, self.qkv_bias),
            "v_proj": (key, hidden, self.qkv_bias),
            "o_proj": (hidden, query, self.o_bias),
            "gate_proj": (inner, hidden, self.mlp_bias),
            "up_proj": (inner, hidden, self.mlp_bias),
            "down_proj": (hidden, inner, self.mlp_bias),
        }
        layer: dict[str, tuple[int, ...]] = {"input_norm.weight": (hidden,), "mlp_norm.weight": (hidden,)}
        if self.qk_norm:
            layer |= {"q_norm.weight": (shape.size,), "k_norm.weight": (shape.size,)}
        if self.sandwich_norm:
            layer |= {"post_attention_norm.weight": (hidden,), "post_mlp_norm.weight": (hidden,)}
        for name, (outputs, inputs, biased) in linears.items():
            layer[f"{name}.weight"] = (outputs, inputs)
            if biased:
                layer[f"{name}.bias"] = (outputs,)
        tensors: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (self.vocab_size, hidden)}
        for index in range(self.num_layers):
            tensors |= {f"layers.{index}.{name}": size for name, size in layer.items()}
        tensors["norm.weight"] = (hidden,)
        if not self.tie_embeddings:
            tensors["lm_head.weight"] = (self.vocab_size, hidden)
        return tensors
