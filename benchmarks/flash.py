"""Speed of `flash_attention` and `flash_attention2` (acceptance 5 of both): `python -m benchmarks.flash --json FILE`.

Parts (``--parts``), arms interleaved round by round:

    attention   forward, and forward + backward, per length, head size and mask
    heads       few heads in one sequence: what sharing the sequence among threads gives over version 1
    ablation    flash_attention2 with each part of its mechanism switched off
    sparse      block-sparse against our own dense kernel, per share of kept blocks
    training    whole steps of a small GPT

Arms: ``v1`` and ``v2`` are ours; ``math`` and ``fused`` PyTorch's scaled_dot_product_attention with that backend;
``standard`` attention written out in PyTorch; ``prepared`` the same, forward and backward by hand into buffers made
beforehand (without a causal mask only). Rates count useful work only (half when causal, backward 2.5 times the forward)
as a share of the measured float32 matrix product.

Run on a quiet machine. Ratios are medians of paired rounds with 95% bootstrap intervals.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from benchmarks.hydragen import gemm_rate, rounds_of
from benchmarks.recording import recording
from hasten.attention.flash_attention import flash_attention
from hasten.attention.flash_attention2 import flash_attention2
from hasten.kernels.flash_terms import VERSION_1, VERSION_2
from hasten.measure.environment import usable_cpus
from hasten.measure.statistics import median_interval

Attention = Callable[..., Tensor]
Arms = dict[str, Callable[[], object]]
PARTS = ("attention", "heads", "ablation", "sparse", "training")

SWITCHED_OFF = {
    "(1) normalised at every tile": {"deferred": False},
    "(2) keys outside": {"rows_outer": False, "sequence_parallel": False},
    "(3) heads only in parallel": {"sequence_parallel": False},
    "(4) keys split, not rows": {"splits": 2},
    "(5) every tile visited and masked": {"skip": False},
}


def standard(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Scores and weights written out; every temporary is allocated anew."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return torch.softmax(scores, -1) @ v


def library(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, is_causal=causal)


ATTENTION: dict[str, Attention] = {
    "v1": flash_attention,
    "v2": flash_attention2,
    "math": partial(library, SDPBackend.MATH),
    "fused": partial(library, SDPBackend.FLASH_ATTENTION),
    "standard": standard,
}


class Prepared:
    """Standard attention without a mask, forward and backward, into buffers that are made once."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> None:
        self.q, self.k, self.v, self.dout = q, k, v, dout
        self.scores, self.weights = (torch.empty(*q.shape[:3], k.shape[2]) for _ in range(2))
        self.out, self.dq, self.dk, self.dv = (torch.empty_like(x) for x in (q, q, k, v))

    def forward(self) -> None:
        torch.matmul(self.q, self.k.transpose(-1, -2), out=self.scores)
        self.scores *= self.q.shape[-1] ** -0.5
        torch.softmax(self.scores, -1, out=self.weights)
        torch.matmul(self.weights, self.v, out=self.out)

    def both(self) -> None:
        self.forward()
        torch.matmul(self.weights.transpose(-1, -2), self.dout, out=self.dv)
        torch.matmul(self.dout, self.v.transpose(-1, -2), out=self.scores)
        self.scores -= (self.dout * self.out).sum(-1, keepdim=True)
        self.scores *= self.weights
        self.scores *= self.q.shape[-1] ** -0.5
        torch.matmul(self.scores, self.k, out=self.dq)
        torch.matmul(self.scores.transpose(-1, -2), self.q, out=self.dk)


def inputs(batch: int, heads: int, length: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(batch, heads, length, size).to(dtype) for _ in range(4)]


def forward_of(attention: Attention, tensors: list[Tensor], **named: Any) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return attention(*tensors[:3], **named)

    return run


def both_of(attention: Attention, tensors: list[Tensor], **named: Any) -> Callable[[], object]:
    """Forward and backward; gradients are computed, not accumulated."""
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]

    def run() -> object:
        return torch.autograd.grad(attention(*leaves, **named), leaves, tensors[3])

    return run


def against(seconds: dict[str, list[float]], base: str) -> dict[str, Any]:
    """Speed of every arm over that of ``base``."""
    return {
        name: median_interval([b / a for a, b in zip(values, seconds[base], strict=True)]).to_dict()
        for name, values in seconds.items()
        if name != base
    }


