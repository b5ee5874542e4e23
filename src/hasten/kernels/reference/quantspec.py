"""PyTorch reference of `hasten.kernels.quantspec`.

Legend: N pages, G kv heads, P page size, D head size, T rows, H query heads, S sequences, M pages per sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.kernels.quantspec import LANES, Planes, Tails


def _bfloat16(x: Tensor, up: bool) -> Tensor:
    """The nearest bfloat16 not below (``up``) or not above float32 ``x``, as float32."""
    bits = x.contiguous().view(torch.int32)
    cut = bits & -65536
    away = (bits != cut) & ((bits < 0) != up)
    return torch.where(away, cut + 65536, cut).view(torch.float32)


def quantise(x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(U, L, S, Z) of float32 ``x`` with groups along ``dim`` (kept, of size 1, in S and Z)."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    zero = _bfloat16(low, up=False)
    step = _bfloat16((high - zero) / torch.tensor(15.0), up=True)
    bad = ~torch.isfinite(high - low) | ~torch.isfinite(step)
    safe = torch.where(bad | (step <= 0), torch.ones_like(step), step)
    kept = torch.where(bad | (step <= 0), torch.zeros_like(x), x - zero)
    upper = (kept / safe).round().clamp(0, 15)
    lower = ((kept - upper * safe) / (safe * 0.0625)).round().clamp(-8, 7)
    nan = torch.full_like(step, float("nan"))
    return upper, lower, torch.where(bad, nan, step), torch.where(bad, nan, zero)


def _blocks(codes: Tensor) -> Tensor:
    """uint8 [..., n / 16, 8] of nibbles [..., n]."""
    low, high = codes.unflatten(-1, (-1, 2, LANES // 2)).to(torch.uint8).unbind(-2)
    return low | (high << 4)


def _nibbles(blocks: Tensor) -> Tensor:
    """float32 [..., n] of uint8 [..., n / 16, 8]."""
    return torch.stack((blocks & 15, blocks >> 4), -2).flatten(-3).float()


def quantspec_pack(k_nPGD: Tensor, v_nPGD: Tensor, page_n: Tensor, planes: Planes) -> None:
    """See `hasten.kernels.quantspec.quantspec_pack`."""
    page = k_nPGD.shape[1]
    upper, lower, step, zero = quantise(k_nPGD.permute(0, 2, 3, 1), -1)  # [n, G, D, P]
    pad = (0, -page % LANES)
    for plane, code in ((planes.k_upper, upper), (planes.k_lower, lower + 8)):
        plane[page_n] = _blocks(torch.nn.functional.pad(code, pad)).transpose(2, 3)
    planes.k_scale[page_n], planes.k_zero[page_n] = step[..., 0].bfloat16(), zero[..., 0].bfloat16()
    upper, lower, step, zero = quantise(v_nPGD.transpose(1, 2), -1)  # [n, G, P, D]
    for plane, code in ((planes.v_upper, upper), (planes.v_lower, lower + 8)):
        plane[page_n] = _blocks(code).transpose(2, 3)
    planes.v_scale[page_n], planes.v_zero[page_n] = step[..., 0].bfloat16(), zero[..., 0].bfloat16()


def unpack(planes: Planes, page_n: Tensor, full: bool) -> tuple[Tensor, Tensor]:
    """Keys and values of whole pages, float32 [n, G, P, D], as the target (``full``) or the draft sees them."""
    page = planes.shape[2]
    out = []
    for upper, lower, step, zero, keys in (
        (planes.k_upper, planes.k_lower, planes.k_scale, planes.k_zero, True),
        (planes.v_upper, planes.v_lower, planes.v_scale, planes.v_zero, False),
    ):
        code = _nibbles(upper[page_n].transpose(2, 3))  # keys [n, G, D, P'], values [n, G, P, D]
        s, z = step[page_n].float()[..., None], zero[page_n].float()[..., None]
        if full:
            x = (16 * code + _nibbles(lower[page_n].transpose(2, 3)) - 8) * (s / 16) + z
        else:
            x = code * s + z
        out.append(x[..., :page].transpose(2, 3) if keys else x)
    return out[0], out[1]


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
) -> tuple[Tensor, Tensor]:
    """See `hasten.kernels.quantspec.quantspec_attend`."""
    _, groups, page, size = planes.shape
    heads = q_THD.shape[1]
    out, lse = torch.empty_like(q_THD), torch.empty(q_THD.shape[:2])
    for s in range(position_S.numel()):
        for row in range(int(query_start_S1[s]), int(query_start_S1[s + 1])):
            at = int(position_S[s]) + row - int(query_start_S1[s])
            bound = int(bound_T[row])
            ids = page_table_SM[s, :bound].long()
            k, v = (x.transpose(1, 2).reshape(-1, groups, size) for x in unpack(planes, ids, full))
            slot = (torch.arange(bound * page, at + 1) - tails.base[s]) % tails.keys[s].shape[0]
            k = torch.cat((k, tails.keys[s][slot].float())).repeat_interleave(heads // groups, 1)
            v = torch.cat((v, tails.values[s][slot].float())).repeat_interleave(heads // groups, 1)
            score = torch.einsum("hd,lhd->hl", q_THD[row], k) * scale
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            lse[row] = score.logsumexp(-1)
            out[row] = torch.einsum("hl,lhd->hd", score.softmax(-1), v)
    return out, lse
