"""The model store: from what a user writes as ``model`` to a path that `open_checkpoint` reads.

    resolve("smollm2-135m-instruct")     a known model (see known.toml), pulled into the cache when missing
    resolve("documentation-14m")         one that `hasten models pull` trains on this machine
    resolve("./my-model")                a folder in Hugging Face layout (safetensors)
    resolve("model.gguf")                a GGUF file
    resolve("org/name")                  a Hugging Face id, pulled when the hub can be reached

Pickled weights are never downloaded or read.
"""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from hasten.core.errors import FetchError, IntegrityError, ModelError, ModelFormatError, UnknownNameError
from hasten.core.fetch import Asset, fetch, human_bytes, locked
from hasten.core.paths import models_home
from hasten.models.known import KnownModel, Recipe, known_models

State = Literal["pulled", "partial", "damaged", "absent"]
TRAINED_WEIGHTS = "model.safetensors"

# Weights as safetensors, configuration and tokenizer as JSON; no pattern matches a pickle (*.bin, *.pt).
HUB_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "merges.txt", "vocab.txt", "LICENSE*")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@dataclass(frozen=True)
class Entry:
    """A model of the store as `hasten models list` shows it. ``bytes``: on disk, or to be fetched."""

    name: str
    state: State
    bytes: int
    license: str
    opt_in: bool
    title: str
    path: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def resolve(name_or_path: str | Path, allow_pull: bool = True) -> Path:
    """Return the local folder or GGUF file of a model, pulling it when it is missing and may be pulled.

    Raises `UnknownNameError` (with the nearest known names), `ModelError` (not there, or an opt-in model
    that was not pulled), `ModelFormatError` (a pickle or another unsupported file), `FetchError` or
    `IntegrityError`.
    """
    text = str(name_or_path)
    if not text.strip():
        raise ModelError("the model name is empty; give a known name, a folder or a .gguf file")
    model = known_models().get(text) if isinstance(name_or_path, str) else None
    if model is not None:
        return _resolve_known(model, allow_pull)
    try:
        path = Path(name_or_path).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such user, no permission, ...
        raise ModelError(f"{text[:100]!r} cannot be the path of a model: {error}") from None
    if is_folder:
        return path.absolute()
    if is_file:
        return _check_file(path.absolute())
    if _is_hub_id(text, path):
        return _resolve_hub(text, allow_pull)
    if isinstance(name_or_path, Path) or "/" in text or text.startswith((".", "~")) or path.suffix == ".gguf":
        raise ModelError(f"no model folder or .gguf file at {path.absolute()}")
    raise UnknownNameError(
        "model",
        text,
        known_models(),
        "give a name of `hasten models list`, a folder with safetensors, a .gguf file or a Hugging Face id",
    )


def pull(name: str, source: Path | None = None, quiet: bool = False) -> Path:
    """Fetch (or train) a known model or fetch a Hugging Face id into the store; return its path. No-op if it is there.

    ``source``: for a known model that is fetched, take the bytes from this file instead of the network.
    """
    model = known_models().get(name)
    if model is not None:
        if isinstance(model.asset, Asset):
            return fetch(model.asset, known_path(model), source=source, quiet=quiet)
        if source is not None:
            raise ModelError(f"{name} is trained, not fetched: it cannot be taken --from a file")
        return _train(model, model.asset, quiet)
    if not _HUB_ID.fullmatch(name):
        raise UnknownNameError(
            "model", name, known_models(), "pull a name of `hasten models list` or a Hugging Face id"
        )
    if source is not None:
        raise ModelError(f"--from works for known models only; use the local path itself instead of {name!r}")
    return _pull_hub(name)


def remove(name: str) -> int:
    """Delete a pulled model (or what is left of an unfinished pull) and return the bytes freed.

    Only ever deletes a folder of the store. Raises `ModelError` when there is nothing to remove.
    """
    if name in known_models():
        folder = models_home() / name
    elif _HUB_ID.fullmatch(name):
        folder = _hub_folder(name)
    else:
        raise UnknownNameError(
            "model", name, [e.name for e in entries()], "only models of the store can be removed"
        )
    if not folder.is_dir():
        raise ModelError(f"{name} is not in the store: nothing to remove at {folder}")
    if folder.is_symlink() or models_home().resolve() not in folder.resolve().parents:
        raise ModelError(f"{folder} leads outside the store; hasten deletes nothing there")
    freed = _tree_bytes(folder)
    shutil.rmtree(folder)
    return freed


def entries() -> list[Entry]:
    """Every known model with its state, then the Hugging Face models that were pulled."""
    return [_known_entry(model) for model in known_models().values()] + _hub_entries()


def known_path(model: KnownModel) -> Path:
    """Where a known model lies in the store, whether pulled or not."""
    return models_home() / model.name / model.file


def _known_entry(model: KnownModel) -> Entry:
    path = known_path(model)
    weights = path / TRAINED_WEIGHTS if isinstance(model.asset, Recipe) else path
    state: State = "absent"
    if path.exists():
        whole = weights.is_file() and weights.stat().st_size == model.asset.size
        state = "pulled" if whole else "damaged"
    elif _partial(path).exists():
        state = "partial"
    return Entry(
        name=model.name,
        state=state,
        bytes=model.asset.size,
        license=model.license,
        opt_in=bool(model.opt_in),
        title=model.title,
        path=str(path) if state == "pulled" else None,
    )


