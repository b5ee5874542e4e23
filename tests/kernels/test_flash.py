"""FlashAttention kernels against the plain definition, at every instruction-set level, in both orders."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.kernels import available_levels
from hasten.kernels.flash import backward, forward
from hasten.kernels.flash_pages import PagesWork, flash_pages
from hasten.kernels.flash_terms import VERSION_1, VERSION_2, Masking, Schedule, Stats
from hasten.kernels.native import _module
from hasten.kernels.reference import flash as reference

pytestmark = pytest.mark.usefixtures("one_thread")

LEVELS = [pytest.param(_module(name), id=name) for name in available_levels()]
VERSIONS = [pytest.param(VERSION_1, id="v1"), pytest.param(VERSION_2, id="v2")]
BOTH = st.sampled_from([VERSION_1, VERSION_2])


def tensors(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def expected(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, masking: Masking, sequence: int | None = None
) -> list[Tensor]:
    """out, lse, dq, dk, dv in float64."""
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = reference.flash_attention(*wide, masking, sequence=sequence)
    gradients = torch.autograd.grad(out, wide, dout.double(), allow_unused=True)
    return [
        out.detach(),
        lse.detach(),
        *(torch.zeros_like(x) if g is None else g for x, g in zip(wide, gradients, strict=True)),
    ]


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    """Largest error relative to the largest value (and to 1), after checking that infinities agree.

    The error of a weight is that of its logit, some float32 roundings of a number of up to about 20.
    """
    assert got.shape == want.shape
    assert torch.equal(torch.isinf(got), torch.isinf(want))
    finite = ~torch.isinf(want)
    if finite.any():
        scale = max(1.0, want[finite].abs().max().item())
        assert (got.double() - want)[finite].abs().max().item() <= tolerance * scale


def masking_from(rng: random.Random, batch: int, heads: int, rows: int, keys: int, size: int) -> Masking:
    """A random mixture of everything that a call may ask for."""
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    block = rng.choice([1, 16, 33, 64, 100])
    shape = (rng.choice([1, batch]), rng.choice([1, heads]), -(-rows // block), -(-keys // block))
    bias_shape = (
        rng.choice([1, batch]),
        rng.choice([1, heads]),
        rng.choice([1, rows]),
        rng.choice([1, keys]),
    )
    bias = torch.randn(bias_shape, generator=generator)
    bias[torch.rand(bias_shape, generator=generator) < 0.1] = float("-inf")
    return Masking(
        scale=size**-0.5 * rng.choice([0.5, 1.0, 2.0]),
        left=rng.choice([None, None, 0, 5, 70]),
        right=rng.choice([None, 0, 0, 3, 40]),
        softcap=rng.choice([None, None, 5.0]),
        bias_BHTS=rng.choice([None, None, bias]),
        alibi_H=rng.choice([None, None, torch.rand(heads, generator=generator)]),
        keep_BHQK=rng.choice([None, None, torch.rand(shape, generator=generator) < 0.6]),
        block=block,
        dropout=rng.choice([0.0, 0.0, 0.2]),
        seed=rng.randrange(1 << 64),
    )


def schedule_from(rng: random.Random, version: Schedule) -> Schedule:
    return replace(
        version,
        lanes=rng.choice([1, 24, 50, 96, 192]),
        tile=rng.choice([1, 7, 64, 128]),
        skip=rng.random() < 0.8,
        deterministic=rng.random() < 0.5,
    )


@pytest.mark.parametrize("module", LEVELS)
@given(
    seed=st.integers(0, 2**32),
    version=BOTH,
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2), (2, 2)]),
    rows=st.sampled_from([0, 1, 2, 23, 24, 25, 64, 97, 130]),
    keys=st.sampled_from([0, 1, 3, 63, 64, 65, 129, 200]),
    size=st.sampled_from([1, 5, 8, 16, 33, 40]),
)
@settings(max_examples=40, deadline=None)
def test_forward_and_backward_equal_reference(
    module: ModuleType, seed: int, version: Schedule, heads: tuple[int, int], rows: int, keys: int, size: int
) -> None:
    rng = random.Random(seed)
    batch = rng.choice([1, 2])
    q, k, v, dout = tensors(
        seed,
        (batch, heads[0], rows, size),
        *[(batch, heads[1], keys, size)] * 2,
        (batch, heads[0], rows, size),
    )
    masking = masking_from(rng, batch, heads[0], rows, keys, size)
    schedule = schedule_from(rng, version)
    want = expected(q, k, v, dout, masking)
    out, stats = forward(q, k, v, masking, schedule, module=module)
    close(out, want[0])
    close(stats.log_sum_exp(), want[1])
    assert (out[torch.isinf(want[1])] == 0).all()
    for got, right in zip(
        backward(dout, q, k, v, out, stats, masking, schedule, module=module), want[2:], strict=True
    ):
        close(got, right, 2e-5)


@pytest.mark.parametrize("module", LEVELS)
@given(seed=st.integers(0, 2**32), version=BOTH, count=st.integers(0, 4))
@settings(max_examples=15, deadline=None)
def test_packed_sequences_equal_reference(
    module: ModuleType, seed: int, version: Schedule, count: int
) -> None:
    rng = random.Random(seed)
    rows, keys = [[rng.choice([0, 1, 24, 70]) for _ in range(count)] for _ in range(2)]
    cu_q, cu_k = ([sum(x[:i]) for i in range(count + 1)] for x in (rows, keys))
    q, k, v, dout = tensors(seed, (sum(rows), 4, 16), *[(sum(keys), 2, 16)] * 2, (sum(rows), 4, 16))
    masking = masking_from(rng, count, 4, max(rows, default=0), max(keys, default=0), 16)
    schedule = schedule_from(rng, version)
    out, stats = forward(q, k, v, masking, schedule, cu_q=cu_q, cu_k=cu_k, module=module)
    gradients = backward(dout, q, k, v, out, stats, masking, schedule, cu_q=cu_q, cu_k=cu_k, module=module)
    for b in range(count):
        in_q, in_k = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        alone = [x[s].transpose(0, 1)[None] for x, s in ((q, in_q), (k, in_k), (v, in_k), (dout, in_q))]
        want = expected(*alone, masking, sequence=b)
        close(out[in_q].transpose(0, 1)[None], want[0])
        close(stats.log_sum_exp()[None, :, in_q], want[1])
        for got, right, s in zip(gradients, want[2:], (in_q, in_k, in_k), strict=True):
            close(got[s].transpose(0, 1)[None], right, 2e-5)


@pytest.mark.parametrize("module", LEVELS)
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("size", [32, 80, 256])
def test_bfloat16_tensors_with_any_strides(module: ModuleType, version: Schedule, size: int) -> None:
    """[B, T, H, D] storage, as a fused projection leaves it; sums are float32, so only in- and output are rounded."""
    q, k, v, dout = (
        x.transpose(1, 2)
        for x in tensors(0, (2, 70, 4, size), *[(2, 90, 2, size)] * 2, (2, 70, 4, size), dtype=torch.bfloat16)
    )
    masking = Masking(size**-0.5, right=0)
    want = expected(q, k, v, dout, masking)
    out, stats = forward(q, k, v, masking, version, module=module)
    assert out.dtype is torch.bfloat16
    close(stats.log_sum_exp(), want[1])
    close(out, want[0], 2**-8)
    for got, right in zip(
        backward(dout, q, k, v, out, stats, masking, version, module=module), want[2:], strict=True
    ):
        assert got.dtype is torch.bfloat16
        close(got, right, 2**-6)


@pytest.mark.parametrize("module", LEVELS)
@given(seed=st.integers(0, 2**32), splits=st.sampled_from([2, 3, 9]), rows=st.sampled_from([1, 5, 40]))
@settings(max_examples=10, deadline=None)
def test_split_keys_are_merged(module: ModuleType, seed: int, splits: int, rows: int) -> None:
    rng = random.Random(seed)
    q, k, v = tensors(seed, (2, 4, rows, 16), *[(2, 2, 300, 16)] * 2)
    masking = replace(masking_from(rng, 2, 4, rows, 300, 16), dropout=0.0)
    want = expected(q, k, v, q, masking)
    out, stats = forward(q, k, v, masking, replace(VERSION_2, splits=splits), module=module)
    close(out, want[0])
    close(stats.log_sum_exp(), want[1])
    packed = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    if masking.keep_BHQK is None and masking.bias_BHTS is None:
        starts = ([0, rows, 2 * rows], [0, 300, 600])
        again, stats = forward(
            *packed, masking, replace(VERSION_2, splits=splits), cu_q=starts[0], cu_k=starts[1], module=module
        )
        close(again.view(2, rows, 4, 16).transpose(1, 2), want[0])
        close(stats.lse.view(4, 2, rows).transpose(0, 1), want[1])


@pytest.mark.parametrize("module", LEVELS)
@pytest.mark.parametrize("version", VERSIONS)
def test_the_dropout_mask_is_that_of_the_reference(module: ModuleType, version: Schedule) -> None:
    """Values that are unit vectors show the weights themselves."""
    q, k = tensors(1, (2, 3, 40, 8), (2, 3, 32, 8))
    v = torch.eye(32).expand(2, 3, 32, 32)
    masking = Masking(0.3, dropout=0.4, seed=(1 << 63) + 12345)
    q, k = (torch.nn.functional.pad(x, (0, 24)) for x in (q, k))
    out, _ = forward(q, k, v, masking, version, module=module)
    assert torch.equal(out != 0, reference.dropout_mask(masking, (2, 3, 40, 32)))


@pytest.mark.parametrize("module", LEVELS)
@pytest.mark.parametrize("version", VERSIONS)
def test_large_logits_and_nan(module: ModuleType, version: Schedule) -> None:
    q, k, v = tensors(2, (1, 1, 50, 16), (1, 1, 100, 16), (1, 1, 100, 16))
    out, stats = forward(q * 1e3, k * 1e3, v, Masking(1.0), version, module=module)
    best = (q @ k.transpose(-1, -2)).argmax(-1)
    torch.testing.assert_close(out[0, 0], v[0, 0, best[0, 0]])
    q[0, 0, 7, 3] = float("nan")
    out, stats = forward(q, k, v, Masking(1.0, right=0), version, module=module)
    bad = torch.isnan(out).any(-1)[0, 0]
    assert bad.nonzero().flatten().tolist() == [7]
    assert torch.isnan(stats.log_sum_exp())[0, 0].nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("module", LEVELS)
@given(seed=st.integers(0, 2**32), version=BOTH, page=st.sampled_from([1, 4, 32]), bf16=st.booleans())
@settings(max_examples=15, deadline=None)
def test_pages_equal_the_plain_tensors(
    module: ModuleType, seed: int, version: Schedule, page: int, bf16: bool
) -> None:
    rng = random.Random(seed)
    size, rows = rng.choice([(8, [3, 30]), (40, [1, 17])])
    keys = [n + rng.randint(0, 80) for n in rows]
    width = -(-max(keys) // page)
    dtype = torch.bfloat16 if bf16 else torch.float32
    k_pages, v_pages = tensors(seed, *[(2 * width, 2, page, size)] * 2, dtype=dtype)
    table = torch.randperm(2 * width, generator=torch.Generator().manual_seed(seed)).view(2, width).int()
    (q,) = tensors(seed + 1, (sum(rows) + 2, 6, size))
    masking = Masking(0.3, rng.choice([None, 9]), 0, rng.choice([None, 4.0]))
    out = torch.full_like(q, 7.0)
    first = [1, rows[0] + 2]
    work = PagesWork(table, first, rows, keys)
    flash_pages(q, k_pages, v_pages, work, masking, out, version, module=module)
    for b in range(2):
        k, v = (
            x[table[b].long()].transpose(0, 1).reshape(2, -1, size)[None, :, : keys[b]].double()
            for x in (k_pages, v_pages)
        )
        own = slice(first[b], first[b] + rows[b])
        want, _ = reference.flash_attention(q[own].transpose(0, 1)[None].double(), k, v, masking)
        close(out[own].transpose(0, 1)[None], want)
    assert (out[[0, rows[0] + 1]] == 7.0).all(), "other rows are left alone"


def call(**change: object) -> object:
    q, k, v = tensors(0, (1, 4, 10, 8), (1, 2, 12, 8), (1, 2, 12, 8))
    given: dict = {"q": q, "k": k, "v": v, "masking": Masking(0.3)} | change
    return forward(**given)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"q": torch.zeros(1, 4, 10, 8).double()}, TypeError, "float32 or all bfloat16"),
        ({"k": torch.zeros(1, 2, 12, 8).bfloat16()}, TypeError, "k torch.bfloat16"),
        ({"k": torch.zeros(1, 2, 11, 8)}, ValueError, "must have one shape"),
        ({"q": torch.zeros(1, 4, 10, 9)}, ValueError, "head size of q is 9"),
        ({"q": torch.zeros(1, 3, 10, 8)}, ValueError, "3 query heads do not share 2"),
        ({"q": torch.zeros(2, 4, 10, 8)}, ValueError, "q holds 2 sequences"),
        ({"q": torch.zeros(4, 8)}, ValueError, "dimensions differ"),
        ({"cu_q": [0, 10]}, ValueError, "belong to packed"),
        ({"masking": Masking(0.3, alibi_H=torch.zeros(3))}, ValueError, "alibi_H"),
        ({"masking": Masking(0.3, bias_BHTS=torch.zeros(1, 4, 10, 11))}, ValueError, "does not expand"),
        ({"masking": Masking(0.3, bias_BHTS=torch.zeros(1, 1, 1, 12).double())}, TypeError, "bias_BHTS"),
        ({"masking": Masking(0.3, bias_BHTS=torch.zeros(12, requires_grad=True))}, ValueError, "no gradient"),
        ({"masking": Masking(0.3, keep_BHQK=torch.ones(1, 1, 2, 1) > 0)}, ValueError, "keep_BHQK"),
        ({"masking": Masking(0.3, keep_BHQK=torch.ones(1, 1, 1, 1))}, TypeError, "keep_BHQK must be bool"),
    ],
)
def test_bad_input_is_refused(change: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call(**change)


@pytest.mark.parametrize(
    ("cu_q", "cu_k", "match"),
    [
        ([0, 5], [0, 12], "cu_q must rise from 0 to 10"),
        ([0, 7, 5, 10], [0, 3, 4, 12], "cu_q must rise"),
        ([0, 10], [0, 3, 12], "cu_q names 1 sequences, cu_k 2"),
        (None, [0, 12], "need cu_q and cu_k"),
        ([], [0, 12], "cu_q must rise"),
    ],
)
def test_bad_starts_are_refused(cu_q: object, cu_k: object, match: str) -> None:
    q, k, v = tensors(0, (10, 4, 8), (12, 2, 8), (12, 2, 8))
    with pytest.raises(ValueError, match=match):
        forward(q, k, v, Masking(0.3), cu_q=cu_q, cu_k=cu_k)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"scale": math.nan}, "scale must be finite"),
        ({"left": -1}, "left must be"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"block": 0}, "block must be"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_bad_settings_are_refused(settings: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Masking(**({"scale": 1.0} | settings))


@pytest.mark.parametrize(
    ("change", "match"), [({"tile": 257}, "tile"), ({"lanes": 0}, "lanes"), ({"splits": 0}, "splits")]
)
def test_bad_schedules_are_refused(change: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Schedule(**change)
    with pytest.raises(ValueError, match="deferred"):
        Schedule(splits=2, deferred=False)


def test_statistics_belong_to_a_version() -> None:
    q, k, v = tensors(0, (1, 2, 10, 8), (1, 2, 12, 8), (1, 2, 12, 8))
    out, stats = forward(q, k, v, Masking(0.3), VERSION_2)
    with pytest.raises(ValueError, match="another version"):
        backward(out, q, k, v, out, stats, Masking(0.3), VERSION_1)
    with pytest.raises(ValueError, match="must agree"):
        backward(out[:, :1], q, k, v, out, Stats(stats.lse), Masking(0.3), VERSION_2)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"keys_B": [9]}, ValueError, "keys_B exceeds"),
        ({"rows_B": [4]}, ValueError, "rows outside the 3"),
        ({"table_BM": torch.tensor([[0, 3]], dtype=torch.int32)}, ValueError, "outside the pool of 3"),
        ({"table_BM": torch.tensor([[0, -1]], dtype=torch.int32)}, ValueError, "a page below 0"),
        ({"first_B": [0, 0]}, ValueError, "differ in length"),
        ({"masking": Masking(0.3, dropout=0.1)}, ValueError, "soft-cap only"),
        ({"table_BM": torch.tensor([[0, 1]])}, TypeError, "table_BM"),
        ({"q_THD": torch.zeros(3, 4, 8).bfloat16()}, TypeError, "q_THD must be float32"),
        ({"out_THD": torch.zeros(2, 4, 8)}, ValueError, "out_THD"),
        ({"k_NGPD": torch.zeros(3, 2, 4, 9)}, ValueError, "must be equal"),
        ({"v_NGPD": torch.zeros(3, 2, 4, 8).half()}, TypeError, "pages must be"),
    ],
)
def test_bad_pages_are_refused(change: dict, error: type[Exception], match: str) -> None:
    given = {
        "q_THD": torch.zeros(3, 4, 8),
        "k_NGPD": torch.zeros(3, 2, 4, 8),
        "v_NGPD": torch.zeros(3, 2, 4, 8),
        "table_BM": torch.tensor([[0, 1]], dtype=torch.int32),
        "first_B": [0],
        "rows_B": [3],
        "keys_B": [8],
        "masking": Masking(0.3),
        "out_THD": torch.zeros(3, 4, 8),
    }

    def attend(given: dict) -> None:
        work = PagesWork(*(given[name] for name in ("table_BM", "first_B", "rows_B", "keys_B")))
        tensors = (given[name] for name in ("q_THD", "k_NGPD", "v_NGPD"))
        flash_pages(*tensors, work, given["masking"], given["out_THD"])

    attend(given)
    with pytest.raises(error, match=match):
        attend(given | change)
