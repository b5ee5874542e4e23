"""Bad input, line by line: each is refused with its own error, which names the input and the fix; nothing is lost.

Told elsewhere, because they need their room's fixtures:

- disk full during a pull: tests/core/test_fetch.py (``test_disk_full_*``);
- two processes that pull at once: tests/core/test_fetch.py (``test_two_processes_fetch_once_*``);
- truncated, corrupt and pickled weight files: tests/models/test_bad_files.py;
- a broken line in a batch file, a full disk, kill -9: tests/cli/test_batch_cli.py and tests/lm/test_batch.py;
- bytes that are not UTF-8 on the command line and standard input: tests/cli/test_generate.py, test_chat.py.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import hasten
from hasten.catalog import loader
from hasten.core.errors import (
    HastenError,
    IntegrityError,
    ModelError,
    ModelFormatError,
    NotBuiltError,
    PlanError,
    RequestError,
    SettingError,
    UnknownNameError,
)
from hasten.core.plan import Plan
from hasten.lm.batch import read_jobs, run_batch
from hasten.lm.llm import LLM
from hasten.lm.request import FinishReason, SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")

sys.path.insert(0, str(Path(__file__).parent / "lm"))

CONTEXT = 512


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lm_tiny import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("bad") / "tiny", positions=CONTEXT)


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> LLM:
    return LLM(tiny, dtype="float32", page_size=4, max_batch=8, max_step_tokens=64)


@pytest.fixture
def llm(loaded: LLM) -> Iterator[LLM]:
    """The tiny model; afterwards every page is back and it still answers as before."""
    before = answer(loaded)
    yield loaded
    assert not loaded.engine.busy
    assert loaded.engine.cache.pool.used == len(loaded.engine.cache.store)
    assert loaded.engine.cache.free_rows == loaded.engine.settings.max_batch
    assert answer(loaded) == before


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def _short(value: object) -> str:
    return repr(value)[:40]


def greedy(count: int = 5, **more: object) -> SamplingParams:
    return SamplingParams(**{"max_tokens": count, "temperature": 0, "ignore_eos": True, **more})


def answer(llm: LLM, prompt: str = "The quick brown fox") -> tuple[int, ...]:
    return llm.generate(prompt, greedy())[0].token_ids


# -- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty: give at least one token"),
        ([[]], "the prompt is empty"),
        ("fox " * 600, r"has \d+ tokens, but the context holds 512 .*shorten it or raise max_context"),
        ([5] * CONTEXT, "has 512 tokens, but the context holds 512"),
        ("x" * 1_000_000, r"has \d+ tokens, but the context holds 512"),
        ("lorem ipsum " * 85_000, r"has \d+ tokens, but the context holds 512"),
        ("caf\udce9", r"lone surrogate U\+DCE9 at character 3; it is not valid Unicode"),
        (b"caf\xe9", "is bytes; decode it to text first"),
        ([5, 320], r"token id 320 is not in the vocabulary \(0\.\.319\)"),
        ([-1, 5], "token id -1 is not in the vocabulary"),
        ([5, 10**30], "is not in the vocabulary"),
        ([5, True], "token ids must be integers, found True"),
        ([[5, 6.0]], "token ids must be integers, found 6.0"),
        ([None], "not NoneType"),
        (None, "not NoneType"),
        ({"role": "user"}, "not dict"),
    ],
    ids=_short,
)
def test_prompts(llm, prompt, message):
    start = time.perf_counter()
    with pytest.raises(RequestError, match=message):
        llm.generate(prompt, greedy())
    if isinstance(prompt, str) and len(prompt) < 10_000:
        with pytest.raises(RequestError, match=message):
            llm.stream(prompt, greedy())
    assert time.perf_counter() - start < 20  # refused at the door, also when it is a megabyte


def test_one_bad_prompt_among_good_ones_runs_nothing(llm):
    with pytest.raises(RequestError, match="empty"):
        llm.generate(["fine", "", "also fine"], greedy())
    assert llm.engine.requests == ()


@pytest.mark.parametrize(
    "prompt", ["a\0b", "\0", "\ufeffx", "e\u0301", "\u202eabc", "\U0001f600" * 20, "\r\n\t"]
)
def test_odd_but_valid_text_is_served(llm, prompt):
    done = llm.generate(prompt, greedy())[0]
    assert len(done.token_ids) == 5
    assert llm.tokenizer.decode(done.prompt_token_ids) == prompt


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ([{"role": "user"}], r"message 1 \(role 'user'\): 'content' must be text"),
        (
            [{"role": "user", "content": "x"}, {"content": "y"}],
            "message 2: 'role' must be a non-empty string",
        ),
        ([{"role": "user", "content": "x\udce9"}], "not valid Unicode"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "only text parts"),
        ([{"role": "user", "content": "fox " * 600}], "context holds 512"),
    ],
)
def test_conversations(llm, messages, message):
    with pytest.raises(RequestError, match=message):
        llm.chat(messages, greedy())


def test_scoring(llm):
    for given, message in [
        ("", "nothing to score|empty"),
        ([5, 999], "token id 999"),
        ([5] * 600, "context"),
    ]:
        with pytest.raises(RequestError, match=message):
            llm.score(given)


# -- settings of a request --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_tokens = 0: must be at least 1"),
        ({"max_tokens": -5}, "max_tokens = -5: must be at least 1"),
        ({"max_tokens": True}, "max_tokens = True"),
        ({"max_tokens": 3.0}, "max_tokens = 3.0"),
        ({"max_tokens": None}, "max_tokens = None"),
        ({"temperature": float("nan")}, r"temperature = nan: must be in 0\.\.100"),
        ({"temperature": float("inf")}, "temperature = inf"),
        ({"temperature": 1e6}, r"temperature = 1000000\.0: must be in 0\.\.100"),
        ({"temperature": -0.1}, "temperature = -0.1"),
        ({"temperature": "hot"}, "temperature = 'hot'"),
        ({"temperature": True}, "temperature = True"),
        ({"top_k": -1}, "top_k = -1: must be 0"),
        ({"top_k": True}, "top_k = True"),
        ({"top_p": 0}, "top_p = 0"),
        ({"top_p": float("nan")}, "top_p = nan"),
        ({"min_p": 2}, "min_p = 2"),
        ({"n": 1000}, r"n = 1000: must be in 1\.\.128"),
        ({"n": 0}, "n = 0"),
        ({"n": True}, "n = True"),
        ({"stop": ("",)}, r"stop = \('',\): must be non-empty strings"),
        ({"stop": "end"}, "stop = 'end': must be a tuple"),
        ({"stop": (b"x",)}, "non-empty strings"),
        ({"stop": None}, "stop = None"),
        ({"seed": 1.5}, "seed = 1.5"),
        ({"seed": True}, "seed = True"),
        ({"logprobs": 2.5}, "logprobs = 2.5"),
        ({"logprobs": 101}, "logprobs = 101"),
        ({"logprobs": "all"}, "logprobs = 'all'"),
        ({"logit_bias": {5: float("nan")}}, "logit_bias"),
        ({"logit_bias": {5: 1e300}}, "logit_bias"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias = .*: must map token ids to finite numbers"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"presence_penalty": 1e300}, "presence_penalty"),
        ({"frequency_penalty": float("-inf")}, "frequency_penalty"),
        ({"repetition_penalty": -1}, "repetition_penalty"),
        ({"stop_token_ids": ("end",)}, "stop_token_ids"),
    ],
    ids=_short,
)
def test_request_settings(settings, message):
    with pytest.raises(RequestError, match=message) as refused:
        SamplingParams(**settings)
    assert refused.value.exit_code == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logit_bias": {320: 1.0}}, r"logit_bias: token 320 is not in the vocabulary \(0\.\.319\)"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias: token -1"),
        ({"stop_token_ids": (320,)}, "stop_token_ids: 320 is not in the vocabulary"),
    ],
)
def test_request_settings_that_only_the_model_can_judge(llm, settings, message):
    with pytest.raises(RequestError, match=message):
        llm.generate("x", greedy(**settings))


def test_more_samples_than_the_cache_can_hold(tiny):
    llm = LLM(tiny, dtype="float32", page_size=4, kv_tokens=64)
    with pytest.raises(RequestError, match=r"n = 100: .* KV pages, the cache has 16; lower n or raise"):
        llm.generate("x", greedy(n=100))
    assert llm.facts()["pages_used"] == 0
    assert len(answer(llm)) == 5


@pytest.mark.parametrize("count", [CONTEXT, 10**9, 10**30])
def test_a_huge_max_tokens_ends_when_the_context_is_full(llm, count):
    done = llm.generate([[5] * 500], greedy(count))[0]
    assert done.samples[0].finish is FinishReason.LENGTH
    assert len(done.token_ids) == CONTEXT - 500


@pytest.mark.parametrize("seed", [-1, -(2**70), 2**70, 0])
def test_any_integer_is_a_seed(llm, seed):
    settings = SamplingParams(max_tokens=8, temperature=1, seed=seed, ignore_eos=True)
    first, second = llm.generate(["The quick"] * 2, settings)
    assert first.token_ids == second.token_ids


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 100},
        {"temperature": 1e-30},
        {"temperature": 1e-300},
        {"temperature": 1e-300, "top_p": 0.5, "min_p": 0.1},
        {"top_k": 10**30},
        {"top_p": 1e-300},
        {"min_p": 1},
        {"logit_bias": dict.fromkeys(range(320), -1e9)},
        {"presence_penalty": 1e9, "frequency_penalty": -1e9},
        {"repetition_penalty": 1e9},
        {"repetition_penalty": 1e-9},
        {"temperature": 1e-30, "presence_penalty": 1e9, "repetition_penalty": 1e9, "logit_bias": {5: 1e9}},
    ],
    ids=_short,
)
def test_extreme_settings_give_tokens(llm, settings):
    for temperature in (0, 1):
        wanted = {"max_tokens": 6, "ignore_eos": True, "seed": 1, "temperature": temperature, **settings}
        done = llm.generate("The quick", SamplingParams(**wanted))[0]
        assert len(done.token_ids) == 6
        assert all(0 <= token < 320 for token in done.token_ids)


@pytest.mark.parametrize("temperature", [1e-5, 1e-30, 1e-300])
def test_a_tiny_temperature_is_greedy(llm, temperature):
    wanted = SamplingParams(max_tokens=20, temperature=temperature, ignore_eos=True)
    assert (
        llm.generate("The quick", wanted)[0].token_ids == llm.generate("The quick", greedy(20))[0].token_ids
    )


def test_a_very_long_stop_list(llm):
    whole = llm.generate("The quick", greedy(40))[0].text
    stops = (*(f"never {i} " + "x" * 50 for i in range(5000)), whole[20:23])
    done = llm.generate("The quick", greedy(40, stop=stops))[0]
    assert done.text == whole[: whole.index(whole[20:23])]
    assert done.samples[0].finish is FinishReason.STOP


# -- names, plans and engine settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "code", "message"),
    [
        (lambda: LLM("smollm2-135m-instrct"), UnknownNameError, 2, "did you mean 'smollm2-135m-instruct'"),
        (lambda: LLM("./absent/model.gguf"), ModelError, 4, r"no model folder or \.gguf file at .*absent"),
        (lambda: LLM(""), ModelError, 4, "model name is empty"),
        (lambda: LLM("a\0b"), HastenError, None, "a.*b"),
        (lambda: LLM("x" * 5000), HastenError, None, "xxx"),
        (
            lambda: hasten.LLM(use=["adams"]),
            UnknownNameError,
            2,
            "unknown technique 'adams'; did you mean 'adamas'",
        ),
        (lambda: hasten.LLM(use=["palu"]), NotBuiltError, 3, "palu is planned"),
        (lambda: LLM(use=["adamas:bugdet=3"]), (SettingError, UnknownNameError), 2, "did you mean 'budget'"),
        (lambda: LLM(use=["adamas:budget=many"]), SettingError, 2, "budget"),
        (lambda: LLM(dtype="float23"), UnknownNameError, 2, "did you mean 'float32'"),
        (
            lambda: LLM(max_bach=3),
            UnknownNameError,
            2,
            "unknown engine setting 'max_bach'; did you mean 'max_batch'",
        ),
        (lambda: LLM(max_batch=0), SettingError, 2, r"engine\.max_batch = 0"),
        (lambda: LLM(kv_memory_mb=float("nan")), SettingError, 2, r"engine\.kv_memory_mb = nan"),
        (lambda: LLM(max_batch="lots"), SettingError, 2, r"engine\.max_batch = 'lots'"),
        (lambda: loader.record("hydragn"), UnknownNameError, 2, "did you mean 'hydragen'"),
        (lambda: hasten.SamplingParams(max_tokens=0), RequestError, 5, "max_tokens = 0"),
    ],
)
def test_names_and_settings(call, error, code, message, monkeypatch):
    monkeypatch.setattr("hasten.lm.build.open_checkpoint", None)  # refused before any file is read
    monkeypatch.setattr("hasten.models.store._resolve_known", lambda *_: Path("."))
    with pytest.raises(error, match=message) as refused:
        call()
    assert code is None or refused.value.exit_code == code


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ('modell = "x"\n', UnknownNameError, "unknown plan key 'modell'; did you mean 'model'"),
        ("[use.adams]\n", UnknownNameError, "unknown technique 'adams'; did you mean 'adamas'"),
        ("[use.adamas]\nbuget = 3\n", (SettingError, UnknownNameError), "did you mean 'budget'"),
        ("[engine]\nmax_bach = 3\n", UnknownNameError, "did you mean 'max_batch'"),
        ('dtype = "bfloat"\n', UnknownNameError, "did you mean 'bfloat16'"),
        ("model = \n", PlanError, "plan.toml: not valid TOML"),
        ("model = 3\n", PlanError, "model must be a string, not 3"),
        (b"\xff\xfe", PlanError, "plan.toml cannot be read as a plan"),
    ],
    ids=_short,
)
def test_a_plan_file_with_a_mistake(tmp_path, monkeypatch, text, error, message):
    monkeypatch.setattr("hasten.models.store._resolve_known", lambda *_: Path("."))
    monkeypatch.setattr("hasten.lm.build.open_checkpoint", None)
    file = tmp_path / "plan.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(error, match=message) as refused:
        LLM(file)
    assert refused.value.exit_code == 2


# -- model files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(copy, bad):
    file = copy / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = bad
    save_file(tensors, file)
    with pytest.raises(
        IntegrityError, match=r"layers\.1\.\S*up_proj\S* holds NaN or infinity; fetch"
    ) as refused:
        LLM(copy, dtype="float32")
    assert refused.value.exit_code == 4


def test_a_folder_without_tokenizer(copy):
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="tokenizer") as refused:
        LLM(copy, dtype="float32")
    assert str(copy) in str(refused.value)
    assert refused.value.exit_code == 4


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json"):
        LLM(tmp_path, dtype="float32")
    shutil.copy(__file__, tmp_path / "model.bin")
    with pytest.raises(ModelFormatError, match="pickle"):
        LLM(tmp_path / "model.bin", dtype="float32")


def test_activations_that_overflow_fail_their_request_alone(llm, monkeypatch):
    """Finite weights can still give logits that are none: that request ends, its neighbours do not notice."""
    original = llm.engine.runner.run

    def run(chunks):
        logits_RV = original(chunks).clone()
        row = 0
        for chunk in chunks:
            if chunk.logits and chunk.token_ids[0] == 7:
                logits_RV[row] = float("nan")
            row += chunk.logits
        return logits_RV

    expected = llm.generate([[9, 10]], greedy())[0].token_ids
    monkeypatch.setattr(llm.engine.runner, "run", run)
    good, bad = llm.generate([[9, 10], [7, 8]], greedy())
    assert good.token_ids == expected
    assert bad.samples[0].finish is FinishReason.ERROR
    assert "not finite" in bad.samples[0].error
    with pytest.raises(IntegrityError, match="not finite"):
        list(llm.stream([7, 8], greedy()))


# -- batch files ------------------------------------------------------------------------------------------------------


def test_a_batch_file_with_bad_lines(llm, tmp_path):
    def line(name: str, **body: object) -> bytes:
        data = {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}
        return json.dumps(data).encode()

    lines = {
        "good": line("good", prompt="The quick", max_tokens=3, temperature=0),
        "broken": b'{"custom_id": "broken", ',
        "bytes": b'{"custom_id": "\xff"}',
        "zero": line("zero", prompt="x", max_tokens=0),
        "negative": line("negative", prompt="x", max_tokens=-4),
        "long": line("long", prompt="fox " * 600),
        "empty": line("empty", prompt=""),
        "huge": line("huge", prompt=[5] * 500, max_tokens=10**12, ignore_eos=True),
        "unknown": line("unknown", prompt="x", max_tokenz=4),
        "last": line("last", prompt="Rivers run", max_tokens=3, temperature=0),
    }
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\n".join(lines.values()))
    assert len(read_jobs(source)) == len(lines)
    assert run_batch(source, target, llm.answer_jobs, model="tiny", decode=str) == (10, 7)
    found = [json.loads(text) for text in target.read_text(encoding="utf-8").splitlines()]
    assert {r["custom_id"] for r in found if r["response"]} == {"good", "huge", "last"}
    errors = {r["error"]["line"]: r["error"]["message"] for r in found if r["error"]}
    wanted = {
        2: "JSON",
        3: "UTF-8",
        4: "max_tokens = 0",
        5: "max_tokens = -4",
        6: "512",
        7: "empty",
        9: "max_tokenz",
    }
    assert set(errors) == set(wanted)
    assert all(wanted[number] in message for number, message in errors.items())


# -- interrupts and threads -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["generate", "stream", "score", "batch"])
def test_an_interrupt_frees_everything(llm, verb, monkeypatch):
    """SIGINT from outside, at any moment of a long call."""
    original = llm.engine.runner.run

    def slow(chunks):
        time.sleep(0.005)
        return original(chunks)

    monkeypatch.setattr(llm.engine.runner, "run", slow)
    jobs: Callable[[], object] = {
        "generate": lambda: llm.generate([[5, 6], [7] * 90], greedy(400, n=2)),
        "stream": lambda: list(llm.stream([5, 6], greedy(400))),
        "score": lambda: llm.score([list(range(3, 300))] * 20, mode="decode"),
        "batch": lambda: list(llm.answer_jobs([_job(i) for i in range(20)])),
    }[verb]
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        jobs()
    timer.join()
    monkeypatch.undo()


def _job(number: int):
    from hasten.lm.batch import Job
    from hasten.lm.openai import TextBody

    body = TextBody(prompt=[5 + number], max_tokens=400, ignore_eos=True)
    return Job(str(number), number, str(number), body)


def test_threads_share_a_model(llm):
    """Several threads take turns step by step; each gets what it would have got alone."""
    prompts = [f"{name} over the lazy dog" for name in ("The fox", "A river", "Ruh", "Der Rost", "The sea")]
    alone = [llm.generate(p, greedy(40))[0] for p in prompts]
    scores = llm.score(prompts[0]).logprobs
    found: dict[object, object] = {}
    start = threading.Barrier(2 * len(prompts) + 1)

    def generate(i: int) -> None:
        start.wait()
        found[i] = llm.generate(prompts[i], greedy(40))[0].token_ids

    def stream(i: int) -> None:
        start.wait()
        found[str(i)] = "".join(d.text for d in llm.stream(prompts[i], greedy(40)))

    def score() -> None:
        start.wait()
        try:
            found["score"] = llm.score(prompts[0]).logprobs
        except RequestError as error:  # no room beside the running requests
            found["score"] = str(error)

    threads = [threading.Thread(target=score)]
    threads += [
        threading.Thread(target=f, args=(i,)) for i in range(len(prompts)) for f in (generate, stream)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found.get(i) for i in range(len(prompts))] == [c.token_ids for c in alone]
    assert [found.get(str(i)) for i in range(len(prompts))] == [c.text for c in alone]
    assert found["score"] == pytest.approx(scores, abs=1e-4) or "other requests are running" in found["score"]


def test_plan_objects_are_checked_too(tiny):
    with pytest.raises(UnknownNameError, match="float32"):
        LLM(Plan(str(tiny), dtype="float31"))
