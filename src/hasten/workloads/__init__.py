"""The real jobs, by name. Importing this package costs nothing: a workload's module loads when asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from hasten.core.errors import UnknownNameError

if TYPE_CHECKING:
    from hasten.workloads.workload import Workload

# name -> module:class; every class takes no arguments and keeps no state.
_WORKLOADS = {
    "decode": "hasten.workloads.decode:Decode",
    "prefill": "hasten.workloads.prefill:Prefill",
    "long-prefill": "hasten.workloads.long_prefill:LongPrefill",
    "long-decode": "hasten.workloads.long_decode:LongDecode",
    "batch-decode": "hasten.workloads.batch_decode:BatchDecode",
    "shared-prefix": "hasten.workloads.shared_prefix:SharedPrefix",
    "edit": "hasten.workloads.edit:Edit",
    "trace": "hasten.workloads.trace:Trace",
    "document-qa": "hasten.workloads.document_qa:DocumentQA",
    "retrieval": "hasten.workloads.retrieval:RetrievalQuestions",
    "offline": "hasten.workloads.offline:Offline",
    "offload-decode": "hasten.workloads.offload:OffloadDecode",
}


def names() -> tuple[str, ...]:
    """All workload names, in the order they are shown."""
    return tuple(_WORKLOADS)


def get(name: str) -> Workload:
    """The workload called ``name``; `UnknownNameError` with the nearest names otherwise."""
    try:
        path = _WORKLOADS[name]
    except KeyError:
        raise UnknownNameError("workload", name, _WORKLOADS, "one of " + ", ".join(_WORKLOADS)) from None
    module, _, kind = path.partition(":")
    found: type[Workload] = getattr(importlib.import_module(module), kind)
    return found()
