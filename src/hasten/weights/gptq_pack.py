"""From quantised weights to packed layers, and to and from the tensors of an artefact.

Legend: T rows, I inputs, O outputs, G groups, B bytes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hasten.core.errors import ArtefactError
from hasten.models.gptq_layout import pack_words, unpack_words
from hasten.weights.affine import AffineLinear
from hasten.weights.dense import DenseLinear
from hasten.weights.format import LinearSource, PackedLinear
from hasten.weights.gptq_grid import Grid, TernaryGrid, half
from hasten.weights.gptq_sweep import QuantizedWeight, group_count

HEAD_GROUP = 32  # inputs per scale of an int8 LM head


def to_tensors(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors that an artefact keeps of a weight: packed codes, float16 parameters, group of every input."""
    zeros = weight.b_OG.to(torch.float16)  # exact: integers up to 255, or (ternary) float16 to begin with
    return {
        f"{name}.codes": pack_words(weight.codes_OI, weight.grid.code_bits),
        f"{name}.a": weight.a_OG.to(torch.float16),
        f"{name}.b": zeros,
        f"{name}.group": weight.group_I.to(torch.int32),
    }


def from_tensors(name: str, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedWeight:
    """The weight that `to_tensors` wrote. Raises `ArtefactError` if a tensor is missing."""
    try:
        codes, a, b, group = (tensors[f"{name}.{leaf}"] for leaf in ("codes", "a", "b", "group"))
    except KeyError as error:
        raise ArtefactError(f"the artefact holds no tensor {error}; delete it and prepare it again") from None
    return QuantizedWeight(
        grid,
        unpack_words(codes, grid.code_bits, group.numel()),
        a.to(torch.float32),
        b.to(torch.float32),
        group.to(torch.int64),
    )


def pack_weight(weight: QuantizedWeight, bias_O: Tensor | None) -> PackedLinear:
    """The packed layer of a quantised weight: native kernels for uniform grids, plain PyTorch for ternary ones.

    Groups that are not runs of neighbouring columns (act_order without static groups) cost a gather of the inputs.
    """
    return (
        TernaryLinear(weight, bias_O)
        if isinstance(weight.grid, TernaryGrid)
        else pack_uniform(weight, bias_O)
    )


def pack_uniform(weight: QuantizedWeight, bias_O: Tensor | None) -> AffineLinear:
    """The packed layer of a weight on a uniform grid."""
    inputs, groups = weight.codes_OI.shape[1], weight.a_OG.shape[1]
    codes_OI, perm_I = weight.codes_OI, None
    if not weight.ordered:
        # Stable, so that the order (and with it the rounding of sums) depends on what is stored alone.
        perm_I = torch.argsort(weight.group_I, stable=True)
        codes_OI = codes_OI[:, perm_I].contiguous()
    group_size = inputs if groups == 1 else int((weight.group_I == 0).sum())
    assert groups == group_count(inputs, group_size)
    return AffineLinear(
        codes_OI,
        weight.a_OG,
        -weight.a_OG * weight.b_OG,
        bits=weight.grid.code_bits,
        group_size=group_size,
        bias_O=bias_O,
        perm_I=perm_I,
    )


def pack_dense(source: LinearSource, dtype: torch.dtype) -> PackedLinear:
    """An unquantised layer stored in ``dtype``."""
    return DenseLinear(source.dense(), source.bias_O, dtype)


def pack_head(source: LinearSource, how: str) -> PackedLinear:
    """The LM head as "float32", "bfloat16" or "int8": rounded to nearest, one float16 scale per 32 inputs.

    The int8 grid is scale * (code - 128) with scale = max |w| / 127, which holds Q8_0 weights of a GGUF exactly; those
    are repacked as they are.
    """
    if how == "int8" and source.blocks is not None and all(blocks.kind == "Q8_0" for blocks in source.blocks):
        from hasten.weights.native import NativeFormat  # which packs GPTQ folders with this module

        return NativeFormat("float32").pack(source)
    if how != "int8":
        return pack_dense(source, getattr(torch, how))
    w_OI = source.dense()
    inputs = w_OI.shape[1]
    padded_OGI = nn.functional.pad(w_OI, (0, -inputs % HEAD_GROUP)).unflatten(-1, (-1, HEAD_GROUP))
    scale_OG = half(padded_OGI.abs().amax(-1) / 127)
    codes_OGI = (padded_OGI / scale_OG[..., None]).round_().clamp_(-127, 127).add_(128)
    return AffineLinear(
        codes_OGI.flatten(1)[:, :inputs].to(torch.uint8),
        scale_OG,
        scale_OG * -128,
        bits=8,
        group_size=HEAD_GROUP,
        bias_O=source.bias_O,
        perm_I=None,
    )


class TernaryLinear(PackedLinear):
    """{min, 0, max} weights, two bits each, two float16 values per group. No native kernel: it decodes slices of rows
    and multiplies, so it saves memory but no time."""

    _SLICE = 1024  # output rows decoded at once

    codes_OB: Tensor
    max_OG: Tensor
    min_OG: Tensor
    group_I: Tensor
    bias_O: Tensor | None

    def __init__(self, weight: QuantizedWeight, bias_O: Tensor | None) -> None:
        super().__init__()
        self.outputs, self.inputs = weight.codes_OI.shape
        self.grid = weight.grid
        self.register_buffer("codes_OB", pack_words(weight.codes_OI, 2), persistent=False)
        self.register_buffer("max_OG", weight.a_OG.to(torch.float16), persistent=False)
        self.register_buffer("min_OG", weight.b_OG.to(torch.float16), persistent=False)
        self.register_buffer("group_I", weight.group_I, persistent=False)
        self.register_buffer("bias_O", bias_O, persistent=False)

    def _rows(self, start: int, stop: int) -> Tensor:
        codes_OI = unpack_words(self.codes_OB[start:stop], 2, self.inputs)
        max_OG, min_OG = self.max_OG[start:stop].float(), self.min_OG[start:stop].float()
        return self.grid.decode(codes_OI, max_OG[:, self.group_I], min_OG[:, self.group_I])

    def forward(self, x_TI: Tensor) -> Tensor:
        """y_TO = x_TI @ W^T + bias, float32."""
        parts = [
            x_TI @ self._rows(start, start + self._SLICE).t() for start in range(0, self.outputs, self._SLICE)
        ]
        y_TO = torch.cat(parts, dim=-1)
        return y_TO if self.bias_O is None else y_TO + self.bias_O

    def dequantize(self) -> Tensor:
        """The exact float32 weight [O, I]."""
        return self._rows(0, self.outputs)

    def weight_bytes(self) -> int:
        """Bytes of codes and group values read per row of input."""
        return self.codes_OB.nbytes + self.max_OG.nbytes + self.min_OG.nbytes
