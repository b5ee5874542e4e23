"""Held-out loss.

Legend: N sequences, L tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from hasten.models.decoder import Decoder
from hasten.train.data.packed import PackedTokens


def next_token_loss(decoder: Decoder, token_ids_NL: Tensor) -> Tensor:
    """Mean cross entropy in nats of predicting each token but a row's first, float32 scalar."""
    logits_NLV = decoder(token_ids_NL[:, :-1])
    return functional.cross_entropy(logits_NLV.flatten(0, 1), token_ids_NL[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(decoder: Decoder, token_ids_NL: Tensor) -> float:
    """`next_token_loss` without gradients, a row at a time."""
    return sum(float(next_token_loss(decoder, ids_L[None])) for ids_L in token_ids_NL) / len(token_ids_NL)


def unigram_loss(train: PackedTokens, token_ids_NL: Tensor, vocabulary: int) -> float:
    """Cross entropy in nats of ``token_ids_NL`` under the token frequencies of the training text (add-one smoothed):
    what a model scores that knows how frequent tokens are and nothing else."""
    count_V = torch.bincount(train.stream_S.long(), minlength=vocabulary).double() + 1
    log_probability_V = (count_V / count_V.sum()).log()
    return -float(log_probability_V[token_ids_NL[:, 1:].flatten()].mean())
