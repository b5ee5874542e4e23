"""QUIK: 4-bit weights and activations with a few outlier features in 16 bits (Ashkboos et al., arXiv 2310.09259).

The first use of a model with given settings calibrates (minutes) and keeps the result as an artefact beside the model;
later uses load it. The LM head, attention and the KV cache are not rounded, as in the paper.

Legend: N samples, L tokens of a sample, I inputs, O outputs, K base features, F outlier features.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from hasten.core.errors import ArtefactError
from hasten.core.technique import Technique
from hasten.weights.calibrate import FixedLinear, LinearReport
from hasten.weights.calibrate_data import calibration_segments
from hasten.weights.calibrate_work import BlockFiles, KeptMethod, WorkFolder, made_from, prepare_blocks
from hasten.weights.format import LinearSource, PackedLinear, WeightFormat
from hasten.weights.gptq_pack import pack_dense, pack_head
from hasten.weights.quik_linear import QuikLinear, from_tensors, to_tensors
from hasten.weights.quik_sweep import (
    MixedWeight,
    OutlierStatistic,
    outlier_features,
    quantize_mixed,
    relative_error,
    round_mixed,
)

if TYPE_CHECKING:
    from hasten.models.context import BuildContext

VERSION = 1  # of the algorithm: raise it when the same settings give other weights
SENSITIVE = "down_proj"  # its input is a product of two tensors, with far heavier tails
DENSE = 16  # bits of a layer that is left alone
_NOT_IN_ARTEFACT = (
    "quantize_head",
    "min_rows",
)  # settings that change how the artefact is used, not what it holds
_RULE = re.compile(r"(?P<pattern>.+)=(?P<bits>4|8|16)(?::(?P<outliers>\d+))?")


@dataclass(frozen=True)
class Precision:
    """Of one linear: bits of weights and activations (16: left dense), outlier features, threshold, 2:4."""

    bits: int
    outliers: int
    threshold: float
    sparse: bool


class QUIK(Technique):
    """Most features of weights and activations in 4 bits, multiplied as integers; a few outlier features in 16 bits,
    the down projection in 8. For many rows at once (prompts, large batches), not for single-stream decoding."""

    slug: ClassVar[str] = "quik"
    slots: ClassVar[tuple[str, ...]] = ("weight_format",)
    lossless: ClassVar[bool] = False

    bits: Literal[4, 8] = Field(4, description="bits of weights and activations")
    down_bits: Literal[4, 8, 16] = Field(8, description="the same of the down projection; 16 leaves it dense")
    outliers: int = Field(64, ge=0, description="features of a linear that stay in 16 bits")
    fp_relative: bool = Field(True, description="floor(inputs / hidden size) times as many for wide inputs")
    zero_threshold: float = Field(
        0.0, ge=0, description="no outliers where no activation reaches this (twice this: down projection)"
    )
    layers: tuple[str, ...] = Field(
        (),
        description="exceptions, first match counts: 'REGEX=BITS' or 'REGEX=BITS:OUTLIERS', 16 bits: dense",
    )
    sparse: bool = Field(False, description="2:4 sparse base weights, but for the down projection")
    clip: bool = Field(True, description="search the weights' range that minimises |w - q|^2.4")
    act_order: bool = Field(False, description="visit columns by falling activation energy")
    sweep: bool = Field(True, description="GPTQ; false rounds to nearest, for comparison")
    round_activations: bool = Field(True, description="false: weights only, activations stay float32")
    min_rows: int = Field(8, ge=1, description="calls of fewer rows do not round activations")
    percdamp: float = Field(0.01, gt=0, lt=1, description="dampening, as a share of the mean diagonal of H")
    blocksize: int = Field(
        128, ge=1, description="columns between two lazy updates; does not change the result"
    )
    samples: int = Field(64, ge=1, description="calibration segments")
    sample_length: int = Field(512, ge=1, description="tokens of a segment")
    seed: int = Field(0, ge=0, description="of the choice of segments")
    quantize_head: Literal["float32", "bfloat16", "int8"] = Field(
        "bfloat16", description="storage of the LM head"
    )

    @field_validator("layers")
    @classmethod
    def _rules(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for rule in value:
            found = _RULE.fullmatch(rule)
            if found is None:
                raise ValueError(f"{rule!r} is not REGEX=BITS or REGEX=BITS:OUTLIERS with 4, 8 or 16 bits")
            try:
                re.compile(found["pattern"])
            except re.error as error:
                raise ValueError(f"{rule!r} is no regular expression: {error}") from None
        return value

    @model_validator(mode="after")
    def _check(self) -> QUIK:
        if self.sparse and self.act_order:
            raise ValueError("sparse prunes neighbouring columns in order: leave act_order false")
        if self.sparse and not self.sweep:
            raise ValueError("sparse needs the sweep: leave sweep true")
        if self.sparse and self.blocksize % 4:
            raise ValueError("sparse needs a blocksize that is a multiple of 4")
        return self

    def precision(self, name: str, inputs: int, hidden: int) -> Precision:
        """How the linear called ``name`` (``layers.3.down_proj``) of ``inputs`` inputs is stored."""
        sensitive = name.endswith(SENSITIVE)
        bits = self.down_bits if sensitive else self.bits
        count = self.outliers * (max(1, inputs // hidden) if self.fp_relative else 1)
        for rule in self.layers:
            found = _RULE.fullmatch(rule)
            assert found is not None
            if re.fullmatch(found["pattern"], name):
                bits = int(found["bits"])  # type: ignore[assignment]
                count = count if found["outliers"] is None else int(found["outliers"])
                break
        threshold = self.zero_threshold * (2 if sensitive and bits == 8 else 1)
        return Precision(bits, min(count, inputs), threshold, self.sparse and not sensitive)

    def rows(self) -> int | None:
        """`QuikLinear`'s ``min_rows``."""
        return self.min_rows if self.round_activations else None

    def provide(self, slot: str, context: BuildContext) -> QuikFormat:
        """The weight format."""
        return QuikFormat(self, context)

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
            lambda work: QuikMethod(self, context.config.hidden_size, work),
            lambda: self.calibration_tokens(context),
        )

    def calibration_tokens(self, context: BuildContext) -> Tensor:
        """The calibration segments, int64 [samples, sample_length]; see `calibration_segments`."""
        return calibration_segments(context, self.samples, self.sample_length, self.seed)


