"""`hasten generate`: the JSON object, streaming, standard input, bytes that are not UTF-8, plans."""

from __future__ import annotations

import json

import pytest
from cli_run import hasten

from hasten.core.errors import ConflictError, IntegrityError, PlanError, RequestError, UnknownNameError
from hasten.lm.llm import LLM
from hasten.lm.request import SamplingParams
from hasten.lm.runner import Runner

TEXT = "The quick brown fox"


@pytest.fixture(scope="module")
def llm(tiny_path) -> LLM:
    return LLM(tiny_path, dtype="float32")


@pytest.fixture
def generate(tiny_path):
    """``generate("text", "--raw", ...)``: standard output of the command on the tiny model in float32."""

    def run(*arguments: str, input: str | bytes | None = None) -> str:
        result = hasten("generate", *arguments, "--model", tiny_path, "--dtype", "float32", input=input)
        assert result.exit_code == 0
        return result.stdout

    return run


@pytest.mark.parametrize("count", [1, 17])
def test_raw_json_is_one_object_and_equals_the_api(generate, llm, tiny_path, count):
    out = generate(TEXT, "--raw", "--json", "--temperature", "0", "--ignore-eos", "--max-tokens", str(count))
    found = json.loads(out)
    expected = llm.generate(TEXT, SamplingParams(max_tokens=count, temperature=0, ignore_eos=True))[0]
    assert found["prompt_token_ids"] == llm.tokenizer.encode(TEXT)
    assert found["token_ids"] == list(expected.token_ids)
    assert len(found["token_ids"]) == count
    assert found["text"] == expected.text
    assert found["finish_reason"] == "length"
    assert found["model"] == str(tiny_path)
    assert found["plan"]["dtype"] == "float32"
    timing = found["timing"]
    assert 0 <= timing["queue"] <= timing["first_token"] <= timing["total"] < 60
    assert timing["unit"] == "s"


def test_without_json_the_text_is_streamed(generate, monkeypatch):
    whole = json.loads(generate(TEXT, "--raw", "--json", "--max-tokens", "12"))["text"]
    assert generate(TEXT, "--raw", "--max-tokens", "12") == whole + "\n"
    streamed = []
    original = LLM.stream

    def spy(self, *arguments):
        for delta in original(self, *arguments):
            streamed.append(delta.text)
            yield delta

    monkeypatch.setattr(LLM, "stream", spy)
    assert generate(TEXT, "--raw", "--max-tokens", "12") == "".join(streamed) + "\n"
    assert len(streamed) > 1


def test_the_chat_template_is_the_default(generate, llm):
    out = generate(TEXT, "--system", "Be brief.", "--json", "--max-tokens", "2")
    prompt = f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{TEXT}<|im_end|>\n<|im_start|>assistant\n"
    assert json.loads(out)["prompt_token_ids"] == llm.tokenizer.encode(prompt)


def test_a_dash_reads_standard_input_unchanged(generate, llm):
    text = "Über allen\nGipfeln \U0001f600\n"
    out = generate("-", "--raw", "--json", "--max-tokens", "1", input=text.encode())
    assert json.loads(out)["prompt_token_ids"] == llm.tokenizer.encode(text)


def test_sampling_options_reach_the_engine(generate, llm):
    options = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "seed": -7, "max_tokens": 8}
    arguments = [part for name, v in options.items() for part in (f"--{name.replace('_', '-')}", str(v))]
    found = json.loads(generate(TEXT, "--raw", "--json", "--ignore-eos", *arguments))
    expected = llm.generate(TEXT, SamplingParams(**options, ignore_eos=True))[0]
    assert found["token_ids"] == list(expected.token_ids)
    whole = json.loads(generate(TEXT, "--raw", "--json", "--ignore-eos", "--max-tokens", "12"))["text"]
    stop = whole[5:7]
    stopped = json.loads(
        generate(TEXT, "--raw", "--json", "--ignore-eos", "--max-tokens", "12", "--stop", stop)
    )
    assert stopped["text"] == whole[: whole.index(stop)]
    assert stopped["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("arguments", "input", "error", "message"),
    [
        ([""], None, RequestError, "the prompt is empty"),
        (["-"], b"", RequestError, "the prompt is empty"),
        (["-"], b"caf\xe9 x", RequestError, r"standard input is not valid UTF-8 \(.* at byte 3\); convert"),
        (["caf\udce9"], None, RequestError, "the prompt is not valid UTF-8; convert"),
        (["x", "--raw", "--system", "y"], None, RequestError, "drop --raw or --system"),
        (["x", "--max-tokens", "0"], None, RequestError, "max_tokens = 0: must be at least 1"),
        (["x", "--temperature", "nan"], None, RequestError, "temperature = nan"),
        (["x", "--stop", ""], None, RequestError, "non-empty"),
        (["x", "--dtype", "float16"], None, UnknownNameError, "did you mean 'bfloat16' or 'float32'"),
        (["x", "--use", "adams"], None, UnknownNameError, "did you mean 'adamas'"),
        (["x", "--use", "adamas:bugdet=3"], None, UnknownNameError, "did you mean 'budget'"),
        (["x", "--use", "adamas", "--use", "adamas:budget=3"], None, ConflictError, "used twice"),
        (["x", "--plan", "absent.toml"], None, PlanError, "no plan file at absent.toml"),
        (["x", "--model", "smollm2-135m-instrct"], None, UnknownNameError, "'smollm2-135m-instruct'"),
    ],
)
def test_bad_arguments_are_refused_before_the_model_is_loaded(arguments, input, error, message, monkeypatch):
    monkeypatch.setattr("hasten.lm.build.open_checkpoint", None)  # calling it would be a TypeError
    with pytest.raises(error, match=message):
        hasten("generate", *arguments, input=input)


