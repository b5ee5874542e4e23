"""What a model loses without one of its blocks: next-token losses with blocks off, and how alike hidden states are.

All candidates of one removal share their prefix: the hidden states that enter a block are the same whichever later
block is off. So one walk over the blocks is made, and from every candidate only the blocks behind it are run again.
That is exact, costs half of evaluating every candidate alone, and needs one chunk's hidden states at any depth.

Legend: N segments, L tokens of a segment, T rows, R predicting rows, E hidden size, V vocabulary, B boundaries between
blocks (blocks + 1), X rows times hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from hasten.core.errors import IntegrityError, SettingError
from hasten.lm.native import Layer, native_layers
from hasten.models.decoder import CausalAttend, Decoder
from hasten.weights.calibrate import check_tokens

CHUNK_TOKENS = 512
_LOGITS = 1 << 22  # elements of a slice of logits: larger ones leave the cache between product and softmax


@dataclass(frozen=True)
class Losses:
    """Mean next-token loss, nats per predicted token: of a model as it is, and with one more block off, by block."""

    loss: float
    without: dict[int, float]

    def best(self) -> int:
        """The block that is missed least; the first of equals."""
        return min(self.without, key=lambda block: (self.without[block], block))

    def ranking(self) -> list[int]:
        """All blocks, the least missed first."""
        return sorted(self.without, key=lambda block: (self.without[block], block))


@dataclass(frozen=True)
class _Chunk:
    """Whole segments: hidden states before block 0, what attention needs, and which rows predict which tokens."""

    x_TE: Tensor
    position_T: Tensor
    attend: CausalAttend
    predicting_R: Tensor
    target_R: Tensor


class BlockLosses:
    """Losses of one decoder on fixed text. Blocks go by their index in ``decoder``.

    decoder: packed layers run on the native library, plain ones in PyTorch. token_ids_NL: int64; of every segment all
    tokens but the first are predicted. Deterministic; a figure does not depend on which others are asked for.
    Raises `SettingError` for empty, too short or out-of-range tokens; every method raises `IntegrityError` when the
    loss is not finite.
    """

    def __init__(self, decoder: Decoder, token_ids_NL: Tensor, chunk_tokens: int = CHUNK_TOKENS) -> None:
        check_tokens(token_ids_NL, decoder.config.vocab_size)
        samples, self.length = token_ids_NL.shape
        if self.length < 2:
            raise SettingError("calibration segments of 1 token predict nothing; give at least 2 tokens each")
        self.decoder = decoder
        self.layers: Sequence[Layer] = native_layers(decoder) or tuple(decoder.layers)  # type: ignore[arg-type]
        self.token_ids_NL = token_ids_NL
        self.step = max(1, chunk_tokens // self.length)
        self.chunks = -(-samples // self.step)
        self.predicted = samples * (self.length - 1)

    @torch.inference_mode()
    def loss(self, alive: Sequence[int]) -> float:
        """The loss with only the blocks ``alive``, run from the embedding on."""
        total = 0.0
        for chunk in self._each():
            x_TE = chunk.x_TE
            for block in alive:
                x_TE = self._run(block, chunk, x_TE)
            total += self._summed(chunk, x_TE)
        return self._mean(total)

    @torch.inference_mode()
    def without(
        self, alive: Sequence[int], candidates: Sequence[int], advance: Callable[[], None] = lambda: None
    ) -> Losses:
        """The loss with ``alive`` and, for each of the ``candidates`` among them, with that one off too.

        advance: called after each candidate of each chunk, ``chunks * len(candidates)`` times.
        """
        wanted = set(candidates)
        if not wanted <= set(alive):
            raise ValueError(
                f"candidates {sorted(wanted - set(alive))} are not among the blocks {list(alive)}"
            )
        base, summed = 0.0, dict.fromkeys(candidates, 0.0)
        for chunk in self._each():
            x_TE = chunk.x_TE
            for place, block in enumerate(alive):
                if block in wanted:
                    other_TE = x_TE
                    for later in alive[place + 1 :]:
                        other_TE = self._run(later, chunk, other_TE)
                    summed[block] += self._summed(chunk, other_TE)
                    advance()
                x_TE = self._run(block, chunk, x_TE)
            base += self._summed(chunk, x_TE)
        return Losses(self._mean(base), {block: self._mean(total) for block, total in summed.items()})

    @torch.inference_mode()
    def similarity(self, advance: Callable[[], None] = lambda: None) -> Tensor:
        """Mean cosine similarity of a token's hidden states at any two boundaries of the whole model, float64 [B, B].

        Boundary b lies before block b, the last one behind all blocks; 1 - (b, b + 1) is what block b changes.
        """
        boundaries = len(self.layers) + 1
        total_BB = torch.zeros(boundaries, boundaries, dtype=torch.float64)
        for chunk in self._each():
            x_TE, states = chunk.x_TE, [functional.normalize(chunk.x_TE, dim=-1)]
            for block in range(len(self.layers)):
                x_TE = self._run(block, chunk, x_TE)
                states.append(functional.normalize(x_TE, dim=-1))
            flat_BX = torch.stack(states).flatten(1)
            total_BB += (flat_BX @ flat_BX.T).double()
            advance()
        mean_BB = total_BB / self.token_ids_NL.numel()
        if not bool(torch.isfinite(mean_BB).all()):
            raise IntegrityError("hidden states hold NaN or infinity; check the weights")
        return mean_BB

    def _each(self) -> Iterator[_Chunk]:
        for start in range(0, len(self.token_ids_NL), self.step):
            ids_NL = self.token_ids_NL[start : start + self.step]
            row_NL = torch.arange(ids_NL.numel()).view_as(ids_NL)
            yield _Chunk(
                x_TE=self.decoder.embed(ids_NL.reshape(-1)),
                position_T=torch.arange(self.length).repeat(len(ids_NL)),
                attend=CausalAttend(self.decoder, len(ids_NL)),
                predicting_R=row_NL[:, :-1].reshape(-1),
                target_R=ids_NL[:, 1:].reshape(-1),
            )

    def _run(self, block: int, chunk: _Chunk, x_TE: Tensor) -> Tensor:
        layer = self.layers[block]
        return layer.mlp(layer.attention(x_TE, chunk.position_T, chunk.attend))

    def _summed(self, chunk: _Chunk, x_TE: Tensor) -> float:
        """The summed loss of a chunk whose hidden states behind the last block are ``x_TE``."""
        x_RE = x_TE[chunk.predicting_R]
        rows = max(16, _LOGITS // self.decoder.config.vocab_size)
        total = 0.0
        for start in range(0, len(x_RE), rows):
            logits_RV = self.decoder.logits(x_RE[start : start + rows])
            loss_R = functional.cross_entropy(
                logits_RV, chunk.target_R[start : start + rows], reduction="none"
            )
            total += float(loss_R.double().sum())
        return total

    def _mean(self, total: float) -> float:
        if not math.isfinite(total):
            raise IntegrityError("the model's loss is not finite (NaN or infinity in weights or activations)")
        return total / self.predicted
