"""A progress bar on a terminal: which step, how many pairs, the ratio so far beside its quality."""

from __future__ import annotations

import statistics
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from hasten.measure.interleave import Pairs
from hasten.measure.statistics import MIN_PAIRS, median_interval


class Progress:
    """Context manager around one measurement. Silent when standard error is not a terminal."""

    def __init__(self, title: str, *, shown: bool = True) -> None:
        console = Console(stderr=True)
        self._quality = ""
        self._bar = Bar(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not (shown and console.is_terminal),
            transient=True,
        )
        self._title = escape(title)
        self._task = self._bar.add_task(self._title, total=None, note="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, what: str) -> None:
        self._bar.update(self._task, note=escape(what))

    def begin_pairs(self, most: int, quality: str) -> None:
        self._quality = escape(quality)
        self._bar.update(self._task, total=most, completed=0, note=self._quality)

    def pair(self, pairs: Pairs) -> None:
        ratios = pairs.ratios
        text = f"{statistics.median(ratios):.2f}x"
        if len(ratios) >= MIN_PAIRS:
            interval = median_interval(ratios)
            text += f" \\[{interval.low:.2f}, {interval.high:.2f}]"
        self._bar.update(self._task, completed=len(ratios), note=f"{text} · {self._quality}")
