"""Picks the native module for this CPU."""

from __future__ import annotations

import importlib
import os
from functools import cache
from types import ModuleType

import torch  # noqa: F401  (must come first: the native modules use the OpenMP threads of torch's runtime)

from hasten.core.errors import UnknownNameError, UnsupportedError

LEVELS = ("scalar", "avx2", "avx512")


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"hasten.kernels._native_{name}")
    except ModuleNotFoundError:
        raise UnsupportedError(
            f"the native library for {name!r} is not built; install hasten with `pip install .` "
            "(needs a C++20 compiler: `apt-get install g++`)"
        ) from None


@cache
def available_levels() -> tuple[str, ...]:
    """Levels this CPU can run, slowest first."""
    features = _module("scalar").cpu_features()
    return ("scalar", *(name for name in LEVELS[1:] if features.get(name)))


@cache
def native() -> ModuleType:
    """The native module in use: the best level, or the one ``HASTEN_ISA`` names."""
    forced = os.environ.get("HASTEN_ISA")
    if forced is None:
        return _module(available_levels()[-1])
    if forced not in LEVELS:
        raise UnknownNameError("HASTEN_ISA level", forced, LEVELS)
    if forced not in available_levels():
        raise UnsupportedError(f"HASTEN_ISA={forced}: this CPU offers {', '.join(available_levels())}")
    return _module(forced)


def level() -> str:
    """Name of the level in use."""
    return str(native().level)
