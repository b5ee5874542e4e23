"""What surrounds a calibration run block by block: finished blocks kept on disk, the artefact they become, and how a
weight format reads it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hasten.core.errors import ArtefactError
from hasten.core.fetch import locked
from hasten.models.checkpoint import load_decoder
from hasten.weights.calibrate import BlockMethod, BlockReport, LinearReport, SourceLinear, calibrate
from hasten.weights.calibrate_data import calibration_name

if TYPE_CHECKING:
    from hasten.models.context import BuildContext

log = logging.getLogger(__name__)


def block_file(index: int) -> str:
    """The name of a block's file, in a work folder and in an artefact."""
    return f"block-{index:03d}.safetensors"


class WorkFolder:
    """Finished blocks of an unfinished run, one safetensors file each; a killed run loses at most one block.

    Files appear atomically; one that cannot be read (power loss) counts as not finished.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    def file(self, index: int) -> Path:
        return self.path / block_file(index)

    def save(self, index: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Keep a block's tensors and string metadata."""
        temporary = self.path / f".block-{index:03d}.{os.getpid()}"
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, dict(metadata))
        os.replace(temporary, self.file(index))

    def load(self, index: int) -> dict[str, Tensor] | None:
        """A finished block's tensors, or None."""
        if not self.file(index).exists():
            return None
        try:
            with safe_open(self.file(index), framework="pt") as stored:
                return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, OSError) as error:
            log.warning("%s cannot be read (%s); its block is done again", self.file(index), error)
            return None


class KeptMethod(BlockMethod):
    """A method of the calibration driver that keeps every block in ``work`` as it is finished.

    tensors: of the block at hand, by name; `process` adds to it, `save` writes it.
    """

    def __init__(self, work: WorkFolder) -> None:
        self.work = work
        self.tensors: dict[str, Tensor] = {}

    def save(self, index: int, reports: Sequence[LinearReport]) -> None:
        lines = [
            {"name": r.name, "error": r.error, "rtn_error": r.reference, "seconds": r.seconds, **r.detail}
            for r in reports
        ]
        self.work.save(index, self.tensors, {"reports": json.dumps(lines)})
        self.tensors = {}


def made_from(context: BuildContext, version: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What an artefact depends on besides the model: version of the algorithm, settings, calibration data."""
    return {"version": version, "settings": dict(settings), "calibration": calibration_name(context)}


def prepare_blocks(
    context: BuildContext,
    slug: str,
    label: str,
    made_from: Mapping[str, Any],
    method: Callable[[WorkFolder], KeptMethod],
    tokens: Callable[[], Tensor],
    options: Callable[[Tensor], Mapping[str, Any]] = lambda token_ids_NL: {},
) -> Path:
    """The folder of an artefact of one file per block, calibrated first if there is none: locked, with a progress bar,
    resumed after a kill.

    method: makes the method over a work folder. tokens: makes int64 [N, L]. options: of `calibrate`. Raises what they
    and `calibrate` raise, and `ArtefactError` (a damaged artefact).
    """
    store = context.artefacts
    found = store.find(slug, made_from)
    if found is not None:
        return found
    store.root.mkdir(parents=True, exist_ok=True)
    work = store.root / f".{store.path(slug, made_from).name}.work"

    def build(folder: Path) -> None:
        token_ids_NL, blocks = tokens(), context.config.num_layers
        decoder, kept = load_decoder(context.checkpoint, pack=SourceLinear), method(WorkFolder(work))
        with progress_bar(f"{label}: quantising", blocks) as advance:
            calibrate(decoder, token_ids_NL, kept, keep=False, progress=advance, **options(token_ids_NL))
        for index in range(blocks):
            os.replace(kept.work.file(index), folder / block_file(index))

    with locked(work, f"{slug} calibration", Console(stderr=True)):
        built = store.build(slug, made_from, build)
        shutil.rmtree(work, ignore_errors=True)
    return built


class BlockFiles:
    """The tensors of an artefact that `prepare_blocks` made. ``prepare`` gives its folder when first needed."""

    def __init__(self, prepare: Callable[[], Path]) -> None:
        self._prepare = prepare
        self._folder: Path | None = None
        self._open: tuple[Path | None, Any] = (None, None)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Those of a linear inside a block (``layers.3.qkv_proj``). Raises `ArtefactError` if there are none."""
        if self._folder is None:
            self._folder = self._prepare()
        file = self._folder / block_file(int(name.split(".")[1]))
        if self._open[0] != file:  # one at a time: blocks come in order
            self._open = (file, safe_open(file, framework="pt"))
        stored = self._open[1]
        tensors = {key: stored.get_tensor(key) for key in stored.keys() if key.startswith(f"{name}.")}  # noqa: SIM118
        if not tensors:
            raise ArtefactError(f"{file} holds no {name}; delete the folder and prepare it again")
        return tensors


@contextlib.contextmanager
def progress_bar(title: str, blocks: int) -> Iterator[Callable[[BlockReport], None]]:
    """A progress bar on stderr: blocks done, the last block's relative error and time, time left."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[last]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=blocks, last="")

        def advance(report: BlockReport) -> None:
            worst = max((r.error for r in report.linears), default=0.0)
            last = "resumed" if report.resumed else f"error {worst:.1e}, {report.seconds:.1f} s"
            bar.update(task, advance=1, last=last)

        yield advance
