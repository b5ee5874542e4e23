"""Tokenizers from both formats, against `tokenizers` and `transformers`, and the stream decoder."""

import json
import threading

import pytest
import tokenizers
import transformers
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from hasten.core.errors import HastenError, ModelError, ModelFormatError, RequestError, UnsupportedError
from hasten.models.checkpoint import open_checkpoint
from hasten.models.gguf_file import GGUFFile
from hasten.models.tokenizer import Tokenizer
from hasten.models.tokenizer_gguf import tokenizer_from_gguf
from hasten.models.tokenizer_hf import tokenizer_from_folder

TEXTS = [
    "",
    " ",
    "   leading and trailing   ",
    "Hello world, it's 12345 o'clock; I'LL see you're 3.14!",
    "def f(x):\n\treturn  x ** 2  # square\r\n\r\n\n",
    "naïve café Ünïcödé e\u0301 ﬁ 中文字符 日本語 한국어 العربية हिन्दी",
    "🙂👩‍👩‍👧‍👦🇩🇪 emoji\u200d and \u00a0 spaces\u3000here",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "a<tool>b</tool>c",
    "\x00\x01\x7f control \ufffd \U0010ffff",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" * 20,
]
CORPUS = [text * 3 for text in TEXTS] + ["the quick brown fox jumps over the lazy dog 1 22 333 4444 " * 10]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(regex: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def pre_tokenizer(pre: str) -> pre_tokenizers.PreTokenizer:
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    return {"gpt-2": gpt2, "qwen2": split(PRETOKENIZE_REGEX), "llama-bpe": split(LLAMA3)}[pre]


def train(pre: str) -> tokenizers.Tokenizer:
    """A byte-level BPE as its `tokenizer.json` would describe it, trained here."""
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizer(pre)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([tokenizers.AddedToken("<tool>", normalized=False)])
    return backend


def write(path, fields):
    """A GGUF file of metadata alone."""
    writer = GGUFWriter(str(path), "llama")
    for key, value in fields.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return GGUFFile(path).fields


def gguf_fields(backend: tokenizers.Tokenizer, pre: str) -> dict[str, object]:
    state = json.loads(backend.to_str())
    ids = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    types = [3 if token in SPECIAL else 4 if token == "<tool>" else 1 for token, _ in ids]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [token for token, _ in ids],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in state["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}",
    }


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "qwen2", "llama-bpe"])
def test_byte_level_from_gguf_equals_the_original(tmp_path, pre):
    original = train(pre)
    ours = tokenizer_from_gguf(write(tmp_path / "t.gguf", gguf_fields(original, pre)), "t.gguf")
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == original.encode(text, add_special_tokens=False).ids, text
        assert ours.decode(ids) == original.decode(ids), text
        assert ours.decode(ids, skip_special=False) == original.decode(ids, skip_special_tokens=False)
    assert ours.vocab_size == original.get_vocab_size()
    assert ours.token_id("<tool>") in ours.encode("a<tool>b")
    assert (ours.bos_id, ours.eos_ids, ours.adds_bos) == (1, (2, 0), False)
    assert ours.encode("a", add_bos=True) == [1, *ours.encode("a")]
    assert ours.apply_chat([{"role": "user", "content": "x"}]) == "<|im_start|>x"


def test_default_pre_tokenizer_cuts_digits_by_threes(tmp_path):
    original = train("gpt-2")
    ours = tokenizer_from_gguf(write(tmp_path / "t.gguf", gguf_fields(original, "default")), "t")
    cut = ours.backend.pre_tokenizer.pre_tokenize_str("abc 1234567,=d")
    assert [piece for piece, _ in cut] == ["abc", "Ġ", "123", "456", "7", ",=", "d"]


SP_TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
WORDS = [
    "▁the",
    "▁th",
    "he",
    "▁t",
    "▁h",
    "▁",
    "t",
    "h",
    "e",
    "l",
    "o",
    "ll",
    "▁hell",
    "▁he",
    "ell",
    "▁▁",
    "▁▁▁▁",
]


def sentencepiece_fields(**changes: object) -> dict[str, object]:
    tokens = [*SP_TOKENS, *WORDS, "[INST]"]
    scores = [0.0] * len(SP_TOKENS) + [-float(rank) for rank in range(len(WORDS))] + [0.0]
    types = [2, 3, 3, *[6] * 256, *[1] * len(WORDS), 4]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | changes


def test_sentencepiece_joins_best_scores_first(tmp_path):
    ours = tokenizer_from_gguf(write(tmp_path / "t.gguf", sentencepiece_fields()), "t.gguf")
    spell = ours.backend.id_to_token
    assert [spell(i) for i in ours.encode("the hello")] == ["▁the", "▁hell", "o"]
    assert [spell(i) for i in ours.encode("  t")] == ["▁▁", "▁t"]
    assert [spell(i) for i in ours.encode("é")] == ["▁", "<0xC3>", "<0xA9>"]
    assert [spell(i) for i in ours.encode("the[INST]</s>")] == ["▁the", "[INST]", "</s>"]
    assert ours.adds_bos  # what the format means when it does not say
    for text in TEXTS:
        assert ours.decode(ours.encode(text), skip_special=False) == text
    ids = ours.encode("hello")
    assert ours.decode(ids) == "hello"
    assert ours.decode(ids, continuing=True) == " hello"  # after other text the space is real


