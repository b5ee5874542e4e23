"""How probable a model finds tokens, read bit by bit: what a prompt compressor asks of its model.

Legend: R rows of logits, V vocabulary, N tokens read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hasten.core.errors import IntegrityError, RequestError
from hasten.lm.chunk import Chunk
from hasten.lm.interrupt import deferred_interrupt

if TYPE_CHECKING:
    from hasten.lm.engine import Engine

_ROWS = 256  # rows of a step: their logits over the whole vocabulary lie in memory at once


def window(engine: Engine) -> int:
    """Most tokens of one of two texts that are read side by side."""
    cache = engine.cache
    half = cache.pool.count // 2 * cache.page_size
    return min(engine.context, engine.runner.decoder.config.max_positions, half)


class Reader:
    """A text that a model reads token after token, keeping the keys and values of what it has read.

    token_ids: what was read, at positions 0 and on; the last token's keys and values are made when the next is read.
    Use as a context manager. Between two calls nothing else of the engine is held up.
    """

    def __init__(self, engine: Engine, token_ids: Sequence[int]) -> None:
        """``token_ids`` (at least one) are the beginning; what the prefix cache has of it is not computed again."""
        if not token_ids:
            raise RequestError("a reader needs a token to begin with")
        self.engine, self.token_ids = engine, list(token_ids)
        self.kv = engine.cache.open(engine.new_id(), self.token_ids)

    @property
    def room(self) -> int:
        """Tokens that may still be read (`window`)."""
        return window(self.engine) - len(self.token_ids)

    def read(self, token_ids: Sequence[int]) -> Tensor:
        """Negative log-likelihood, nats, of each token given all before it: float32 [N].

        Raises `RequestError` when the text does not fit the context or no pages are free.
        """
        if len(token_ids) > self.room:
            raise RequestError(
                f"{len(self.token_ids) + len(token_ids)} tokens do not fit the compressor's context"
            )
        cache, runner = self.engine.cache, self.engine.runner
        first = len(self.token_ids) - 1  # the row that predicts the first new token
        ids = [*self.token_ids, *token_ids]
        begin, stop = self.kv.length, len(ids) - 1
        parts: list[Tensor] = []
        if not cache.reserve(self.kv, begin, stop):
            raise RequestError("no KV pages are free for the compressor: raise kv_memory_mb")
        cache.attach(self.kv, aside=True)
        try:
            for start in range(begin, stop, _ROWS):
                end = min(start + _ROWS, stop)
                wanted = max(0, end - max(start, first))
                with deferred_interrupt():
                    logits_RV = runner.run([Chunk(self.kv, start, ids[start:end], range(start, end), wanted)])
                if wanted:
                    target_R = torch.tensor(ids[end - wanted + 1 : end + 1])
                    parts.append(logits_RV.logsumexp(-1) - logits_RV.gather(1, target_R[:, None])[:, 0])
        finally:
            cache.detach(self.kv)
        self.token_ids = ids
        loss_N = torch.cat(parts) if parts else torch.empty(0)
        if not bool(loss_N.isfinite().all()):
            raise IntegrityError("the compressor's logits are not finite (NaN or infinity in its weights)")
        return loss_N

    def replace(self, start: int, token_ids: Sequence[int]) -> None:
        """What was read from token ``start`` on becomes ``token_ids``; only what differs is computed again."""
        old = self.token_ids[start:]
        same = next(
            (i for i, (a, b) in enumerate(zip(old, token_ids, strict=False)) if a != b),
            min(len(old), len(token_ids)),
        )
        self.token_ids[start:] = token_ids
        keep = max(0, min(start + same, len(self.token_ids) - 1))
        if keep < self.kv.length:
            self.engine.cache.truncate(self.kv, keep)

    def remember(self) -> None:
        """Let the prefix cache keep what was read."""
        if self.kv.length:
            self.engine.cache.offer_prefix(self.kv, self.token_ids[: self.kv.length])

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.engine.cache.close(self.kv)
        self.engine.runner.forget(self.kv.id)
