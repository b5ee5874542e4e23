"""The decoder: one plain, trainable PyTorch definition for Llama, SmolLM2, Mistral, Qwen2, Qwen3 and Gemma 3 text.

Rows of all sequences lie in one flat axis T; how a row sees other rows is the business of the `Attend` the caller
passes, so the same layers serve training, reference runs and the paged engine.

Legend: B sequences, T rows, E hidden size, H query heads, G key/value heads, D head size, V vocabulary, O outputs,
I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from hasten.models.config import DecoderConfig
from hasten.models.rope import Rope, apply_rotation

Attend = Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(layer, q_THD, k_TGD, v_TGD, position_T) -> out_THD. q and k come after QK-norm, not rotated: it rotates."""


class DenseLinear(nn.Linear):
    """``nn.Linear`` whose weight may be stored in half precision while activations stay as they come."""

    def reset_parameters(self) -> None:
        """Left to `Decoder.reset_parameters`: loading a checkpoint should not pay for random numbers."""

    def forward(self, input: Tensor) -> Tensor:
        """y_TO = x_TI @ W^T + bias in the dtype of ``input``."""
        weight_OI: Tensor = self.weight
        bias_O: Tensor | None = self.bias
        if weight_OI.dtype != input.dtype:
            weight_OI = weight_OI.to(input.dtype)
            bias_O = bias_O.to(input.dtype) if bias_O is not None else None
        return functional.linear(input, weight_OI, bias_O)


class TokenEmbedding(nn.Embedding):
    """``nn.Embedding`` initialised by `Decoder.reset_parameters`."""

    def reset_parameters(self) -> None:
        """See `DenseLinear.reset_parameters`."""


