"""Slot ``stop_policy``: when to stop generating. Policies stack; the first to say stop wins."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence


class StopPolicy(ABC):
    """Asked after every committed token of a sequence. One instance per loaded model."""

    @abstractmethod
    def should_stop(self, sequence_id: int, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> bool:
        """True ends the sequence with finish reason ``stop``."""

    def forget(self, sequence_id: int) -> None:
        """The sequence has ended or was cancelled; drop its state."""
