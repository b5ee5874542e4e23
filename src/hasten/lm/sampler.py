"""The sampler: one token per row of logits, all rows at once.

Greedy rows take the highest logit (ties: lowest id). The others are truncated in the order temperature -> top-k ->
top-p -> min-p, each on the distribution that the one before left, and drawn by the Gumbel-max rule: the highest sum of
logit and noise wins, the noise being a hash of one number of the row's own generator and of the token id. So a row's
token depends on its logits and its generator alone, never on the rest of the batch; and rounding in the logits, which
does depend on the batch, decides no more often than it must. (Inverting the cumulative distribution would let every
rounding error move all thresholds after it.) The work is `hasten.kernels.vocabulary`'s.

Legend: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from hasten.kernels import vocabulary
from hasten.lm.request import SamplingParams, TokenLogprob

_COLDEST = 1e-6


def sample(
    logits_RV: Tensor, params: Sequence[SamplingParams], generators: Sequence[torch.Generator]
) -> list[int]:
    """Choose a token per row. ``logits_RV`` float32, finite or -inf, processors applied; it is not changed."""
    drawn = [i for i, p in enumerate(params) if p.temperature > 0]
    if not drawn:
        return vocabulary.argmax(logits_RV).tolist()
    rows_RV, row_R, chosen = logits_RV, torch.tensor(drawn), [params[i] for i in drawn]
    if len(drawn) < len(params):
        rows_RV = logits_RV[row_R]
        tokens = vocabulary.argmax(logits_RV)
    else:
        tokens = torch.empty(len(params), dtype=torch.int64)
    # Below the least temperature the division would overflow; there, sampling is greedy but for ties already.
    temperature_R = torch.tensor([max(p.temperature, _COLDEST) for p in chosen], dtype=torch.float32)
    stream_R = torch.cat([torch.randint(-(2**63), 2**63 - 1, (1,), generator=generators[i]) for i in drawn])
    tokens[row_R] = vocabulary.sample(rows_RV, temperature_R, *_settings(chosen), stream_R)
    return tokens.tolist()


def generator_for(*seed: int) -> torch.Generator:
    """A random stream of its own for every tuple of integers, the same on every machine."""
    digest = blake2b("/".join(map(str, seed)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def truncate(logits_RV: Tensor, params: Sequence[SamplingParams]) -> None:
    """Set to -inf, in place, what top-k, top-p and min-p exclude. Logits are already divided by the temperature."""
    vocabulary.truncate(logits_RV, *_settings(params))


def _settings(params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor, Tensor]:
    top_k_R = torch.tensor([min(p.top_k, 2**31) for p in params], dtype=torch.int64)
    top_p_R = torch.tensor([p.top_p for p in params], dtype=torch.float64)
    return top_k_R, top_p_R, torch.tensor([p.min_p for p in params], dtype=torch.float32).log_()


def non_finite_rows(logits_RV: Tensor) -> list[int]:
    """Rows that hold NaN or infinity."""
    return [row for row, finite in enumerate(vocabulary.all_finite(logits_RV).tolist()) if not finite]


def token_logprobs(logits_RV: Tensor, tokens: Sequence[int], count: int) -> list[TokenLogprob]:
    """Log-probabilities of ``tokens`` (one per row) and of the ``count`` best, of the model's own distribution:
    before processors, temperature and truncation."""
    logprob_RV = torch.log_softmax(logits_RV, -1)
    chosen = logprob_RV.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
    if count == 0:
        return [TokenLogprob(t, lp, {}) for t, lp in zip(tokens, chosen, strict=True)]
    best = logprob_RV.topk(min(count, logits_RV.shape[-1]), dim=-1)
    return [
        TokenLogprob(token, logprob, dict(zip(ids, values, strict=True)))
        for token, logprob, ids, values in zip(
            tokens, chosen, best.indices.tolist(), best.values.tolist(), strict=True
        )
    ]
