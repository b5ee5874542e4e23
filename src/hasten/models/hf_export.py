"""Writing a Hugging Face folder: configuration, tensor names and tokenizer files that `transformers` reads back.

The reverse of `hasten.models.config_hf` and `hasten.models.hf`: a model read from a GGUF file becomes an ordinary
folder. A configuration that the format cannot express is refused, never approximated.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from hasten.core.errors import UnsupportedError
from hasten.models.checkpoint import FUSED, Checkpoint
from hasten.models.config import DecoderConfig, RopeSpec
from hasten.models.config_hf import ACTIVATIONS, ARCHITECTURES, config_from_hf
from hasten.models.decoder import Decoder
from hasten.models.hf import HFCheckpoint, standard_name
from hasten.models.rope import scaling_kind
from hasten.models.tokenizer import Tokenizer

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
# How the reader treats tensors, not what the model is: the written folder follows the family's own convention.
_READER_FIELDS = ("norm_offset", "extra")


def export_name(name: str, config: DecoderConfig) -> str:
    """The standard name of a tensor or linear: ``layers.3.q_proj`` -> ``model.layers.3.self_attn.q_proj``."""
    return name if name.startswith("lm_head") else "model." + standard_name(name, config.sandwich_norm)


def export_norm_offset(config: DecoderConfig) -> float:
    """What a reader of the written folder adds to norm weights (Gemma stores ``w`` and multiplies by ``1 + w``)."""
    return 1.0 if config.family == "gemma3" else 0.0


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The ``config.json`` of a decoder. Raises `UnsupportedError` naming what Hugging Face's format cannot hold."""
    rope = config.rope
    if rope.scaling and scaling_kind(rope.scaling) == "factors":
        raise UnsupportedError(
            "this model's rotary embedding has explicit frequency factors (from a GGUF file), which config.json "
            "cannot hold; start from the model's Hugging Face folder"
        )
    gemma = config.family == "gemma3"
    architecture = next(name for name, family in ARCHITECTURES.items() if family == config.family)
    data: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": "gemma3_text" if gemma else config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.shape.heads,
        "num_key_value_heads": config.shape.kv_heads,
        "head_dim": config.shape.size,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.qkv_bias,
        "rope_theta": rope.theta,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids) or None,
        "use_cache": True,
    }
    activation = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation)
    data["hidden_activation" if gemma else "hidden_act"] = activation
    if config.family == "llama":
        data["mlp_bias"] = config.mlp_bias
    if rope.size != config.shape.size:
        data["partial_rotary_factor"] = rope.size / config.shape.size
    if rope.scaling:
        data["rope_scaling"] = dict(rope.scaling)
    if config.family != "llama":
        data["sliding_window"] = config.window
        data["use_sliding_window"] = config.window is not None
        if config.window_layers:
            kinds = ("full_attention", "sliding_attention")
            data["layer_types"] = [kinds[slides] for slides in config.window_layers]
    if gemma:
        scalar = round((config.attention_scale or config.shape.size**-0.5) ** -2, 6)
        data["query_pre_attn_scalar"] = int(scalar) if scalar == int(scalar) else scalar
        data["attn_logit_softcapping"] = config.attention_softcap
        data["final_logit_softcapping"] = config.logit_softcap
        if isinstance(config.local_rope, RopeSpec):
            data["rope_local_base_freq"] = config.local_rope.theta
    read = config_from_hf(data, "config.json")
    lost = [
        field.name
        for field in fields(DecoderConfig)
        if field.name not in _READER_FIELDS and getattr(read, field.name) != getattr(config, field.name)
    ]
    if lost:
        raise UnsupportedError(f"config.json cannot hold this {config.family} model's {', '.join(lost)}")
    return data


def write_config(folder: Path, checkpoint: Checkpoint, extra: dict[str, Any]) -> None:
    """Write ``config.json``: the folder's own if a whole text model came from one, with ``extra`` on top."""
    if (
        isinstance(checkpoint, HFCheckpoint)
        and checkpoint.kept is None
        and "text_config" not in checkpoint.hf_config
    ):
        data = {k: v for k, v in checkpoint.hf_config.items() if k != "quantization_config"}
    else:
        data = config_to_hf(checkpoint.config)
    _write_json(folder / "config.json", data | extra)


def write_tokenizer(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the tokenizer files: copies if the model came from a folder, else built from the GGUF's vocabulary."""
    if isinstance(checkpoint, HFCheckpoint):
        for name in _TOKENIZER_FILES:
            if (checkpoint.path / name).exists():
                shutil.copyfile(checkpoint.path / name, folder / name)
        return
    _save_tokenizer(folder, checkpoint.tokenizer(), checkpoint.config)


def save_decoder(folder: Path, decoder: Decoder, tokenizer: Tokenizer) -> None:
    """Write a trained decoder into an existing folder: configuration, tokenizer, ``model.safetensors`` in float32.

    The fused linears are cut into the tensors of the family's layout. Raises `UnsupportedError` for a configuration
    that the format cannot hold.
    """
    config = decoder.config
    tensors: dict[str, Tensor] = {}
    state = decoder.state_dict()
    for module, parts in _modules(config).items():
        start = 0
        for part, rows in parts:
            for kind in ("weight", "bias"):
                if (whole := state.get(f"{module}.{kind}")) is not None:
                    piece = whole[start : start + rows].float()
                    offset = export_norm_offset(config) if part.rpartition(".")[2].endswith("norm") else 0.0
                    name = f"{export_name(part, config)}.{kind}"
                    tensors[name] = (piece - offset if offset else piece).contiguous()
            start += rows
    _write_json(folder / "config.json", config_to_hf(config) | {"torch_dtype": "float32"})
    _save_tokenizer(folder, tokenizer, config)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _modules(config: DecoderConfig) -> dict[str, list[tuple[str, int]]]:
    """The decoder's modules, each with the checkpoint's modules it is made of and their rows, in order."""
    fused = {part: whole for whole, parts in FUSED.items() for part in parts}
    out: dict[str, list[tuple[str, int]]] = {}
    for name, shape in config.tensor_shapes().items():
        part, _, kind = name.rpartition(".")
        if kind == "weight":
            parent, _, leaf = part.rpartition(".")
            module = f"{parent}.{fused[leaf]}" if leaf in fused else part
            out.setdefault(module, []).append((part, shape[0]))
    return out


def _save_tokenizer(folder: Path, tokenizer: Tokenizer, config: DecoderConfig) -> None:
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": tokenizer.adds_bos,
        "model_max_length": config.max_positions,
        "clean_up_tokenization_spaces": False,
        **_special_tokens(tokenizer),
    }
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    _write_json(folder / "tokenizer_config.json", settings)
    generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.eos_ids)}
    _write_json(folder / "generation_config.json", {k: v for k, v in generation.items() if v is not None})


def _special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    ids = {"bos_token": tokenizer.bos_id, "eos_token": next(iter(tokenizer.eos_ids), None)}
    texts = {name: tokenizer.backend.id_to_token(i) for name, i in ids.items() if i is not None}
    return {name: text for name, text in texts.items() if text is not None}


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
