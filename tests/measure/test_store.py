import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hasten.core.errors import MeasureError
from hasten.measure.store import ResultStore, default_path, write_text

# Writes comparisons made from the JSON file argv[2] into the store argv[1], argv[3] times; prints each id
# once it is promised to be on disk.
WRITER = """
import dataclasses, json, sys, uuid
from hasten.measure.comparison import Comparison
from hasten.measure.store import ResultStore
base = Comparison.from_dict(json.load(open(sys.argv[2])))
store = ResultStore(sys.argv[1])
for _ in range(int(sys.argv[3])):
    id = uuid.uuid4().hex
    store.add(dataclasses.replace(base, id=id))
    print(id, flush=True)
"""


@pytest.fixture
def store(tmp_path):
    return ResultStore(tmp_path / "deep" / "er" / "results.sqlite")


def writer(store, measured, times, tmp_path):
    document = tmp_path / "comparison.json"
    document.write_text(json.dumps(measured.to_dict()))
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(store.path), str(document), str(times)],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_stores_and_finds(store, another):
    assert store.all() == store.latest() == []
    assert not store.path.exists()
    one, two, three = another(), another(system="s'); DROP TABLE--"), another(workload="other")
    for comparison in (one, two, three):
        store.add(comparison)
    assert store.all() == [one, two, three]
    assert store.all(system=two.system) == [two]
    assert store.all(workload="other") == [three]
    assert store.all(system="nobody") == []


def test_latest_per_system_workload_model_and_baseline(store, another):
    old, new, other = another(), another(), another(model="other")
    for comparison in (old, other, new):
        store.add(comparison)
    assert store.latest() == [other, new]


def test_a_second_copy_is_refused(store, measured):
    store.add(measured)
    with pytest.raises(MeasureError, match="append-only"):
        store.add(measured)
    assert len(store.all()) == 1


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE comparisons SET system = 'x'",
        "DELETE FROM comparisons",
        "INSERT OR REPLACE INTO comparisons SELECT number, id, created, 'x', workload, document FROM comparisons",
        "INSERT OR REPLACE INTO comparisons SELECT 99, id, created, 'x', workload, document FROM comparisons",
        "INSERT INTO comparisons VALUES (9, 'i', 'c', 's', 'w', 'not json')",
    ],
)
def test_the_database_itself_refuses_changes(store, measured, statement):
    store.add(measured)
    with sqlite3.connect(store.path) as db, pytest.raises(sqlite3.IntegrityError):
        db.execute(statement)
    assert store.all() == [measured]


def test_concurrent_writers_lose_nothing(store, measured, tmp_path):
    # None of them finds a file: they race to create it, too.
    writers = [writer(store, measured, 25, tmp_path) for _ in range(4)]
    written = [line for w in writers for line in w.communicate(timeout=60)[0].split()]
    assert [w.returncode for w in writers] == [0] * 4
    assert len(written) == 100
    assert {c.id for c in store.all()} == set(written)


def test_threads_share_one_store(store, another):
    comparisons = [another() for _ in range(16)]
    threads = [threading.Thread(target=store.add, args=(c,)) for c in comparisons]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {c.id for c in store.all()} == {c.id for c in comparisons}


def test_kill_in_the_middle_of_writing(store, measured, another, tmp_path):
    # A long record makes it likely that the kill falls into a write.
    big = another(facts={"baseline": {"text": "x" * 400_000}, "candidate": {}})
    for wait in (0.0, 0.013, 0.031):
        process = writer(store, big, 10_000, tmp_path)
        first = process.stdout.readline().strip()
        time.sleep(wait)
        os.kill(process.pid, signal.SIGKILL)
        promised = {first, *process.stdout.read().split()}
        process.wait()
        promised = {id for id in promised if len(id) == 32}
        stored = {c.id for c in store.all()}
        assert promised <= stored
        with sqlite3.connect(store.path) as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    store.add(measured)
    assert store.all()[-1] == measured


def test_export_and_import(store, another, tmp_path):
    comparisons = [another(), another(claim="größer “x” <b>")]
    for comparison in comparisons:
        store.add(comparison)
    file = tmp_path / "out" / "all.json"
    assert store.export_json(file) == 2
    copy = ResultStore(tmp_path / "copy.sqlite")
    copy.add(comparisons[0])
    assert copy.import_json(file) == 1
    assert copy.import_json(file) == 0
    assert copy.all() == comparisons
    single = tmp_path / "one.json"
    single.write_text(json.dumps(another().to_dict()))
    assert copy.import_json(single) == 1


def test_import_is_all_or_nothing(store, another, tmp_path):
    file = tmp_path / "bad.json"
    file.write_text(json.dumps([another().to_dict(), {**another().to_dict(), "speedup": {}}]))
    with pytest.raises(MeasureError, match="speedup"):
        store.import_json(file)
    assert store.all() == []


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b'"text"', b"[1]", b"[[]]"])
def test_import_of_what_is_no_export(store, tmp_path, content):
    file = tmp_path / "bad.json"
    file.write_bytes(content)
    with pytest.raises(MeasureError):
        store.import_json(file)
    with pytest.raises(MeasureError, match="no file"):
        store.import_json(tmp_path / "missing.json")


def test_damaged_or_foreign_files_are_refused(tmp_path, measured):
    path = tmp_path / "results.sqlite"
    path.write_bytes(b"this is not a database at all" * 100)
    with pytest.raises(MeasureError, match=r"results.sqlite.*not a database"):
        ResultStore(path).add(measured)

    foreign = tmp_path / "foreign.sqlite"
    with sqlite3.connect(foreign) as db:
        db.execute("CREATE TABLE contacts (name TEXT)")
    with pytest.raises(MeasureError, match="another program"):
        ResultStore(foreign).all()

    with pytest.raises(MeasureError, match="unable to open"):
        ResultStore(tmp_path).add(measured)


def test_truncated_file_is_refused(store, measured):
    store.add(measured)
    with sqlite3.connect(store.path) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    os.truncate(store.path, 5000)
    with pytest.raises(MeasureError, match=str(store.path)):
        store.all()


def test_newer_version_is_refused(store, measured):
    store.add(measured)
    with sqlite3.connect(store.path) as db:
        db.execute("PRAGMA user_version = 2")
    with pytest.raises(MeasureError, match="newer hasten"):
        store.all()


def test_figures_that_are_no_json_are_refused(store, another):
    with pytest.raises(MeasureError, match="not JSON"):
        store.add(another(facts={"baseline": {"x": float("nan")}}))
    assert store.all() == []


def test_default_path_is_in_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path / "home"))
    assert default_path() == tmp_path / "home" / "results.sqlite"
    assert ResultStore().path == default_path()


def test_files_are_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "file.json"
    write_text(target, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(target, "x" * 100_000 + "\ud800")
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]
    with pytest.raises(MeasureError, match="cannot write"):
        write_text(Path("/proc/nowhere/file.json"), "x")
