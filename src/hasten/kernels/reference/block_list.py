"""`hasten.kernels.block_list` in plain PyTorch, in the order the papers write it down: masks in token space, float64.

Legend: see `hasten.kernels.block_list`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.kernels.block_list import TILE, BlockLists, Cached, Codes, query_blocks
from hasten.kernels.pages import dequantise


def tokens(pages_NGPD: Tensor, table_M: Tensor, length: int) -> Tensor:
    """float32 [G, L, D]: keys or values in token order."""
    page = pages_NGPD.shape[2]
    found = pages_NGPD[table_M[: -(-length // page)].long()]
    found = dequantise(found) if found.dtype is torch.int8 else found.float()
    return found.transpose(0, 1).flatten(1, 2)[:, :length]


def seen(lists: BlockLists, rows: int, length: int, window: int | None = None) -> Tensor:
    """bool [X, T, L]: which tokens each row reads."""
    queries = query_blocks(rows, length, lists.query_block)
    order_XL = (
        lists.order_XL if lists.order_XL is not None else torch.arange(length).expand(lists.choices, -1)
    )
    position_T = torch.arange(length - rows, length)
    query_T = position_T // lists.query_block - (length - rows) // lists.query_block
    out_XTL = torch.zeros(lists.choices, rows, length, dtype=torch.bool)
    for x in range(lists.choices):
        for i in range(queries):
            start, stop = lists.start_J1[x * queries + i : x * queries + i + 2].tolist()
            for block in lists.block_C[start:stop].tolist():
                chosen = order_XL[x, block * lists.block : (block + 1) * lists.block].long()
                out_XTL[x, (query_T == i).nonzero(), chosen] = True
    span_L = torch.arange(length)
    out_XTL &= span_L <= position_T[:, None]
    if window is not None:
        out_XTL &= span_L > position_T[:, None] - window
    return out_XTL


def attend_blocks(
    q_THD: Tensor,
    cached: Cached,
    lists: BlockLists,
    scale: float,
    softcap: float | None = None,
    *,
    window: int | None = None,
    codes: Codes | None = None,
) -> tuple[Tensor, Tensor]:
    """``(out_THD, lse_TH)`` in float64."""
    rows, heads, _ = q_THD.shape
    k_GLD = tokens(cached.k_NGPD, cached.table_M, cached.length).double()
    v_GLD = tokens(cached.v_NGPD, cached.table_M, cached.length).double()
    q_THD = q_THD.double()
    if codes is not None:
        k_GLD = decode(codes, cached.length)
        q_THD = rounded_rows(q_THD, cached.length, lists.query_block, codes.limit)
    repeat = heads // k_GLD.shape[0]
    logits = torch.einsum("thd,hld->thl", q_THD, k_GLD.repeat_interleave(repeat, 0)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    seen_XTL = seen(lists, rows, cached.length, window)
    hidden_THL = ~seen_XTL.repeat_interleave(heads // lists.choices, 0).transpose(0, 1)
    logits = logits.masked_fill(hidden_THL, -torch.inf)
    out = torch.einsum("thl,hld->thd", logits.softmax(-1), v_GLD.repeat_interleave(repeat, 0))
    return out, logits.logsumexp(-1)


def decode(codes: Codes, length: int) -> Tensor:
    """float64 [G, L, D]: code times scale."""
    code = codes.code_GWD2.double().transpose(2, 3).flatten(3)  # [G, W, 64, D]
    return (code * codes.scale_GW.double()[..., None, None]).flatten(1, 2)[:, :length]


def rounded_rows(q_THD: Tensor, length: int, block: int, limit: int) -> Tensor:
    """Queries rounded to codes of at most ``limit`` with a scale per head and query block."""
    rows = q_THD.shape[0]
    out = q_THD.clone()
    block_T = torch.arange(length - rows, length) // block
    for b in block_T.unique().tolist():
        part = q_THD[block_T == b]
        scale = part.abs().amax((0, 2), keepdim=True) / limit + 1e-7
        out[block_T == b] = _round(part / scale) * scale
    return out


def _round(x: Tensor) -> Tensor:
    return x.sign() * (x.abs() + 0.5).floor()


def quantise_keys(cached: Cached, center_GD: Tensor, limit: int) -> Tensor:
    """float32 [G, L, D]: the keys less the centre, rounded per tile of 64 tokens."""
    k_GLD = tokens(cached.k_NGPD, cached.table_M, cached.length) - center_GD[:, None]
    out = torch.empty_like(k_GLD)
    for start in range(0, cached.length, TILE):
        part = k_GLD[:, start : start + TILE]
        scale = part.abs().amax((1, 2), keepdim=True) / limit + 1e-7
        out[:, start : start + TILE] = _round(part / scale) * scale
    return out


def probe_keys(
    q_THD: Tensor, cached: Cached, count: int, scale: float, softcap: float | None = None
) -> Tensor:
    """float64 [H, count]: see the kernel."""
    k_GLD = tokens(cached.k_NGPD, cached.table_M, cached.length)[:, :count].double()
    logits = torch.einsum("thd,hld->thl", q_THD.double(), _per_head(k_GLD, q_THD.shape[1])) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.softmax(-1).mean(0)


def order_blocks(score_XL: Tensor, length: int, block: int, segment: int) -> Tensor:
    """int64 [X, length]: sort each segment, then each block by position."""
    heads, count = score_XL.shape
    order_XL = torch.arange(length).repeat(heads, 1)
    score = score_XL.nan_to_num(nan=-torch.inf).view(heads, count // segment, segment)
    ranked = score.argsort(stable=True, dim=-1, descending=True)
    ranked = ranked.view(heads, count // segment, segment // block, block).sort(-1).values.flatten(2)
    base = torch.arange(0, count, segment)[:, None]
    order_XL[:, :count] = (ranked + base).flatten(1)
    return order_XL


def pool(x_XLD: Tensor, block: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """(mean [X, blocks, D], mean of the explicit Gram matrix of normalised vectors [X, blocks]), float64."""
    block_L = torch.arange(first, first + x_XLD.shape[1]) // block
    means, similarities = [], []
    for b in block_L.unique().tolist():
        part = x_XLD[:, block_L == b].double()
        normal = torch.nn.functional.normalize(part, dim=-1, eps=1e-300)
        means.append(part.mean(1))
        similarities.append((normal @ normal.transpose(1, 2)).mean((1, 2)))
    return torch.stack(means, 1), torch.stack(similarities, 1)


def _per_head(x_GLD: Tensor, heads: int) -> Tensor:
    return x_GLD.repeat_interleave(heads // x_GLD.shape[0], 0)
