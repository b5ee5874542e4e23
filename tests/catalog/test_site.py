"""The documentation site builds without a warning and writes nothing into the source tree."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from hasten.catalog import loader

ROOT = Path(__file__).parents[2]


def test_the_site_builds_strictly_with_a_page_for_every_system(tmp_path: Path, optional):
    optional("material")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "--quiet",
            "--site-dir",
            str(tmp_path / "site"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    pages = {path.parent.name for path in (tmp_path / "site" / "systems").glob("*/index.html")}
    assert pages == set(loader.records())
    card = (tmp_path / "site" / "systems" / "hydragen" / "index.html").read_text(encoding="utf-8")
    assert "arXiv 2402.05099" in card
    for page in ("index.html", "guide/index.html", "architecture/index.html", "contributing/index.html"):
        assert (tmp_path / "site" / page).is_file()
    assert not (tmp_path / "site" / "hooks.py").exists()
    assert not (ROOT / "docs" / "systems").exists()
    assert not (ROOT / "docs" / "contributing.md").exists()
