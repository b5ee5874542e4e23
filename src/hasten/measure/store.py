"""Every comparison ever measured here: an append-only SQLite file.

Nothing is changed or deleted once written: the database itself refuses. Writers may be many and may be killed
at any moment; a comparison is either wholly there or not at all.
"""

from __future__ import annotations

import json
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from hasten.core import paths
from hasten.core.errors import MeasureError
from hasten.measure.comparison import Comparison

_APPLICATION_ID = 0x68617374  # "hast"
_VERSION = 1
_WAIT_MS = 30_000  # for another writer's lock

_SCHEMA = f"""
CREATE TABLE comparisons (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    created TEXT NOT NULL,
    system TEXT NOT NULL,
    workload TEXT NOT NULL,
    document TEXT NOT NULL CHECK (json_valid(document))
);
CREATE INDEX comparisons_by_system ON comparisons (system, workload, number);
CREATE TRIGGER comparisons_no_update BEFORE UPDATE ON comparisons
BEGIN SELECT RAISE(ABORT, 'the result store is append-only'); END;
CREATE TRIGGER comparisons_no_delete BEFORE DELETE ON comparisons
BEGIN SELECT RAISE(ABORT, 'the result store is append-only'); END;
-- INSERT OR REPLACE deletes the old row without firing the trigger above.
CREATE TRIGGER comparisons_no_replace BEFORE INSERT ON comparisons
WHEN EXISTS (SELECT 1 FROM comparisons WHERE id = NEW.id OR number = NEW.number)
BEGIN SELECT RAISE(ABORT, 'the result store is append-only'); END;
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {_VERSION};
"""


def default_path() -> Path:
    """The result store of this user."""
    return paths.home() / "results.sqlite"


class ResultStore:
    """Comparisons in one SQLite file, made when first written to. Every call opens its own connection, so one
    object may be shared by threads and many processes may use one file.

    Raises `MeasureError` naming the file when it is damaged, of a newer version, not a result store, not
    writable or the disk is full.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = Path(path) if path is not None else default_path()

    def add(self, comparison: Comparison) -> None:
        """Append ``comparison``; on return it is on disk. `MeasureError` if its id is already stored."""
        with self._connect() as db, _transaction(db):
            if _has(db, comparison.id):
                raise MeasureError(f"{self.path} already holds comparison {comparison.id}; it is append-only")
            _insert(db, comparison)

    def all(self, system: str | None = None, workload: str | None = None) -> list[Comparison]:
        """Comparisons, oldest first, of one system and/or workload if named."""
        if not self.path.exists():
            return []
        query = (
            "SELECT document FROM comparisons WHERE (:system IS NULL OR system = :system) "
            "AND (:workload IS NULL OR workload = :workload) ORDER BY number"
        )
        with self._connect() as db:
            rows = db.execute(query, {"system": system, "workload": workload}).fetchall()
        return [Comparison.from_dict(json.loads(document)) for (document,) in rows]

    def latest(self, system: str | None = None, workload: str | None = None) -> list[Comparison]:
        """The newest comparison of every (system, workload, model, baseline plan), oldest first."""
        newest: dict[tuple[str, ...], Comparison] = {}
        for comparison in self.all(system, workload):
            against = json.dumps(comparison.plans["baseline"], sort_keys=True)
            key = (comparison.system, comparison.workload, comparison.model, against)
            newest.pop(key, None)  # so that the order is that of the newest
            newest[key] = comparison
        return list(newest.values())

    def export_json(self, path: str | Path) -> int:
        """Write all comparisons as a JSON array; returns how many. Atomic."""
        found = self.all()
        write_json(Path(path), [comparison.to_dict() for comparison in found])
        return len(found)

    def import_json(self, path: str | Path) -> int:
        """Append the comparisons of a JSON file (an array, or one published object); those here already are left.

        All or nothing: raises `MeasureError` on the first record that is not a comparison. Returns how many
        were new.
        """
        path = Path(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise MeasureError(f"no file at {path}") from None
        except (OSError, ValueError) as error:
            raise MeasureError(f"{path} cannot be read as JSON: {error}") from None
        records = data if isinstance(data, list) else [data]
        # A published bench holds its further comparisons inside the headline's.
        records = [
            r for top in records for r in (top, *(top.get("others", ()) if isinstance(top, dict) else ()))
        ]
        comparisons = [Comparison.from_dict(record) for record in records]
        new = 0
        with self._connect() as db, _transaction(db):
            for comparison in comparisons:
                if not _has(db, comparison.id):
                    _insert(db, comparison)
                    new += 1
        return new

    @contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=_WAIT_MS / 1000, isolation_level=None)) as db:
                self._prepare(db)
                yield db
        except (sqlite3.Error, OSError) as error:
            raise MeasureError(f"result store {self.path}: {error}") from None

    def _prepare(self, db: sqlite3.Connection) -> None:
        db.execute(f"PRAGMA busy_timeout = {_WAIT_MS}")
        db.execute("PRAGMA synchronous = FULL")  # a committed comparison survives power loss too
        if self._version(db) == 0:
            # Readers need not wait for writers in WAL mode; a file system without it still works.
            db.execute("PRAGMA journal_mode = WAL")
            with _transaction(db):
                if self._version(db) == 0:  # another process may have made it meanwhile
                    for statement in _statements(_SCHEMA):
                        db.execute(statement)

    def _version(self, db: sqlite3.Connection) -> int:
        # The mark last: whoever makes the tables sets it in the same transaction, so tables seen first have their mark.
        tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        version: int = db.execute("PRAGMA user_version").fetchone()[0]
        application = db.execute("PRAGMA application_id").fetchone()[0]
        if application != _APPLICATION_ID and (tables or version):
            raise MeasureError(f"{self.path} is a database of another program; choose another file")
        if version > _VERSION:
            raise MeasureError(
                f"{self.path} was written by a newer hasten (store version {version}, this one knows {_VERSION}); "
                "upgrade hasten or choose another file"
            )
        return version


def write_json(path: Path, data: Any) -> None:
    """Write ``data`` as indented JSON; the file appears whole or not at all."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 ``text``; the file appears whole or not at all. `MeasureError` if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as stream:
            try:
                stream.write(text)
                stream.close()
                os.chmod(stream.name, 0o666 & ~_umask())
                os.replace(stream.name, path)
            except BaseException:
                os.unlink(stream.name)
                raise
    except OSError as error:
        raise MeasureError(f"cannot write {path}: {error.strerror or error}") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _insert(db: sqlite3.Connection, comparison: Comparison) -> None:
    try:
        document = json.dumps(comparison.to_dict(), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise MeasureError(f"comparison {comparison.id} holds what is not JSON: {error}") from None
    db.execute(
        "INSERT INTO comparisons (id, created, system, workload, document) VALUES (?, ?, ?, ?, ?)",
        (comparison.id, comparison.created, comparison.system, comparison.workload, document),
    )


def _has(db: sqlite3.Connection, id: str) -> bool:
    return db.execute("SELECT 1 FROM comparisons WHERE id = ?", (id,)).fetchone() is not None


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    """Take the write lock at once, so that two writers queue instead of failing half-way."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def _statements(script: str) -> Iterator[str]:
    """The statements of ``script``: `sqlite3.Connection.executescript` would commit our transaction."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
