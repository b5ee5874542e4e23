"""GPTQ: one-shot, calibrated 2, 3, 4 and 8 bit weights (Frantar et al., ICLR 2023, arXiv 2210.17323).

The first use of a model with given settings runs the calibration (minutes) and keeps the result as an artefact
beside the model; later uses load it. A model folder that already holds GPTQ weights is used as it is.
Activations are never quantised. The LM head and the embedding are not part of GPTQ, as in the paper;
``quantize_head`` says how the head is stored.

Legend: N samples, L tokens of a sample, I inputs, O outputs, G groups.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from safetensors import safe_open
from torch import Tensor, nn

from hasten.core.errors import UnsupportedError
from hasten.core.technique import Technique
from hasten.weights.calibrate import FixedLinear, LinearReport
from hasten.weights.calibrate_data import calibration_segments
from hasten.weights.calibrate_work import BlockFiles, KeptMethod, WorkFolder, made_from, prepare_blocks
from hasten.weights.format import LinearSource, PackedLinear, WeightFormat
from hasten.weights.gptq_files import save_gptq, stored_gptq, stored_linear
from hasten.weights.gptq_grid import TERNARY, Grid, make_grid
from hasten.weights.gptq_pack import from_tensors, pack_dense, pack_head, pack_weight, to_tensors
from hasten.weights.gptq_sweep import QuantizedWeight, quantize
from hasten.weights.hessian import Hessian

if TYPE_CHECKING:
    from hasten.models.context import BuildContext

VERSION = 1  # of the algorithm: raise it when the same settings give other weights
_NOT_IN_ARTEFACT = ("quantize_head",)  # settings that change how the artefact is used, not what it holds


class GPTQ(Technique):
    """Weights rounded one input column at a time, each column's error moved into the columns still to come."""

    slug: ClassVar[str] = "gptq"
    slots: ClassVar[tuple[str, ...]] = ("weight_format",)
    lossless: ClassVar[bool] = False

    bits: Literal[2, 3, 4, 8, "ternary"] = Field(4, description="bits per weight, or 'ternary' {min, 0, max}")
    group_size: int = Field(64, description="inputs that share a scale; -1 for one scale per row")
    symmetric: bool = Field(False, description="range [-m, m] instead of [min, max]")
    act_order: bool = Field(True, description="visit columns by falling activation energy")
    static_groups: bool = Field(True, description="fit scales on the original weights, before the sweep")
    true_sequential: bool = Field(
        True, description="replace a linear before collecting the next one's inputs"
    )
    mse: bool = Field(False, description="search the range that minimises |w - q|^2.4 instead of min-max")
    percdamp: float = Field(0.01, gt=0, lt=1, description="dampening, as a share of the mean diagonal of H")
    blocksize: int = Field(
        128, ge=1, description="columns between two lazy updates; does not change the result"
    )
    samples: int = Field(64, ge=1, description="calibration segments")
    sample_length: int = Field(512, ge=1, description="tokens of a segment")
    seed: int = Field(0, ge=0, description="of the choice of segments")
    quantize_head: Literal["float32", "bfloat16", "int8"] = Field(
        "int8", description="storage of the LM head"
    )

    @field_validator("group_size", mode="before")
    @classmethod
    def _whole_row(cls, value: Any) -> Any:
        return -1 if value is None else value

    @model_validator(mode="after")
    def _check(self) -> GPTQ:
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError("must be positive, or -1 for one scale per row")
        if self.bits == TERNARY and (self.symmetric or self.mse):
            raise ValueError(
                "the ternary grid is neither symmetric nor searched; leave symmetric and mse false"
            )
        return self

    @property
    def group(self) -> int | None:
        """Inputs per group, None for one group per row."""
        return None if self.group_size == -1 else self.group_size

    def grid(self) -> Grid:
        """The grid that these settings name."""
        return make_grid(self.bits, self.symmetric, self.mse)

    def sweep_options(self) -> dict[str, Any]:
        """What `gptq_sweep.quantize` is called with besides the grid; recipes built on GPTQ add to it."""
        return {
            "act_order": self.act_order,
            "static_groups": self.static_groups,
            "percdamp": self.percdamp,
            "blocksize": self.blocksize,
        }

    def calibration_lengths(self, token_ids_NL: Tensor) -> Tensor | None:
        """Tokens of each segment that count, int64 [N]; None for all of them."""
        return None

    def provide(self, slot: str, context: BuildContext) -> GPTQFormat:
        """The weight format. Raises `UnsupportedError` when a GPTQ model contradicts settings that were given."""
        return GPTQFormat(self, context)

    def made_from(self, context: BuildContext) -> dict[str, Any]:
        """What the artefact depends on besides the model: settings, calibration data, version of the algorithm."""
        settings = {k: v for k, v in self.model_dump(mode="json").items() if k not in _NOT_IN_ARTEFACT}
        return made_from(context, VERSION, settings)

    def prepare(self, context: BuildContext) -> Path:
        """The artefact's folder, quantising the model first if there is none. Shows progress; resumes after a kill.

        Raises `SettingError` (no or too short calibration data), `IntegrityError` (NaN in weights or activations),
        `UnsupportedError` (a Hessian that cannot be factorised), `ArtefactError` (a damaged artefact).
        """
        return prepare_blocks(
            context,
            self.slug,
            self.label(),
            self.made_from(context),
            lambda work: GPTQMethod(self, work),
            lambda: self.calibration_tokens(context),
            lambda token_ids_NL: {
                "true_sequential": self.true_sequential,
                "lengths_N": self.calibration_lengths(token_ids_NL),
            },
        )

    def save(self, context: BuildContext, folder: Path | str) -> Path:
        """Quantise (or load the artefact) and write a Hugging Face folder with GPTQ weights; see `save_gptq`."""
        weights = GPTQFormat(self, context)
        if weights.stored is not None:
            raise UnsupportedError(
                f"{context.checkpoint.path} already holds GPTQ weights; copy the folder instead"
            )
        return save_gptq(folder, context.checkpoint, weights.weight, self.model_dump())

    def calibration_tokens(self, context: BuildContext) -> Tensor:
        """The calibration segments, int64 [samples, sample_length]: the caller's data, else the corpus's split."""
        return calibration_segments(context, self.samples, self.sample_length, self.seed)


