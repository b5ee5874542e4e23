"""`hasten batch`: broken lines, resuming, kill -9 between and inside writes, foreign outputs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from hasten.core.errors import RequestError
from hasten.lm.batch import finished, read_jobs, run_batch
from hasten.lm.openai import ChatBody, parse_body
from hasten.lm.request import Completion, FinishReason, Sample, Timing


def line(custom_id: str, text: str = "hi", **body: object) -> str:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 4, **body}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body})


def complete(text: str) -> Completion:
    return Completion((1, 2), (Sample((3,), text, FinishReason.STOP),), Timing(0, 0, 0))


def echo(jobs):
    for job in jobs:
        assert isinstance(job.body, ChatBody)
        yield job, complete(str(job.body.messages[0].content).upper())


def run(source: Path, target: Path, answer=echo) -> tuple[int, int]:
    return run_batch(source, target, answer, model="tiny", decode=str)


def answers(target: Path) -> list[dict]:
    return [json.loads(text) for text in target.read_text(encoding="utf-8").splitlines()]


def test_answers_every_line_in_openai_form(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(line("a") + "\n\n" + line("b", "grüße 🚀") + "\n", encoding="utf-8")
    assert run(source, target) == (2, 0)
    by_id = {a["custom_id"]: a for a in answers(target)}
    assert by_id["b"]["response"]["body"]["choices"][0]["message"]["content"] == "GRÜSSE 🚀"
    assert by_id["a"]["response"]["status_code"] == 200
    assert by_id["a"]["error"] is None


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("{not json", "not valid JSON"),
        ('"text"', "must be a JSON object"),
        ('{"method": "POST"}', "custom_id"),
        (line("a"), "was used on line 1"),
        (line("x", max_tokens=0), "max_tokens"),
        (line("x", temperature="hot"), "temperature"),
        (line("x", response_format={"type": "json_object"}), "response_format"),
        (json.dumps({"custom_id": "x", "url": "/v1/embeddings", "body": {}}), "/v1/embeddings"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_broken_line_gets_an_error_record_and_the_rest_is_done(tmp_path, broken, message):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"

    def answer(jobs):
        for job in jobs:
            try:
                job.body.params()
                yield job, complete("ok")
            except RequestError as error:
                yield job, error

    source.write_text("\n".join([line("a"), broken, line("c")]), encoding="utf-8")
    assert run(source, target, answer) == (3, 1)
    out = answers(target)
    assert sorted(a["custom_id"] for a in out if a["response"]) == ["a", "c"]
    (failed,) = [a for a in out if a["error"]]
    assert message in failed["error"]["message"]
    assert failed["error"]["line"] == 2


def test_invalid_utf8_line(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_bytes(line("a").encode() + b"\n\xff\xfe{}\n" + line("b").encode())
    jobs = read_jobs(source)
    assert [job.error is None for job in jobs] == [True, False, True]
    assert "UTF-8" in str(jobs[1].error)


def test_resumes_after_a_torn_line_without_repeating(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(line(f"q{i}") for i in range(6)), encoding="utf-8")
    asked: list[str] = []

    def answer(jobs):
        for job, result in echo(jobs):
            asked.append(job.custom_id)
            yield job, result

    run(source, target, answer)
    whole = target.read_bytes()
    cut = whole[: whole.rfind(b"\n", 0, -1) - 20]  # loses the last line and tears the one before
    target.write_bytes(cut)
    asked.clear()
    run(source, target, answer)
    assert len(asked) == 2
    assert sorted(a["custom_id"] for a in answers(target)) == [f"q{i}" for i in range(6)]
    asked.clear()
    assert run(source, target, answer) == (0, 0)
    assert asked == []


def test_refuses_an_output_of_another_input(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(line("a"), encoding="utf-8")
    run(source, target)
    source.write_text(line("b"), encoding="utf-8")
    with pytest.raises(RequestError, match="another input"):
        run(source, target)
    target.write_text("hello\n")
    with pytest.raises(RequestError, match="not a batch answer"):
        finished(target, read_jobs(source))


def test_missing_file_and_concurrent_writer(tmp_path):
    with pytest.raises(RequestError, match="no batch file"):
        read_jobs(tmp_path / "none.jsonl")
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(line("a"), encoding="utf-8")

    def nested(jobs):
        with pytest.raises(RequestError, match="another process"):
            run(source, target)
        yield from echo(jobs)

    assert run(source, target, nested) == (1, 0)


SLOW = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from tests_batch_support import echo, run
    def slow(jobs):
        for job, result in echo(jobs):
            time.sleep(0.01)
            yield job, result
    run(Path(sys.argv[1]), Path(sys.argv[2]), slow)
    """
)


def test_kill_nine_loses_and_repeats_nothing(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(line(f"q{i}") for i in range(60)), encoding="utf-8")
    (tmp_path / "tests_batch_support.py").write_text(Path(__file__).read_text(encoding="utf-8"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    kills = 0
    for delay in (0.05, 0.15, 0.25):
        child = subprocess.Popen([sys.executable, "-c", SLOW, str(source), str(target)], env=environment)
        begun = target.stat().st_size if target.exists() else 0
        deadline = time.monotonic() + 60
        while child.poll() is None and time.monotonic() < deadline:
            if target.exists() and target.stat().st_size > begun:
                break
            time.sleep(0.005)
        time.sleep(delay)
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
            kills += 1
        child.wait()
    assert kills > 0
    run(source, target)
    assert sorted(a["custom_id"] for a in answers(target)) == sorted(f"q{i}" for i in range(60))


def test_parse_body_names_the_field():
    with pytest.raises(RequestError, match=r"body\.messages"):
        parse_body("/v1/chat/completions", {"messages": []})
    parts = [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]
    body = parse_body("/v1/chat/completions", {"messages": parts})
    with pytest.raises(RequestError, match="only text parts"):
        body.messages[0].plain()
