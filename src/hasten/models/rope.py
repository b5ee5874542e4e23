"""Rotary position embedding (Su et al., RoFormer, section 3.2) with the scalings that published checkpoints use.

A pair of dimensions (i, i + D/2) of a head (the half-split layout of Hugging Face checkpoints) is turned by the angle
``position * frequency_i``. The scalings change the frequencies:

- ``linear``: divided by ``factor`` (position interpolation, Chen et al. 2023).
- ``dynamic``: the base grows with the sequence beyond the trained length (NTK-aware scaling).
- ``llama3``: low frequencies divided by ``factor``, a smooth ramp to the untouched high ones (Llama 3.1).
- ``yarn``: the same idea with the ramp placed by rotation counts, and cos/sin scaled (Peng et al., YaRN, section 3).
- ``factors``: divided one by one by a list the checkpoint gives (GGUF's ``rope_freqs.weight``).

Legend: T rows (tokens of any sequences), H heads, D head size, R rotated dimensions, F = R / 2 frequencies.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hasten.core.errors import ModelError, UnsupportedError
from hasten.models.config import RopeSpec

SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn", "factors")


def scaling_kind(scaling: dict[str, Any] | None) -> str:
    """The scaling's name as checkpoints spell it (``rope_type``, older ones ``type``)."""
    if not scaling:
        return "default"
    kind = str(scaling.get("rope_type", scaling.get("type", "default")))
    if kind not in SCALINGS:
        raise UnsupportedError(f"RoPE scaling {kind!r} is not supported (supported: {', '.join(SCALINGS)})")
    return kind


def base_frequencies(theta: float, size: int) -> Tensor:
    """Unscaled frequencies theta^(-2i/R), float32 [F]."""
    return 1.0 / (theta ** (torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size))


def scaled_frequencies(spec: RopeSpec, max_positions: int) -> tuple[Tensor, float]:
    """Frequencies float32 [F] and the factor on cos and sin, of every scaling that does not depend on the length."""
    freq_F = base_frequencies(spec.theta, spec.size)
    scaling = spec.scaling or {}
    match scaling_kind(spec.scaling):
        case "linear":
            return freq_F / _number(scaling, "factor"), 1.0
        case "llama3":
            return _llama3(freq_F, scaling, max_positions), 1.0
        case "yarn":
            return _yarn(spec, scaling, max_positions)
        case "factors":
            factors_F = torch.tensor(scaling["factors"], dtype=torch.float32, device="cpu")
            if factors_F.shape != freq_F.shape:
                raise ModelError(f"{factors_F.numel()} RoPE factors for {freq_F.numel()} frequencies")
            return freq_F / factors_F, 1.0
        case _:
            return freq_F, 1.0


def _number(scaling: dict[str, Any], key: str, default: float | None = None) -> float:
    value = scaling.get(key)
    if value is None:
        value = default
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ModelError(f"RoPE scaling needs a finite number {key!r}, got {value!r}")
    return float(value)


