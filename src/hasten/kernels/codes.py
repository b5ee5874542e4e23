"""Two-bit Hadamard codes (Adamas, arXiv 2510.18413): encode, append to a sidecar, distances, nearest tokens.

A code is D / 4 bytes: coordinate c is bits 2 (c % 4) and up of byte c // 4. In the sidecar [N, G, P, B] the codes of W
tokens lie transposed, because a scan looks at one byte of many tokens at a time: byte j of token t is at
(t // W) W B + j W + t % W of its page and head, W being the largest of 32, 16 and 1 that divides P.
`hasten.kernels.reference.codes.blocked` says the same in PyTorch.

Legend: T rows, R decode rows, H query heads, G kv heads, X choices (G or H), D head size, B = D / 4 bytes of a code,
N pages, P page size, M pages of a row, L longest context, K budget.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hasten.kernels.native import native


def check_size(size: int) -> None:
    """Raise ValueError unless ``size`` is a power of two in 8..1024 (Sylvester's construction)."""
    if not 8 <= size <= 1024 or size & (size - 1):
        raise ValueError(f"head size must be a power of two in 8..1024, not {size}")


def _check_cut(cut: float) -> float:
    if not (math.isfinite(cut) and cut > 0):
        raise ValueError(f"cut must be finite and positive, not {cut}")
    return cut


def hadamard_encode(x_RHD: Tensor, cut: float) -> Tensor:
    """Codes uint8 [R, H, B] of float32 [R, H, D]: how many of (-cut, 0, cut) lie below each coordinate of x H.

    H is the orthonormal Sylvester-Hadamard matrix. Raises ValueError for a head size that is no power of two.
    """
    rows, heads, size = x_RHD.shape
    check_size(size)
    out_RHB = torch.empty(rows, heads, size // 4, dtype=torch.uint8)
    native().hadamard_encode(x_RHD.contiguous(), _check_cut(cut), out_RHB)
    return out_RHB


def _address(name: str, value: Tensor, dtype: torch.dtype, dims: int) -> int:
    """Address of a contiguous tensor on the CPU (which crosses the native border faster than the tensor)."""
    if value.dtype is not dtype:
        raise TypeError(f"{name} must be {dtype}, not {value.dtype}")
    if value.dim() != dims or not value.is_contiguous():
        raise ValueError(f"{name} must be contiguous with {dims} dimensions, not shape {tuple(value.shape)}")
    return value.data_ptr()


def hadamard_append(k_TGD: Tensor, cut: float, codes_NGPB: Tensor, slot_T: Tensor) -> None:
    """Encode keys float32 [T, G, D] and write them at ``slot_T`` (int64, page * P + offset) of the sidecar."""
    k_TGD = k_TGD.contiguous()
    address = _address("k_TGD", k_TGD, torch.float32, 3)
    codes = _address("codes_NGPB", codes_NGPB, torch.uint8, 4)
    rows, kv_heads, size = k_TGD.shape
    check_size(size)
    pages, code_heads, page_size, code = codes_NGPB.shape
    if code_heads != kv_heads or 4 * code != size or slot_T.shape != (rows,):
        raise ValueError(
            f"codes_NGPB {tuple(codes_NGPB.shape)} and slot_T {tuple(slot_T.shape)} do not fit k_TGD "
            f"{tuple(k_TGD.shape)}"
        )
    slots = _address("slot_T", slot_T, torch.int64, 1)
    native().hadamard_append(address, _check_cut(cut), codes, slots, rows, kv_heads, size, pages, page_size)


def hadamard_distance(
    query_RHB: Tensor, codes_NGPB: Tensor, table_RM: Tensor, length_R: Tensor, *, corrected: bool = True
) -> Tensor:
    """Manhattan distance of each query head's codes to every cached token's, uint16 [R, H, L].

    Entries past a row's length are undefined. ``corrected=False`` weighs the XOR bits instead, which counts the
    pair {1, 2} as 3 (the reference CUDA kernel's form).
    """
    rows, heads = query_RHB.shape[:2]
    longest = int(length_R.max()) if rows else 0
    out_RHL = torch.empty(rows, heads, -(-longest // 32) * 32, dtype=torch.uint16)
    native().hadamard_distance(query_RHB, codes_NGPB, table_RM, length_R, corrected, out_RHL)
    return out_RHL[:, :, :longest]


def hadamard_select(
    query_RHB: Tensor,
    codes_NGPB: Tensor,
    table_RM: Tensor,
    length_R: Tensor,
    budget: int,
    *,
    per_head: bool,
    corrected: bool = True,
) -> tuple[Tensor, Tensor]:
    """(index_RXK int32 ascending, count_RX int32): the current token and the ``budget - 1`` nearest others.

    ``per_head`` chooses for every query head (X = H), else once per kv head with its query heads' distances summed
    (X = G). Equal distances: the most recent tokens win. ``table_RM`` int32 page ids, ``length_R`` int32 >= 1.
    """
    if budget < 1:
        raise ValueError(f"budget must be at least 1, not {budget}")
    rows = query_RHB.shape[0]
    choices = query_RHB.shape[1] if per_head else codes_NGPB.shape[1]
    index_RXK = torch.empty(rows, choices, budget, dtype=torch.int32)
    count_RX = torch.empty(rows, choices, dtype=torch.int32)
    native().hadamard_select(
        query_RHB, codes_NGPB, table_RM, length_R, per_head, corrected, index_RXK, count_RX
    )
    return index_RXK, count_RX


class HadamardSelector:
    """`hadamard_append` and `hadamard_nearest` of one layer, for decoding steps that run natively as a whole.

    codes_NGPB: the layer's sidecar, uint8; cut_q, cut_k: outer cut points. Raises ValueError for what does not fit.
    """

    __slots__ = ("_handle", "budget", "keep")

    def __init__(
        self,
        codes_NGPB: Tensor,
        cut_q: float,
        cut_k: float,
        budget: int,
        *,
        heads: int,
        per_head: bool,
        corrected: bool = True,
    ) -> None:
        codes = _address("codes_NGPB", codes_NGPB, torch.uint8, 4)
        pages, kv_heads, page_size, code = codes_NGPB.shape
        check_size(4 * code)
        if budget < 1:
            raise ValueError(f"budget must be at least 1, not {budget}")
        self.budget, self.keep = budget, codes_NGPB
        self._handle: Any = native().hadamard_selector(
            codes,
            _check_cut(cut_q),
            _check_cut(cut_k),
            heads,
            kv_heads,
            4 * code,
            pages,
            page_size,
            budget,
            per_head,
            corrected,
        )

    @property
    def handle(self) -> Any:
        """The native object."""
        return self._handle


def hadamard_nearest(
    q_RHD: Tensor,
    cut: float,
    codes_NGPB: Tensor,
    table_RM: Tensor,
    length_R: Tensor,
    budget: int,
    *,
    per_head: bool,
    corrected: bool = True,
) -> tuple[Tensor, Tensor]:
    """`hadamard_encode` of float32 queries with ``cut``, then `hadamard_select`, in one native call."""
    q_RHD = q_RHD.contiguous()
    address = _address("q_RHD", q_RHD, torch.float32, 3)
    codes = _address("codes_NGPB", codes_NGPB, torch.uint8, 4)
    table = _address("table_RM", table_RM, torch.int32, 2)
    length = _address("length_R", length_R, torch.int32, 1)
    if budget < 1:
        raise ValueError(f"budget must be at least 1, not {budget}")
    rows, heads, size = q_RHD.shape
    check_size(size)
    pages, kv_heads, page_size, code = codes_NGPB.shape
    width = table_RM.shape[1]
    if 4 * code != size or table_RM.shape[0] != rows or length_R.shape[0] != rows:
        raise ValueError(
            f"codes_NGPB {tuple(codes_NGPB.shape)}, table_RM {tuple(table_RM.shape)} and length_R "
            f"{tuple(length_R.shape)} do not fit q_RHD {tuple(q_RHD.shape)}"
        )
    choices = heads if per_head else kv_heads
    index_RXK = torch.empty((rows, choices, budget), dtype=torch.int32)
    count_RX = torch.empty((rows, choices), dtype=torch.int32)
    native().hadamard_nearest(
        address,
        _check_cut(cut),
        codes,
        table,
        length,
        rows,
        width,
        heads,
        kv_heads,
        size,
        pages,
        page_size,
        budget,
        per_head,
        corrected,
        index_RXK.data_ptr(),
        count_RX.data_ptr(),
    )
    return index_RXK, count_RX
