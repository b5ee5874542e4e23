"""Slot ``attention_kernel``: how the chosen tokens are read.

Every exact kernel is one template: query rows x a list of KV *pieces* (runs of pages) give partial
``(out, lse)`` pairs, merged per row. A kernel's plan says which rows read which pieces; `plan` runs once per
step on the host, `run` once per layer. See `hasten.kernels.schedule` and `hasten.kernels.attention`.

Legend: T rows, H query heads, D head size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from hasten.attention.layout import AttentionSpec, KVPages, StepLayout
from hasten.attention.pieces import PiecePlan
from hasten.attention.policy import Selection


class AttentionKernel(ABC):
    """Computes exact softmax attention over the tokens that a policy chose."""

    reads_int8: bool = False  # whether ``run`` reads int8 pages (`hasten.kernels.pages`)

    @property
    def trees(self) -> bool:
        """Whether ``plan`` and ``run`` follow `StepLayout.trees`."""
        return False

    @abstractmethod
    def plan(self, layout: StepLayout) -> Any:
        """Work list of the step (which rows read which page runs); reused by all layers with this layout."""

    @abstractmethod
    def run(
        self,
        plan: Any,
        layer: int,
        q_THD: Tensor,
        pages: KVPages,
        layout: StepLayout,
        spec: AttentionSpec,
        selection: Selection,
        observe: Any = None,
    ) -> Tensor:
        """Return out_THD float32. Rows are causal: row i of a sequence sees the tokens up to itself.

        ``observe(layer, probs_THL, layout)`` is called for a `DenseScores` selection.
        Raises `UnsupportedError` for a selection type it cannot read.
        """

    def reading(self, plan: Any, spec: AttentionSpec) -> PiecePlan | None:
        """The plan by which ``run`` reads a `Dense` selection, if running its schedule is all it does.

        Then a whole step can run natively, without calling ``run`` per layer. None: it has to be called.
        """
        return None

    def forget(self, sequence_id: int) -> None:
        """The sequence has ended; drop what was kept for it."""
