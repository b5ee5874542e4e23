"""Endor: pruned weights as bitmaps, streamed from disk layer by layer (arXiv 2406.11674).

Joo, Hadidi, Feizi, Asgari, 2024. Prunes the linears of every block without structure (by magnitude, or as Wanda by
magnitude times the norm of the input, arXiv 2306.11695, per output), writes them in one file of aligned layers, and
runs the model within a memory budget. The format adds no error to the pruned weights; LM head and embedding stay as
stored.

Legend: T rows, I inputs, O outputs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from hasten.core.errors import UnsupportedError
from hasten.core.technique import Technique
from hasten.kernels.dense import pack_dense
from hasten.kernels.packed import pad_rows
from hasten.models.checkpoint import load_decoder
from hasten.models.decoder import LAYER_LINEARS
from hasten.weights.calibrate import FixedLinear, LinearReport, SourceLinear
from hasten.weights.calibrate_data import calibration_segments
from hasten.weights.calibrate_work import BlockFiles, KeptMethod, WorkFolder, made_from, prepare_blocks
from hasten.weights.dense import DenseFormat
from hasten.weights.format import LinearSource, PackedLinear, WeightFormat
from hasten.weights.hessian import Hessian
from hasten.weights.layer_file import LayerFile, write_layers
from hasten.weights.native import NativeFormat
from hasten.weights.weight_store import WeightStore

if TYPE_CHECKING:
    from hasten.models.context import BuildContext

VERSION = 1  # of the algorithm and the file: raise it when the same settings give another file
_PRUNING = ("pruning", "sparsity", "samples", "sample_length", "seed")


class Endor(Technique):
    """Pruned weights kept as bitmaps on disk and streamed past the page cache, for a model larger than its memory."""

    slug: ClassVar[str] = "endor"
    slots: ClassVar[tuple[str, ...]] = ("weight_format",)
    lossless: ClassVar[bool] = False
    # What it is compared with: the same pruned weights, dense, through the page cache, with the same prefetching; the
    # same past the page cache.
    baselines: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"use": {"endor": {"format": "dense", "read": "staged"}}},
        {"use": {"endor": {"format": "dense"}}},
    )

    sparsity: float = Field(
        0.5, ge=0, lt=1, description="share of the weights of every output that is pruned"
    )
    pruning: Literal["magnitude", "wanda"] = Field(
        "wanda",
        description="what is pruned: the smallest |w|, or |w| times the norm of its input (calibrated)",
    )
    memory_mb: float = Field(
        32.0, ge=0, description="budget for layers that stay in memory; two layers' buffers come on top"
    )
    compressed_mb: float = Field(
        0.0, ge=0, description="part of memory_mb for layers kept in memory as bitmaps"
    )
    format: Literal["bitmap", "dense"] = Field("bitmap", description="dense: uncompressed, for comparison")
    read: Literal["direct", "staged"] = Field(
        "direct", description="direct: O_DIRECT into the buffer; staged: page cache, then copied and dropped"
    )
    prefetch: bool = Field(True, description="false: a layer is read when it is needed")
    link_gbps: float | None = Field(
        None, gt=0, description="emulated link: reads arrive at so many gigabytes per second at most"
    )
    samples: int = Field(32, ge=1, description="wanda: calibration segments")
    sample_length: int = Field(256, ge=1, description="wanda: tokens of a segment")
    seed: int = Field(0, ge=0, description="wanda: of the choice of segments")

    @model_validator(mode="after")
    def _check(self) -> Endor:
        if self.compressed_mb > self.memory_mb:
            raise ValueError(f"compressed_mb = {self.compressed_mb} is part of memory_mb = {self.memory_mb}")
        return self

    def dtype(self, context: BuildContext) -> torch.dtype:
        """How kept weights are stored: as the plan says; bfloat16 when it says nothing."""
        return context.weight_dtype or torch.bfloat16

    def made_from(self, context: BuildContext) -> dict[str, Any]:
        """What the pruned weights depend on besides the model."""
        settings = {name: getattr(self, name) for name in _PRUNING}
        if self.pruning == "magnitude" or self.sparsity == 0:
            return {"version": VERSION, "settings": {"pruning": "magnitude", "sparsity": self.sparsity}}
        return made_from(context, VERSION, settings)

    def prepare(self, context: BuildContext) -> Path:
        """The folder of the layers' file, pruned and written first if there is none.

        Raises `SettingError` (no or too short calibration data), `ArtefactError` (a damaged artefact).
        """
        dtype = self.dtype(context)
        parts = {
            **self.made_from(context),
            "format": self.format,
            "dtype": str(dtype),
        }
        found = context.artefacts.find(self.slug, parts)
        if found is not None:
            return found
        weights = self._pruned(context)

        def packed() -> Iterator[dict[str, Tensor]]:
            for layer in range(context.config.num_layers):
                yield {
                    name: pack_dense(weights(f"layers.{layer}.{name}").to(dtype)) for name in LAYER_LINEARS
                }

        return context.artefacts.build(
            self.slug, parts, lambda folder: write_layers(folder, packed(), self.format == "bitmap")
        )

    def _pruned(self, context: BuildContext) -> Any:
        """A function from a linear's name to its pruned float32 weight."""
        if self.pruning == "magnitude" or self.sparsity == 0:
            decoder = load_decoder(context.checkpoint, pack=SourceLinear)
            sources = {
                name: cast(SourceLinear, linear).source
                for name, linear in decoder.linears()
                if name != "lm_head"
            }
            return lambda name: prune(sources[name].dense(), self.sparsity)
        kept = BlockFiles(
            lambda: prepare_blocks(
                context,
                f"{self.slug}-wanda",
                self.label(),
                self.made_from(context),
                lambda work: Wanda(self.sparsity, work),
                lambda: calibration_segments(context, self.samples, self.sample_length, self.seed),
            )
        )
        return lambda name: kept.tensors(name)[f"{name}.weight"].float()

    def provide(self, slot: str, context: BuildContext) -> EndorFormat:
        """The weight format. Raises `UnsupportedError` where the file system refuses direct I/O."""
        return EndorFormat(self, context)