class QuikMethod(KeptMethod):
    """QUIK as a method of the calibration driver.

    Replaced linears round their inputs as they will in use, so later linears are fitted to those errors too.
    """

    def __init__(self, settings: QUIK, hidden: int, work: WorkFolder) -> None:
        super().__init__(work)
        self.settings, self.hidden = settings, hidden

    def statistic(self, name: str, linear: nn.Module) -> OutlierStatistic:
        return OutlierStatistic(linear.weight.shape[1])

    def process(
        self, name: str, linear: nn.Module, statistic: OutlierStatistic
    ) -> tuple[nn.Module, LinearReport]:
        started, settings = time.perf_counter(), self.settings
        statistic.require_rows()
        inputs = linear.weight.shape[1]
        want = settings.precision(name, inputs, self.hidden)
        detail: dict[str, float] = {"bits": want.bits, "largest": float(statistic.largest_I.max())}
        if linear.bias is not None:  # so that a resumed run can go through this block
            self.tensors[f"{name}.bias"] = linear.bias
        if want.bits == DENSE:
            weight_OI = linear.weight.to(torch.bfloat16)
            self.tensors[f"{name}.dense"] = weight_OI
            seconds = time.perf_counter() - started
            return FixedLinear(weight_OI.float(), linear.bias), LinearReport(name, 0.0, 0.0, seconds, detail)
        outlier_F = outlier_features(statistic.largest_I, want.outliers, want.threshold)
        detail["outliers"] = outlier_F.numel()
        if settings.sweep:
            weight, swept = quantize_mixed(
                linear.weight,
                statistic.matrix_II,
                outlier_F,
                want.bits,
                mse=settings.clip,
                act_order=settings.act_order,
                sparse=want.sparse,
                percdamp=settings.percdamp,
                blocksize=settings.blocksize,
            )
            error, reference = swept.error, swept.rtn_error
            detail |= {"percdamp": swept.percdamp, "dead": swept.dead}
        else:
            weight = round_mixed(linear.weight, outlier_F, want.bits, mse=settings.clip)
            error = reference = relative_error(linear.weight, weight, statistic.matrix_II)
        self.tensors |= to_tensors(name, weight)
        seconds = time.perf_counter() - started
        return self._module(weight, linear.bias), LinearReport(name, error, reference, seconds, detail)

    def _module(self, weight: MixedWeight, bias_O: Tensor | None) -> nn.Module:
        if not self.settings.round_activations:
            return FixedLinear(weight.dequantize(), bias_O)
        return QuikLinear(weight, bias_O)

    def load(self, index: int) -> Mapping[str, nn.Module] | None:
        tensors = self.work.load(index)
        if tensors is None:
            return None
        modules: dict[str, nn.Module] = {}
        for name in {key.rpartition(".")[0] for key in tensors}:
            bias_O, dense_OI = tensors.get(f"{name}.bias"), tensors.get(f"{name}.dense")
            modules[name] = (
                self._module(from_tensors(name, tensors), bias_O)
                if dense_OI is None
                else FixedLinear(dense_OI.float(), bias_O)
            )
        return modules


class QuikFormat(WeightFormat):
    """Packs linears from the artefact, which is built if there is none."""

    def __init__(self, settings: QUIK, context: BuildContext) -> None:
        self.settings = settings
        self._blocks = BlockFiles(lambda: settings.prepare(context))

    def pack(self, source: LinearSource) -> PackedLinear:
        """The packed linear. Raises `UnsupportedError` for shapes that the kernels cannot hold."""
        if source.name == "lm_head":
            return pack_head(source, self.settings.quantize_head)
        tensors = self._blocks.tensors(source.name)
        if f"{source.name}.dense" in tensors:
            return pack_dense(source, torch.bfloat16)
        weight = from_tensors(source.name, tensors)
        if weight.shape != (source.outputs, source.inputs):
            raise ArtefactError(
                f"the artefact's {source.name} does not fit the model; delete it and prepare it again"
            )
        return QuikLinear(weight, source.bias_O, self.settings.rows())