def summary(
    seconds: dict[str, list[float]], flops: float, peak: float, bases: tuple[str, ...]
) -> dict[str, Any]:
    return {
        "median_ms": {name: 1e3 * statistics.median(values) for name, values in seconds.items()},
        "share_of_gemm": {name: flops / statistics.median(values) / peak for name, values in seconds.items()},
        "speed_over": {base: against(seconds, base) for base in bases if base in seconds},
    }


def useful(tensors: list[Tensor], causal: bool) -> float:
    """FLOPs of the forward pass that count."""
    batch, heads, length, size = tensors[0].shape
    return 4 * batch * heads * length**2 * size * (0.5 if causal else 1.0)


def attention_cases(args: argparse.Namespace, peak: float) -> list[dict[str, Any]]:
    out = []
    for length in args.lengths:
        for size in args.sizes:
            for causal in (False, True):
                batch = max(1, args.tokens // length)
                tensors = inputs(batch, args.heads, length, size, args.dtype)
                arms = {name: ATTENTION[name] for name in args.arms if name != "prepared"}
                # A score matrix of all heads at once must fit; the tiled arms have none.
                scores = 4 * batch * args.heads * length**2
                if 4 * scores > args.memory_gb * 1e9:
                    arms = {name: a for name, a in arms.items() if name not in ("standard", "math")}
                prepared = "prepared" in args.arms and not causal and 4 * scores <= args.memory_gb * 1e9
                by_hand = Prepared(*tensors) if prepared and args.dtype is torch.float32 else None
                flops = useful(tensors, causal)
                case: dict[str, Any] = {
                    "length": length,
                    "size": size,
                    "causal": causal,
                    "batch": batch,
                    "heads": args.heads,
                }
                for name, make, work in (("forward", forward_of, 1.0), ("both", both_of, 3.5)):
                    runs: Arms = {arm: make(a, tensors, causal=causal) for arm, a in arms.items()}
                    if by_hand is not None:
                        runs["prepared"] = by_hand.forward if name == "forward" else by_hand.both
                    seconds = rounds_of(runs, args.rounds)
                    case[name] = summary(
                        seconds, work * flops, peak, ("standard", "prepared", "math", "fused", "v1")
                    )
                out.append(case)
                print(json.dumps(case), flush=True)
    return out


def head_cases(args: argparse.Namespace, peak: float) -> list[dict[str, Any]]:
    """One sequence with 1, 3, 8 and 9 heads: version 2 over version 1."""
    out = []
    for heads in (1, 3, 8, 9):
        tensors = inputs(1, heads, args.lengths[-1], 64, args.dtype)
        case: dict[str, Any] = {"heads": heads, "length": args.lengths[-1]}
        for name, make, work in (("forward", forward_of, 1.0), ("both", both_of, 3.5)):
            runs = {arm: make(ATTENTION[arm], tensors, causal=True) for arm in ("v1", "v2")}
            seconds = rounds_of(runs, args.rounds)
            case[name] = summary(seconds, work * useful(tensors, True), peak, ("v1",))
        out.append(case)
        print(json.dumps(case), flush=True)
    return out


def ablation_cases(args: argparse.Namespace, peak: float) -> list[dict[str, Any]]:
    """Version 2 with one part off, forward and both; and the same with the small tiles of the paper."""
    out = []
    for heads in (3, 8):
        for tile in (VERSION_2.tile, 32):
            tensors = inputs(1, heads, args.lengths[-1], 64, args.dtype)
            case: dict[str, Any] = {"heads": heads, "length": args.lengths[-1], "tile": tile}
            for name, make, work in (("forward", forward_of, 1.0), ("both", both_of, 3.5)):
                runs = {}
                for arm, change in ({"all on": {}} | SWITCHED_OFF).items():
                    splits = change.get("splits", 1)
                    if splits > 1 and name == "both":
                        continue  # the backward pass splits no rows' keys
                    schedule = replace(VERSION_2, tile=tile, **change)
                    runs[arm] = make(flash_attention2, tensors, causal=True, schedule=schedule, splits=splits)
                runs["version 1"] = make(
                    flash_attention, tensors, causal=True, schedule=replace(VERSION_1, tile=tile)
                )
                seconds = rounds_of(runs, args.rounds)
                case[name] = summary(seconds, work * useful(tensors, True), peak, ("all on",))
            out.append(case)
            print(json.dumps(case), flush=True)
    return out


def sparse_cases(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A share of blocks kept at random, the diagonal always: time over that of the dense kernel."""
    out = []
    length = args.lengths[-1]
    tensors = inputs(1, args.heads, length, 64, args.dtype)
    for block in (64, 128):
        count = length // block
        for name, make in (("forward", forward_of), ("both", both_of)):
            runs: Arms = {"dense": make(flash_attention2, tensors)}
            kept = {}
            for share in (1.0, 0.5, 0.25, 0.125):
                order = torch.rand(count, count, generator=torch.Generator().manual_seed(0))
                order.fill_diagonal_(-1.0)
                keep = (order <= order.flatten().sort().values[round(share * count**2) - 1])[None, None]
                kept[f"s={share}"] = keep.float().mean().item()
                runs[f"s={share}"] = make(flash_attention2, tensors, keep_BHQK=keep, block=block)
            seconds = rounds_of(runs, args.rounds)
            case = {
                "block": block,
                "pass": name,
                "kept": kept,
                "median_ms": {arm: 1e3 * statistics.median(values) for arm, values in seconds.items()},
                "speed_over_dense": against(seconds, "dense"),
            }
            out.append(case)
            print(json.dumps(case), flush=True)
    return out


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BTE: Tensor, attention: Attention) -> Tensor:
        batch, length, width = x_BTE.shape
        qkv = self.qkv(self.norms[0](x_BTE)).view(batch, length, 3, self.heads, -1)
        out = attention(*qkv.permute(2, 0, 3, 1, 4), causal=True)
        x_BTE = x_BTE + self.out(out.transpose(1, 2).reshape(batch, length, width))
        return x_BTE + self.mlp(self.norms[1](x_BTE))


class SmallGPT(nn.Module):
    def __init__(self, width: int = 384, heads: int = 6, layers: int = 4, words: int = 4096) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)

    def forward(self, token_BT: Tensor, attention: Attention) -> Tensor:
        x = self.embed(token_BT)
        for block in self.blocks:
            x = block(x, attention)
        return self.head(self.norm(x))


def training_cases(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One step (forward, backward, AdamW) of the same model per arm."""
    out = []
    for length in (512, 1024, 2048):
        model = SmallGPT()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
        tokens = torch.randint(4096, (max(1, 2048 // length), length + 1))

        def step(attention: Attention, model: SmallGPT, optimizer: Any, tokens: Tensor) -> None:
            loss = cross_entropy(model(tokens[:, :-1], attention).flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        names = [name for name in args.arms if name != "prepared"]
        runs: Arms = {name: partial(step, ATTENTION[name], model, optimizer, tokens) for name in names}
        seconds = rounds_of(runs, args.rounds)
        case = {
            "length": length,
            "batch": len(tokens),
            "median_ms": {name: 1e3 * statistics.median(values) for name, values in seconds.items()},
            "speed_over": {base: against(seconds, base) for base in ("standard", "v1") if base in seconds},
        }
        out.append(case)
        print(json.dumps(case), flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the result there too")
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument(
        "--arms", choices=[*ATTENTION, "prepared"], nargs="+", default=[*ATTENTION, "prepared"]
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128], help="head sizes")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096, help="batch x length, per case")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=len(usable_cpus()))
    parser.add_argument("--memory-gb", type=float, default=8.0, help="leave out arms whose scores take more")
    args = parser.parse_args()
    args.dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[args.dtype]
    with recording(args.threads, args.json) as result:
        peak = gemm_rate(args.rounds)
        result |= {"gemm_flops": peak}
        if "attention" in args.parts:
            result["attention"] = attention_cases(args, peak)
        if "heads" in args.parts:
            result["heads"] = head_cases(args, peak)
        if "ablation" in args.parts:
            result["ablation"] = ablation_cases(args, peak)
        if "sparse" in args.parts:
            result["sparse"] = sparse_cases(args)
        if "training" in args.parts:
            result["training"] = training_cases(args)


if __name__ == "__main__":
    main()
