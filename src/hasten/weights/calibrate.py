"""The block-sequential calibration driver: every method that fits a model's linears to real activations runs on it.

Blocks are processed in order. For every linear the driver collects statistics of its inputs, lets the method replace
it, and finally runs the *replaced* block to make the inputs of the next one, so later blocks are fitted to the errors
of earlier ones (GPTQ, arXiv 2210.17323, section 3.3 and the setup of section 4). The decoder's fused linears are
exactly the groups that share an input: {q, k, v}, {o}, {gate, up}, {down}.

Memory: one copy of the hidden states of all samples ([N, L, E] float32), one block's weights, temporaries of
``chunk_tokens`` rows, and up to ``stash_bytes`` of a linear's inputs, kept so that they need not be computed twice;
nothing grows with the number of blocks.

Legend: N samples, L tokens of a sample, T rows, I inputs, O outputs, E hidden size.
"""

from __future__ import annotations

import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from hasten.core.errors import IntegrityError, SettingError
from hasten.models.checkpoint import LinearSource
from hasten.models.decoder import LAYER_LINEARS, Attend, CausalAttend, Decoder, DecoderLayer

log = logging.getLogger(__name__)

CHUNK_TOKENS = 4096
STASH_BYTES = 1 << 30


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


class _Skipped(nn.Module):
    """Stands for a linear whose result will not be used: zeros of the right shape."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, x_TI: Tensor) -> Tensor:
        return x_TI.new_zeros(x_TI.shape[0], self.outputs)


class _Captured(Exception):  # noqa: N818 - control flow, not an error
    """Stops a forward pass once the input it was run for is known."""


@contextlib.contextmanager
def _capture(
    linear: nn.Module, statistic: Statistic, stop: bool, real_T: Tensor | None
) -> Iterator[list[Tensor]]:
    """Feed the inputs of ``linear`` to ``statistic`` and list them; with ``stop``, run nothing after it.

    real_T: the rows that count (bool), None for all of them.
    """
    seen: list[Tensor] = []

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        statistic.update(args[0] if real_T is None else args[0][real_T])
        seen.append(args[0])
        if stop:
            raise _Captured

    handle = linear.register_forward_pre_hook(hook)
    try:
        yield seen
    except _Captured:
        pass
    finally:
        handle.remove()


_Half = Callable[[Tensor, Tensor, Attend], Tensor]
"""(x_TE, position_T, attend) -> x_TE: the attention or the feed-forward half of a block."""


class _Chunks:
    """The hidden states of all samples, and the passes over them."""

    def __init__(
        self, decoder: Decoder, token_ids_NL: Tensor, chunk_tokens: int, lengths_N: Tensor | None = None
    ) -> None:
        self.decoder, self.lengths_N = decoder, lengths_N
        self.real_T: Tensor | None = None  # rows of the chunk at work that belong to a sample, None for all
        samples, self.length = token_ids_NL.shape
        self.step = max(1, chunk_tokens // self.length)
        self.x_NLE = torch.empty(samples, self.length, decoder.config.hidden_size)
        for start in range(0, samples, self.step):
            ids = token_ids_NL[start : start + self.step]
            self.x_NLE[start : start + self.step] = decoder.embed(ids.reshape(-1)).view(*ids.shape, -1)

    def each(self, run: _Half, *, keep: bool) -> None:
        """``run(x_TE, position_T, attend)`` on every chunk of whole samples; ``keep`` stores what it returns."""
        for start in range(0, self.x_NLE.shape[0], self.step):
            x_NLE = self.x_NLE[start : start + self.step]
            batch = x_NLE.shape[0]
            position_T = torch.arange(self.length).repeat(batch)
            if self.lengths_N is not None:
                length_T = self.lengths_N[start : start + batch].repeat_interleave(self.length)
                self.real_T = position_T < length_T
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
    stash_bytes: int = STASH_BYTES,
    keep: bool = True,
    lengths_N: Tensor | None = None,
    progress: Callable[[BlockReport], None] | None = None,
) -> list[BlockReport]:
    """Run ``method`` over all blocks of ``decoder`` in place; return one report per block.

    token_ids_NL: int64 [N, L]. true_sequential: replace a linear before collecting the next one's inputs, so that
    even inside a block errors are seen downstream; else all four are collected from the original block.
    stash_bytes: memory for a linear's inputs that would otherwise be computed twice (true_sequential only).
    keep: leave the replaced linears in the decoder; otherwise they are dropped once the next block's inputs exist
    (the method must have kept its result). lengths_N: tokens of each sample that count, int64 [N]; what follows them
    is only filling (no token sees a later one). None: all. Deterministic: same tokens, method and thread count, same
    result.
    Raises `SettingError` for empty or out-of-range tokens, `IntegrityError` when activations become NaN or infinite.
    """
    check_tokens(token_ids_NL, decoder.config.vocab_size)
    if lengths_N is not None:
        _check_lengths(lengths_N, token_ids_NL)
    chunks = _Chunks(decoder, token_ids_NL, chunk_tokens, lengths_N)
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
            if true_sequential:
                linears = _Sequential(decoder, layer, names, chunks, method, stash_bytes).run()
            else:
                linears = _at_once(decoder, layer, names, chunks, method)
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


class _Sequential:
    """One block, linear by linear: collect the inputs of one, replace it, go on. Passes stop where they collect.

    The inputs of ``o_proj`` and ``down_proj`` are needed a second time, to finish the half of the block; if they fit
    into ``stash_bytes`` they are kept instead of computed again.
    """

    def __init__(
        self,
        decoder: Decoder,
        layer: DecoderLayer,
        names: Mapping[str, str],
        chunks: _Chunks,
        method: BlockMethod,
        stash_bytes: int,
    ) -> None:
        self.decoder, self.layer, self.names, self.chunks, self.method = decoder, layer, names, chunks, method
        self.stash_bytes = stash_bytes

    def run(self) -> list[LinearReport]:
        """Reports in execution order; the chunks hold the block's outputs afterwards."""
        layer = self.layer
        reports = [self._replace("qkv_proj", layer.attention, None)]
        stash: list[Tensor] = []
        reports.append(self._replace("o_proj", layer.attention, stash))
        self._finish("o_proj", "qkv_proj", layer.attention, stash)
        reports.append(self._replace("gate_up_proj", self._mlp, None))
        reports.append(self._replace("down_proj", self._mlp, stash))
        self._finish("down_proj", "gate_up_proj", self._mlp, stash)
        return reports

    def _mlp(self, x_TE: Tensor, _position_T: Tensor, _attend: Attend) -> Tensor:
        return self.layer.mlp(x_TE)

    def _replace(self, leaf: str, half: _Half, stash: list[Tensor] | None) -> LinearReport:
        """Collect the inputs of ``leaf`` in ``half`` of the block and replace it; keep the inputs in ``stash``."""
        linear, name = getattr(self.layer, leaf), self.names[leaf]
        statistic = self.method.statistic(name, linear)
        kept = 0

        def run(x_TE: Tensor, position_T: Tensor, attend: Attend) -> Tensor:
            nonlocal kept
            with _capture(linear, statistic, True, self.chunks.real_T) as seen:
                half(x_TE, position_T, attend)
            if stash is not None:
                kept += seen[0].nbytes
                if kept <= self.stash_bytes:
                    stash.append(seen[0])
            return x_TE

        self.chunks.each(run, keep=False)
        replaced, report = self.method.process(name, linear, statistic)
        self.decoder.set_linear(name, replaced)
        return report

    def _finish(self, leaf: str, upstream: str, half: _Half, stash: list[Tensor]) -> None:
        """Move all chunks through ``half``, starting at ``leaf`` where its inputs were kept. Empties ``stash``."""
        before = getattr(self.layer, upstream)
        width = (
            sum(self.layer.qkv_split) if upstream == "qkv_proj" else 2 * self.decoder.config.intermediate_size
        )
        skipped = _Skipped(width)
        stash.reverse()

        def run(x_TE: Tensor, position_T: Tensor, attend: Attend) -> Tensor:
            if not stash:
                return half(x_TE, position_T, attend)
            inputs = stash.pop()
            handle = getattr(self.layer, leaf).register_forward_pre_hook(lambda _module, _args: (inputs,))
            setattr(self.layer, upstream, skipped)
            try:
                return half(x_TE, position_T, lambda _layer, q_THD, _k, _v, _position: q_THD)
            finally:
                setattr(self.layer, upstream, before)
                handle.remove()

        self.chunks.each(run, keep=True)


