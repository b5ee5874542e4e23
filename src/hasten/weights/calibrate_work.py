"""What surrounds a calibration run: finished blocks kept on disk, and a progress bar."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hasten.weights.calibrate import BlockReport

log = logging.getLogger(__name__)


class WorkFolder:
    """Finished blocks of an unfinished run, one safetensors file each; a killed run loses at most one block.

    Files appear atomically; one that cannot be read (power loss) counts as not finished.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    def file(self, index: int) -> Path:
        return self.path / f"block-{index:03d}.safetensors"

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


@contextlib.contextmanager
def progress_bar(title: str, blocks: int) -> Iterator[Callable[[BlockReport], None]]:
    """A progress bar on stderr: blocks done, the last block's relative error and time, time left."""
    from rich.console import Console
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