def prune(weight_OI: Tensor, sparsity: float, norm_I: Tensor | None = None) -> Tensor:
    """The weight with the ``sparsity`` smallest |w| (times ``norm_I``) of every output set to +0.0.

    Wanda (arXiv 2306.11695), section 3.
    """
    count = int(weight_OI.shape[1] * sparsity)
    if count == 0:
        return weight_OI.clone()
    score_OI = weight_OI.abs() if norm_I is None else weight_OI.abs() * norm_I
    return weight_OI.scatter(1, score_OI.topk(count, dim=1, largest=False, sorted=False).indices, 0.0)


class Wanda(KeptMethod):
    """Pruning by |w| times the norm of its input, as a method of the calibration driver."""

    def __init__(self, sparsity: float, work: WorkFolder) -> None:
        super().__init__(work)
        self.sparsity = sparsity

    def statistic(self, name: str, linear: nn.Module) -> Hessian:
        return Hessian(cast(Tensor, linear.weight).shape[1])

    def process(self, name: str, linear: nn.Module, statistic: Hessian) -> tuple[nn.Module, LinearReport]:
        started = time.perf_counter()
        statistic.require_rows()
        weight_OI, bias_O = cast(Tensor, linear.weight).float(), cast("Tensor | None", linear.bias)
        hessian_II = statistic.matrix_II.float()
        pruned_OI = prune(weight_OI, self.sparsity, hessian_II.diagonal().sqrt())
        error, plain = (
            _energy(other_OI - weight_OI, hessian_II) / max(_energy(weight_OI, hessian_II), 1e-30)
            for other_OI in (pruned_OI, prune(weight_OI, self.sparsity))
        )
        self.tensors[f"{name}.weight"] = pruned_OI
        if bias_O is not None:
            self.tensors[f"{name}.bias"] = bias_O
        seconds = time.perf_counter() - started
        return FixedLinear(pruned_OI, bias_O), LinearReport(name, error, plain, seconds)

    def load(self, index: int) -> Mapping[str, nn.Module] | None:
        tensors = self.work.load(index)
        if tensors is None:
            return None
        names = {name.rpartition(".")[0] for name in tensors}
        return {n: FixedLinear(tensors[f"{n}.weight"], tensors.get(f"{n}.bias")) for n in names}


def _energy(weight_OI: Tensor, hessian_II: Tensor) -> float:
    return float(((weight_OI @ hessian_II) * weight_OI).sum())


class EndorFormat(WeightFormat):
    """Linears of blocks from the store; the LM head as the checkpoint stores it."""

    def __init__(self, settings: Endor, context: BuildContext) -> None:
        file = LayerFile(
            settings.prepare(context),
            settings.read == "direct",
            None if settings.link_gbps is None else settings.link_gbps * 1e9,
        )
        self.store = WeightStore(
            file,
            int(settings.memory_mb * 1e6),
            compressed=int(settings.compressed_mb * 1e6),
            prefetch=settings.prefetch,
        )
        self._head: WeightFormat = NativeFormat()
        if context.weight_dtype is not None:
            self._head = DenseFormat(str(context.weight_dtype).removeprefix("torch."))

    def pack(self, source: LinearSource) -> PackedLinear:
        """The streamed linear; the head packed as usual."""
        if source.name == "lm_head":
            return self._head.pack(source)
        return StreamedLinear(self.store, source)


class StreamedLinear(PackedLinear):
    """A linear whose weight the store brings when it is needed."""

    bias_P: Tensor | None

    def __init__(self, store: WeightStore, source: LinearSource) -> None:
        super().__init__()
        self.inputs, self.outputs = source.inputs, source.outputs
        _, layer, self.name = source.name.split(".")
        self.layer, self.store = int(layer), store
        bias_O = source.bias_O
        self.register_buffer(
            "bias_P", None if bias_O is None else pad_rows(bias_O.detach().float()).flatten()
        )

    def forward(self, x_TI: Tensor) -> Tensor:
        """y_TO = x_TI @ W^T + bias, float32."""
        if x_TI.requires_grad and torch.is_grad_enabled():
            raise UnsupportedError("a streamed linear layer has no backward pass; run under torch.no_grad()")
        kernel = self.store.linear(self.layer, self.name, self.outputs, self.bias_P)
        if x_TI.dim() == 2:
            return kernel(x_TI)
        return kernel(x_TI.reshape(-1, self.inputs)).view(*x_TI.shape[:-1], self.outputs)

    def dequantize(self) -> Tensor:
        """The pruned float32 weight [O, I], read from the file."""
        return self.store.weight(self.layer, self.name, self.outputs).float()

    def weight_bytes(self) -> int:
        """Bytes that one pass reads for it: from disk, or of the layer in memory."""
        return self.store.file.regions[self.layer].linears[self.name].nbytes

    def __getstate__(self) -> dict[str, Any]:
        raise UnsupportedError("a streamed linear layer cannot be copied: its weights belong to an open file")

    def extra_repr(self) -> str:
        return f"{self.inputs} -> {self.outputs}, streamed"
