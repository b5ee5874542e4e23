"""Storage that an attention policy keeps beside the KV pages (`SidecarSpec`): same page ids, same life.

Legend: N pages, G kv heads, P page size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hasten.attention.policy import SidecarSpec
from hasten.core.errors import UnsupportedError
from hasten.models.config import HeadShape


def page_bytes(specs: Sequence[SidecarSpec], layers: int, page_size: int, shape: HeadShape) -> int:
    """Bytes that all sidecars of one page take, over all layers."""
    total = 0
    for spec in specs:
        count = layers if spec.layers is None else len(spec.layers)
        total += count * _numel(_page_shape(spec, page_size, shape)) * spec.dtype.itemsize
    return total


class Sidecars:
    """The tensors: ``tensors[name][layer]`` is [N, G, P, *shape] (per token), [N, G, *shape] (per page) or
    [N, G, P / B, *shape] (per B tokens).

    Content starts undefined, like a page: what a policy reads it has written in `on_append`.
    """

    def __init__(
        self, specs: Sequence[SidecarSpec], layers: int, pages: int, page_size: int, shape: HeadShape
    ) -> None:
        self.tensors: dict[str, dict[int, Tensor]] = {}
        for spec in specs:
            if spec.name in self.tensors:
                raise UnsupportedError(f"two sidecars are called {spec.name!r}; give them different names")
            size = (pages, *_page_shape(spec, page_size, shape))
            chosen = range(layers) if spec.layers is None else spec.layers
            self.tensors[spec.name] = {layer: torch.empty(size, dtype=spec.dtype) for layer in chosen}

    @property
    def by_name(self) -> Mapping[str, Mapping[int, Tensor]]:
        return self.tensors

    def copy_page(self, source: int, target: int) -> None:
        for layers in self.tensors.values():
            for tensor in layers.values():
                tensor[target] = tensor[source]

    def read_page(self, page: int) -> list[Tensor]:
        """What is kept beside a page, in a fixed order (see `KVFormat.read_page`)."""
        return [tensor[page].clone() for layers in self.tensors.values() for tensor in layers.values()]

    def write_page(self, page: int, content: Sequence[Tensor]) -> None:
        """Put beside a page what `read_page` gave."""
        own = [tensor for layers in self.tensors.values() for tensor in layers.values()]
        for tensor, value in zip(own, content, strict=True):
            tensor[page] = value


def _page_shape(spec: SidecarSpec, page_size: int, shape: HeadShape) -> tuple[int, ...]:
    if spec.per == "token":
        return (shape.kv_heads, page_size, *spec.shape)
    if spec.per == "page":
        return (shape.kv_heads, *spec.shape)
    if isinstance(spec.per, int) and spec.per > 0:
        if page_size % spec.per:
            raise UnsupportedError(
                f"{spec.name} keeps blocks of {spec.per} tokens, which pages of {page_size} tokens do not hold whole; "
                f"set page_size to a multiple of {spec.per}"
            )
        return (shape.kv_heads, page_size // spec.per, *spec.shape)
    raise UnsupportedError(
        f"sidecar {spec.name!r}: per = {spec.per!r} must be 'token', 'page' or a number of tokens"
    )


def _numel(shape: tuple[int, ...]) -> int:
    out = 1
    for size in shape:
        out *= size
    return out
