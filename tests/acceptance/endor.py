"""Acceptance of `endor`: the checks of its specification that are not about speed (that is `benchmarks/endor.py`).

1 the round trip is in tests/kernels/test_endor.py, as are independent blocks (5); 2 the same logits and tokens as the
same pruned weights in memory; 3 bytes of the file; 4 a file system without direct I/O is named, an emulated link holds;
6 memory within the budget and two layers' buffers.
"""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.core.errors import ArtefactError, SettingError, UnsupportedError
from hasten.core.plan import Plan
from hasten.lm.llm import LLM
from hasten.lm.request import SamplingParams
from hasten.models.checkpoint import load_decoder, open_checkpoint
from hasten.models.context import BuildContext
from hasten.models.decoder import Decoder
from hasten.models.store import resolve
from hasten.weights import layer_file
from hasten.weights.dense import DenseLinear
from hasten.weights.endor import Endor, StreamedLinear, prune
from hasten.weights.format import LinearSource
from hasten.weights.layer_file import LayerFile, write_layers
from hasten.weights.native import NativeFormat
from hasten.weights.weight_store import WeightStore

from ..weights.gptq_models import context, write_model

LAYERS = 5  # of the default model: real weights, in a second


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> BuildContext:
    checkpoint = open_checkpoint(resolve("smollm2-135m-instruct")).keeping(range(LAYERS))
    return BuildContext.of(checkpoint, tmp_path_factory.mktemp("endor"))


def endor(**settings: Any) -> Endor:
    return Endor(**{"pruning": "magnitude", "memory_mb": 0, **settings})


def load(build: BuildContext, **settings: Any) -> tuple[Decoder, WeightStore]:
    weights = endor(**settings).provide("weight_format", build)
    return load_decoder(build.checkpoint, pack=weights.pack).eval(), weights.store


def in_memory(build: BuildContext, sparsity: float = 0.5) -> Decoder:
    """The same pruned weights as ordinary dense layers."""

    def pack(source: LinearSource) -> torch.nn.Module:
        if source.name == "lm_head":
            return NativeFormat().pack(source)
        return DenseLinear(prune(source.dense(), sparsity), source.bias_O, torch.bfloat16)

    return load_decoder(build.checkpoint, pack=pack).eval()


def logits(decoder: Decoder, length: int = 6) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat([decoder(torch.arange(7, 7 + n)[None])[0] for n in (length, 1, 1, 2)])


# 2 --------------------------------------------------------------------------------------------------------------------


def test_streamed_weights_give_the_logits_of_those_in_memory(build: BuildContext) -> None:
    wanted = logits(in_memory(build))
    one = 7_100_000  # bytes of a layer, and a little
    for settings in (
        {},
        {"memory_mb": 2.2 * one / 1e6},
        {"memory_mb": 1000},
        {"memory_mb": 2 * one / 1e6, "compressed_mb": one / 1e6},
        {"memory_mb": 100, "compressed_mb": 100},
        {"format": "dense"},
        {"format": "dense", "read": "staged"},
        {"read": "staged"},
        {"prefetch": False},
    ):
        decoder, store = load(build, **settings)
        assert torch.equal(logits(decoder), wanted), settings
        store.close()


def test_the_weights_are_the_pruned_ones(build: BuildContext) -> None:
    decoder, store = load(build)
    assert sum(isinstance(linear, StreamedLinear) for _, linear in decoder.linears()) == 4 * LAYERS
    for (name, ours), (_, theirs) in zip(decoder.linears(), in_memory(build).linears(), strict=True):
        weight_OI = ours.dequantize()
        assert torch.equal(weight_OI, theirs.dequantize())
        if name != "lm_head":
            share = (weight_OI == 0).float().mean(1)
            assert bool((share >= 0.5 - 1e-6).all())
            assert float(share.mean()) < 0.56  # Q4_1 codes hold some zeros of their own
    store.close()


def test_generated_tokens_are_those_of_the_weights_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path / "home"))
    model = str(write_model(tmp_path / "model"))
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    prompts = [[5, 6, 7, 8], list(range(3, 60)), [9]]
    answers = []
    for settings in ({"memory_mb": 1000}, {}, {"read": "staged"}):
        with LLM(Plan(model, (endor(**settings),)), page_size=4) as llm:
            answers.append([done.token_ids for done in llm.generate(prompts, params)])
    assert answers[0] == answers[1] == answers[2]


def test_layers_out_of_order_and_again(build: BuildContext) -> None:
    _, store = load(build)
    wanted = [store.weight(layer, "o_proj", 576).float() for layer in range(LAYERS)]
    x = torch.eye(576)
    for layer in (0, 1, 3, 3, 2, 0, 4, 4, 1):
        torch.testing.assert_close(store.linear(layer, "o_proj", 576, None)(x).t(), wanted[layer])
    store.close()


# 3, 4 -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.4, 0.5, 0.6, 0.7])
def test_bytes_on_disk_are_the_formula(tmp_path: Path, sparsity: float) -> None:
    """16 bits (1 - s) + 1 per element, within 0.2% (layers of the default model's shapes)."""
    shapes = {
        "qkv_proj": (60, 576, 16),
        "o_proj": (36, 576, 16),
        "gate_up_proj": (192, 576, 16),
        "down_proj": (36, 1536, 16),
    }
    layers = []
    elements = zeros = 0
    for seed in range(2):
        random = torch.Generator().manual_seed(seed)
        linears = {}
        for name, shape in shapes.items():
            packed = torch.randn(shape, generator=random)
            packed[torch.rand(shape, generator=random) < sparsity] = 0
            linears[name] = packed.to(torch.bfloat16)
            elements, zeros = elements + packed.numel(), zeros + int((packed == 0).sum())
        layers.append(linears)
    write_layers(tmp_path, layers, bitmap=True)
    size = (tmp_path / "weights.bin").stat().st_size
    formula = (16 * (elements - zeros) + elements) / 8
    assert abs(size / formula - 1) < 0.002
    file = LayerFile(tmp_path)
    assert sum(region.size for region in file.regions) == size
    file.close()


