"""Who asks for what, when: skewed popularity, Poisson arrivals; and a trace played to a prefix store without a model.

Legend: N pages of the knowledge base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hasten.core.errors import SettingError
from hasten.lm.kvcache.pages import PagePool
from hasten.lm.kvcache.prefix import PrefixStore


@dataclass(frozen=True)
class Asked:
    """A request of the trace: its page, a number that picks a question about it, and seconds since the start."""

    page: int
    question: int
    at: float


def popularity(count: int, top: float = 0.03, share: float = 0.6) -> NDArray[np.float64]:
    """[N] Zipf probabilities by rank, with the exponent for which the first ``top`` of all ranks get ``share``.

    Raises `SettingError` when no exponent of 0 to 8 does.
    """
    first = max(1, round(top * count))
    rank_N = np.arange(1, count + 1, dtype=np.float64)

    def weights(exponent: float) -> NDArray[np.float64]:
        w_N: NDArray[np.float64] = rank_N**-exponent
        w_N /= w_N.sum()
        return w_N

    low, high = 0.0, 8.0
    if not weights(low)[:first].sum() <= share <= weights(high)[:first].sum():
        raise SettingError(
            f"no Zipf law gives the first {first} of {count} pages {share:.0%} of the requests"
        )
    for _ in range(60):
        middle = (low + high) / 2
        if weights(middle)[:first].sum() < share:
            low = middle
        else:
            high = middle
    return weights(low)


def trace(count: int, pages: int, rate: float, seed: int = 0, *, skip: int = 0) -> list[Asked]:
    """Requests ``skip`` to ``skip + count`` of an endless trace; times start at the first of them.

    rate: requests per second (Poisson arrivals); 0: all at once. Which page is popular is drawn too.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    order_N = np.argsort(rng.random(pages))
    cumulative_N = np.cumsum(popularity(pages))
    draws = rng.random((skip + count, 3))[skip:]
    rank = np.minimum(np.searchsorted(cumulative_N, draws[:, 0], side="right"), pages - 1)
    gap = -np.log1p(-draws[:, 2]) / rate if rate > 0 else np.zeros(count)
    at = np.cumsum(gap) - (gap[0] if count else 0.0)
    return [
        Asked(int(order_N[r]), int(q * 2**31), float(t))
        for r, q, t in zip(rank, draws[:, 1], at, strict=True)
    ]


@dataclass
class Hits:
    """Tokens and documents asked for, and found."""

    tokens: int = 0
    cached: int = 0
    documents: int = 0
    hits: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of documents whose pages were there."""
        return self.hits / self.documents if self.documents else 0.0


def replay(
    store: PrefixStore,
    pool: PagePool,
    prompts: Sequence[tuple[Sequence[int], Sequence[int]]],
    instructions: int = 0,
) -> Hits:
    """Play prompts (tokens, where their parts end) one after the other: match, make room, compute nothing, insert.

    instructions: how many first parts of each prompt are no documents, and not counted as such. ``store`` is bound to
    ``pool``. A prompt that does not fit the pool is a `ValueError`.
    """
    out, size = Hits(), store.page_size
    for ids, segments in prompts:
        pages = list(store.match(ids, segments))
        pool.retain(pages)
        cached, whole = len(pages) * size, len(ids) // size
        store.accessed(ids, segments, cached)
        need = whole - len(pages)
        if need > pool.free:
            store.evict(need - pool.free)
        if need > pool.free:
            raise ValueError(f"a prompt of {len(ids)} tokens does not fit {pool.count} pages of {size}")
        pages += [pool.allocate() for _ in range(need)]
        store.insert(ids, pages, segments)
        pool.release(pages)
        out.tokens += len(ids)
        out.cached += cached
        out.documents += len(segments[instructions:])
        out.hits += sum(end // size * size <= cached for end in segments[instructions:])
    return out
