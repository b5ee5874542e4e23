"""PyTorch reference of the attention kernels: plain definitions, used by tests and as documentation.

They compute in the dtype of the queries, so float64 queries give a float64 answer.

Legend: T query rows, H query heads, G kv heads, D head size, N pages, P page size, J pieces, E entries,
L tokens of a piece, R chosen rows, X heads of a selection (G or H), K selected tokens, M pages per row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hasten.kernels.pages import dequantise

if TYPE_CHECKING:
    from hasten.kernels.attention import PieceWork


def masked_attention(
    q_EHD: Tensor, k_EHLD: Tensor, v_EHLD: Tensor, seen_EHL: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the tokens ``seen``; a row that sees nothing gives 0 and lse -inf."""
    scores = torch.einsum("ehd,ehld->ehl", q_EHD, k_EHLD) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen_EHL, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    weight = torch.exp(scores - lse.masked_fill(torch.isneginf(lse), 0.0)[..., None])
    return torch.einsum("ehl,ehld->ehd", weight, v_EHLD), lse


def attend_pieces(
    q_THD: Tensor, k_NGPD: Tensor, v_NGPD: Tensor, work: PieceWork, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """See `hasten.kernels.attention.attend_pieces`."""
    heads, size = q_THD.shape[1:]
    groups, page = k_NGPD.shape[1:3]
    if k_NGPD.dtype is torch.int8:
        k_NGPD, v_NGPD = dequantise(k_NGPD), dequantise(v_NGPD)
    entries = work.row_E.numel()
    out = q_THD.new_zeros(entries, heads, size)
    lse = q_THD.new_full((entries, heads), float("-inf"))
    for j in range(work.pieces):
        begin, end = int(work.row_start_J1[j]), int(work.row_start_J1[j + 1])
        ids = work.page_C[int(work.page_start_J1[j]) : int(work.page_start_J1[j + 1])].long()
        tokens = ids.numel() * page
        first = work.first_E[begin:end].long()
        # Tokens past the last limit may never have been written.
        used = min(tokens, max(int(work.limit_E[begin:end].max()), 0)) if end > begin else 0
        if used == 0:
            continue
        span = torch.arange(used)
        seen = (span >= first[:, None]) & (span < work.limit_E[begin:end].long()[:, None])
        k = k_NGPD[ids].transpose(0, 1).reshape(groups, tokens, size)[:, :used].to(q_THD.dtype)
        v = v_NGPD[ids].transpose(0, 1).reshape(groups, tokens, size)[:, :used].to(q_THD.dtype)
        k = k.repeat_interleave(heads // groups, 0).expand(end - begin, -1, -1, -1)
        v = v.repeat_interleave(heads // groups, 0).expand(end - begin, -1, -1, -1)
        seen = seen[:, None].expand(-1, heads, -1)
        out[begin:end], lse[begin:end] = masked_attention(
            q_THD[work.row_E[begin:end].long()], k, v, seen, scale, softcap
        )
    return out, lse


def merge(out_EHD: Tensor, lse_EH: Tensor, entry_start_T1: Tensor, entry_E: Tensor) -> tuple[Tensor, Tensor]:
    """See `hasten.kernels.attention.merge`."""
    rows = entry_start_T1.numel() - 1
    heads, size = out_EHD.shape[1:]
    counts = (entry_start_T1[1:] - entry_start_T1[:-1]).long()
    row = torch.repeat_interleave(torch.arange(rows), counts)
    parts, part_lse = out_EHD[entry_E.long()], lse_EH[entry_E.long()]
    index = row[:, None].expand(-1, heads)
    top = lse_EH.new_full((rows, heads), float("-inf")).scatter_reduce(0, index, part_lse, "amax")
    safe = top.masked_fill(torch.isneginf(top), 0.0)
    weight = torch.exp(part_lse - safe[row])
    total = lse_EH.new_zeros(rows, heads).index_add(0, row, weight)
    out = out_EHD.new_zeros(rows, heads, size).index_add(0, row, parts * weight[..., None])
    return out / total.clamp_min(1e-38)[..., None], safe + torch.log(total)


def attend_tokens(
    q_RHD: Tensor,
    k_NGPD: Tensor,
    v_NGPD: Tensor,
    page_table_RM: Tensor,
    index_RXK: Tensor,
    count_RX: Tensor,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """See `hasten.kernels.attention.attend_tokens`."""
    rows, heads, size = q_RHD.shape
    groups, page = k_NGPD.shape[1:3]
    chosen = index_RXK.shape[2]
    if k_NGPD.dtype is torch.int8:
        k_NGPD, v_NGPD = dequantise(k_NGPD), dequantise(v_NGPD)
    if rows == 0 or chosen == 0:
        return q_RHD.new_zeros(rows, heads, size), q_RHD.new_full((rows, heads), float("-inf"))
    repeat = heads // index_RXK.shape[1]
    index = index_RXK.long().repeat_interleave(repeat, 1)
    seen = torch.arange(chosen) < count_RX.long().repeat_interleave(repeat, 1)[..., None]
    index = torch.where(seen, index, 0)
    pages = page_table_RM.long()[torch.arange(rows)[:, None, None], index // page].clamp_min(0)
    head = (torch.arange(heads) // (heads // groups))[None, :, None]
    k = k_NGPD[pages, head, index % page].to(q_RHD.dtype)
    v = v_NGPD[pages, head, index % page].to(q_RHD.dtype)
    return masked_attention(q_RHD, k, v.masked_fill(~seen[..., None], 0.0), seen, scale, softcap)
