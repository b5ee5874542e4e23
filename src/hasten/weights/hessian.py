"""Second-order statistics of a linear layer's inputs, and the factor that GPTQ sweeps with.

For inputs x the layer-wise error of replacing W by Q is ||(W - Q) X||^2 = n/2 tr((W - Q) H (W - Q)^T) with
H = (2 / n) X X^T. Every method that trades one weight's rounding error against another's (GPTQ and what builds
on it) needs H, and all linears that share an input share it. Source: GPTQ (arXiv 2210.17323), sections 3.1-3.3.

Legend: T rows (tokens), I inputs, O outputs, K inputs of a panel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.core.errors import IntegrityError, SettingError, UnsupportedError

CHUNK_ROWS = 4096  # rows multiplied at once; bounds the temporaries, not the result
PANEL = 192  # rows of H updated by one matrix product
MAX_RETRIES = 4  # dampening 0.01 -> 0.1 -> 1 -> 10 -> 100 times the mean diagonal


class Hessian:
    """H = (2 / n) sum x x^T as a float32 running mean, [I, I].

    ``update`` may be called any number of times with any number of rows; the result depends on the rows only
    (up to rounding), not on how they were cut into calls.
    """

    def __init__(self, inputs: int) -> None:
        if inputs < 1:
            raise SettingError(f"a Hessian needs at least one input, not {inputs}")
        self.rows = 0
        self._upper_II = torch.zeros(
            inputs, inputs, dtype=torch.float32
        )  # below the panels' diagonal: not kept up

    @property
    def matrix_II(self) -> Tensor:
        """H, symmetric to the bit."""
        upper_II = self._upper_II.triu()
        return upper_II + upper_II.triu(1).t()

    def update(self, x_TI: Tensor) -> None:
        """Add rows [..., I] of any float dtype. Raises `IntegrityError` on NaN or infinity."""
        inputs = self._upper_II.shape[0]
        if x_TI.shape[-1] != inputs:
            raise UnsupportedError(
                f"activations of width {x_TI.shape[-1]} do not fit a layer of {inputs} inputs"
            )
        x_TI = x_TI.detach().reshape(-1, inputs)
        for part_TI in x_TI.split(CHUNK_ROWS):
            self._add(part_TI.to(torch.float32))

    def _add(self, x_TI: Tensor) -> None:
        added = x_TI.shape[0]
        if added == 0:
            return
        total = self.rows + added
        beta, alpha = self.rows / total, 2.0 / total
        for start in range(
            0, x_TI.shape[1], PANEL
        ):  # the upper triangle alone: little more than half the work
            panel_TK = x_TI[:, start : start + PANEL]
            self._upper_II[start : start + PANEL, start:].addmm_(
                panel_TK.t(), x_TI[:, start:], beta=beta, alpha=alpha
            )
        # One bad activation poisons a whole row and column, so the diagonal shows it.
        if not torch.isfinite(self._upper_II.diagonal()).all():
            raise IntegrityError(
                "calibration activations hold NaN or infinity; check the model's weights and the calibration text"
            )
        self.rows = total

    def require_rows(self) -> None:
        """Raise `SettingError` when nothing was observed."""
        if self.rows == 0:
            raise SettingError("no calibration activations were seen; calibration data must not be empty")


def quadratic(d_OI: Tensor, hessian_II: Tensor) -> float:
    """tr(D H D^T), accumulated in float64: twice the mean over rows of x of ||D x||^2."""
    return float(((d_OI @ hessian_II) * d_OI).sum(dtype=torch.float64))


@dataclass(frozen=True)
class Factor:
    """upper_II: float64 U with (H + damping I)^-1 = U^T U. damping: what was added to the diagonal.

    dead_I: inputs that are always zero; their weights cannot matter and must be set to zero.
    percdamp: the fraction of the mean diagonal that finally worked.
    """

    upper_II: Tensor
    dead_I: Tensor
    damping: float
    percdamp: float


def inverse_factor(hessian_II: Tensor, percdamp: float = 0.01, max_retries: int = MAX_RETRIES) -> Factor:
    """The upper Cholesky factor U of the inverse of the damped Hessian (GPTQ section 3.3, steps 2 and 3).

    With J the reversal of rows, J H J = L L^T gives H = R R^T for the upper triangular R = J L J; then
    H^-1 = R^-T R^-1, so U = R^-1. That is the factor the paper defines, without ever forming the inverse.
    Done in float64. Dampening starts at ``percdamp`` times the mean diagonal and grows
    tenfold whenever the factorisation fails; after ``max_retries`` increases `UnsupportedError` is raised
    (never a silent fall-back to rounding). Raises `IntegrityError` on NaN or infinity.
    """
    inputs = hessian_II.shape[0]
    if hessian_II.shape != (inputs, inputs):
        raise UnsupportedError(f"a Hessian must be square, not {tuple(hessian_II.shape)}")
    if percdamp < 0:
        raise SettingError(f"percdamp must be >= 0, not {percdamp}")
    if not torch.isfinite(hessian_II).all():
        raise IntegrityError("the Hessian holds NaN or infinity; check the calibration activations")
    h_II = hessian_II.to(torch.float64).clone()
    diagonal_I = h_II.diagonal()
    dead_I = diagonal_I == 0
    diagonal_I[dead_I] = 1.0
    mean = float(diagonal_I.mean())
    fraction = percdamp
    for _ in range(max_retries + 1):
        damped_II = h_II.clone()
        damped_II.diagonal().add_(fraction * mean)
        lower_II, info = torch.linalg.cholesky_ex(damped_II.flip(0, 1))
        if int(info) == 0:
            reverse_II = lower_II.flip(0, 1).contiguous()
            eye_II = torch.eye(inputs, dtype=torch.float64)
            upper_II = torch.linalg.solve_triangular(reverse_II, eye_II, upper=True)
            if torch.isfinite(upper_II).all() and bool((upper_II.diagonal() > 0).all()):
                return Factor(upper_II, dead_I, fraction * mean, fraction)
        fraction = fraction * 10 if fraction > 0 else 0.01
    raise UnsupportedError(
        f"the {inputs}x{inputs} Hessian cannot be factorised even with dampening {fraction / 10:g} of its mean "
        "diagonal; use more or more varied calibration samples, or raise percdamp"
    )
