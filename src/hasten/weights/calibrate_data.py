"""Calibration data: random segments of documents, and the name that keys an artefact to them.

Legend: N samples, L tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hasten.core.corpus import corpus, recipe
from hasten.core.errors import SettingError

if TYPE_CHECKING:
    from hasten.models.context import BuildContext


def calibration_segments(context: BuildContext, samples: int, length: int, seed: int) -> Tensor:
    """Segments for calibrating a model, int64 [samples, length]: of the caller's data, else of the corpus's split.

    Raises what `draw_segments` raises.
    """
    if context.calibration is not None:
        given: Sequence[Sequence[int]] = context.calibration
        return draw_segments([len(ids) for ids in given], lambda i: given[i], samples, length, seed)
    documents = corpus().documents("calibration")
    return draw_segments(
        [len(document.text) for document in documents],
        lambda i: context.tokenizer.encode(documents[i].text),
        samples,
        length,
        seed,
    )


def calibration_name(context: BuildContext) -> str:
    """What `calibration_segments` draws from, for an artefact's key: a digest of tokens, or the corpus's."""
    if context.calibration is not None:
        return "tokens " + token_digest(context.calibration)
    return f"corpus {recipe()['content_sha256']}"


def draw_segments(
    sizes: Sequence[int], tokens: Callable[[int], Sequence[int]], samples: int, length: int, seed: int
) -> Tensor:
    """``samples`` random segments of ``length`` tokens from documents, int64 [samples, length].

    A document is drawn with probability proportional to ``sizes`` (any unit), then a start uniformly within it;
    documents shorter than ``length`` are passed over. ``tokens(i)`` is called for drawn documents only, once each.
    Deterministic by ``seed``. Raises `SettingError` for empty data or when no document is long enough.
    """
    if samples < 1 or length < 1:
        raise SettingError(f"calibration needs samples >= 1 and sample_length >= 1, not {samples} x {length}")
    if not sizes or not any(size > 0 for size in sizes):
        raise SettingError("calibration data must not be empty; give at least one document")
    random = torch.Generator().manual_seed(seed)
    weights = torch.tensor([float(size) for size in sizes], dtype=torch.float64)
    seen: dict[int, Tensor] = {}
    longest = 0
    segments: list[Tensor] = []
    while len(segments) < samples:
        if not bool((weights > 0).any()):
            raise SettingError(
                f"no calibration document has {length} tokens (the longest has {longest}); "
                f"set sample_length to at most {longest} or give longer documents"
            )
        # Inverse-CDF sampling: torch.multinomial refuses more than 2^24 categories and consumes more random state.
        at = torch.rand(1, generator=random, dtype=torch.float64) * weights.sum()
        index = int(torch.searchsorted(weights.cumsum(0), at, right=True).clamp_max(len(sizes) - 1))
        if index not in seen:
            seen[index] = torch.tensor(list(tokens(index)), dtype=torch.int64)
        ids_L = seen[index]
        longest = max(longest, ids_L.numel())
        if ids_L.numel() < length:
            weights[index] = 0
            continue
        start = int(torch.randint(ids_L.numel() - length + 1, (1,), generator=random))
        segments.append(ids_L[start : start + length])
    return torch.stack(segments)


def token_digest(sequences: Sequence[Sequence[int]]) -> str:
    """SHA-256 (hex) of token sequences: part of an artefact's key when the caller brings calibration data."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(f"{len(sequence)}:".encode())
        digest.update(torch.tensor(list(sequence), dtype=torch.int64).numpy().tobytes())
    return digest.hexdigest()
