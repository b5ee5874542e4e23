"""The trainer: it learns, resumes exactly after kill -9, and refuses what it cannot go on with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import train_tiny
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hasten.core.errors import ArtefactError, IntegrityError, SettingError, TrainingError
from hasten.models.decoder import Decoder
from hasten.train.data.packed import PackedTokens, Stage
from hasten.train.evaluate import held_out_loss, unigram_loss
from hasten.train.trainer import StepReport, Trainer, TrainSettings, new_decoder


def weights(decoder: Decoder) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in decoder.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    torch.set_num_threads(1)
    run = train_tiny.trainer(tmp_path_factory.mktemp("run"))
    run.run()
    return run


def test_learns_more_than_token_frequencies(uninterrupted: Trainer) -> None:
    run = uninterrupted
    assert [point["step"] for point in run.progress.curve] == [10, 20, 30]
    untrained = held_out_loss(new_decoder(train_tiny.CONFIG, 3), run.held_out_NL)
    trained = held_out_loss(run.decoder, run.held_out_NL)
    assert trained == run.progress.curve[-1]["held_out"]
    assert trained < unigram_loss(run.tokens, run.held_out_NL, 300) - 0.3 < untrained - 2


def test_the_seed_decides_weights_and_data(uninterrupted: Trainer, tmp_path: Path) -> None:
    assert same(weights(new_decoder(train_tiny.CONFIG, 1)), weights(new_decoder(train_tiny.CONFIG, 1)))
    before = torch.random.get_rng_state()
    assert not same(weights(new_decoder(train_tiny.CONFIG, 1)), weights(new_decoder(train_tiny.CONFIG, 2)))
    assert torch.equal(before, torch.random.get_rng_state())
    again = train_tiny.trainer(tmp_path)
    assert same(weights(again.run()), weights(uninterrupted.decoder))


def test_a_killed_run_ends_as_an_uninterrupted_one(uninterrupted: Trainer, tmp_path: Path) -> None:
    command = [sys.executable, train_tiny.__file__, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if int(line) == 15:
                os.kill(child.pid, signal.SIGKILL)
                break
        assert child.wait() == -signal.SIGKILL
    resumed = train_tiny.trainer(tmp_path)
    assert 12 <= resumed.progress.step < 30
    assert same(weights(resumed.run()), weights(uninterrupted.decoder))
    curves = [[(p["step"], p["held_out"]) for p in run.progress.curve] for run in (resumed, uninterrupted)]
    assert curves[0] == curves[1]


def test_a_finished_run_is_not_done_again(uninterrupted: Trainer) -> None:
    again = train_tiny.trainer(uninterrupted.state_file.parent)
    steps: list[StepReport] = []
    again.run(steps.append)
    assert not steps
    assert same(weights(again.decoder), weights(uninterrupted.decoder))


def test_the_observer_sees_every_step(tmp_path: Path) -> None:
    settings = TrainSettings(stages=(Stage(2, 2, 8), Stage(1, 1, 32)), evaluate_every=2)
    seen: list[StepReport] = []
    train_tiny.trainer(tmp_path, settings).run(seen.append)
    assert [(r.step, r.steps, r.tokens, r.held_out is not None) for r in seen] == [
        (1, 3, 16, False),
        (2, 3, 16, True),
        (3, 3, 32, True),
    ]
    assert settings.tokens == 64


def test_another_run_in_the_folder_is_refused(uninterrupted: Trainer) -> None:
    folder = uninterrupted.state_file.parent
    with pytest.raises(ArtefactError, match="other text or settings"):
        train_tiny.trainer(folder, replace(train_tiny.SETTINGS, seed=4))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def edit(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def spoil(file: Path) -> None:
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata()
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        change(tensors)
        save_file(tensors, file, metadata)

    return spoil


def drop(name: str) -> Callable[[Path], None]:
    return edit(lambda tensors: tensors.__delitem__(name))


def put(name: str, value: Tensor) -> Callable[[Path], None]:
    return edit(lambda tensors: tensors.__setitem__(name, value))


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, "not a usable state"),
    "no metadata": (lambda file: save_file({"x": torch.ones(1)}, file), "made_from"),
    "tensor missing": (drop("model.norm.weight"), r"no tensor 'model\.norm"),
    "state missing": (drop("optimizer.norm.weight.step"), "no tensor"),
    "wrong shape": (put("model.norm.weight", torch.ones(3)), r"norm\.weight has shape \(3,\)"),
    "NaN": (put("optimizer.norm.weight.exp_avg", torch.full((32,), torch.nan)), "NaN or infinity"),
}


@pytest.mark.parametrize(("spoil", "match"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_state_is_refused(
    uninterrupted: Trainer, tmp_path: Path, spoil: Callable[[Path], None], match: str
) -> None:
    file = tmp_path / "state.safetensors"
    file.write_bytes(uninterrupted.state_file.read_bytes())
    spoil(file)
    with pytest.raises(IntegrityError, match=match):
        train_tiny.trainer(tmp_path)


def test_a_diverged_run_stops_with_the_last_state(tmp_path: Path) -> None:
    run = train_tiny.trainer(tmp_path)

    def spoil(report: StepReport) -> None:
        if report.step == 6:
            with torch.no_grad():
                run.decoder.norm.weight.fill_(torch.inf)

    with pytest.raises(TrainingError, match=r"step 7: the loss is nan .* Lower the peak learning rate"):
        run.run(spoil)
    assert train_tiny.trainer(tmp_path).progress.step == 4


def test_a_state_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    run = train_tiny.trainer(tmp_path / "file" / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"cannot write the run's state.* goes on at its last state"):
        run.run()


def test_refuses_data_that_does_not_fit(tmp_path: Path) -> None:
    tokens, held_out = train_tiny.chain(400, 1), train_tiny.chain(400, 2).head(2, 16)

    def build(tokens: PackedTokens, held_out: Tensor, stage: Stage) -> Trainer:
        return Trainer(train_tiny.CONFIG, TrainSettings(stages=(stage,)), tokens, held_out, tmp_path)

    with pytest.raises(SettingError, match="65 tokens exceed the model's context 64"):
        build(tokens, held_out, Stage(1, 1, 65))
    with pytest.raises(SettingError, match="token 300 is not in the model's vocabulary of 300"):
        build(PackedTokens(torch.tensor([300] * 40)), held_out, Stage(1, 1, 16))
    with pytest.raises(SettingError, match="too few for one sequence of 16"):
        build(PackedTokens(torch.tensor([1] * 16)), held_out, Stage(1, 1, 16))
    with pytest.raises(SettingError, match="at least one stage"):
        TrainSettings(stages=())
