"""GPTQ weights in Hugging Face folders: packing what a folder holds, and writing such a folder.

Legend: I inputs, O outputs, G groups.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hasten import __version__
from hasten.core.errors import SettingError, UnsupportedError
from hasten.models.checkpoint import Checkpoint, CheckpointLinear, LinearSource
from hasten.models.decoder import LAYER_LINEARS
from hasten.models.gptq_layout import GPTQTensors, StoredSettings, write_linear
from hasten.models.hf import HFCheckpoint
from hasten.models.hf_export import export_name, export_norm_offset, write_config, write_tokenizer
from hasten.weights.format import PackedLinear
from hasten.weights.gptq_grid import UniformGrid
from hasten.weights.gptq_pack import pack_uniform
from hasten.weights.gptq_sweep import QuantizedWeight
from hasten.weights.packed import StackedLinear


def stored_gptq(checkpoint: Checkpoint) -> StoredSettings | None:
    """How a model's GPTQ weights are stored; None if it has none. Raises `UnsupportedError` for unknown layouts."""
    return checkpoint.gptq if isinstance(checkpoint, HFCheckpoint) else None


def stored_linear(source: LinearSource) -> PackedLinear | None:
    """The packed layer of a linear that the model folder holds as GPTQ weights; None if it holds it otherwise.

    Raises `ModelFormatError` or `IntegrityError` for damaged tensors, `UnsupportedError` when only some of the
    linears that hasten fuses are packed.
    """
    checkpoint = source.checkpoint if isinstance(source, CheckpointLinear) else None
    if not isinstance(checkpoint, HFCheckpoint) or checkpoint.gptq is None:
        return None
    names = checkpoint.parts(source.name)
    tensors = [checkpoint.gptq_linear(name) for name in names]
    packed = [part for part in tensors if part is not None]
    if not packed:
        return None
    if len(packed) < len(tensors):
        plain = ", ".join(name for name, part in zip(names, tensors, strict=True) if part is None)
        raise UnsupportedError(
            f"{checkpoint.path}: {plain} is not GPTQ-packed but its neighbours are; quantise all linears that share "
            "an input, or none"
        )
    weights = [_weight(part, checkpoint.gptq) for part in packed]
    if all(torch.equal(weight.group_I, weights[0].group_I) for weight in weights[1:]):
        return pack_uniform(_stack(weights), source.bias_O)
    sizes = [weight.codes_OI.shape[0] for weight in weights]
    biases = [None] * len(sizes) if source.bias_O is None else list(source.bias_O.split(sizes))
    return StackedLinear(
        [pack_uniform(weight, bias_O) for weight, bias_O in zip(weights, biases, strict=True)]
    )


def _weight(part: GPTQTensors, settings: StoredSettings) -> QuantizedWeight:
    grid = UniformGrid(part.bits, settings.symmetric)
    return QuantizedWeight(grid, part.codes_OI, part.scale_OG, part.zero_OG.to(torch.float32), part.group_I)


def _stack(weights: list[QuantizedWeight]) -> QuantizedWeight:
    """Weights on one grid with one grouping, one under the other."""
    first = weights[0]
    return QuantizedWeight(
        first.grid,
        torch.cat([weight.codes_OI for weight in weights]),
        torch.cat([weight.a_OG for weight in weights]),
        torch.cat([weight.b_OG for weight in weights]),
        first.group_I,
    )


def save_gptq(
    folder: Path | str,
    checkpoint: Checkpoint,
    weight_of: Callable[[str], QuantizedWeight],
    settings: Mapping[str, Any],
) -> Path:
    """Write a Hugging Face folder with GPTQ weights; return its path. Appears at once or not at all.

    weight_of: the quantised weight of a (fused) linear such as ``layers.3.qkv_proj``. settings: bits, group_size
    (-1: whole row), symmetric, act_order, static_groups, true_sequential, percdamp. Everything that is not a linear
    of a block is stored exactly: as it was in a folder, in float32 if it came from a GGUF file. Symmetric weights are
    written in the original layout, asymmetric ones as "gptq_v2", whose zero points have no gap at 0.
    Raises `SettingError` if ``folder`` is not empty, `UnsupportedError` for ternary weights or shapes that the layout
    cannot hold.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SettingError(f"{folder} exists and is not an empty folder; choose another name")
    if settings["bits"] not in (2, 3, 4, 8):
        raise UnsupportedError(
            f"the GPTQ checkpoint layout cannot hold {settings['bits']} weights; use 2, 3, 4 or 8 bits"
        )
    v2 = not settings["symmetric"]
    tensors = _plain_tensors(checkpoint)
    shapes = checkpoint.config.tensor_shapes()
    for index in range(checkpoint.config.num_layers):
        for leaf in LAYER_LINEARS:
            weight, start = weight_of(f"layers.{index}.{leaf}"), 0
            for part in checkpoint.parts(f"layers.{index}.{leaf}"):
                stop = start + shapes[f"{part}.weight"][0]
                name = export_name(part, checkpoint.config)
                tensors |= {
                    f"{name}.{k}": v for k, v in write_linear(_tensors(weight.rows(start, stop)), v2).items()
                }
                start = stop
    quantization = {
        "quant_method": "gptq",
        "bits": settings["bits"],
        "group_size": settings["group_size"],
        "sym": settings["symmetric"],
        "desc_act": settings["act_order"] and not settings["static_groups"] and settings["group_size"] != -1,
        "static_groups": settings["static_groups"],
        "true_sequential": settings["true_sequential"],
        "damp_percent": settings["percdamp"],
        "checkpoint_format": "gptq_v2" if v2 else "gptq",
        "lm_head": False,
        "meta": {"quantizer": [f"hasten:{__version__}"]},
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        extra: dict[str, Any] = {"quantization_config": quantization}
        if not isinstance(checkpoint, HFCheckpoint):
            extra["torch_dtype"] = "float32"
        write_config(building, checkpoint, extra)
        write_tokenizer(building, checkpoint)
        save_file(tensors, building / "model.safetensors", {"format": "pt"})
        if folder.exists():
            folder.rmdir()
        os.rename(building, folder)
        folder.chmod(0o755)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _tensors(weight: QuantizedWeight) -> GPTQTensors:
    assert isinstance(weight.grid, UniformGrid)
    return GPTQTensors(
        weight.grid.bits, weight.codes_OI, weight.a_OG, weight.b_OG.to(torch.uint8), weight.group_I
    )


def _plain_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Embedding, norms, biases and an untied head by Hugging Face name, exactly as a reader will want them."""
    config = checkpoint.config
    out: dict[str, Tensor] = {}
    for name in config.tensor_shapes():
        leaf = name.split(".")[-2]
        if leaf.endswith("_proj") and name.endswith(".weight"):
            continue
        if isinstance(checkpoint, HFCheckpoint):
            value = checkpoint.stored(name)
        else:
            value = checkpoint.tensor(name)
            if leaf.endswith("norm"):
                value = value - export_norm_offset(config)
        out[export_name(name, config)] = value.contiguous()
    return out
