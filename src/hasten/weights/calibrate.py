"""The block-sequential calibration driver: every method that fits a model's linears to real activations runs on it.

Blocks are processed in order. For every linear the driver collects statistics of its inputs, lets the method replace
it, and finally runs the *replaced* block to make the inputs of the next one, so later blocks are fitted to the errors
of earlier ones (GPTQ, arXiv 2210.17323, section 3.3 and the setup of section 4). The decoder's fused linears are
exactly the groups that share an input: {q, k, v}, {o}, {gate, up}, {down}.

Memory: one copy of the hidden states of all samples ([N, L, E] float32), one block's weights, and temporaries of
``chunk_tokens`` rows; nothing grows with the number of blocks.

Legend: N samples, L tokens of a sample, T rows, I inputs, O outputs, E hidden size.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hasten.core.errors import IntegrityError, SettingError
from hasten.models.checkpoint import LinearSource
from hasten.models.decoder import LAYER_LINEARS, CausalAttend, Decoder, DecoderLayer

log = logging.getLogger(__name__)

CHUNK_TOKENS = 4096


class Statistic(Protocol):
    """Accumulates what a method needs to know of one linear's inputs."""

    def update(self, x_TI: Tensor) -> None:
        """Add rows of inputs, float32 [T, I]."""


@dataclass(frozen=True)
class LinearReport:
    """How well one linear went. ``error`` and ``reference`` are what the method minimises and a plain baseline's."""

    name: str
    error: float
    reference: float
    seconds: float
    detail: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class BlockReport:
    """One block: its linears in execution order and the seconds it took in all (statistics and passes included)."""

    index: int
    blocks: int
    seconds: float
    linears: tuple[LinearReport, ...]
    resumed: bool = False

    def line(self) -> str:
        """One line for a log: errors beside the baseline's, and the time."""
        parts = [f"{r.name.rpartition('.')[2]} {r.error:.2e} ({r.reference:.2e})" for r in self.linears]
        done = f"block {self.index + 1}/{self.blocks}"
        return f"{done}  resumed" if self.resumed else f"{done}  {'  '.join(parts)}  {self.seconds:.1f} s"


class BlockMethod(ABC):
    """What is done to a block's linears. One instance per run; the driver calls it block by block."""

    @abstractmethod
    def statistic(self, name: str, linear: nn.Module) -> Statistic:
        """A fresh accumulator for the inputs of ``linear`` (``layers.3.qkv_proj``)."""

    @abstractmethod
    def process(self, name: str, linear: nn.Module, statistic: Any) -> tuple[nn.Module, LinearReport]:
        """The module that replaces ``linear`` (float32 in and out), and a report. ``linear.weight`` is [O, I]."""

    def load(self, index: int) -> Mapping[str, nn.Module] | None:
        """The replaced linears of block ``index`` by name if an earlier, interrupted run finished it."""
        return None

    def save(self, index: int, reports: Sequence[LinearReport]) -> None:
        """Called when all linears of block ``index`` are replaced: keep what `load` needs."""


class SourceLinear(nn.Module):
    """A linear whose dense weight is read from the checkpoint when its block is first used.

    Stands in a decoder loaded with ``load_decoder(checkpoint, pack=SourceLinear)``: only the block at work is dense.
    """

    def __init__(self, source: LinearSource) -> None:
        super().__init__()
        self.source = source
        self._weight_OI: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The exact float32 weight [O, I]."""
        if self._weight_OI is None:
            self._weight_OI = self.source.dense()
        return self._weight_OI

    @property
    def bias(self) -> Tensor | None:
        """Float32 [O] or None."""
        return self.source.bias_O

    def forward(self, x_TI: Tensor) -> Tensor:
        """y_TO = x_TI @ W^T + bias."""
        return nn.functional.linear(x_TI, self.weight, self.bias)


class FixedLinear(nn.Module):
    """A linear with a given float32 weight [O, I]: what a replaced linear computes while calibration goes on."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight_OI, bias_O

    def forward(self, x_TI: Tensor) -> Tensor:
        """y_TO = x_TI @ W^T + bias."""
        return nn.functional.linear(x_TI, self.weight, self.bias)


class _Captured(Exception):  # noqa: N818 - control flow, not an error
    """Stops a forward pass once the input it was run for is known."""


@contextlib.contextmanager
def _capture(linear: nn.Module, statistic: Statistic, stop: bool) -> Iterator[None]:
    """Feed the inputs of ``linear`` to ``statistic``; with ``stop``, run nothing after it."""

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        statistic.update(args[0])
        if stop:
            raise _Captured

    handle = linear.register_forward_pre_hook(hook)
    try:
        yield
    except _Captured:
        pass
    finally:
        handle.remove()


