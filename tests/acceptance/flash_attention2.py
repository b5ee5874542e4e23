"""Acceptance of `flash_attention2` (checks 1 to 4 and 6 of its specification).

5 and the costs of 4 are speed: `python -m benchmarks.flash`. The real model is asked in flash_attention.py.
The kernels are tested by property, at every instruction-set level, in tests/kernels/test_flash.py.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hasten.attention.flash_attention import masking_of
from hasten.attention.flash_attention2 import flash_attention2
from hasten.kernels.flash_terms import VERSION_1, VERSION_2, Schedule
from hasten.kernels.reference import flash as reference

sys.path.insert(0, str(Path(__file__).parents[1] / "attention"))

from flash_peak import peaks

pytestmark = pytest.mark.usefixtures("one_thread")


def tensors(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def results(attention, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, **named) -> list[Tensor]:
    """Output and gradients."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*inputs, **named)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout.to(out.dtype))]


def plain(q: Tensor, k: Tensor, v: Tensor, **named) -> Tensor:
    return reference.flash_attention(q, k, v, masking_of(q.shape[-1], **named))[0]


def error(got: Tensor, want: Tensor) -> float:
    """Largest error relative to the largest value."""
    return ((got.double() - want).abs().max() / want.abs().max()).item()


def scatter(got: Tensor, want: Tensor) -> float:
    """Root mean square of the error."""
    return (got.double() - want).square().mean().sqrt().item()


# -- 1. numbers ----------


