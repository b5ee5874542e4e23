"""The sampler: one token per row of logits, all rows at once.

Greedy rows take the highest logit (ties: lowest id). The others are truncated in the order temperature -> top-k ->
top-p -> min-p, each on the distribution that the one before left, and drawn by the Gumbel-max rule: the highest sum of
logit and noise wins, the noise being a hash of one number of the row's own generator and of the token id. So a row's
token depends on its logits and its generator alone, never on the rest of the batch; and rounding in the logits, which
does depend on the batch, decides no more often than it must. (Inverting the cumulative distribution would let every
rounding error move all thresholds after it.)

Legend: R rows, V vocabulary, K candidates, N tokens left over all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from hasten.kernels.vocabulary import all_finite, argmax
from hasten.lm.request import SamplingParams, TokenLogprob

_COLDEST = 1e-6
_CANDIDATES = 256  # top-p looks at this many best tokens before it sorts the whole vocabulary


def sample(
    logits_RV: Tensor, params: Sequence[SamplingParams], generators: Sequence[torch.Generator]
) -> list[int]:
    """Choose a token per row. ``logits_RV`` float32, finite or -inf, processors applied; it is not changed."""
    if all(p.temperature == 0 for p in params):
        return argmax(logits_RV).tolist()
    drawn = [i for i, p in enumerate(params) if p.temperature > 0]
    tokens = argmax(logits_RV) if len(drawn) < len(params) else torch.empty(len(params), dtype=torch.int64)
    row_R = torch.tensor(drawn)
    chosen = [params[i] for i in drawn]
    # Below the least temperature the division would overflow; there, sampling is greedy but for ties already.
    scaled_RV = logits_RV[row_R] / torch.tensor([max(p.temperature, _COLDEST) for p in chosen])[:, None]
    truncate(scaled_RV, chosen)
    stream_R = torch.cat([torch.randint(-(2**63), 2**63 - 1, (1,), generator=generators[i]) for i in drawn])
    tokens[row_R] = draw(scaled_RV, stream_R)
    return tokens.tolist()


def generator_for(*seed: int) -> torch.Generator:
    """A random stream of its own for every tuple of integers, the same on every machine."""
    digest = blake2b("/".join(map(str, seed)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def draw(logits_RV: Tensor, stream_R: Tensor) -> Tensor:
    """int64 [R]: a token per row with probability softmax(logits); ``stream_R`` int64 random bits, one per row."""
    left_RV = logits_RV > float("-inf")
    if bool(left_RV.all()):
        return (logits_RV + _gumbel(stream_R[:, None], torch.arange(logits_RV.shape[-1]))).argmax(-1)
    row_N, id_N = left_RV.nonzero(as_tuple=True)
    score_N = logits_RV[left_RV] + _gumbel(stream_R[row_N], id_N)
    best_R = torch.full((len(stream_R),), float("-inf"), dtype=torch.float64)
    best_R.scatter_reduce_(0, row_N, score_N, "amax")
    wins_N = score_N == best_R[row_N]
    return torch.zeros_like(stream_R).index_copy_(0, row_N[wins_N], id_N[wins_N])


def _gumbel(stream: Tensor, token: Tensor) -> Tensor:
    """Standard Gumbel noise, float64, by hashing (stream, token) with the SplitMix64 finaliser (Steele et al. 2014)."""
    z = stream + token * -0x61C8864680B583EB  # the constants are the published ones as signed numbers
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    z ^= (z >> 31) & 0x1FFFFFFFF
    uniform = (((z >> 11) & 0x1FFFFFFFFFFFFF).double() + 0.5) * 2.0**-53
    return uniform.log_().neg_().log_().neg_()


def truncate(logits_RV: Tensor, params: Sequence[SamplingParams]) -> None:
    """Set to -inf, in place, what top-k, top-p and min-p exclude. Logits are already divided by the temperature."""
    vocabulary = logits_RV.shape[-1]
    top_k = [p.top_k if 0 < p.top_k < vocabulary else 0 for p in params]
    if any(top_k):
        row_R = torch.tensor([i for i, k in enumerate(top_k) if k])
        k_R = torch.tensor([k for k in top_k if k])
        best_RK = logits_RV[row_R].topk(int(k_R.max()), dim=-1).values
        least_R1 = best_RK.gather(1, k_R[:, None] - 1)
        logits_RV[row_R] = logits_RV[row_R].masked_fill_(logits_RV[row_R] < least_R1, float("-inf"))
    if any(p.top_p < 1 for p in params):
        row_R = torch.tensor([i for i, p in enumerate(params) if p.top_p < 1])
        top_p_R1 = torch.tensor([p.top_p for p in params if p.top_p < 1], dtype=torch.float64)[:, None]
        logits_RV[row_R] = _nucleus(logits_RV[row_R], top_p_R1)
    if any(p.min_p > 0 for p in params):
        row_R = torch.tensor([i for i, p in enumerate(params) if p.min_p > 0])
        log_min_p_R1 = torch.tensor([p.min_p for p in params if p.min_p > 0]).log()[:, None]
        rows_RV = logits_RV[row_R]
        least_R1 = rows_RV.amax(-1, keepdim=True) + log_min_p_R1
        logits_RV[row_R] = rows_RV.masked_fill_(rows_RV < least_R1, float("-inf"))


def _nucleus(logits_RV: Tensor, top_p_R1: Tensor) -> Tensor:
    """Keep the fewest most probable tokens whose mass reaches top-p (nucleus, arXiv 1904.09751, section 3.1)."""
    probs_RV = torch.softmax(logits_RV, -1)
    count = min(_CANDIDATES, logits_RV.shape[-1])
    best_RK, index_RK = probs_RV.topk(count, dim=-1)
    if count < logits_RV.shape[-1] and bool((best_RK.double().sum(-1, keepdim=True) < top_p_R1).any()):
        best_RK, index_RK = probs_RV.sort(dim=-1, descending=True, stable=True)
    mass_RK = best_RK.double()
    before_RK = mass_RK.cumsum(-1) - mass_RK
    kept_RK = logits_RV.gather(1, index_RK).masked_fill_(before_RK >= top_p_R1, float("-inf"))
    return torch.full_like(logits_RV, float("-inf")).scatter_(1, index_RK, kept_RK)


def non_finite_rows(logits_RV: Tensor) -> list[int]:
    """Rows that hold NaN or infinity."""
    return [row for row, finite in enumerate(all_finite(logits_RV).tolist()) if not finite]


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
