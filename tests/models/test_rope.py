"""RoPE and its scalings against `transformers`."""

import threading

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from hasten.core.errors import ModelError, UnsupportedError
from hasten.models.checkpoint import load_decoder, open_checkpoint
from hasten.models.config import RopeSpec
from hasten.models.rope import Rope, apply_rotation

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn_betas": YARN | {"beta_fast": 16, "beta_slow": 2, "truncate": False},
    "yarn_factor": YARN | {"attention_factor": 0.7},
    "yarn_mscale": YARN | {"mscale": 1.3, "mscale_all_dim": 0.6},
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("length", [40, 200])
def test_tables_equal_transformers(name, length):
    scaling = SCALINGS[name]
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        head_dim=32,
        max_position_embeddings=128,
        rope_parameters={"rope_theta": 10000.0, **scaling},
    )
    position = torch.arange(length)
    reference = LlamaRotaryEmbedding(config)
    cos, sin = reference(torch.zeros(1), position[None])
    rope = Rope(RopeSpec(10000.0, 32, scaling), 128)
    ours = rope.tables(position)
    torch.testing.assert_close(ours[0], cos[0], atol=2e-5, rtol=0)
    torch.testing.assert_close(ours[1], sin[0], atol=2e-5, rtol=0)


def test_rotate_equals_transformers():
    q = torch.randn(1, 4, 20, 32)
    rope = Rope(RopeSpec(10000.0, 32), 128)
    cos, sin = rope.tables(torch.arange(20))
    expected, _ = apply_rotary_pos_emb(q, q, cos[None], sin[None])
    ours = rope.rotate(q[0].transpose(0, 1), torch.arange(20))
    torch.testing.assert_close(ours, expected[0].transpose(0, 1))


def test_partial_rotation_leaves_the_rest_alone():
    x = torch.randn(5, 2, 16)
    rope = Rope(RopeSpec(10000.0, 8), 128)
    turned = rope.rotate(x, torch.arange(5) + 3)
    assert torch.equal(turned[..., 8:], x[..., 8:])
    torch.testing.assert_close(turned[..., :8], rope.rotate(x[..., :8].contiguous(), torch.arange(5) + 3))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_score_depends_on_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 64), torch.randn(1, 1, 64)
    rope = Rope(RopeSpec(1e5, 64), 8192)
    scores = [
        float((rope.rotate(q, torch.tensor([start + 7])) * rope.rotate(k, torch.tensor([start]))).sum())
        for start in (0, 1, 500, 7000)
    ]
    assert max(scores) - min(scores) < 2e-3


def test_dynamic_scaling_takes_lengths_per_row():
    """Rows of two sequences in one call get the tables each would get alone."""
    rope = Rope(RopeSpec(10000.0, 16, {"rope_type": "dynamic", "factor": 2.0}), 32)
    short, long = torch.arange(20), torch.arange(90)
    both = rope.tables(torch.cat((short, long)), torch.tensor([20] * 20 + [90] * 90))
    torch.testing.assert_close(both[0], torch.cat((rope.tables(short)[0], rope.tables(long)[0])))


@pytest.mark.parametrize("name", ["linear", "dynamic", "llama3", "yarn"])
def test_whole_model_with_scaling(tiny, name):
    reference = tiny("llama_gqa", rope_parameters={"rope_theta": 10000.0, **SCALINGS[name]})
    decoder = load_decoder(open_checkpoint(reference.path))
    ids = torch.randint(0, 131, (1, 160), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(decoder(ids), reference.logits(ids), atol=1e-4, rtol=0)


def test_tables_grow_under_threads():
    rope = Rope(RopeSpec(10000.0, 16), 1 << 15)
    expected = Rope(RopeSpec(10000.0, 16), 1 << 15).tables(torch.arange(1 << 14))
    wrong = []

    def read(length: int) -> None:
        for size in range(length, 1 << 14, 997):
            cos, sin = rope.tables(torch.arange(size))
            if not (torch.equal(cos, expected[0][:size]) and torch.equal(sin, expected[1][:size])):
                wrong.append(size)

    threads = [threading.Thread(target=read, args=(1 + 100 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_empty_positions():
    cos, sin = Rope(RopeSpec(10000.0, 16), 64).tables(torch.empty(0, dtype=torch.long))
    assert apply_rotation(torch.empty(0, 2, 16), cos, sin).shape == (0, 2, 16)


def test_bad_scalings_are_refused():
    with pytest.raises(UnsupportedError, match="'longrope' is not supported"):
        Rope(RopeSpec(1e4, 16, {"rope_type": "longrope", "factor": 4.0}), 64)
    with pytest.raises(ModelError, match="finite number 'factor'"):
        Rope(RopeSpec(1e4, 16, {"rope_type": "linear"}), 64)
    with pytest.raises(ModelError, match="finite number 'factor'"):
        Rope(RopeSpec(1e4, 16, {"rope_type": "llama3", "factor": float("nan")}), 64)
    with pytest.raises(ModelError, match="3 RoPE factors for 8"):
        Rope(RopeSpec(1e4, 16, {"rope_type": "factors", "factors": [1.0, 2.0, 3.0]}), 64)
