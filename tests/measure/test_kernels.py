"""The kernel bench: cases run, rows follow from bytes, operations and time; unknown groups are refused."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from hasten.cli.main import app
from hasten.core.errors import UnknownNameError
from hasten.kernels.peak import Peak, measure_peak
from hasten.measure import kernels


def test_peak_is_measured() -> None:
    peak = measure_peak(1, size=1 << 22, rounds=1000)
    assert min(peak.read, peak.float32, peak.int8) > 1e6


def test_every_case_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "OUT_OF_CACHE", 0)
    peak = Peak(read=1e9, float32=1e9, int8=4e9)
    seen: list[str] = []
    results = kernels.run_cases(peak, seconds=0, advance=seen.append)
    assert seen == [name for name, _ in kernels.CASES]
    expected = {"rms_norm", "gated", "rope_append", "hadamard_select", "argmax", "sample, top-p 0.9"}
    assert expected <= {r.kernel for r in results}
    for r in results:
        assert r.bound in ("memory", "float32", "int16", "int8")
        limits = {"memory": 1, "float32": 1, "int16": 2, "int8": 4}
        limit = (r.gb_per_s if r.bound == "memory" else r.gop_per_s) / limits[r.bound]
        assert r.share == pytest.approx(limit)


def test_command_writes_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.kernels.peak.measure_peak", lambda: Peak(1e9, 1e9, 1e9))
    result = CliRunner().invoke(app, ["bench-kernels", "--only", "small", "--seconds", "0.01", "--json", "-"])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["peak"] == {"read": 1e9, "float32": 1e9, "int8": 1e9}
    assert len(record["kernels"]) == 6


def test_unknown_group_is_refused() -> None:
    result = CliRunner().invoke(app, ["bench-kernels", "--only", "smal"])
    assert isinstance(result.exception, UnknownNameError)
    assert "small" in str(result.exception)
