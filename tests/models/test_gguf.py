"""GGUF files written here: every storage type and family, against the gguf package and `transformers`."""

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from torch import nn

from hasten.models.checkpoint import LinearSource, QuantBlocks, QuantEmbedding, load_decoder, open_checkpoint
from hasten.models.gguf_file import GGUFFile
from hasten.models.gguf_file import dequantize as our_dequantize

QUANTISED = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"]
KINDS = ["F32", "F16", "BF16", *QUANTISED]
WIDE = {"hidden_size": 256, "intermediate_size": 512}  # K types come in blocks of 256


class BlocksLinear(nn.Module):
    """What a native format would do: keep the raw blocks, and multiply by what they mean."""

    def __init__(self, source: LinearSource) -> None:
        super().__init__()
        assert source.blocks is not None
        self.weight = torch.cat(
            [our_dequantize(part.kind, part.data_OB, part.inputs) for part in source.blocks]
        )
        self.bias = source.bias_O
        assert self.weight.shape == (source.outputs, source.inputs)
        assert torch.equal(self.weight, source.dense())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)


def ids_of(length: int) -> torch.Tensor:
    return torch.randint(0, 131, (1, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_every_storage_type_end_to_end(tiny, write_gguf, tmp_path, kind):
    """The llama architecture (interleaved rows) in each type: logits of the twin, dense and from raw blocks."""
    reference = tiny("llama_mha_biases", **WIDE)
    path = write_gguf(tmp_path / "model.gguf", reference.model, kind)
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.tie_embeddings
    expected = reference.logits(ids_of(12))
    with torch.no_grad():
        torch.testing.assert_close(load_decoder(checkpoint)(ids_of(12)), expected, atol=1e-4, rtol=1e-5)
    source = checkpoint.linear("layers.0.qkv_proj")
    if kind in QUANTISED:
        assert [part.kind for part in source.blocks] == [kind] * 3
        packed = load_decoder(checkpoint, pack=BlocksLinear)
        assert isinstance(packed.embed_tokens, QuantEmbedding)
        with torch.no_grad():
            torch.testing.assert_close(packed(ids_of(12)), expected, atol=1e-4, rtol=1e-5)
    else:
        assert source.blocks is None


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_dequantize_equals_the_gguf_package(kind, rows):
    ggml = GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[ggml]
    data = np.random.default_rng(0).integers(0, 256, (rows, 5, size), dtype=np.uint8)
    # Random bytes in the scales would be NaN now and then: give every 16-bit word a small exponent.
    for offset in {"Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2)}.get(
        kind, (0,)
    ):
        data[..., offset + 1] &= 0x3F
    data = data.reshape(rows, -1)
    expected = gguf.dequantize(data, ggml)
    assert np.array_equal(our_dequantize(kind, torch.from_numpy(data), 5 * block).numpy(), expected)


@pytest.mark.parametrize(
    "family",
    [
        "llama_gqa",
        "llama_odd_head",
        "smollm2_shape",
        "mistral_window",
        "qwen2",
        "qwen3",
        "gemma3",
        "gemma3_softcap",
    ],
)
def test_every_family_equals_its_folder(tiny, write_gguf, tmp_path, family):
    reference = tiny(family)
    fields: dict[str, object] = {}
    if family == "gemma3_softcap":
        fields = {"gemma3.final_logit_softcapping": 5.0, "gemma3.attn_logit_softcapping": 3.0}
    folder = open_checkpoint(reference.path).config
    if folder.attention_scale is not None:  # the format has no field for it: 1 / sqrt(head size)
        reference = tiny(family, query_pre_attn_scalar=16)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "model.gguf", reference.model, fields=fields))
    assert checkpoint.config.slides(0) == folder.slides(0)
    with torch.no_grad():
        logits = load_decoder(checkpoint)(ids_of(17))
    torch.testing.assert_close(logits, reference.logits(ids_of(17)), atol=1e-4, rtol=0)


