"""The machine a figure was measured on, and whether it was quiet enough to publish the figure.

A CPU measurement is worth as much as the machine was idle. `BusyMonitor` looks at two windows, one before the
first run and one around all timed runs, and attributes every CPU second to us, to named other processes, to
unseen ones (short-lived or outside our view) or to the hypervisor (steal).
"""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

# CPU flags that decide which kernels run, in the order they are shown.
_ISA = (
    *("sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni"),
    *("avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx512_vpopcntdq"),
    *("amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "asimdhp", "bf16", "i8mm", "sve", "sve2"),
)

# Cores that other processes may use on average before a figure is called disturbed.
OTHERS_LIMIT = 0.10
STEAL_LIMIT = 0.10


@dataclass(frozen=True)
class Machine:
    """Facts of machine and software, stored beside every figure. ``commit`` None: not run from a checkout."""

    cpu: str
    instruction_sets: tuple[str, ...]
    cpus: int  # logical CPUs this process may use
    cores: int  # physical cores of the machine
    memory_mb: int
    os: str
    python: str
    versions: Mapping[str, str]  # distribution -> version
    threads: int
    affinity: tuple[int, ...]
    load: tuple[float, float, float]  # load averages over 1, 5 and 15 minutes when the measurement began
    commit: str | None
    dirty: bool  # the source tree differed from ``commit``

    def to_dict(self) -> dict[str, Any]:
        out = asdict(self)
        out["instruction_sets"] = list(self.instruction_sets)
        out["affinity"] = list(self.affinity)
        out["load"] = list(self.load)
        return out

    def summary(self) -> str:
        """One line for tables and reports."""
        return (
            f"{self.cpu}, {self.cores} cores, {self.threads} threads, {self.memory_mb / 1024:.0f} GiB, "
            f"{' '.join(i for i in self.instruction_sets if i.startswith(('avx2', 'avx512', 'amx', 'sve')))}"
        ).rstrip(", ")


def machine(threads: int, affinity: Iterable[int]) -> Machine:
    """Describe this machine for a measurement on ``threads`` threads pinned to the CPUs ``affinity``."""
    cpu, flags = _cpu_info()
    commit, dirty = source_state()
    load = psutil.getloadavg()
    return Machine(
        cpu=cpu,
        instruction_sets=tuple(name for name in _ISA if name in flags),
        cpus=len(usable_cpus()),
        cores=psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
        memory_mb=psutil.virtual_memory().total // 2**20,
        os=f"{_distribution()} ({platform.system()} {platform.release()})",
        python=platform.python_version(),
        versions=_versions(),
        threads=threads,
        affinity=tuple(affinity),
        load=(round(load[0], 2), round(load[1], 2), round(load[2], 2)),
        commit=commit,
        dirty=dirty,
    )


def usable_cpus() -> tuple[int, ...]:
    """Logical CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def pinned_cpus(threads: int | None = None) -> tuple[int, ...]:
    """CPUs to pin ``threads`` threads to: one per physical core first, hardware siblings after.

    ``None`` takes one thread per physical core among the CPUs this process may use. The result is shorter
    than ``threads`` when more threads than CPUs were asked for.
    """
    usable = usable_cpus()
    first: list[int] = []
    siblings: list[int] = []
    seen: set[str] = set()
    for cpu in usable:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            core = path.read_text().strip()
        except OSError:
            core = str(cpu)
        (siblings if core in seen else first).append(cpu)
        seen.add(core)
    return tuple((first + siblings)[: len(first) if threads is None else threads])


@functools.cache
def _cpu_info() -> tuple[str, frozenset[str]]:
    name, flags = platform.processor() or platform.machine(), frozenset[str]()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            key = key.strip()
            if key == "model name":
                name = value.strip()
            elif key in ("flags", "Features"):
                flags = frozenset(value.split())
                break
    except OSError:
        pass
    return name, flags


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return platform.system()


def _versions() -> dict[str, str]:
    out = {}
    for name in ("hasten", "torch", "numpy"):
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = "not installed" if name != "hasten" else "source"
    return out


def source_state() -> tuple[str | None, bool]:
    """(git commit, dirty) of the checkout that this very file belongs to, or (None, False).

    Only ``src`` and ``native`` make a tree dirty: published results live in the same repository. A copy
    installed inside somebody else's repository is not taken for that repository's commit.
    """
    here = Path(__file__).resolve()

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(here.parent), *args], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        top = git("rev-parse", "--show-toplevel")
        commit = git("rev-parse", "HEAD")
        folders = [name for name in ("src", "native") if (Path(top) / name).is_dir()]
        changed = git("-C", top, "status", "--porcelain", "--", *folders)
    except (OSError, subprocess.SubprocessError):
        return None, False
    return commit, bool(changed)


@dataclass(frozen=True)
class Busyness:
    """Who else used the CPUs in a window of ``seconds``. Figures in cores (1.0 = one CPU, all the time)."""

    seconds: float
    others: float
    steal: float
    processes: tuple[tuple[str, int, float], ...] = field(default=())  # (name, pid, cores), busiest first

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why this window disturbs a measurement; empty when it does not."""
        out = []
        if self.others > OTHERS_LIMIT:
            named = ", ".join(f"{name} (pid {pid}) {cores:.2f}" for name, pid, cores in self.processes)
            unseen = self.others - sum(cores for _, _, cores in self.processes)
            if unseen > 0.05 or not named:
                small = f"small or short-lived processes {max(unseen, 0):.2f}"
                named = f"{named}, {small}" if named else small
            out.append(f"other processes used {self.others:.2f} cores (limit {OTHERS_LIMIT}): {named}")
        if self.steal > STEAL_LIMIT:
            out.append(f"the hypervisor took {self.steal:.2f} cores (limit {STEAL_LIMIT})")
        return tuple(out)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "processes": [list(p) for p in self.processes], "reasons": list(self.reasons)}


