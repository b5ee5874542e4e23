"""Files that must be refused, each with an error that names what is wrong."""

import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hasten.core.errors import HastenError, IntegrityError, ModelError, ModelFormatError, UnsupportedError
from hasten.models.checkpoint import load_decoder, open_checkpoint


def edit_json(path, **changes):
    data = json.loads(path.read_text())
    data |= changes
    path.write_text(json.dumps(data))


def test_nothing_there(tmp_path):
    with pytest.raises(ModelError, match=r"no model at .*absent"):
        open_checkpoint(tmp_path / "absent")


class TestFolder:
    def test_without_config(self, tmp_path):
        with pytest.raises(ModelError, match=r"no config\.json"):
            open_checkpoint(tmp_path)

    @pytest.mark.parametrize("text", ["", "{", "[1]", "\ufffd", "null"])
    def test_config_that_is_no_object(self, tmp_path, text):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelFormatError, match=r"config\.json"):
            open_checkpoint(tmp_path)

    def test_unsupported_architecture_names_the_supported(self, tiny):
        path = tiny().path
        edit_json(path / "config.json", architectures=["MambaForCausalLM"], model_type="mamba")
        with pytest.raises(ModelError, match=r"unsupported architecture MambaForCausalLM.*Qwen3ForCausalLM"):
            open_checkpoint(path)

    def test_without_tokenizer(self, tiny):
        with pytest.raises(ModelError, match=r"no tokenizer\.json"):
            open_checkpoint(tiny().path).tokenizer()

    def test_broken_tokenizer(self, tiny):
        path = tiny().path
        (path / "tokenizer.json").write_text("{}")
        with pytest.raises(ModelFormatError, match=r"tokenizer\.json: not a tokenizer"):
            open_checkpoint(path).tokenizer()

    def test_missing_shard(self, tiny):
        path = tiny(max_shard_size="60KB").path
        shards = sorted(path.glob("model-*.safetensors"))
        shards[1].unlink()
        with pytest.raises(ModelFormatError, match=f"1 of {len(shards)} shards missing"):
            open_checkpoint(path)

    def test_tensor_listed_but_absent(self, tiny):
        path = tiny(max_shard_size="60KB").path
        index = path / "model.safetensors.index.json"
        data = json.loads(index.read_text())
        data["weight_map"]["model.ghost.weight"] = next(iter(data["weight_map"].values()))
        index.write_text(json.dumps(data))
        with pytest.raises(ModelFormatError, match=r"'model\.ghost\.weight' is listed"):
            open_checkpoint(path)

    def test_shard_outside_the_folder(self, tiny):
        path = tiny(max_shard_size="60KB").path
        index = path / "model.safetensors.index.json"
        data = json.loads(index.read_text())
        data["weight_map"]["model.norm.weight"] = "../other/model.safetensors"
        index.write_text(json.dumps(data))
        with pytest.raises(ModelFormatError, match="outside the folder"):
            open_checkpoint(path)

    def test_only_pickles(self, tiny):
        path = tiny().path
        (path / "model.safetensors").rename(path / "pytorch_model.bin")
        with pytest.raises(ModelFormatError, match=r"pickled weights \(pytorch_model\.bin\)"):
            open_checkpoint(path)

    def test_no_weights(self, tiny):
        path = tiny().path
        (path / "model.safetensors").unlink()
        with pytest.raises(ModelFormatError, match=r"no \*\.safetensors"):
            open_checkpoint(path)

    @pytest.mark.parametrize("keep", [0, 5, 8, 100, -1, -5000])
    def test_truncated(self, tiny, keep):
        file = tiny().path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(ModelFormatError, match=r"model\.safetensors: .*truncated"):
            open_checkpoint(file.parent)

    def test_over_long_header(self, tiny):
        file = tiny().path / "model.safetensors"
        file.write_bytes(struct.pack("<Q", 1 << 60) + file.read_bytes()[8:])
        with pytest.raises(ModelFormatError, match=f"a header of {1 << 60} bytes"):
            open_checkpoint(file.parent)

    def test_corrupt_headers(self, tiny):
        file = tiny().path / "model.safetensors"
        data = file.read_bytes()
        for header in (
            b"\xff{}",
            b"[]",
            b'{"a":1}',
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}',
        ):
            file.write_bytes(struct.pack("<Q", len(header)) + header + data[-64:])
            with pytest.raises(ModelFormatError, match=r"model\.safetensors"):
                open_checkpoint(file.parent)

    def test_shape_and_bytes_disagree(self, tiny):
        file = tiny().path / "model.safetensors"
        data = file.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        table = json.loads(data[8 : 8 + length])
        table["model.norm.weight"]["data_offsets"][1] -= 4
        header = json.dumps(table).encode().ljust(length)
        file.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
        with pytest.raises(ModelFormatError, match=r"model\.norm\.weight"):
            open_checkpoint(file.parent)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_nan_or_infinity_names_the_tensor(self, tiny, bad):
        file = tiny().path / "model.safetensors"
        weights = load_file(file)
        weights["model.layers.1.mlp.up_proj.weight"][3, 4] = bad
        save_file(weights, file)
        with pytest.raises(IntegrityError, match=r"'layers\.1\.up_proj\.weight' holds NaN or infinity"):
            load_decoder(open_checkpoint(file.parent))

    def test_large_finite_weights_are_no_infinity(self, tiny):
        """The quick check sums; a sum that overflows must not be taken for an infinite weight."""
        file = tiny().path / "model.safetensors"
        weights = load_file(file)
        weights["model.layers.0.mlp.up_proj.weight"][:] = 1e38
        save_file(weights, file)
        load_decoder(open_checkpoint(file.parent))

    def test_shape_that_does_not_fit_the_configuration(self, tiny):
        path = tiny().path
        edit_json(path / "config.json", intermediate_size=97)
        with pytest.raises(
            ModelFormatError, match=r"'layers\.0\.gate_proj\.weight' has shape \(96, 64\).*\(97, 64\)"
        ):
            open_checkpoint(path)

    def test_missing_layer(self, tiny):
        path = tiny().path
        edit_json(path / "config.json", num_hidden_layers=3)
        with pytest.raises(ModelFormatError, match=r"'layers\.2\.input_norm\.weight'.*is missing"):
            open_checkpoint(path)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_attention_heads": "four"}, "'num_attention_heads' must be a positive integer, got 'four'"),
            ({"num_hidden_layers": 10**18}, "no model has more than"),
            ({"hidden_size": -64}, "'hidden_size' must be a positive integer"),
            ({"num_key_value_heads": 3}, "4 query heads do not divide among 3"),
            ({"rms_norm_eps": None}, "'rms_norm_eps' must be a positive number"),
            ({"hidden_act": "relu"}, "activation 'relu'"),
            (
                {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
                "'longrope' is not supported",
            ),
            ({"rope_parameters": {"rope_theta": "x"}}, "'rope_theta' must be a positive number"),
        ],
    )
    def test_impossible_configuration(self, tiny, changes, message):
        path = tiny().path
        edit_json(path / "config.json", **changes)
        with pytest.raises(HastenError, match=message):
            open_checkpoint(path)

    def test_unknown_quantisation(self, tiny):
        path = tiny().path
        edit_json(path / "config.json", quantization_config={"quant_method": "awq", "bits": 4})
        with pytest.raises(UnsupportedError, match=r"quantised with 'awq'.*supported: gptq"):
            open_checkpoint(path)

    def test_integers_without_quantisation_config(self, tiny):
        file = tiny().path / "model.safetensors"
        weights = load_file(file)
        name = "model.layers.0.self_attn.q_proj.weight"
        weights[name] = weights[name].to(torch.int8)
        save_file(weights, file)
        with pytest.raises(UnsupportedError, match=r"q_proj\.weight' is stored as I8"):
            open_checkpoint(file.parent)

    def test_gptq_gives_raw_tensors(self, tiny):
        file = tiny().path / "model.safetensors"
        weights = load_file(file)
        stem = "model.layers.0.self_attn.q_proj"
        del weights[f"{stem}.weight"]
        weights[f"{stem}.qweight"] = torch.arange(8 * 64, dtype=torch.int32).view(8, 64)
        weights[f"{stem}.scales"] = torch.ones(1, 64, dtype=torch.float16)
        save_file(weights, file)
        edit_json(file.parent / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
        checkpoint = open_checkpoint(file.parent)
        assert checkpoint.quantization["bits"] == 4
        assert checkpoint.hf_name("layers.0.q_proj") == stem
        assert torch.equal(checkpoint.raw(f"{stem}.qweight"), weights[f"{stem}.qweight"])
        assert f"{stem}.scales" in checkpoint.raw_names()
        assert "layers.0.q_proj.weight" not in checkpoint.names()
        assert checkpoint.tensor("layers.0.k_proj.weight").shape == (32, 64)
        with pytest.raises(ModelFormatError, match=r"q_proj\.qzeros' is missing"):
            checkpoint.linear("layers.0.qkv_proj").dense()


class TestGGUF:
    @pytest.fixture
    def gguf(self, tiny, write_gguf, tmp_path):
        def make(kind="F32", **options):
            reference = tiny("llama_gqa", hidden_size=64, num_hidden_layers=1)
            return write_gguf(tmp_path / "model.gguf", reference.model, kind, **options)

        return make

    def test_wrong_magic(self, tmp_path):
        (tmp_path / "model.gguf").write_bytes(b"GGML" + bytes(100))
        with pytest.raises(ModelFormatError, match=r"not a GGUF file \(begins with b'GGML'"):
            open_checkpoint(tmp_path / "model.gguf")

    @pytest.mark.parametrize("version", [0, 1, 99, 3 << 24])
    def test_version(self, tmp_path, version):
        (tmp_path / "model.gguf").write_bytes(b"GGUF" + struct.pack("<I", version) + bytes(100))
        with pytest.raises(ModelFormatError, match=r"version|big-endian"):
            open_checkpoint(tmp_path / "model.gguf")

    def test_empty_file(self, tmp_path):
        (tmp_path / "model.gguf").write_bytes(b"")
        with pytest.raises(ModelFormatError, match="not a GGUF file"):
            open_checkpoint(tmp_path / "model.gguf")

    def test_truncated_anywhere(self, gguf):
        path = gguf()
        data = path.read_bytes()
        for keep in [*range(4, 2500, 37), len(data) // 2, len(data) - 1]:
            path.write_bytes(data[:keep])
            with pytest.raises(ModelFormatError, match=r"truncated|not a GGUF"):
                open_checkpoint(path)

    def test_truncated_data_names_the_tensor(self, gguf):
        path = gguf()
        size = path.stat().st_size
        path.write_bytes(path.read_bytes()[:-4])
        with pytest.raises(ModelFormatError, match=rf"tensor '.*' ends at byte .* the file has {size - 4}"):
            open_checkpoint(path)

    def test_damage_in_the_header_is_refused_or_harmless(self, gguf):
        """Flip bytes all over the header: every outcome is a model or one of our errors."""
        path = gguf(fields={"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.model": "gpt2"})
        data = bytearray(path.read_bytes())
        refused = 0
        for at in range(4, 2400, 3):
            for flip in (0x01, 0x80):
                data[at] ^= flip
                path.write_bytes(data)
                try:
                    open_checkpoint(path)
                except HastenError:
                    refused += 1
                data[at] ^= flip
        assert refused > 500

    def test_huge_counts(self, tmp_path):
        for tensors, fields in ((1 << 62, 0), (0, 1 << 62)):
            (tmp_path / "model.gguf").write_bytes(
                b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + bytes(64)
            )
            with pytest.raises(HastenError):
                open_checkpoint(tmp_path / "model.gguf")

    def test_unsupported_architecture(self, gguf):
        path = gguf(fields={"general.architecture": "mamba"})
        with pytest.raises(
            ModelError, match=r"unsupported architecture 'mamba'.*llama, qwen2, qwen3, gemma3"
        ):
            open_checkpoint(path)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"llama.expert_count": 8}, "mixture-of-experts"),
            ({"llama.block_count": None}, "'llama.block_count' must be a positive integer, got None"),
            ({"llama.block_count": 2}, r"'layers\.1\.input_norm\.weight' of shape .* is missing"),
            ({"llama.attention.head_count_kv": 3}, "do not divide"),
            ({"llama.attention.head_count_kv": [2, 1]}, "differs between layers"),
            ({"llama.feed_forward_length": 95}, r"'layers\.0\.gate_proj\.weight' has shape \(96, 64\)"),
            ({"llama.rope.scaling.type": "longrope"}, "'longrope' is not supported"),
            ({"llama.rope.dimension_count": 8}, "RoPE over 8 of 16"),
            ({"llama.attention.value_length": 8}, "different sizes"),
            ({"split.count": 3}, "one of 3 parts"),
            ({"general.alignment": 33}, "power of two"),
        ],
    )
    def test_metadata_that_cannot_be(self, gguf, fields, message):
        with pytest.raises(HastenError, match=message):
            open_checkpoint(gguf(fields=fields))

    def test_unsupported_storage_type(self, gguf):
        path = gguf("MXFP4")
        with pytest.raises(UnsupportedError, match=r"is stored as MXFP4 .*supported: F32.*Q6_K"):
            open_checkpoint(path)

    def test_nan(self, gguf):
        def edit(arrays):
            arrays["blk.0.attn_k.weight"][0, 0] = np.nan

        checkpoint = open_checkpoint(gguf(edit=edit))
        with pytest.raises(IntegrityError, match=r"'layers\.0\.k_proj\.weight' holds NaN"):
            load_decoder(checkpoint)

    @pytest.mark.parametrize("offset", [0, 2])
    def test_nan_scale_in_blocks(self, gguf, offset):
        def edit(arrays):
            arrays["blk.0.ffn_up.weight"][5, 20 + offset : 22 + offset] = (0x00, 0x7E)

        checkpoint = open_checkpoint(gguf("Q4_1", edit=edit))
        with pytest.raises(IntegrityError, match=r"'layers\.0\.up_proj\.weight' holds NaN"):
            checkpoint.linear("layers.0.gate_up_proj")
        with pytest.raises(IntegrityError, match="up_proj"):
            load_decoder(checkpoint)

    def test_without_tokenizer(self, gguf):
        with pytest.raises(ModelError, match="the file has no tokenizer"):
            open_checkpoint(gguf()).tokenizer()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "weights.pkl"])
def test_pickles(tmp_path, name):
    torch.save({"a": torch.zeros(2)}, tmp_path / name)
    with pytest.raises(ModelFormatError, match="a pickle can run code"):
        open_checkpoint(tmp_path / name)


def test_pickle_by_another_name(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "model")
    with pytest.raises(ModelFormatError, match="a pickle can run code"):
        open_checkpoint(tmp_path / "model")


def test_other_files(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelFormatError, match="neither a GGUF file nor"):
        open_checkpoint(tmp_path / "notes.txt")
    (tmp_path / "model.safetensors").write_bytes(bytes(8))
    with pytest.raises(ModelError, match="give the folder"):
        open_checkpoint(tmp_path / "model.safetensors")


def test_unicode_path(tiny, tmp_path):
    path = tiny().path.rename(tmp_path / "modèle 模型 🙂")
    load_decoder(open_checkpoint(path))
