"""What QUIK decides of one linear before it is packed: its outlier features, and codes for the others.

Outlier features are those with the largest magnitude that calibration saw; they are chosen once. The GPTQ sweep visits
them last: it leaves them unrounded, but moves the errors of all other columns into them. The others get one symmetric
scale per output, because groups would break the integer sum.
Source: QUIK (Ashkboos et al., arXiv 2310.09259), sections 3.1 and 3.2.

Legend: T rows, I inputs, O outputs, K base features, F outlier features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hasten.core.errors import SettingError, UnsupportedError
from hasten.kernels.quik import base_features
from hasten.weights.gptq_grid import UniformGrid, half
from hasten.weights.gptq_sweep import QuantizedWeight, SweepReport, partial_sweep, round_to_nearest
from hasten.weights.hessian import Hessian, inverse_factor, quadratic


@dataclass(frozen=True)
class SignedGrid(UniformGrid):
    """scale * q with q in [-2^(bits-1), 2^(bits-1)), scale = max |w| / (2^(bits-1) - 1), stored as code q + 2^(bits-1).

    One step finer at the negative end than ``UniformGrid(symmetric=True)``, whose largest code is half a step further.
    mse: the range is searched, as there (QUIK: shrunk by i / 100, i < 80, for the least sum of |q - w|^2.4).
    """

    symmetric: bool = True

    def fit(self, w_KO: Tensor, upper_KK: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `UniformGrid.fit`; the search's errors are float32, which takes a fraction of the time."""
        scale_O, zero_O = super().fit(w_KO.to(torch.float32), upper_KK)
        return scale_O.to(w_KO.dtype), zero_O.to(w_KO.dtype)

    def _parameters(self, low_O: Tensor, high_O: Tensor) -> tuple[Tensor, Tensor]:
        scale_O = half(high_O / (self.top // 2))
        return scale_O, torch.full_like(scale_O, float(1 << (self.bits - 1)))


class OutlierStatistic(Hessian):
    """The Hessian of a linear's inputs, and the largest magnitude of every feature."""

    def __init__(self, inputs: int) -> None:
        super().__init__(inputs)
        self.largest_I = torch.zeros(inputs)

    def update(self, x_TI: Tensor) -> None:
        """Add rows [..., I]. Raises as `Hessian.update`."""
        super().update(x_TI)
        if x_TI.numel():
            largest_I = x_TI.detach().reshape(-1, self.largest_I.numel()).abs().amax(0).float()
            torch.maximum(self.largest_I, largest_I, out=self.largest_I)


def outlier_features(largest_I: Tensor, count: int, threshold: float = 0.0) -> Tensor:
    """The ``count`` features of largest magnitude, ascending; none at all if no magnitude reaches ``threshold``.

    Of equal magnitudes the earlier feature counts. ``count`` beyond the number of features takes them all.
    """
    if count < 0:
        raise SettingError(f"quik.outliers = {count}: must not be negative")
    if float(largest_I.max()) < threshold:
        count = 0
    order_I = torch.argsort(largest_I, descending=True, stable=True)
    return order_I[:count].sort().values


@dataclass(frozen=True)
class MixedWeight:
    """codes_OK: uint8, q_w + 2^(bits-1), base features in their order. scale_O: float32 (float16 numbers).

    outlier_F: int64, ascending. outlier_OF: float32 (bfloat16 numbers).
    """

    bits: int
    codes_OK: Tensor
    scale_O: Tensor
    outlier_F: Tensor
    outlier_OF: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        return self.codes_OK.shape[0], self.codes_OK.shape[1] + self.outlier_F.numel()

    def dequantize(self) -> Tensor:
        """The exact float32 weight [O, I]."""
        outputs, inputs = self.shape
        weight_OI = torch.empty(outputs, inputs)
        weight_OI[:, _base(inputs, self.outlier_F)] = (
            self.codes_OK.float() - (1 << (self.bits - 1))
        ) * self.scale_O[:, None]
        weight_OI[:, self.outlier_F] = self.outlier_OF
        return weight_OI


def _mixed(base: QuantizedWeight | None, bits: int, outlier_F: Tensor, outlier_OF: Tensor) -> MixedWeight:
    kept_OF = outlier_OF.to(torch.bfloat16).float()
    if not bool(torch.isfinite(kept_OF).all()):
        raise UnsupportedError("the weights of outlier features do not fit bfloat16")
    if base is None:  # every feature is an outlier
        outputs = outlier_OF.shape[0]
        return MixedWeight(
            bits, torch.empty(outputs, 0, dtype=torch.uint8), torch.ones(outputs), outlier_F, kept_OF
        )
    return MixedWeight(bits, base.codes_OI, base.a_OG[:, 0].contiguous(), outlier_F, kept_OF)


def round_mixed(w_OI: Tensor, outlier_F: Tensor, bits: int, *, mse: bool = True) -> MixedWeight:
    """Plain rounding on the same grid, outliers as they are: what the sweep is compared with."""
    base_K = _base(w_OI.shape[1], outlier_F)
    base = round_to_nearest(w_OI[:, base_K], SignedGrid(bits, mse=mse)) if base_K.numel() else None
    return _mixed(base, bits, outlier_F, w_OI[:, outlier_F])


def _base(inputs: int, outlier_F: Tensor) -> Tensor:
    return base_features(inputs, outlier_F).long()


def relative_error(w_OI: Tensor, weight: MixedWeight, hessian_II: Tensor) -> float:
    """The share of the layer's mean squared output that rounding the weights loses on the calibration data."""
    w_OI = w_OI.to(torch.float32)
    power = quadratic(w_OI, hessian_II) or 1.0
    return quadratic(w_OI - weight.dequantize(), hessian_II) / power


def quantize_mixed(
    w_OI: Tensor,
    hessian_II: Tensor,
    outlier_F: Tensor,
    bits: int,
    *,
    mse: bool = True,
    act_order: bool = False,
    sparse: bool = False,
    percdamp: float = 0.01,
    blocksize: int = 128,
) -> tuple[MixedWeight, SweepReport]:
    """The outlier-aware sweep of a float32 weight [O, I] under the Hessian [I, I] of its inputs.

    outlier_F: ascending features that stay unrounded. act_order: visit base features by falling diag(H) instead of
    left to right. sparse: two of every four neighbouring base weights become 0. Raises as `gptq_sweep.partial_sweep`
    and `inverse_factor`; `UnsupportedError` for sparse with act_order.
    """
    if sparse and act_order:
        raise UnsupportedError(
            "2:4 means neighbouring base features: visit them in order (act_order = false)"
        )
    grid, w_OI = SignedGrid(bits, mse=mse), w_OI.to(torch.float32)
    base_K = _base(w_OI.shape[1], outlier_F)
    if act_order:
        base_K = base_K[torch.argsort(hessian_II.diagonal()[base_K], descending=True, stable=True)]
    loss, percdamp_used, dead = 0.0, percdamp, 0
    if base_K.numel() == 0:
        weight = nearest = round_mixed(w_OI, outlier_F, bits)
    else:
        order_I = torch.cat([base_K, outlier_F])
        factor = inverse_factor(hessian_II[order_I][:, order_I], percdamp)
        base, loss, outlier_OF = partial_sweep(
            w_OI,
            factor,
            grid,
            blocksize=blocksize,
            perm_I=order_I,
            frozen=outlier_F.numel(),
            two_of_four=sparse,
        )
        weight = _mixed(base, bits, outlier_F, outlier_OF)
        # The scales were fitted on the original weights, so plain rounding has the same.
        stored_OK = w_OI[:, base_K.sort().values]
        codes_OK = grid.encode(stored_OK.double(), base.a_OG.double(), base.b_OG.double()).to(torch.uint8)
        nearest = replace(weight, codes_OK=codes_OK, outlier_OF=w_OI[:, outlier_F].to(torch.bfloat16).float())
        percdamp_used, dead = factor.percdamp, int(factor.dead_I.sum())
    return weight, SweepReport(
        loss=loss,
        error=relative_error(w_OI, weight, hessian_II),
        rtn_error=relative_error(w_OI, nearest, hessian_II),
        percdamp=percdamp_used,
        dead=dead,
    )
