"""Tiny random model folders with a byte-level tokenizer, and build contexts for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import save_file

from hasten.models.checkpoint import open_checkpoint
from hasten.models.config import DecoderConfig, HeadShape, RopeSpec
from hasten.models.context import BuildContext
from hasten.models.hf_export import config_to_hf, export_name

LLAMA = DecoderConfig(
    family="llama",
    vocab_size=256,
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    shape=HeadShape(heads=4, kv_heads=2, size=16),
    max_positions=128,
    rope=RopeSpec(10000.0, 16),
    eos_ids=(0,),
)
QWEN = replace(LLAMA, family="qwen2", qkv_bias=True, norm_eps=1e-6)
TIED = replace(LLAMA, tie_embeddings=True)


def write_model(folder: Path, config: DecoderConfig = LLAMA, seed: int = 0, dtype=torch.float32) -> Path:
    """A random model of ``config`` as an ordinary Hugging Face folder."""
    folder.mkdir(parents=True)
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in config.tensor_shapes().items():
        value = torch.randn(shape, generator=random)
        if "norm" in name:
            value = 1 + 0.1 * value
        elif name.endswith("proj.weight") or name.startswith("lm_head"):
            value = value * 1.5 * shape[-1] ** -0.5
        elif name.endswith("bias"):
            value = value * 0.2
        tensors[export_name(name, config)] = value.to(dtype)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_to_hf(config)))
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    return folder


def random_documents(count: int = 4, length: int = 60, seed: int = 3) -> list[list[int]]:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, length), generator=random).tolist()


def context(folder: Path, calibration: Sequence[Sequence[int]] | None = None) -> BuildContext:
    """The build context of a model folder, artefacts beside it; its own random calibration data by default."""
    checkpoint = open_checkpoint(folder)
    given = random_documents() if calibration is None else calibration
    return BuildContext.of(checkpoint, folder.parent / "artefacts", calibration=given)