def test_use_replaces_what_the_plan_says(tmp_path, tiny_path):
    from hasten.cli.common import make_plan

    file = tmp_path / "plan.toml"
    file.write_text(f'model = "{tiny_path}"\ndtype = "bfloat16"\n[use.adamas]\nbudget = 64\n')
    plan = make_plan("other", ["adamas:budget=32"], file, "float32")
    assert (plan.model, plan.dtype) == ("other", "float32")
    assert [(t.slug, t.budget) for t in plan.techniques] == [("adamas", 32)]
    assert make_plan("other", ["adamas:budget=32"], None, "float32").techniques == plan.techniques
    kept = make_plan(None, None, file, None)
    assert (kept.model, kept.dtype, kept.techniques[0].budget) == (str(tiny_path), "bfloat16", 64)


def test_logits_that_are_no_numbers_are_an_error(generate, monkeypatch):
    original = Runner.run
    monkeypatch.setattr(Runner, "run", lambda self, chunks: original(self, chunks) * float("nan"))
    for more in ([], ["--json"]):
        with pytest.raises(IntegrityError, match="not finite"):
            generate(TEXT, "--raw", *more)


def test_a_model_path_in_brackets(tiny_path, tmp_path):
    path = tmp_path / "[bold] model [" / "]"  # a closing tag without an opening one
    path.parent.mkdir()
    path.symlink_to(tiny_path)
    result = hasten("generate", "x", "--model", path, "--dtype", "float32", "--max-tokens", "1", "--json")
    assert json.loads(result.stdout)["model"] == str(path)


def test_the_program_takes_bytes(program, tiny_path):
    """One real process: invalid bytes in an argument are an error of one line."""
    done = program("generate", b"caf\xe9", "--model", tiny_path, "--dtype", "float32")
    assert (done.returncode, done.stdout) == (5, b"")
    assert done.stderr == b"hasten: the prompt is not valid UTF-8; convert it first, e.g. with iconv\n"


def test_json_says_what_drafting_did(generate):
    """Same tokens with a drafter; the counts only where there is one."""
    plain = json.loads(generate("a b a b a b", "--raw", "--json", "--ignore-eos", "--max-tokens", "24"))
    use = "prompt_lookup:min_ngram=1,adaptive=false"
    found = json.loads(
        generate("a b a b a b", "--raw", "--json", "--ignore-eos", "--max-tokens", "24", "--use", use)
    )
    assert found["token_ids"] == plain["token_ids"]
    assert "speculation" not in plain
    done = found["speculation"]
    assert done["rounds"] > 0
    assert 0 <= done["accepted"] <= done["drafted"]
    assert done["acceptance_length"] == pytest.approx(1 + done["accepted"] / done["rounds"], abs=1e-3)


def test_contexts_are_files_that_the_prompt_asks_about(generate, llm, tmp_path):
    (tmp_path / "ä.md").write_text("Rivers run to the sea.\n", encoding="utf-8")
    (tmp_path / "b.md").write_text("Foxes jump.\n", encoding="utf-8")
    files = ("--context", str(tmp_path / "ä.md"), "-c", str(tmp_path / "b.md"))
    out = generate("What do foxes do?", *files, "--json", "--max-tokens", "4")
    prompt = llm.chat_prompt(
        [{"role": "user", "content": "What do foxes do?"}], ["Rivers run to the sea.", "Foxes jump."]
    )
    assert json.loads(out)["prompt_token_ids"] == llm.tokenizer.encode(prompt.joined())
    ape = json.loads(generate("What do foxes do?", *files, "--json", "--max-tokens", "4", "--use", "ape"))
    assert len(ape["token_ids"]) == 4
    assert ape["token_ids"] == list(
        LLM(llm.plan.model, use=["ape"], dtype="float32")
        .chat(
            [{"role": "user", "content": "What do foxes do?"}],
            SamplingParams(max_tokens=4, temperature=0),
            contexts=["Rivers run to the sea.", "Foxes jump."],
        )
        .token_ids
    )


def test_contexts_that_cannot_be_read_are_named(generate, tmp_path):
    (tmp_path / "bad").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RequestError, match="bad is not valid UTF-8"):
        generate("x", "--context", str(tmp_path / "bad"))
    with pytest.raises(RequestError, match="missing cannot be read"):
        generate("x", "--context", str(tmp_path / "missing"))
    with pytest.raises(RequestError, match="--context needs the chat template"):
        generate("x", "--raw", "--context", str(tmp_path / "bad"))