class BusyMonitor:
    """Accounts CPU time of everybody but this process and its children between `start` and `stop`.

    A child that ends in between is recognised as ours once this process has waited for it.
    """

    def __init__(self) -> None:
        self._began = 0.0
        self._before: _Snapshot | None = None

    def start(self) -> None:
        self._began = time.monotonic()
        self._before = _snapshot()

    def stop(self) -> Busyness:
        if self._before is None:
            raise RuntimeError("BusyMonitor.stop called before start")
        before, after = self._before, _snapshot()
        seconds = max(time.monotonic() - self._began, 1e-6)
        # What a child that ended had used before moves from `mine` to `reaped`, so all of `before.mine` counts.
        mine = sum(after.mine.values()) + after.reaped - sum(before.mine.values()) - before.reaped
        rest = []
        for key, (name, used) in after.others.items():
            spent = (used - before.others.get(key, (name, 0.0))[1]) / seconds
            if spent >= 0.01:
                rest.append((name, key[0], round(spent, 3)))
        rest.sort(key=lambda item: -item[2])
        # The total catches what the list cannot: processes that came and went, or that we may not see.
        total = max(0.0, (after.busy - before.busy - mine) / seconds)
        return Busyness(
            seconds=round(seconds, 3),
            others=round(max(total, sum(cores for _, _, cores in rest)), 3),
            steal=round(max(0.0, (after.steal - before.steal) / seconds), 3),
            processes=tuple(rest[:5]),
        )

    def sample(self, seconds: float = 1.0) -> Busyness:
        """Watch for ``seconds`` while this process sleeps."""
        self.start()
        time.sleep(seconds)
        return self.stop()


_Key = tuple[int, float]  # pid and creation time: pids are reused


@dataclass(frozen=True)
class _Snapshot:
    busy: float
    steal: float
    mine: dict[_Key, float]
    reaped: float  # of our children that ended and were waited for
    others: dict[_Key, tuple[str, float]]


def _snapshot() -> _Snapshot:
    me = psutil.Process()
    own = {me.pid, *(child.pid for child in me.children(recursive=True))}
    mine: dict[_Key, float] = {}
    others: dict[_Key, tuple[str, float]] = {}
    for process in psutil.process_iter(["pid", "name", "create_time", "cpu_times"]):
        info = process.info
        if info["cpu_times"] is None:  # no permission, or just gone
            continue
        key = (info["pid"], info["create_time"])
        used = info["cpu_times"].user + info["cpu_times"].system
        if info["pid"] in own:
            mine[key] = used
        else:
            others[key] = (info["name"] or "?", used)
    times = psutil.cpu_times()
    busy = times.user + times.system + getattr(times, "nice", 0.0)
    own_times = me.cpu_times()
    reaped = own_times.children_user + own_times.children_system
    return _Snapshot(busy, getattr(times, "steal", 0.0), mine, reaped, others)
