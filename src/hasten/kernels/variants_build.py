"""Compiles generated attention variants and keeps them in hasten's cache folder.

A built variant is named by a hash over its source, the shipped headers, the flags, the compiler's identity and the
instruction-set level; a change of any of them builds anew. It appears atomically (built under another name, then
renamed), and a lock keeps processes from building the same one twice.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import filelock

from hasten.core import paths
from hasten.core.errors import HastenError, UnsupportedError

HEADERS = Path(__file__).parent / "include"
_LOADED: dict[tuple[str, str, str], Compiled] = {}


class CompileError(HastenError):
    """A variant's C++ does not compile; the message is the compiler's."""


@dataclass(frozen=True, eq=False)
class Compiled:
    """A loaded variant: addresses of its functions. ``library`` keeps them alive."""

    path: Path
    library: ctypes.CDLL
    worker: int
    join: int
    call_size: int


@cache
def compiler() -> tuple[str, str] | None:
    """(path, version line) of the C++ compiler: ``$CXX``, else g++, else clang++; None when there is none."""
    for name in (os.environ.get("CXX", ""), "g++", "clang++"):
        found = shutil.which(name) if name else None
        if found is None:
            continue
        try:
            done = subprocess.run(
                [found, "--version"], capture_output=True, text=True, timeout=30, check=True
            )
        except (OSError, subprocess.SubprocessError):
            continue
        return found, done.stdout.partition("\n")[0]
    return None


@cache
def _headers() -> tuple[str, str]:
    """(digest of the headers, folder). Raises `UnsupportedError` when they were not installed."""
    files = sorted(HEADERS.glob("*.h"))
    if not files:
        raise UnsupportedError("the kernel headers are missing; install hasten again with `pip install .`")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest(), str(HEADERS)


def flags(level: str) -> list[str]:
    """The compiler's flags: those of the native library of this level."""
    own = (HEADERS / f"flags_{level}.txt").read_text(encoding="utf-8").split()
    # No math function of a functor needs errno or traps; without them its loops vectorise.
    more = ["-std=c++20", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
    return [*own, *more]


def compiled(name: str, source: str, level: str) -> Compiled:
    """Load the variant, building it if the cache folder has none.

    Raises `UnsupportedError` without a compiler and `CompileError` with what the compiler said.
    """
    folder = paths.home() / "variants"
    found = _LOADED.get((str(folder), source, level))
    if found is not None:
        return found
    tool = compiler()
    if tool is None:
        raise UnsupportedError(
            f"attention variant {name!r} is compiled when first used, and there is no C++ compiler: "
            "`apt-get install g++` (plain softmax attention, sliding windows and soft caps need none)"
        )
    headers, include = _headers()
    command = [tool[0], *flags(level), f"-I{include}"]
    parts = [source, headers, " ".join(flags(level)), *tool, level]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    path = folder / f"{name}-{level}-{key}.so"
    folder.mkdir(parents=True, exist_ok=True)
    result = _load(path) if path.exists() else None
    if result is None:
        with filelock.FileLock(path.with_suffix(".lock")):
            result = _load(path) if path.exists() else None
            if result is None:
                _build(name, source, command, path)
                result = _load(path)
    if result is None:
        raise CompileError(f"attention variant {name!r} was built but cannot be loaded from {path}")
    _LOADED[str(folder), source, level] = result
    return result


def _build(name: str, source: str, command: list[str], path: Path) -> None:
    path.with_suffix(".cpp").write_text(source, encoding="utf-8")
    handle, building = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        given = [*command, str(path.with_suffix(".cpp")), "-o", building]
        try:
            done = subprocess.run(given, capture_output=True, text=True, errors="replace", timeout=600)
        except (OSError, subprocess.SubprocessError) as error:
            raise CompileError(f"cannot run {command[0]} for attention variant {name!r}: {error}") from None
        if done.returncode:
            said = "\n".join(done.stderr.strip().splitlines()[:12])
            raise CompileError(f"attention variant {name!r} does not compile:\n{said}")
        path.with_suffix(".sha256").write_text(_digest(Path(building)))
        os.replace(building, path)
    finally:
        Path(building).unlink(missing_ok=True)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _load(path: Path) -> Compiled | None:
    """The library at ``path``; None when it is damaged (loading half a library may crash; it is built again)."""
    try:
        if path.with_suffix(".sha256").read_text() != _digest(path):
            return None
        library = ctypes.CDLL(str(path))
        library.hasten_variant_size.restype = ctypes.c_int64
        size = int(library.hasten_variant_size())
        addresses = [
            ctypes.cast(getattr(library, f"hasten_variant_{part}"), ctypes.c_void_p).value
            for part in ("worker", "join")
        ]
    except (OSError, AttributeError, UnicodeDecodeError):
        return None
    worker, join = (int(address or 0) for address in addresses)
    return Compiled(path, library, worker, join, size)
