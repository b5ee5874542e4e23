"""SLEB: whole transformer blocks left out, chosen by verified loss (Song et al., ICML 2024, arXiv 2402.09025).

Greedy (algorithm 1): the block without which the *already pruned* model predicts the calibration text best goes, and
all losses are measured anew before the next one goes. No retraining, no change of weights. What is found is the list of
blocks; at run time they do not exist: fewer layers, contiguous KV slots, every native path.

The first use of a model searches (minutes) and keeps each table of losses, so that a killed search goes on with the
removal it was at, more removals start from those already made, and the one-shot criterion reads the first table.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from hasten.core.errors import ArtefactError, SettingError
from hasten.core.fetch import locked
from hasten.core.technique import Technique
from hasten.lm.layers.sleb_losses import BlockLosses, Losses
from hasten.models.checkpoint import load_decoder
from hasten.models.surgery import RemoveBlocks
from hasten.weights.calibrate_data import calibration_name, calibration_segments
from hasten.weights.dense import DenseFormat
from hasten.weights.native import NativeFormat

if TYPE_CHECKING:
    from hasten.models.context import BuildContext

VERSION = 1  # of the search: raise it when the same settings give other losses
_TABLE_SETTINGS = ("keep_first", "keep_last", "samples", "sample_length", "seed", "evaluate")


class SLEB(Technique):
    """The transformer blocks that are missed least on calibration text are left out of the model."""

    slug: ClassVar[str] = "sleb"
    slots: ClassVar[tuple[str, ...]] = ("model_surgery",)
    lossless: ClassVar[bool] = False

    remove: int = Field(3, ge=0, description="blocks to leave out")
    criterion: Literal["sleb", "one_shot", "cosine", "random", "last"] = Field(
        "sleb",
        description="how they are chosen: by the pruned model's loss, measured anew after each removal; by the loss of "
        "the whole model without one block; by how little a block turns its input; at random; the last ones",
    )
    keep_first: int = Field(1, ge=0, description="blocks at the front that always stay")
    keep_last: int = Field(1, ge=0, description="blocks at the end that always stay")
    samples: int = Field(8, ge=1, description="calibration segments")
    sample_length: int = Field(256, ge=2, description="tokens of a segment")
    seed: int = Field(0, ge=0, description="of the choice of segments, and of random removal")
    evaluate: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="weights that losses are measured with; auto: as the checkpoint stores them"
    )

    def provide(self, slot: str, context: BuildContext) -> RemoveBlocks:
        """The surgery. Raises `SettingError` when the model has too few blocks, and what `prepare` raises."""
        return RemoveBlocks(self.removal(context).blocks)

    def removal(self, context: BuildContext) -> Removal:
        """Which blocks go, searched for if need be. Raises as `prepare` does."""
        self.check(context.config.num_layers)
        if self.remove == 0:
            return Removal((), (), 0)
        folder = self.prepare(context)
        data = json.loads((folder / "removal.json").read_text(encoding="utf-8"))
        return Removal(tuple(data["blocks"]), tuple(data["losses"]), data["predicted"])

    def prepare(self, context: BuildContext) -> Path:
        """The folder of ``removal.json``; searches first if there is none. Shows progress; resumes after a kill.

        Raises `SettingError` (too few blocks, no or too short calibration data), `IntegrityError` (NaN in weights or
        activations), `ArtefactError` (a damaged artefact).
        """
        found = self.known(context)
        if found is not None:
            return found
        store, made_from = context.artefacts, self._made_from(context)
        store.root.mkdir(parents=True, exist_ok=True)
        with locked(store.path(self.slug, made_from), f"{self.slug} search", Console(stderr=True)):
            return store.build(self.slug, made_from, lambda folder: self._write(context, folder))

    def known(self, context: BuildContext) -> Path | None:
        """The artefact's folder if the search has been made. Raises `SettingError`, `ArtefactError` as `prepare`."""
        self.check(context.config.num_layers)
        return context.artefacts.find(self.slug, self._made_from(context))

    def _made_from(self, context: BuildContext) -> dict[str, Any]:
        return _made_from(context) | {"settings": self.model_dump(mode="json")}

    def check(self, blocks: int) -> None:
        """Raise `SettingError` unless ``remove`` blocks can go from a model of ``blocks``."""
        free = max(0, blocks - self.keep_first - self.keep_last)
        if self.remove > free:
            raise SettingError(
                f"sleb.remove = {self.remove}: the model has {blocks} blocks, of which the first {self.keep_first} and "
                f"the last {self.keep_last} stay; remove at most {free}"
            )
        if self.remove == blocks:
            raise SettingError(f"sleb.remove = {self.remove}: that is every block; at least one must be left")

    def _write(self, context: BuildContext, folder: Path) -> None:
        removal = Search(self, context).removal()
        text = json.dumps({**asdict(removal), "criterion": self.criterion, "of": context.config.num_layers})
        (folder / "removal.json").write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Removal:
    """What a search found.

    blocks: in the order of their removal, numbered as in the whole model. losses: on the calibration text, nats per
    predicted token: of the whole model, then after each removal. predicted: how many tokens that was.
    """

    blocks: tuple[int, ...]
    losses: tuple[float, ...]
    predicted: int


