"""Group-quantised weights, w[o, i] = scale[o, g] * code[o, i] + low[o, g], and plain rounding onto such grids.

Legend: I inputs, O outputs, G groups, K stored columns.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from hasten.core.errors import SettingError, UnsupportedError
from hasten.kernels.affine import (
    ACTIVATIONS,
    BITS,
    CHUNK,
    HALF,
    HALF_KIND,
    OFFSET,
    SINGLE,
    ZERO,
    AffineWeight,
    Numbers,
    affine,
    dequantize,
    group_count,
    has_activations,
    pack_codes,
    pack_groups,
)
from hasten.kernels.packed import Packed, pad_rows
from hasten.kernels.t_man import PlaneWeight
from hasten.weights.format import LinearSource, WeightFormat
from hasten.weights.packed import KernelLinear

GRIDS = ("asymmetric", "symmetric", "float-min")
W = TypeVar("W", AffineWeight, PlaneWeight)


def check_activations(activations: str) -> None:
    """Raise `SettingError` unless ``activations`` is one of the kernels' `ACTIVATIONS`."""
    if activations not in ACTIVATIONS:
        raise SettingError(
            f"activations = {activations!r}: choose float32 (exact), int16 (finer than bfloat16) or int8 (coarse)"
        )


def finest_activations(activations: str, bits: int, group_size: int) -> str:
    """``activations`` where codes of ``bits`` in groups of ``group_size`` can meet them, else the next finer ones."""
    finer = ("int8", "int16", "float32")
    return next(a for a in finer[finer.index(activations) :] if has_activations(a, bits, group_size))


def store_scale(scale_OG: Tensor, groups: int) -> Numbers:
    """float32 numbers packed as float16 when that is exact, else as float32."""
    half = scale_OG.to(torch.float16)
    if torch.equal(half.float(), scale_OG):
        return Numbers(HALF_KIND, pack_groups(half, groups))
    return Numbers(SINGLE, pack_groups(scale_OG, groups))


def store_low(low_OG: Tensor, scale_OG: Tensor, groups: int) -> Numbers:
    """Lows packed in the smallest exact way: one multiple of the scale, uint8 multiples, float16 or float32."""
    zero_OG = torch.where(scale_OG != 0, -low_OG / scale_OG, 0.0).round()
    if torch.equal(zero_OG * -scale_OG, low_OG):
        first = float(zero_OG.flatten()[0])
        if bool((zero_OG == first).all()):
            return Numbers(OFFSET, offset=first)
        if float(zero_OG.min()) >= 0 and float(zero_OG.max()) <= 255:
            return Numbers(ZERO, pack_groups(zero_OG.to(torch.uint8), groups))
    return store_scale(low_OG, groups)


class CodeLinear(KernelLinear, Generic[W]):
    """A layer whose packed weight is a dataclass with the fields of `AffineWeight`, whatever its codes are called."""

    codes: ClassVar[str]  # the field that holds them
    scale: Tensor
    scale_outer: Tensor | None
    low: Tensor | None
    low_outer: Tensor | None
    column_K: Tensor | None
    bias_P: Tensor | None
    _form: W

    def _set(self, weight: W) -> None:
        """Take the weight; the module's first step."""
        KernelLinear.__init__(self, weight.inputs, weight.outputs)
        # Without its tensors: those are buffers, so that copies, state dicts and byte counts see them.
        bare: dict[str, Any] = {self.codes: None, "column_K": None, "bias_P": None}
        bare["scale"] = replace(weight.scale, value=None, outer=None)
        bare["low"] = replace(weight.low, value=None, outer=None)
        self._form = replace(weight, **bare)
        for name, value in (
            (self.codes, getattr(weight, self.codes)),
            ("scale", weight.scale.value),
            ("scale_outer", weight.scale.outer),
            ("low", weight.low.value),
            ("low_outer", weight.low.outer),
            ("column_K", weight.column_K),
            ("bias_P", weight.bias_P),
        ):
            self.register_buffer(name, value)

    @property
    def weight(self) -> W:
        """The packed weight over this module's buffers."""
        full: dict[str, Any] = {name: getattr(self, name) for name in (self.codes, "column_K", "bias_P")}
        full["scale"] = replace(self._form.scale, value=self.scale, outer=self.scale_outer)
        full["low"] = replace(self._form.low, value=self.low, outer=self.low_outer)
        return replace(self._form, **full)


