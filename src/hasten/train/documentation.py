"""The recipe of ``documentation-14m``: a small float32 language model that never saw a quantisation grid.

Llama architecture, hidden size 384, 6 layers, 6 heads of 64, MLP 1024, 8192 tokens of byte-level BPE, context 2048,
tied embeddings: 13.8 million parameters. Trained on the training split of the documentation corpus: short sequences
first, because attention over long ones is what costs, then whole contexts.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import tokenizers
import torch

from hasten import __version__
from hasten.core.corpus import Corpus, Split, corpus
from hasten.core.errors import IntegrityError
from hasten.models.config import DecoderConfig, HeadShape, RopeSpec
from hasten.models.decoder import Decoder
from hasten.models.hf_export import save_decoder
from hasten.models.tokenizer import Tokenizer
from hasten.train.data.packed import PackedTokens, Stage
from hasten.train.data.vocabulary import END_OF_TEXT_ID, train_vocabulary
from hasten.train.evaluate import held_out_loss, unigram_loss
from hasten.train.optimizer import AdamWSettings
from hasten.train.progress import TrainingBar
from hasten.train.trainer import Trainer, TrainSettings

CONFIG = DecoderConfig(
    family="llama",
    vocab_size=8192,
    hidden_size=384,
    intermediate_size=1024,
    num_layers=6,
    shape=HeadShape(heads=6, kv_heads=6, size=64),
    max_positions=2048,
    rope=RopeSpec(theta=10000.0, size=64),
    tie_embeddings=True,
    bos_id=0,
    eos_ids=(0,),
)
# Few tokens, so many small batches; rows from different places, because neighbouring tokens say the same.
SETTINGS = TrainSettings(
    stages=(Stage(900, 6, 128), Stage(200, 2, 512), Stage(150, 1, 2048)),
    seed=14,
    optimizer=AdamWSettings(peak=1e-3, warmup=60),
    evaluate_every=50,
    save_every=10,
)


@dataclass(frozen=True)
class Recipe:
    """What is trained on which corpus. ``watched``: validation windows of the curve; ``tested``: test windows of the
    final figure (both as rows, length)."""

    name: str
    config: DecoderConfig
    settings: TrainSettings
    corpus: Callable[[], Corpus]
    watched: tuple[int, int] = (8, 512)
    tested: tuple[int, int] = (32, 512)


RECIPE = Recipe("documentation-14m", CONFIG, SETTINGS, corpus)


def train(target: Path, quiet: bool = False) -> None:
    """Train ``documentation-14m`` into the folder ``target``; see `train_recipe`."""
    train_recipe(RECIPE, target, quiet)


def train_recipe(recipe: Recipe, target: Path, quiet: bool = False) -> None:
    """Train a recipe and write a Hugging Face folder ``target``, which appears at once when all is done.

    State lies in ``target`` + ``.partial``; a killed run goes on from there. The caller holds the lock and removes
    that folder in the end. quiet: no progress bar. ``training.json`` in the folder records seed, corpus, settings,
    curve and final held-out loss. Raises what `Trainer` raises, and `FetchError` when the corpus cannot be had.
    """
    work = target.with_name(target.name + ".partial")
    work.mkdir(parents=True, exist_ok=True)
    documentation = recipe.corpus()
    vocabulary = _vocabulary(recipe, documentation, work / "tokenizer.json")
    splits: tuple[Split, ...] = ("train", "validation", "test")
    tokens = {split: _tokens(documentation, split, vocabulary) for split in splits}
    trainer = Trainer(
        recipe.config, recipe.settings, tokens["train"], tokens["validation"].head(*recipe.watched), work
    )
    resumed = trainer.progress.step
    with TrainingBar(recipe.name, recipe.settings, resumed, quiet) as bar:
        decoder = trainer.run(bar.advance)
    record = _record(recipe, documentation, trainer, tokens)
    _write(recipe, decoder, vocabulary, record, work / "finished")
    os.rename(work / "finished", target)


def _vocabulary(recipe: Recipe, documentation: Corpus, file: Path) -> tokenizers.Tokenizer:
    """The vocabulary of the training split, learnt once per run."""
    if not file.exists():
        texts = (document.text for document in documentation.documents("train"))
        learnt = train_vocabulary(texts, recipe.config.vocab_size)
        temporary = file.with_name(file.name + ".writing")
        learnt.save(str(temporary))
        os.replace(temporary, file)
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise IntegrityError(f"{file} is not a tokenizer ({error}); delete it and start again") from None


def _tokens(documentation: Corpus, split: Split, vocabulary: tokenizers.Tokenizer) -> PackedTokens:
    def encode(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in vocabulary.encode_batch(texts, add_special_tokens=False)]

    texts = (document.text for document in documentation.documents(split))
    return PackedTokens.pack(texts, encode, END_OF_TEXT_ID)


def _record(
    recipe: Recipe, documentation: Corpus, trainer: Trainer, tokens: dict[Split, PackedTokens]
) -> dict[str, object]:
    test_NL = tokens["test"].head(*recipe.tested)
    return {
        "name": recipe.name,
        "corpus": {"name": documentation.name, "sha256": documentation.sha256},
        "train_tokens": tokens["train"].stream_S.numel(),
        "seed": recipe.settings.seed,
        "steps": recipe.settings.steps,
        "tokens": recipe.settings.tokens,
        "settings": asdict(recipe.settings),
        "made_from": trainer.made_from,
        "parameters": sum(parameter.numel() for parameter in trainer.decoder.parameters()),
        "curve": trainer.progress.curve,
        "test_loss": held_out_loss(trainer.decoder, test_NL),
        "test_unigram_loss": unigram_loss(tokens["train"], test_NL, recipe.config.vocab_size),
        "seconds": round(trainer.progress.seconds, 1),
        "threads": torch.get_num_threads(),
        "versions": {
            "hasten": __version__,
            "torch": torch.__version__,
            "tokenizers": tokenizers.__version__,
            "python": sys.version.split()[0],
        },
    }


def _write(
    recipe: Recipe,
    decoder: Decoder,
    vocabulary: tokenizers.Tokenizer,
    record: dict[str, object],
    folder: Path,
) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    end = END_OF_TEXT_ID
    save_decoder(folder, decoder, Tokenizer(vocabulary, bos_id=end, eos_ids=(end,), where=recipe.name))
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
