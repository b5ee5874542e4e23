"""Two-bit Hadamard codes (Adamas, arXiv 2510.18413): encode, append to a sidecar, distances, nearest tokens.

Legend: T rows, R decode rows, H query heads, G kv heads, X choices (G or H), D head size, B = D / 8 bytes of a bit
plane (high plane first), N pages, P page size, M pages of a row, L longest context, K budget.
"""

from __future__ import annotations

import math

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
    """Codes uint8 [R, H, 2, B] of float32 [R, H, D]: how many of (-cut, 0, cut) lie below each coordinate of x H.

    H is the orthonormal Sylvester-Hadamard matrix. Raises ValueError for a head size that is no power of two.
    """
    rows, heads, size = x_RHD.shape
    check_size(size)
    out_RH2B = torch.empty(rows, heads, 2, size // 8, dtype=torch.uint8)
    native().hadamard_encode(x_RHD.contiguous(), _check_cut(cut), out_RH2B)
    return out_RH2B


def _address(name: str, value: Tensor, dtype: torch.dtype, dims: int) -> int:
    """Address of a contiguous tensor on the CPU (which crosses the native border faster than the tensor)."""
    if value.dtype is not dtype:
        raise TypeError(f"{name} must be {dtype}, not {value.dtype}")
    if value.dim() != dims or not value.is_contiguous():
        raise ValueError(f"{name} must be contiguous with {dims} dimensions, not shape {tuple(value.shape)}")
    return value.data_ptr()


def hadamard_append(k_TGD: Tensor, cut: float, codes_NGP2B: Tensor, slot_T: Tensor) -> None:
    """Encode keys float32 [T, G, D] and write them at ``slot_T`` (int64, page * P + offset) of the sidecar."""
    k_TGD = k_TGD.contiguous()
    address = _address("k_TGD", k_TGD, torch.float32, 3)
    codes = _address("codes_NGP2B", codes_NGP2B, torch.uint8, 5)
    rows, kv_heads, size = k_TGD.shape
    check_size(size)
    pages, code_heads, page_size, _, plane = codes_NGP2B.shape
    if code_heads != kv_heads or 8 * plane != size or slot_T.shape != (rows,):
        raise ValueError(
            f"codes_NGP2B {tuple(codes_NGP2B.shape)} and slot_T {tuple(slot_T.shape)} do not fit k_TGD "
            f"{tuple(k_TGD.shape)}"
        )
    native().hadamard_append(
        address, _check_cut(cut), codes, slot_T.numpy(), kv_heads, size, pages, page_size
    )


def hadamard_distance(
    query_RH2B: Tensor, codes_NGP2B: Tensor, table_RM: Tensor, length_R: Tensor, *, corrected: bool = True
) -> Tensor:
    """Manhattan distance of each query head's codes to every cached token's, uint16 [R, H, L].

    Entries past a row's length are undefined. ``corrected=False`` weighs the XOR bits instead, which counts the
    pair {1, 2} as 3 (the reference CUDA kernel's form).
    """
    rows, heads = query_RH2B.shape[:2]
    longest = int(length_R.max()) if rows else 0
    out_RHL = torch.empty(rows, heads, longest, dtype=torch.uint16)
    native().hadamard_distance(query_RH2B, codes_NGP2B, table_RM, length_R, corrected, out_RHL)
    return out_RHL


def hadamard_select(
    query_RH2B: Tensor,
    codes_NGP2B: Tensor,
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
    rows = query_RH2B.shape[0]
    choices = query_RH2B.shape[1] if per_head else codes_NGP2B.shape[1]
    index_RXK = torch.empty(rows, choices, budget, dtype=torch.int32)
    count_RX = torch.empty(rows, choices, dtype=torch.int32)
    native().hadamard_select(
        query_RH2B, codes_NGP2B, table_RM, length_R, per_head, corrected, index_RXK, count_RX
    )
    return index_RXK, count_RX


def hadamard_nearest(
    q_RHD: Tensor,
    cut: float,
    codes_NGP2B: Tensor,
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
    codes = _address("codes_NGP2B", codes_NGP2B, torch.uint8, 5)
    if budget < 1:
        raise ValueError(f"budget must be at least 1, not {budget}")
    rows, heads, size = q_RHD.shape
    check_size(size)
    pages, kv_heads, page_size, _, plane = codes_NGP2B.shape
    if 8 * plane != size or table_RM.shape[0] != rows:
        raise ValueError(
            f"codes_NGP2B {tuple(codes_NGP2B.shape)} and table_RM {tuple(table_RM.shape)} do not fit q_RHD "
            f"{tuple(q_RHD.shape)}"
        )
    choices = heads if per_head else kv_heads
    index_RXK = torch.empty((rows, choices, budget), dtype=torch.int32)
    count_RX = torch.empty((rows, choices), dtype=torch.int32)
    native().hadamard_nearest(
        address,
        _check_cut(cut),
        codes,
        table_RM.numpy(),
        length_R.numpy(),
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
