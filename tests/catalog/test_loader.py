"""The loader on folders made for it: what it reads, and what it refuses with which message."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hasten.catalog.loader import Record, read_records
from hasten.core.errors import HastenError, UnknownNameError

GOOD = {
    "slug": '"mine"',
    "title": '"A Title: with ünïcode"',
    "source": '"Somebody, 2025"',
    "kind": '"sparse attention"',
    "claim": '"2x"',
    "slots": '["attention_policy"]',
    "lossless": "false",
}


def write(folder: Path, name: str = "lm.toml", **changes: str | None) -> Path:
    """Write one record; a change of None leaves the field out."""
    table = {**GOOD, **changes}
    lines = [f"{key} = {value}" for key, value in table.items() if value is not None]
    with (folder / name).open("a", encoding="utf-8") as file:
        file.write("[[system]]\n" + "\n".join(lines) + "\n")
    return folder


def test_reads_a_record(tmp_path: Path):
    write(tmp_path, target='"3x"', workload='"decode"')
    (tmp_path / "notes.txt").write_text("not a record")
    record = read_records(tmp_path)["mine"]
    assert record == Record(
        slug="mine",
        title="A Title: with ünïcode",
        source="Somebody, 2025",
        family="lm",
        kind="sparse attention",
        claim="2x",
        slots=("attention_policy",),
        lossless=False,
        target="3x",
        workload="decode",
    )
    assert record.to_dict()["slots"] == ["attention_policy"]


def test_an_empty_folder_has_no_records(tmp_path: Path):
    assert read_records(tmp_path) == {}


def test_records_come_in_family_and_file_order(tmp_path: Path):
    write(tmp_path, "weights.toml", slug='"w"')
    write(tmp_path, "lm.toml", slug='"z"')
    write(tmp_path, "lm.toml", slug='"a"')
    assert list(read_records(tmp_path)) == ["z", "a", "w"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clam": '"2x"'}, r"unknown catalogue field 'clam'; did you mean 'claim'.*record 'mine' of lm.toml"),
        ({"family": '"lm"'}, r"unknown catalogue field 'family'"),
        (
            {"slots": '["kv_fromat"]'},
            r"unknown slot 'kv_fromat'; did you mean 'kv_format'.*'mine' of lm.toml",
        ),
        ({"state": '"avialable"'}, r"unknown state 'avialable'; did you mean 'available'"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(tmp_path: Path, changes: dict[str, str], message: str):
    with pytest.raises(UnknownNameError, match=message):
        read_records(write(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"claim": None}, r"record 'mine' of lm.toml has no claim"),
        ({"slug": None}, r"a record of lm.toml has no slug"),
        ({"slots": "[]"}, r"slots of record 'mine' of lm.toml must be a list of at least one slot name"),
        ({"slots": '"attention_policy"'}, r"slots of record 'mine'.*must be a list"),
        ({"slots": "[1]"}, r"slots of record 'mine'.*must be a list"),
        ({"lossless": '"no"'}, r"lossless of record 'mine' of lm.toml must be true or false, not 'no'"),
        ({"claim": "2.0"}, r"claim of record 'mine' of lm.toml must be text, not 2.0"),
        ({"slug": '"two words"'}, r"slug of record 'two words' of lm.toml must be a valid Python identifier"),
        ({"slug": '""'}, r"slug of a record of lm.toml must be a valid Python identifier"),
        ({"state": '"available"'}, r"record 'mine' of lm.toml is available, so it needs technique"),
        ({"state": '"experimental"', "technique": '"a.b"'}, r'needs technique = "module:Class"'),
        ({"technique": '"a.b:C"'}, r"has code \(a.b:C\) but is planned"),
    ],
)
def test_broken_records_are_refused(tmp_path: Path, changes: dict[str, str | None], message: str):
    with pytest.raises(HastenError, match=message):
        read_records(write(tmp_path, **changes))


def test_a_slug_twice_is_refused_naming_both_files(tmp_path: Path):
    write(tmp_path, "lm.toml")
    write(tmp_path, "weights.toml")
    with pytest.raises(HastenError, match=r"mine is recorded twice, in lm.toml and weights.toml"):
        read_records(tmp_path)


@pytest.mark.parametrize("text", ["[[system]]\nslug = ", "[[system]", "\xff\xfe"])
def test_broken_toml_is_refused(tmp_path: Path, text: str):
    (tmp_path / "lm.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(HastenError, match=r"lm.toml is not valid TOML"):
        read_records(tmp_path)


@pytest.mark.parametrize("text", ["", "system = 3", "system = [1]", 'title = "x"\n[[system]]\nslug = "a"'])
def test_a_file_of_anything_else_is_refused(tmp_path: Path, text: str):
    (tmp_path / "lm.toml").write_text(text)
    with pytest.raises(HastenError, match=r"lm.toml must hold \[\[system\]\] tables and nothing else"):
        read_records(tmp_path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("hasten.no_such_room:Mine", r"there is no module hasten.no_such_room"),
        ("hasten.core.errors:Missing", r"hasten.core.errors:Missing of mine is not a Technique class"),
        ("hasten.core.errors:HastenError", r"is not a Technique class"),
    ],
)
def test_a_wrong_import_path_is_named(tmp_path: Path, path: str, message: str):
    record = read_records(write(tmp_path, state='"experimental"', technique=f'"{path}"'))["mine"]
    with pytest.raises(HastenError, match=message):
        record.load()


def test_a_missing_dependency_keeps_its_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "needs_more.py").write_text("import a_package_that_nobody_has")
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "records"
    folder.mkdir()
    record = read_records(write(folder, state='"experimental"', technique='"needs_more:Mine"'))["mine"]
    with pytest.raises(ModuleNotFoundError, match="a_package_that_nobody_has"):
        record.load()


def test_reading_the_catalogue_imports_nothing_heavy():
    code = (
        "import sys; from hasten.catalog import loader; loader.select(family='lm'); "
        "sys.exit(', '.join({'torch', 'numpy', 'pydantic'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
