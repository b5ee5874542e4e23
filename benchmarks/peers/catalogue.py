"""The engines that can be run, and where each one's environment lies."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hasten.core.errors import NotBuiltError, UnknownNameError
from hasten.measure.process import ChildProcess

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / ".peers"
_START = "from benchmarks.peers.engines.child import main; main()"
_MODULES = "benchmarks.peers.engines."


@dataclass(frozen=True)
class EngineSpec:
    """How an engine is started.

    entry: ``module:Class`` of its `Engine`. environment: folder of its virtual environment in the peers' folder; None
    is this one. reads: which kind of model file it opens. prefix_cache: ``never``, ``shared`` (in jobs that share a
    prefix) or ``only shared`` (the same, and it takes part in no other job). like: the engine whose quality is its own.
    """

    name: str
    entry: str
    environment: str | None
    reads: Literal["model", "gguf", "hf", "ct2"]
    prefix_cache: Literal["never", "shared", "only shared"] = "shared"
    like: str = ""

    @property
    def quality(self) -> str:
        """The name under which its quality is kept."""
        return self.like or self.name

    def python(self, home: Path) -> str:
        """Its interpreter. `NotBuiltError` when it is not installed."""
        if self.environment is None:
            return sys.executable
        python = home / self.environment / "bin" / "python"
        if not python.exists() or not (home / self.environment / ".installed").exists():
            raise NotBuiltError(f"not installed in {home / self.environment}: run `make peers`")
        return str(python)

    def process(
        self, home: Path, *, threads: int, cpus: Sequence[int] = (), timeout: float | None = None
    ) -> ChildProcess:
        own = self.environment is None
        # A peer gets our sources and nothing of our environment; what it imports of them needs nothing else.
        path = [str(ROOT), *sys.path] if own else [str(ROOT), str(ROOT / "src")]
        return ChildProcess(
            self.name,
            [self.python(home), "-P", "-c", _START],
            path=path,
            threads=threads,
            cpus=cpus,
            timeout=timeout,
            # Nothing here may look for a newer file or report home.
            variables={"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "DO_NOT_TRACK": "1"},
        )


OURS = EngineSpec("hasten", _MODULES + "hasten_engine:HastenEngine", None, "model")
REFERENCE = EngineSpec("reference", _MODULES + "hasten_engine:HastenReference", None, "model", "never")
ENGINES = {
    spec.name: spec
    for spec in (
        OURS,
        EngineSpec("llama.cpp", _MODULES + "llama_cpp_engine:LlamaCppEngine", "llama_cpp", "gguf"),
        EngineSpec("openvino", _MODULES + "openvino_engine:OpenVINOEngine", "openvino", "gguf", "never"),
        EngineSpec(
            "openvino-prefix",
            _MODULES + "openvino_engine:OpenVINOEngine",
            "openvino",
            "gguf",
            "only shared",
            like="openvino",
        ),
        EngineSpec("ctranslate2", _MODULES + "ctranslate2_engine:CTranslate2Engine", "ctranslate2", "ct2"),
        EngineSpec("transformers", _MODULES + "transformers_engine:TransformersEngine", "transformers", "hf"),
    )
}


def engines(names: Sequence[str] | None = None) -> list[EngineSpec]:
    """The named engines, hasten first: it is what every ratio is taken to. None: all."""
    for name in names or ():
        if name not in ENGINES:
            raise UnknownNameError("engine", name, ENGINES, "engines: " + ", ".join(ENGINES))
    chosen = [ENGINES[name] for name in dict.fromkeys(names or ENGINES)]
    return [OURS, *(spec for spec in chosen if spec is not OURS)]
