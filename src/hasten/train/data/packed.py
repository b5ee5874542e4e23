"""Token-packed sequences: documents joined end to end, cut into windows, drawn in an order that needs no state.

Legend: S tokens of the stream, N windows, L tokens of a window, B rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.core.errors import SettingError


@dataclass(frozen=True)
class Stage:
    """A run of steps whose batches have one shape: ``rows`` sequences of ``length`` tokens."""

    steps: int
    rows: int
    length: int

    def __post_init__(self) -> None:
        if min(self.steps, self.rows, self.length) < 1:
            raise SettingError(f"a stage needs steps, rows and length of at least 1, not {self}")


class PackedTokens:
    """A stream of tokens, int32 [S], in which an end token closes each document.

    A window holds one token more than its length: the last one is only predicted. Raises `SettingError` when there
    is no text.
    """

    def __init__(self, stream_S: Tensor) -> None:
        if stream_S.ndim != 1 or not stream_S.numel():
            raise SettingError("the training text is empty; give at least one document")
        self.stream_S = stream_S.to(torch.int32)

    @classmethod
    def pack(
        cls,
        texts: Iterable[str],
        encode_batch: Callable[[list[str]], Sequence[Sequence[int]]],
        end: int,
    ) -> PackedTokens:
        """Encode and join ``texts``, each closed by the token ``end``."""
        parts: list[Tensor] = [
            torch.tensor([*ids, end], dtype=torch.int32) for ids in encode_batch(list(texts))
        ]
        return cls(torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32))

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the tokens."""
        return hashlib.sha256(self.stream_S.numpy().tobytes()).hexdigest()

    def count(self, length: int) -> int:
        """How many windows of ``length`` the stream holds. Raises `SettingError` when it holds none."""
        found = (self.stream_S.numel() - 1) // length
        if found < 1:
            raise SettingError(
                f"the text has {self.stream_S.numel()} tokens, too few for one sequence of {length} and its last target"
            )
        return found

    def windows(self, index_N: Sequence[int], length: int) -> Tensor:
        """Windows number ``index_N``, int64 [N, length + 1]; neighbours share a token, as input and as target."""
        rows = [self.stream_S[i * length : (i + 1) * length + 1] for i in index_N]
        return torch.stack(rows).long()

    def head(self, rows: int, length: int) -> Tensor:
        """The first ``rows`` windows (fewer if there are fewer), for evaluation: int64 [N, length + 1]."""
        return self.windows(range(min(rows, self.count(length))), length)


def place(stages: Sequence[Stage], step: int) -> tuple[int, int]:
    """The stage that ``step`` falls into and the step's number within it. Raises `IndexError` past the end."""
    start = 0
    for number, stage in enumerate(stages):
        if step < start + stage.steps:
            return number, step - start
        start += stage.steps
    raise IndexError(f"step {step} of {start}")


def batch(tokens: PackedTokens, stages: Sequence[Stage], seed: int, step: int) -> Tensor:
    """The windows of ``step``, int64 [B, L + 1]: a function of its arguments alone.

    Each stage walks through a permutation of all windows of its length, and through another in the next epoch.
    """
    number, within = place(stages, step)
    stage = stages[number]
    count = tokens.count(stage.length)
    chosen: list[int] = []
    orders: dict[int, Tensor] = {}
    for at in range(within * stage.rows, (within + 1) * stage.rows):
        epoch, index = divmod(at, count)
        if epoch not in orders:
            orders[epoch] = _permutation(count, seed, number, epoch)
        chosen.append(int(orders[epoch][index]))
    return tokens.windows(chosen, stage.length)


def _permutation(count: int, *key: int) -> Tensor:
    # Hashed, so that neighbouring keys share nothing.
    digest = hashlib.sha256(repr(key).encode()).digest()
    random = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    return torch.randperm(count, generator=random)
