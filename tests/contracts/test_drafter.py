from __future__ import annotations

import torch

from hasten.lm.build import make_cache
from hasten.lm.decoding.speculate import Drafter, Proposal
from hasten.lm.settings import EngineSettings

SLOT = "drafter"


class Repeat(Drafter):
    """The simplest drafter: the last token again and again. Shows that the contract can be met."""

    def propose(self, sequence_id, token_ids, limit):
        return Proposal((token_ids[-1],) * limit, tuple(range(-1, limit - 1)))


DEFAULTS = {"repeat": Repeat}


def test_proposals_are_well_formed(provider, formats, context):
    drafter, settings = provider(), EngineSettings(page_size=4, max_batch=4, kv_tokens=400)
    drafter.bind(make_cache(settings, context, format=formats()), settings)
    vocabulary = context.config.vocab_size
    tokens = torch.randint(3, 300, (40,), generator=torch.Generator().manual_seed(0)).tolist() * 2
    for limit in (1, 3, 8):
        for length in (2, 30, 80):
            proposal = drafter.propose(7, tokens[:length], limit)
            if proposal is None:
                continue
            assert 1 <= len(proposal.token_ids) <= limit
            assert len(proposal.parent) == len(proposal.token_ids)
            assert all(0 <= token < vocabulary for token in proposal.token_ids)
            assert all(-1 <= parent < i for i, parent in enumerate(proposal.parent))
            if proposal.probs_AV is not None:
                assert proposal.probs_AV.shape == (len(proposal.token_ids), vocabulary)
                torch.testing.assert_close(proposal.probs_AV.sum(-1), torch.ones(len(proposal.token_ids)))
                drawn = proposal.probs_AV.gather(1, torch.tensor(proposal.token_ids)[:, None])
                assert (drawn > 0).all()
            drafter.commit(7, tokens[: length + 1])
    drafter.forget(7)
    drafter.forget(12345)
