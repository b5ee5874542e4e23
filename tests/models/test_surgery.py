"""Blocks left out of a checkpoint: every family, both file kinds, GPTQ folders; each block keeps its own settings."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hasten.core.errors import ModelError
from hasten.models.checkpoint import load_decoder, open_checkpoint
from hasten.models.config_hf import config_from_hf
from hasten.models.decoder import Decoder
from hasten.models.hf_export import config_to_hf
from hasten.models.surgery import RemoveBlocks

# Families whose blocks differ from one another, and one of each kind of the rest, with enough blocks to remove some.
FAMILIES = {
    "gemma3": (1, 5),
    "gemma3_softcap": (0, 2, 3),
    "qwen2_window": (1,),
    "mistral_window": (0,),
    "llama_mha_biases": (1,),
    "qwen3_bias_tied": (1,),
}


def token_ids() -> torch.Tensor:
    return torch.randint(0, 131, (2, 23), generator=torch.Generator().manual_seed(1))


def switched_off(decoder: Decoder, removed: tuple[int, ...]) -> torch.Tensor:
    """Logits of the whole model with blocks off: their part of the residual stream is nothing."""
    for block in removed:
        decoder.layers[block].attention = lambda x_TE, *_: x_TE
        decoder.layers[block].mlp = lambda x_TE: x_TE
    with torch.no_grad():
        return decoder(token_ids())


@pytest.mark.parametrize(("family", "removed"), FAMILIES.items(), ids=FAMILIES)
def test_a_removed_block_is_a_block_switched_off(tiny, family, removed):
    checkpoint = open_checkpoint(tiny(family).path)
    whole = load_decoder(checkpoint)
    smaller = RemoveBlocks(removed).apply(checkpoint)
    assert smaller.config.num_layers == checkpoint.config.num_layers - len(removed)
    with torch.no_grad():
        ours = load_decoder(smaller)(token_ids())
        before = whole(token_ids())
    assert torch.equal(ours, switched_off(whole, removed))
    assert not torch.equal(ours, before)


def test_windows_and_rotations_stay_with_their_blocks(tiny):
    """Gemma 3: six local blocks to one global one, each kind with its own rotary embedding."""
    config = open_checkpoint(tiny("gemma3").path).config
    assert config.window_layers == (True,) * 5 + (False, True)
    left = [0, 3, 5, 6]
    smaller = config.keeping(left)
    assert smaller.window_layers == (True, True, False, True)
    assert [smaller.attention(i) for i in range(4)] == [config.attention(i) for i in left]
    assert [smaller.rope_of(i) for i in range(4)] == [config.rope_of(i) for i in left]
    assert config.rope_of(5) != config.rope_of(6)
    # All that slides may go, or all that does not.
    assert not any(config.keeping([5]).slides(i) for i in range(1))
    assert all(config.keeping([0, 1]).slides(i) for i in range(2))


def test_the_smaller_shape_can_be_written_and_read_back(tiny):
    config = RemoveBlocks([1, 5]).apply(open_checkpoint(tiny("gemma3").path)).config
    assert config_from_hf(config_to_hf(config), "config.json").window_layers == config.window_layers


@pytest.mark.parametrize(
    ("family", "kind"), [("llama_gqa", "F32"), ("smollm2_shape", "Q4_1"), ("gemma3", "F32")]
)
def test_gguf_files(tiny, write_gguf, tmp_path, family, kind):
    model = tiny(family, num_hidden_layers=7, **({"intermediate_size": 192} if kind == "Q4_1" else {})).model
    checkpoint = open_checkpoint(write_gguf(tmp_path / "model.gguf", model, kind, "F32"))
    smaller = checkpoint.keeping([0, 2, 3, 6])
    with torch.no_grad():
        assert torch.equal(
            load_decoder(smaller)(token_ids()), switched_off(load_decoder(checkpoint), (1, 4, 5))
        )


def test_a_view_of_a_view_counts_the_layers_it_shows(tiny):
    checkpoint = open_checkpoint(tiny("gemma3").path)
    twice = checkpoint.keeping([0, 2, 3, 5, 6]).keeping([0, 1, 4])
    once = checkpoint.keeping([0, 2, 6])
    assert twice.kept == once.kept == (0, 2, 6)
    assert twice.config == once.config
    for name in once.names():
        assert torch.equal(once.tensor(name), twice.tensor(name))
    assert twice.in_file("layers.2.q_proj.weight") == "layers.6.q_proj.weight"
    assert twice.in_file("norm.weight") == "norm.weight"
    assert not twice.has("layers.3.q_proj.weight")


def test_fingerprints_differ_with_what_is_left(tiny):
    checkpoint = open_checkpoint(tiny("gemma3").path)
    views = [checkpoint, checkpoint.keeping([0, 1]), checkpoint.keeping([0, 2]), checkpoint.keeping([0])]
    assert len({view.fingerprint for view in views}) == 4
    assert checkpoint.keeping(range(7)) is checkpoint
    again = open_checkpoint(checkpoint.path).keeping([0, 2])
    assert again.fingerprint == views[2].fingerprint
    assert checkpoint.config.num_layers == 7


@pytest.mark.parametrize("layers", [[], [7], [-1, 0], [1, 0], [2, 2]])
def test_layers_that_are_not_there_are_refused(tiny, layers):
    checkpoint = open_checkpoint(tiny("gemma3").path)
    with pytest.raises(ModelError, match=r"layers to keep must ascend within 0\.\.6"):
        checkpoint.keeping(layers)


def test_blocks_that_are_not_there_are_refused(tiny):
    checkpoint = open_checkpoint(tiny("gemma3").path)
    with pytest.raises(ModelError, match=r"cannot remove blocks \[7, 9\] of 7"):
        RemoveBlocks([1, 9, 7]).apply(checkpoint)
    with pytest.raises(ModelError, match="layers to keep"):
        RemoveBlocks(range(7)).apply(checkpoint)


def test_settings_that_every_block_shares_are_untouched(tiny):
    config = open_checkpoint(tiny("qwen2").path).config
    assert config.keeping([1]) == dataclasses.replace(config, num_layers=1)
