"""One round of speculation in the engine: ask the drafter, verify with the target's logits.

Only chains run: a tree's nodes would have to see their ancestors and not their siblings, which "a row sees all tokens
before it" cannot say. A tree is refused, not flattened.

Legend: A proposed tokens, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from hasten.core.errors import UnsupportedError
from hasten.lm.decoding.speculate import Accepted, Ask, Drafter, Proposal, Verifier
from hasten.lm.sampler import truncate
from hasten.lm.sequence import Sequence


def ask(sequence: Sequence, most: int, context: int) -> Ask | None:
    """What to ask the drafter for ``sequence``; None while it is not decoding or has no room for a guess.

    Never more tokens than the sequence may still produce, less one (the verified extra token), or than fit its context.
    """
    left = sequence.params.max_tokens - sequence.output_length
    limit = min(most, left - 1, context - len(sequence.token_ids) - 1)
    if limit < 1 or sequence.computed != len(sequence.token_ids) - 1:
        return None
    return Ask(
        sequence.id,
        sequence.token_ids,
        limit,
        sequence.params,
        sequence.generator,
        sequence.processor,
        sequence.request.plain,
    )


def take(
    drafter: Drafter, sequence: Sequence, proposal: Proposal | None, limit: int, vocabulary: int
) -> None:
    """Set ``sequence.draft``. Raises `UnsupportedError` for a proposal that cannot be verified."""
    sequence.draft = None
    if proposal is None or not proposal.token_ids:
        return
    name = type(drafter).__name__
    if not proposal.is_chain():
        raise UnsupportedError(f"{name} proposed a tree; the engine verifies chains only")
    if len(proposal.token_ids) > limit or not all(0 <= t < vocabulary for t in proposal.token_ids):
        raise UnsupportedError(f"{name} proposed more than {limit} tokens or a token outside the vocabulary")
    sequence.draft = proposal


def verify(verifier: Verifier, sequence: Sequence, logits_AV: Tensor) -> list[int]:
    """The tokens that one verify pass adds: the accepted part of the draft and one more.

    ``logits_AV`` [A+1, V]: the model's logits after the last committed token and after each proposed one.
    """
    proposal, params = sequence.draft, sequence.params
    assert proposal is not None
    if sequence.processor is not None or params.temperature > 0:
        logits_AV = logits_AV.clone()
    if sequence.processor is not None:
        for i in range(logits_AV.shape[0]):
            sequence.processor.apply(logits_AV[i], proposal.token_ids[:i])
    if params.temperature > 0:
        logits_AV /= params.temperature
        truncate(logits_AV, [params] * logits_AV.shape[0])
        logits_AV *= params.temperature  # the verifier divides by it again; -inf stays
    accepted = verifier.verify(proposal, logits_AV, params.temperature, sequence.generator)
    _check(accepted, len(proposal.token_ids), verifier)
    return [*(proposal.token_ids[i] for i in accepted.path), accepted.next_token]


def _check(accepted: Accepted, count: int, verifier: Verifier) -> None:
    if accepted.path != tuple(range(len(accepted.path))) or len(accepted.path) > count:
        raise UnsupportedError(
            f"{type(verifier).__name__} accepted {accepted.path}, not a path of the proposal"
        )
