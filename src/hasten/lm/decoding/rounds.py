"""One round of speculation in the engine: ask the drafter, verify with the target's logits.

A tree's nodes lie one after the other in the cache, each sees its ancestors only (`tree_pieces` of
`hasten.attention.pieces`), and what is accepted is moved together afterwards. Where something else than the kernel
reads the cache, a tree is refused, not flattened.

Legend: A proposed tokens, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from hasten.core.errors import UnsupportedError
from hasten.lm.decoding.speculate import Accepted, Ask, Drafter, Proposal, Verifier
from hasten.lm.sampler import truncate
from hasten.lm.sequence import Sequence


def ask(sequence: Sequence, most: int, context: int) -> Ask | None:
    """What to ask the drafter for ``sequence``, which has no draft then; None while it is not decoding or has no room.

    Never more tokens than the sequence may still produce, less one (the verified extra token), or than fit its context.
    """
    sequence.draft = None
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
        sequence.kv,
    )


def take(
    drafter: Drafter,
    sequence: Sequence,
    proposal: Proposal | None,
    limit: int,
    vocabulary: int,
    trees: bool,
) -> None:
    """Set ``sequence.draft`` to what was proposed after `ask`. Raises `UnsupportedError` for a draft of no use."""
    if proposal is None or not proposal.token_ids:
        return
    name = type(drafter).__name__
    count = len(proposal.token_ids)
    if len(proposal.parent) != count or not all(-1 <= p < i for i, p in enumerate(proposal.parent)):
        raise UnsupportedError(
            f"{name} proposed {count} tokens whose parents are not a tree: {proposal.parent}"
        )
    if not trees and not proposal.is_chain():
        raise UnsupportedError(
            f"{name} proposed a tree; this plan verifies chains only: trees need plain KV pages, the dense attention "
            "kernel, fixed rotary embeddings, no attention policy and no layer hook"
        )
    if len(proposal.token_ids) > limit or not all(0 <= t < vocabulary for t in proposal.token_ids):
        raise UnsupportedError(f"{name} proposed more than {limit} tokens or a token outside the vocabulary")
    sequence.draft = proposal


def verify(verifier: Verifier, sequence: Sequence, logits_AV: Tensor) -> tuple[list[int], tuple[int, ...]]:
    """(the tokens that one verify pass adds, the accepted path of the draft): the path's tokens and one more.

    ``logits_AV`` [A+1, V]: the model's logits after the last committed token and after each proposed one.
    """
    proposal, params = sequence.draft, sequence.params
    assert proposal is not None
    if sequence.processor is not None or params.temperature > 0:
        logits_AV = logits_AV.clone()
    if sequence.processor is not None:
        before: list[list[int]] = [[]]
        for token, parent in zip(proposal.token_ids, proposal.parent, strict=True):
            before.append([*before[parent + 1], token])
        for i, ahead in enumerate(before):
            sequence.processor.apply(logits_AV[i], ahead)
    if params.temperature > 0:
        logits_AV /= params.temperature
        truncate(logits_AV, [params] * logits_AV.shape[0])
        logits_AV *= params.temperature  # the verifier divides by it again; -inf stays
    accepted = verifier.verify(proposal, logits_AV, params.temperature, sequence.generator)
    _check(accepted, proposal, verifier)
    return [*(proposal.token_ids[i] for i in accepted.path), accepted.next_token], accepted.path


def _check(accepted: Accepted, proposal: Proposal, verifier: Verifier) -> None:
    count = len(proposal.token_ids)
    steps = zip((-1, *accepted.path), accepted.path, strict=False)
    if not all(0 <= node < count and proposal.parent[node] == before for before, node in steps):
        raise UnsupportedError(
            f"{type(verifier).__name__} accepted {accepted.path}, not a path of the proposal"
        )
