from __future__ import annotations

from hasten.lm.context.transform import Prompt, PromptTransform

SLOT = "prompt_transform"
DEFAULTS = {"identity": PromptTransform}


def test_prompts_stay_prompts(provider, context):
    transform, tokenizer = provider(), context.tokenizer
    for text in ("The quick brown fox. " * 12, "Über allen Gipfeln ist Ruh", "x"):
        prompt = transform.on_text(Prompt(text=text))
        assert isinstance(prompt, Prompt)
        ids = prompt.token_ids or tuple(tokenizer.encode(prompt.text))
        after = transform.on_tokens(prompt.replace(token_ids=ids))
        assert isinstance(after, Prompt)
        assert after.token_ids
        assert all(0 <= token < context.config.vocab_size for token in after.token_ids)
        if after.position_ids is not None:
            assert len(after.position_ids) == len(after.token_ids)
        if after.embeddings_TE is not None:
            assert after.embeddings_TE.shape[1] == context.config.hidden_size
        again = transform.on_tokens(prompt.replace(token_ids=ids))
        assert again.token_ids == after.token_ids


def test_tokens_without_text_pass(provider):
    transform = provider()
    prompt = transform.on_tokens(transform.on_text(Prompt(token_ids=(5, 6, 7))))
    assert prompt.token_ids


def test_the_default_changes_nothing():
    prompt = Prompt(text="a", token_ids=(1,))
    assert PromptTransform().on_tokens(PromptTransform().on_text(prompt)) is prompt
