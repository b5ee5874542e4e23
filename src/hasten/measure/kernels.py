"""Every native kernel against its bound: bytes or operations over what the machine was measured to do at most.

A case is a kernel on the shapes of the default model (or another that leaves the caches), with the bytes it has to read
or write and the operations it has to do. Kernels that stream weights cycle through copies larger than the last-level
cache, as a decoder's layers do; a kernel whose data fits the caches can beat the memory bound, which the table shows
as more than 100%.
"""

from __future__ import annotations

import fnmatch
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from hasten.attention.dense import DenseKernel
from hasten.attention.layout import AttentionSpec, HeadShape, KVPages, StepLayout
from hasten.attention.policy import Dense
from hasten.kernels import codes, native
from hasten.kernels.attention import attend_tokens
from hasten.kernels.block import gated, rms_norm
from hasten.kernels.pages import TAIL, quantise
from hasten.kernels.peak import Peak
from hasten.kernels.rope import rope_append
from hasten.kernels.vocabulary import argmax, sample
from hasten.weights.affine import AffineLinear, round_to_nearest
from hasten.weights.dense import DenseLinear
from hasten.weights.packed import KernelLinear

HIDDEN, INNER, VOCABULARY = 576, 1536, 49152
SHAPE = HeadShape(9, 3, 64)
PAGE = 64
HEADS = "9/3 heads of 64"
OUT_OF_CACHE = 96_000_000
"""Bytes of weights that a streaming case cycles through."""


@dataclass(frozen=True)
class Case:
    """``run()`` does the work once. moved: bytes; operations: of ``arithmetic`` (float32, int16 or int8)."""

    kernel: str
    shape: str
    run: Callable[[], object]
    moved: float
    operations: float
    arithmetic: str = "float32"


@dataclass(frozen=True)
class KernelResult:
    """One row of the table. seconds: median; share: of the bound, which is ``memory`` or ``arithmetic``."""

    kernel: str
    shape: str
    seconds: float
    gb_per_s: float
    gop_per_s: float
    bound: str
    share: float


def run_cases(
    peak: Peak,
    pattern: str = "*",
    *,
    seconds: float = 0.4,
    advance: Callable[[str], None] = lambda name: None,
) -> list[KernelResult]:
    """Measure the cases whose kernel matches ``pattern``, each for about ``seconds``."""
    out = []
    for name, make in CASES:
        if fnmatch.fnmatch(name, pattern):
            advance(name)
            out += [measure(case, peak, seconds) for case in make()]
    return out


