"""`hasten batch` on a real model: kill -9 in the middle, resuming, a broken line, outputs that must not be touched."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_run import hasten

from hasten.core.errors import RequestError
from hasten.lm.llm import LLM
from hasten.lm.request import SamplingParams


def request(custom_id: str, prompt: str, tokens: int = 6) -> str:
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body})


@pytest.fixture
def batch(tiny_path: Path):
    def run(source: Path, target: Path, *more: str):
        return hasten("batch", source, target, "--model", tiny_path, "--dtype", "float32", *more)

    return run


def answers(target: Path) -> dict[str, dict]:
    records = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    found = {record["custom_id"]: record for record in records}
    assert len(found) == len(records)  # nothing answered twice
    return found


def test_kill_9_and_a_broken_line(tmp_path, tiny_path, batch, environment):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts = {f"q{i}": f"Question {i}: which river?" for i in range(90)}
    lines = [request(name, prompt, 24) for name, prompt in prompts.items()]
    lines.insert(45, '{"custom_id": "broken", "body": ')
    source.write_text("\n".join(lines), encoding="utf-8")
    arguments = ["batch", source, target, "--model", tiny_path, "--dtype", "float32"]
    child = subprocess.Popen(
        [sys.executable, "-m", "hasten.cli.main", *arguments], env=environment, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while not (target.exists() and target.read_bytes().count(b"\n") > 5) and time.monotonic() < deadline:
            assert child.poll() is None
            time.sleep(0.002)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    done = target.read_bytes().count(b"\n")
    assert 5 < done < len(lines)
    result = batch(source, target, "--json")
    assert result.exit_code == 0
    summary = json.loads(result.stdout)
    assert summary["answered"] + summary["failed"] == len(lines) - done
    found = answers(target)
    assert len(found) == len(lines)
    assert found[None]["error"]["line"] == 46
    assert "not valid JSON" in found[None]["error"]["message"]
    llm = LLM(tiny_path, dtype="float32")
    for name in ("q0", "q44", "q89"):
        (choice,) = found[name]["response"]["body"]["choices"]
        params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
        assert choice["text"] == llm.generate(prompts[name], params)[0].text
    again = batch(source, target)
    assert "0 answered, 0 failed" in again.stderr
    assert len(answers(target)) == len(lines)


def test_progress_and_counts(tmp_path, batch):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [request("a", "The quick"), request("b", ""), request("c", "fox"), request("d", "x " * 2000)]
    source.write_text("\n".join(lines) + "\n")
    result = batch(source, target)
    assert result.stdout == ""
    assert "2 answered, 2 failed" in result.stderr
    assert "4/4" in result.stderr
    found = answers(target)
    assert "the prompt is empty" in found["b"]["error"]["message"]
    assert "context holds 512" in found["d"]["error"]["message"]
    assert found["c"]["response"]["body"]["usage"]["completion_tokens"] == 6


def test_inputs_that_cannot_be_read_are_refused_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("hasten.lm.build.open_checkpoint", None)
    with pytest.raises(RequestError, match="no batch file at"):
        hasten("batch", tmp_path / "absent.jsonl", tmp_path / "out.jsonl")
    with pytest.raises(RequestError, match="cannot be read"):
        hasten("batch", tmp_path, tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    "content",
    [b"my only copy", b"line one\nline two without an end", b'{"id": 5}\n', b"\x00\xff"],
)
def test_a_file_that_is_no_output_stays_as_it_is(tmp_path, batch, content):
    source, target = tmp_path / "in.jsonl", tmp_path / "precious.txt"
    source.write_text(request("a", "The quick"))
    target.write_bytes(content)
    with pytest.raises(RequestError, match="choose another output file"):
        batch(source, target)
    assert target.read_bytes() == content
    with pytest.raises(RequestError, match="choose another output file"):
        batch(source, source)
    assert source.read_text() == request("a", "The quick")


def test_outputs_that_cannot_be_written(tmp_path, batch):
    source = tmp_path / "in.jsonl"
    source.write_text(request("a", "The quick"))
    for target in (tmp_path, tmp_path / "absent" / "out.jsonl"):
        with pytest.raises(RequestError, match="give a file in a folder that exists"):
            batch(source, target)


def test_a_full_disk_is_an_error_and_the_rest_is_done_next_time(tmp_path, batch):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(request(f"q{i}", f"Question {i}") for i in range(8)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # bytes; two answers fit
    try:
        with pytest.raises(RequestError, match=r"out\.jsonl cannot be written: .*run the batch again"):
            batch(source, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert 0 < target.read_bytes().count(b"\n") < 8
    batch(source, target)
    assert set(answers(target)) == {f"q{i}" for i in range(8)}
