"""Checkpoints: where a decoder's weights, tokenizer and shape come from, behind one interface.

Tensors go by hasten's names, unfused (``layers.3.q_proj.weight``; see `DecoderConfig.tensor_shapes`), linears by the
decoder's (``layers.3.qkv_proj``). Files are memory-mapped; a tensor is read, checked for NaN and infinity and
converted when asked for, never before.

Legend: O outputs, I inputs, B bytes, V vocabulary, E hidden size.
"""

from __future__ import annotations

import copy
import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self, cast

import torch
from torch import Tensor, nn

from hasten.core.errors import IntegrityError, ModelError, ModelFormatError
from hasten.models.config import DecoderConfig

if TYPE_CHECKING:
    from hasten.models.decoder import Decoder
    from hasten.models.tokenizer import Tokenizer

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""The decoder's fused linears and the checkpoint's tensors they are made of, in row order."""

_HASH_WHOLE = 512 << 20
_SAMPLE = 1 << 20


@dataclass(frozen=True)
class QuantBlocks:
    """Raw quantised rows as a checkpoint stores them: ``data`` uint8 [O, bytes per row], ggml type name."""

    kind: str  # "Q4_1", "Q8_0", ...
    data_OB: Tensor
    inputs: int


@dataclass(frozen=True)
class LinearSource(ABC):
    """Where a packed layer comes from.

    name: the module's path, e.g. ``layers.3.qkv_proj``.
    blocks: the raw quantised parts in row order (one per fused checkpoint tensor), or None when any part is
        plain floating point.
    """

    name: str
    outputs: int
    inputs: int
    blocks: tuple[QuantBlocks, ...] | None
    bias_O: Tensor | None

    @abstractmethod
    def dense(self) -> Tensor:
        """The exact float32 weight [O, I], dequantised if the checkpoint is quantised."""


@dataclass(frozen=True)
class CheckpointLinear(LinearSource):
    """A linear of a checkpoint: ``parts`` are the checkpoint's names (without ``.weight``) in row order."""

    checkpoint: Checkpoint = field(repr=False)
    parts: tuple[str, ...]

    def dense(self) -> Tensor:
        """The parts' float32 weights, one under the other. Raises `IntegrityError` on NaN or infinity."""
        return _stack([self.checkpoint.tensor(f"{part}.weight") for part in self.parts])


