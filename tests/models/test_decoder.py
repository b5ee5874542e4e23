"""The decoder against `transformers`: every family, every way of cutting a sequence into steps."""

import pytest
import torch

from hasten.core.errors import ModelError
from hasten.models.checkpoint import load_decoder, open_checkpoint
from hasten.models.config import DecoderConfig, HeadShape, RopeSpec
from hasten.models.decoder import CausalAttend, Decoder, DenseLinear

FAMILIES = [
    "llama_gqa",
    "llama_mha_biases",
    "llama_odd_head",
    "smollm2_shape",
    "mistral",
    "mistral_window",
    "qwen2",
    "qwen2_window",
    "qwen3",
    "qwen3_bias_tied",
    "gemma3",
    "gemma3_softcap",
]


def token_ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 131, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(tiny, run_in_steps, family):
    reference = tiny(family)
    decoder = load_decoder(open_checkpoint(reference.path))
    ids = token_ids(2, 23)
    expected = reference.logits(ids)
    assert expected.abs().max() > 0.5  # weights large enough for the comparison to mean something
    with torch.no_grad():
        torch.testing.assert_close(decoder(ids), expected, atol=1e-4, rtol=0)
    chunked_then_decode = [9, 6, 1, 1, 4, 1, 1]
    torch.testing.assert_close(
        run_in_steps(decoder, ids[0], chunked_then_decode), expected[0], atol=1e-4, rtol=0
    )
    assert expected.argmax(-1)[0].tolist() == run_in_steps(decoder, ids[0], [23]).argmax(-1).tolist()


@pytest.mark.parametrize("family", ["llama_gqa", "gemma3", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_give_their_exact_values(tiny, family, dtype):
    reference = tiny(family, dtype=dtype)
    decoder = load_decoder(open_checkpoint(reference.path))
    ids = token_ids(1, 16)
    with torch.no_grad():
        torch.testing.assert_close(decoder(ids), reference.logits(ids), atol=1e-4, rtol=0)


def test_shards_and_single_file_hold_the_same_model(tiny):
    whole = tiny("qwen3")
    decoder = load_decoder(open_checkpoint(whole.path))
    sharded = tiny("qwen3", max_shard_size="60KB")
    checkpoint = open_checkpoint(sharded.path)
    assert len(checkpoint.files()) > 2
    for name, tensor in load_decoder(checkpoint).state_dict().items():
        assert torch.equal(tensor, decoder.state_dict()[name]), name


def test_storage_in_bfloat16_keeps_activations_float32(tiny):
    reference = tiny("llama_mha_biases", dtype=torch.bfloat16)
    decoder = load_decoder(open_checkpoint(reference.path), dtype=torch.bfloat16)
    assert decoder.layers[0].qkv_proj.weight.dtype == torch.bfloat16
    assert decoder.layers[0].input_norm.weight.dtype == torch.float32
    ids = token_ids(1, 12)
    with torch.no_grad():
        logits = decoder(ids)
    assert logits.dtype == torch.float32
    # The file's weights are bfloat16 themselves, so nothing is lost by storing them so.
    torch.testing.assert_close(logits, reference.logits(ids), atol=1e-4, rtol=0)


def test_old_spelling_of_the_configuration_reads_the_same(tiny):
    """Before transformers 5: rope_theta, rope_scaling, rope_local_base_freq, sliding_window_pattern."""
    import json

    reference = tiny("gemma3")
    new = open_checkpoint(reference.path).config
    file = reference.path / "config.json"
    data = json.loads(file.read_text())
    for key in ("rope_parameters", "layer_types"):
        del data[key]
    data |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6}
    file.write_text(json.dumps(data))
    old = open_checkpoint(reference.path).config
    assert old == new
    assert [old.slides(layer) for layer in range(7)] == [True] * 5 + [False, True]
    assert (old.rope_of(0).theta, old.rope_of(5).theta) == (1e4, 1e6)
    data["rope_scaling"] = {"type": "linear", "factor": 8.0}
    file.write_text(json.dumps(data))
    scaled = open_checkpoint(reference.path).config
    assert scaled.rope_of(5).scaling == {"type": "linear", "factor": 8.0}
    assert scaled.rope_of(0).scaling is None


def test_multimodal_gemma_folder_gives_its_text_model(tiny):
    """The text part of Gemma3ForConditionalGeneration: nested configuration, prefixed tensor names, extra tensors."""
    import json

    from safetensors.torch import load_file, save_file

    reference = tiny("gemma3")
    weights = load_file(reference.path / "model.safetensors")
    weights = {f"language_model.{name}": tensor for name, tensor in weights.items()}
    weights["vision_tower.patch.weight"] = torch.zeros(3, 3)
    save_file(weights, reference.path / "model.safetensors")
    file = reference.path / "config.json"
    text = json.loads(file.read_text())
    file.write_text(
        json.dumps(
            {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
        )
    )
    ids = token_ids(1, 9)
    with torch.no_grad():
        logits = load_decoder(open_checkpoint(reference.path))(ids)
    torch.testing.assert_close(logits, reference.logits(ids), atol=1e-4, rtol=0)


CONFIG = DecoderConfig("llama", 40, 32, 48, 2, HeadShape(4, 2, 8), 64, RopeSpec(1e4, 8), tie_embeddings=True)


def test_linears_in_execution_order_and_replaceable():
    decoder = Decoder(CONFIG)
    names = [name for name, _ in decoder.linears()]
    layer = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    assert names == [f"layers.{i}.{name}" for i in range(2) for name in layer] + ["lm_head"]
    replacement = DenseLinear(48, 32, bias=False)
    decoder.set_linear("layers.1.down_proj", replacement)
    assert dict(decoder.linears())["layers.1.down_proj"] is replacement
    with pytest.raises(KeyError, match="nonsense"):
        decoder.set_linear("layers.1.nonsense", replacement)


def test_trains():
    """A few optimiser steps on one batch bring the loss well down: gradients reach every parameter."""
    torch.manual_seed(0)
    decoder = Decoder(CONFIG)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2)
    ids = torch.randint(0, 40, (4, 12))
    losses = []
    for _ in range(30):
        logits = decoder(ids[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in decoder.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert decoder.lm_head.weight is decoder.embed_tokens.weight


def test_no_rows_is_no_work():
    decoder = Decoder(CONFIG)
    x = decoder.embed(torch.empty(0, dtype=torch.long))
    position = torch.empty(0, dtype=torch.long)
    x = decoder.layers[0].mlp(decoder.layers[0].attention(x, position, CausalAttend(decoder)))
    assert decoder.logits(x).shape == (0, 40)


def test_rope_of_odd_size_is_refused():
    with pytest.raises(ModelError, match="even number"):
        Decoder(DecoderConfig("llama", 40, 32, 48, 1, HeadShape(2, 2, 9), 64, RopeSpec(1e4, 9)))
