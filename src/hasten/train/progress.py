"""The progress bar of a training run."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hasten.train.trainer import StepReport, TrainSettings


class TrainingBar:
    """Steps done, time left, tokens per second and loss, on stderr; a line that stays for every evaluation."""

    def __init__(self, name: str, settings: TrainSettings, resumed: int, quiet: bool = False) -> None:
        self.name, self.resumed = name, resumed
        self.console = Console(stderr=True, quiet=quiet)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, TextColumn("{task.fields[last]}"), console=self.console)
        self.task = self.bar.add_task(f"training {name}", total=settings.steps, completed=resumed, last="")
        self.before = time.perf_counter()

    def __enter__(self) -> TrainingBar:
        if self.resumed:
            self.console.print(f"{self.name}: going on at step {self.resumed}")
        self.bar.start()
        self.before = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def advance(self, report: StepReport) -> None:
        """Show a step."""
        now = time.perf_counter()
        speed, self.before = report.tokens / (now - self.before), now
        self.bar.update(self.task, completed=report.step, last=f"{speed:.0f} tok/s, loss {report.loss:.3f}")
        if report.held_out is not None:
            self.console.print(
                f"step {report.step}/{report.steps}: loss {report.loss:.3f}, held out {report.held_out:.3f}"
            )
