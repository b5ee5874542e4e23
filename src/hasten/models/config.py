"""`DecoderConfig`: the shape of a decoder-only language model, whatever file it came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


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
    """Rotary embedding of a layer. ``scaling`` is the checkpoint's dictionary (type, factor, ...), or None."""

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
    norm_offset: float = 0.0  # Gemma multiplies by (1 + weight)
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
