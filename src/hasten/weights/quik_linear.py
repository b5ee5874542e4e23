"""The packed layer of rounded weights and inputs with outlier features, and its tensors in an artefact.

Legend: I inputs, O outputs, K base features, F outlier features.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hasten.core.errors import ArtefactError, UnsupportedError
from hasten.kernels.packed import Packed
from hasten.kernels.quik import NEVER, QuikWeight, base_features, dequantize, pack_quik, quik
from hasten.models.gptq_layout import pack_words, unpack_words
from hasten.weights.packed import KernelLinear
from hasten.weights.quik_sweep import MixedWeight

_TENSORS = ("words", "scale_P", "wred_P", "outlier_F", "outlier_NF16", "bias_P")


class QuikLinear(KernelLinear):
    """A linear layer that rounds its inputs per row and multiplies integers, from ``min_rows`` rows on.

    Fewer rows meet the same packed codes in float32; ``min_rows`` None: all do. bias_O: float32 or None.
    Raises `UnsupportedError` when the weight does not fit the kernels.
    """

    outlier_F: Tensor

    def __init__(self, weight: MixedWeight, bias_O: Tensor | None, min_rows: int | None = 1) -> None:
        try:
            packed = pack_quik(
                weight.codes_OK,
                weight.scale_O,
                weight.outlier_F,
                weight.outlier_OF,
                bits=weight.bits,
                bias_O=bias_O,
                min_rows=NEVER if min_rows is None else min_rows,
            )
        except ValueError as error:
            raise UnsupportedError(str(error)) from None
        super().__init__(packed.inputs, packed.outputs)
        # Without its tensors: those are buffers, so that copies, state dicts and byte counts see them.
        self._form = (packed.inputs, packed.outputs, packed.bits, packed.min_rows)
        for name in _TENSORS:
            self.register_buffer(name, getattr(packed, name))

    @property
    def weight(self) -> QuikWeight:
        """The packed weight over this module's buffers."""
        inputs, outputs, bits, min_rows = self._form
        return QuikWeight(
            inputs,
            outputs,
            bits,
            base_K=base_features(inputs, self.outlier_F),
            min_rows=min_rows,
            **{name: getattr(self, name) for name in _TENSORS},
        )

    def make_kernel(self) -> Packed:
        return quik(self.weight)

    def dequantize(self) -> Tensor:
        """The exact float32 weight [O, I], inputs in their own order."""
        return dequantize(self.weight)

    def extra_repr(self) -> str:
        inputs, outputs, bits, min_rows = self._form
        rows = "never rounded" if min_rows == NEVER else f"rounded from {min_rows} rows on"
        return f"{inputs} -> {outputs}, {bits} bits, {self.outlier_F.numel()} outlier features, inputs {rows}"


def to_tensors(name: str, weight: MixedWeight) -> dict[str, Tensor]:
    """The tensors that an artefact keeps of a weight: codes without a gap, float16 scales, bfloat16 outliers."""
    packed = weight.codes_OK
    if weight.codes_OK.shape[1]:
        packed = pack_words(weight.codes_OK, weight.bits)
    return {
        f"{name}.codes": packed,
        f"{name}.scale": weight.scale_O.to(torch.float16),
        f"{name}.outliers": weight.outlier_F.to(torch.int32),
        f"{name}.outlier_weight": weight.outlier_OF.to(torch.bfloat16),
        f"{name}.form": torch.tensor([weight.bits, weight.codes_OK.shape[1]], dtype=torch.int32),
    }


def from_tensors(name: str, tensors: Mapping[str, Tensor]) -> MixedWeight:
    """The weight that `to_tensors` wrote. Raises `ArtefactError` if a tensor is missing."""
    try:
        codes, scale, outliers, weight, form = (
            tensors[f"{name}.{leaf}"] for leaf in ("codes", "scale", "outliers", "outlier_weight", "form")
        )
    except KeyError as error:
        raise ArtefactError(f"the artefact holds no tensor {error}; delete it and prepare it again") from None
    bits, width = form.tolist()
    return MixedWeight(
        bits,
        unpack_words(codes, bits, width) if width else codes,
        scale.to(torch.float32),
        outliers.to(torch.int64),
        weight.to(torch.float32),
    )
