"""A tiny random Llama checkpoint with a real (byte-level) tokenizer, for tests of everything above the model."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers, trainers

TEXT = (
    "The quick brown fox jumps over the lazy dog. A sequence of tokens enters the model, and the model answers. "
    "Rivers run to the sea; the sea is never full. Wer rastet, der rostet. Über allen Gipfeln ist Ruh. "
) * 4
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_checkpoint(
    folder: Path,
    *,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    head_size: int = 16,
    positions: int = 512,
    vocabulary: int = 320,
    seed: int = 0,
) -> Path:
    """Write config, weights and tokenizer into ``folder`` (created). Logits are spread widely: no near ties."""
    folder.mkdir(parents=True, exist_ok=True)
    hidden, inner = heads * head_size, 3 * heads * head_size
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_size,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)

    def weight(outputs: int, inputs: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(outputs, inputs, generator=generator) * gain * inputs**-0.5

    tensors = {
        "model.embed_tokens.weight": torch.randn(vocabulary, hidden, generator=generator),
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": weight(vocabulary, hidden, 4.0),
    }
    for i in range(layers):
        at = f"model.layers.{i}."
        tensors[at + "input_layernorm.weight"] = 1 + 0.1 * torch.randn(hidden, generator=generator)
        tensors[at + "post_attention_layernorm.weight"] = torch.ones(hidden)
        tensors[at + "self_attn.q_proj.weight"] = weight(heads * head_size, hidden, 2.0)
        tensors[at + "self_attn.k_proj.weight"] = weight(kv_heads * head_size, hidden, 2.0)
        tensors[at + "self_attn.v_proj.weight"] = weight(kv_heads * head_size, hidden)
        tensors[at + "self_attn.o_proj.weight"] = weight(hidden, heads * head_size)
        tensors[at + "mlp.gate_proj.weight"] = weight(inner, hidden)
        tensors[at + "mlp.up_proj.weight"] = weight(inner, hidden)
        tensors[at + "mlp.down_proj.weight"] = weight(hidden, inner)
    save_file(tensors, folder / "model.safetensors")
    write_tokenizer(folder, vocabulary)
    return folder


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "chat_template": CHAT})
    )