@pytest.mark.parametrize("size", [32, 40, 64, 80, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_output_gradients_and_lse_match_float64(size: int, causal: bool) -> None:
    inputs = tensors(size, *[(1, 3, 500, size)] * 4)
    want = results(plain, *[x.double() for x in inputs], causal=causal)
    standard = results(plain, *inputs, causal=causal)
    got = results(flash_attention2, *inputs, causal=causal)
    for ours, theirs, exact in zip(got, standard, want, strict=True):
        # The standard implementation is itself off by up to 2e-6 where many values cancel.
        assert error(ours, exact) <= max(2e-6, error(theirs, exact))
        assert scatter(ours, exact) <= 1.3 * scatter(theirs, exact)
    _, lse = flash_attention2(*inputs[:3], causal=causal, return_lse=True)
    _, exact = reference.flash_attention(*[x.double() for x in inputs[:3]], masking_of(size, causal=causal))
    assert error(lse, exact) <= 1e-6


@pytest.mark.parametrize(
    "named",
    [
        {"causal": True, "window": 50},
        {"window": 33},
        {"causal": True, "softcap": 3.0},
        {"causal": True, "alibi_H": torch.tensor([0.5, 0.25, 0.1, 0.05])},
        {"bias_BHTS": torch.linspace(-2, 2, 300).view(1, 1, 1, 300)},
        {"causal": True, "dropout": 0.2, "seed": 3},
        {"keep_BHQK": torch.ones(5, 5, dtype=torch.bool).tril()[None, None], "block": 64},
    ],
    ids=lambda named: "+".join(named),
)
def test_every_variant_matches_float64(named: dict) -> None:
    inputs = tensors(0, (2, 4, 300, 40), *[(2, 2, 300, 40)] * 2, (2, 4, 300, 40))
    want = results(plain, *[x.double() for x in inputs], **named)
    got = results(flash_attention2, *inputs, **named)
    assert max(error(a, b) for a, b in zip(got, want, strict=True)) <= 2e-6


# -- 2. determinism ----------


def on_threads(threads: int, **named) -> list[Tensor]:
    torch.set_num_threads(threads)
    inputs = tensors(9, (1, 2, 1000, 32), *[(1, 1, 1000, 32)] * 2, (1, 2, 1000, 32))
    return results(flash_attention2, *inputs, causal=True, **named)


def test_forward_has_the_same_bits_on_one_and_two_threads() -> None:
    assert torch.equal(on_threads(1)[0], on_threads(2)[0])


def test_backward_has_the_same_bits_when_asked() -> None:
    one, two = on_threads(1, deterministic=True), on_threads(2, deterministic=True)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_backward_shared_by_threads_repeats_itself_and_is_right() -> None:
    """Without ``deterministic`` threads share the one head; which thread does what leaves no trace."""
    runs = [on_threads(2) for _ in range(5)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
    for shared, alone in zip(runs[0], on_threads(1), strict=True):
        torch.testing.assert_close(shared, alone, atol=2e-5, rtol=1e-5)


# -- 3. chunks and packed batches ----------


def test_chunks_of_a_prompt_equal_the_whole() -> None:
    """Causal with fewer rows than keys: the chunk's last row is the last key."""
    q, k, v = tensors(2, (1, 4, 333, 32), *[(1, 2, 333, 32)] * 2)
    whole = flash_attention2(q, k, v, causal=True)
    parts = [
        flash_attention2(q[:, :, a:b], k[:, :, :b], v[:, :, :b], causal=True)
        for a, b in ((0, 100), (100, 101), (101, 333))
    ]
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-6, rtol=1e-5)
    dout = q[:, :, 100:]
    got = results(flash_attention2, q[:, :, 100:], k, v, dout, causal=True)
    want = results(plain, *[x.double() for x in (q[:, :, 100:], k, v, dout)], causal=True)
    assert max(error(a, b) for a, b in zip(got, want, strict=True)) <= 2e-6


@pytest.mark.parametrize("threads", [1, 2])
def test_a_packed_batch_has_the_bits_of_its_sequences(threads: int) -> None:
    torch.set_num_threads(threads)
    lengths = [70, 1, 0, 333, 96]
    cu = [sum(lengths[:i]) for i in range(6)]
    q, k, v, dout = tensors(4, (500, 4, 32), *[(500, 2, 32)] * 2, (500, 4, 32))
    named = {"causal": True, "deterministic": True}
    packed = results(flash_attention2, q, k, v, dout, cu_q=cu, cu_k=torch.tensor(cu), **named)
    for a, b in itertools.pairwise(cu):
        alone = [x[a:b].transpose(0, 1)[None] for x in (q, k, v, dout)]
        for whole, part in zip(packed, results(flash_attention2, *alone, **named), strict=True):
            assert torch.equal(whole[a:b].transpose(0, 1)[None], part)


@pytest.mark.parametrize("splits", [2, 7])
def test_decoding_over_split_keys(splits: int) -> None:
    """One row over a long cache, its parts merged by their log-sum-exp."""
    q, k, v = tensors(6, (2, 6, 1, 64), *[(2, 2, 3000, 64)] * 2)
    out, lse = flash_attention2(q, k, v, causal=True, splits=splits, return_lse=True)
    want, exact = reference.flash_attention(*[x.double() for x in (q, k, v)], masking_of(64, causal=True))
    assert error(out, want) <= 2e-6
    assert error(lse, exact) <= 1e-6


# -- 4. every part of the mechanism on its own ----------

ABLATIONS = {
    "(1) normalised at every tile": replace(VERSION_2, deferred=False),
    "(2) keys in the outer loop": replace(VERSION_2, rows_outer=False, sequence_parallel=False),
    "(3) heads only in parallel": replace(VERSION_2, sequence_parallel=False),
    "(4) keys split, not rows": replace(VERSION_2, splits=2),
    "(5) every tile visited and masked": replace(VERSION_2, skip=False),
    "version 1": VERSION_1,
}


@pytest.mark.parametrize("schedule", ABLATIONS.values(), ids=ABLATIONS)
def test_each_switch_leaves_the_result_alone(schedule: Schedule) -> None:
    inputs = tensors(7, (2, 4, 200, 32), *[(2, 2, 200, 32)] * 2, (2, 4, 200, 32))
    want = results(flash_attention2, *inputs, causal=True)
    got = results(flash_attention2, *inputs, causal=True, schedule=schedule, splits=schedule.splits)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


# -- 6. grouped heads ----------


@pytest.mark.parametrize(("heads", "groups"), [(9, 3), (4, 1), (6, 6)])
def test_grouped_heads_equal_expanded_heads(heads: int, groups: int) -> None:
    """Autograd through the expansion sums dK and dV over the query heads of a group."""
    inputs = tensors(heads, (2, heads, 150, 32), *[(2, groups, 150, 32)] * 2, (2, heads, 150, 32))

    def expanded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(heads // groups, 1) for x in (k, v))
        return flash_attention2(q, k, v, causal=True)

    got = results(flash_attention2, *inputs, causal=True)
    for a, b in zip(got, results(expanded, *inputs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_grouped_heads_are_not_expanded_in_memory() -> None:
    """Measured: expanding one kv head to 16 would add 15 copies of k and v, and of their gradients."""
    length, heads = 2048, 16
    grouped, full, half = peaks(
        f"2:{length}:{heads}:1", f"2:{length}:{heads}:{heads}", f"2:{length}:{heads // 2}:1"
    )
    one_head = length * 32 * 4
    assert full - grouped > 20 * one_head  # the gradients of k and v that only the full run has
    assert grouped < 2 * half + one_head


def test_memory_is_linear_in_length() -> None:
    half, whole = peaks("2:8192:1:1", "2:16384:1:1")
    assert whole < 16384 * 6000
    assert whole < 2.1 * half
