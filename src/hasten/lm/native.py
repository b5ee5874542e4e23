"""The decoder's layers on the native library: same calls as `DecoderLayer`, a handful of kernels per layer.

Layers whose linears are all packed for the native library (`KernelLinear`) run as `NativeLayer`; a decoder with any
other kind of linear keeps its PyTorch layers. Where nothing acts between the layers, `native_stack` runs a whole step.

Legend: T rows, E hidden size, H query heads, G kv heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from hasten.attention.layout import KVPages
from hasten.kernels.block import Block, Norms, Stack
from hasten.lm.kvcache.format import KVFormat
from hasten.models.decoder import LAYER_LINEARS, Attend, Decoder, DecoderLayer
from hasten.weights.packed import KernelLinear


class Layer(Protocol):
    """What the runner calls per layer; see `DecoderLayer`."""

    def attention(self, x_TE: Tensor, position_T: Tensor, attend: Attend) -> Tensor: ...

    def mlp(self, x_TE: Tensor) -> Tensor: ...


class NativeLayer:
    """One decoder layer in three native calls around attention."""

    def __init__(self, layer: DecoderLayer, eps: float) -> None:
        def norm(module: nn.RMSNorm | None) -> Tensor | None:
            return None if module is None else module.weight.detach()

        def packed(name: str) -> KernelLinear:
            return cast(KernelLinear, getattr(layer, name))

        self.index, self.shape = layer.index, layer.shape
        self.block = Block(
            *(packed(name).kernel() for name in LAYER_LINEARS),
            Norms(
                layer.input_norm.weight.detach(),
                layer.mlp_norm.weight.detach(),
                norm(layer.q_norm),
                norm(layer.k_norm),
                norm(layer.post_attention_norm),
                norm(layer.post_mlp_norm),
            ),
            heads=layer.shape.heads,
            kv_heads=layer.shape.kv_heads,
            size=layer.shape.size,
            eps=eps,
            gelu=layer.gelu,
        )

    def attention(self, x_TE: Tensor, position_T: Tensor, attend: Attend) -> Tensor:
        """The attention half; a new tensor."""
        x_TE = x_TE.contiguous()
        rows, size = x_TE.shape[0], self.shape.size
        query, key = self.shape.heads * size, self.shape.kv_heads * size
        qkv_TW = self.block.attention_in(x_TE)
        out_THD = attend(
            self.index,
            qkv_TW[:, :query].view(rows, -1, size),
            qkv_TW[:, query : query + key].view(rows, -1, size),
            qkv_TW[:, query + key :].view(rows, -1, size),
            position_T,
        )
        return self.block.attention_out(out_THD.reshape(rows, query), x_TE)

    def mlp(self, x_TE: Tensor) -> Tensor:
        """The feed-forward half; a new tensor."""
        return self.block.mlp(x_TE.contiguous())


def native_layers(decoder: Decoder) -> tuple[NativeLayer, ...] | None:
    """The decoder's layers on the native library, or None when one of their linears is not packed for it."""
    layers = [cast(DecoderLayer, layer) for layer in decoder.layers]
    linears = (getattr(layer, name) for layer in layers for name in LAYER_LINEARS)
    norms = (m.weight for layer in layers for m in layer.children() if isinstance(m, nn.RMSNorm))
    if not all(isinstance(linear, KernelLinear) for linear in linears):
        return None
    if not all(weight.dtype is torch.float32 and weight.is_contiguous() for weight in norms):
        return None
    return tuple(NativeLayer(layer, decoder.config.norm_eps) for layer in layers)


class NativeStack:
    """A whole step of a decoder in one native call: plain pages, every layer reading what a schedule says."""

    def __init__(self, decoder: Decoder, layers: Sequence[NativeLayer], format: KVFormat) -> None:
        config, count = decoder.config, decoder.config.num_layers
        pages = [cast(KVPages, format.pages(layer)) for layer in range(count)]
        ropes, specs = (
            [decoder.rope(layer) for layer in range(count)],
            [config.attention(i) for i in range(count)],
        )
        # The first layer of each kind stands for all of them.
        self.rope_layers = [i for i, rope in enumerate(ropes) if ropes.index(rope) == i]
        self.spec_layers = [i for i, spec in enumerate(specs) if specs.index(spec) == i]
        self.stack = Stack(
            [layer.block for layer in layers],
            [page.k_NGPD for page in pages],
            [page.v_NGPD for page in pages],
            [self.rope_layers.index(ropes.index(rope)) for rope in ropes],
            [self.spec_layers.index(specs.index(spec)) for spec in specs],
        )
