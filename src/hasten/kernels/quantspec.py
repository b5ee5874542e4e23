"""Hierarchical 4+4-bit KV pages: packing whole pages, and attention over one or both of their planes.

Source: Tiwari et al., "QuantSpec", ICML 2025, arXiv 2502.10424, sections 4.2 and 4.3; layout in
native/src/kernels/quantspec.cpp. A number of a page is ``U * S + Z`` to the draft and ``(16 * U + L) * S / 16 + Z``
to the target, U in 0..15, L in -8..7. S and Z belong to a channel of a page for keys, to a token for values; they
are bfloat16, S rounded up and Z down, so that the range is covered. What is not finite makes its group NaN.

Legend: N pages, G kv heads, P page size, D head size, T rows, H query heads, S sequences, M pages per sequence, B
bytes of a block of 16 nibbles (8), C blocks of 16 tokens (of a page) or of 16 channels, R tokens of a full-precision
tail.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hasten.core.errors import UnsupportedError
from hasten.kernels.attention import cap_of, float_rows, index_array
from hasten.kernels.native import native

__all__ = ["LANES", "Planes", "Tails", "quantspec_attend", "quantspec_pack"]

LANES = 16
"""Numbers of a block of codes."""


@dataclass(frozen=True, eq=False)
class Planes:
    """The pages of one layer. Codes uint8, scales and zeros bfloat16.

    k_upper, k_lower: [N, G, C, D, B], a block holds 16 tokens of a channel. k_scale, k_zero: [N, G, D].
    v_upper, v_lower: [N, G, C, P, B], a block holds 16 channels of a token. v_scale, v_zero: [N, G, P].
    """

    k_upper: Tensor
    k_lower: Tensor
    k_scale: Tensor
    k_zero: Tensor
    v_upper: Tensor
    v_lower: Tensor
    v_scale: Tensor
    v_zero: Tensor

    @classmethod
    def empty(cls, pages: int, groups: int, page: int, size: int) -> Planes:
        """Planes with undefined content. `UnsupportedError` for a head size that is no multiple of 16."""
        if size % LANES:
            raise UnsupportedError(
                f"quantspec pages need a head size that is a multiple of {LANES}, not {size}"
            )
        keys = (pages, groups, -(-page // LANES), size, LANES // 2)
        values = (pages, groups, size // LANES, page, LANES // 2)

        def half(last: int) -> Tensor:
            return torch.empty(pages, groups, last, dtype=torch.bfloat16)

        def codes(shape: tuple[int, ...]) -> Tensor:
            return torch.empty(shape, dtype=torch.uint8)

        return cls(
            codes(keys), codes(keys), half(size), half(size),
            codes(values), codes(values), half(page), half(page),
        )  # fmt: skip

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in self.__dataclass_fields__)

    @cached_property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, G, P, D)."""
        count, groups, _, page, _ = self.v_upper.shape
        return count, groups, page, self.k_scale.shape[2]

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        """Of the eight tensors, checked."""
        count, groups, page, size = self.shape
        for name, mine, want in zip(
            self.__dataclass_fields__, self.tensors, _shapes(count, groups, page, size), strict=True
        ):
            dtype = torch.bfloat16 if len(want) == 3 else torch.uint8
            if mine.dtype is not dtype:
                raise TypeError(f"{name} must be {dtype}, not {mine.dtype}")
            if tuple(mine.shape) != want or not mine.is_contiguous():
                raise ValueError(f"{name} must be contiguous {list(want)}, not {list(mine.shape)}")
        return tuple(x.data_ptr() for x in self.tensors)

    def bytes(self, upper_only: bool = False) -> int:
        """Bytes of all planes; or of what the draft reads."""
        return sum(
            x.nbytes
            for name, x in zip(self.__dataclass_fields__, self.tensors, strict=True)
            if not (upper_only and name.endswith("lower"))
        )


