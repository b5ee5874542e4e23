"""A training run on disk: weights, optimizer state, step and curve in one safetensors file that appears at once."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hasten.core.errors import ArtefactError, IntegrityError, TrainingError
from hasten.core.fetch import human_bytes
from hasten.train.optimizer import load_state_tensors, state_tensors

_MODEL, _OPTIMIZER = "model.", "optimizer."


@dataclass
class Progress:
    """Where a run is. ``step``: steps done; ``curve``: a record per evaluation; ``seconds``: spent so far."""

    step: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)


def save_state(
    path: Path, model: nn.Module, optimizer: torch.optim.AdamW, progress: Progress, made_from: str
) -> None:
    """Write a run's state to ``path``; a kill at any time leaves the previous state or this one.

    made_from: fingerprint of data and settings, which `load_state` demands to be the same. Raises `TrainingError`
    when it cannot be written.
    """
    tensors = {_MODEL + name: p.detach() for name, p in model.named_parameters()}
    tensors |= {_OPTIMIZER + name: value for name, value in state_tensors(optimizer, model).items()}
    metadata = {"made_from": made_from, "progress": json.dumps(vars(progress))}
    temporary = path.with_name(path.name + ".writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, metadata)
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except (SafetensorError, OSError) as error:  # the library reports a full disk as an error of its own
        size = sum(value.numel() * value.element_size() for value in tensors.values())
        raise TrainingError(
            f"cannot write the run's state to {path} ({error}); it needs {human_bytes(2 * size)}: free some space, or "
            "set HASTEN_HOME to a folder you can write to, and start again: the run goes on at its last state"
        ) from None


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.AdamW, made_from: str) -> Progress | None:
    """Put a run's state back into ``model`` and ``optimizer``; None if there is no file.

    Raises `ArtefactError` for a run of other data or settings, `IntegrityError` for a file that cannot be read or
    does not fit.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as stored:
            metadata: Mapping[str, str] = stored.metadata() or {}
            tensors: dict[str, Tensor] = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        found, progress = metadata["made_from"], Progress(**json.loads(metadata["progress"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from None
    if found != made_from:
        raise ArtefactError(
            f"{path} belongs to a run with other text or settings ({found}, not {made_from}); delete it to start anew"
        )
    try:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(_checked(path, name, tensors[_MODEL + name], parameter))
        state = _strip(tensors, _OPTIMIZER)
        for name, parameter in model.named_parameters():
            for key in ("exp_avg", "exp_avg_sq"):
                _checked(path, f"{name}.{key}", state[f"{name}.{key}"], parameter)
        load_state_tensors(optimizer, model, state)
    except KeyError as error:
        raise _damaged(path, f"no tensor {error}") from None
    return progress


def _checked(path: Path, name: str, value: Tensor, like: Tensor) -> Tensor:
    if value.shape != like.shape:
        raise _damaged(path, f"{name} has shape {tuple(value.shape)}, not {tuple(like.shape)}")
    if not bool(value.isfinite().all()):
        raise _damaged(path, f"{name} holds NaN or infinity")
    return value


def _strip(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _damaged(path: Path, why: str) -> IntegrityError:
    return IntegrityError(f"{path} is not a usable state of a training run ({why}); delete it to start anew")
