"""What a technique may see of a loaded model when it builds its providers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hasten.core.artefact import ArtefactStore

if TYPE_CHECKING:
    from pathlib import Path

    from hasten.models.checkpoint import Checkpoint
    from hasten.models.config import DecoderConfig
    from hasten.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class BuildContext:
    """Handed to `Technique.provide`.

    config: the decoder's shape. checkpoint: the weights as stored. tokenizer: text <-> ids.
    weight_dtype / kv_dtype: storage types chosen by the plan's ``dtype`` (``weight_dtype`` None = native).
    artefacts: where computed or trained files for this model live. seed: of the plan.
    calibration: token sequences for calibrating techniques when the caller gives its own; None means the
        technique takes the default calibration split of the documentation corpus.
    """

    config: DecoderConfig
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    weight_dtype: torch.dtype | None
    kv_dtype: torch.dtype
    artefacts: ArtefactStore
    seed: int = 0
    calibration: Sequence[Sequence[int]] | None = None

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        artefacts: Path,
        *,
        weight_dtype: torch.dtype | None = None,
        kv_dtype: torch.dtype = torch.float32,
        calibration: Sequence[Sequence[int]] | None = None,
    ) -> BuildContext:
        """The context of a checkpoint outside an engine. artefacts: the folder that holds those of all models."""
        return cls(
            config=checkpoint.config,
            checkpoint=checkpoint,
            tokenizer=checkpoint.tokenizer(),
            weight_dtype=weight_dtype,
            kv_dtype=kv_dtype,
            artefacts=ArtefactStore(artefacts, checkpoint.fingerprint),
            calibration=calibration,
        )
