"""`hasten batch`: a file of OpenAI batch requests in, a file of answers out; survives kill -9 at any moment.

Every answer is one appended line, flushed and synced before the next request is counted as done. A restart reads
the output, drops a torn last line, and runs only what has no answer yet: nothing is lost, nothing answered twice.
A line's identity is its number and its content, so an output that belongs to another input is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from hasten.core.errors import HastenError, RequestError
from hasten.lm.openai import ChatBody, TextBody, parse_body, response_body
from hasten.lm.request import Completion


@dataclass(frozen=True)
class Job:
    """One line of the input. ``error`` is set when the line itself is broken."""

    id: str
    line: int
    custom_id: str | None
    body: ChatBody | TextBody | None
    error: RequestError | None = None


_BEGIN = b'{"id": "batch_req_'  # of every line of an output, so a torn one can be told from foreign text
Answer = Callable[[Iterable[Job]], Iterator[tuple[Job, Completion | HastenError]]]


def read_jobs(path: Path) -> list[Job]:
    """Parse the input. A broken line becomes a job with an error; empty lines are skipped."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise RequestError(f"no batch file at {path}") from None
    except (IsADirectoryError, PermissionError) as error:
        raise RequestError(f"{path} cannot be read: {error}") from None
    jobs: list[Job] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if line.strip():
            jobs.append(_job(number, line, seen))
    return jobs


def _job(number: int, line: bytes, seen: dict[str, int]) -> Job:
    identity = f"batch_req_{number}_{hashlib.sha256(line.strip()).hexdigest()[:12]}"
    custom_id: str | None = None
    try:
        try:
            data = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise RequestError(
                f"line {number}: not valid UTF-8 ({error.reason} at byte {error.start})"
            ) from None
        except (json.JSONDecodeError, RecursionError) as error:
            raise RequestError(f"line {number}: not valid JSON ({error})") from None
        if not isinstance(data, dict):
            raise RequestError(f"line {number}: must be a JSON object")
        if isinstance(data.get("custom_id"), str):
            custom_id = data["custom_id"]
        if custom_id is None:
            raise RequestError(f"line {number}: custom_id must be a string")
        if custom_id in seen:
            raise RequestError(f"line {number}: custom_id {custom_id!r} was used on line {seen[custom_id]}")
        seen[custom_id] = number
        if data.get("method", "POST") != "POST":
            raise RequestError(f"line {number}: method must be POST")
        return Job(identity, number, custom_id, parse_body(str(data.get("url")), data.get("body")))
    except RequestError as error:
        return Job(identity, number, custom_id, None, error)


def finished(path: Path, jobs: Iterable[Job]) -> set[str]:
    """Ids already answered in the output; cuts off a torn last line. Refuses a foreign output file, untouched."""
    if not path.exists():
        return set()
    raw = path.read_bytes()
    whole = raw.rfind(b"\n") + 1
    torn = raw[whole:]
    if torn[: len(_BEGIN)] != _BEGIN[: len(torn)]:
        raise RequestError(f"the last line of {path} is not a batch answer; choose another output file")
    known = {job.id for job in jobs}
    done: set[str] = set()
    for number, line in enumerate(raw[:whole].splitlines(), start=1):
        try:
            identity = json.loads(line)["id"]
        except (ValueError, KeyError, TypeError):
            raise RequestError(
                f"{path} line {number} is not a batch answer; choose another output file"
            ) from None
        if identity not in known:
            raise RequestError(
                f"{path} holds answers to another input (line {number}: {identity}); choose another output file"
            )
        done.add(identity)
    if torn:
        with path.open("r+b") as stream:
            stream.truncate(whole)
    return done


def run_batch(
    source: Path,
    target: Path,
    answer: Answer,
    *,
    model: str,
    decode: Callable[[int], str],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[int, int]:
    """Answer every request of ``source`` into ``target``; return (answered now, failed now).

    ``answer`` runs requests (continuously batched) and yields each as it finishes. ``progress(done, total)`` is
    called after every written line. Raises `RequestError` if another process is writing the same output.
    """
    if target.is_dir() or not target.parent.is_dir():
        raise RequestError(f"{target} cannot be the output: give a file in a folder that exists")
    lock = FileLock(str(target) + ".lock")
    try:
        with _writing(target):
            lock.acquire(timeout=0)
    except Timeout:
        raise RequestError(
            f"another process is writing {target}; wait for it or choose another output"
        ) from None
    try:
        jobs = read_jobs(source)
        with _writing(target):
            done = finished(target, jobs)
        todo = [job for job in jobs if job.id not in done]
        failed = 0
        progress(len(done), len(jobs))
        with _writing(target), target.open("ab") as stream:
            for count, (job, result) in enumerate(_results(todo, answer), start=len(done) + 1):
                failed += not isinstance(result, Completion)
                _write(stream, _record(job, result, model, decode))
                progress(count, len(jobs))
        return len(todo), failed
    finally:
        lock.release()


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Disk full, no permission: a `RequestError`. What is written stays, and the next run goes on from there."""
    try:
        yield
    except Timeout:
        raise
    except OSError as error:
        raise RequestError(
            f"{target} cannot be written: {error.strerror or error}; mend that and run the batch again to go on"
        ) from None


def _results(jobs: list[Job], answer: Answer) -> Iterator[tuple[Job, Completion | HastenError]]:
    for job in jobs:
        if job.error is not None:
            yield job, job.error
    yield from answer(job for job in jobs if job.error is None)


def _record(
    job: Job, result: Completion | HastenError, model: str, decode: Callable[[int], str]
) -> dict[str, Any]:
    out: dict[str, Any] = {"id": job.id, "custom_id": job.custom_id, "response": None, "error": None}
    if isinstance(result, Completion):
        body = response_body(result, model, chat=isinstance(job.body, ChatBody), decode=decode)
        out["response"] = {"status_code": 200, "request_id": job.id, "body": body}
    else:
        out["error"] = {"code": "invalid_request_error", "message": str(result), "line": job.line}
    return out


def _write(stream: BinaryIO, record: dict[str, Any]) -> None:
    stream.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
    stream.flush()
    os.fsync(stream.fileno())