class Search:
    """The search for one model and one choice of settings."""

    def __init__(self, settings: SLEB, context: BuildContext) -> None:
        self.settings, self.context = settings, context
        self.blocks = context.config.num_layers

    def removal(self) -> Removal:
        """Choose ``remove`` blocks, and measure the loss after each removal."""
        count = self.settings.remove
        if self.settings.criterion == "sleb":
            chosen, losses = greedy(self.table, count)
        else:
            chosen = self.ranking()[:count]
            losses = self._losses(chosen)
        return Removal(tuple(chosen), tuple(losses), self.measured.predicted)

    def ranking(self) -> list[int]:
        """The blocks that may go, by a criterion that looks at the whole model only; the first to go first."""
        eligible = self.eligible(())
        match self.settings.criterion:
            case "one_shot":
                return self.table(()).ranking()
            case "cosine":
                with progress(f"{self.settings.label()}: similarity", self.measured.chunks) as advance:
                    near_BB = self.measured.similarity(advance)
                return sorted(eligible, key=lambda block: (-float(near_BB[block, block + 1]), block))
            case "random":
                generator = torch.Generator().manual_seed(self.settings.seed)
                return [eligible[i] for i in torch.randperm(len(eligible), generator=generator).tolist()]
            case "last":
                return eligible[::-1]
            case other:
                raise ValueError(f"criterion {other!r} does not rank the whole model")

    def alive(self, removed: tuple[int, ...]) -> list[int]:
        """The blocks that are left."""
        return [block for block in range(self.blocks) if block not in removed]

    def eligible(self, removed: tuple[int, ...]) -> list[int]:
        """The blocks that may go next: all that are left but the first and the last ones of them."""
        alive = self.alive(removed)
        return alive[self.settings.keep_first : len(alive) - self.settings.keep_last]

    def table(self, removed: tuple[int, ...]) -> Losses:
        """The losses after ``removed`` (order does not matter) and one block more: kept, or measured now."""
        removed = tuple(sorted(removed))
        settings = {name: getattr(self.settings, name) for name in _TABLE_SETTINGS}
        made_from = _made_from(self.context) | {"settings": settings, "removed": removed}

        def write(folder: Path) -> None:
            alive, candidates = self.alive(removed), self.eligible(removed)
            title = f"{self.settings.slug}: block {len(removed) + 1} to leave out"
            with progress(title, self.measured.chunks * len(candidates)) as advance:
                losses = self.measured.without(alive, candidates, advance)
            data = {"removed": removed, "loss": losses.loss, "without": losses.without}
            (folder / "losses.json").write_text(json.dumps(data) + "\n", encoding="utf-8")

        folder = self.context.artefacts.build(f"{self.settings.slug}-losses", made_from, write)
        data = json.loads((folder / "losses.json").read_text(encoding="utf-8"))
        if tuple(data["removed"]) != removed:
            raise ArtefactError(f"{folder} holds losses after {data['removed']}, not {removed}; delete it")
        return Losses(data["loss"], {int(block): loss for block, loss in data["without"].items()})

    def _losses(self, chosen: list[int]) -> list[float]:
        counts = range(len(chosen) + 1)
        with progress(f"{self.settings.label()}: losses", len(counts)) as advance:
            return [_after(advance, self.measured.loss(self.alive(tuple(chosen[:n])))) for n in counts]

    @cached_property
    def measured(self) -> BlockLosses:
        """The whole model and the calibration text, loaded when first needed."""
        evaluate = self.settings.evaluate
        format = NativeFormat() if evaluate == "auto" else DenseFormat(evaluate)
        decoder = load_decoder(self.context.checkpoint, pack=format.pack)
        return BlockLosses(decoder, calibration_tokens(self.settings, self.context))


def greedy(table: Callable[[tuple[int, ...]], Losses], count: int) -> tuple[list[int], list[float]]:
    """Algorithm 1: ``count`` times, the block that is missed least goes. The blocks; losses before and after each.

    table: the losses of the model without given blocks and one more, measured on that model.
    """
    removed: list[int] = []
    losses: list[float] = []
    for _ in range(count):
        found = table(tuple(removed))
        best = found.best()
        losses = [*(losses or [found.loss]), found.without[best]]
        removed.append(best)
    return removed, losses


def calibration_tokens(settings: SLEB, context: BuildContext) -> Tensor:
    """The calibration segments, int64 [samples, sample_length]; the start token first where the model wants one."""
    token_ids_NL = calibration_segments(context, settings.samples, settings.sample_length, settings.seed)
    if context.tokenizer.adds_bos and context.tokenizer.bos_id is not None:
        token_ids_NL[:, 0] = context.tokenizer.bos_id
    return token_ids_NL


def _made_from(context: BuildContext) -> dict[str, Any]:
    return {"version": VERSION, "calibration": calibration_name(context)}


def _after(advance: Callable[[], None], value: float) -> float:
    advance()
    return value


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr; call what it yields once for each of ``total`` steps."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.update(task, advance=1)
