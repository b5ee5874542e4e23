"""Every error hasten raises on purpose. Each message names the bad input and the fix.

One hierarchy, so that callers (CLI, HTTP layer, tests) map a class to an exit code or a status once.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HastenError(Exception):
    """Base of all errors that are the user's to fix. ``exit_code`` is what the CLI returns."""

    exit_code = 1


class UnknownNameError(HastenError):
    """A slug, model, workload, slot or setting that does not exist; suggests the nearest names."""

    exit_code = 2

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        self.kind, self.name = kind, name
        near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5)
        message = f"unknown {kind} {name!r}"
        if near:
            message += "; did you mean " + " or ".join(repr(n) for n in near) + "?"
        if hint:
            message += f" ({hint})"
        super().__init__(message)


class PlanError(HastenError):
    """A plan that cannot run as written: broken TOML, wrong types, missing tables."""

    exit_code = 2


class SettingError(PlanError):
    """A setting with a wrong name, type or value."""


class ConflictError(PlanError):
    """Two parts of a plan that exclude each other; the message names both sides and the fix."""


class NotBuiltError(HastenError):
    """A catalogue record in state ``planned``: no code exists yet."""

    exit_code = 3


class UnsupportedError(HastenError):
    """A combination of model, settings and machine that a technique refuses, with the reason."""

    exit_code = 3


class ModelError(HastenError):
    """A model that cannot be found or used (no tokenizer, unsupported architecture, ...)."""

    exit_code = 4


class ModelFormatError(ModelError):
    """A weight file that is truncated, malformed, of an unsupported kind, or a pickle."""


class IntegrityError(ModelError):
    """Bytes that do not match their recorded SHA-256, or weights that hold NaN or infinity."""


class FetchError(HastenError):
    """A file that could not be fetched: no network, no such package, disk full, no permission."""

    exit_code = 4


class ArtefactError(HastenError):
    """A computed or trained artefact whose fingerprint does not match what it is used with."""

    exit_code = 4


class TrainingError(HastenError):
    """A training run that cannot go on: its loss is no longer finite, or its state cannot be written."""

    exit_code = 4


class RequestError(HastenError):
    """A generation request that cannot be served: empty, too long, impossible limits."""

    exit_code = 5


class MeasureError(HastenError):
    """A measurement that would not be honest: busy machine, too few pairs, broken output."""

    exit_code = 6
