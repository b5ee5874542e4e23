from __future__ import annotations

import torch

from hasten.models.checkpoint import load_decoder
from hasten.models.surgery import ModelSurgery, RemoveBlocks

SLOT = "model_surgery"
DEFAULTS = {"nothing": lambda: RemoveBlocks(()), "one block": lambda: RemoveBlocks([2])}


def test_a_changed_model_is_whole_and_has_a_name_of_its_own(provider, context):
    surgery, before = provider(), context.checkpoint
    assert isinstance(surgery, ModelSurgery)
    config, fingerprint = before.config, before.fingerprint
    weights = {name: before.tensor(name) for name in before.names()}
    after = surgery.apply(before)
    assert after is before or after.fingerprint != fingerprint
    assert (before.config, before.fingerprint) == (config, fingerprint)
    assert all(torch.equal(before.tensor(name), value) for name, value in weights.items())
    assert set(after.names()) == set(after.config.tensor_shapes())
    for name, shape in after.config.tensor_shapes().items():
        assert after.has(name)
        assert tuple(after.tensor(name).shape) == shape
    assert after.config.vocab_size == config.vocab_size
    assert after.tokenizer().encode("The sea") == before.tokenizer().encode("The sea")
    assert surgery.apply(before).fingerprint == after.fingerprint
    with torch.no_grad():
        logits = load_decoder(after)(torch.arange(3, 40)[None])
    assert torch.isfinite(logits).all()
