"""Hugging Face folders: ``config.json``, safetensors (one file or shards), tokenizer files."""

from __future__ import annotations

import json
import math
import re
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hasten.core.errors import ModelError, ModelFormatError, UnsupportedError
from hasten.models.checkpoint import PICKLE_SUFFIXES, Checkpoint, QuantBlocks
from hasten.models.config_hf import config_from_hf
from hasten.models.gptq_layout import GPTQTensors, StoredSettings, read_linear, stored_settings
from hasten.models.tokenizer import Tokenizer

_PREFIXES = ("model.", "language_model.model.", "model.language_model.", "")
_LAYER_NAMES = {
    "input_norm": "input_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
_SANDWICH_NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}
_FLOATS = {"F32", "F16", "BF16"}
_SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_SIZES |= {"I8": 1, "U8": 1, "BOOL": 1}
_MAX_HEADER = 100 << 20  # safetensors' own limit
QUANT_METHODS = ("gptq",)


def standard_name(name: str, sandwich_norm: bool) -> str:
    """The Hugging Face name, without its prefix, of a tensor or linear: ``layers.3.self_attn.q_proj``."""
    match = re.fullmatch(r"layers\.(\d+)\.(\w+)(\..*)?", name)
    if match is None:
        return name
    index, leaf, suffix = match.groups()
    names = _LAYER_NAMES | (_SANDWICH_NAMES if sandwich_norm else {})
    return f"layers.{index}.{names[leaf]}{suffix or ''}"


