"""MkDocs hooks: a card per system and their index, made from the catalogue, and CONTRIBUTING.md as a page.

Pages exist in memory only. The notes and published results that cards print come from this source tree.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

try:
    from hasten.catalog import cards, loader
except ImportError as error:
    raise PluginError(f"the site needs hasten itself: pip install -e . ({error})") from error

FOLDER = "systems"
_WIDE = "---\nhide: [toc]\n---\n\n"  # the families stand in the navigation already


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Append the systems to the navigation: the index, then one section per family."""
    sections: list[Any] = [f"{FOLDER}/index.md"]
    for family in loader.families():
        pages = [{r.slug: f"{FOLDER}/{r.slug}.md"} for r in loader.select(family=family)]
        sections.append({family: pages})
    config.nav = [*(config.nav or []), {"Systems": sections}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages. A broken result file or record stops the build."""
    root = Path(config.config_file_path).parent
    _refuse_notes_of_nobody(root / "docs" / "notes")
    pages = {f"{FOLDER}/index.md": _WIDE + cards.index(loader.records().values(), root)}
    pages |= {f"{FOLDER}/{slug}.md": cards.card(record, root) for slug, record in loader.records().items()}
    pages["contributing.md"] = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_serve(server: Any, config: MkDocsConfig, builder: Any) -> Any:
    """Rebuild on changes to what the generated pages are made of."""
    root = Path(config.config_file_path).parent
    for path in ("CONTRIBUTING.md", "benchmarks/results", "src/hasten/catalog"):
        if (root / path).exists():
            server.watch(str(root / path), builder)
    return server


def _refuse_notes_of_nobody(folder: Path) -> None:
    """A note whose name is no slug would be lost without a word."""
    for path in sorted(folder.glob("*.md")):
        loader.record(path.stem)
