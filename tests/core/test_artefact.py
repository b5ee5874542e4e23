"""Artefacts: atomic, fingerprinted, refused when damaged, safe among concurrent and killed builders."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.core.artefact import ArtefactStore, fingerprint
from hasten.core.errors import ArtefactError

MADE_FROM = {"bits": 4, "data": "abc"}


def write(folder: Path) -> None:
    (folder / "factors.bin").write_bytes(b"factors")
    (folder / "layers").mkdir()
    (folder / "layers" / "0.bin").write_bytes(b"layer")


def never(folder: Path) -> None:
    raise AssertionError("the artefact exists: it must not be built again")


@pytest.fixture
def store(tmp_path: Path) -> ArtefactStore:
    return ArtefactStore(tmp_path / "artefacts", model="m1")


def test_built_once_and_found_again(store):
    assert store.find("gptq", MADE_FROM) is None
    folder = store.build("gptq", MADE_FROM, write)
    assert (folder / "layers" / "0.bin").read_bytes() == b"layer"
    assert store.build("gptq", MADE_FROM, never) == folder
    assert store.find("gptq", MADE_FROM) == folder
    record = json.loads((folder / "artefact.json").read_text())
    assert record["made_from"] == MADE_FROM
    assert set(record["files"]) == {"factors.bin", "layers/0.bin"}


def test_other_settings_slug_or_model_are_another_artefact(store, tmp_path):
    folder = store.build("gptq", MADE_FROM, write)
    assert store.find("gptq", {**MADE_FROM, "bits": 3}) is None
    assert store.find("palu", MADE_FROM) is None
    assert ArtefactStore(store.root, model="m2").find("gptq", MADE_FROM) is None
    assert folder.parent == store.root


def test_a_failed_build_leaves_nothing(store):
    def fail(folder: Path) -> None:
        write(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        store.build("gptq", MADE_FROM, fail)
    assert list(store.root.iterdir()) == []


@pytest.mark.parametrize("name", ["factors.bin", "layers/0.bin"])
@pytest.mark.parametrize("how", ["truncated", "changed", "missing"])
def test_a_damaged_file_is_refused_and_named(store, name, how):
    path = store.build("gptq", MADE_FROM, write) / name
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] if how == "truncated" else b"?" * path.stat().st_size)
    with pytest.raises(ArtefactError, match=f"{path.name} is missing or damaged"):
        store.find("gptq", MADE_FROM)
    with pytest.raises(ArtefactError):
        store.build("gptq", MADE_FROM, never)


@pytest.mark.parametrize(
    "text", [None, "", "[]", "{}", '{"files": [1], "model": "m1"}', "\x00", '{"files": 3}']
)
def test_an_unreadable_record_is_refused(store, text):
    folder = store.build("gptq", MADE_FROM, write)
    if text is None:
        (folder / "artefact.json").unlink()
    else:
        (folder / "artefact.json").write_text(text)
    with pytest.raises(ArtefactError, match="not a readable gptq artefact"):
        store.find("gptq", MADE_FROM)


def test_a_record_of_another_model_is_refused(store):
    folder = store.build("gptq", MADE_FROM, write)
    record = json.loads((folder / "artefact.json").read_text())
    (folder / "artefact.json").write_text(json.dumps({**record, "model": "m2"}))
    with pytest.raises(ArtefactError, match="made for model m2, not m1"):
        store.find("gptq", MADE_FROM)


def test_concurrent_builders_all_get_the_first_result(store):
    barrier = threading.Barrier(4)
    found: list[Path] = []

    def build() -> None:
        def slow(folder: Path) -> None:
            barrier.wait()  # everybody is building before anybody finishes
            write(folder)

        found.append(store.build("gptq", MADE_FROM, slow))

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [store.path("gptq", MADE_FROM)] * 4
    assert [path.name for path in store.root.iterdir()] == [found[0].name]
    store.find("gptq", MADE_FROM)


CHILD = """
import sys, time
from pathlib import Path
from hasten.core.artefact import ArtefactStore

def write(folder):
    (folder / "factors.bin").write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)

ArtefactStore(Path(sys.argv[1]), model="m1").build("gptq", {"bits": 4, "data": "abc"}, write)
"""


def killed_builder(store: ArtefactStore) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(store.root)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_kill_9_in_a_build_leaves_no_artefact_and_its_remains_are_removed(store):
    killed_builder(store)
    assert store.find("gptq", MADE_FROM) is None
    assert len(list(store.root.iterdir())) == 1  # the dead builder's folder
    folder = store.build("gptq", MADE_FROM, write)
    assert (folder / "factors.bin").read_bytes() == b"factors"
    assert list(store.root.iterdir()) == [folder]


def test_a_living_builder_is_left_alone(store):
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(store.root)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        store.build("gptq", {"bits": 3}, write)
        assert len(list(store.root.iterdir())) == 2
    finally:
        process.kill()
        process.communicate()


def test_fingerprint_depends_on_every_part_and_not_on_order():
    base = fingerprint({"a": 1, "b": [1, 2]})
    assert len(base) == 16
    assert fingerprint({"b": [1, 2], "a": 1}) == base
    assert fingerprint({"a": 1, "b": [2, 1]}) != base
    assert fingerprint({"a": 2, "b": [1, 2]}) != base
    assert fingerprint({"a": "1", "b": [1, 2]}) != base


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=30)
@given(st.dictionaries(st.text(), json_values, max_size=3))
def test_fingerprint_survives_json(parts):
    assert fingerprint(json.loads(json.dumps(parts))) == fingerprint(parts)


def test_fingerprint_is_the_same_in_every_process():
    # Sets of strings iterate in a different order in each process.
    code = (
        "from pathlib import Path; from hasten.core.artefact import fingerprint; "
        "print(fingerprint({'layers': {'q', 'k', 'v', 'o', 'up', 'down'}, 'path': Path('/a')}))"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1


def test_fingerprint_refuses_an_object_known_only_by_its_address():
    with pytest.raises(ArtefactError, match="says where it lies"):
        fingerprint({"what": object()})
