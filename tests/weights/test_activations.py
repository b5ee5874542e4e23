"""What rounding activations costs the default model: int16 nothing to speak of, int8 a little."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hasten.core.corpus import Corpus
from hasten.models.checkpoint import load_decoder, open_checkpoint
from hasten.weights.native import NativeFormat

TOKENS = 256


@pytest.fixture(scope="module")
def logprobs(default_model_path: Path, documentation: Corpus) -> dict[str, Tensor]:
    """Log-probabilities [B, T, V] of three held-out texts per kind of activations, and the tokens under "ids"."""
    checkpoint = open_checkpoint(default_model_path)
    tokenizer = checkpoint.tokenizer()
    encoded = (tokenizer.encode(document.text) for document in documentation.documents("test"))
    long = (ids[:TOKENS] for ids in encoded if len(ids) >= TOKENS)
    ids_BT = torch.tensor([next(long) for _ in range(3)])
    found = {"ids": ids_BT}
    for activations in ("float32", "int16", "int8"):
        decoder = load_decoder(checkpoint, pack=NativeFormat(activations).pack).eval()
        with torch.inference_mode():
            found[activations] = decoder(ids_BT).log_softmax(-1)
    return found


def divergence(logprobs: dict[str, Tensor], activations: str) -> float:
    """KL(float32 || activations), mean nats per token: what perplexity rises by, free of the text's own chance."""
    exact, rounded = logprobs["float32"], logprobs[activations]
    return float((exact.exp() * (exact - rounded)).sum(-1).mean())


def perplexity(logprobs: dict[str, Tensor], activations: str) -> float:
    next_BT1 = logprobs["ids"][:, 1:, None]
    return math.exp(-float(logprobs[activations][:, :-1].gather(2, next_BT1).mean()))


def test_int16_activations_leave_perplexity_alone(logprobs: dict[str, Tensor]) -> None:
    assert divergence(logprobs, "int16") < 1e-5
    assert abs(perplexity(logprobs, "int16") / perplexity(logprobs, "float32") - 1) < 1e-3


def test_int8_activations_are_coarser(logprobs: dict[str, Tensor]) -> None:
    assert 5e-4 < divergence(logprobs, "int8") < 5e-3
