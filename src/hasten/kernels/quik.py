"""Linear layers whose weights and inputs are both rounded to 4 or 8 bits, with a few outlier features left as they are.

Source: QUIK (Ashkboos et al., arXiv 2310.09259). Weights: one scale s_n per output, codes q_w in [-half, half).
Inputs: per row, on the base features, s_t = (max - min) / top, z_t = min, q_x = round((x - z_t) / s_t) - half, with
half = 8, top = 15 (4 bits) or half = 128, top = 255 (8 bits). With the outlier features O multiplied in float32 by
bfloat16 weights,

    y = s_t s_n sum(q_x q_w) + (z_t + half s_t) wred_n + sum_O x w + bias,   wred_n = s_n sum(q_w)

The integer sum is exact. Calls of fewer rows than ``min_rows`` are not rounded: the same packed codes then meet float32
inputs. A row with NaN or infinity, or whose range exceeds float32, gives a row of NaN; no row influences another.

Legend: T rows, I inputs, O outputs, K base features, F outlier features, N blocks of 16 outputs, P outputs filled up to
whole blocks, C chunks of 32 base features.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from hasten.kernels.affine import CHUNK, pack_codes, unpack_codes
from hasten.kernels.dense import pack_dense, unpack_dense
from hasten.kernels.native import native
from hasten.kernels.packed import BLOCK, Packed, address, pad_rows

BITS = (4, 8)
FUSIONS = ("none", "quantize", "all")
NEVER = (1 << 31) - 1
"""``min_rows`` of a layer that never rounds its inputs."""
# int32 sums of products of at most 255 * 128 (before half the inputs' sum comes off) end here.
MAX_WIDTH = {4: (1 << 31) // (15 * 8) - CHUNK, 8: (1 << 31) // (255 * 128) - CHUNK}


@dataclass(frozen=True, eq=False)
class QuikWeight:
    """A packed weight.

    words: int32 [N, C, bits, 16] of codes q_w + half, None if every feature is an outlier. scale_P, wred_P: float32.
    base_K, outlier_F: int32, ascending, together all inputs. outlier_NF16: bfloat16, None if F = 0. bias_P: float32.
    """

    inputs: int
    outputs: int
    bits: int
    words: Tensor | None
    scale_P: Tensor
    wred_P: Tensor
    base_K: Tensor
    outlier_F: Tensor
    outlier_NF16: Tensor | None
    bias_P: Tensor | None = None
    min_rows: int = 1


def pack_quik(
    codes_OK: Tensor,
    scale_O: Tensor,
    outlier_F: Tensor,
    outlier_OF: Tensor,
    *,
    bits: int,
    bias_O: Tensor | None = None,
    min_rows: int = 1,
) -> QuikWeight:
    """Pack codes uint8 [O, K] (q_w + half) of the features not in ``outlier_F``, in their order.

    scale_O: float32. outlier_F: ascending feature numbers, outlier_OF: float weights of those, stored as bfloat16.
    Raises `TypeError` or `ValueError` naming the argument that does not fit.
    """
    if bits not in BITS:
        raise ValueError(f"bits = {bits}: choose 4 or 8")
    if codes_OK.dtype is not torch.uint8:
        raise TypeError(f"codes must be uint8, not {codes_OK.dtype}")
    if codes_OK.dim() != 2 or codes_OK.shape[0] == 0:
        raise ValueError(f"codes must be [outputs, base features], not {tuple(codes_OK.shape)}")
    outputs, width = codes_OK.shape
    count = outlier_F.numel()
    inputs = width + count
    if inputs == 0 or width > MAX_WIDTH[bits]:
        raise ValueError(f"{width} base features: int32 sums of {bits} bit products hold {MAX_WIDTH[bits]}")
    if outlier_OF.shape != (outputs, count):
        raise ValueError(f"outlier weights must be {[outputs, count]}, not {list(outlier_OF.shape)}")
    if scale_O.shape != (outputs,) or scale_O.dtype is not torch.float32:
        raise ValueError(f"scale must be float32 [{outputs}], not {scale_O.dtype} {list(scale_O.shape)}")
    if not bool(torch.isfinite(scale_O).all()):
        raise ValueError("scale holds NaN or infinity")
    outlier_F = outlier_F.to(torch.int32)
    if count and (
        int(outlier_F[0]) < 0 or int(outlier_F[-1]) >= inputs or not bool((outlier_F.diff() > 0).all())
    ):
        raise ValueError(f"outlier features must ascend within [0, {inputs})")
    if bias_O is not None and bias_O.shape != (outputs,):
        raise ValueError(f"bias must be [{outputs}], not {list(bias_O.shape)}")
    half = 1 << (bits - 1)
    # float64: of up to 65535 codes the sum is exact, and so is rounded once.
    wred_O = (scale_O.double() * (codes_OK.double().sum(1) - half * width)).float()
    return QuikWeight(
        inputs,
        outputs,
        bits,
        pack_codes(codes_OK, bits) if width else None,
        pad_rows(scale_O).flatten(),
        pad_rows(wred_O).flatten(),
        base_features(inputs, outlier_F),
        outlier_F.contiguous(),
        pack_dense(outlier_OF.to(torch.bfloat16)) if count else None,
        None if bias_O is None else pad_rows(bias_O.detach().float()).flatten(),
        min_rows,
    )


def base_features(inputs: int, outlier_F: Tensor) -> Tensor:
    """The features that are not outliers, int32, ascending."""
    base_I = torch.ones(inputs, dtype=torch.bool)
    base_I[outlier_F.long()] = False
    return base_I.nonzero().flatten().to(torch.int32)


def codes(weight: QuikWeight) -> Tensor:
    """q_w as int16 [O, K]."""
    if weight.words is None:
        return torch.empty(weight.outputs, 0, dtype=torch.int16)
    unsigned_OK = unpack_codes(weight.words, weight.outputs, weight.base_K.numel())
    return unsigned_OK.to(torch.int16) - (1 << (weight.bits - 1))


def outlier_weight(weight: QuikWeight) -> Tensor:
    """The outliers' weights, float32 [O, F]."""
    if weight.outlier_NF16 is None:
        return torch.empty(weight.outputs, 0)
    return unpack_dense(weight.outlier_NF16, weight.outputs).float()


