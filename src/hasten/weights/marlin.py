"""MARLIN: symmetric 4 bit weights whose kernels keep their speed while the batch grows, optionally 2:4 sparse.

Frantar, Castro, Chen, Hoefler, Alistarh, PPoPP 2025, arXiv 2408.11743. The weights come from GPTQ with the paper's
recipe: dampening 0.1, a running mean instead of a sum for the Hessian, a search for each group's clipping threshold
in the measure of the sweep itself, calibration samples of varying length. ``sparse`` prunes in the same sweep, as
SparseGPT.

Legend: N samples, L tokens of a sample, O outputs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from hasten.core.errors import UnsupportedError
from hasten.core.technique import Technique
from hasten.weights.affine import AffineLinear, finest_activations
from hasten.weights.format import LinearSource, PackedLinear, WeightFormat
from hasten.weights.gptq import GPTQ, GPTQFormat
from hasten.weights.gptq_files import stored_gptq, stored_linear
from hasten.weights.gptq_pack import pack_dense, pack_head
from hasten.weights.marlin_layers import MarlinLinear, fits, pack_marlin
from hasten.weights.packed import KernelLinear

if TYPE_CHECKING:
    from pathlib import Path

    from hasten.models.context import BuildContext

SHORTEST = 8  # a varying sample has at least this fraction (1/8) of sample_length


class Recipe(GPTQ):
    """GPTQ's driver with MARLIN's recipe: what the artefact depends on."""

    slug: ClassVar[str] = "marlin"

    sparse: bool = Field(False, description="prune two of four")
    clip: bool = Field(True, description="search clipping thresholds")
    varying: bool = Field(True, description="samples of varying length")

    def sweep_options(self) -> dict[str, Any]:
        return super().sweep_options() | {"clip": self.clip, "two_of_four": self.sparse}

    def calibration_lengths(self, token_ids_NL: Tensor) -> Tensor | None:
        if not self.varying:
            return None
        samples, longest = token_ids_NL.shape
        random = torch.Generator().manual_seed(self.seed)
        return torch.randint(-(-longest // SHORTEST), longest + 1, (samples,), generator=random)


class Marlin(Technique):
    """4 bit weights on kernels that read each weight once for the whole batch, with work cut into equal stripes."""

    slug: ClassVar[str] = "marlin"
    slots: ClassVar[tuple[str, ...]] = ("weight_format",)
    lossless: ClassVar[bool] = False

    group_size: Literal[32, 64, 128, -1] = Field(
        64, description="inputs that share a scale; -1 for one per output"
    )
    activations: Literal["float32", "int16", "int8"] | None = Field(
        None,
        description="int16 (w4a16, fixed point per row), float32 (exact), int8 (w4a8: another method, coarser); "
        "None: int16, float32 with sparse",
    )
    sparse: bool = Field(
        False, description="keep two of each four inputs (Sparse-MARLIN, 3.25 bits per weight)"
    )
    clip: bool = Field(True, description="search the clipping threshold of every group")
    act_order: bool | None = Field(
        None,
        description="visit inputs by falling energy; None: yes, except with sparse, which needs their order",
    )
    percdamp: float = Field(0.1, gt=0, lt=1, description="dampening, as a share of the mean diagonal of H")
    samples: int = Field(64, ge=1, description="calibration segments")
    sample_length: int = Field(512, ge=1, description="tokens of the longest segment")
    varying: bool = Field(True, description="segments of varying length, from an eighth of sample_length up")
    seed: int = Field(0, ge=0, description="of the choice of segments")
    quantize_head: Literal["float32", "bfloat16", "int8"] = Field(
        "int8", description="storage of the LM head"
    )

    @model_validator(mode="after")
    def _check(self) -> Marlin:
        if self.sparse and self.activations not in (None, "float32"):
            raise ValueError(
                f"sparse weights meet float32 activations only, not {self.activations}; leave activations out"
            )
        if self.sparse and self.act_order:
            raise ValueError("sparse weights are swept in order; leave act_order out")
        return self

    @property
    def rounding(self) -> str:
        """What activations are rounded to."""
        return self.activations or ("float32" if self.sparse else "int16")

    def recipe(self) -> Recipe:
        """The quantisation that these settings name."""
        ordered = self.sparse if self.act_order is None else not self.act_order
        return Recipe(
            bits=4,
            group_size=self.group_size,
            symmetric=True,
            act_order=not ordered,
            static_groups=not ordered,  # in order, scales follow the compensated weights at no cost
            percdamp=self.percdamp,
            samples=self.samples,
            sample_length=self.sample_length,
            seed=self.seed,
            sparse=self.sparse,
            clip=self.clip,
            varying=self.varying,
        )

    def prepare(self, context: BuildContext) -> Path:
        """The artefact's folder, quantising first if there is none; errors as `GPTQ.prepare`."""
        return self.recipe().prepare(context)

    def provide(self, slot: str, context: BuildContext) -> MarlinFormat:
        """The weight format. Raises `UnsupportedError` for a folder of GPTQ weights with ``sparse``."""
        return MarlinFormat(self, context)


class MarlinFormat(WeightFormat):
    """Packs linears from the artefact, or from a folder that already holds symmetric 4 bit GPTQ weights."""

    def __init__(self, settings: Marlin, context: BuildContext) -> None:
        self.settings = settings
        self.path = context.checkpoint.path
        self.stored = stored_gptq(context.checkpoint) is not None
        if self.stored and settings.sparse:
            raise UnsupportedError(
                f"{self.path} already holds GPTQ weights, which cannot be pruned; take the original model"
            )
        self._quantized = None if self.stored else GPTQFormat(settings.recipe(), context)

    def pack(self, source: LinearSource) -> PackedLinear:
        """The packed linear. Raises `UnsupportedError` for stored weights that the kernels cannot multiply."""
        if self._quantized is None:
            return self._adopt(source)
        if source.name == "lm_head":
            return self._head(source)
        weight = self._quantized.weight(source.name)
        return pack_marlin(weight, source.bias_O, self.settings.rounding, self.settings.sparse)

    def _adopt(self, source: LinearSource) -> PackedLinear:
        found = stored_linear(source)
        if found is None:
            return self._head(source) if source.name == "lm_head" else pack_dense(source, torch.float32)
        if not isinstance(found, KernelLinear) or not fits(found):
            raise UnsupportedError(
                f"{source.name} of {self.path} is not stored in symmetric 4 bits with groups of neighbouring inputs; "
                "use gptq, which reads every GPTQ layout"
            )
        assert isinstance(found, AffineLinear)
        return MarlinLinear.from_weight(replace(found.weight, activations=self.settings.rounding))

    def _head(self, source: LinearSource) -> PackedLinear:
        """The LM head; 8 bit codes meet the same activations as the other layers, or the next finer ones."""
        head = pack_head(source, self.settings.quantize_head)
        if not isinstance(head, AffineLinear):
            return head
        weight = head.weight
        activations = finest_activations(self.settings.rounding, weight.bits, weight.group_size)
        return AffineLinear.from_weight(replace(weight, activations=activations))
