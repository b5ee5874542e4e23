"""T-MAN: one copy of bit planes, multiplied by table look-up at decode and dequantised by tables for prompts.

Wei et al., 2025, arXiv 2511.11248. The weights are the checkpoint's own 1 to 4 bit codes (Q4_0, Q4_1, Q4_K, a folder of
GPTQ weights), converted without loss, or GPTQ's with ``bits`` 2, 3 or 4.

Legend: I inputs, O outputs, G groups, N blocks of 16 outputs, U units of 16 inputs, B bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from hasten.core.errors import UnsupportedError
from hasten.core.technique import Technique
from hasten.kernels.affine import unpack_codes
from hasten.kernels.packed import Packed
from hasten.kernels.t_man import BITS, PlaneWeight, dequantize, pack_planes, share_tables, t_man
from hasten.models.checkpoint import QuantBlocks
from hasten.weights.affine import AffineLinear, CodeLinear
from hasten.weights.format import LinearSource, PackedLinear, WeightFormat
from hasten.weights.gptq import GPTQ, GPTQFormat
from hasten.weights.gptq_files import stored_gptq
from hasten.weights.native import NativeFormat
from hasten.weights.packed import KernelLinear, StackedLinear

if TYPE_CHECKING:
    from pathlib import Path

    from hasten.models.context import BuildContext

Tables = Literal["int16", "int8"]


class TMan(Technique):
    """Weights of 1 to 4 bits as bit planes: sums of activations are looked up, never multiplied, at decode; the same
    copy is dequantised by tables for prompts."""

    slug: ClassVar[str] = "t_man"
    slots: ClassVar[tuple[str, ...]] = ("weight_format",)
    lossless: ClassVar[bool] = False

    bits: Literal[2, 3, 4] | None = Field(
        None,
        description="quantise with GPTQ to so many bits; None: the codes the checkpoint holds, as they are",
    )
    group_size: int = Field(64, description="with bits: inputs that share a scale; -1 for one scale per row")
    symmetric: bool = Field(False, description="with bits: range [-m, m] instead of [min, max]")
    tables: Tables = Field("int16", description="entries of the look-up tables; int8 is faster and coarser")
    samples: int = Field(64, ge=1, description="with bits: calibration segments")
    sample_length: int = Field(512, ge=1, description="with bits: tokens of a segment")
    seed: int = Field(0, ge=0, description="with bits: of the choice of segments")
    quantize_head: Literal["float32", "bfloat16", "int8"] = Field(
        "int8", description="storage of the LM head where the checkpoint holds plain weights for it"
    )

    @model_validator(mode="after")
    def _check(self) -> TMan:
        if self.group_size != -1 and (self.group_size < 16 or self.group_size % 16):
            raise ValueError(f"group_size = {self.group_size}: a multiple of 16, or -1 for one scale per row")
        return self

    def recipe(self) -> GPTQ:
        """The quantisation that these settings name."""
        return GPTQ(
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            samples=self.samples,
            sample_length=self.sample_length,
            seed=self.seed,
            quantize_head=self.quantize_head,
        )

    def prepare(self, context: BuildContext) -> Path | None:
        """GPTQ's artefact folder with ``bits``, quantising first if there is none (errors as `GPTQ.prepare`); a
        checkpoint's own codes need no preparation: None."""
        return None if self.bits is None else self.recipe().prepare(context)

    def provide(self, slot: str, context: BuildContext) -> TManFormat:
        """The weight format. Raises `UnsupportedError` when ``bits`` is None and the checkpoint holds no such codes,
        or is set and the checkpoint holds GPTQ weights already."""
        return TManFormat(self, context)


class PlaneLinear(CodeLinear[PlaneWeight]):
    """A linear layer of bit planes. Raises `UnsupportedError` for codes of more than 4 bits."""

    codes = "planes"

    def __init__(self, weight: PlaneWeight) -> None:
        self._set(weight)

    @classmethod
    def of(cls, layer: AffineLinear, tables: Tables = "int16") -> PlaneLinear:
        """The same codes, scales and lows, as bit planes: nothing is rounded."""
        weight = layer.weight
        if weight.bits not in BITS:
            raise UnsupportedError(
                f"bit planes hold 1 to 4 bits, not {weight.bits}; use native weights (dtype auto)"
            )
        codes_OK = unpack_codes(weight.words, weight.outputs, weight.width)
        found = cls(
            PlaneWeight(
                weight.inputs,
                weight.outputs,
                weight.bits,
                weight.group_size,
                pack_planes(codes_OK, weight.bits),
                weight.scale,
                weight.low,
                weight.nest,
                weight.column_K,
                weight.bias_P,
                tables,
            )
        )
        found.exact = layer.exact
        return found

    def make_kernel(self) -> Packed:
        return t_man(self.weight)

    def dequantize(self) -> Tensor:
        """The exact float32 weight [O, I], inputs in their own order."""
        return dequantize(self.weight)

    def extra_repr(self) -> str:
        form = self._form
        return f"{self.inputs} -> {self.outputs}, {form.bits} planes, groups of {form.group_size}, {form.tables} tables"


class SharedLinear(StackedLinear):
    """Layers of bit planes that share their input and its tables, outputs one after the other."""

    def make_kernel(self) -> Packed:
        return share_tables([part.kernel() for part in self.parts])  # type: ignore[operator]


def to_planes(layer: PackedLinear, tables: Tables) -> PackedLinear:
    """``layer`` with every part of 1 to 4 bits as bit planes; other parts as they are."""
    if isinstance(layer, StackedLinear):
        return _stack([to_planes(part, tables) for part in layer.parts])  # type: ignore[arg-type, misc]
    if isinstance(layer, AffineLinear) and layer.weight.bits in BITS:
        return PlaneLinear.of(layer, tables)
    return layer


def _stack(parts: Sequence[KernelLinear]) -> StackedLinear:
    planes = [part for part in parts if isinstance(part, PlaneLinear) and part.column_K is None]
    return SharedLinear(parts) if len(planes) == len(parts) else StackedLinear(parts)


class TManFormat(WeightFormat):
    """Turns packed codes into bit planes: the checkpoint's own, or those of GPTQ's artefact.

    Codes of more than 4 bits that a checkpoint mixes in (a Q8_0 head, the Q6_K layers of a Q4_K_M file) stay on the
    engine's kernels, as stored.
    """

    def __init__(self, settings: TMan, context: BuildContext) -> None:
        self.settings, checkpoint = settings, context.checkpoint
        stored = stored_gptq(checkpoint) is not None
        self._source: WeightFormat
        if stored and settings.bits is not None:
            raise UnsupportedError(
                f"{checkpoint.path} already holds GPTQ weights; leave t_man.bits out to use them"
            )
        if stored:
            self._source = GPTQFormat(GPTQ(quantize_head=settings.quantize_head), context)
        elif settings.bits is not None:
            self._source = GPTQFormat(settings.recipe(), context)
        elif not isinstance(checkpoint.stored("layers.0.down_proj.weight"), QuantBlocks):
            raise UnsupportedError(
                f"{checkpoint.path} holds plain weights, no codes of 1 to 4 bits; set t_man.bits to 2, 3 or 4 to "
                "quantise them"
            )
        else:
            self._source = NativeFormat()

    def pack(self, source: LinearSource) -> PackedLinear:
        """The packed linear. Raises `UnsupportedError` for shapes that the kernels cannot hold."""
        packed = self._source.pack(source)
        return packed if source.name == "lm_head" else to_planes(packed, self.settings.tables)
