"""TokenSelect (Wu et al., arXiv 2411.02886): the votes of a few query rows for cached tokens, and copies with
compact positions.

Keys lie *unrotated* in the pages. A unit is a run of consecutive query rows of one sequence; it chooses for itself.

- `token_turn`: the rows rotated to where they stand behind the tokens that their unit reads, and the unit's
fingerprint.
- `token_votes`: what the heads' votes for every candidate come to. `token_choose`: the winners, or those of an earlier
  unit where the two fingerprints are alike.
- `token_gather`: copies of chosen tokens in consecutive pages, each key rotated to its rank among the chosen.

The candidates of a unit of ``length`` tokens, of which it reads the last ``local`` anyway, are [first, length - local).

Legend: U units, T query rows, H query heads, G kv heads, D head size, F = H D, R rotated dimensions, A table rows,
N pages, P page size, M pages of a sequence, C slots of kept choices, K chosen tokens, W longest list, Z pages
of a copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hasten.kernels.attention import index_array
from hasten.kernels.native import native
from hasten.kernels.pages import page_kind

__all__ = ["Ballot", "Kept", "Turns", "token_choose", "token_gather", "token_turn", "token_votes"]

VOTES = ("soft", "sum", "topk")


@dataclass(frozen=True)
class Ballot:
    """How heads vote.

    vote: "soft" sums the heads' softmax over the candidates (section 3.3), "sum" their logits, "topk" counts the heads
        among whose ``k`` largest logits a token is. k: winners. scale: of logits. pool: odd width of the max over
        neighbouring candidates, 0 for none. Raises ValueError for what is none of these.
    """

    k: int
    vote: Literal["soft", "sum", "topk"] = "soft"
    scale: float = 1.0
    pool: int = 0

    def __post_init__(self) -> None:
        if self.vote not in VOTES:
            raise ValueError(f"vote must be one of {', '.join(VOTES)}, not {self.vote!r}")
        if self.k < 0:
            raise ValueError(f"k must not be negative, not {self.k}")
        if self.pool < 0 or (self.pool and self.pool % 2 == 0):
            raise ValueError(f"pool must be 0 or odd, not {self.pool}")


@dataclass(frozen=True)
class Turns:
    """Rotary tables float32 [A, R]; unit u's position 0 is table row ``offset_U[u]`` (int64)."""

    cos_AR: Tensor
    sin_AR: Tensor
    offset_U: Tensor

    def arrays(self) -> tuple[Any, Any, Any]:
        for name, table in (("cos_AR", self.cos_AR), ("sin_AR", self.sin_AR)):
            if table.dtype is not torch.float32:
                raise TypeError(f"{name} must be float32, not {table.dtype}")
            if table.dim() != 2 or table.shape != self.cos_AR.shape or not table.is_contiguous():
                raise ValueError(f"{name} must be contiguous [A, R], not shape {tuple(table.shape)}")
        if self.offset_U.dtype is not torch.int64:
            raise TypeError(f"offset_U must be int64, not {self.offset_U.dtype}")
        return self.cos_AR.numpy(), self.sin_AR.numpy(), self.offset_U.numpy()

    def fits(self, size: int) -> None:
        rotated = self.cos_AR.shape[1]
        if rotated % 2 or rotated > size:
            raise ValueError(f"cos_AR and sin_AR must have an even width up to {size}, not {rotated}")


@dataclass(frozen=True)
class Kept:
    """Choices of earlier units, updated in place.

    known_CF: float32, their fingerprints. kept_CK: int32, what they chose. made_C: int32, how many tokens there were
    (0: nothing is kept).
    """

    known_CF: Tensor
    kept_CK: Tensor
    made_C: Tensor


def _pool(k_NGPD: Tensor, heads: int, size: int) -> tuple[int, int, int, int]:
    kind, _ = page_kind(k_NGPD, k_NGPD, int8=False)
    if k_NGPD.dim() != 4 or not k_NGPD.is_contiguous():
        raise ValueError(f"k_NGPD must be contiguous [N, G, P, D], not shape {tuple(k_NGPD.shape)}")
    pages, groups, page, stored = k_NGPD.shape
    if stored != size or groups == 0 or heads == 0 or heads % groups:
        raise ValueError(f"pages of {groups} heads of size {stored} do not fit {heads} heads of size {size}")
    return pages, groups, page, kind


def _means(mean_UHD: Tensor) -> Any:
    if mean_UHD.dtype is not torch.float32:
        raise TypeError(f"mean_UHD must be float32, not {mean_UHD.dtype}")
    if mean_UHD.dim() != 3 or not mean_UHD.is_contiguous():
        raise ValueError(f"mean_UHD must be contiguous [U, H, D], not shape {tuple(mean_UHD.shape)}")
    return mean_UHD.numpy()