class HFCheckpoint(Checkpoint):
    """A folder as `transformers` writes it. ``quantization``: the configuration of a GPTQ model, or None.

    Raises `ModelError` (no configuration, unsupported architecture), `ModelFormatError` (missing shard, truncated or
    corrupt file, pickle, tensors that do not fit the configuration), `UnsupportedError` (unknown quantisation).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hf_config = read_json(path / "config.json", "a model folder needs it")
        self.config = config_from_hf(self.hf_config, str(path / "config.json"))
        generation = path / "generation_config.json"
        self.generation = read_json(generation, "") if generation.exists() else {}
        self.quantization = self._quantization()
        self._file_of: dict[str, Path] = {}
        self._headers: dict[str, dict[str, Any]] = {}
        self._index_files()
        self._open: dict[Path, Any] = {}
        self._prefix = self._find_prefix()
        self._check_tensors()

    def _quantization(self) -> dict[str, Any] | None:
        data = self.hf_config.get("quantization_config")
        if data is None:
            return None
        method = data.get("quant_method") if isinstance(data, dict) else None
        if method not in QUANT_METHODS:
            raise UnsupportedError(
                f"{self.path}: weights quantised with {method!r} cannot be read "
                f"(supported: {', '.join(QUANT_METHODS)}, or any GGUF file of the model)"
            )
        return dict(data)

    def _index_files(self) -> None:
        index = self.path / "model.safetensors.index.json"
        if index.exists():
            weight_map = read_json(index, "").get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ModelFormatError(f"{index}: no 'weight_map' of tensors to shards")
            names = sorted({str(name) for name in weight_map.values()})
            if bad := [name for name in names if Path(name).name != name]:
                raise ModelFormatError(f"{index}: shard {bad[0]!r} lies outside the folder")
            files = [self.path / name for name in names]
            if missing := [file.name for file in files if not file.exists()]:
                raise ModelFormatError(
                    f"{self.path}: {len(missing)} of {len(files)} shards missing: {', '.join(missing)}"
                )
        else:
            weight_map = {}
            files = sorted(self.path.glob("*.safetensors"))
            if len(files) > 1:
                single = self.path / "model.safetensors"
                if not single.exists():
                    raise ModelFormatError(f"{self.path}: several safetensors files but no {index.name}")
                files = [single]
        if not files:
            self._refuse_without_safetensors()
        for file in files:
            for name, entry in read_header(file).items():
                self._headers[name], self._file_of[name] = entry, file
        for name, file in weight_map.items():
            if name not in self._headers:
                raise ModelFormatError(
                    f"{self.path / file}: tensor {name!r} is listed in {index.name} but absent"
                )

    def _refuse_without_safetensors(self) -> None:
        pickles = sorted(file.name for file in self.path.iterdir() if file.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise ModelFormatError(
                f"{self.path}: only pickled weights ({', '.join(pickles[:3])}), which can run code when read; "
                "convert them to safetensors"
            )
        raise ModelFormatError(f"{self.path}: no *.safetensors file")

    def _find_prefix(self) -> str:
        for prefix in _PREFIXES:
            if f"{prefix}embed_tokens.weight" in self._headers:
                return prefix
        raise ModelFormatError(
            f"{self.path}: no tensor 'model.embed_tokens.weight'; is this a language model?"
        )

    def hf_name(self, name: str) -> str:
        """The folder's name of a tensor or linear: ``layers.3.q_proj`` -> ``model.layers.3.self_attn.q_proj``."""
        if name.startswith("lm_head"):
            prefix = "language_model." if self._prefix == "language_model.model." else ""
            return prefix + name
        return self._prefix + standard_name(self.in_file(name), self.config.sandwich_norm)

    def _check_tensors(self) -> None:
        found: dict[str, tuple[int, ...]] = {}
        for name, shape in self._shapes.items():
            stem = self.hf_name(name.removesuffix(".weight"))
            if self.quantization is not None and f"{stem}.qweight" in self._headers:
                found[name] = shape  # packed: the reader of this quantisation checks it
                continue
            entry = self._headers.get(self.hf_name(name))
            if entry is None:
                continue
            if entry["dtype"] not in _FLOATS:
                raise UnsupportedError(
                    f"{self.path}: tensor {self.hf_name(name)!r} is stored as {entry['dtype']} "
                    f"(supported: {', '.join(sorted(_FLOATS))})"
                )
            found[name] = tuple(entry["shape"])
        self.check_shapes(found)

    def names(self) -> tuple[str, ...]:
        """The hasten names of the tensors; those of GPTQ-packed weights are left out (read them with `raw`)."""
        return tuple(name for name in self._shapes if self.hf_name(name) in self._headers)

    def raw_names(self) -> tuple[str, ...]:
        """Every tensor name in the folder, as stored."""
        return tuple(self._headers)

    def raw(self, name: str) -> Tensor:
        """A tensor by its own name, dtype and shape as stored, unchecked. Raises `KeyError` if absent."""
        file = self._file_of[name]
        if file not in self._open:
            try:
                self._open[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelFormatError(f"{file}: {error}") from error
        tensor: Tensor = self._open[file].get_tensor(name)
        return tensor

    def files(self) -> tuple[Path, ...]:
        """The safetensors files in name order."""
        return tuple(sorted(set(self._file_of.values())))

    def stored(self, name: str) -> Tensor:
        """A tensor in its stored floating-point type; float32 if it is GPTQ-packed."""
        theirs = self.hf_name(name)
        if theirs in self._headers:
            return self.raw(theirs)
        packed = self.gptq_linear(name.removesuffix(".weight"))
        if packed is None:
            raise KeyError(name)
        return packed.dequantize()

    def blocks(self, name: str) -> QuantBlocks | None:
        """Always None: safetensors hold no ggml blocks."""
        return None

    @cached_property
    def gptq(self) -> StoredSettings | None:
        """How the GPTQ-packed linears are stored; None if the folder holds none."""
        return None if self.quantization is None else stored_settings(self.quantization, str(self.path))

    def gptq_linear(self, name: str) -> GPTQTensors | None:
        """The codes, scales and zeros of an unfused linear (``layers.3.q_proj``); None if it is not packed.

        Raises `ModelFormatError`, `IntegrityError` or `UnsupportedError` as `read_linear` does.
        """
        theirs = self.hf_name(name)
        if self.gptq is None or f"{theirs}.qweight" not in self._headers:
            return None

        def find(leaf: str) -> Tensor | None:
            return self.raw(f"{theirs}.{leaf}") if f"{theirs}.{leaf}" in self._headers else None

        bias_O = find("bias")
        if bias_O is not None and f"{name}.bias" not in self._shapes and bool(bias_O.any()):
            raise ModelFormatError(
                f"{self.path}: '{theirs}.bias' is not zero, but this family has no bias there"
            )
        outputs, inputs = self._shapes[f"{name}.weight"]
        return read_linear(find, f"{self.path}: {theirs}", outputs, inputs, self.gptq)

    def dequantize(self, blocks: QuantBlocks) -> Tensor:
        """Never called: safetensors hold no ggml blocks."""
        raise UnsupportedError(f"{self.path}: no {blocks.kind} blocks in a safetensors folder")

    def tokenizer(self) -> Tokenizer:
        """From ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.*``."""
        from hasten.models.tokenizer_hf import tokenizer_from_folder

        eos = self.generation.get("eos_token_id")
        eos_ids = (
            tuple(eos) if isinstance(eos, list) else (eos,) if isinstance(eos, int) else self.config.eos_ids
        )
        return self.check_vocabulary(tokenizer_from_folder(self.path, eos_ids, self.config.bos_id))


def read_json(path: Path, why: str) -> dict[str, Any]:
    """A JSON object from a file. Raises `ModelError` if there is none, `ModelFormatError` if it is not one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.parent}: no {path.name}" + (f"; {why}" if why else "")) from None
    except ValueError as error:  # JSON or UTF-8
        raise ModelFormatError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ModelFormatError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """A safetensors file's table: name -> dtype, shape, data_offsets. Raises `ModelFormatError` if it cannot hold."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > _MAX_HEADER or 8 + length > size:
            raise ModelFormatError(
                f"{path}: a header of {length} bytes does not fit a file of {size} bytes; truncated or not safetensors"
            )
        try:
            table = json.loads(stream.read(length))
        except ValueError as error:
            raise ModelFormatError(f"{path}: corrupt safetensors header: {error}") from error
    if not isinstance(table, dict):
        raise ModelFormatError(f"{path}: corrupt safetensors header: not an object")
    table.pop("__metadata__", None)
    for name, entry in table.items():
        try:
            start, end = (int(offset) for offset in entry["data_offsets"])
            shape = tuple(int(extent) for extent in entry["shape"])
            dtype = str(entry["dtype"])
        except (KeyError, TypeError, ValueError) as error:
            raise ModelFormatError(f"{path}: corrupt safetensors header at tensor {name!r}") from error
        if not 0 <= start <= end or 8 + length + end > size:
            raise ModelFormatError(
                f"{path}: tensor {name!r} ends at byte {8 + length + end} of a file of {size}; truncated"
            )
        if dtype in _SIZES and end - start != math.prod(shape) * _SIZES[dtype]:
            raise ModelFormatError(
                f"{path}: tensor {name!r} of shape {shape} and type {dtype} does not take {end - start} bytes"
            )
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, end)}
    return table
