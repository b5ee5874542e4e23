"""The default model, for real: tokenizer, chat template, logits and greedy tokens against `transformers`.

The reference reads the same GGUF file through `transformers`' own GGUF code.
"""

import pytest
import tokenizers
import torch
from tokenizers import pre_tokenizers

from hasten.lm.llm import LLM
from hasten.lm.request import SamplingParams
from hasten.models.checkpoint import load_decoder, open_checkpoint
from hasten.models.store import resolve
from hasten.workloads.corpus import prompts as corpus_prompts

pytestmark = pytest.mark.model

TEXTS = [
    "",
    " ",
    "The quick brown fox jumps over the lazy dog.",
    "It's 12345 o'clock, I'LL say; 3.14159 and 1,000,000 or 007!",
    "def f(x: int) -> int:\n\treturn x ** 2  # square\n\n\n    if x != 0:\r\n        pass\n",
    "SELECT * FROM t WHERE a >= 1 AND b <> 'x'; -- comment",
    "   many    spaces\t\ttabs \n \n  lines   ",
    "naïve café Ünïcödé e\u0301 ﬁ 中文字符 日本語 한국어 العربية हिन्दी ไทย",
    "🙂👩‍👩‍👧‍👦🇩🇪 emoji\u200d and \u00a0 spaces\u3000here \ufeff",
    "<|im_start|>user\nhi there<|im_end|>\n<|endoftext|><|im_start|>",
    "<|im_start|not a token|> <repo_name> <file_sep> <empty_output>",
    "\x00\x01\x7f control \ufffd \U0010ffff",
    "https://example.org/a?b=c&d=%20#frag user@example.com $\\alpha_{i}^2$",
    "a" * 3000 + " " * 500 + "b" * 200,
]
NUMERALS = ["a ½½ ² Ⅷ ① ٣", "x" + " " * 500 + "1" * 200, "if  1:\n    2  \t 3"]
CHATS = [
    [{"role": "user", "content": "What is 2 + 2?"}],
    [
        {"role": "system", "content": "Answer in French."},
        {"role": "user", "content": "Hello <b>&amp;</b>\n\n'quoted'"},
        {"role": "assistant", "content": "Bonjour 🙂"},
        {"role": "user", "content": ""},
    ],
]
PROMPTS = ["The capital of France is", "Write a short poem about the sea.\n"]


@pytest.fixture(scope="module")
def checkpoint():
    return open_checkpoint(resolve("smollm2-135m-instruct"))


@pytest.fixture(scope="module")
def transformers():
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


@pytest.fixture(scope="module")
def reference_tokenizer(checkpoint, transformers):
    return transformers.AutoTokenizer.from_pretrained(checkpoint.path.parent, gguf_file=checkpoint.path.name)


def test_tokenizer_equals_transformers(checkpoint, reference_tokenizer):
    tokenizer = checkpoint.tokenizer()
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == reference_tokenizer(text, add_special_tokens=False).input_ids, text
        assert tokenizer.decode(ids, skip_special=False) == text
        stream = tokenizer.stream(skip_special=False)
        assert "".join(map(stream.feed, ids)) + stream.finish() == text
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (49152, 1, (2, 0))
    assert not tokenizer.adds_bos
    for token_id in range(0, 49152, 7):
        assert tokenizer.token_bytes(token_id).decode(errors="replace") == reference_tokenizer.decode(
            [token_id]
        )


def test_every_numeral_stands_alone(checkpoint, reference_tokenizer):
    """The published tokenizer first cuts out every numeric character (its Digits step).

    `transformers` leaves this step out when it reads a GGUF file, which shows after several spaces and for numerals
    beyond 0-9; given the step, it agrees.
    """
    backend = tokenizers.Tokenizer.from_str(reference_tokenizer.backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )
    tokenizer = checkpoint.tokenizer()
    for text in [*TEXTS, *NUMERALS]:
        assert tokenizer.encode(text) == backend.encode(text, add_special_tokens=False).ids, text
    assert (
        tokenizer.encode("a ½½") == tokenizer.encode("a") + tokenizer.encode(" ") + tokenizer.encode("½") * 2
    )


@pytest.mark.parametrize("prompt", [True, False])
def test_chat_template_equals_transformers(checkpoint, reference_tokenizer, prompt):
    tokenizer = checkpoint.tokenizer()
    for chat in CHATS:
        expected = reference_tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
        assert tokenizer.apply_chat(chat, add_generation_prompt=prompt) == expected


@pytest.fixture(scope="module")
def reference(checkpoint, transformers):
    return transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint.path.parent, gguf_file=checkpoint.path.name, dtype=torch.float32
    ).eval()


def test_logits_and_greedy_tokens_equal_transformers(checkpoint, reference, greedy):
    """64 tokens decoded with cached keys here; the reference, shown them, would have chosen each one too."""
    decoder = load_decoder(checkpoint)
    tokenizer = checkpoint.tokenizer()
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        chosen = greedy(decoder, ids, 64)
        sequence = torch.tensor([ids + chosen])
        with torch.no_grad():
            expected = reference(sequence).logits
            logits = decoder(sequence)
        torch.testing.assert_close(logits, expected, atol=1e-3, rtol=0)
        assert expected[0, len(ids) - 1 : -1].argmax(-1).tolist() == chosen


TOKENS, TIE = 64, 1e-4


@pytest.mark.timeout(600)
def test_engine_s_greedy_tokens_equal_transformers(default_model_path, documentation, reference):
    """64 greedy tokens of 20 real prompts, decoded together by the engine's float32 path.

    The reference is run once over each prompt with our answer behind it. If it would have chosen, at every place, the
    token that stands there, then by induction its greedy answer is ours. Where the reference's two best logits differ
    by less than 1e-4, another reduction order may choose the other one, and both count as right.
    """
    llm = LLM(default_model_path, dtype="float32", kv_tokens=20 * 512)
    texts = corpus_prompts("test", 20)
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
