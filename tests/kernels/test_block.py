"""Decoder layers and stacks on the native library against the plain definition, on every instruction-set level."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.attention.dense import DenseKernel
from hasten.attention.layout import StepLayout
from hasten.kernels.block import Block, Norms, Reading, Stack, gated, rms_norm
from hasten.kernels.dense import dense, pack_dense
from hasten.kernels.native import _module, available_levels
from hasten.kernels.packed import Packed, pad_rows
from hasten.kernels.reference import elementwise as reference
from hasten.models.config import DecoderConfig, HeadShape, RopeSpec
from hasten.models.decoder import CausalAttend, Decoder

LEVELS = [pytest.param(_module(name), id=name) for name in available_levels()]


@pytest.mark.parametrize("module", LEVELS)
@settings(max_examples=30, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 3, 600]),
    width=st.integers(1, 130),
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
    seed=st.integers(0, 2**31),
)
def test_rms_norm(module: ModuleType, rows: int, width: int, scale: float, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    x, weight = scale * torch.randn(rows, width, generator=random), torch.randn(width, generator=random)
    got = rms_norm(x, weight, 1e-5, module=module)
    torch.testing.assert_close(got, reference.rms_norm(x, weight, 1e-5), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("module", LEVELS)
@settings(max_examples=30, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 3, 300]),
    inner=st.integers(1, 90),
    gelu=st.booleans(),
    scale=st.sampled_from([0.1, 3.0, 1e4]),
    seed=st.integers(0, 2**31),
)
def test_gated(module: ModuleType, rows: int, inner: int, gelu: bool, scale: float, seed: int) -> None:
    both = scale * torch.randn(rows, 2 * inner, generator=torch.Generator().manual_seed(seed))
    want, up = reference.gated(both, gelu=gelu), both[:, inner:].clone()
    gated(both, gelu=gelu, module=module)
    # Relative to the inputs: where the activation nearly vanishes, float32 keeps only its absolute size.
    bound = 1e-6 * both[:, inner:].abs() * (1 + scale) + 1e-6 * want.abs()
    assert bool(((both[:, :inner] - want).abs() <= bound).all())
    assert torch.equal(both[:, inner:], up)


def test_nan_and_infinity_are_not_hidden() -> None:
    x = torch.tensor([[1.0, float("nan"), 2.0], [1.0, float("inf"), 2.0]])
    assert not bool(rms_norm(x, torch.ones(3), 1e-5).isfinite().all(1).any())


@pytest.mark.parametrize(
    ("x", "error"),
    [
        (torch.zeros(2, 4, dtype=torch.float64), TypeError),
        (torch.zeros(4, 2).t(), ValueError),
        (torch.zeros(4), ValueError),
    ],
)
def test_wrong_rows_are_refused(x: Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"x_TE|weight_E"):
        rms_norm(x, torch.ones(4), 1e-5)


FAMILIES = {
    "llama": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "gemma": {"qk_norm": True, "sandwich_norm": True, "activation": "gelu_tanh", "window": 5},
    "biased": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
}


def make_decoder(kind: str, heads: int = 6, kv_heads: int = 2, layers: int = 3) -> Decoder:
    config = DecoderConfig(
        family="test",
        vocab_size=50,
        hidden_size=40,
        intermediate_size=56,
        num_layers=layers,
        shape=HeadShape(heads, kv_heads, 8),
        max_positions=64,
        rope=RopeSpec(10000.0, 8),
        window_layers=tuple(i % 2 == 0 for i in range(layers)) if "window" in FAMILIES[kind] else (),
        **FAMILIES[kind],
    )
    torch.manual_seed(3)
    decoder = Decoder(config)
    for name, parameter in decoder.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.2)
    return decoder.eval()


def pack(linear: torch.nn.Module, module: ModuleType) -> Packed:
    weight, bias = linear.weight.detach(), linear.bias
    bias_P = None if bias is None else pad_rows(bias.detach()).flatten()
    return dense(pack_dense(weight), weight.shape[0], bias_P, module=module)


def make_block(decoder: Decoder, index: int, module: ModuleType) -> Block:
    layer, shape = decoder.layers[index], decoder.config.shape
    norms = [layer.input_norm, layer.mlp_norm, layer.q_norm, layer.k_norm]
    norms += [layer.post_attention_norm, layer.post_mlp_norm]
    return Block(
        *(pack(getattr(layer, name), module) for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
        Norms(*(None if norm is None else norm.weight.detach() for norm in norms)),
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        size=shape.size,
        eps=decoder.config.norm_eps,
        gelu=decoder.config.activation == "gelu_tanh",
    )


@pytest.mark.parametrize("module", LEVELS)
@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("rows", [1, 5, 33])
@torch.inference_mode()
def test_block_is_the_layer(module: ModuleType, kind: str, rows: int) -> None:
    decoder = make_decoder(kind)
    layer, block = decoder.layers[1], make_block(decoder, 1, module)
    x = torch.randn(rows, 40)
    seen: list[Tensor] = []

    def attend(index: int, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
        seen.append(torch.cat([part.flatten(1) for part in (q, k, v)], 1))
        return torch.tanh(q)

    want = layer.attention(x, torch.arange(rows), attend)
    qkv = block.attention_in(x)
    torch.testing.assert_close(qkv, seen[0], rtol=1e-4, atol=1e-5)
    out = torch.tanh(qkv[:, : block.heads * block.size]).contiguous()
    torch.testing.assert_close(block.attention_out(out, x), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(block.mlp(x), layer.mlp(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("module", LEVELS)
@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("sizes", [[12], [5, 1, 1, 5]])
@torch.inference_mode()
def test_stack_is_the_decoder(module: ModuleType, kind: str, sizes: list[int]) -> None:
    """Chunk by chunk through the pages, against full causal attention."""
    decoder = make_decoder(kind)
    config, page, total = decoder.config, 4, sum(sizes)
    ids = torch.randint(0, 50, (total,))
    x, position = decoder.embed(ids), torch.arange(total)
    want, attend = x, CausalAttend(decoder)
    for layer in decoder.layers:
        want = layer.mlp(layer.attention(want, position, attend))
    pools = torch.zeros(2, config.num_layers, 5, config.shape.kv_heads, page, config.shape.size)
    specs = [config.attention(i) for i in range(config.num_layers)]
    kinds = list(dict.fromkeys(specs))
    blocks = [make_block(decoder, i, module) for i in range(config.num_layers)]
    stack = Stack(
        blocks, list(pools[0]), list(pools[1]), [0] * config.num_layers, [kinds.index(s) for s in specs]
    )
    table, start, kernel, found = torch.tensor([[3, 1, 4]], dtype=torch.int32), 0, DenseKernel(), []
    for size in sizes:
        index = torch.arange(start, start + size)
        layout = StepLayout(
            query_start_S1=torch.tensor([0, size], dtype=torch.int32),
            kv_len_S=torch.tensor([start + size], dtype=torch.int32),
            page_table_SM=table,
            position_T=index,
            slot_T=table[0, index // page].long() * page + index % page,
            page_size=page,
            sequence_ids=(7,),
        )
        plan = kernel.plan(layout)
        readings = []
        for spec in kinds:
            part = kernel.reading(plan, spec)
            readings.append(Reading(part.schedule, spec.scale, spec.softcap))
        rows = x[start : start + size].clone()
        stack.step(rows, layout.slot_T, [decoder.rope(0).tables(index)], readings)
        found.append(rows)
        start += size
    torch.testing.assert_close(torch.cat(found), want, rtol=1e-4, atol=1e-4)


def test_parts_that_do_not_fit_are_refused() -> None:
    decoder, module = make_decoder("llama"), _module("scalar")
    layer = decoder.layers[0]
    norms = Norms(torch.ones(40), torch.ones(40))
    parts = [pack(getattr(layer, n), module) for n in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")]
    with pytest.raises(ValueError, match="qkv_proj"):
        Block(*parts, norms, heads=4, kv_heads=2, size=8, eps=1e-5)
    with pytest.raises(ValueError, match="gate_up_proj"):
        Block(*parts[:3], parts[1], norms, heads=6, kv_heads=2, size=8, eps=1e-5)
    with pytest.raises(ValueError, match=r"input_E"):
        Block(*parts, Norms(torch.ones(39), torch.ones(40)), heads=6, kv_heads=2, size=8, eps=1e-5)
    block = make_block(decoder, 0, module)
    with pytest.raises(ValueError, match="out_TV"):
        block.attention_out(torch.zeros(2, 48), torch.zeros(3, 40))
    pool = torch.zeros(5, 2, 4, 8)
    with pytest.raises(ValueError, match="k_NGPD"):
        Stack([block], [torch.zeros(5, 3, 4, 8)], [pool], [0], [0])
    stack = Stack([block], [pool], [pool.clone()], [0], [0])
    tables = [(torch.zeros(1, 8), torch.zeros(1, 8))]
    with pytest.raises(ValueError, match="schedule per reading"):
        stack.step(torch.zeros(1, 40), torch.zeros(1, dtype=torch.int64), tables, [])
    with pytest.raises(ValueError, match="slot_T"):
        stack.step(torch.zeros(1, 40), torch.tensor([20]), tables, [])