class DecoderLayer(nn.Module):
    """One transformer block with fused projections: ``qkv_proj`` rows are [q; k; v], ``gate_up_proj`` [gate; up]."""

    def __init__(self, config: DecoderConfig, index: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        shape, hidden, inner = config.shape, config.hidden_size, config.intermediate_size
        query = shape.heads * shape.size

        def norm(size: int) -> nn.RMSNorm:
            return nn.RMSNorm(size, config.norm_eps, device=device)

        def linear(inputs: int, outputs: int, bias: bool) -> nn.Module:
            return DenseLinear(inputs, outputs, bias=bias, device=device)

        self.index = index
        self.shape = shape
        self.qkv_split = (query, shape.kv_heads * shape.size, shape.kv_heads * shape.size)
        self.gelu = config.activation == "gelu_tanh"
        self.input_norm = norm(hidden)
        self.qkv_proj = linear(hidden, sum(self.qkv_split), config.qkv_bias)
        self.q_norm = norm(shape.size) if config.qk_norm else None
        self.k_norm = norm(shape.size) if config.qk_norm else None
        self.o_proj = linear(query, hidden, config.o_bias)
        self.post_attention_norm = norm(hidden) if config.sandwich_norm else None
        self.mlp_norm = norm(hidden)
        self.gate_up_proj = linear(hidden, 2 * inner, config.mlp_bias)
        self.down_proj = linear(inner, hidden, config.mlp_bias)
        self.post_mlp_norm = norm(hidden) if config.sandwich_norm else None

    def attention(self, x_TE: Tensor, position_T: Tensor, attend: Attend) -> Tensor:
        """The attention half: norm, projections, ``attend``, output projection, residual."""
        rows = x_TE.shape[0]
        heads, kv_heads, size = self.shape.heads, self.shape.kv_heads, self.shape.size
        q, k, v = self.qkv_proj(self.input_norm(x_TE)).split(self.qkv_split, dim=-1)
        q_THD, k_TGD, v_TGD = (
            q.view(rows, heads, size),
            k.view(rows, kv_heads, size),
            v.view(rows, kv_heads, size),
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_THD, k_TGD = self.q_norm(q_THD), self.k_norm(k_TGD)
        out_THD = attend(self.index, q_THD, k_TGD, v_TGD, position_T)
        out_TE = self.o_proj(out_THD.reshape(rows, self.qkv_split[0]))
        if self.post_attention_norm is not None:
            out_TE = self.post_attention_norm(out_TE)
        return cast(Tensor, x_TE + out_TE)

    def mlp(self, x_TE: Tensor) -> Tensor:
        """The feed-forward half: norm, SwiGLU or GeGLU, residual."""
        gate_TI, up_TI = self.gate_up_proj(self.mlp_norm(x_TE)).chunk(2, dim=-1)
        gate_TI = functional.gelu(gate_TI, approximate="tanh") if self.gelu else functional.silu(gate_TI)
        out_TE = self.down_proj(gate_TI * up_TI)
        if self.post_mlp_norm is not None:
            out_TE = self.post_mlp_norm(out_TE)
        return cast(Tensor, x_TE + out_TE)


class Decoder(nn.Module):
    """A whole model, randomly initialised; `hasten.models.checkpoint.load_decoder` builds one from a checkpoint.

    Norm weights are the factors applied (a family that stores ``w`` and multiplies by ``1 + w`` is converted when
    read). ``device="meta"`` builds it without weights.
    """

    def __init__(self, config: DecoderConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens: nn.Module = TokenEmbedding(config.vocab_size, config.hidden_size, device=device)
        self.layers = nn.ModuleList(DecoderLayer(config, index, device) for index in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps, device=device)
        self.lm_head: nn.Module = DenseLinear(
            config.hidden_size, config.vocab_size, bias=False, device=device
        )
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        if device is None or torch.device(device).type != "meta":
            self.reset_parameters()
        self.ropes: dict[bool, Rope] = {}  # keyed by "a sliding layer with its own rotary embedding"
        for layer in range(config.num_layers):
            local = self._has_local_rope(layer)
            if local not in self.ropes:
                self.ropes[local] = Rope(config.rope_of(layer), config.max_positions)
        self._layer_ropes = [self.ropes[self._has_local_rope(layer)] for layer in range(config.num_layers)]

    def reset_parameters(self, std: float = 0.02) -> None:
        """Weights from N(0, std), biases zero, norms one: what the supported families start training from."""
        for name, parameter in self.named_parameters():
            if "norm" in name:
                nn.init.ones_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=std)

    def _has_local_rope(self, layer: int) -> bool:
        return self.config.local_rope is not None and self.config.slides(layer)

    def rope(self, layer: int) -> Rope:
        """The rotary embedding of ``layer``."""
        return self._layer_ropes[layer]

    def embed(self, token_ids_T: Tensor) -> Tensor:
        """Hidden states before the first layer, float32 [T, E]."""
        x_TE = self.embed_tokens(token_ids_T).float()
        scale = self.config.embedding_scale
        return cast(Tensor, x_TE if scale == 1.0 else x_TE * scale)

    def logits(self, x_TE: Tensor) -> Tensor:
        """Final norm, LM head and soft cap: float32 [T, V]."""
        return self.head(self.norm(x_TE))

    def head(self, normed_TE: Tensor) -> Tensor:
        """LM head and soft cap of normed hidden states: float32 [T, V]."""
        logits_TV = self.lm_head(normed_TE).float()
        cap = self.config.logit_softcap
        return cast(Tensor, logits_TV if cap is None else torch.tanh(logits_TV / cap) * cap)

    def forward(self, token_ids_BT: Tensor) -> Tensor:
        """Logits [B, T, V] with full causal attention, every sequence starting at position 0."""
        batch, length = token_ids_BT.shape
        attend = CausalAttend(self, batch)
        position_T = torch.arange(length, device=token_ids_BT.device).repeat(batch)
        x_TE = self.embed(token_ids_BT.reshape(-1))
        for layer in self.layers:
            layer = cast(DecoderLayer, layer)
            x_TE = layer.mlp(layer.attention(x_TE, position_T, attend))
        return self.logits(x_TE).view(batch, length, -1)

    def linears(self) -> Iterator[tuple[str, nn.Module]]:
        """Every linear with its name (``layers.3.qkv_proj``, ..., ``lm_head``), in execution order."""
        for index, layer in enumerate(self.layers):
            for name in LAYER_LINEARS:
                yield f"layers.{index}.{name}", getattr(layer, name)
        yield "lm_head", self.lm_head

    def set_linear(self, name: str, module: nn.Module) -> None:
        """Put ``module`` (a packed layer) in the place of the linear called ``name``. `KeyError` if there is none."""
        parent_name, _, leaf = name.rpartition(".")
        parent = self.get_submodule(parent_name) if parent_name else self
        if not isinstance(getattr(parent, leaf, None), nn.Module):
            raise KeyError(name)
        setattr(parent, leaf, module)


LAYER_LINEARS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


class CausalAttend:
    """Full causal attention over ``batch`` sequences of equal length, rows in order; the reference `Attend`.

    Honours each layer's scale, sliding window and soft cap. Rows of one sequence must be adjacent and ascending.
    """

    def __init__(self, decoder: Decoder, batch: int = 1) -> None:
        self.decoder = decoder
        self.batch = batch
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    def __call__(self, layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, position_T: Tensor) -> Tensor:
        """Rotate, attend; out [T, H, D]."""
        spec = self.decoder.config.attention(layer)
        rope = self.decoder.rope(layer)
        cos_TR, sin_TR = rope.tables(position_T)
        q_THD, k_TGD = apply_rotation(q_THD, cos_TR, sin_TR), apply_rotation(k_TGD, cos_TR, sin_TR)

        def heads_first(x: Tensor) -> Tensor:
            return x.view(self.batch, x.shape[0] // self.batch, x.shape[1], x.shape[2]).transpose(1, 2)

        q_BHTD, k_BGTD, v_BGTD = heads_first(q_THD), heads_first(k_TGD), heads_first(v_TGD)
        length = q_BHTD.shape[2]
        window = spec.window if spec.window is not None and spec.window < length else None
        out_BHTD = dense_attention(
            q_BHTD,
            k_BGTD,
            v_BGTD,
            scale=spec.scale,
            softcap=spec.softcap,
            mask_TS=self._mask(length, window) if window is not None or spec.softcap is not None else None,
        )
        return out_BHTD.transpose(1, 2).reshape(q_THD.shape)

    def _mask(self, length: int, window: int | None) -> Tensor:
        mask_TS = self._masks.get((length, window))
        if mask_TS is None:
            mask_TS = causal_mask(torch.arange(length), torch.arange(length), window)
            self._masks[length, window] = mask_TS
        return mask_TS


def causal_mask(query_T: Tensor, key_S: Tensor, window: int | None) -> Tensor:
    """Which keys a query may see, bool [T, S], from their positions; a window counts the query's own token."""
    distance_TS = query_T[:, None] - key_S[None, :]
    mask_TS = distance_TS >= 0
    return mask_TS if window is None else mask_TS & (distance_TS < window)


def dense_attention(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    *,
    scale: float,
    softcap: float | None,
    mask_TS: Tensor | None,
) -> Tensor:
    """Exact softmax attention in plain PyTorch (GQA allowed). Without a mask it is causal and T must equal S."""
    grouped = q_BHTD.shape[1] != k_BGSD.shape[1]
    if softcap is None:
        return functional.scaled_dot_product_attention(
            q_BHTD,
            k_BGSD,
            v_BGSD,
            attn_mask=mask_TS,
            is_causal=mask_TS is None,
            scale=scale,
            enable_gqa=grouped,
        )
    if mask_TS is None:
        raise ValueError("soft-capped attention needs an explicit mask")
    if grouped:
        repeat = q_BHTD.shape[1] // k_BGSD.shape[1]
        k_BGSD, v_BGSD = k_BGSD.repeat_interleave(repeat, dim=1), v_BGSD.repeat_interleave(repeat, dim=1)
    score_BHTS = torch.tanh(q_BHTD @ k_BGSD.transpose(-1, -2) * (scale / softcap)) * softcap
    weight_BHTS = score_BHTS.masked_fill(~mask_TS, float("-inf")).softmax(dim=-1)
    return weight_BHTS @ v_BGSD
