"""The decoder's layers on the native library: same calls as `DecoderLayer`, a handful of kernels per layer.

Layers whose linears are all packed for the native library (`KernelLinear`) run as `NativeLayer`; a decoder with any
other kind of linear keeps its PyTorch layers. Where nothing acts between the layers, `NativeStack` runs a whole step.
While the same sequences decode on the same pages, a `DecodeRound` runs it from token ids to logits.

Legend: T rows, E hidden size, H query heads, G kv heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from hasten.attention.layout import KVPages, StepLayout
from hasten.kernels.block import Block, Norms, Reading, Stack, rms_norm
from hasten.kernels.decode import Ends, Round, Selector
from hasten.kernels.packed import Packed
from hasten.lm.chunk import Chunk
from hasten.lm.kvcache.format import KVFormat
from hasten.models.checkpoint import QuantEmbedding
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


def native_logits(decoder: Decoder, x_TE: Tensor) -> Tensor:
    """`Decoder.logits` with the norm that a `DecodeRound` uses: the same numbers, whichever way a step takes."""
    weight_E = decoder.norm.weight.detach()
    if weight_E.dtype is not torch.float32 or not weight_E.is_contiguous():
        return decoder.logits(x_TE)
    return decoder.head(rms_norm(x_TE.contiguous(), weight_E, decoder.config.norm_eps))


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
        self.ends = _ends(decoder)
        self.ropes = [ropes[layer] for layer in self.rope_layers]
        self.windows = [specs[layer].window for layer in self.spec_layers]

    def round(
        self,
        chunks: Sequence[Chunk],
        layout: StepLayout,
        readings: Sequence[Reading],
        selectors: Sequence[Selector | None],
    ) -> DecodeRound | None:
        """What continues the step just planned, if every sequence brought one row and asked for its logits."""
        if self.ends is None or any(rope.dynamic for rope in self.ropes):
            return None
        if any(len(c.token_ids) != 1 or c.logits != 1 for c in chunks):
            return None
        return DecodeRound(self, chunks, layout, readings, selectors)


class DecodeRound:
    """Steps that continue one another: the same sequences, each bringing one row, on the pages they had before and
    the next ones."""

    def __init__(
        self,
        native: NativeStack,
        chunks: Sequence[Chunk],
        layout: StepLayout,
        readings: Sequence[Reading],
        selectors: Sequence[Selector | None],
    ) -> None:
        assert native.ends is not None
        self.ropes, self.page = native.ropes, layout.page_size
        self.selectors = selectors
        self.budgets = {selector.budget for selector in selectors if selector is not None}
        self.ids = [chunk.kv.id for chunk in chunks]
        self.pages = [chunk.kv.pages[: chunk.start // self.page + 1] for chunk in chunks]
        parts = list(zip(readings, native.windows, strict=True))
        self.round = Round(native.stack, native.ends, parts, layout.page_table_SM, selectors)

    def run(self, chunks: Sequence[Chunk]) -> tuple[Tensor, list[int]] | None:
        """Logits float32 [T, V] and each row's best token (-1: not finite); None if the chunks do not continue."""
        if len(chunks) != len(self.ids):
            return None
        page, ids, positions, slots, lengths = self.page, [], [], [], []
        grown: list[int] = []
        for row, (chunk, known, pages) in enumerate(zip(chunks, self.ids, self.pages, strict=True)):
            kv, start, count = chunk.kv, chunk.start, len(pages)
            if kv.id != known or len(chunk.token_ids) != 1 or chunk.logits != 1 or kv.pages[:count] != pages:
                return None
            if chunk.embeddings_TE is not None or kv.missing is not None or (chunk.prompt and self.selectors):
                return None
            at = start // page
            if at == count and start % page == 0:
                grown.append(row)
            elif at + 1 != count:
                return None
            ids.append(chunk.token_ids[0])
            positions.append(chunk.positions[0])
            slots.append(kv.pages[at] * page + start % page)
            lengths.append(start + 1)
        if any(min(lengths) <= budget < max(lengths) for budget in self.budgets):
            return None  # some rows choose and others do not
        for row in grown:
            at = len(self.pages[row])
            self.pages[row].append(chunks[row].kv.pages[at])
            if not self.round.extend(row, at, self.pages[row][at]):
                return None
        top = max(positions) + 1
        return self.round.step(ids, positions, slots, lengths, [rope.whole(top) for rope in self.ropes])


def _ends(decoder: Decoder) -> Ends | None:
    """Embedding, final norm and head on the native library; None for those it does not know."""
    config, head, embedding = decoder.config, decoder.lm_head, decoder.embed_tokens
    norm_E = decoder.norm.weight.detach()
    if (
        not isinstance(head, KernelLinear)
        or config.logit_softcap is not None
        or norm_E.dtype is not torch.float32
    ):
        return None
    table: Tensor | Packed
    if isinstance(embedding, QuantEmbedding):
        # The table stays as the file stores it; the head holds the same numbers where the two are tied.
        if not (config.tie_embeddings and head.exact and head.inputs == embedding.inputs):
            return None
        table = head.kernel()
    elif isinstance(embedding, nn.Embedding):
        table = embedding.weight.detach()
        if table.dtype not in (torch.float32, torch.bfloat16) or not table.is_contiguous():
            return None
    else:
        return None
    if head.outputs != config.vocab_size:
        return None
    return Ends(table, norm_E, head.kernel(), scale=config.embedding_scale, eps=config.norm_eps)