def test_sentencepiece_without_prefix_and_gemma_spaces(tmp_path):
    fields = sentencepiece_fields(**{"tokenizer.ggml.add_space_prefix": False})
    ours = tokenizer_from_gguf(write(tmp_path / "t.gguf", fields), "t.gguf")
    assert ours.decode(ours.encode("  the")) == "  the"
    assert ours.backend.id_to_token(ours.encode("the")[0]) == "t"
    gemma = tokenizer_from_gguf(
        {**GGUFFile(tmp_path / "t.gguf").fields, "general.architecture": "gemma3"}, "t"
    )
    for text in TEXTS:
        assert gemma.decode(gemma.encode(text), skip_special=False) == text


def test_sentencepiece_equals_the_sentencepiece_library(tmp_path, optional):
    spm = optional("sentencepiece")
    (tmp_path / "corpus.txt").write_text("\n".join(text for text in CORPUS if "\x00" not in text))
    spm.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "m"),
        model_type="bpe",
        vocab_size=520,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    reference = spm.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    count = reference.get_piece_size()
    kinds = [
        2 if reference.is_unknown(i) else 3 if reference.is_control(i) else 6 if reference.is_byte(i) else 1
        for i in range(count)
    ]
    fields = sentencepiece_fields(
        **{
            "tokenizer.ggml.tokens": [reference.id_to_piece(i) for i in range(count)],
            "tokenizer.ggml.scores": [reference.get_score(i) for i in range(count)],
            "tokenizer.ggml.token_type": kinds,
        }
    )
    ours = tokenizer_from_gguf(write(tmp_path / "t.gguf", fields), "t.gguf")
    for text in TEXTS:
        if "\x00" not in text:
            assert ours.encode(text) == reference.encode(text), text


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tokenizer.ggml.tokens": []}, ModelError, "has no tokenizer"),
        ({"tokenizer.ggml.model": "bert"}, UnsupportedError, "kind 'bert' is not supported"),
        ({"tokenizer.ggml.pre": "zorg"}, UnsupportedError, "pre-tokenizer 'zorg' is not supported .*qwen2"),
        ({"tokenizer.ggml.merges": ["zz qq"]}, ModelFormatError, "does not hold together"),
        ({"tokenizer.ggml.merges": None}, ModelFormatError, r"needs 'tokenizer\.ggml\.merges'"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, ModelFormatError, "eos token 1000000 is beyond"),
        ({"tokenizer.ggml.token_type": (1,)}, ModelFormatError, "1 token types for"),
        ({"tokenizer.ggml.model": "llama"}, ModelFormatError, "0 token scores for"),
    ],
)
def test_bad_metadata(changes, error, message):
    fields = gguf_fields(train("gpt-2"), "gpt-2") | changes
    fields = {key: value for key, value in fields.items() if value is not None}
    with pytest.raises(error, match=message):
        tokenizer_from_gguf(fields, "t.gguf")


def save_folder(path, backend, **settings_):
    path.mkdir(exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(settings_))
    return path


def test_folder_equals_transformers(tmp_path):
    backend = train("qwen2")
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    path = save_folder(
        tmp_path / "model",
        backend,
        bos_token={"content": "<|endoftext|>", "__type": "AddedToken"},
        eos_token="<|im_end|>",
        tokenizer_class="PreTrainedTokenizerFast",
        chat_template="{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}{% endfor %}"
        "{{ eos_token }}",
    )
    ours = tokenizer_from_folder(path, eos_ids=(1,))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    assert (ours.bos_id, ours.eos_ids, ours.adds_bos) == (0, (1, 2), True)
    for text in TEXTS:
        assert ours.encode(text, add_bos=True) == theirs(text).input_ids
        assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text), skip_special_tokens=True)
    chat = [{"role": "system", "content": " be brief "}, {"role": "user", "content": "naïve <b>&</b> 'x'"}]
    assert ours.apply_chat(chat) == theirs.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )


def test_chat_template_files(tmp_path):
    path = save_folder(
        tmp_path / "model", train("gpt-2"), chat_template=[{"name": "default", "template": "A"}]
    )
    assert tokenizer_from_folder(path).chat_template == "A"
    (path / "chat_template.jinja").write_text("B")
    assert tokenizer_from_folder(path).chat_template == "B"
    with pytest.raises(ModelError, match="no chat template"):
        tokenizer_from_folder(save_folder(tmp_path / "plain", train("gpt-2"))).apply_chat([])


def test_vocabulary_beyond_the_embedding_is_refused(tiny):
    path = tiny("llama_gqa").path
    save_folder(path, train("gpt-2"))
    with pytest.raises(ModelError, match=r"the tokenizer has 5\d\d tokens but the embedding only 131 rows"):
        open_checkpoint(path).tokenizer()
    padded = tiny("mistral", vocab_size=640).path
    save_folder(padded, train("gpt-2"))
    tokenizer = open_checkpoint(padded).tokenizer()
    assert 500 < tokenizer.vocab_size < 640
    assert tokenizer.decode([639, *tokenizer.encode("ok"), -1]) == "ok"  # padding rows stand for no text


