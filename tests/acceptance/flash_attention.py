"""Acceptance of `flash_attention` (checks 1 to 4 and 6 of its specification; 5 is speed: `python -m benchmarks.flash`).

The kernels are tested by property, at every instruction-set level, in tests/kernels/test_flash.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hasten.attention.flash_attention import FlashAttention, butterfly, flash_attention, masking_of
from hasten.attention.flash_attention2 import FlashAttention2
from hasten.kernels.reference import flash as reference
from hasten.lm.llm import LLM
from hasten.lm.request import SamplingParams

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


# -- 1. equal to float64, no worse than the standard implementation ----------


@pytest.mark.parametrize("size", [32, 40, 64, 80, 128, 256])
@pytest.mark.parametrize("length", [127, 500])
@pytest.mark.parametrize("causal", [False, True])
def test_output_and_gradients_match_float64(size: int, length: int, causal: bool) -> None:
    inputs = tensors(length + size, *[(1, 3, length, size)] * 4)
    want = results(plain, *[x.double() for x in inputs], causal=causal)
    standard = results(plain, *inputs, causal=causal)
    got = results(flash_attention, *inputs, causal=causal)
    for ours, theirs, exact in zip(got, standard, want, strict=True):
        # The standard implementation is itself off by up to 2e-6 where many values cancel.
        assert error(ours, exact) <= max(2e-6, error(theirs, exact))
        assert scatter(ours, exact) <= 1.3 * scatter(theirs, exact)


def test_bfloat16_rounds_in_and_out_only() -> None:
    """Sums are float32: the error is that of rounding the result, not of adding 2000 rounded terms."""
    inputs = [x.bfloat16() for x in tensors(3, *[(1, 2, 2000, 64)] * 3, (1, 2, 2000, 64))]
    want = results(plain, *[x.double() for x in inputs], causal=True)
    got = results(flash_attention, *inputs, causal=True)
    assert all(x.dtype is torch.bfloat16 for x in got)
    assert error(got[0], want[0]) <= 2**-8
    # D = rowsum(dO * O) reads the rounded output, as in the paper's 16-bit kernels.
    assert max(error(a, b) for a, b in zip(got[1:], want[1:], strict=True)) <= 2**-7


# -- 2. dropout ----------


def test_dropout_is_the_same_forward_and_backward() -> None:
    """With one mask in both directions, attention is linear in v: <dout, out> = <dv, v>; and the mask is known."""
    q, k, v, dout = tensors(5, *[(2, 3, 150, 32)] * 4)
    named = {"causal": True, "dropout": 0.25, "seed": 77}
    out, dq, dk, dv = results(flash_attention, q, k, v, dout, **named)
    torch.testing.assert_close((dout * out).sum(), (dv * v).sum(), rtol=1e-4, atol=1e-2)
    want = results(plain, *[x.double() for x in (q, k, v, dout)], **named)
    for ours, exact in zip((out, dq, dk, dv), want, strict=True):
        assert error(ours, exact) <= 2e-6
    again = results(flash_attention, q, k, v, dout, **named)
    assert all(torch.equal(a, b) for a, b in zip(again, (out, dq, dk, dv), strict=True))
    other = flash_attention(q, k, v, causal=True, dropout=0.25, seed=78)
    assert not torch.equal(other, out)


def test_dropout_gradient_agrees_with_finite_differences() -> None:
    q, k, v, dout = tensors(6, *[(1, 2, 40, 16)] * 4)
    named = {"dropout": 0.3, "seed": 5}
    gradients = results(flash_attention, q, k, v, dout, **named)[1:]
    step = 1e-2
    for i, gradient in enumerate(gradients):
        (direction,) = tensors(20 + i, q.shape)
        sides = []
        for sign in (1, -1):
            moved = [q, k, v]
            moved[i] = moved[i] + sign * step * direction
            sides.append((flash_attention(*moved, **named).double() * dout).sum())
        slope = (sides[0] - sides[1]) / (2 * step)
        torch.testing.assert_close(slope, (gradient.double() * direction).sum(), rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_dropout_keeps_the_right_share_everywhere(dropout: float) -> None:
    """Shares per row and per column, and between neighbours, scatter like independent coin flips."""
    shape = (2, 2, 1024, 1024)
    masking = masking_of(32, dropout=dropout, seed=1234)
    kept = reference.dropout_mask(masking, shape).double()
    keep, count = 1 - dropout, kept.numel()
    deviation = (keep * dropout / count) ** 0.5
    assert abs(kept.mean().item() - keep) < 4 * deviation
    for axis in (-1, -2):
        scatter = kept.mean(axis).var().item() / (keep * dropout / 1024)
        assert 0.85 < scatter < 1.15
        pairs = ((kept - keep) * (kept.roll(1, axis) - keep)).mean().item()
        assert abs(pairs) < 4 * keep * dropout / count**0.5
    assert abs(((kept[0] - keep) * (kept[1] - keep)).mean().item()) < 4 * keep * dropout / (count / 2) ** 0.5


def test_dropout_draws_its_seed_from_torch() -> None:
    q, k, v = tensors(8, *[(1, 1, 30, 8)] * 3)
    torch.manual_seed(1)
    first = [flash_attention(q, k, v, dropout=0.5) for _ in range(2)]
    torch.manual_seed(1)
    assert torch.equal(flash_attention(q, k, v, dropout=0.5), first[0])
    assert not torch.equal(*first)


# -- 3. edges ----------


@pytest.mark.parametrize("size", [32, 40, 64, 80, 128, 256])
def test_rows_that_see_nothing_give_zero(size: int) -> None:
    """More rows than keys under a causal limit: the first rows stand before the first key."""
    q, dout = tensors(size, (1, 2, 100, size), (1, 2, 100, size))
    k, v = tensors(size + 1, (1, 2, 37, size), (1, 2, 37, size))
    out, lse = flash_attention(q, k, v, causal=True, return_lse=True)
    assert (out[:, :, :63] == 0).all()
    assert torch.isneginf(lse[:, :, :63]).all()
    got = results(flash_attention, q, k, v, dout, causal=True)
    want = results(plain, *[x.double() for x in (q, k, v, dout)], causal=True)
    assert max(error(a, b) for a, b in zip(got, want, strict=True)) <= 2e-6
    assert (got[1][:, :, :63] == 0).all()


def test_a_bias_that_hides_everything() -> None:
    q, k, v, dout = tensors(2, *[(1, 1, 5, 8)] * 4)
    got = results(flash_attention, q, k, v, dout, bias_BHTS=torch.full((1, 1, 1, 1), float("-inf")))
    assert all((x == 0).all() for x in got)


def test_one_token() -> None:
    q, k, v, dout = tensors(1, *[(2, 3, 1, 64)] * 4)
    out, lse = flash_attention(q, k, v, return_lse=True)
    torch.testing.assert_close(out, v)
    torch.testing.assert_close(lse, (q * k).sum(-1) / 8)
    assert torch.equal(results(flash_attention, q, k, v, dout)[3], dout)


# -- 4. memory ----------


def test_memory_is_linear_in_length() -> None:
    """Measured: 16K tokens of one head allocate less than 1/10 of a score matrix (1 GiB), and at most twice 8K's."""
    half, whole, standard = peaks("1:8192:1:1", "1:16384:1:1", "standard:2048:1:1")
    assert whole < 16384 * 6000
    assert whole < 2.1 * half
    # The instrument sees a quadratic term where there is one.
    assert standard > 2 * 2048**2 * 4