def _llama3(freq_F: Tensor, scaling: dict[str, Any], max_positions: int) -> Tensor:
    factor = _number(scaling, "factor")
    low, high = _number(scaling, "low_freq_factor"), _number(scaling, "high_freq_factor")
    trained = _number(scaling, "original_max_position_embeddings", max_positions)
    # Rotations within the trained context decide: fewer than `low` are interpolated, more than `high` kept.
    rotations_F = trained * freq_F / (2 * math.pi)
    ramp_F = ((rotations_F - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - ramp_F) * freq_F / factor + ramp_F * freq_F


def _yarn(spec: RopeSpec, scaling: dict[str, Any], max_positions: int) -> tuple[Tensor, float]:
    trained = _number(scaling, "original_max_position_embeddings", max_positions)
    factor = _number(scaling, "factor", max_positions / trained)

    def temperature(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = scaling.get("attention_factor")
    if attention is None:
        mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention = (
            temperature(mscale) / temperature(mscale_all) if mscale and mscale_all else temperature(1.0)
        )

    def dimension(rotations: float) -> float:
        """The (fractional) dimension pair that turns ``rotations`` times within the trained context."""
        return spec.size * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(spec.theta))

    low = dimension(scaling.get("beta_fast") or 32.0)
    high = dimension(scaling.get("beta_slow") or 1.0)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.size - 1)
    if low == high:
        high += 0.001
    freq_F = base_frequencies(spec.theta, spec.size)
    ramp_F = ((torch.arange(spec.size // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(
        0.0, 1.0
    )
    return freq_F / factor * ramp_F + freq_F * (1 - ramp_F), float(attention)


class Rope:
    """Cos and sin tables of one `RopeSpec`; shared by the layers that use it. Safe to share between threads.

    ``max_positions``: the context the model was trained for (scalings need it).
    Raises `UnsupportedError` for an unknown scaling, `ModelError` for a scaling with missing or non-finite numbers.
    """

    def __init__(self, spec: RopeSpec, max_positions: int) -> None:
        if spec.size < 2 or spec.size % 2:
            raise ModelError(f"RoPE needs an even number of rotated dimensions, got {spec.size}")
        self.spec = spec
        self.max_positions = max_positions
        self.dynamic = scaling_kind(spec.scaling) == "dynamic"
        self.freq_F, self.attention_factor = scaled_frequencies(spec, max_positions)
        if self.dynamic:
            self.factor = _number(spec.scaling or {}, "factor")
        self._tables: tuple[Tensor, Tensor] | None = None

    def rotate(self, x_THD: Tensor, position_T: Tensor, length_T: Tensor | None = None) -> Tensor:
        """Turn queries or keys to their positions; same shape and dtype. Dimensions beyond R pass through."""
        cos_TR, sin_TR = self.tables(position_T, length_T)
        return apply_rotation(x_THD, cos_TR, sin_TR)

    def tables(self, position_T: Tensor, length_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cos and sin, float32 [T, R], both halves filled, ``attention_factor`` included.

        ``length_T`` matters to ``dynamic`` scaling only: the length of each row's sequence, by default the highest
        position plus one for all rows (right when the rows belong to one sequence).
        """
        if self.dynamic:
            return self._dynamic_tables(position_T, length_T)
        tables = self.whole(int(position_T.max()) + 1 if position_T.numel() else 0)
        return tables[0][position_T], tables[1][position_T]

    def whole(self, positions: int) -> tuple[Tensor, Tensor]:
        """Cos and sin of at least the first ``positions`` positions, float32 [N, R]; not for ``dynamic`` scaling."""
        tables = self._tables
        if tables is None or tables[0].shape[0] < positions:
            rows = max(256, 1 << (positions - 1).bit_length())
            tables = self._cos_sin(torch.arange(rows, dtype=torch.float32)[:, None] * self.freq_F)
            self._tables = tables  # one assignment: another thread sees the old or the new pair
        return tables

    def _cos_sin(self, angle_TF: Tensor) -> tuple[Tensor, Tensor]:
        angle_TR = torch.cat((angle_TF, angle_TF), dim=-1)
        return angle_TR.cos() * self.attention_factor, angle_TR.sin() * self.attention_factor

    def _dynamic_tables(self, position_T: Tensor, length_T: Tensor | None) -> tuple[Tensor, Tensor]:
        if length_T is None:
            length_T = (position_T.max() + 1).expand_as(position_T) if position_T.numel() else position_T
        size = self.spec.size
        stretch_T = self.factor * length_T.clamp(min=self.max_positions).float() / self.max_positions - (
            self.factor - 1
        )
        theta_T1 = (self.spec.theta * stretch_T ** (size / max(size - 2, 1)))[:, None]
        freq_TF = 1.0 / (theta_T1 ** (torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size))
        return self._cos_sin(position_T.float()[:, None] * freq_TF)


def apply_rotation(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Half-split rotation of the first R dimensions of every head by given tables."""
    size = cos_TR.shape[-1]
    turned_THR = x_THD if size == x_THD.shape[-1] else x_THD[..., :size]
    left_THF, right_THF = turned_THR.chunk(2, dim=-1)
    swapped_THR = torch.cat((-right_THF, left_THF), dim=-1)
    turned_THR = (turned_THR * cos_TR[:, None] + swapped_THR * sin_TR[:, None]).to(x_THD.dtype)
    return turned_THR if size == x_THD.shape[-1] else torch.cat((turned_THR, x_THD[..., size:]), dim=-1)
