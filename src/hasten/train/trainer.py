"""The trainer: data -> model -> loss -> backward -> step -> evaluate -> save, in float32.

A run is a function of its text, its settings and the number of threads. It keeps its state in a folder; a killed run
goes on there and ends with the same weights, bit for bit, as one that was never interrupted.

Legend: N sequences, L tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from hasten.core.artefact import fingerprint
from hasten.core.errors import SettingError, TrainingError
from hasten.models.config import DecoderConfig
from hasten.models.decoder import Decoder
from hasten.train.data.packed import PackedTokens, Stage, batch, place
from hasten.train.evaluate import held_out_loss, next_token_loss
from hasten.train.optimizer import AdamWSettings, adamw, learning_rate
from hasten.train.state import Progress, load_state, save_state

_RESIDUAL = ("o_proj.weight", "down_proj.weight")


@dataclass(frozen=True)
class TrainSettings:
    """``stages`` say how many steps there are and the shape of each batch. ``evaluate_every`` and ``save_every``
    are in steps; the last step always does both."""

    stages: tuple[Stage, ...]
    seed: int = 0
    optimizer: AdamWSettings = field(default_factory=AdamWSettings)
    evaluate_every: int = 40
    save_every: int = 10

    def __post_init__(self) -> None:
        if not self.stages or min(self.evaluate_every, self.save_every) < 1:
            raise SettingError(
                "training needs at least one stage, and evaluate_every and save_every of at least 1"
            )

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def tokens(self) -> int:
        """Tokens that are predicted in the whole run."""
        return sum(stage.steps * stage.rows * stage.length for stage in self.stages)


@dataclass(frozen=True)
class StepReport:
    """What the observer of a run is told after every step. ``held_out`` only where the step evaluated."""

    step: int
    steps: int
    tokens: int
    loss: float
    held_out: float | None


def new_decoder(config: DecoderConfig, seed: int) -> Decoder:
    """A decoder with random weights that depend on ``seed`` alone.

    What is added to the residual stream starts smaller by sqrt(2 * layers), so that its sum does not grow with depth
    (GPT-2, section 2.3).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = Decoder(config)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith(_RESIDUAL):
                parameter.mul_((2 * config.num_layers) ** -0.5)
    return decoder


class Trainer:
    """One run of ``settings`` over ``tokens``, evaluated on ``held_out_NL`` (windows, int64 [N, L + 1]).

    folder: where the run's state is kept. Raises `SettingError` when a window is longer than the model's context, a
    token is not in its vocabulary or the text is shorter than one window; `ArtefactError` or `IntegrityError` when
    the folder holds another run or a damaged one.
    """

    def __init__(
        self,
        config: DecoderConfig,
        settings: TrainSettings,
        tokens: PackedTokens,
        held_out_NL: Tensor,
        folder: Path,
    ) -> None:
        longest = max(held_out_NL.shape[1] - 1, *(stage.length for stage in settings.stages))
        if longest > config.max_positions:
            raise SettingError(
                f"sequences of {longest} tokens exceed the model's context {config.max_positions}"
            )
        top = int(max(tokens.stream_S.max(), held_out_NL.max()))
        if top >= config.vocab_size:
            raise SettingError(f"token {top} is not in the model's vocabulary of {config.vocab_size}")
        for stage in settings.stages:
            tokens.count(stage.length)
        self.settings, self.tokens, self.held_out_NL = settings, tokens, held_out_NL
        self.state_file = folder / "state.safetensors"
        self.made_from = fingerprint(
            {
                "model": asdict(config),
                "settings": asdict(settings),
                "tokens": tokens.digest,
                "held_out": PackedTokens(held_out_NL.flatten()).digest,
            }
        )
        self.decoder = new_decoder(config, settings.seed)
        self.optimizer = adamw(self.decoder, settings.optimizer)
        self.progress = (
            load_state(self.state_file, self.decoder, self.optimizer, self.made_from) or Progress()
        )

    def run(self, observe: Callable[[StepReport], None] = lambda report: None) -> Decoder:
        """Train from where the run is to its end; return the decoder.

        Raises `TrainingError` when the loss or the gradients stop being finite; the last saved state stays.
        """
        settings, progress = self.settings, self.progress
        started = time.perf_counter() - progress.seconds
        while progress.step < settings.steps:
            loss = self._step(progress.step)
            progress.step += 1
            last = progress.step == settings.steps
            held_out = None
            if last or progress.step % settings.evaluate_every == 0:
                held_out = held_out_loss(self.decoder, self.held_out_NL)
                progress.curve.append({"step": progress.step, "loss": loss, "held_out": held_out})
            progress.seconds = time.perf_counter() - started
            if last or progress.step % settings.save_every == 0:
                save_state(self.state_file, self.decoder, self.optimizer, progress, self.made_from)
            stage = settings.stages[place(settings.stages, progress.step - 1)[0]]
            observe(StepReport(progress.step, settings.steps, stage.rows * stage.length, loss, held_out))
        return self.decoder

    def _step(self, step: int) -> float:
        """One update; the batch's loss before it, in nats per token."""
        settings = self.settings
        rate = learning_rate(settings.optimizer, step, settings.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = next_token_loss(self.decoder, batch(self.tokens, settings.stages, settings.seed, step))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = float(nn.utils.clip_grad_norm_(self.decoder.parameters(), settings.optimizer.clip))
        value = float(loss.detach())
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise TrainingError(
                f"step {step + 1}: the loss is {value} and the gradients' norm {norm}; the run diverged. "
                f"Lower the peak learning rate ({settings.optimizer.peak}) or the clipping norm"
            )
        self.optimizer.step()
        return value
