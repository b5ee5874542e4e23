"""Checkpoints in GGUF files, quantised or not.

Legend: O outputs, B bytes per row.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from hasten.models.checkpoint import Checkpoint, QuantBlocks
from hasten.models.config_gguf import config_from_gguf
from hasten.models.gguf_file import PLAIN, GGUFFile, dequantize
from hasten.models.tokenizer import Tokenizer

_LAYER_NAMES = {
    "input_norm": "attn_norm",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "post_attention_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "post_mlp_norm": "post_ffw_norm",
}
_TOP_NAMES = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}


class GGUFCheckpoint(Checkpoint):
    """One ``.gguf`` file. Quantised tensors are given as raw blocks and dequantised only on demand.

    Raises `ModelFormatError` (truncated, damaged, tensors that do not fit the metadata), `ModelError` (unsupported
    architecture), `UnsupportedError` (storage types or features that cannot be read).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = GGUFFile(path)
        shapes = {name: tensor.shape for name, tensor in self.file.tensors.items()}
        factors = self.file.read("rope_freqs.weight") if "rope_freqs.weight" in shapes else None
        rope_factors = None if factors is None else tuple(factors.float().tolist())
        self.config = config_from_gguf(self.file.fields, shapes, rope_factors, str(path))
        ours = {name: self.gguf_name(name) for name in self._shapes}
        self.check_shapes({name: shapes[theirs] for name, theirs in ours.items() if theirs in shapes})
        for theirs in ours.values():
            self.file.check_kind(self.file.tensors[theirs])

    def gguf_name(self, name: str) -> str:
        """The file's name of a tensor: ``layers.3.q_proj.weight`` -> ``blk.3.attn_q.weight``."""
        match = re.fullmatch(r"layers\.(\d+)\.(\w+)\.(weight|bias)", self.in_file(name))
        if match is not None and match[2] in _LAYER_NAMES:
            return f"blk.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"
        stem, _, suffix = name.rpartition(".")
        if stem not in _TOP_NAMES:
            raise KeyError(name)
        return f"{_TOP_NAMES[stem]}.{suffix}"

    def names(self) -> tuple[str, ...]:
        """All tensors of the configuration."""
        return tuple(self._shapes)

    def files(self) -> tuple[Path, ...]:
        """The one file."""
        return (self.path,)

    @cached_property
    def _row_orders(self) -> dict[str, Tensor]:
        """Row orders that undo the interleaved RoPE layout of llama-architecture files, for queries and keys.

        Those files store the pair (i, i + D/2) of a head at rows (2i, 2i + 1).
        """
        if self.config.family != "llama":
            return {}
        shape = self.config.shape
        return {
            name: torch.arange(heads * shape.size).view(heads, shape.size // 2, 2).transpose(1, 2).reshape(-1)
            for name, heads in (("q_proj", shape.heads), ("k_proj", shape.kv_heads))
        }

    def stored(self, name: str) -> Tensor | QuantBlocks:
        """A tensor in its stored type; raw blocks if quantised."""
        entry = self.file.tensors[self.gguf_name(name)]
        data = self.file.read(entry.name)
        order = self._row_orders.get(name.rsplit(".", 2)[-2])
        if order is not None:
            data = data[order]
        return data if entry.kind in PLAIN else QuantBlocks(entry.kind, data, entry.shape[-1])

    def dequantize(self, blocks: QuantBlocks) -> Tensor:
        """Float32 [O, I]."""
        return dequantize(blocks.kind, blocks.data_OB, blocks.inputs)

    def tokenizer(self) -> Tokenizer:
        """Built from the file's metadata."""
        from hasten.models.tokenizer_gguf import tokenizer_from_gguf

        return self.check_vocabulary(tokenizer_from_gguf(self.file.fields, str(self.path)))
