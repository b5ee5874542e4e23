"""The grids that GPTQ rounds to: uniform with an integer zero point, and ternary.

A grid is fitted on a [K, O] slice (K columns of one group, O output rows side by side, so that one sweep step
touches contiguous memory) and gives two parameters per output row. Scales are rounded to float16
*before* use: the codes are then optimal for the very scale that is stored, and every stored weight is exact.
Source: GPTQ (arXiv 2210.17323) section 4 "Quantization setup", and sections on extreme quantization.

Legend: K columns, O outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.core.errors import IntegrityError, SettingError, UnsupportedError

TERNARY = "ternary"
BITS = (2, 3, 4, 8)
SHRINKS = 80  # candidates of the MSE search: ranges of 1.00, 0.99, ... 0.21 of min-max
CLIPS = 76  # of the search that weighs errors: ranges of 1.00 ... 0.25 (MARLIN)
NORM = 2.4  # exponent of the error it minimises
SMALLEST_SCALE = 2.0**-24  # the smallest positive float16


class Grid(ABC):
    """The values a weight may take, given per-row parameters ``a_O`` and ``b_O``."""

    code_bits: int

    @abstractmethod
    def fit(self, w_KO: Tensor) -> tuple[Tensor, Tensor]:
        """Parameters (a_O, b_O) for the columns of one group, in the dtype of ``w_KO``."""

    @abstractmethod
    def encode(self, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Codes (small integers in the dtype of ``w``) of the nearest grid values; broadcasts."""

    @abstractmethod
    def decode(self, codes: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """The weights that ``codes`` stand for; exact in float32 and float64; broadcasts."""


def half(scale: Tensor) -> Tensor:
    """``scale`` rounded to a positive float16, in its own dtype. Raises on what float16 cannot hold."""
    if not torch.isfinite(scale).all():
        raise IntegrityError("the weights hold NaN or infinity; the checkpoint is damaged")
    rounded = scale.to(torch.float16).to(scale.dtype)
    if torch.isinf(rounded).any():
        raise UnsupportedError(
            f"a group of weights spans {float(scale.max()):g} per step; float16 scales end at 65504"
        )
    return rounded.clamp_min(SMALLEST_SCALE)


@dataclass(frozen=True)
class UniformGrid(Grid):
    """scale * (code - zero), code in [0, 2^bits), integer zero in the same range; a = scale, b = zero.

    Asymmetric: min-max of the row, always including zero. Symmetric: [-m, m] with zero = 2^(bits-1).
    mse: search the shrink p in {1 - i/100} that minimises sum |w - q|^2.4 per row.

    ``fit`` with ``upper_KK``, the block of the sweep's factor that belongs to the group, searches the shrink that
    minimises || (w - q) U^-1 ||^2 instead: what the group adds to the layer's error once every later column has
    compensated as well as it can, as (U^T U)^-1 is the Hessian that is left for the group then. Source: MARLIN
    (arXiv 2408.11743), section 5.1.
    """

    bits: int
    symmetric: bool = False
    mse: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise SettingError(
                f"gptq.bits = {self.bits!r}: choose one of {', '.join(map(str, BITS))} or {TERNARY!r}"
            )

    @property
    def code_bits(self) -> int:  # type: ignore[override]
        return self.bits

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def fit(self, w_KO: Tensor, upper_KK: Tensor | None = None) -> tuple[Tensor, Tensor]:
        low_O, high_O = torch.aminmax(w_KO, dim=0)
        low_O, high_O = low_O.clamp_max(0), high_O.clamp_min(0)
        if self.symmetric:
            high_O = torch.maximum(high_O, -low_O)
            low_O = -high_O
        empty_O = high_O == low_O  # an all-zero group: any positive scale represents it exactly
        low_O, high_O = torch.where(empty_O, -1.0, low_O), torch.where(empty_O, 1.0, high_O)
        scale_O, zero_O = self._parameters(low_O, high_O)
        if not self.mse and upper_KK is None:
            return scale_O, zero_O
        weigh_KK = None
        if upper_KK is not None:
            # Solved once for all candidates. The search needs no more than float32: neighbours differ by a hundredth.
            eye_KK = torch.eye(upper_KK.shape[0], dtype=upper_KK.dtype)
            weigh_KK = torch.linalg.solve_triangular(upper_KK, eye_KK, upper=True).t().float().contiguous()
            w_KO = w_KO.float()
        best_O = self._error(w_KO, scale_O, zero_O, weigh_KK)
        for step in range(1, SHRINKS if weigh_KK is None else CLIPS):
            shrink = 1 - step / 100
            a_O, b_O = self._parameters(low_O * shrink, high_O * shrink)
            error_O = self._error(w_KO, a_O, b_O, weigh_KK)
            better_O = error_O < best_O
            best_O = torch.where(better_O, error_O, best_O)
            scale_O, zero_O = torch.where(better_O, a_O, scale_O), torch.where(better_O, b_O, zero_O)
        return scale_O, zero_O

    def _parameters(self, low_O: Tensor, high_O: Tensor) -> tuple[Tensor, Tensor]:
        scale_O = half((high_O - low_O) / self.top)
        if self.symmetric:
            return scale_O, torch.full_like(scale_O, float(1 << (self.bits - 1)))
        return scale_O, torch.round(-low_O / scale_O).clamp_(0, self.top)

    def _error(self, w_KO: Tensor, scale_O: Tensor, zero_O: Tensor, weigh_KK: Tensor | None) -> Tensor:
        """sum |w - q|^2.4 per row, or || weigh (w - q) ||^2."""
        scale_O, zero_O = scale_O.to(w_KO.dtype), zero_O.to(w_KO.dtype)
        difference_KO = self.decode(self.encode(w_KO, scale_O, zero_O), scale_O, zero_O).sub_(w_KO)
        if weigh_KK is None:
            return difference_KO.abs_().pow_(NORM).sum(dim=0)
        return (weigh_KK @ difference_KO).square_().sum(dim=0)

    def encode(self, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (w / a).round_().add_(b).clamp_(0, self.top)

    def decode(self, codes: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (codes - b) * a


@dataclass(frozen=True)
class TernaryGrid(Grid):
    """{min, 0, max}: max above max/2, min below min/2, else 0; a = max >= 0, b = min <= 0, both float16.

    Codes are 0 (zero), 1 (max), 2 (min), two bits each. Meant for tiny groups (8 in the paper).
    """

    code_bits: int = 2

    def fit(self, w_KO: Tensor) -> tuple[Tensor, Tensor]:
        low_O, high_O = torch.aminmax(w_KO, dim=0)
        return half(high_O.clamp_min(0)), -half(low_O.clamp_max(0).neg())

    def encode(self, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (w > a / 2).to(w.dtype) + (w < b / 2).to(w.dtype) * 2

    def decode(self, codes: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.where(codes == 1, a, 0.0) + torch.where(codes == 2, b, 0.0)


def make_grid(bits: int | str, symmetric: bool, mse: bool) -> Grid:
    """The grid that settings name. Raises `SettingError` for a combination that does not exist."""
    if bits == TERNARY:
        if mse:
            raise SettingError("gptq: the ternary grid has no MSE search; set mse = false")
        return TernaryGrid()
    return UniformGrid(int(bits), symmetric, mse)