def _stack(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class Checkpoint(ABC):
    """The weights of one model as stored in ``path``. Readers implement `stored` and the abstract members.

    kept: with blocks left out (`keeping`), the file's numbers of the layers, in order; None when all are there.
    """

    path: Path
    config: DecoderConfig
    kept: tuple[int, ...] | None = None

    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The hasten names of the tensors present and used (a tied LM head is not listed)."""

    @abstractmethod
    def files(self) -> tuple[Path, ...]:
        """The weight files."""

    @abstractmethod
    def stored(self, name: str) -> Tensor | QuantBlocks:
        """A tensor as stored, rows in the decoder's order, unchecked; views into the mapped file where possible."""

    @abstractmethod
    def dequantize(self, blocks: QuantBlocks) -> Tensor:
        """Float32 rows of quantised blocks."""

    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The tokenizer with its chat template. Raises `ModelError` if there is none or it does not fit."""

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return self.config.tensor_shapes()

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the weights' bytes: all of them up to 512 MiB, else sizes, heads and 64 spread samples."""
        digest = hashlib.sha256()
        files = self.files()
        total = sum(file.stat().st_size for file in files)
        for file in files:
            size = file.stat().st_size
            digest.update(f"{file.name if len(files) > 1 else ''}:{size};".encode())
            with file.open("rb") as stream:
                if total <= _HASH_WHOLE:
                    while chunk := stream.read(_SAMPLE):
                        digest.update(chunk)
                else:
                    for index in range(64):
                        stream.seek((size - min(size, _SAMPLE)) * index // 63)
                        digest.update(stream.read(_SAMPLE))
        return digest.hexdigest()

    def keeping(self, layers: Sequence[int]) -> Self:
        """The same model with only ``layers`` (ascending), renumbered from 0; a view that copies no weights.

        Its `config` and `fingerprint` are those of the smaller model. Raises `ModelError` as `DecoderConfig.keeping`.
        """
        config = self.config.keeping(layers)
        if config.num_layers == self.config.num_layers:
            return self
        view = copy.copy(self)
        view.__dict__.pop("_shapes", None)
        view.config, view.kept = config, tuple(self._file_layer(layer) for layer in layers)
        whole = self.fingerprint
        view.__dict__["fingerprint"] = hashlib.sha256(f"{whole} layers {list(layers)}".encode()).hexdigest()
        return view

    def _file_layer(self, layer: int) -> int:
        return layer if self.kept is None else self.kept[layer]

    def in_file(self, name: str) -> str:
        """The name with the file's layer number: what a reader looks up (``layers.3.q_proj`` if 2 was left out)."""
        if self.kept is None:
            return name
        return re.sub(r"^layers\.(\d+)\.", lambda found: f"layers.{self._file_layer(int(found[1]))}.", name)

    def has(self, name: str) -> bool:
        """Whether `tensor` would find ``name``."""
        return self._resolve(name) in self.names()

    def _resolve(self, name: str) -> str:
        return "embed_tokens.weight" if name == "lm_head.weight" and self.config.tie_embeddings else name

    def tensor(self, name: str) -> Tensor:
        """The exact float32 value of a tensor, in memory of its own.

        Raises `KeyError` if absent, `IntegrityError` on NaN or infinity.
        """
        blocks = self.blocks(name)
        if blocks is not None:
            return self.dequantize(blocks)
        value = cast(Tensor, self.stored(self._resolve(name))).to(torch.float32, copy=True)
        if name.endswith("norm.weight") and self.config.norm_offset:
            value += self.config.norm_offset
        # A finite sum proves finite terms (NaN and infinity survive addition); only an overflow needs the full check.
        if not torch.isfinite(value.sum()) and not bool(torch.isfinite(value).all()):
            self._refuse_nonfinite(name)
        return value

    def blocks(self, name: str) -> QuantBlocks | None:
        """The raw quantised rows of a tensor, or None if it is plain. Raises `IntegrityError` on bad scales."""
        stored = self.stored(self._resolve(name))
        if not isinstance(stored, QuantBlocks):
            return None
        if not finite_scales(stored):
            self._refuse_nonfinite(name)
        return stored

    def _refuse_nonfinite(self, name: str) -> None:
        raise IntegrityError(
            f"{self.path}: tensor {name!r} holds NaN or infinity; fetch or convert the model again"
        )

    def parts(self, linear: str) -> tuple[str, ...]:
        """The checkpoint's linears that the decoder's ``linear`` fuses: ``layers.3.qkv_proj`` -> q, k, v."""
        parent, _, leaf = linear.rpartition(".")
        return tuple(f"{parent}.{part}" for part in FUSED[leaf]) if leaf in FUSED else (linear,)

    def linear(self, name: str) -> LinearSource:
        """The source of one of the decoder's linears (``layers.3.qkv_proj``, ``lm_head``)."""
        parts = self.parts(name)
        shapes = self._shapes
        sizes = [shapes[self._resolve(f"{part}.weight")] for part in parts]
        blocks = [self.blocks(f"{part}.weight") for part in parts]
        biased = f"{parts[0]}.bias" in shapes
        return CheckpointLinear(
            name=name,
            outputs=sum(outputs for outputs, _ in sizes),
            inputs=sizes[0][1],
            blocks=None if None in blocks else cast(tuple[QuantBlocks, ...], tuple(blocks)),
            bias_O=_stack([self.tensor(f"{part}.bias") for part in parts]) if biased else None,
            checkpoint=self,
            parts=parts,
        )

    def check_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Compare the file's tensor shapes with the configuration's. Raises `ModelFormatError` naming the first."""
        for name, expected in self._shapes.items():
            found = shapes.get(name)
            if found is None:
                raise ModelFormatError(f"{self.path}: tensor {name!r} of shape {expected} is missing")
            if found != expected:
                raise ModelFormatError(
                    f"{self.path}: tensor {name!r} has shape {found}, the configuration says {expected}"
                )

    def check_vocabulary(self, tokenizer: Tokenizer) -> Tokenizer:
        """Refuse a tokenizer that can give ids beyond the embedding (the embedding may be padded)."""
        if tokenizer.vocab_size > self.config.vocab_size:
            raise ModelError(
                f"{self.path}: the tokenizer has {tokenizer.vocab_size} tokens but the embedding only "
                f"{self.config.vocab_size} rows; the tokenizer belongs to another model"
            )
        return tokenizer


# Where the float16 scales lie in a block: (bytes per block, offsets).
_SCALES = {
    "Q4_0": (18, (0,)),
    "Q4_1": (20, (0, 2)),
    "Q5_0": (22, (0,)),
    "Q5_1": (24, (0, 2)),
    "Q8_0": (34, (0,)),
    "Q4_K": (144, (0, 2)),
    "Q5_K": (176, (0, 2)),
    "Q6_K": (210, (208,)),
}


def finite_scales(blocks: QuantBlocks) -> bool:
    """Whether every scale of the blocks is finite; the codes are integers, so nothing else can be NaN."""
    size, offsets = _SCALES[blocks.kind]
    half_NX = blocks.data_OB.reshape(-1, size).view(torch.float16)
    return all(bool(torch.isfinite(half_NX[:, offset // 2]).all()) for offset in offsets)


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a Hugging Face folder (safetensors, one file or shards) or a ``.gguf`` file.

    Raises `ModelError` (not found, unsupported architecture) or `ModelFormatError` (truncated, malformed, pickle).
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise ModelError(f"no model at {path}")
    if path.is_dir():
        from hasten.models.hf import HFCheckpoint

        ggufs = sorted(path.glob("*.gguf"))
        if not (path / "config.json").exists() and len(ggufs) == 1:
            return open_checkpoint(ggufs[0])
        return HFCheckpoint(path)
    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic == b"GGUF" or path.suffix == ".gguf":
        from hasten.models.gguf_checkpoint import GGUFCheckpoint

        return GGUFCheckpoint(path)
    if path.suffix == ".safetensors":
        raise ModelError(f"{path}: give the folder that holds this file, its config.json and its tokenizer")
    if path.suffix in PICKLE_SUFFIXES or magic[:2] == b"PK" or magic[:1] == b"\x80":
        raise ModelFormatError(
            f"{path}: a pickle can run code when it is read; convert the model to safetensors or GGUF"
        )
    raise ModelFormatError(f"{path}: neither a GGUF file nor a Hugging Face folder with safetensors")


PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class QuantEmbedding(nn.Module):
    """An embedding table that stays quantised; the rows asked for are dequantised on look-up, exactly."""

    def __init__(self, blocks: QuantBlocks, dequantize: Callable[[QuantBlocks], Tensor]) -> None:
        super().__init__()
        self.kind, self.inputs, self._dequantize = blocks.kind, blocks.inputs, dequantize
        self.register_buffer("data_VB", blocks.data_OB, persistent=False)

    def forward(self, token_ids_T: Tensor) -> Tensor:
        """Rows float32 [..., E]."""
        rows = cast(Tensor, self.data_VB)[token_ids_T.reshape(-1)]
        return self._dequantize(QuantBlocks(self.kind, rows, self.inputs)).view(
            *token_ids_T.shape, self.inputs
        )


def load_decoder(
    checkpoint: Checkpoint,
    dtype: torch.dtype = torch.float32,
    pack: Callable[[LinearSource], nn.Module] | None = None,
) -> Decoder:
    """The checkpoint's decoder, in eval mode.

    Without ``pack`` every linear is plain and trainable, stored in ``dtype``. With it every linear and the LM head
    comes from ``pack(source)``, one at a time, so the dense model never exists as a whole; the embedding then stays
    quantised if the checkpoint's is. Norms are float32 always.
    Raises `IntegrityError` naming the tensor if a weight is NaN or infinite.
    """
    from hasten.models.decoder import Decoder

    decoder = Decoder(checkpoint.config, device="meta")
    filled = {name: checkpoint.tensor(name) for name, _ in decoder.named_parameters() if "norm" in name}
    table = checkpoint.blocks("embed_tokens.weight") if pack is not None else None
    if table is not None:
        decoder.embed_tokens = QuantEmbedding(table, checkpoint.dequantize)
    else:
        filled["embed_tokens.weight"] = checkpoint.tensor("embed_tokens.weight").to(dtype)
    for name, _ in list(decoder.linears()):
        if pack is not None:
            decoder.set_linear(name, pack(checkpoint.linear(name)))
        elif name != "lm_head" or not checkpoint.config.tie_embeddings:
            source = checkpoint.linear(name)
            filled[f"{name}.weight"] = source.dense().to(dtype)
            if source.bias_O is not None:
                filled[f"{name}.bias"] = source.bias_O.to(dtype)
    for name, value in filled.items():
        parent, _, leaf = name.rpartition(".")
        setattr(decoder.get_submodule(parent), leaf, nn.Parameter(value))
    if pack is None and checkpoint.config.tie_embeddings:
        cast(nn.Linear, decoder.lm_head).weight = cast(nn.Embedding, decoder.embed_tokens).weight
    return decoder.eval()
