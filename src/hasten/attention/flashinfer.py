"""`flashinfer`: block-sparse formats, a load-balanced plan, variants compiled when used.

Source: Ye, Chen, Lai, Lin, Zhang, Wang, Chen, Kasikci, Grover, Krishnamurthy, Ceze, "FlashInfer: Efficient and
Customizable Attention Engine for LLM Inference Serving", MLSys 2025, arXiv 2501.01005.

The scheduler plans every exact kernel of hasten, the default one included (`hasten.kernels.schedule`). The technique
adds composable formats: what sequences share is a level of its own, read once for all of them. `BatchAttention` is the
engine's attention for callers that bring their own formats and variants.

Legend: T rows, H query heads, G kv heads, D head size, B requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from hasten.attention.flashinfer_format import BlockSparse, levels, pieces_of
from hasten.attention.hydragen import HydragenKernel
from hasten.attention.kernel import AttentionKernel
from hasten.attention.layout import HeadShape, KVPages, StepLayout
from hasten.attention.pieces import PiecePlan, Pieces, Rows, finish, windowed
from hasten.core.technique import Technique
from hasten.kernels.schedule import default_workers
from hasten.kernels.variants import VANILLA, Batch, Variant, attend

if TYPE_CHECKING:
    from hasten.models.context import BuildContext


class FlashInfer(Technique):
    """Attention planned over composable block-sparse formats and shared out evenly to virtual workers."""

    slug = "flashinfer"
    slots = ("attention_kernel",)
    lossless = True

    composable: bool = Field(
        True, description="read shared pages as levels of their own, once for all sequences"
    )
    min_prefix: int = Field(128, ge=1, description="fewest tokens of a shared level")
    min_sharers: int = Field(2, ge=2, description="fewest sequences that read a level together")
    max_levels: int = Field(8, ge=1, description="most levels; deeper sharing is read per sequence")
    workers: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="virtual workers to plan for; by default four per thread, one on one thread",
    )

    def provide(self, slot: str, context: BuildContext) -> AttentionKernel:
        return FlashInferKernel(self)


class FlashInferKernel(HydragenKernel):
    """Plans the step as a list of formats; the tree behind them is kept as `HydragenKernel` keeps it."""

    def __init__(self, settings: FlashInfer) -> None:
        super().__init__(settings)
        self.workers = settings.workers
        self.composable = settings.composable

    def formats(self, rows: Rows, ids: tuple[int, ...]) -> list[BlockSparse]:
        """The step's formats: a level per depth of the prefix tree (if sequences share pages), then the suffixes."""
        if not self.composable or len(rows.length_S) < self.settings.min_sharers:
            return [BlockSparse.of_rows(rows)]
        return levels(rows, self.tree(rows, ids))

    def pieces(self, rows: Rows, layout: StepLayout) -> Pieces:
        return pieces_of(self.formats(rows, layout.sequence_ids))


class BatchAttention:
    """Plan once per step, run once per layer, with any formats and any variant.

    window: each row sees at most its last ``window`` tokens. workers: see `FlashInfer.workers`.
    """

    def __init__(self, shape: HeadShape, *, window: int | None = None, workers: int | None = None) -> None:
        if window is not None and window < 1:
            raise ValueError(f"window must be positive, not {window}")
        self.shape, self.window, self.workers = shape, window, workers
        self.planned = 0  # how often the scheduler ran
        self.formats: tuple[BlockSparse, ...] = ()
        self._plan: PiecePlan | None = None
        self._batch: Batch | None = None

    def plan(self, formats: Sequence[BlockSparse], rows: int) -> PiecePlan:
        """Plan ``rows`` query rows over the sum of ``formats``; the last format's blocks are the requests.

        The scheduler is skipped when only lengths within the pages changed since the last plan.
        """
        formats = tuple(formats)
        pieces = pieces_of(formats)
        limit = np.zeros(rows, np.int64)
        if len(pieces.row_E) and int(pieces.row_E.max()) >= rows:
            raise ValueError(f"a format names query row {int(pieces.row_E.max())}, but there are {rows}")
        np.maximum.at(limit, pieces.row_E, pieces.limit_E + pieces.base_J[pieces.piece_of_entry()])
        if self._plan is not None and self._plan.schedule.rows == rows and self._same(formats):
            if any(
                (a.last_page_len_B != b.last_page_len_B).any()
                for a, b in zip(formats, self.formats, strict=True)
            ):
                self._plan = self._plan.moved(limit, self.window)
        else:
            narrowed = windowed(pieces, limit, self.window)
            self._plan = finish(
                narrowed,
                rows,
                formats[0].page_size,
                self.shape.heads,
                self.shape.kv_heads,
                self.workers or default_workers(),
            )
            self.planned += 1
        self.formats = formats
        self._batch = _requests(formats[-1], rows)
        return self._plan

    def _same(self, formats: tuple[BlockSparse, ...]) -> bool:
        """Whether the formats read the same pages as before, and lengths may be moved (one format) or are the same."""
        names = ["qo_indptr_B1", "kv_indptr_B1", "kv_indices_C", "base_B", "row_T"]
        if len(formats) > 1:
            names.append("last_page_len_B")
        return len(formats) == len(self.formats) and all(
            a.causal == b.causal
            and a.page_size == b.page_size
            and all(np.array_equal(getattr(a, name), getattr(b, name)) for name in names)
            for a, b in zip(formats, self.formats, strict=True)
        )

    def run(
        self,
        q_THD: Tensor,
        pages: KVPages,
        scale: float,
        variant: Variant = VANILLA,
        softcap: float | None = None,
        **params: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """``(out_THD, lse_TH)`` of the planned rows; see `hasten.kernels.variants.attend`.

        Raises ValueError before a plan was made, UnsupportedError for a variant that needs a compiler.
        """
        if self._plan is None:
            raise ValueError("nothing is planned; call plan first")
        if self._batch is None and not variant.prebuilt:
            raise ValueError("a compiled variant needs the last format to hold all query rows, in order")
        q = q_THD.contiguous()
        schedule = self._plan.schedule
        return attend(variant, schedule, q, pages.k_NGPD, pages.v_NGPD, scale, self._batch, softcap, **params)


def _requests(last: BlockSparse, rows: int) -> Batch | None:
    """The blocks of a format as requests with their rows in order; None when its rows are not all the rows in order."""
    if not np.array_equal(last.row_T, np.arange(rows)):
        return None
    length = last.base_B + last.kv_len_B
    of_row = np.repeat(np.arange(len(length)), np.diff(last.qo_indptr_B1))
    arrays = (of_row, last.qo_indptr_B1, length)
    return Batch(*(torch.from_numpy(x.astype(np.int32)) for x in arrays))