def _shapes(count: int, groups: int, page: int, size: int) -> list[tuple[int, ...]]:
    keys = (count, groups, -(-page // LANES), size, LANES // 2)
    values = (count, groups, size // LANES, page, LANES // 2)
    return [
        keys,
        keys,
        (count, groups, size),
        (count, groups, size),
        values,
        values,
        (count, groups, page),
        (count, groups, page),
    ]


@dataclass(frozen=True, eq=False)
class Tails:
    """Full-precision keys and values of each sequence's newest tokens, [R, G, D] each, float32 or bfloat16.

    Token t of sequence s lies at ``(t - base[s]) % R``.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    base: tuple[int, ...]

    @cached_property
    def table(self) -> tuple[Any, bool]:
        """(int64 [S, 4]: addresses, base, R; whether bfloat16). Raises TypeError or ValueError."""
        dtypes = {x.dtype for x in (*self.keys, *self.values)}
        if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.bfloat16}:
            raise TypeError(f"tails must all be float32 or all bfloat16, not {sorted(map(str, dtypes))}")
        rows = []
        for k, v, base in zip(self.keys, self.values, self.base, strict=True):
            fits = k.dim() == 3 and k.shape == v.shape and k.shape[1:] == self.keys[0].shape[1:]
            if not fits or not k.shape[0] or not (k.is_contiguous() and v.is_contiguous()):
                raise ValueError(
                    f"tails must be contiguous [R >= 1, G, D], not {tuple(k.shape)}, {tuple(v.shape)}"
                )
            rows.append((k.data_ptr(), v.data_ptr(), base, k.shape[0]))
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, 4).numpy(), torch.bfloat16 in dtypes


def quantspec_pack(
    k_nPGD: Tensor, v_nPGD: Tensor, page_n: Tensor, planes: Planes, *, module: ModuleType | None = None
) -> None:
    """Quantise whole pages: float32 keys and values of n pages become the content of pages ``page_n`` (int64).

    Raises TypeError for a wrong dtype, ValueError for shapes that do not fit or a page outside the pool.
    """
    lib = native() if module is None else module
    count, groups, page, size = planes.shape
    for name, x in (("k_nPGD", k_nPGD), ("v_nPGD", v_nPGD)):
        if x.dtype is not torch.float32:
            raise TypeError(f"{name} must be float32, not {x.dtype}")
        if tuple(x.shape) != (page_n.numel(), page, groups, size) or not x.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {[page_n.numel(), page, groups, size]}, not {list(x.shape)}"
            )
    if page_n.dtype is not torch.int64 or page_n.dim() != 1:
        raise TypeError(f"page_n must be int64 [n], not {page_n.dtype} {tuple(page_n.shape)}")
    lib.quantspec_pack(
        k_nPGD.data_ptr(),
        v_nPGD.data_ptr(),
        page_n.contiguous().numpy(),
        planes.addresses,
        count,
        groups,
        page,
        size,
    )


def quantspec_attend(
    q_THD: Tensor,
    planes: Planes,
    tails: Tails,
    query_start_S1: Tensor,
    position_S: Tensor,
    bound_T: Tensor,
    page_table_SM: Tensor,
    scale: float,
    softcap: float | None = None,
    *,
    full: bool,
    module: ModuleType | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of a ragged batch: ``(out_THD, lse_TH)``, float32.

    Row r of sequence s is token ``position_S[s] + i`` (its i-th row). It reads its first ``bound_T[r]`` pages from
    the planes (``full``: both, else the upper one) and the tokens after them, up to itself, from the tail.
    query_start_S1, bound_T, page_table_SM: int32; position_S: int64. bound_T must not fall within a sequence. Raises
    TypeError for a wrong dtype and ValueError for shapes, pages or bounds that do not fit.
    """
    lib = native() if module is None else module
    rows, heads, size = float_rows("q_THD", q_THD)
    count, groups, page, own = planes.shape
    if own != size or groups == 0 or heads % groups:
        raise ValueError(f"q_THD {tuple(q_THD.shape)} does not fit pages of {groups} kv heads of size {own}")
    table_S4, half = tails.table
    if tails.keys and tuple(tails.keys[0].shape[1:]) != (groups, size):
        raise ValueError(
            f"tails {tuple(tails.keys[0].shape)} do not fit pages of {groups} kv heads of size {size}"
        )
    if position_S.dtype is not torch.int64 or position_S.dim() != 1 or not position_S.is_contiguous():
        raise TypeError(f"position_S must be contiguous int64 [S], not {position_S.dtype}")
    start: Any = index_array("query_start_S1", query_start_S1, 1)
    if start.size == 0 or start[-1] != rows:
        raise ValueError(f"query_start_S1 must end with the {rows} rows of q_THD")
    out_THD, lse_TH = torch.empty_like(q_THD), torch.empty(rows, heads)
    lib.quantspec_attend(
        q_THD.data_ptr(),
        out_THD.data_ptr(),
        lse_TH.data_ptr(),
        planes.addresses,
        start,
        position_S.numpy(),
        index_array("bound_T", bound_T, 1),
        index_array("page_table_SM", page_table_SM, 2),
        table_S4,
        count,
        groups,
        page,
        size,
        heads,
        full,
        half,
        scale,
        cap_of(softcap),
    )
    return out_THD, lse_TH