def test_gemma_27b_scale(tiny, write_gguf, tmp_path):
    """The 62-layer Gemma 3 divides by hidden size / heads instead of the head size."""
    reference = tiny("gemma3", num_hidden_layers=62, hidden_size=48, query_pre_attn_scalar=12)
    config = open_checkpoint(write_gguf(tmp_path / "model.gguf", reference.model)).config
    assert config.attention_scale == pytest.approx(12**-0.5)


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_rope_scaling(tiny, write_gguf, tmp_path, kind):
    scaling = {
        "linear": {"rope_type": "linear", "factor": 4.0},
        "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        "llama3": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    }[kind]
    reference = tiny("llama_gqa", rope_parameters={"rope_theta": 10000.0, **scaling})
    fields: dict[str, object] = {}
    extra = {}
    if kind == "llama3":  # the format stores what each frequency is divided by
        base = 1.0 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
        extra["rope_freqs.weight"] = (base / reference.model.model.rotary_emb.inv_freq).numpy()
    else:
        fields = {"llama.rope.scaling.type": kind, "llama.rope.scaling.factor": 4.0}
        if kind == "yarn":
            fields["llama.rope.scaling.original_context_length"] = 32
    checkpoint = open_checkpoint(
        write_gguf(tmp_path / "model.gguf", reference.model, fields=fields, extra=extra)
    )
    with torch.no_grad():
        logits = load_decoder(checkpoint)(ids_of(100))
    torch.testing.assert_close(logits, reference.logits(ids_of(100)), atol=1e-4, rtol=0)


def test_mixed_types_in_one_fused_linear(tiny, write_gguf, tmp_path):
    """Quantised q beside plain v: the fused layer offers no blocks, its dense weight is still exact."""
    reference = tiny("llama_gqa", **WIDE)
    path = write_gguf(tmp_path / "model.gguf", reference.model, "Q4_1", embedding="Q8_0")
    checkpoint = open_checkpoint(path)
    stored = checkpoint.stored
    plain = our_dequantize("Q4_1", stored("layers.0.v_proj.weight").data_OB, 256)
    checkpoint.stored = lambda name: plain if name == "layers.0.v_proj.weight" else stored(name)
    source = checkpoint.linear("layers.0.qkv_proj")
    assert source.blocks is None
    with torch.no_grad():
        torch.testing.assert_close(
            load_decoder(checkpoint)(ids_of(8)), reference.logits(ids_of(8)), atol=1e-4, rtol=0
        )
    assert checkpoint.linear("lm_head").blocks[0].kind in ("Q4_1", "Q8_0")


def test_quantised_embedding_rows_are_exact(tiny, write_gguf, tmp_path):
    reference = tiny("llama_mha_biases", **WIDE)
    checkpoint = open_checkpoint(
        write_gguf(tmp_path / "model.gguf", reference.model, "Q4_1", embedding="Q8_0")
    )
    packed = load_decoder(checkpoint, pack=BlocksLinear)
    ids = torch.tensor([[5, 0], [130, 5]])
    table = reference.model.get_input_embeddings().weight
    assert torch.equal(packed.embed_tokens(ids), table[ids].detach())
    assert packed.embed(torch.empty(0, dtype=torch.long)).shape == (0, 256)


def test_reader_agrees_with_the_package(tiny, write_gguf, tmp_path):
    reference = tiny("llama_gqa", **WIDE)
    fields = {
        "test.text": "naïve 文",
        "test.flag": True,
        "test.words": ["a", "", "ü", "x" * 1000],
        "test.numbers": [1, -2, 3],
        "test.floats": [0.5, 1.5],
    }
    path = write_gguf(tmp_path / "model.gguf", reference.model, "Q5_K", embedding="Q6_K", fields=fields)
    ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            value = ours.fields[key]
            assert (list(value) if isinstance(value, tuple) else value) == field.contents(), key
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        entry = ours.tensors[tensor.name]
        assert entry.start == tensor.data_offset
        assert entry.kind == tensor.tensor_type.name
        assert entry.shape == tuple(int(size) for size in reversed(tensor.shape))
        assert ours.read(tensor.name).view(torch.uint8).numpy().tobytes() == tensor.data.tobytes()


def test_fingerprint_follows_the_bytes(tiny, write_gguf, tmp_path):
    reference = tiny("llama_gqa")
    path = write_gguf(tmp_path / "a.gguf", reference.model)
    copy = tmp_path / "b.gguf"
    copy.write_bytes(path.read_bytes())
    first = open_checkpoint(path).fingerprint
    assert open_checkpoint(copy).fingerprint == first  # the name does not matter
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    copy.write_bytes(data)
    assert open_checkpoint(copy).fingerprint != first


def test_quant_blocks_rows_follow_the_decoders_order(tiny, write_gguf, tmp_path):
    """Raw blocks are permuted by rows, like the values they stand for."""
    reference = tiny("llama_gqa", **WIDE)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "model.gguf", reference.model, "Q8_0"))
    for name in ("q_proj", "k_proj"):
        part = checkpoint.stored(f"layers.1.{name}.weight")
        assert isinstance(part, QuantBlocks)
        weight = getattr(reference.model.model.layers[1].self_attn, name).weight
        assert torch.equal(checkpoint.dequantize(part), weight.detach())
