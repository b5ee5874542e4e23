"""Makes `measure_fakes` importable, here and in the child processes of a measurement."""

from __future__ import annotations

import dataclasses
import sys
import uuid
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def measured():
    """One real comparison of the fake job, shared by tests that only need a record."""
    from measure_fakes import HashJob, Quicker

    from hasten.measure.comparison import compare

    return compare(
        HashJob(),
        HashJob().baseline().__class__(model="none", techniques=(Quicker(),)),
        pairs=6,
        options={"rounds": 2000},
        threads=1,
        allow_busy=True,
        progress=False,
    )


@pytest.fixture
def another(measured):
    """Makes comparisons like ``measured`` with their own id: ``another(system="x")``."""
    return lambda **changes: dataclasses.replace(measured, **{"id": uuid.uuid4().hex, **changes})
