"""The same weights in each engine's own format: made once from the model's file, kept as artefacts."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.peers.catalogue import EngineSpec
from hasten.core.artefact import ArtefactStore
from hasten.core.errors import HastenError, MeasureError
from hasten.core.paths import home
from hasten.models.checkpoint import Checkpoint, open_checkpoint
from hasten.models.hf import HFCheckpoint
from hasten.models.hf_export import export_name, export_norm_offset, write_config, write_tokenizer
from hasten.models.store import resolve

_SHARD = 2_000_000_000  # bytes


class ModelFiles:
    """Paths of one model by kind: ``model`` what hasten opens, ``gguf`` the same if it is one, ``hf`` a Hugging Face
    folder in float32 (the model's own if it is one), ``ct2`` a CTranslate2 folder with int8 linears.

    ``problems`` says by kind why one could not be made.
    """

    def __init__(self, model: str | None, peers: Path) -> None:
        from hasten.models.known import DEFAULT_MODEL

        self.path = resolve(model or DEFAULT_MODEL)
        self.checkpoint = open_checkpoint(self.path)
        self.peers = peers
        self.store = ArtefactStore(home() / "artefacts", self.checkpoint.fingerprint)
        self.paths: dict[str, str] = {"model": str(self.path)}
        self.problems: dict[str, HastenError] = {}
        if self.path.suffix == ".gguf":
            self.paths["gguf"] = str(self.path)

    def prepare(self, specs: Iterable[EngineSpec], step: Callable[[str], None] = lambda what: None) -> None:
        """Make what ``specs`` read; a kind that cannot be made is noted in ``problems``."""
        for spec in specs:
            if spec.reads in self.paths or spec.reads in self.problems or spec.reads == "gguf":
                continue
            try:
                step(f"weights for {spec.name}")
                self.paths[spec.reads] = str(self._hf() if spec.reads == "hf" else self._ct2(spec))
            except HastenError as error:
                self.problems[spec.reads] = error

    def _hf(self) -> Path:
        if isinstance(self.checkpoint, HFCheckpoint):
            return self.path
        return self.store.build("peers-hf", {"dtype": "float32"}, lambda f: write_hf(f, self.checkpoint))

    def _ct2(self, spec: EngineSpec) -> Path:
        python = spec.python(self.peers)
        version = _run([python, "-c", "import ctranslate2; print(ctranslate2.__version__)"]).strip()
        made_from = {"quantization": "int8", "ctranslate2": version}

        def convert(folder: Path) -> None:
            converter = [
                python,
                "-m",
                "ctranslate2.converters.transformers",
                "--force",
                "--quantization",
                "int8",
            ]
            _run([*converter, "--model", str(self._hf()), "--output_dir", str(folder)])

        return self.store.build("peers-ct2", made_from, convert)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise MeasureError(
            f"{' '.join(command[:4])} ... failed with code {done.returncode}:\n{done.stderr.strip()[-2000:]}"
        )
    return done.stdout


def write_hf(folder: Path, checkpoint: Checkpoint) -> None:
    """Write ``checkpoint`` dequantised to float32 into ``folder``, an ordinary Hugging Face folder, in shards."""
    import json

    from safetensors.torch import save_file

    write_config(folder, checkpoint, {"torch_dtype": "float32"})
    write_tokenizer(folder, checkpoint)
    offset = export_norm_offset(checkpoint.config)
    shards: list[dict[str, object]] = [{}]
    places: dict[str, str] = {}
    held = 0

    def flush() -> None:
        name = f"model-{len(shards):05d}.safetensors"
        save_file(shards[-1], folder / name, {"format": "pt"})
        places.update(dict.fromkeys(shards[-1], name))
        shards[-1] = dict.fromkeys(shards[-1])

    for name in checkpoint.config.tensor_shapes():
        value = checkpoint.tensor(name)
        if name.split(".")[-2].endswith("norm"):
            value = value - offset
        if held + value.nbytes > _SHARD and shards[-1]:
            flush()
            shards.append({})
            held = 0
        shards[-1][export_name(name, checkpoint.config)] = value.contiguous()
        held += value.nbytes
    flush()
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