def test_unsupported_decoder(tmp_path):
    backend = train("gpt-2")
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ModelError, match=r"unsupported tokenizer decoder \['WordPiece'\]"):
        tokenizer_from_folder(save_folder(tmp_path / "model", backend))


BYTE_LEVEL = Tokenizer(train("smollm"))


@given(st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_round_trip_and_stream(text):
    ids = BYTE_LEVEL.encode(text)
    assert BYTE_LEVEL.decode(ids, skip_special=False) == text
    stream = BYTE_LEVEL.stream(skip_special=False)
    pieces = [stream.feed(token_id) for token_id in ids]
    assert "".join(pieces) + stream.finish() == text
    assert stream.finish() == ""


@given(st.lists(st.integers(0, 600), max_size=40))
@settings(max_examples=150, deadline=None)
def test_any_ids_stream_to_what_decode_says(ids):
    """Token sequences a model might produce, broken UTF-8 included."""
    stream = BYTE_LEVEL.stream()
    text = "".join(stream.feed(token_id) for token_id in ids) + stream.finish()
    assert text == BYTE_LEVEL.decode(ids) == BYTE_LEVEL.backend.decode(ids)


def test_stream_never_shows_half_a_character():
    ids = BYTE_LEVEL.encode("x👩‍👩‍👧é")
    stream = BYTE_LEVEL.stream()
    pieces = [stream.feed(token_id) for token_id in ids]
    assert "\ufffd" not in "".join(pieces)
    cut = BYTE_LEVEL.stream()
    assert cut.feed_all(BYTE_LEVEL.encode("🛸")[:2]) == ""
    assert cut.finish() == "\ufffd"


def test_bad_text_and_long_lines():
    with pytest.raises(RequestError, match="not valid Unicode"):
        BYTE_LEVEL.encode("a\ud800b")
    with pytest.raises(RequestError, match="must be a string, not bytes"):
        BYTE_LEVEL.encode(b"abc")
    line = "word " * 200_000  # one megabyte without a line break
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode(line)) == line


def test_threads_share_a_tokenizer():
    results: list[bool] = []

    def work() -> None:
        fresh = TEXTS * 5
        results.append(all(BYTE_LEVEL.decode(BYTE_LEVEL.encode(t), skip_special=False) == t for t in fresh))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4


class TestChat:
    TEMPLATE = (
        "{%- for m in messages %}{% if m.role not in ['user', 'assistant'] %}"
        "{{ raise_exception('role ' ~ m.role ~ ' is not supported') }}{% endif %}"
        "<{{ m.role }}>{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
        "{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )

    def chat(self, template: str = TEMPLATE) -> Tokenizer:
        return Tokenizer(train("gpt-2"), chat_template=template)

    def test_renders(self):
        chat = self.chat()
        messages = [{"role": "user", "content": "<hi>"}, {"role": "assistant", "content": "é"}]
        assert chat.apply_chat(messages) == "<user><hi><assistant>é<assistant>"
        assert chat.apply_chat(messages, add_generation_prompt=False) == "<user><hi><assistant>é"
        assert (
            chat.apply_chat(messages[:1], tools=[{"name": "é<"}]) == '<user><hi>[{"name": "é<"}]<assistant>'
        )

    def test_text_parts(self):
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        assert self.chat().apply_chat([{"role": "user", "content": parts}]) == "<user>ab<assistant>"

    @pytest.mark.parametrize(
        ("messages", "error"),
        [
            ([], "at least one message"),
            (["hi"], "message 1: expected an object"),
            ([{"role": "user", "content": "a"}, {"content": "x"}], "message 2: 'role' must be"),
            ([{"role": "user"}], r"message 1 \(role 'user'\): 'content' must be text, got None"),
            ([{"role": "user", "content": [{"type": "image"}]}], r"message 1 .*only text parts"),
            ([{"role": "user", "content": "\ud800"}], "message 1 .*not valid Unicode"),
            ([{"role": "pope", "content": "x"}], "refuses these messages: role pope is not supported"),
        ],
    )
    def test_bad_messages(self, messages, error):
        with pytest.raises(RequestError, match=error):
            self.chat().apply_chat(messages)

    @pytest.mark.parametrize(
        "template",
        ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ undefined_thing.x }}", "{{ 1 / 0 }}"],
    )
    def test_hostile_or_failing_template(self, template):
        with pytest.raises(RequestError, match="the chat template fails on messages with roles user"):
            self.chat(template).apply_chat([{"role": "user", "content": "x"}])

    def test_template_that_does_not_compile(self):
        with pytest.raises(ModelError, match="does not compile"):
            self.chat("{% if %}").apply_chat([{"role": "user", "content": "x"}])

    def test_errors_are_ours(self):
        assert issubclass(RequestError, HastenError)