def measure(case: Case, peak: Peak, seconds: float) -> KernelResult:
    """Median time of single runs, and what it is of the bound."""
    case.run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 2000):
        start = time.perf_counter()
        case.run()
        times.append(time.perf_counter() - start)
    median = sorted(times)[len(times) // 2]
    memory = case.moved / peak.read
    # An instruction multiplies half as many 16-bit numbers as 8-bit ones.
    rate = {"float32": peak.float32, "int8": peak.int8, "int16": peak.int8 / 2}[case.arithmetic]
    arithmetic = case.operations / rate
    return KernelResult(
        case.kernel,
        case.shape,
        median,
        case.moved / median / 1e9,
        case.operations / median / 1e9,
        "memory" if memory >= arithmetic else case.arithmetic,
        max(memory, arithmetic) / median,
    )


def as_record(results: Sequence[KernelResult], peak: Peak) -> dict[str, Any]:
    """For ``--json``."""
    return {"level": native().level, "peak": asdict(peak), "kernels": [asdict(r) for r in results]}


def _cycle(layers: Sequence[KernelLinear], rows: int) -> Callable[[], object]:
    x_TI = torch.randn(rows, layers[0].inputs)
    turn = itertools.count()

    def run() -> object:
        return layers[next(turn) % len(layers)](x_TI)

    return run


def _linear(name: str, make: Callable[[torch.Tensor], KernelLinear], arithmetic: str) -> Iterator[Case]:
    first = make(torch.randn(2 * INNER, HIDDEN) * 0.05)
    size = first.weight_bytes()
    copies = [first, *(make(torch.randn(2 * INNER, HIDDEN) * 0.05) for _ in range(int(OUT_OF_CACHE / size)))]
    for rows in (1, 4, 16, 64, 512):
        yield Case(
            name,
            f"{rows} x {HIDDEN} -> {2 * INNER}",
            _cycle(copies, rows),
            size + 4.0 * rows * (HIDDEN + 2 * INNER),
            2.0 * rows * HIDDEN * 2 * INNER,
            arithmetic,
        )


def _affine(bits: int, activations: str) -> Callable[[], Iterator[Case]]:
    def make(weight_OI: torch.Tensor) -> KernelLinear:
        codes_OI, scale_OG, low_OG = round_to_nearest(weight_OI, bits, 32)
        return AffineLinear(codes_OI, scale_OG, low_OG, bits=bits, group_size=32, activations=activations)

    name = f"affine-{bits}bit-{activations}"
    return lambda: _linear(name, make, activations)


def _dense(dtype: torch.dtype) -> Callable[[], Iterator[Case]]:
    name = f"dense-{str(dtype).removeprefix('torch.')}"
    return lambda: _linear(name, lambda weight_OI: DenseLinear(weight_OI, None, dtype), "float32")


def _layout(sequences: int, rows: int, length: int) -> StepLayout:
    """``rows`` last rows of every sequence of ``length`` tokens, pages in order."""
    pages = -(-length // PAGE)
    position_T = torch.arange(length - rows, length).repeat(sequences)
    table_SM = torch.arange(sequences * pages, dtype=torch.int32).view(sequences, pages)
    page_T = table_SM.repeat_interleave(rows, 0).gather(1, (position_T // PAGE)[:, None])[:, 0].long()
    return StepLayout(
        query_start_S1=torch.arange(sequences + 1, dtype=torch.int32) * rows,
        kv_len_S=torch.full((sequences,), length, dtype=torch.int32),
        page_table_SM=table_SM,
        position_T=position_T,
        slot_T=page_T * PAGE + position_T % PAGE,
        page_size=PAGE,
        sequence_ids=tuple(range(sequences)),
    )


def _pool(pages: int, int8: bool = False) -> KVPages:
    size = (pages, SHAPE.kv_heads, PAGE, SHAPE.size)
    if int8:
        page = quantise(torch.randn(1, *size[1:]))
        return KVPages(page.repeat(pages, 1, 1, 1), page.repeat(pages, 1, 1, 1))
    return KVPages(torch.randn(size).to(torch.bfloat16), torch.randn(size).to(torch.bfloat16))


_TOKEN_BYTES = 2 * 2 * SHAPE.kv_heads * SHAPE.size
_TOKEN_BYTES_INT8 = 2 * SHAPE.kv_heads * (SHAPE.size + TAIL)


def _attend() -> Iterator[Case]:
    spec, kernel = AttentionSpec(SHAPE, SHAPE.size**-0.5), DenseKernel()
    shapes = ((1, 1, 512), (1, 1, 8192), (16, 1, 2048), (1, 512, 512), (1, 512, 4096))
    cases = [(*shape, int8) for shape in shapes for int8 in ((False, True) if shape[1] == 1 else (False,))]
    for sequences, rows, length, int8 in cases:
        layout = _layout(sequences, rows, length)
        moved = sequences * length * (_TOKEN_BYTES_INT8 if int8 else _TOKEN_BYTES)
        pools = [_pool(layout.page_table_SM.numel(), int8) for _ in range(1 + int(4e7 / moved))]
        q_THD = torch.randn(sequences * rows, SHAPE.heads, SHAPE.size)
        plan, turn = kernel.plan(layout), itertools.count()
        seen = rows * (length - rows) + rows * (rows + 1) / 2

        def run(
            layout: StepLayout = layout,
            pools: list[KVPages] = pools,
            q_THD: torch.Tensor = q_THD,
            plan: Any = plan,
            turn: Iterator[int] = turn,
        ) -> object:
            return kernel.run(plan, 0, q_THD, pools[next(turn) % len(pools)], layout, spec, Dense())

        yield Case(
            "attend_pieces",
            f"{sequences} x {rows} rows, {length} tokens, {HEADS}{', int8 pages' if int8 else ''}",
            run,
            float(moved),
            4.0 * sequences * seen * SHAPE.heads * SHAPE.size,
        )


def _attend_tokens() -> Iterator[Case]:
    length, chosen = 8192, 256
    pools = [_pool(length // PAGE) for _ in range(1 + int(4e7 / (length * _TOKEN_BYTES)))]
    q_RHD = torch.randn(1, SHAPE.heads, SHAPE.size)
    table = torch.arange(length // PAGE, dtype=torch.int32)[None]
    turn = itertools.count()
    for choices, name in ((SHAPE.kv_heads, "kv head"), (SHAPE.heads, "query head")):
        index = torch.stack([torch.randperm(length)[:chosen].sort().values for _ in range(choices)])[
            None
        ].int()
        count = torch.full((1, choices), chosen, dtype=torch.int32)

        def run(index: torch.Tensor = index, count: torch.Tensor = count) -> object:
            pages = pools[next(turn) % len(pools)]
            return attend_tokens(q_RHD, pages.k_NGPD, pages.v_NGPD, table, index, count, SHAPE.size**-0.5)

        yield Case(
            "attend_tokens",
            f"{chosen} of {length} tokens per {name}",
            run,
            float(choices * chosen * 4 * SHAPE.size),
            4.0 * SHAPE.heads * chosen * SHAPE.size,
        )


def _codes() -> Iterator[Case]:
    length = 8192
    pool = torch.randint(0, 255, (length // PAGE, SHAPE.kv_heads, PAGE, SHAPE.size // 4), dtype=torch.uint8)
    query = codes.hadamard_encode(torch.randn(1, SHAPE.heads, SHAPE.size), 1.0)
    table, lengths = (
        torch.arange(length // PAGE, dtype=torch.int32)[None],
        torch.tensor([length], dtype=torch.int32),
    )
    for per_head in (False, True):
        yield Case(
            "hadamard_select",
            f"256 of {length} tokens per {'query' if per_head else 'kv'} head",
            partial(codes.hadamard_select, query, pool, table, lengths, 256, per_head=per_head),
            float(pool.numel()),
            6.0 * SHAPE.heads * length,
        )
    k_TGD, slots = torch.randn(512, SHAPE.kv_heads, SHAPE.size), torch.arange(512)
    yield Case(
        "hadamard_append",
        "512 keys of 3 heads",
        partial(codes.hadamard_append, k_TGD, 1.0, pool, slots),
        k_TGD.numel() * 4.25,
        k_TGD.numel() * 6.0,
    )


def _small() -> Iterator[Case]:
    for rows in (1, 512):
        x_TE, both_TI2 = torch.randn(rows, HIDDEN), torch.randn(rows, 2 * INNER)
        layout, pages = _layout(1, rows, max(rows, PAGE)), _pool(-(-max(rows, PAGE) // PAGE))
        q, k = torch.randn(rows, SHAPE.heads, SHAPE.size), torch.randn(rows, SHAPE.kv_heads, SHAPE.size)
        turn_TR = torch.randn(rows, SHAPE.size)
        rope = partial(
            rope_append, q, k, k.clone(), turn_TR, turn_TR, layout.slot_T, pages.k_NGPD, pages.v_NGPD
        )
        size = float(rows * HIDDEN)
        yield Case(
            "rms_norm",
            f"{rows} x {HIDDEN}",
            partial(rms_norm, x_TE, torch.ones(HIDDEN), 1e-5),
            8 * size,
            4 * size,
        )
        size = float(rows * INNER)
        yield Case("gated", f"{rows} x {INNER}", partial(gated, both_TI2), 12 * size, 20 * size)
        moved = 8.0 * (q.numel() + 2 * k.numel())
        yield Case("rope_append", f"{rows} rows, {HEADS}", rope, moved, 6.0 * (q.numel() + k.numel()))


def _vocabulary() -> Iterator[Case]:
    for rows in (1, 32):
        logits_RV, stream_R = 3 * torch.randn(rows, VOCABULARY), torch.arange(rows)
        size, shape = float(logits_RV.numel()), f"{rows} x {VOCABULARY}"
        yield Case("argmax", shape, partial(argmax, logits_RV), 4 * size, size)

        def draw(
            top_k: int = 0,
            top_p: float = 1.0,
            min_p: float = 0.0,
            logits_RV: torch.Tensor = logits_RV,
            stream_R: torch.Tensor = stream_R,
        ) -> object:
            return sample(
                logits_RV,
                torch.ones(len(logits_RV)),
                torch.full_like(stream_R, top_k),
                torch.full((len(logits_RV),), top_p, dtype=torch.float64),
                torch.full((len(logits_RV),), min_p).log_(),
                stream_R,
            )

        for name, settings in (
            ("sample", {}),
            ("sample, top-k 50", {"top_k": 50}),
            ("sample, top-p 0.9", {"top_p": 0.9}),
            ("sample, min-p 0.05", {"min_p": 0.05}),
        ):
            yield Case(name, shape, partial(draw, **settings), 4 * size, size)


CASES: tuple[tuple[str, Callable[[], Iterator[Case]]], ...] = (
    ("dense-float32", _dense(torch.float32)),
    ("dense-bfloat16", _dense(torch.bfloat16)),
    ("affine-4bit-float32", _affine(4, "float32")),
    ("affine-4bit-int16", _affine(4, "int16")),
    ("affine-4bit-int8", _affine(4, "int8")),
    ("affine-8bit-float32", _affine(8, "float32")),
    ("affine-8bit-int16", _affine(8, "int16")),
    ("attend_pieces", _attend),
    ("attend_tokens", _attend_tokens),
    ("codes", _codes),
    ("small", _small),
    ("vocabulary", _vocabulary),
)
