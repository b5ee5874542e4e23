"""The parent's side of a measurement: child processes, driven over pipes."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from hasten.core import errors
from hasten.core.errors import HastenError, MeasureError
from hasten.core.plan import Plan
from hasten.measure.child import class_path, plan_to_wire
from hasten.workloads.workload import Run, Workload

_START = "from hasten.measure.child import main; main()"
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "RAYON_NUM_THREADS",
)


class ChildProcess:
    """A child that answers JSON lines, pinned to ``cpus``, told to use ``threads`` threads. A context manager.

    command: a Python interpreter and its arguments; the reply pipe's descriptor, this process's id, ``threads`` and the
    CPUs are appended, which is what `hasten.measure.wire.serve` wants. path: its module search path. variables: further
    environment variables.

    `ask` waits for the child's answer. It raises the child's own `HastenError`, or `MeasureError` with the
    traceback or the end of its standard error when it failed in another way, died, answered what is no reply, or
    took longer than ``timeout`` seconds for one command. Leaving the context kills the child, whatever it is doing;
    should this process be killed itself, the kernel kills the child.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        path: Sequence[str],
        threads: int,
        cpus: Sequence[int] = (),
        timeout: float | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.command = tuple(command)
        self.path = tuple(path)
        self.threads = threads
        self.cpus = tuple(cpus)
        self.timeout = timeout
        self.variables = dict(variables or {})
        self._process: subprocess.Popen[str] | None = None
        self._replies = -1
        self._buffer = b""

    def __enter__(self) -> Self:
        replies, child_end = os.pipe()
        self._replies = replies
        self._stderr = tempfile.TemporaryFile(mode="w+b")
        environment = {**os.environ, **{name: str(self.threads) for name in _THREAD_VARIABLES}}
        environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(entry) for entry in self.path)
        environment["TOKENIZERS_PARALLELISM"] = "false"
        arguments = [str(child_end), str(os.getpid()), str(self.threads), ",".join(map(str, self.cpus))]
        try:
            # Its own session: Ctrl-C in the terminal reaches us alone, and we end the child.
            self._process = subprocess.Popen(
                [*self.command, *arguments],
                stdin=subprocess.PIPE,
                stdout=self._stderr,
                stderr=self._stderr,
                pass_fds=(child_end,),
                start_new_session=True,
                env=environment | self.variables,
                text=True,
            )
        except BaseException:
            os.close(replies)
            self._stderr.close()
            raise
        finally:
            os.close(child_end)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its own group: what the session started goes with it
        process.wait()
        if process.stdin is not None:
            with contextlib.suppress(OSError):  # unsent bytes to a process that is gone
                process.stdin.close()
        os.close(self._replies)
        self._stderr.close()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def ask(self, do: str, **arguments: Any) -> Any:
        """The child's result of one command."""
        process = self._process
        if process is None or process.stdin is None:
            raise MeasureError(f"{self.name}: its process is not running")
        try:
            process.stdin.write(json.dumps({"do": do, "with": arguments}) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise self._died(do) from None
        line = self._read_line(do)
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if isinstance(answer, dict) and "ok" in answer:
            return answer["ok"]
        if not isinstance(answer, dict) or "error" not in answer:
            raise MeasureError(
                f"{self.name}: {do} was answered with {line[:200]!r}, which is no reply{self._tail()}"
            )
        raise self._failed(do, answer)

    def _read_line(self, do: str) -> bytes:
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._replies], [], [], self.timeout)
            if not ready:
                raise MeasureError(f"{self.name}: {do} took longer than {self.timeout:g} s")
            chunk = os.read(self._replies, 65536)
            if not chunk:
                raise self._died(do)
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _died(self, do: str) -> MeasureError:
        assert self._process is not None
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return MeasureError(f"{self.name}: its process closed its pipe during {do}{self._tail()}")
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
            if -code == signal.SIGKILL:
                how += " (often: out of memory)"
        else:
            how = f"exited with code {code}"
        return MeasureError(f"{self.name}: its process {how} during {do}{self._tail()}")

    def _failed(self, do: str, answer: Mapping[str, Any]) -> HastenError:
        kind = getattr(errors, str(answer.get("class")), None)
        if isinstance(kind, type) and issubclass(kind, HastenError):
            error = kind.__new__(kind)  # constructors differ; the message is already complete
            Exception.__init__(error, f"{self.name}: {answer['error']}")
            return error
        trace = answer.get("traceback", "")
        return MeasureError(f"{self.name}: {do} failed: {answer['error']}\n{trace}".rstrip())

    def _tail(self, lines: int = 20) -> str:
        """The end of what the child printed, for an error message."""
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - 8192))
        text = self._stderr.read().decode(errors="replace").strip()
        return "; it printed:\n" + "\n".join(text.splitlines()[-lines:]) if text else ""


class SessionProcess(ChildProcess):
    """One plan's session in a child. Every call waits for its answer and raises what `ChildProcess` says."""

    def __init__(
        self, name: str, *, threads: int, cpus: Sequence[int] = (), timeout: float | None = None
    ) -> None:
        super().__init__(
            name,
            [sys.executable, "-P", "-c", _START],
            path=sys.path,
            threads=threads,
            cpus=cpus,
            timeout=timeout,
        )
        self.load_peak_mb = 0.0

    def open(self, workload: Workload, plan: Plan, options: Mapping[str, Any]) -> None:
        """Load ``plan`` and the job's input; afterwards `load_peak_mb` holds the peak RSS in MiB."""
        answer = self.ask(
            "open", workload=class_path(type(workload)), plan=plan_to_wire(plan), options=dict(options)
        )
        self.load_peak_mb = float(answer["load_peak_mb"])

    def run(self) -> Run:
        """Do the job once. `MeasureError` if the session reports impossible figures."""
        answer = self.ask("run")
        run = Run(float(answer["units"]), float(answer["seconds"]), answer["detail"])
        for name, value in (("units", run.units), ("seconds", run.seconds)):
            if not 0 < value < float("inf"):
                raise MeasureError(
                    f"{self.name}: a run reported {value} {name}; it must be positive and finite"
                )
        return run

    def peak_mb(self) -> float:
        """Peak RSS in MiB since the session was opened (since start where the kernel cannot reset it)."""
        return float(self.ask("peak"))

    def quality(self) -> float:
        value = float(self.ask("quality"))
        if not abs(value) < float("inf"):
            raise MeasureError(f"{self.name}: quality is {value}; its output is broken")
        return value

    def facts(self) -> dict[str, Any]:
        return dict(self.ask("facts"))

    def close(self) -> None:
        self.ask("close")