class _Chunks:
    """The hidden states of all samples, and the passes over them."""

    def __init__(self, decoder: Decoder, token_ids_NL: Tensor, chunk_tokens: int) -> None:
        self.decoder = decoder
        samples, self.length = token_ids_NL.shape
        self.step = max(1, chunk_tokens // self.length)
        self.x_NLE = torch.empty(samples, self.length, decoder.config.hidden_size)
        for start in range(0, samples, self.step):
            ids = token_ids_NL[start : start + self.step]
            self.x_NLE[start : start + self.step] = decoder.embed(ids.reshape(-1)).view(*ids.shape, -1)

    def each(self, run: Callable[[Tensor, Tensor, CausalAttend], Tensor], *, keep: bool) -> None:
        """``run(x_TE, position_T, attend)`` on every chunk of whole samples; ``keep`` stores what it returns."""
        for start in range(0, self.x_NLE.shape[0], self.step):
            x_NLE = self.x_NLE[start : start + self.step]
            batch = x_NLE.shape[0]
            position_T = torch.arange(self.length).repeat(batch)
            y_TE = run(x_NLE.reshape(batch * self.length, -1), position_T, CausalAttend(self.decoder, batch))
            if keep:
                x_NLE.copy_(y_TE.view_as(x_NLE))


@torch.no_grad()
def calibrate(
    decoder: Decoder,
    token_ids_NL: Tensor,
    method: BlockMethod,
    *,
    true_sequential: bool = True,
    chunk_tokens: int = CHUNK_TOKENS,
    keep: bool = True,
    progress: Callable[[BlockReport], None] | None = None,
) -> list[BlockReport]:
    """Run ``method`` over all blocks of ``decoder`` in place; return one report per block.

    token_ids_NL: int64 [N, L]. true_sequential: replace a linear before collecting the next one's inputs, so that
    even inside a block errors are seen downstream; else all four are collected from the original block.
    keep: leave the replaced linears in the decoder; otherwise they are dropped once the next block's inputs exist
    (the method must have kept its result). Deterministic: same tokens, method and thread count, same result.
    Raises `SettingError` for empty or out-of-range tokens, `IntegrityError` when activations become NaN or infinite.
    """
    _check_tokens(token_ids_NL, decoder.config.vocab_size)
    chunks = _Chunks(decoder, token_ids_NL, chunk_tokens)
    reports = []
    for index, module in enumerate(decoder.layers):
        layer = cast(DecoderLayer, module)
        started = time.perf_counter()
        names = {leaf: f"layers.{index}.{leaf}" for leaf in LAYER_LINEARS}
        finished = method.load(index)
        linears: list[LinearReport] = []
        if finished is not None:
            for name in names.values():
                decoder.set_linear(name, finished[name])
            chunks.each(lambda x, p, a, layer=layer: layer.mlp(layer.attention(x, p, a)), keep=True)
        else:
            step = _sequential if true_sequential else _at_once
            linears = step(decoder, layer, names, chunks, method)
            method.save(index, linears)
        if not torch.isfinite(chunks.x_NLE).all():
            raise IntegrityError(f"hidden states after block {index} hold NaN or infinity; check the weights")
        if not keep:
            for name in names.values():
                decoder.set_linear(name, nn.Identity())
        report = BlockReport(
            index, len(decoder.layers), time.perf_counter() - started, tuple(linears), finished is not None
        )
        log.info(report.line())
        reports.append(report)
        if progress is not None:
            progress(report)
    return reports


def _sequential(
    decoder: Decoder, layer: DecoderLayer, names: Mapping[str, str], chunks: _Chunks, method: BlockMethod
) -> list[LinearReport]:
    """Collect and replace one linear after the other; every pass stops at the linear it collects for."""
    reports = []
    for leaf, name in names.items():
        linear = getattr(layer, leaf)
        statistic = method.statistic(name, linear)
        if leaf == "gate_up_proj":  # the attention half is final: move on to its outputs
            chunks.each(layer.attention, keep=True)

        def run(
            x_TE: Tensor,
            position_T: Tensor,
            attend: CausalAttend,
            mlp: bool = leaf in ("gate_up_proj", "down_proj"),
            linear: nn.Module = linear,
            statistic: Statistic = statistic,
        ) -> Tensor:
            with _capture(linear, statistic, stop=True):
                layer.mlp(x_TE) if mlp else layer.attention(x_TE, position_T, attend)
            return x_TE

        chunks.each(run, keep=False)
        replaced, report = method.process(name, linear, statistic)
        decoder.set_linear(name, replaced)
        reports.append(report)
    chunks.each(lambda x, _p, _a: layer.mlp(x), keep=True)
    return reports


def _at_once(
    decoder: Decoder, layer: DecoderLayer, names: Mapping[str, str], chunks: _Chunks, method: BlockMethod
) -> list[LinearReport]:
    """Collect the inputs of all linears of the original block in one pass, then replace them."""
    linears = {leaf: getattr(layer, leaf) for leaf in names}
    statistics = {leaf: method.statistic(names[leaf], linear) for leaf, linear in linears.items()}

    def run(x_TE: Tensor, position_T: Tensor, attend: CausalAttend) -> Tensor:
        with contextlib.ExitStack() as stack:
            for leaf, linear in linears.items():
                stack.enter_context(_capture(linear, statistics[leaf], stop=leaf == "down_proj"))
            layer.mlp(layer.attention(x_TE, position_T, attend))
        return x_TE

    chunks.each(run, keep=False)
    reports = []
    for leaf, linear in linears.items():
        replaced, report = method.process(names[leaf], linear, statistics[leaf])
        decoder.set_linear(names[leaf], replaced)
        reports.append(report)
    chunks.each(lambda x, p, a: layer.mlp(layer.attention(x, p, a)), keep=True)
    return reports


def _check_tokens(token_ids_NL: Tensor, vocab_size: int) -> None:
    if token_ids_NL.dim() != 2 or 0 in token_ids_NL.shape:
        raise SettingError(
            f"calibration tokens must be a non-empty [samples, length], not {tuple(token_ids_NL.shape)}; "
            "give calibration data"
        )
    low, high = int(token_ids_NL.min()), int(token_ids_NL.max())
    if low < 0 or high >= vocab_size:
        raise SettingError(
            f"calibration token {low if low < 0 else high} is outside the vocabulary of {vocab_size}; "
            "the calibration data belongs to another tokenizer"
        )


def draw_segments(
    sizes: Sequence[int], tokens: Callable[[int], Sequence[int]], samples: int, length: int, seed: int
) -> Tensor:
    """``samples`` random segments of ``length`` tokens from documents, int64 [samples, length].

    A document is drawn with probability proportional to ``sizes`` (any unit), then a start uniformly within it;
    documents shorter than ``length`` are passed over. ``tokens(i)`` is called for drawn documents only, once each.
    Deterministic by ``seed``. Raises `SettingError` for empty data or when no document is long enough.
    """
    if samples < 1 or length < 1:
        raise SettingError(f"calibration needs samples >= 1 and sample_length >= 1, not {samples} x {length}")
    if not sizes or not any(size > 0 for size in sizes):
        raise SettingError("calibration data must not be empty; give at least one document")
    random = torch.Generator().manual_seed(seed)
    weights = torch.tensor([float(size) for size in sizes], dtype=torch.float64)
    seen: dict[int, Tensor] = {}
    longest = 0
    segments: list[Tensor] = []
    while len(segments) < samples:
        if not bool((weights > 0).any()):
            raise SettingError(
                f"no calibration document has {length} tokens (the longest has {longest}); "
                f"set sample_length to at most {longest} or give longer documents"
            )
        # Inverse-CDF sampling: torch.multinomial refuses more than 2^24 categories and consumes more random state.
        at = torch.rand(1, generator=random, dtype=torch.float64) * weights.sum()
        index = int(torch.searchsorted(weights.cumsum(0), at, right=True).clamp_max(len(sizes) - 1))
        if index not in seen:
            seen[index] = torch.tensor(list(tokens(index)), dtype=torch.int64)
        ids_L = seen[index]
        longest = max(longest, ids_L.numel())
        if ids_L.numel() < length:
            weights[index] = 0
            continue
        start = int(torch.randint(ids_L.numel() - length + 1, (1,), generator=random))
        segments.append(ids_L[start : start + length])
    return torch.stack(segments)


def token_digest(sequences: Sequence[Sequence[int]]) -> str:
    """SHA-256 (hex) of token sequences: part of an artefact's key when the caller brings calibration data."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(f"{len(sequence)}:".encode())
        digest.update(torch.tensor(list(sequence), dtype=torch.int64).numpy().tobytes())
    return digest.hexdigest()


class WorkFolder:
    """Finished blocks of an unfinished run, one safetensors file each; a killed run loses at most one block.

    Files appear atomically; one that cannot be read (power loss) counts as not finished.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    def file(self, index: int) -> Path:
        return self.path / f"block-{index:03d}.safetensors"

    def save(self, index: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Keep a block's tensors and string metadata."""
        temporary = self.path / f".block-{index:03d}.{os.getpid()}"
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, dict(metadata))
        os.replace(temporary, self.file(index))

    def load(self, index: int) -> dict[str, Tensor] | None:
        """A finished block's tensors, or None."""
        if not self.file(index).exists():
            return None
        try:
            with safe_open(self.file(index), framework="pt") as stored:
                return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, OSError) as error:
            log.warning("%s cannot be read (%s); its block is done again", self.file(index), error)
            return None


@contextlib.contextmanager
def progress_bar(title: str, blocks: int) -> Iterator[Callable[[BlockReport], None]]:
    """A progress bar on stderr: blocks done, the last block's relative error and time, time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[last]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=blocks, last="")

        def advance(report: BlockReport) -> None:
            worst = max((r.error for r in report.linears), default=0.0)
            last = "resumed" if report.resumed else f"error {worst:.1e}, {report.seconds:.1f} s"
            bar.update(task, advance=1, last=last)

        yield advance
