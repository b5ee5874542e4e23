"""The float32 path against `transformers` on the default model: 64 greedy tokens of 20 real prompts.

The reference is run once over each prompt with our answer behind it. If it would have chosen, at every place, the token
that stands there, then by induction its greedy answer is ours. A tie is a place where the reference's two best logits
differ by less than 1e-4: there another reduction order may choose the other one, and both count as right.
"""

from __future__ import annotations

import pytest
import torch

from hasten.lm.llm import LLM
from hasten.lm.request import SamplingParams
from hasten.workloads.corpus import prompts

TOKENS, TIE = 64, 1e-4


@pytest.fixture(scope="module")
def reference(default_model_path):
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(
        default_model_path.parent, gguf_file=default_model_path.name, dtype=torch.float32
    ).eval()


@pytest.mark.timeout(600)
def test_greedy_tokens_equal_transformers(default_model_path, documentation, reference):
    llm = LLM(default_model_path, dtype="float32", kv_tokens=20 * 512)
    texts = prompts("test", 20)
    asked = [llm.chat_prompt([{"role": "user", "content": t}]) if i % 2 else t for i, t in enumerate(texts)]
    params = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    answers = llm.generate(asked, params)
    assert len({a.token_ids for a in answers}) == 20
    for answer in answers:
        ids = [*answer.prompt_token_ids, *answer.token_ids]
        with torch.inference_mode():
            logits = reference(torch.tensor([ids[:-1]])).logits[0, len(answer.prompt_token_ids) - 1 :]
        best = logits.topk(2, dim=-1)
        chosen = logits.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        assert len(chosen) == TOKENS
        assert ((best.values[:, 0] - chosen) < TIE).all()
    again = llm.generate(asked[:2], params)
    assert [a.token_ids for a in again] == [a.token_ids for a in answers[:2]]