def test_a_file_system_that_refuses_direct_io_is_named(
    build: BuildContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = endor().prepare(build)
    real = os.open

    def refuse(path: Any, flags: int, *more: Any, **others: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *more, **others)

    monkeypatch.setattr(layer_file.os, "open", refuse)
    with pytest.raises(UnsupportedError, match=r'refuses direct I/O .* set endor\.read = "staged"'):
        LayerFile(folder)
    LayerFile(folder, direct=False).close()


def test_an_emulated_link_is_as_slow_as_it_says(tmp_path: Path) -> None:
    write_layers(tmp_path, [{"o_proj": torch.ones(8, 8192, 16)}] * 2, bitmap=False)
    file = LayerFile(tmp_path, rate=40e6)
    into = layer_file.buffer(file.regions[0].size)
    started = time.monotonic()
    for layer in (0, 1):
        file.read(layer, into)
    assert time.monotonic() - started >= file.bytes_read / 40e6
    file.close()


# 6 --------------------------------------------------------------------------------------------------------------------


def test_memory_is_the_budget_and_two_layers(build: BuildContext) -> None:
    expanded = (960 + 576 + 3072) * 576 * 2 + 576 * 1536 * 2
    for memory_mb, compressed_mb, resident in ((0, 0, 0), (16, 0, 2), (20, 9, 1), (1000, 0, LAYERS)):
        _, store = load(build, memory_mb=memory_mb, compressed_mb=compressed_mb)
        memory = store.memory()
        assert memory["resident"] == pytest.approx(resident * expanded, rel=0.01)
        assert memory["resident"] + memory["compressed"] <= memory_mb * 1e6
        region = store.file.regions[0]
        assert memory["buffers"] <= 2 * (region.dense_bytes + region.size) + 4 * 4096
        assert len(store.streamed) == LAYERS - resident
        store.close()


def test_a_store_does_not_grow(build: BuildContext) -> None:
    """What streams is far more than memory may grow by."""
    decoder, store = load(build)
    status = Path("/proc/self/statm")
    logits(decoder)
    before = int(status.read_text().split()[1]) * 4096
    store.file.bytes_read = 0
    for _ in range(4):
        logits(decoder)
    assert store.file.bytes_read > 12 * LAYERS * 3e6
    assert int(status.read_text().split()[1]) * 4096 - before < 8e6
    store.close()


# Pruning, errors ------------------------------------------------------------------------------------------------------


def test_wanda_weighs_weights_by_their_input(tmp_path: Path) -> None:
    weight_OI = torch.tensor([[1.0, -2.0, 3.0, 4.0]])
    assert prune(weight_OI, 0.5).tolist() == [[0, 0, 3, 4]]
    assert prune(weight_OI, 0.5, torch.tensor([9.0, 4.0, 1.0, 1.0])).tolist() == [[1, -2, 0, 0]]
    assert torch.equal(prune(weight_OI, 0.0), weight_OI)
    build = context(write_model(tmp_path / "model"))
    settings = {"pruning": "wanda", "samples": 4, "sample_length": 32, "memory_mb": 0}
    weights = Endor(**settings).provide("weight_format", build)
    decoder = load_decoder(build.checkpoint, pack=weights.pack)
    plain = load_decoder(build.checkpoint, pack=endor().provide("weight_format", build).pack)
    for (name, ours), (_, theirs) in zip(decoder.linears(), plain.linears(), strict=True):
        if name != "lm_head":
            a, b = ours.dequantize(), theirs.dequantize()
            assert float((a == 0).float().mean()) == pytest.approx(float((b == 0).float().mean()), abs=0.02)
            assert not torch.equal(a, b)


def test_damaged_files_are_refused(build: BuildContext, tmp_path: Path) -> None:
    write_layers(tmp_path, [{"o_proj": torch.randn(2, 64, 16)}], bitmap=True)
    data = (tmp_path / "weights.bin").read_bytes()
    (tmp_path / "weights.bin").write_bytes(data[:-4096])
    with pytest.raises(ArtefactError, match="bytes, not"):
        LayerFile(tmp_path)
    (tmp_path / "weights.bin").write_bytes(data)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ArtefactError, match="cannot be read"):
        LayerFile(tmp_path)
    with pytest.raises(ArtefactError, match="cannot be read"):
        LayerFile(tmp_path / "nowhere")


def test_a_read_that_fails_reaches_the_caller(build: BuildContext) -> None:
    decoder, store = load(build)
    os.close(store.file._fd)
    store.file._fd = os.open("/dev/null", os.O_RDONLY)
    for _ in range(2):
        with pytest.raises(ArtefactError, match="ends inside layer"):
            logits(decoder)
    store.close()


def test_settings_that_do_not_fit_are_refused() -> None:
    for bad, message in (
        ({"sparsity": 1.0}, "sparsity"),
        ({"memory_mb": 1, "compressed_mb": 2}, "part of memory_mb"),
        ({"link_gbps": 0}, "link_gbps"),
        ({"read": "mapped"}, "read"),
    ):
        with pytest.raises(SettingError, match=message):
            Endor(**bad)
