"""Slot ``layer_hook``: what happens to hidden states between layers.

Hooks read and write hidden states at layer boundaries, drop rows mid-forward, or skip attention or MLP
sub-blocks per sequence. They stack in plan order. The runner asks `layers` once per model, so a plan
without hooks pays nothing.

Legend: T rows of the step, E hidden size.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Container

from torch import Tensor

from hasten.attention.layout import StepLayout


class LayerHook(ABC):
    """Acts before chosen layers. All methods default to doing nothing."""

    def layers(self, count: int) -> Container[int]:
        """Layer indices at which `before` is called; index ``count`` is after the last layer."""
        return range(count + 1)

    def begin_step(self, layout: StepLayout) -> None:
        """Called once per step before the embedding enters layer 0."""

    def before(self, layer: int, x_TE: Tensor, layout: StepLayout) -> Tensor:
        """Return the hidden states that enter ``layer`` (same shape as ``x_TE``)."""
        return x_TE

    def keep_rows(self, layer: int, x_TE: Tensor, layout: StepLayout) -> Tensor | None:
        """int64 indices of the rows that go on from ``layer``, or None for all.

        The last row of every sequence must stay (its logits are sampled). Dropped rows keep the KV of
        earlier layers and have none from ``layer`` on; the runner gives later layers their own layout.
        """
        return None

    def skip(self, layer: int, layout: StepLayout) -> tuple[bool, bool]:
        """(skip attention, skip MLP) of ``layer`` for the whole step."""
        return False, False

    def forget(self, sequence_id: int) -> None:
        """The sequence has ended; drop what was kept for it."""
