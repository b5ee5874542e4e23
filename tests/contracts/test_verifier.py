from __future__ import annotations

import pytest
import torch

from hasten.catalog import loader
from hasten.lm.decoding.speculate import ExactVerifier, Proposal

SLOT = "verifier"
DEFAULTS = {"exact": ExactVerifier}
CHAIN = Proposal((3, 1, 4), (-1, 0, 1))
TREE = Proposal((3, 1, 4, 1, 5), (-1, -1, 0, 0, 2))


@pytest.fixture
def lossless(request) -> bool:
    """Whether the provider under test claims exactness (the default does)."""
    case = request.node.callspec.params["provider"]
    return loader.technique(case).lossless if isinstance(case, str) else True


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed)) * 2


def is_path(proposal: Proposal, path: tuple[int, ...]) -> bool:
    return all(proposal.parent[node] == before for before, node in zip((-1, *path), path, strict=False))


@pytest.mark.parametrize("proposal", [CHAIN, TREE], ids=["chain", "tree"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_accepts_a_path_and_one_more_token(provider, proposal, temperature):
    verifier = provider()
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        accepted = verifier.verify(
            proposal, logits(len(proposal.token_ids) + 1, seed), temperature, generator
        )
        assert is_path(proposal, accepted.path)
        assert 0 <= accepted.next_token < 8


def test_greedy_keeps_what_greedy_would_say(provider, lossless):
    if not lossless:
        pytest.skip("lossy, and says so")
    verifier = provider()
    for seed in range(50):
        rows = logits(4, seed)
        accepted = verifier.verify(CHAIN, rows, 0.0, None)
        said, best = [], rows.argmax(-1).tolist()
        for i, token in enumerate((*CHAIN.token_ids, -1)):
            said.append(best[i])
            if best[i] != token:
                break
        assert [*(CHAIN.token_ids[i] for i in accepted.path), accepted.next_token] == said


@pytest.mark.parametrize("drafted", ["guess", "distribution", "tree"])
def test_sampling_keeps_the_first_tokens_distribution(provider, lossless, drafted):
    if not lossless:
        pytest.skip("lossy, and says so")
    verifier, count, generator = provider(), 4000, torch.Generator().manual_seed(1)
    rows = logits(6)
    probs = rows[0].softmax(-1)
    q = torch.softmax(logits(1, 5)[0], -1)
    seen = torch.zeros(8)
    for _ in range(count):
        if drafted == "guess":
            proposal = Proposal((3,), (-1,))
        elif drafted == "distribution":
            proposal = Proposal((int(torch.multinomial(q, 1, generator=generator)),), (-1,), q[None])
        else:
            proposal = Proposal((3, 1, 4), (-1, -1, 0))
        accepted = verifier.verify(proposal, rows[: len(proposal.token_ids) + 1], 1.0, generator)
        first = proposal.token_ids[accepted.path[0]] if accepted.path else accepted.next_token
        seen[first] += 1
    sigma = (probs * (1 - probs) / count).sqrt()
    assert ((seen / count - probs).abs() < 5 * sigma).all()