class GPTQMethod(KeptMethod):
    """GPTQ as a method of the calibration driver."""

    def __init__(self, settings: GPTQ, work: WorkFolder) -> None:
        super().__init__(work)
        self.settings = settings
        self.grid = settings.grid()

    def statistic(self, name: str, linear: nn.Module) -> Hessian:
        return Hessian(linear.weight.shape[1])

    def process(self, name: str, linear: nn.Module, statistic: Hessian) -> tuple[nn.Module, LinearReport]:
        started = time.perf_counter()
        statistic.require_rows()
        weight, report = quantize(
            linear.weight,
            statistic.matrix_II,
            self.grid,
            self.settings.group,
            **self.settings.sweep_options(),
        )
        self.tensors |= to_tensors(name, weight)
        if linear.bias is not None:  # so that a resumed run can go through this block
            self.tensors[f"{name}.bias"] = linear.bias
        detail = {"loss": report.loss, "percdamp": report.percdamp, "dead": report.dead}
        seconds = time.perf_counter() - started
        return (
            FixedLinear(weight.dequantize(), linear.bias),
            LinearReport(name, report.error, report.rtn_error, seconds, detail),
        )

    def load(self, index: int) -> Mapping[str, nn.Module] | None:
        tensors = self.work.load(index)
        if tensors is None:
            return None
        names = {name.rpartition(".")[0] for name in tensors}
        return {
            n: FixedLinear(from_tensors(n, tensors, self.grid).dequantize(), tensors.get(f"{n}.bias"))
            for n in names
        }


def read_reports(folder: Path) -> list[dict[str, Any]]:
    """Per linear, in execution order: name, error and rtn_error (share of the layer's output energy), seconds, loss,
    percdamp, dead; from an artefact's folder."""
    out: list[dict[str, Any]] = []
    for file in sorted(folder.glob("block-*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            out += json.loads((stored.metadata() or {}).get("reports", "[]"))
    return out


class GPTQFormat(WeightFormat):
    """Packs linears from the artefact, or from the model itself when it holds GPTQ weights."""

    def __init__(self, settings: GPTQ, context: BuildContext) -> None:
        self.settings = settings
        self.context = context
        self.stored = stored_gptq(context.checkpoint)
        if self.stored is not None:
            self._agree()
        self._blocks = BlockFiles(lambda: settings.prepare(context))

    def _agree(self) -> None:
        """Settings that were spelled out must be those of the stored weights; defaults give way to them."""
        assert self.stored is not None
        stored = {
            "bits": self.stored.bits,
            "group_size": self.stored.group_size or -1,
            "symmetric": self.stored.symmetric,
            "act_order": self.stored.act_order,
        }
        for name in stored.keys() & self.settings.model_fields_set:
            if getattr(self.settings, name) != stored[name]:
                raise UnsupportedError(
                    f"gptq.{name} = {getattr(self.settings, name)!r}, but {self.context.checkpoint.path} already holds "
                    f"GPTQ weights with {name} = {stored[name]!r}; leave the setting out or take the original model"
                )

    def weight(self, name: str) -> QuantizedWeight:
        """The quantised weight of a linear inside a block, from the artefact, which is built if there is none."""
        return from_tensors(name, self._blocks.tensors(name), self.settings.grid())

    def pack(self, source: LinearSource) -> PackedLinear:
        """The packed linear. Raises `UnsupportedError` for shapes the packed kernels cannot hold."""
        if self.stored is not None:
            found = stored_linear(source)
            if found is not None:
                return found
            if source.name != "lm_head":
                return pack_dense(source, torch.float32)  # the folder keeps this linear unquantised
        if source.name == "lm_head":
            return pack_head(source, self.settings.quantize_head)
        return pack_weight(self.weight(source.name), source.bias_O)
