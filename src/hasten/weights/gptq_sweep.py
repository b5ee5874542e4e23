"""The GPTQ column sweep: round one input column at a time, pushing its error into the columns not yet rounded.

All output rows go in parallel; columns go in order, in lazily updated blocks (section 3.3, step 2). With
(H + damping I)^-1 = U^T U (see `hasten.weights.hessian`):

    q_j = grid(w_j);  e_j = (w_j - q_j) / U_jj;  w_k -= e_j U_jk for k > j

Inside a block of B columns only the block is updated; the rest follows with one matrix product per block. The same
trick once more inside the block: rank-one updates reach `INNER` columns, which keeps them in cache.
Blocks are cut so that a group always starts where every one of its columns is up to date: the blocked and the
unblocked sweep then do the same arithmetic even when groups are refitted on compensated weights. It is done in
float64: one rounding that falls the other way changes all that follows, and the sweep is a small part of the time.
Source: GPTQ (arXiv 2210.17323), algorithm 1.

With ``two_of_four`` the same sweep prunes: when it reaches four columns, each row gives up the two whose removal costs
least, w_j^2 / U_jj^2, and their error moves on like any other. Source: SparseGPT (arXiv 2301.00774), sections 3.3, 3.4.

Legend: I inputs (columns), O outputs (rows), G groups, K columns of a slice, B columns of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from hasten.core.errors import IntegrityError, SettingError, UnsupportedError
from hasten.weights.gptq_grid import Grid, UniformGrid
from hasten.weights.hessian import Factor, inverse_factor, quadratic

INNER = 8


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight on a grid. codes_OI: uint8. a_OG, b_OG: float32 grid parameters of each row's groups.

    group_I: int64, the group of every input column; ``i // group_size`` unless columns were reordered.
    """

    grid: Grid
    codes_OI: Tensor
    a_OG: Tensor
    b_OG: Tensor
    group_I: Tensor

    def dequantize(self) -> Tensor:
        """The exact float32 weight [O, I]."""
        a_OI, b_OI = self.a_OG[:, self.group_I], self.b_OG[:, self.group_I]
        return self.grid.decode(self.codes_OI.to(torch.float32), a_OI, b_OI)

    @property
    def ordered(self) -> bool:
        """Whether groups are runs of neighbouring columns (no gather at run time)."""
        return bool((self.group_I.diff() >= 0).all())

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """The output rows [start, stop) as a weight of their own (a part of a fused layer)."""
        return QuantizedWeight(
            self.grid, self.codes_OI[start:stop], self.a_OG[start:stop], self.b_OG[start:stop], self.group_I
        )


@dataclass(frozen=True)
class SweepReport:
    """What one layer's quantisation did.

    loss: sum of (w - q)^2 / (2 U_jj^2), equal to tr(D (H + damping) D^T) / 2.
    error, rtn_error: tr(D H D^T) / tr(W H W^T) of GPTQ and of plain rounding on the same grid: the share of the
    layer's mean squared output that is lost on the calibration data.
    percdamp: the dampening that was used. dead: inputs that never fired.
    """

    loss: float
    error: float
    rtn_error: float
    percdamp: float
    dead: int


