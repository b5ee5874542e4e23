"""`hasten chat`: history, commands, end of input, and Ctrl-C on a real terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_run import hasten
from rich.console import Console

from hasten.cli import chat as chat_command
from hasten.core.errors import ModelError, RequestError
from hasten.lm.llm import LLM
from hasten.lm.request import SamplingParams


class Script:
    """Runs a scripted conversation with the tiny model; ``asked`` holds the messages of every turn."""

    def __init__(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.llm, self.monkeypatch = llm, monkeypatch
        self.asked: list[list[dict[str, str]]] = []
        self.said = io.StringIO()

    def __call__(self, *lines: str, system: str | None = None) -> None:
        original = type(self.llm).chat

        def spy(llm: LLM, messages, params, stream):
            self.asked.append([dict(m) for m in messages])
            return original(llm, messages, params, stream=stream)

        self.monkeypatch.setattr(type(self.llm), "chat", spy)
        self.monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        params = SamplingParams(max_tokens=5, temperature=0)
        chat_command.converse(self.llm, params, system, Console(file=self.said, width=200))

    def roles(self) -> list[str]:
        return ["".join(m["role"][0] for m in messages) for messages in self.asked]


@pytest.fixture(scope="module")
def llm(tiny_path: Path) -> LLM:
    return LLM(tiny_path, dtype="float32", page_size=4)


@pytest.fixture
def script(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    yield Script(llm, monkeypatch)
    assert not llm.engine.busy
    assert llm.engine.cache.pool.used == len(llm.engine.cache.store)


def test_the_history_grows_by_what_was_said(script, llm, capsys):
    script("one", "", "  two  ", "/exit", "three")
    assert script.roles() == ["u", "uau"]
    out = capsys.readouterr().out.split("\n")
    first = script.asked[1]
    assert [first[0]["content"], first[2]["content"]] == ["one", "two"]
    alone = llm.chat(script.asked[0], SamplingParams(max_tokens=5, temperature=0), stream=False).text
    assert first[1]["content"] == alone
    assert "\n".join(out).startswith(alone + "\n")


def test_reset_undo_and_unknown_commands(script):
    script("one", "two", "/undo", "three", "/reset", "four", "/undo", "/undo", "five", "/what", system="S")
    assert script.roles() == ["su", "suau", "suau", "su", "su"]
    assert [m[-1]["content"] for m in script.asked] == ["one", "two", "three", "four", "five"]
    assert script.asked[2][1]["content"] == "one"
    assert "/reset starts over" in script.said.getvalue()


def test_a_refused_line_leaves_the_history_alone(script):
    script("one", "x" * 3000, "caf\udce9 [/red]", "two")
    said = script.said.getvalue()
    assert "the context holds 512" in said
    assert "not valid Unicode" in said
    assert script.roles()[-1] == "uau"
    assert [m["content"] for m in script.asked[-1]][::2] == ["one", "two"]


def test_a_history_that_outgrows_the_context_says_so_and_reset_helps(script):
    script(*(f"{i} " + "lorem ipsum dolor " * 7 for i in range(6)), "/reset", "short")
    assert "context holds 512" in script.said.getvalue()
    assert script.roles()[-1] == "u"


@pytest.mark.parametrize("times", [1, 2])
def test_an_interrupt_keeps_what_was_printed(script, llm, monkeypatch, capsys, times):
    """Ctrl-C after the third delta, and a second one while the first is handled."""
    original = type(llm)._step
    steps = iter(range(1000))

    def step(self):
        original(self)
        if next(steps) == 3:
            signal.raise_signal(signal.SIGINT)

    cancel = type(llm)._cancel

    def cancelling(self, requests):
        cancel(self, requests)
        if times == 2 and next(steps) == 4:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(type(llm), "_step", step)
    monkeypatch.setattr(type(llm), "_cancel", cancelling)
    script("one", "two")
    assert "(stopped)" in script.said.getvalue()
    assert script.roles() == ["u", "uau"]
    partial = script.asked[1][1]["content"]
    assert capsys.readouterr().out.startswith(partial)
    whole = llm.chat(script.asked[0], SamplingParams(max_tokens=5, temperature=0), stream=False).text
    assert whole.startswith(partial)
    assert len(partial) < len(whole)


def test_stopped_before_the_first_token_the_question_is_taken_back(script, llm, monkeypatch):
    original = type(llm)._step
    steps = iter(range(1000))

    def step(self):
        if next(steps) == 0:
            raise KeyboardInterrupt
        original(self)

    monkeypatch.setattr(type(llm), "_step", step)
    script("one", "two")
    assert [[m["content"] for m in messages] for messages in script.asked] == [["one"], ["two"]]


def test_bytes_that_are_not_utf8_end_one_line_only(tiny_path):
    result = hasten(
        "chat", "--model", tiny_path, "--dtype", "float32", "-n", "3", input=b"caf\xe9\nhello\n/exit\n"
    )
    assert result.exit_code == 0
    assert result.stdout.count("\n") == 1  # one answer
    assert "not valid Unicode" in result.stderr


def test_a_model_without_template_and_bad_settings(tiny_path, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in tiny_path.iterdir():
        if file.name != "tokenizer_config.json":
            (bare / file.name).symlink_to(file)
    with pytest.raises(ModelError, match="no chat template"):
        hasten("chat", "--model", bare, "--dtype", "float32", input="hello\n")
    with pytest.raises(RequestError, match="top_p = 7"):
        hasten("chat", "--model", tiny_path, "--top-p", "7", input="hello\n")


class Terminal:
    """`hasten chat` on a pseudo-terminal."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        self.master, slave = pty.openpty()
        self.child = subprocess.Popen(
            [sys.executable, "-m", "hasten.cli.main", "chat", *arguments],
            env={**environment, "TERM": "dumb"},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(slave)
        self.seen = ""

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """Read until ``pattern`` appears after what was matched before; return the text up to its end."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen, re.DOTALL)):
            ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"waited for {pattern!r}, saw {self.seen!r}"
            try:
                data = os.read(self.master, 65536)
            except OSError:
                data = b""
            assert data, f"ended before {pattern!r}, saw {self.seen!r}"
            self.seen += data.decode(errors="replace")
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def close(self) -> None:
        if self.child.poll() is None:
            self.child.kill()
        self.child.wait()
        os.close(self.master)


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_ctrl_c_stops_the_answer_not_the_program(tiny_path, environment, tmp_path):
    """Ctrl-C as typed: at the prompt, in an answer, in the next answer; then Ctrl-D."""
    from lm_tiny import write_checkpoint
    from safetensors.torch import load_file, save_file

    # An endless talker: a long context, and an end token that never has the highest logit.
    slow = write_checkpoint(tmp_path / "slow", positions=1 << 15, layers=4, head_size=32)
    weights = load_file(slow / "model.safetensors")
    weights["lm_head.weight"][:3] = 0
    save_file(weights, slow / "model.safetensors")
    arguments = ["--model", str(slow), "--dtype", "float32", "-n", "30000", "--temperature", "0"]
    arguments += ["--plan", str(tmp_path / "plan.toml")]
    (tmp_path / "plan.toml").write_text("[engine]\nkv_tokens = 32768\n")
    terminal = Terminal(arguments, environment)
    try:
        terminal.wait_for("> ")
        time.sleep(0.5)  # the prompt is printed a moment before the line editor listens for signals
        terminal.type("\x03")
        terminal.wait_for("Ctrl-C stops an answer.*> ")
        for _ in range(2):
            terminal.type("hello\n")
            terminal.wait_for("hello\r?\n.+?[^\r\n]{3}")
            terminal.type("\x03")
            terminal.wait_for(r"\(stopped\).*> ")
        assert terminal.child.poll() is None
        terminal.type("\x04")
        assert terminal.child.wait(timeout=60) == 0
    finally:
        terminal.close()