def token_turn(
    q_THD: Tensor, row_start_U1: Tensor, length_U: Tensor, judged_U: Tensor, far: int, turns: Turns
) -> tuple[Tensor, Tensor]:
    """``(q_THD, mean_UHD)``, both float32: rotated queries and fingerprints (zero where not ``judged_U``).

    Row i of the c rows of a unit that reads ``length`` tokens goes to position length - c + i. The fingerprint is the
    mean of the rows, each rotated to ``far + i`` (section 3.2; reference code). q_THD: float32, rows may lie apart, the
    heads of a row may not. Index tensors int32. Raises TypeError for a wrong dtype, ValueError for what does not fit.
    """
    if q_THD.dtype is not torch.float32:
        raise TypeError(f"q_THD must be float32, not {q_THD.dtype}")
    if q_THD.dim() != 3 or (q_THD.numel() and q_THD.stride()[1:] != (q_THD.shape[2], 1)):
        raise ValueError(f"q_THD must be [T, H, D] with contiguous heads, not shape {tuple(q_THD.shape)}")
    rows, heads, size = q_THD.shape
    turns.fits(size)
    if far < 0:
        raise ValueError(f"far must not be negative, not {far}")
    cos, sin, offset = turns.arrays()
    out, mean = torch.empty(rows, heads, size), torch.empty(length_U.numel(), heads, size)
    native().token_turn(
        q_THD.data_ptr(),
        q_THD.stride(0),
        rows,
        heads,
        size,
        index_array("row_start_U1", row_start_U1, 1),
        index_array("length_U", length_U, 1),
        index_array("judged_U", judged_U, 1),
        offset,
        far,
        cos,
        sin,
        out.data_ptr(),
        mean.data_ptr(),
    )
    return out, mean


def token_votes(
    mean_UHD: Tensor, k_NGPD: Tensor, table_UM: Tensor, first: int, end_U: Tensor, ballot: Ballot
) -> Tensor:
    """score_UL float32: entry t is the score of token ``first + t``; undefined from ``end_U - first`` on.

    Pages float32 or bfloat16; each key is read once for all query heads of its kv head (head h reads kv head
    h // (H / G)). Raises TypeError for a wrong dtype, ValueError for shapes or page ids that do not fit.
    """
    mean = _means(mean_UHD)
    pages, groups, page, kind = _pool(k_NGPD, *mean_UHD.shape[1:])
    if first < 0:
        raise ValueError(f"first must not be negative, not {first}")
    longest = max(0, int(end_U.max()) - first) if end_U.numel() else 0
    score = torch.zeros(mean_UHD.shape[0], longest)
    native().token_votes(
        mean,
        k_NGPD.data_ptr(),
        pages,
        groups,
        page,
        kind,
        index_array("table_UM", table_UM, 2),
        first,
        index_array("end_U", end_U, 1),
        VOTES.index(ballot.vote),
        ballot.k,
        ballot.scale,
        ballot.pool,
        score.numpy(),
    )
    return score


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
    """Write the winners of every ``judged_U`` unit, ascending, at ``list_UW[u, first : first + K]``; returns
    the reuses.

    A ``reusable_U`` unit takes over what is kept in ``slot_U`` if the cosine of the two fingerprints is at least
    ``theta`` and at most ``most_apart`` tokens (-1: any number) came since; others choose, and are kept. Scores
    equal to three digits (11 bits of the mantissa): the later token wins. Index tensors int32. Raises TypeError
    and ValueError as `token_votes` does.
    """
    mean = _means(mean_UHD)
    pages, groups, page, kind = _pool(k_NGPD, *mean_UHD.shape[1:])
    if first < 0:
        raise ValueError(f"first must not be negative, not {first}")
    if kept.known_CF.dtype is not torch.float32:
        raise TypeError(f"known_CF must be float32, not {kept.known_CF.dtype}")
    return int(
        native().token_choose(
            mean,
            k_NGPD.data_ptr(),
            pages,
            groups,
            page,
            kind,
            index_array("table_UM", table_UM, 2),
            index_array("length_U", length_U, 1),
            index_array("local_U", local_U, 1),
            index_array("judged_U", judged_U, 1),
            index_array("reusable_U", reusable_U, 1),
            index_array("slot_U", slot_U, 1),
            first,
            VOTES.index(ballot.vote),
            ballot.k,
            ballot.scale,
            ballot.pool,
            theta,
            most_apart,
            kept.known_CF.numpy(),
            index_array("kept_CK", kept.kept_CK, 2),
            index_array("made_C", kept.made_C, 1),
            index_array("list_UW", list_UW, 2),
        )
    )


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
    """Copy the first ``count_U`` tokens of each list to pages ``u * target`` and on, key i rotated to position i.

    Both pools float32 or bfloat16 alike, with the same page size; index tensors int32. Raises TypeError for a wrong
    dtype, ValueError for shapes that do not fit or a token that has no page.
    """
    page_kind(k_NGPD, v_NGPD, int8=False)
    size = k_NGPD.shape[-1]
    pages, groups, page, kind = _pool(k_NGPD, k_NGPD.shape[1], size)
    turns.fits(size)
    for name, value in (("v_NGPD", v_NGPD), ("k_out_ZGPD", k_out_ZGPD), ("v_out_ZGPD", v_out_ZGPD)):
        if value.dtype is not k_NGPD.dtype:
            raise TypeError(f"{name} must be {k_NGPD.dtype} like k_NGPD, not {value.dtype}")
        if value.dim() != 4 or value.shape[1:] != k_NGPD.shape[1:] or not value.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous [pages, {groups}, {page}, {size}], not shape {tuple(value.shape)}"
            )
    if v_NGPD.shape != k_NGPD.shape or v_out_ZGPD.shape != k_out_ZGPD.shape:
        raise ValueError("key and value pages differ in number")
    cos, sin, offset = turns.arrays()
    native().token_gather(
        k_NGPD.data_ptr(),
        v_NGPD.data_ptr(),
        pages,
        groups,
        page,
        size,
        kind,
        index_array("table_UM", table_UM, 2),
        index_array("list_UW", list_UW, 2),
        index_array("count_U", count_U, 1),
        offset,
        cos,
        sin,
        target,
        k_out_ZGPD.shape[0],
        k_out_ZGPD.data_ptr(),
        v_out_ZGPD.data_ptr(),
    )
