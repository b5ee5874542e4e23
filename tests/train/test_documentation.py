"""A recipe from corpus to store: trained when pulled, resumed when killed, then a model like any other."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import train_tiny
import transformers

import hasten
from hasten.core.corpus import Corpus, Document, split_of
from hasten.core.errors import IntegrityError, TrainingError
from hasten.core.fetch import sha256_file
from hasten.models import store
from hasten.models.checkpoint import load_decoder, open_checkpoint
from hasten.models.config import DecoderConfig
from hasten.models.known import KnownModel, known_models
from hasten.models.known import Recipe as Trained
from hasten.train import documentation
from hasten.train.data.packed import Stage
from hasten.train.documentation import Recipe, train_recipe
from hasten.train.optimizer import AdamWSettings
from hasten.train.trainer import TrainSettings

WORDS = ["river", "valley", "stone", "bridge", "window", "garden", "morning", "evening", "letter", "harbour"]


def made_up() -> Corpus:
    """Sixty documents in which each word is followed by one of two."""
    random = torch.Generator().manual_seed(0)
    documents = []
    for number in range(60):
        at, words = number % 10, []
        for turn in torch.randint(2, (200,), generator=random).tolist():
            at = (3 * at + 1 + turn) % 10
            words.append(WORDS[at])
        documents.append(Document(f"made-up/{number}", " ".join(words) + ".\n"))
    assert {split_of(document.name) for document in documents} >= {"train", "validation", "test"}
    return Corpus("made-up", "0" * 64, tuple(documents))


RECIPE = Recipe(
    name="tiny-trained",
    config=replace(train_tiny.CONFIG, vocab_size=280),
    settings=TrainSettings(
        stages=(Stage(30, 4, 16), Stage(4, 1, 64)),
        optimizer=AdamWSettings(peak=1e-2, warmup=4),
        save_every=10,
    ),
    corpus=made_up,
    watched=(4, 16),
    tested=(8, 16),
)


def train(target: Path, quiet: bool = False) -> None:
    train_recipe(RECIPE, target, quiet)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    target = tmp_path_factory.mktemp("store") / "model"
    train(target, quiet=True)
    return target


def test_the_folder_is_complete_and_says_where_it_comes_from(folder: Path) -> None:
    record = json.loads((folder / "training.json").read_text())
    assert record["corpus"] == {"name": "made-up", "sha256": "0" * 64}
    assert (record["steps"], record["tokens"], record["seed"]) == (34, 30 * 64 + 4 * 64, 0)
    assert record["curve"][-1]["step"] == 34
    assert record["test_loss"] < record["test_unigram_loss"] - 0.3
    tensors = open_checkpoint(folder)
    assert {tensors.stored(name).dtype for name in tensors.names()} == {torch.float32}


def test_transformers_reads_the_same_model_and_tokenizer(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    text = "river valley — 你好 stone"
    ids = checkpoint.tokenizer().encode(text)
    assert transformers.AutoTokenizer.from_pretrained(folder).encode(text) == ids
    with torch.no_grad():
        ours_BTV, theirs_BTV = (
            load_decoder(checkpoint)(torch.tensor([ids])),
            theirs(torch.tensor([ids])).logits,
        )
    assert torch.allclose(ours_BTV, theirs_BTV, atol=1e-4)


def test_an_interrupted_recipe_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    export: Callable[..., None] = documentation.save_decoder

    def fail(*arguments: object) -> None:
        export(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(documentation, "save_decoder", fail)
    with pytest.raises(KeyboardInterrupt):
        train(target, quiet=True)
    assert not target.exists()
    monkeypatch.setattr(documentation, "save_decoder", export)
    monkeypatch.setattr(documentation, "train_vocabulary", None)  # learnt already
    train(target, quiet=True)
    assert sha256_file(target / "model.safetensors") == sha256_file(folder / "model.safetensors")


def test_a_damaged_vocabulary_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.partial" / "tokenizer.json"
    file.parent.mkdir()
    file.write_text("{")
    with pytest.raises(IntegrityError, match=r"tokenizer\.json is not a tokenizer .* delete it"):
        train(tmp_path / "model", quiet=True)


def test_progress_and_held_out_loss_are_shown(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "model")
    said = capfd.readouterr().err
    assert "step 34/34: loss" in said
    assert "held out" in said
    assert "34/34" in said


def known(monkeypatch: pytest.MonkeyPatch, size: int) -> KnownModel:
    recipe = Trained("tiny-trained", f"{__name__}:train", size)
    model = KnownModel("tiny-trained", "A tiny model", "model", "Apache-2.0", "it is trained here", recipe)
    monkeypatch.setattr(store, "known_models", lambda: {model.name: model})
    monkeypatch.setattr(Trained, "load", lambda self: train)
    return model


def test_the_model_is_trained_when_pulled_and_then_used_by_name(
    folder: Path, hasten_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = known(monkeypatch, (folder / "model.safetensors").stat().st_size)
    path = store.pull(model.name, quiet=True)
    assert (
        path
        == hasten_home / "models" / "tiny-trained" / "model"
        == store.resolve(model.name, allow_pull=False)
    )
    assert sorted(file.name for file in path.parent.iterdir()) == ["model", "model.lock"]
    monkeypatch.setattr(Trained, "load", None)  # not trained again
    assert store.pull(model.name) == path
    llm = hasten.LLM(model.name, dtype="float32")
    completion = llm.generate(["river valley"], hasten.SamplingParams(max_tokens=5, temperature=0.0))[0]
    decoder, ids = load_decoder(open_checkpoint(path)), llm.tokenizer.encode("river valley")
    for token_id in completion.token_ids:
        with torch.no_grad():
            assert token_id == int(decoder(torch.tensor([ids]))[0, -1].argmax())
        ids.append(token_id)


def test_a_run_that_fails_leaves_the_store_partial(
    hasten_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = known(monkeypatch, 1)
    settings = replace(RECIPE.settings, optimizer=AdamWSettings(peak=1e30, warmup=0))
    monkeypatch.setattr(
        Trained,
        "load",
        lambda self: lambda target, quiet: train_recipe(replace(RECIPE, settings=settings), target, quiet),
    )
    with pytest.raises(TrainingError, match="diverged"):
        store.pull(model.name, quiet=True)
    assert [entry.state for entry in store.entries()] == ["partial"]
    store.remove(model.name)
    assert [entry.state for entry in store.entries()] == ["absent"]


def test_the_known_model_is_the_recipe() -> None:
    """The sizes that the list states are those of what the recipe makes."""
    model = known_models()[documentation.RECIPE.name]
    assert isinstance(model.asset, Trained)
    assert model.asset.load() is documentation.train
    config: DecoderConfig = documentation.CONFIG
    weights = sum(torch.Size(shape).numel() for shape in config.tensor_shapes().values())
    assert 0 < model.asset.size - 4 * weights < 10_000
    assert documentation.SETTINGS.stages[-1].length == config.max_positions == 2048
    assert 13e6 < weights < 14.5e6
