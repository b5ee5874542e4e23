"""The child's end of the pipe between a measuring process and its children: JSON lines in, JSON lines out.

Commands come on standard input, replies leave on a pipe of their own, so that nothing a library prints can be
mistaken for a reply. Standard library only: other engines' environments run this module too.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Mapping
from typing import Any

from hasten.core.errors import HastenError

_PR_SET_PDEATHSIG = 1


class Server:
    """Answers commands: ``{"do": NAME, "with": {...}}`` calls ``do_NAME(**with)``."""

    def answer(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """``{"ok": result}``, or the error: a `HastenError` with its class, any other with its traceback."""
        try:
            return {"ok": getattr(self, "do_" + command["do"])(**command.get("with", {}))}
        except HastenError as error:
            return {"error": str(error), "class": type(error).__name__}
        except Exception as error:  # the parent turns it into a MeasureError that shows the traceback
            text = "".join(traceback.format_exception(error)).strip()
            return {"error": f"{type(error).__name__}: {error}", "traceback": text}

    def do_peak(self) -> float:
        return peak_rss_mb()

    def close(self) -> None:
        """Free what is held, after the last command."""


def serve(server: Server, reply_fd: int, parent: int, cpus: str) -> None:
    """Answer until standard input ends. cpus: comma-separated CPUs to pin this process to, empty for all."""
    _die_with(parent)
    os.set_inheritable(reply_fd, False)  # or a grandchild could keep the pipe open after our death
    if cpus and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, [int(cpu) for cpu in cpus.split(",")])
    with os.fdopen(reply_fd, "w", buffering=1) as out:
        for line in sys.stdin:
            out.write(json.dumps(server.answer(json.loads(line))) + "\n")
    server.close()


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, however it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)


def peak_rss_mb() -> float:
    """Highest resident set of this process in MiB since its start or the last `reset_peak_rss`."""
    try:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 1024)


def reset_peak_rss() -> bool:
    """Start a new peak at the present resident set. False where the kernel cannot."""
    try:
        with open("/proc/self/clear_refs", "w") as stream:
            stream.write("5")
    except OSError:
        return False
    return True
