"""Slot ``model_surgery``: which weights, blocks or neurons the model keeps.

Surgery happens before anything is loaded: it turns the checkpoint into another one, and the rest of the engine (weight
format, calibration, KV cache, native layers) sees only that. Providers apply in plan order, each to the last result.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from hasten.core.errors import ModelError
from hasten.models.checkpoint import Checkpoint


class ModelSurgery(ABC):
    """Changes a model as stored. One instance per loaded model."""

    @abstractmethod
    def apply(self, checkpoint: Checkpoint) -> Checkpoint:
        """The changed model. ``checkpoint`` itself stays as it is; the same object back means nothing changed.

        The result's `fingerprint` must tell it from the original: artefacts of later techniques are kept under it.
        Vocabulary and tokenizer stay. Raises `UnsupportedError` for a model that cannot be changed so.
        """


class RemoveBlocks(ModelSurgery):
    """Leaves out whole transformer blocks, given by number; the others move up and keep their own settings."""

    def __init__(self, removed: Sequence[int]) -> None:
        self.removed = tuple(removed)

    def apply(self, checkpoint: Checkpoint) -> Checkpoint:
        """A view without the blocks. Raises `ModelError` when one is not there or none would be left."""
        left = set(range(checkpoint.config.num_layers))
        if not set(self.removed) <= left:
            raise ModelError(
                f"{checkpoint.path}: cannot remove blocks {sorted(set(self.removed) - left)} of {len(left)}"
            )
        return checkpoint.keeping(sorted(left - set(self.removed)))