def dequantize(weight: QuikWeight) -> Tensor:
    """The exact float32 weight [O, I], inputs in their own order."""
    weight_OI = torch.empty(weight.outputs, weight.inputs)
    weight_OI[:, weight.base_K.long()] = codes(weight).float() * weight.scale_P[: weight.outputs, None]
    weight_OI[:, weight.outlier_F.long()] = outlier_weight(weight)
    return weight_OI


def quik(weight: QuikWeight, *, module: ModuleType | None = None) -> Packed:
    """The layer of a packed weight.

    module: a native module of another level than the best (tests). Raises `TypeError` or `ValueError` naming the
    tensor that does not fit the others.
    """
    inputs, outputs, bits = weight.inputs, weight.outputs, weight.bits
    if bits not in BITS:
        raise ValueError(f"bits = {bits}: choose 4 or 8")
    if not 1 <= weight.min_rows <= NEVER:
        raise ValueError(f"min_rows = {weight.min_rows}: must be positive and at most {NEVER}")
    width, count = weight.base_K.numel(), weight.outlier_F.numel()
    features = torch.cat([weight.base_K, weight.outlier_F]).sort().values
    if not torch.equal(features.long(), torch.arange(inputs)) or not bool((weight.base_K.diff() > 0).all()):
        raise ValueError(f"base and outlier features must be the {inputs} inputs, base features ascending")
    if (weight.words is None) != (width == 0) or (weight.outlier_NF16 is None) != (count == 0):
        raise ValueError("words or outlier weights are missing, or there without features")
    blocks = -(-outputs // BLOCK)
    lib = native() if module is None else module
    handle = lib.packed_quik(
        inputs,
        outputs,
        bits,
        width,
        count,
        weight.min_rows,
        address("words", weight.words, (blocks, -(-width // CHUNK), bits, BLOCK), torch.int32),
        address("scale", weight.scale_P, (blocks * BLOCK,), torch.float32),
        address("wred", weight.wred_P, (blocks * BLOCK,), torch.float32),
        address("base features", weight.base_K, (width,), torch.int32),
        address("outlier features", weight.outlier_F, (count,), torch.int32),
        address("outlier weights", weight.outlier_NF16, (blocks, count, BLOCK), torch.bfloat16),
        address("bias", weight.bias_P, (blocks * BLOCK,), torch.float32),
    )
    return Packed(lib, handle, inputs, outputs, (weight,))


def forward_stages(layer: Packed, x_TI: Tensor, fusion: str = "all") -> Tensor:
    """The integer product whatever the row count, with its stages fused as asked: same result, other time.

    fusion: ``"none"`` (split, range, codes, outlier product, integer product and rescaling are passes of their own,
    each result through memory), ``"quantize"`` (the first three in one pass) or ``"all"`` (what a layer runs).
    Raises `ValueError` for another fusion, a wrong shape or a layer that is not of this kind, `TypeError` for a dtype.
    """
    if fusion not in FUSIONS:
        raise ValueError(f"fusion = {fusion!r}: choose {', '.join(FUSIONS)}")
    x_TI = _rows(layer, x_TI)
    y_TO = torch.empty(x_TI.shape[0], layer.outputs)
    layer.module.quik_forward(
        layer.handle, x_TI.data_ptr(), x_TI.shape[0], y_TO.data_ptr(), FUSIONS.index(fusion)
    )
    return y_TO


def quantize_rows(layer: Packed, x_TI: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stage (a) alone: codes q_x int8 [T, K], s_T and z_T float32, outliers float32 [T, F].

    Raises as `forward_stages`.
    """
    x_TI = _rows(layer, x_TI)
    weight: QuikWeight = layer.keep[0]
    rows = x_TI.shape[0]
    codes_TK = torch.empty(rows, weight.base_K.numel(), dtype=torch.int8)
    scale_T, zero_T = torch.empty(rows), torch.empty(rows)
    outlier_TF = torch.empty(rows, weight.outlier_F.numel())
    layer.module.quik_quantize(
        layer.handle,
        x_TI.data_ptr(),
        rows,
        codes_TK.data_ptr(),
        scale_T.data_ptr(),
        zero_T.data_ptr(),
        outlier_TF.data_ptr(),
    )
    return codes_TK, scale_T, zero_T, outlier_TF


def _rows(layer: Packed, x_TI: Tensor) -> Tensor:
    if x_TI.dtype is not torch.float32:
        raise TypeError(f"x must be float32, not {x_TI.dtype}")
    if x_TI.dim() != 2 or x_TI.shape[1] != layer.inputs:
        raise ValueError(f"x has shape {tuple(x_TI.shape)}; the layer takes [rows, {layer.inputs}]")
    return x_TI.contiguous()


def quantizations(*, module: ModuleType | None = None) -> int:
    """How often inputs have been rounded in this process: once per call of a layer with ``min_rows`` rows or more."""
    return int((native() if module is None else module).quik_quantizations())
