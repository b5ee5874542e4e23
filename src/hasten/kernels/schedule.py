"""A step's attention, planned once and run per layer: which worker reads which chunk, and how the parts are joined.

The scheduler is FlashInfer's (Ye et al., arXiv 2501.01005, section 3.3.1); see native/src/kernels/flashinfer_plan.cpp.
A schedule belongs to a list of pieces (see `PieceWork`), to head counts and to a number of workers; what it computes
does not depend on how many threads run it.

Legend: T query rows, H query heads, G kv heads, D head size, N pages, P page size, J pieces, E entries, C page
references, W workers, K tasks, U workspace slots, R rows in several parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hasten.kernels.attention import cap_of, float_rows, pages_of
from hasten.kernels.native import native

__all__ = ["MAX_TILE", "MIN_CHUNK", "Schedule", "ScheduleFacts", "default_workers"]

Ints = npt.NDArray[np.int64]

# Fewer tokens than this per chunk and the join costs more than the balance gains (the reference's shortest chunk).
MIN_CHUNK = 128
# Query vectors (rows x heads of a kv head) of a tile: the most the kernel holds, and what it does best.
MAX_TILE = 96
WORKERS_PER_THREAD = 4


def default_workers() -> int:
    """Virtual workers to plan for: a few per thread, so that a thread that is held up hands work over."""
    threads = torch.get_num_threads()
    return 1 if threads == 1 else threads * WORKERS_PER_THREAD


@dataclass(frozen=True)
class ScheduleFacts:
    """What a schedule decided, for tests and reports. All int64 but the costs.

    task_K7: piece, first entry, end entry, kv head, first token, end token and workspace slot (-1: written through)
        of each task, worker by worker. worker_start_W1 cuts it. cost_K and load_W: the cost model's nanoseconds.
    part_row_R, part_start_R1, part_slot: rows that are joined and the slots of their parts.
    """

    task_K7: Ints
    cost_K: npt.NDArray[np.float64]
    worker_start_W1: Ints
    load_W: npt.NDArray[np.float64]
    part_row_R: Ints
    part_start_R1: Ints
    part_slot: Ints
    slots: int
    first_E: Ints
    limit_E: Ints

    @property
    def unevenness(self) -> float:
        """Largest over mean worker load."""
        mean = float(self.load_W.mean())
        return 1.0 if mean == 0 else float(self.load_W.max()) / mean


class Schedule:
    """The plan of one list of pieces.

    page_C, page_start_J1, base_J, row_start_J1, row_E, first_E, limit_E: int64, see `hasten.attention.pieces.Pieces`.
    rows: T. balanced=False: the static schedule that others are compared with (tasks in order, as many for each
    worker, nothing cut). costs: the six constants of the cost model (`Costs` in attend_work.h); empty for the
    calibrated ones.
    Raises ValueError for lists that do not fit each other.
    """

    __slots__ = ("_handle", "groups", "heads", "module", "page_size", "rows", "workers")

    def __init__(
        self,
        page_C: Ints,
        page_start_J1: Ints,
        base_J: Ints,
        row_start_J1: Ints,
        row_E: Ints,
        first_E: Ints,
        limit_E: Ints,
        *,
        page_size: int,
        rows: int,
        heads: int,
        kv_heads: int,
        workers: int,
        min_chunk: int = MIN_CHUNK,
        tile: int = MAX_TILE,
        balanced: bool = True,
        costs: Sequence[float] = (),
        module: ModuleType | None = None,
    ) -> None:
        self.module = native() if module is None else module
        self.page_size, self.rows, self.workers = page_size, rows, workers
        self.heads, self.groups = heads, kv_heads
        lists = (page_C, page_start_J1, base_J, row_start_J1, row_E, first_E, limit_E)
        self._handle: Any = self.module.attend_schedule(
            *(np.ascontiguousarray(x, np.int64) for x in lists),
            page_size,
            rows,
            heads,
            kv_heads,
            workers,
            min_chunk,
            tile,
            balanced,
            list(costs),
        )

    @property
    def handle(self) -> Any:
        """The native object."""
        return self._handle

    def moved(self, limit_T: Ints, window: int | None) -> Schedule:
        """The same chunks on the same workers, for rows that now see the absolute tokens [limit - window, limit).

        Entries keep their first token when there is no window. Right as long as no piece needs more pages.
        """
        out = object.__new__(Schedule)
        out.module, out.page_size, out.rows, out.workers = (
            self.module,
            self.page_size,
            self.rows,
            self.workers,
        )
        out.heads, out.groups = self.heads, self.groups
        limits = np.ascontiguousarray(limit_T, np.int64)
        out._handle = self.module.schedule_moved(self._handle, limits, -1 if window is None else window)
        return out

    def run(
        self, q_THD: Tensor, k_NGPD: Tensor, v_NGPD: Tensor, scale: float, softcap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(out_THD, lse_TH)`` of all rows, float32; a row that sees nothing gets 0 and -inf.

        q_THD: float32, contiguous. Pages: `hasten.kernels.pages`, contiguous. Raises TypeError for a wrong dtype and
        ValueError for shapes other than the schedule's, or a page outside the pool.
        """
        rows, heads, size = float_rows("q_THD", q_THD)
        pages, groups, page, kind = pages_of(q_THD, k_NGPD, v_NGPD)
        out = torch.empty((rows, heads, size))
        lse = torch.empty((rows, heads))
        self.module.schedule_run(
            self._handle,
            q_THD.data_ptr(),
            k_NGPD.data_ptr(),
            v_NGPD.data_ptr(),
            out.data_ptr(),
            lse.data_ptr(),
            rows,
            heads,
            groups,
            size,
            pages,
            page,
            kind,
            scale,
            cap_of(softcap),
        )
        return out, lse

    def facts(self) -> ScheduleFacts:
        """What was decided."""
        raw = self.module.schedule_facts(self._handle)
        tasks = np.array([t[:7] for t in raw["tasks"]], np.int64).reshape(-1, 7)
        ints = {
            name: np.array(raw[name], np.int64)
            for name in ("worker_start", "part_row", "part_start", "part_slot", "first", "limit")
        }
        return ScheduleFacts(
            tasks,
            np.array([t[7] for t in raw["tasks"]], np.float64),
            ints["worker_start"],
            np.array(raw["load"], np.float64),
            ints["part_row"],
            ints["part_start"],
            ints["part_slot"],
            int(raw["slots"]),
            ints["first"],
            ints["limit"],
        )
