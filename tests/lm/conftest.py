"""Fixtures of the engine's tests: a tiny random model on disk, and ways to load it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from lm_tiny import write_checkpoint

from hasten.core.plan import Plan
from hasten.core.technique import Technique
from hasten.lm.llm import LLM


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def make_llm(tiny_path: Path) -> Callable[..., LLM]:
    """``make_llm(technique, ..., kv_tokens=..., ...)``: the tiny model in float32."""

    def make(*techniques: Technique, dtype: str = "float32", **engine: Any) -> LLM:
        engine = {"page_size": 4, "max_step_tokens": 32, "max_batch": 8, **engine}
        return LLM(Plan(str(tiny_path), techniques, dtype, engine))

    return make


@pytest.fixture
def llm(make_llm: Callable[..., LLM]) -> LLM:
    return make_llm()


@pytest.fixture
def greedy() -> Callable[[LLM, list[int], int], list[int]]:
    """Greedy continuation by the model's plain forward pass, without cache, kernel or engine."""

    def run(llm: LLM, ids: list[int], count: int) -> list[int]:
        out = list(ids)
        with torch.inference_mode():
            for _ in range(count):
                out.append(int(llm._loaded.decoder(torch.tensor([out]))[0, -1].argmax()))
        return out[len(ids) :]

    return run


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Every test of this folder."""
