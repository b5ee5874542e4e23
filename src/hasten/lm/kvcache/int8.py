"""int8 pages: half the memory of bfloat16, and half of what decoding over a long context has to read.

Symmetric rounding with one float32 scale per token and kv head, keys and values alike. Attention reads the codes where
they lie: the scale of a key multiplies its score, that of a value its probability (`hasten.kernels.pages`).

Legend: T rows of the step, G kv heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.attention.layout import HeadShape, KVPages, StepLayout
from hasten.kernels.pages import TAIL, quantise
from hasten.lm.kvcache.format import PlainKV


class Int8KV(PlainKV):
    """``kv_dtype = "int8"``: pages [N, G, P, D + 4] of int8."""

    def __init__(self) -> None:
        super().__init__()
        self.dtype = torch.int8

    def allocate(self, layers: int, pages: int, page_size: int, shape: HeadShape) -> None:
        size = (pages, shape.kv_heads, page_size, shape.size + TAIL)
        self.layers = [
            KVPages(torch.empty(size, dtype=torch.int8), torch.empty(size, dtype=torch.int8))
            for _ in range(layers)
        ]

    def append(self, layer: int, k_TGD: Tensor, v_TGD: Tensor, layout: StepLayout) -> None:
        super().append(layer, quantise(k_TGD.float()), quantise(v_TGD.float()), layout)

    def page_bytes(self, layers: int, page_size: int, shape: HeadShape) -> int:
        return 2 * layers * shape.kv_heads * page_size * (shape.size + TAIL)


def stored_as(dtype: torch.dtype) -> PlainKV:
    """The format whose pages store float32, bfloat16 or int8 numbers."""
    return Int8KV() if dtype is torch.int8 else PlainKV(dtype)
