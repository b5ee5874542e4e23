"""hasten makes a machine-learning job faster, end to end, and proves it.

    llm = hasten.LLM("smollm2-135m-instruct", use=["gptq", hasten.Adamas(budget=128)])

Names are imported when first used, so ``import hasten`` is instant. Every technique of the catalogue that has code is
here under its class name.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.core.plan import Plan
    from hasten.lm.llm import LLM
    from hasten.lm.prepare import prepare
    from hasten.lm.request import SamplingParams
    from hasten.measure.comparison import compare

__version__ = "0.1.0"
__all__ = ["LLM", "Plan", "SamplingParams", "__version__", "compare", "prepare"]

_LAZY = {
    "LLM": "hasten.lm.llm",
    "Plan": "hasten.core.plan",
    "SamplingParams": "hasten.lm.request",
    "compare": "hasten.measure.comparison",
    "prepare": "hasten.lm.prepare",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
    else:
        value = _technique(name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_technique_names()})


def _technique_names() -> dict[str, Any]:
    from hasten.catalog import loader

    return {
        record.technique.partition(":")[2]: record
        for record in (*loader.records().values(), *loader.beside().values())
        if record.technique
    }


def _technique(name: str) -> Any:
    # Only class names can be techniques; the import system asks for lower-case names all the time.
    found = _technique_names().get(name) if name[:1].isupper() else None
    if found is None:
        raise AttributeError(f"module 'hasten' has no attribute {name!r}")
    return found.load()