def group_count(inputs: int, group_size: int | None) -> int:
    """Groups of one row; a last group shorter than ``group_size`` counts."""
    return 1 if group_size is None else -(-inputs // group_size)


def _spans(start: int, end: int, group: int, block: int) -> Iterator[tuple[int, int]]:
    """[start, end) in blocks of at most ``block`` columns: whole groups when one fits, else pieces that end with it."""
    whole = block // group * group
    while start < end:
        stop = start + whole if whole else min(start + block, (start // group + 1) * group)
        yield start, min(stop, end)
        start = stop


def _check(w_OI: Tensor, group_size: int | None, blocksize: int) -> None:
    if w_OI.dim() != 2 or 0 in w_OI.shape:
        raise UnsupportedError(f"GPTQ needs a non-empty weight [outputs, inputs], not {tuple(w_OI.shape)}")
    if group_size is not None and group_size < 1:
        raise SettingError(f"gptq.group_size = {group_size}: must be positive, or None for one group per row")
    if blocksize < 1:
        raise SettingError(f"gptq.blocksize = {blocksize}: must be positive")
    if not torch.isfinite(w_OI).all():
        raise IntegrityError("the weights hold NaN or infinity; the checkpoint is damaged")


def _fit_groups(
    w_IO: Tensor, grid: Grid, group: int, upper_of: Callable[[slice], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Parameters [G, O] of runs of ``group`` neighbouring columns. upper_of: the factor that weighs a run's errors."""
    fitted = []
    for start in range(0, w_IO.shape[0], group):
        run = slice(start, min(start + group, w_IO.shape[0]))
        fitted.append(_fit(grid, w_IO[run], None if upper_of is None else upper_of(run)))
    return torch.stack([a_O for a_O, _ in fitted]), torch.stack([b_O for _, b_O in fitted])


def _fit(grid: Grid, w_KO: Tensor, upper_KK: Tensor | None) -> tuple[Tensor, Tensor]:
    return grid.fit(w_KO) if upper_KK is None else cast(UniformGrid, grid).fit(w_KO, upper_KK)


def _keep_two(w_KO: Tensor, cost_K: Tensor) -> Tensor:
    """bool [K, O]: in each four columns, the two of a row whose removal would cost most; of fewer at the end, half
    (rounded up). cost_K: of a unit weight."""
    score_KO = w_KO.square() * cost_K[:, None]
    whole = len(score_KO) // 4 * 4
    parts = [score_KO[:whole].unflatten(0, (-1, 4))] if whole else []
    if whole < len(score_KO):
        parts.append(score_KO[None, whole:])
    kept = []
    for score_QFO in parts:
        best_QHO = score_QFO.topk(-(-score_QFO.shape[1] // 2), dim=1).indices
        kept.append(torch.zeros_like(score_QFO, dtype=torch.bool).scatter_(1, best_QHO, True).flatten(0, 1))
    return torch.cat(kept)


def _check_options(grid: Grid, blocksize: int, clip: bool, two_of_four: bool) -> None:
    if clip and not isinstance(grid, UniformGrid):
        raise SettingError("the search for a clipping threshold needs a uniform grid")
    if two_of_four and (not isinstance(grid, UniformGrid) or not grid.symmetric):
        raise SettingError("2:4 sparse weights need a symmetric grid, which has an exact zero")
    if two_of_four and blocksize % 4:
        raise UnsupportedError(
            f"2:4 sparse weights come in fours: blocks of {blocksize} must be multiples of 4"
        )


def round_to_nearest(w_OI: Tensor, grid: Grid, group_size: int | None = None) -> QuantizedWeight:
    """Plain rounding (RTN) of a float32 weight [O, I]: the baseline on the same grid."""
    _check(w_OI, group_size, 1)
    inputs = w_OI.shape[1]
    group = inputs if group_size is None else min(group_size, inputs)
    w_IO = w_OI.to(torch.float64).t().contiguous()
    a_GO, b_GO = _fit_groups(w_IO, grid, group)
    group_I = torch.arange(inputs) // group
    codes_IO = torch.cat(
        [
            grid.encode(part_KO, a_GO[g], b_GO[g]).to(torch.uint8)
            for g, part_KO in enumerate(w_IO.split(group))
        ]
    )
    return QuantizedWeight(
        grid, codes_IO.t().contiguous(), a_GO.t().float().contiguous(), b_GO.t().float().contiguous(), group_I
    )


def sweep(
    w_OI: Tensor,
    factor: Factor,
    grid: Grid,
    group_size: int | None = None,
    *,
    blocksize: int = 128,
    perm_I: Tensor | None = None,
    static_groups: bool = False,
    clip: bool = False,
    two_of_four: bool = False,
) -> tuple[QuantizedWeight, float]:
    """Quantise ``w_OI`` with a factor of the (permuted) Hessian; return the weight and the loss.

    perm_I: order in which columns are visited; ``factor`` must be of H[perm][:, perm]. Without
    ``static_groups`` a group is a run of *visited* columns and its parameters are fitted when the sweep reaches
    it; with it, groups are runs of columns as stored, fitted on the original weight.
    clip: search every group's range (`UniformGrid.fit`). two_of_four: prune (see the top of the file).
    Raises `IntegrityError` on NaN, `UnsupportedError` when shapes do not match.
    """
    inputs = w_OI.shape[-1]
    group = inputs if group_size is None else min(group_size, inputs)
    if two_of_four and perm_I is not None:
        raise SettingError("2:4 sparse weights are swept in order: four neighbours must come together")
    if two_of_four and (inputs % 4 or group % 4):
        raise UnsupportedError(
            f"2:4 sparse weights come in fours: {inputs} inputs and groups of {group} must be multiples of 4"
        )
    weight, loss, _ = partial_sweep(
        w_OI,
        factor,
        grid,
        group_size,
        blocksize=blocksize,
        perm_I=perm_I,
        static_groups=static_groups,
        clip=clip,
        two_of_four=two_of_four,
    )
    return weight, loss


def partial_sweep(
    w_OI: Tensor,
    factor: Factor,
    grid: Grid,
    group_size: int | None = None,
    *,
    blocksize: int = 128,
    perm_I: Tensor | None = None,
    static_groups: bool = False,
    clip: bool = False,
    two_of_four: bool = False,
    frozen: int = 0,
) -> tuple[QuantizedWeight, float, Tensor]:
    """`sweep` that leaves the last ``frozen`` visited columns as they are, but for the errors moved into them.

    Returns the weight (of the other columns, in the order they are stored in), the loss, and the frozen columns
    float32 [O, frozen] in the order of visits. two_of_four: neighbours are those visited together; what is left over
    at the end loses half (rounded down).
    """
    _check(w_OI, group_size, blocksize)
    outputs, inputs = w_OI.shape
    if factor.upper_II.shape != (inputs, inputs):
        raise UnsupportedError(
            f"a factor of {factor.upper_II.shape[0]} inputs cannot quantise a weight of {inputs} inputs"
        )
    _check_options(grid, blocksize, clip, two_of_four)
    if not 0 <= frozen <= inputs or (frozen and group_size is not None):
        raise UnsupportedError(
            f"{frozen} of {inputs} columns frozen in groups of {group_size}: frozen columns need one group per row"
        )
    order_I = torch.arange(inputs) if perm_I is None else perm_I
    w_IO = w_OI.to(torch.float64)[:, order_I].t().contiguous()
    inputs -= frozen
    w_IO[:inputs][factor.dead_I[:inputs]] = 0
    # Columns by their place among those that are stored.
    order_I = order_I[:inputs].argsort().argsort() if frozen else order_I
    group = inputs if group_size is None else min(group_size, inputs)
    upper_II, diagonal = factor.upper_II, factor.upper_II.diagonal().tolist()
    cost_I = upper_II.diagonal().square().reciprocal()
    groups = group_count(inputs, group)
    fixed = static_groups or group == inputs  # one group per row is fitted before the sweep in any case
    if fixed:
        original_IO = torch.empty_like(w_IO[:inputs])
        kept_IO = w_IO[:inputs]
        if two_of_four:  # scales are for what will be kept, as far as that is known now
            kept_IO = kept_IO * _keep_two(kept_IO, cost_I[:inputs])
        original_IO[order_I] = kept_IO
        visit_I = torch.argsort(order_I)

        def upper_of(run: slice) -> Tensor:
            # Every other column may compensate: (H^-1)_KK = R^T R takes the place of the block U^T U.
            columns_IK = upper_II[:, visit_I[run]]
            return torch.linalg.cholesky(columns_IK.t() @ columns_IK, upper=True)

        a_GO, b_GO = _fit_groups(original_IO, grid, group, upper_of if clip else None)
        group_of_visit = (order_I // group).tolist()
    else:
        a_GO, b_GO = (torch.empty(groups, outputs, dtype=torch.float64) for _ in range(2))
        group_of_visit = (torch.arange(inputs) // group).tolist()
    codes_IO = torch.empty(inputs, outputs, dtype=torch.uint8)
    loss = 0.0
    run = inputs if fixed else group
    for start, stop in _spans(0, inputs, run, blocksize):
        error_BO = torch.empty(stop - start, outputs, dtype=torch.float64)
        for first, last in _spans(start, stop, run, INNER):
            for j in range(first, last):
                g = group_of_visit[j]
                if not fixed and j % group == 0:
                    part_KO, run_K = w_IO[j : j + group], slice(j, j + group)
                    if two_of_four:
                        part_KO = part_KO * _keep_two(part_KO, cost_I[run_K])
                    a_GO[g], b_GO[g] = _fit(grid, part_KO, upper_II[run_K, run_K] if clip else None)
                code_O = grid.encode(w_IO[j], a_GO[g], b_GO[g])
                if two_of_four:
                    if j % 4 == 0:
                        four = slice(j, min(j + 4, inputs))
                        keep_4O = _keep_two(w_IO[four], cost_I[four])
                    code_O = torch.where(keep_4O[j % 4], code_O, b_GO[g])
                codes_IO[j] = code_O
                error_O = error_BO[j - start]
                torch.sub(w_IO[j], grid.decode(code_O, a_GO[g], b_GO[g]), out=error_O).div_(diagonal[j])
                if j + 1 < last:
                    w_IO[j + 1 : last].addr_(upper_II[j, j + 1 : last], error_O, alpha=-1)
            if last < stop:
                w_IO[last:stop].addmm_(
                    upper_II[first:last, last:stop].t(), error_BO[first - start : last - start], alpha=-1
                )
        if stop < len(w_IO):
            w_IO[stop:].addmm_(upper_II[start:stop, stop:].t(), error_BO, alpha=-1)
        loss += 0.5 * float(error_BO.square().sum())
    stored_IO = torch.empty_like(codes_IO)
    stored_IO[order_I] = codes_IO
    group_I = torch.empty(inputs, dtype=torch.int64)
    group_I[order_I] = torch.tensor(group_of_visit)
    weight = QuantizedWeight(
        grid,
        stored_IO.t().contiguous(),
        a_GO.t().float().contiguous(),
        b_GO.t().float().contiguous(),
        group_I,
    )
    return weight, loss, w_IO[inputs:].t().float().contiguous()


def quantize(
    w_OI: Tensor,
    hessian_II: Tensor,
    grid: Grid,
    group_size: int | None = None,
    *,
    act_order: bool = False,
    static_groups: bool = False,
    percdamp: float = 0.01,
    blocksize: int = 128,
    clip: bool = False,
    two_of_four: bool = False,
) -> tuple[QuantizedWeight, SweepReport]:
    """GPTQ of one float32 weight [O, I] under the Hessian [I, I] of its inputs, and how well it went.

    act_order: visit columns by falling diag(H), so that the inputs that matter most are rounded while there
    is still something left to compensate with. See `sweep`, `inverse_factor` for the errors raised.
    """
    _check(w_OI, group_size, blocksize)
    perm_I = torch.argsort(hessian_II.diagonal(), descending=True, stable=True) if act_order else None
    swept_II = hessian_II if perm_I is None else hessian_II[perm_I][:, perm_I]
    factor = inverse_factor(swept_II, percdamp)
    weight, loss = sweep(
        w_OI,
        factor,
        grid,
        group_size,
        blocksize=blocksize,
        perm_I=perm_I,
        static_groups=static_groups,
        clip=clip,
        two_of_four=two_of_four,
    )
    w_OI = w_OI.to(torch.float32)
    power = quadratic(w_OI, hessian_II) or 1.0
    # Plain pruning, by magnitude, stands beside SparseGPT's as plain rounding does beside GPTQ's.
    plain_OI = (w_OI.t() * _keep_two(w_OI.t(), torch.ones(w_OI.shape[1]))).t() if two_of_four else w_OI
    nearest = round_to_nearest(plain_OI, grid, group_size)
    return weight, SweepReport(
        loss=loss,
        error=quadratic(w_OI - weight.dequantize(), hessian_II) / power,
        rtn_error=quadratic(w_OI - nearest.dequantize(), hessian_II) / power,
        percdamp=factor.percdamp,
        dead=int(factor.dead_I.sum()),
    )