def _at_once(
    decoder: Decoder, layer: DecoderLayer, names: Mapping[str, str], chunks: _Chunks, method: BlockMethod
) -> list[LinearReport]:
    """Collect the inputs of all linears of the original block in one pass, then replace them."""
    linears = {leaf: getattr(layer, leaf) for leaf in names}
    statistics = {leaf: method.statistic(names[leaf], linear) for leaf, linear in linears.items()}

    def run(x_TE: Tensor, position_T: Tensor, attend: Attend) -> Tensor:
        with contextlib.ExitStack() as stack:
            for leaf, linear in linears.items():
                stack.enter_context(_capture(linear, statistics[leaf], leaf == "down_proj", chunks.real_T))
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


def check_tokens(token_ids_NL: Tensor, vocab_size: int) -> None:
    """Refuse calibration tokens that are empty, not [samples, length], or outside the vocabulary: `SettingError`."""
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


def _check_lengths(lengths_N: Tensor, token_ids_NL: Tensor) -> None:
    samples, longest = token_ids_NL.shape
    if lengths_N.shape != (samples,) or int(lengths_N.min()) < 1 or int(lengths_N.max()) > longest:
        raise SettingError(
            f"calibration lengths must be {samples} numbers from 1 to {longest}, one per sample, "
            f"not {lengths_N.tolist()}"
        )
