"""PyTorch reference of `hasten.kernels.page_mass`; the legend is there."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from hasten.kernels.page_mass import PageRule
from hasten.kernels.pages import dequantise


def page_mass(
    q_RHD: Tensor,
    k_NGPD: Tensor,
    table_RM: Tensor,
    length_R: Tensor,
    page: int,
    *,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    keys = dequantise(k_NGPD) if k_NGPD.dtype is torch.int8 else k_NGPD.float()
    rows, _, size = q_RHD.shape
    most = -(-int(length_R.max()) // page) if rows else 0
    mass_RC = torch.zeros(rows, most)
    for row, length in enumerate(length_R.tolist()):
        used = table_RM[row, : -(-length // keys.shape[2])].long()
        k_GLD = keys[used].transpose(0, 1).reshape(keys.shape[1], -1, size)[:, :length]
        q_GJD = q_RHD[row].view(keys.shape[1], -1, size)
        logit_HL = (torch.einsum("gjd,gld->gjl", q_GJD, k_GLD) * scale).flatten(0, 1)
        if softcap:
            logit_HL = softcap * torch.tanh(logit_HL / softcap)
        mass_C = by_page(logit_HL.softmax(-1).amax(0), page)
        mass_RC[row, : len(mass_C)] = mass_C
    return mass_RC


def by_page(mass_L: Tensor, page: int) -> Tensor:
    """Sums [..., C] over pages; the last page may end early."""
    length = mass_L.shape[-1]
    return pad(mass_L, (0, -length % page)).unflatten(-1, (-1, page)).sum(-1)


def top_pages(mass_RC: Tensor, pages_R: Tensor, rule: PageRule) -> Tensor:
    """int64 [R, pages], ascending: the best pages of rows that have ``pages_R`` >= ``rule.pages`` of them."""
    index_C = torch.arange(mass_RC.shape[1])
    mass_RC = mass_RC - 1e-7 * index_C
    left_RC = pages_R[:, None] - index_C  # pages from here to the end
    mass_RC = mass_RC.masked_fill((left_RC > 0) & (left_RC <= rule.recent), float("inf"))
    if rule.first:
        mass_RC[:, 0] = float("inf")
    mass_RC = mass_RC.masked_fill(left_RC <= 0, float("-inf"))
    order_RC = mass_RC.sort(dim=1, descending=True, stable=True).indices
    return order_RC[:, : rule.pages].sort(dim=1).values
