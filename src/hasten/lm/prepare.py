"""`prepare`: run what a plan's techniques compute or train once, and write it down as one folder.

What is computed goes through the artefact store of the cache folder, so a killed run goes on where its techniques can,
and a second folder of the same settings costs a copy. The folder itself appears at the end, in one rename.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file

from hasten.core.errors import ArtefactError, HastenError, PlanError
from hasten.core.fetch import locked
from hasten.core.paths import models_home
from hasten.core.plan import Plan
from hasten.lm.build import Loaded, load
from hasten.lm.prepared import ARTEFACTS, CALIBRATION, MODEL, PLAN, PROVENANCE, Prepared
from hasten.models.store import HUB_PATTERNS
from hasten.weights.calibrate_data import token_digest


def prepare(plan: Plan, output: str | Path, calibration: Sequence[Sequence[int]] | None = None) -> Prepared:
    """Write ``output``, a folder that ``hasten.LLM(output)`` loads in the time of an ordinary checkpoint.

    calibration: token sequences for the techniques that calibrate; None for the documentation corpus. Deterministic by
    the plan's seeds but for dates and times in the provenance. A folder that was made of the same things is left as it
    is. Raises `ArtefactError` if ``output`` holds anything else, `PlanError` for a plan without techniques, and what
    loading the plan raises.
    """
    plan.check()
    if not plan.techniques:
        raise PlanError("nothing to prepare: the plan names no technique; add one with --use")
    if Prepared.at(plan.model) is not None:
        raise PlanError(f"{plan.model} is a prepared folder already; prepare the model it was made from")
    target = Path(output).expanduser().absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.with_name(f".{target.name}"), str(target), Console(stderr=True)):
            return _prepare(plan, target, calibration)
    except OSError as error:
        raise HastenError(
            f"cannot write {error.filename or target}: {error.strerror or error}; choose another folder with -o"
        ) from None


def _prepare(plan: Plan, target: Path, calibration: Sequence[Sequence[int]] | None) -> Prepared:
    if (
        target.exists()
        and Prepared.at(str(target)) is None
        and (not target.is_dir() or any(target.iterdir()))
    ):
        raise ArtefactError(f"{target} exists and is not a prepared folder; choose another with -o")
    started = time.perf_counter()
    loaded = _load(plan, calibration)
    if loaded.artefacts.made:  # making them may have asked for more than loading them does
        loaded = _load(plan, calibration)
    seconds = time.perf_counter() - started
    request = {
        "plan": plan.to_dict(),
        "model_fingerprint": loaded.checkpoint.fingerprint,
        "calibration": None if calibration is None else token_digest(calibration),
        "artefacts": sorted(folder.name for folder in loaded.artefacts.used),
    }
    if target.exists() and any(target.iterdir()):
        found = Prepared(target)
        if found.provenance.get("request") == request:
            return found
        raise ArtefactError(
            f"{target} was prepared from another model or plan; delete it or choose another with -o"
        )
    staging = target.with_name(f".{target.name}.preparing")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        model = _copy_model(loaded.path, staging / MODEL)
        for folder in sorted(loaded.artefacts.used):
            shutil.copytree(folder, staging / ARTEFACTS / folder.name)
        (staging / ARTEFACTS).mkdir(exist_ok=True)
        if calibration is not None:
            _save_calibration(calibration, staging / CALIBRATION)
        relative = model.relative_to(staging).as_posix()
        (staging / PLAN).write_text(replace(plan, model=relative).to_toml(), encoding="utf-8")
        provenance = {"request": request, "seconds": round(seconds, 1), **_made_with()}
        (staging / PROVENANCE).write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")
        if target.exists():  # empty
            target.rmdir()
        os.rename(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Prepared(target)


def _load(plan: Plan, calibration: Sequence[Sequence[int]] | None) -> Loaded:
    # A page or two of KV are enough: nothing is generated.
    engine = {name: value for name, value in plan.engine.items() if name != "kv_memory_mb"}
    return load(replace(plan, engine={**engine, "kv_tokens": 64, "max_batch": 1}), calibration)


def _copy_model(source: Path, folder: Path) -> Path:
    """Copy a checkpoint into ``folder`` (files of the model store are linked); the model's path there."""
    folder.mkdir()
    own = source.resolve().is_relative_to(models_home().resolve())
    files = [source] if source.is_file() else sorted({f for p in HUB_PATTERNS for f in source.glob(p)})
    for file in files:
        _place(file, folder / file.name, link=own)
    return folder / source.name if source.is_file() else folder


def _place(source: Path, target: Path, *, link: bool) -> None:
    if link:  # the store never changes a file in place
        try:
            os.link(source.resolve(), target)
        except OSError:  # another file system
            pass
        else:
            return
    shutil.copyfile(source, target)


def _save_calibration(calibration: Sequence[Sequence[int]], path: Path) -> None:
    token_ids = [token for sequence in calibration for token in sequence]
    lengths = [len(sequence) for sequence in calibration]
    save_file(
        {"token_ids": torch.tensor(token_ids), "lengths": torch.tensor(lengths)},
        path,
    )


def _made_with() -> dict[str, Any]:
    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed as a package"

    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: installed(name) for name in ("hasten", "torch", "numpy")},
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
