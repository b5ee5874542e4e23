"""Where hasten keeps what it can fetch or compute again: one cache folder per user."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from hasten.core.errors import HastenError

ENVIRONMENT = "HASTEN_HOME"


def home() -> Path:
    """The user's cache folder (created): ``$HASTEN_HOME``, else the platform's cache folder for hasten.

    Raises `HastenError` when it cannot be created, naming the folder and the variable that moves it.
    """
    chosen = os.environ.get(ENVIRONMENT, "").strip()
    folder = Path(chosen).expanduser().absolute() if chosen else platformdirs.user_cache_path("hasten")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HastenError(
            f"cannot create the cache folder {folder}: {error.strerror or error}; "
            f"set {ENVIRONMENT} to a folder you can write to"
        ) from None
    return folder


def models_home() -> Path:
    """Folder of pulled models (not created)."""
    return home() / "models"


def corpus_home() -> Path:
    """Folder of the fetched text corpora (not created)."""
    return home() / "corpus"
