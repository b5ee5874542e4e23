"""What the scripts beside this file share: parts chosen by flags, records printed as they come, machine and load in the
result."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from hasten.measure.environment import BusyMonitor, machine, usable_cpus

Part = Callable[[argparse.Namespace], Iterable[dict[str, Any]]]


@contextlib.contextmanager
def recording(threads: int, path: Path | None) -> Iterator[dict[str, Any]]:
    """The result to fill: ``machine`` is in it, ``busy`` comes at the end; then it is written to ``path``, if any.

    threads: of torch, from here on.
    """
    torch.set_num_threads(threads)
    monitor = BusyMonitor()
    monitor.start()
    result: dict[str, Any] = {"machine": machine(threads, usable_cpus()).to_dict()}
    yield result
    result["busy"] = monitor.stop().to_dict()
    if path is not None:
        path.write_text(json.dumps(result, indent=2, default=str) + "\n", encoding="utf-8")


def chosen(
    parser: argparse.ArgumentParser, args: argparse.Namespace, parts: Mapping[str, Part]
) -> dict[str, Part]:
    """The parts whose flag was given; the parser's error if there is none."""
    found = {name: part for name, part in parts.items() if getattr(args, name)}
    if not found:
        parser.error("nothing to measure: give " + ", ".join(f"--{name}" for name in parts))
    return found


def record(result: dict[str, Any], name: str, records: Iterable[dict[str, Any]]) -> None:
    """Print records as they come and keep them in ``result[name]``."""
    result[name] = []
    for one in records:
        result[name].append(one)
        print(json.dumps(one), flush=True)
