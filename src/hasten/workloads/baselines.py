"""What a technique is compared with on its workload.

The first baseline is the one its published figure is about. A technique may bring its own list as a class
attribute ``baselines``: tuples of plan keys (as in a plan file) laid over the workload's baseline plan, e.g.
``({"engine": {"prefix_cache": False}}, {"use": {"quest": {"budget": 256}}})``. Without one:

- a weight format is compared with dense bfloat16 weights (papers state their ratios against 16-bit weights),
  then dense float32, then ``auto``, the checkpoint's own storage, which may itself be 4-bit;
- every other technique is compared with the workload's baseline plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hasten.catalog import loader
from hasten.core.plan import Plan
from hasten.core.technique import Technique
from hasten.workloads.workload import Workload

_BY_SLOT: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "weight_format": ({"dtype": "bfloat16"}, {"dtype": "float32"}, {"dtype": "auto"}),
}


def baselines(workload: Workload, technique: type[Technique], model: str | None = None) -> tuple[Plan, ...]:
    """Plans to compare ``technique`` with on ``workload``, the headline's first. Raises like `Plan.from_dict`."""
    base = measured_base(workload, technique, model)
    changes: tuple[Mapping[str, Any], ...] | None = getattr(technique, "baselines", None)
    if changes is None:
        changes = next((_BY_SLOT[slot] for slot in technique.slots if slot in _BY_SLOT), ({},))
    return tuple(_changed(base, change) for change in changes)


def measured_base(workload: Workload, technique: type[Technique], model: str | None = None) -> Plan:
    """The workload's baseline plan with what the technique is measured on: plan keys in its attribute
    ``measured_on``.
    """
    return _changed(workload.baseline(model), getattr(technique, "measured_on", {}))


def _changed(base: Plan, change: Mapping[str, Any]) -> Plan:
    """``base`` with some keys set; the engine table is merged, techniques are added."""
    extra = Plan.from_dict(change, loader.technique)
    return replace(
        base,
        model=extra.model if "model" in change else base.model,
        dtype=extra.dtype if "dtype" in change else base.dtype,
        engine={**base.engine, **extra.engine},
        techniques=base.techniques + extra.techniques,
    ).check()
