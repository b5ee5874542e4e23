"""PyTorch reference of `hasten.kernels.token_select`; the legend is there. One unit after another, nothing clever."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.kernels.token_select import Ballot, Kept, Turns

__all__ = ["largest", "token_choose", "token_gather", "token_turn", "token_votes"]


def _turned(x_LGD: Tensor, turns: Turns, unit: int, start: int) -> Tensor:
    rows = torch.arange(x_LGD.shape[0]) + int(turns.offset_U[unit]) + start
    cos_LR, sin_LR = turns.cos_AR[rows][:, None], turns.sin_AR[rows][:, None]
    rotated = cos_LR.shape[-1]
    x_LGR = x_LGD[..., :rotated].float()
    left, right = x_LGR.chunk(2, -1)
    turned = x_LGR * cos_LR + torch.cat((-right, left), -1) * sin_LR
    return torch.cat((turned, x_LGD[..., rotated:].float()), -1)


def _tokens(pages_NGPD: Tensor, table_M: Tensor, index_K: Tensor) -> Tensor:
    """float32 [K, G, D]"""
    page = pages_NGPD.shape[2]
    return pages_NGPD[table_M[index_K // page].long(), :, index_K % page].float()


def token_turn(
    q_THD: Tensor, row_start_U1: Tensor, length_U: Tensor, judged_U: Tensor, far: int, turns: Turns
) -> tuple[Tensor, Tensor]:
    out, mean = torch.empty_like(q_THD), torch.zeros(length_U.numel(), *q_THD.shape[1:])
    for u, length in enumerate(length_U.tolist()):
        rows = slice(int(row_start_U1[u]), int(row_start_U1[u + 1]))
        q_CHD = q_THD[rows]
        out[rows] = _turned(q_CHD, turns, u, length - q_CHD.shape[0])
        if judged_U[u] and q_CHD.shape[0]:
            mean[u] = _turned(q_CHD, turns, u, far).mean(0)
    return out, mean


def token_votes(
    mean_UHD: Tensor, k_NGPD: Tensor, table_UM: Tensor, first: int, end_U: Tensor, ballot: Ballot
) -> Tensor:
    longest = max(0, int(end_U.max()) - first) if end_U.numel() else 0
    score = torch.zeros(mean_UHD.shape[0], longest)
    for u, end in enumerate(end_U.tolist()):
        if end <= first:
            continue
        k_LHD = _tokens(k_NGPD, table_UM[u], torch.arange(first, end))
        k_LHD = k_LHD.repeat_interleave(mean_UHD.shape[1] // k_LHD.shape[1], 1)
        logits_HL = torch.einsum("hd,lhd->hl", mean_UHD[u].double(), k_LHD.double()).float() * ballot.scale
        if ballot.vote == "soft":
            found = logits_HL.softmax(1).sum(0)
        elif ballot.vote == "sum":
            found = logits_HL.sum(0)
        else:
            found = torch.zeros(end - first)
            for row in logits_HL:
                found[largest(row, ballot.k)] += 1
        if ballot.pool > 1:
            found = torch.nn.functional.max_pool1d(found[None], ballot.pool, 1, ballot.pool // 2)[0]
        score[u, : end - first] = found
    return score


def largest(score_L: Tensor, k: int) -> Tensor:
    """Ascending indices of the ``k`` largest, the later of those equal in 11 bits of the mantissa."""
    score_L = (score_L.contiguous().view(torch.int32) & ~0xFFF).view(torch.float32)
    backwards = score_L.flip(0).sort(descending=True, stable=True).indices[:k]
    return (score_L.numel() - 1 - backwards).sort().values


def token_choose(
    mean_UHD: Tensor,
    k_NGPD: Tensor,
    table_UM: Tensor,
    length_U: Tensor,
    local_U: Tensor,
    judged_U: Tensor,
    reusable_U: Tensor,
    slot_U: Tensor,
    list_UW: Tensor,
    kept: Kept,
    ballot: Ballot,
    *,
    first: int,
    theta: float,
    most_apart: int = -1,
) -> int:
    hits = 0
    for u, length in enumerate(length_U.tolist()):
        if not judged_U[u]:
            continue
        slot, mean_F = int(slot_U[u]), mean_UHD[u].flatten()
        made = int(kept.made_C[slot])
        alike = float(torch.cosine_similarity(mean_F, kept.known_CF[slot], 0)) >= theta
        if reusable_U[u] and made > 0 and (most_apart < 0 or length - made <= most_apart) and alike:
            hits += 1
        else:
            end_U = torch.tensor([length - int(local_U[u])])
            score = token_votes(mean_UHD[u : u + 1], k_NGPD, table_UM[u : u + 1], first, end_U, ballot)[0]
            kept.kept_CK[slot] = (largest(score, ballot.k) + first).int()
            kept.known_CF[slot] = mean_F
            kept.made_C[slot] = length
        list_UW[u, first : first + ballot.k] = kept.kept_CK[slot]
    return hits


def token_gather(
    list_UW: Tensor,
    count_U: Tensor,
    k_NGPD: Tensor,
    v_NGPD: Tensor,
    table_UM: Tensor,
    turns: Turns,
    k_out_ZGPD: Tensor,
    v_out_ZGPD: Tensor,
    target: int,
) -> None:
    page = k_NGPD.shape[2]
    for u, count in enumerate(count_U.tolist()):
        index = list_UW[u, :count].long()
        to = torch.arange(count)
        where = (u * target + to // page, slice(None), to % page)
        k_KGD = _tokens(k_NGPD, table_UM[u], index)
        k_out_ZGPD[where] = _turned(k_KGD, turns, u, 0).to(k_out_ZGPD.dtype)
        v_out_ZGPD[where] = _tokens(v_NGPD, table_UM[u], index).to(v_out_ZGPD.dtype)