def _partial(path: Path) -> Path:
    """Where an unfinished fetch or training keeps what it has."""
    return path.with_name(path.name + ".partial")


def _resolve_known(model: KnownModel, allow_pull: bool) -> Path:
    entry = _known_entry(model)
    if entry.state == "pulled":
        return known_path(model)
    command = f"`hasten models pull {model.name}`"
    if model.opt_in:
        raise ModelError(
            f"{model.name} is opt-in and not pulled: {human_bytes(model.asset.size)}, "
            f"licence {model.license}, {model.opt_in}; run {command} if you accept that"
        )
    if not allow_pull:
        raise ModelError(f"{model.name} is not pulled ({entry.state}); run {command}")
    return pull(model.name)


def _train(model: KnownModel, recipe: Recipe, quiet: bool) -> Path:
    target = known_path(model)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target, model.name, Console(stderr=True, quiet=quiet)):
            if not target.exists():
                recipe.load()(target, quiet)
            shutil.rmtree(_partial(target), ignore_errors=True)
    except OSError as error:
        raise FetchError(
            f"{model.name}: cannot read or write {error.filename or target.parent}: {error.strerror or error}; "
            f"training needs {human_bytes(8 * recipe.size)}; free some space or set HASTEN_HOME to another folder"
        ) from None
    if _known_entry(model).state != "pulled":
        raise IntegrityError(
            f"{target} is damaged: its {TRAINED_WEIGHTS} is missing or not {recipe.size} bytes long; run "
            f"`hasten models remove {model.name}`, then pull it again"
        )
    return target


def _check_file(path: Path) -> Path:
    if path.suffix == ".gguf":
        return path
    if path.suffix in _PICKLES:
        raise ModelFormatError(
            f"{path} may be a pickle, which can run code when loaded; hasten reads safetensors folders and "
            f"GGUF files only. Convert it to safetensors first"
        )
    if path.suffix == ".safetensors":
        raise ModelFormatError(f"{path} is one file of a model; give its folder {path.parent} instead")
    raise ModelFormatError(f"{path} is not a model: hasten reads safetensors folders and .gguf files")


# Hugging Face hub


def _is_hub_id(text: str, path: Path) -> bool:
    return bool(_HUB_ID.fullmatch(text)) and path.suffix != ".gguf" and not path.parent.is_dir()


def _hub_folder(name: str) -> Path:
    return models_home() / "hub" / name.replace("/", "--")


def _resolve_hub(name: str, allow_pull: bool) -> Path:
    folder = _hub_folder(name)
    if (folder / "config.json").is_file() and _complete_marker(folder).is_file():
        return folder
    if not allow_pull:
        raise ModelError(f"{name} is not pulled; run `hasten models pull {name}`")
    return _pull_hub(name)


def _complete_marker(folder: Path) -> Path:
    """Written last: a folder without it is an unfinished download."""
    return folder / ".hasten-complete"


def _transport_errors() -> tuple[type[Exception], ...]:
    """Connection errors of the HTTP library that the installed hub client uses: it has changed libraries twice."""
    known = {"httpx": "HTTPError", "httpx2": "HTTPError", "requests": "RequestException"}
    return tuple(
        getattr(sys.modules[module], name) for module, name in known.items() if module in sys.modules
    )


def _pull_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    folder = _hub_folder(name)
    try:
        # The hub client locks each file and resumes; the marker says that every file is there.
        snapshot_download(name, allow_patterns=list(HUB_PATTERNS), local_dir=folder)
    except GatedRepoError:
        raise FetchError(
            f"{name} is gated: accept its licence on the hub, then log in (`hf auth login`) and pull again"
        ) from None
    except RepositoryNotFoundError:
        raise UnknownNameError(
            "model", name, known_models(), "the hub has no such public model; check the id or log in"
        ) from None
    except (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        *_transport_errors(),
        OSError,
    ) as error:
        raise FetchError(
            f"{name}: no local path of that name, and it could not be downloaded from the Hugging Face hub "
            f"({type(error).__name__}: {_first_line(error)}). Without a network, give a local folder or "
            f".gguf file; known models: {', '.join(known_models())}"
        ) from None
    if not any(folder.glob("*.safetensors")):
        shutil.rmtree(folder)
        raise ModelFormatError(
            f"{name} publishes no safetensors weights; hasten reads safetensors and GGUF, never pickle. "
            f"Download a .gguf of it and give that file"
        )
    _complete_marker(folder).touch()
    return folder


def _hub_entries() -> list[Entry]:
    home = models_home() / "hub"
    out = []
    for folder in sorted(home.iterdir()) if home.is_dir() else ():
        if not folder.is_dir():
            continue
        complete = _complete_marker(folder).is_file()
        out.append(
            Entry(
                name=folder.name.replace("--", "/", 1),
                state="pulled" if complete else "partial",
                bytes=_tree_bytes(folder),
                license="see the model's card",
                opt_in=True,
                title="from the Hugging Face hub",
                path=str(folder) if complete else None,
            )
        )
    return out


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no further detail"])[0]


def _tree_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())