class AffineLinear(CodeLinear[AffineWeight]):
    """A linear layer of packed codes (GPTQ, arXiv 2210.17323, section 4).

    codes_OI: uint8 [O, I], columns in stored order. scale_OG, low_OG: float32 [O, G], stored as float16 where exact,
    else float32; lows that are multiples of the scale as one number or uint8. bits: 2, 3, 4, 5, 6 or 8.
    group_size: columns per group, in stored order; the last group may be shorter. Groups that are no multiple of 16
    are filled up to one (which wastes memory). bias_O: float32 or None. perm_I: stored column i multiplies input
    ``perm_I[i]`` (act_order), None if in order. activations: ``"float32"`` (never rounded), ``"int16"`` or ``"int8"``
    (rounded on entry; see `hasten.kernels.affine`).
    Raises `UnsupportedError` naming the tensor that does not fit.
    """

    codes = "words"

    def __init__(
        self,
        codes_OI: Tensor,
        scale_OG: Tensor,
        low_OG: Tensor,
        *,
        bits: int,
        group_size: int,
        bias_O: Tensor | None = None,
        perm_I: Tensor | None = None,
        activations: str = "float32",
    ) -> None:
        if codes_OI.dim() != 2 or 0 in codes_OI.shape or codes_OI.dtype is not torch.uint8:
            raise UnsupportedError(
                f"codes must be non-empty uint8 [outputs, inputs], not {codes_OI.dtype} {tuple(codes_OI.shape)}"
            )
        outputs, inputs = codes_OI.shape
        if group_size < 1:
            raise UnsupportedError(f"group_size = {group_size}: a group holds at least one column")
        group_size = min(group_size, inputs)
        shape = (outputs, -(-inputs // group_size))
        for name, value in (("scale", scale_OG), ("low", low_OG)):
            if tuple(value.shape) != shape or value.dtype is not torch.float32:
                raise UnsupportedError(
                    f"{name} must be float32 {list(shape)} for {inputs} inputs in groups of {group_size}, not "
                    f"{value.dtype} {list(value.shape)}"
                )
            if not bool(torch.isfinite(value).all()):
                raise UnsupportedError(f"{name} holds NaN or infinity")
        column_K = None if perm_I is None else perm_I.to(torch.int32)
        if column_K is not None and not torch.equal(
            column_K.sort().values, torch.arange(inputs, dtype=torch.int32)
        ):
            raise UnsupportedError(f"perm must be a permutation of the {inputs} inputs")
        # A single group is filled up to whole chunks, several to the half chunks at which groups may begin.
        unit = HALF if shape[1] > 1 else CHUNK
        size = -(-group_size // unit) * unit
        if shape[1] > 1 and size != group_size:
            column_K = torch.arange(inputs, dtype=torch.int32) if column_K is None else column_K
            rest, gap = -inputs % group_size, size - group_size
            column_K = pad(
                pad(column_K, (0, rest), value=-1).view(-1, group_size), (0, gap), value=-1
            ).flatten()
            codes_OI = pad(pad(codes_OI, (0, rest)).view(outputs, -1, group_size), (0, gap)).flatten(1)
        groups = group_count(codes_OI.shape[1], size)
        if not has_activations(activations, bits, size):
            raise UnsupportedError(
                f"no kernel multiplies {activations} activations by {bits} bits in groups of {group_size}"
            )
        try:
            words = pack_codes(codes_OI, bits)
        except ValueError as error:
            raise UnsupportedError(str(error)) from None
        self._set(
            AffineWeight(
                inputs,
                outputs,
                bits,
                size,
                words,
                store_scale(scale_OG, groups),
                store_low(low_OG, scale_OG, groups),
                column_K=None if column_K is None else column_K.contiguous(),
                bias_P=None if bias_O is None else pad_rows(bias_O.detach().float()).flatten(),
                activations=activations,
            )
        )

    @classmethod
    def from_weight(cls, weight: AffineWeight) -> AffineLinear:
        """The layer of a weight that is packed already."""
        layer = cls.__new__(cls)
        layer._set(weight)
        return layer

    def make_kernel(self) -> Packed:
        return affine(self.weight)

    def dequantize(self) -> Tensor:
        """The exact float32 weight [O, I], inputs in their own order."""
        return dequantize(self.weight)

    def extra_repr(self) -> str:
        form = self._form
        return (
            f"{self.inputs} -> {self.outputs}, {form.bits} bits, groups of {form.group_size}, "
            f"{form.activations} activations"
        )


def round_to_nearest(
    weight_OI: Tensor, bits: int, group_size: int, grid: str = "asymmetric"
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain rounding: (codes uint8 [O, I], scale_OG, low_OG float32) of a float32 weight.

    grid: ``"asymmetric"`` (min-max with zero, integer zero point), ``"symmetric"`` ([-m, m], zero at 2^(bits-1)),
    ``"float-min"`` (min-max with a real-valued minimum, as GGUF's Q4_1). Scales (and minima) are rounded to float16
    before codes are chosen. Steps as in GPTQ (arXiv 2210.17323), "Quantization setup". Raises `SettingError` for
    bits, group_size or grid that do not exist, `UnsupportedError` for weights that float16 scales cannot hold.
    """
    if bits not in BITS:
        raise SettingError(f"bits = {bits}: choose one of {', '.join(map(str, BITS))}")
    if grid not in GRIDS:
        raise SettingError(f"grid = {grid!r}: choose one of {', '.join(GRIDS)}")
    if group_size < 1:
        raise SettingError(f"group_size = {group_size}: must be positive")
    inputs = weight_OI.shape[1]
    group_size = min(group_size, inputs)
    top = (1 << bits) - 1
    # Filling up a short last group with its own last column changes neither its minimum nor its maximum.
    rest = -inputs % group_size
    w_OI = torch.cat([weight_OI, weight_OI[:, -1:].expand(-1, rest)], dim=1) if rest else weight_OI
    w_OGK = w_OI.float().unflatten(1, (-1, group_size))
    low_OG, high_OG = w_OGK.amin(-1), w_OGK.amax(-1)
    if grid != "float-min":
        low_OG, high_OG = low_OG.clamp_max(0), high_OG.clamp_min(0)
    if grid == "symmetric":
        high_OG = torch.maximum(high_OG, -low_OG)
        low_OG = -high_OG
    scale_OG = ((high_OG - low_OG) / top).to(torch.float16).float()
    if not bool(torch.isfinite(scale_OG).all()):
        raise UnsupportedError("weights are NaN, infinite or too large for float16 scales (65504)")
    # A group of equal weights (or of differences below float16's smallest number) needs any positive step.
    scale_OG = scale_OG.clamp_min(2.0**-24)
    if grid == "float-min":
        low_OG = low_OG.to(torch.float16).float()
        if not bool(torch.isfinite(low_OG).all()):
            raise UnsupportedError("weights are too large for float16 minima (65504)")
        codes = ((w_OGK - low_OG[..., None]) / scale_OG[..., None]).round_()
    else:
        zero = 1 << (bits - 1)
        zero_OG = torch.full_like(scale_OG, zero) if grid == "symmetric" else (-low_OG / scale_OG).round_()
        zero_OG.clamp_(0, top)
        low_OG = zero_OG * -scale_OG
        codes = (w_OGK / scale_OG[..., None]).round_() + zero_OG[..., None]
    return codes.clamp_(0, top).to(torch.uint8).flatten(1)[:, :inputs].contiguous(), scale_OG, low_OG


class AffineFormat(WeightFormat):
    """Every linear layer rounded to nearest: ``bits`` per weight, one scale per ``group_size`` inputs (None: per row).

    grid: see `round_to_nearest`. head_bits: of the LM head, None to treat it like the others. activations: see
    `AffineLinear`; a head of other bits that cannot meet them gets the next finer ones.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int | None = 64,
        grid: str = "asymmetric",
        head_bits: int | None = 8,
        activations: str = "float32",
    ) -> None:
        for name, value in (("bits", bits), ("head_bits", head_bits)):
            if value not in BITS and (name == "bits" or value is not None):
                raise SettingError(f"{name} = {value}: choose one of {', '.join(map(str, BITS))}")
        if group_size is not None and group_size < 1:
            raise SettingError(f"group_size = {group_size}: must be positive, or None for one group per row")
        if grid not in GRIDS:
            raise SettingError(f"grid = {grid!r}: choose one of {', '.join(GRIDS)}")
        check_activations(activations)
        if not has_activations(activations, bits, group_size or CHUNK):
            raise SettingError(
                f"activations = {activations!r} do not go with {bits} bits in groups of {group_size}; choose float32"
            )
        self.bits, self.group_size, self.grid, self.head_bits = bits, group_size, grid, head_bits
        self.activations = activations

    def pack(self, source: LinearSource) -> AffineLinear:
        """Round the exact weight of ``source`` to the grid."""
        bits = self.head_bits if source.name == "lm_head" and self.head_bits is not None else self.bits
        size = source.inputs if self.group_size is None else self.group_size
        codes_OI, scale_OG, low_OG = round_to_nearest(source.dense(), bits, size, self.grid)
        return AffineLinear(
            codes_OI,
            scale_OG,
            low_OG,
            bits=bits,
            group_size=size,
            bias_O=source.bias_O,
            activations=self.activations
            if bits == self.bits
            else finest_activations(self.activations, bits, size),
        )
