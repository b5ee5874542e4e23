"""The contract of a slot is tested on everything that fills it: the default, and each technique that has code.

A technique joins by its catalogue record alone: as soon as its state is not ``planned`` the tests here run on it. What
a technique needs to run on the tiny model in a blink (a short calibration, say) stands in `SETTINGS`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.catalog import loader
from hasten.core.slots import SLOTS
from hasten.lm.llm import LLM
from hasten.models.checkpoint import open_checkpoint
from hasten.models.context import BuildContext

from ..lm.lm_tiny import write_checkpoint

# Settings that make a technique act on prompts of a few dozen tokens, or calibrate in no time.
SETTINGS: dict[str, dict[str, Any]] = {
    "adamas": {"budget": 16, "calibration_tokens": 256},
    "delta": {"pages": 3, "page": 4, "recent": 1, "selections": 1, "calibration_tokens": 64},
    "flash_attention": {"min_rows": 2},
    "flash_attention2": {"min_rows": 2},
    "gptq": {"group_size": 32, "samples": 4, "sample_length": 64},
    "resa": {"block": 4, "min_blocks": 2, "every": 4},
    "token_select": {"n_init": 4, "n_local": 8, "k": 12, "chunk": 8},
    "quantspec": {"group": 4, "draft_tokens": 2, "draft_weights": "rtn", "weight_group": 32},
    # Adaptive lengths follow the clock. A lossy attention policy reads verified guesses otherwise than decoded tokens,
    # so that answers beside one would follow it too.
    "prompt_lookup": {"adaptive": False},
    "sleb": {"remove": 1, "samples": 2, "sample_length": 32},
    "marlin": {"group_size": 32, "samples": 4, "sample_length": 64},
    # min_rows: by default the rows of a call decide whether they are rounded. 8 bits: a step of 4 bits, taken when
    # float32 sums in another order put an input beyond a tie, would change the answers of this tiny model.
    "pbs_attn": {"block": 8, "segment": 16, "min_rows": 2},
    "sparge_attn": {"min_rows": 2},
    "quik": {"bits": 8, "outliers": 8, "min_rows": 1, "samples": 4, "sample_length": 64},
    "endor": {"memory_mb": 0.2, "samples": 4, "sample_length": 64},
    "t_man": {"bits": 4, "group_size": 32, "samples": 4, "sample_length": 64},
}


# Engine settings that a technique's promises are made for. What pbs_attn reads of a prompt depends on the rows that
# come in a step, so that prompts must come whole, and from their beginning, to be read the same in any company.
ENGINE: dict[str, dict[str, Any]] = {"pbs_attn": {"max_step_tokens": 512, "prefix_cache": False}}


def built(slot: str | None = None) -> list[loader.Record]:
    """Records of the language-model engine whose techniques have code (of one slot, or all)."""
    return [
        record
        for record in (*loader.records().values(), *loader.beside().values())
        if record.state != "planned"
        and any(SLOTS[name].engine == "lm" and SLOTS[name].interface for name in record.slots)
        and (slot is None or slot in record.slots)
    ]


@cache
def draft_checkpoint() -> str:
    """A second tiny model, of fewer layers: its guesses are mostly wrong, like those of any random model."""
    folder = tempfile.TemporaryDirectory(prefix="hasten-draft-")
    _KEPT.append(folder)
    return str(write_checkpoint(Path(folder.name) / "draft", layers=2, head_size=16, seed=1))


_KEPT: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends


def technique(slug: str) -> Any:
    settings = SETTINGS.get(slug, {})
    if slug == "draft_model":
        settings = {"model": draft_checkpoint(), "min_confidence": 0.0}
    return loader.technique(slug)(**settings)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``slug``: every technique with code. A test names its slot's fixture ``provider`` with ``SLOT``, ``DEFAULTS``."""
    if "slug" in metafunc.fixturenames:
        metafunc.parametrize("slug", [record.slug for record in built()])
    if "provider" in metafunc.fixturenames:
        module = metafunc.module
        cases: list[Any] = [pytest.param(make, id=name) for name, make in module.DEFAULTS.items()]
        cases += [pytest.param(record.slug, id=record.slug) for record in built(module.SLOT)]
        metafunc.parametrize("provider", cases, indirect=True)


@pytest.fixture
def provider(request: pytest.FixtureRequest) -> Callable[[], Any]:
    """A function that makes a fresh provider of the module's slot."""
    if not isinstance(request.param, str):
        return request.param
    chosen = technique(request.param)
    context: BuildContext = request.getfixturevalue("context")
    return lambda: chosen.provide(request.module.SLOT, context)


@pytest.fixture
def formats(request: pytest.FixtureRequest, provider: Callable[[], Any]) -> Callable[[], Any]:
    """A function that makes the KV format of the technique behind ``provider``; it gives None for the default."""
    found = request.node.callspec.params["provider"]
    if not isinstance(found, str) or "kv_format" not in loader.technique(found).slots:
        return lambda: None
    return lambda: technique(found).provide("kv_format", request.getfixturevalue("context"))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("contracts") / "tiny", layers=4, head_size=32)


@pytest.fixture(scope="session")
def calibration() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, 320, (8, 128), generator=generator).tolist()


@pytest.fixture
def context(model: Path, calibration: list[list[int]], tmp_path: Path) -> BuildContext:
    checkpoint = open_checkpoint(model)
    return BuildContext.of(checkpoint, tmp_path, weight_dtype=torch.float32, calibration=calibration)


@pytest.fixture(scope="session")
def shared_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def load(
    model: Path, calibration: list[list[int]], shared_home: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., LLM]:
    """``load(slug or None, ..., dtype=..., **engine)``: the tiny model with one technique, several or none."""
    monkeypatch.setenv("HASTEN_HOME", str(shared_home))

    def make(*slugs: str | None, dtype: str = "float32", **engine: Any) -> LLM:
        own = {name: value for slug in slugs for name, value in ENGINE.get(slug or "", {}).items()}
        engine = {"page_size": 4, "max_step_tokens": 48, "max_batch": 6, **own, **engine}
        use = [technique(slug) for slug in slugs if slug is not None]
        return LLM(model, use, dtype, calibration=calibration, **engine)

    return make


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Every test of this folder."""