# -- 6. training ----------


class Block(nn.Module):
    def __init__(self, width: int, heads: int, attention) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BTE: Tensor) -> Tensor:
        batch, length, width = x_BTE.shape
        qkv = self.qkv(self.norms[0](x_BTE)).view(batch, length, 3, self.heads, -1)
        out = self.attention(*qkv.permute(2, 0, 3, 1, 4), causal=True)
        x_BTE = x_BTE + self.out(out.transpose(1, 2).reshape(batch, length, width))
        return x_BTE + self.mlp(self.norms[1](x_BTE))


def losses(attention, steps: int) -> list[float]:
    """A small language model learns bytes of Python's own documentation strings."""
    torch.manual_seed(0)
    text = torch.tensor(
        list("".join(str(m.__doc__) for m in (str, bytes, dict, list, sys, Path, int)).encode())
    )
    embed, place = nn.Embedding(256, 48), nn.Parameter(0.02 * torch.randn(100, 48))
    blocks, head = [Block(48, 3, attention) for _ in range(2)], nn.Linear(48, 256)
    model = nn.ModuleList([embed, *blocks, head])
    optimizer = torch.optim.AdamW([*model.parameters(), place], 3e-3)
    out = []
    for step in range(steps):
        start = torch.randint(len(text) - 101, (4,), generator=torch.Generator().manual_seed(step))
        batch = torch.stack([text[i : i + 101] for i in start])
        x = embed(batch[:, :-1]) + place
        for block in blocks:
            x = block(x)
        loss = nn.functional.cross_entropy(head(x).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        out.append(loss.item())
    return out


def test_training_follows_the_same_loss_curve() -> None:
    ours, theirs = losses(flash_attention, 40), losses(plain, 40)
    assert ours[-1] < 0.75 * ours[0]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=2e-4, atol=0)


# -- block-sparse, and the engine's path ----------


@pytest.mark.parametrize("block", [16, 64, 96])
def test_block_sparse_equals_masked_attention(block: int) -> None:
    q, k, v, dout = tensors(block, (1, 4, 300, 32), *[(1, 2, 300, 32)] * 2, (1, 4, 300, 32))
    count = -(-300 // block)
    keep = butterfly(count, count)
    assert keep.diagonal(dim1=-2, dim2=-1).all()
    assert keep[0, 0, 0].all()
    for named in ({"keep_BHQK": keep, "block": block}, {"keep_BHQK": keep, "block": block, "causal": True}):
        got = results(flash_attention, q, k, v, dout, **named)
        want = results(plain, *[x.double() for x in (q, k, v, dout)], **named)
        assert max(error(a, b) for a, b in zip(got, want, strict=True)) <= 2e-6


def test_skipped_blocks_are_not_read() -> None:
    """NaN in keys and values that no kept block holds changes nothing."""
    q, k, v = tensors(4, *[(1, 1, 256, 16)] * 3)
    keep = torch.eye(4, dtype=torch.bool)[None, None]
    keep[..., 3] = False
    keep[..., 3, 0] = True
    clean = flash_attention(q, k, v, keep_BHQK=keep)
    k[:, :, 192:], v[:, :, 192:] = float("nan"), float("inf")
    assert torch.equal(flash_attention(q, k, v, keep_BHQK=keep), clean)


def test_real_model_answers_alike(default_model_path: Path) -> None:
    text = "The river has three sources. The first lies in the north, the second in the hills. " * 14
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    answers = []
    for use in ([], [FlashAttention()], [FlashAttention2()]):
        with LLM(default_model_path, use=use, dtype="float32", kv_tokens=2048, threads=1) as llm:
            answers.append(llm.generate([text], params)[0].token_ids)
    assert answers[0] == answers[1] == answers[2]
