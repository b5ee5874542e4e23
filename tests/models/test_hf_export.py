"""Folders that hasten writes, read by `transformers` and by hasten."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import save_file

from hasten.core.errors import UnsupportedError
from hasten.models.checkpoint import load_decoder, open_checkpoint
from hasten.models.config import DecoderConfig, HeadShape, RopeSpec
from hasten.models.config_hf import config_from_hf
from hasten.models.decoder import Decoder
from hasten.models.hf_export import (
    config_to_hf,
    export_name,
    export_norm_offset,
    save_decoder,
    write_config,
    write_tokenizer,
)
from hasten.models.tokenizer import Tokenizer
from hasten.models.tokenizer_hf import tokenizer_from_folder

LLAMA = DecoderConfig(
    family="llama",
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    shape=HeadShape(heads=4, kv_heads=2, size=8),
    max_positions=64,
    rope=RopeSpec(10000.0, 8),
    bos_id=1,
    eos_ids=(2, 3),
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS = {
    "llama": LLAMA,
    "llama3 scaling, biases, tied": replace(
        LLAMA,
        rope=RopeSpec(5e5, 8, LLAMA3_ROPE),
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        tie_embeddings=True,
    ),
    "mistral": replace(LLAMA, family="mistral", window=5),
    "qwen2": replace(LLAMA, family="qwen2", qkv_bias=True),
    "qwen3": replace(LLAMA, family="qwen3", qk_norm=True, shape=HeadShape(4, 1, 16), rope=RopeSpec(1e6, 16)),
    "gemma3": replace(
        LLAMA,
        family="gemma3",
        activation="gelu_tanh",
        qk_norm=True,
        sandwich_norm=True,
        norm_offset=1.0,
        embedding_scale=32**0.5,
        attention_scale=16**-0.5,
        window=5,
        window_layers=(True, False),
        local_rope=RopeSpec(1e4, 8),
        rope=RopeSpec(1e6, 8),
        tie_embeddings=True,
    ),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_transformers_and_hasten_read_the_same_model(tmp_path: Path, config: DecoderConfig) -> None:
    data = config_to_hf(config)
    assert config_from_hf(data, "written") == config
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in config.tensor_shapes().items():
        value = torch.randn(shape, generator=random) * (0.2 if "norm" in name else shape[-1] ** -0.5)
        if "norm" in name:
            value = value + 1 - export_norm_offset(config)
        tensors[export_name(name, config)] = value
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(data | {"torch_dtype": "float32"}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ours = load_decoder(open_checkpoint(tmp_path))
    ids_BT = torch.arange(24)[None] * 7 % 96
    with torch.no_grad():
        assert torch.allclose(ours(ids_BT), theirs(ids_BT, use_cache=False).logits, atol=1e-4)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_decoder_saved_is_the_decoder_read(tmp_path: Path, config: DecoderConfig) -> None:
    torch.manual_seed(0)
    decoder = Decoder(config)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    vocabulary = {f"token{i}": i for i in range(95)} | {"?": 95}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    save_decoder(tmp_path, decoder, Tokenizer(backend, bos_id=1, eos_ids=(2, 3)))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == config
    read = load_decoder(checkpoint).state_dict()
    assert read.keys() == decoder.state_dict().keys()
    for name, value in decoder.state_dict().items():
        assert torch.allclose(read[name], value, rtol=0, atol=1e-6 if "norm" in name else 0), name
    assert checkpoint.tokenizer().bos_id == 1


def test_what_the_format_cannot_hold_is_refused() -> None:
    factors = RopeSpec(1e4, 8, {"rope_type": "factors", "factors": [1.0] * 4})
    with pytest.raises(UnsupportedError, match="explicit frequency factors"):
        config_to_hf(replace(LLAMA, rope=factors))
    with pytest.raises(UnsupportedError, match="llama model's qk_norm"):
        config_to_hf(replace(LLAMA, qk_norm=True))
    with pytest.raises(UnsupportedError, match="logit_softcap"):
        config_to_hf(replace(LLAMA, logit_softcap=30.0))


def test_gguf_becomes_a_folder(default_model_path: Path, tmp_path: Path) -> None:
    """Configuration and tokenizer of the default model survive; the chat template gives the same prompt."""
    checkpoint = open_checkpoint(default_model_path)
    write_config(tmp_path, checkpoint, {"torch_dtype": "float32"})
    write_tokenizer(tmp_path, checkpoint)
    data = json.loads((tmp_path / "config.json").read_text())
    assert config_from_hf(data, "written") == replace(checkpoint.config, extra={})
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    ours, written = checkpoint.tokenizer(), tokenizer_from_folder(tmp_path, tuple(generation["eos_token_id"]))
    text = "Größe 你好 🙂 <|im_start|>user\n\tdef f(x): return x  # 12345\n"
    assert written.encode(text) == ours.encode(text)
    messages = [{"role": "user", "content": "Name three rivers."}]
    assert written.apply_chat(messages) == ours.apply_chat(messages)
    assert (written.bos_id, set(written.eos_ids), written.adds_bos) == (
        ours.bos_id,
        set(ours.eos_ids),
        ours.adds_bos,
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
