"""Acceptance of `sleb`: the checks of its specification that are not about speed (that is `benchmarks/sleb.py`).

1 a removed block is a block switched off, and decoding equals recomputing; 2 shared prefixes change no loss; 3 held-out
perplexity against cheaper criteria;
5 KV memory falls by n / L; 6 the first and last block stay, removing none changes nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from hasten.core import paths
from hasten.core.corpus import Corpus
from hasten.core.plan import Plan
from hasten.core.technique import Technique
from hasten.lm.build import Loaded, load, make_cache
from hasten.lm.chunk import Chunk
from hasten.lm.layers.hook import LayerHook
from hasten.lm.layers.sleb import SLEB, Search, greedy
from hasten.lm.layers.sleb_losses import BlockLosses, Losses
from hasten.lm.llm import LLM
from hasten.lm.settings import EngineSettings
from hasten.models.checkpoint import Checkpoint, load_decoder, open_checkpoint
from hasten.models.context import BuildContext
from hasten.models.surgery import RemoveBlocks
from hasten.weights.dense import DenseFormat
from hasten.weights.native import NativeFormat
from hasten.workloads.language import perplexity
from hasten.workloads.text import Text

from ..lm.lm_tiny import write_checkpoint, write_tokenizer
from ..models.conftest import FAMILIES, build

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCKS = (4, 12, 13, 25)  # of 30; two of them neighbours


class Without(Technique):
    """Leaves out given blocks."""

    slug: ClassVar[str] = "without"
    slots: ClassVar[tuple[str, ...]] = ("model_surgery",)
    lossless: ClassVar[bool] = False

    blocks: tuple[int, ...]

    def provide(self, slot: str, context: BuildContext) -> RemoveBlocks:
        return RemoveBlocks(self.blocks)


class Off(Technique, LayerHook):
    """Switches given blocks off in the whole model."""

    slug: ClassVar[str] = "off"
    slots: ClassVar[tuple[str, ...]] = ("layer_hook",)
    lossless: ClassVar[bool] = False

    blocks: tuple[int, ...]

    def provide(self, slot: str, context: BuildContext) -> LayerHook:
        return self

    def skip(self, layer: int, layout: object) -> tuple[bool, bool]:
        return layer in self.blocks, layer in self.blocks


def engine(path: Path, technique: Technique | None, dtype: str) -> Loaded:
    techniques = () if technique is None else (technique,)
    return load(Plan(str(path), techniques, dtype, {"kv_tokens": 256, "max_batch": 2}))


def logits(loaded: Loaded, ids: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """Logits of every token of a sequence that runs in steps of ``sizes``, on the engine's own road."""
    cache, runner = loaded.engine.cache, loaded.engine.runner
    kv = cache.open(loaded.engine.new_id())
    assert cache.reserve(kv, 0, len(ids))
    cache.attach(kv)
    rows, start = [], 0
    for size in sizes:
        end = start + size
        rows.append(runner.run([Chunk(kv, start, list(ids[start:end]), range(start, end), size)]))
        start = end
    cache.close(kv)
    runner.forget(kv.id)
    return torch.cat(rows)


def context_of(checkpoint: Checkpoint, folder: Path, calibration: Any = None) -> BuildContext:
    return BuildContext.of(checkpoint, folder, kv_dtype=torch.bfloat16, calibration=calibration)


# 1 --------------------------------------------------------------------------------------------------------------------


def assert_removed_is_off(path: Path, dtype: str, blocks: tuple[int, ...], vocabulary: int) -> None:
    ids = torch.randint(3, vocabulary, (72,), generator=torch.Generator().manual_seed(2)).tolist()
    sizes = [40, 24, *[1] * 8]
    smaller = engine(path, Without(blocks=blocks), dtype)
    assert smaller.engine.runner._stack is not None  # the whole step is still one native call
    ours = logits(smaller, ids, sizes)
    assert torch.equal(ours, logits(engine(path, Off(blocks=blocks), dtype), ids, sizes))
    # Decoding equals recomputing: keys and values of every layer lie where its number says. Rows in other groups move
    # float32 sums in the last digits, now and then to another bfloat16 key; a wrong slot moves logits by whole units.
    whole = logits(smaller, ids, [72])
    drift = float((ours - whole).norm() / whole.norm())
    print(f"{path.name} {dtype}: drift {drift:.1e}")
    assert drift < (1e-6 if dtype == "float32" else 5e-3)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_removed_block_is_a_block_switched_off(tmp_path: Path, family: str, dtype: str) -> None:
    """Gemma 3: windows of 5 tokens and a rotary embedding of its own in all blocks but one."""
    path = tmp_path / family
    if family == "llama":
        write_checkpoint(path, layers=7)
    else:
        kind, settings = FAMILIES["gemma3"]
        build(kind, settings | {"vocab_size": 320}).save_pretrained(path)
        write_tokenizer(path, 320)
    assert_removed_is_off(path, dtype, (1, 2, 5), 320)


def test_a_removed_block_is_a_block_switched_off_in_the_default_model(default_model_path: Path) -> None:
    assert_removed_is_off(default_model_path, "auto", BLOCKS, 49152)


# 2 --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "format", [None, DenseFormat("float32"), NativeFormat()], ids=["plain", "float32", "auto"]
)
def test_shared_prefixes_change_no_loss(tmp_path: Path, format: Any) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "tiny", layers=7))
    decoder = load_decoder(checkpoint, pack=None if format is None else format.pack)
    ids_NL = torch.randint(3, 320, (5, 40), generator=torch.Generator().manual_seed(1))
    blocks = BlockLosses(decoder, ids_NL, chunk_tokens=80)

    def eligible(removed: tuple[int, ...]) -> list[int]:
        return [block for block in range(7) if block not in removed][1:-1]

    def alive(*removed: int) -> list[int]:
        return [block for block in range(7) if block not in removed]

    def naive(removed: tuple[int, ...]) -> Losses:
        without = {block: blocks.loss(alive(*removed, block)) for block in eligible(removed)}
        return Losses(blocks.loss(alive(*removed)), without)

    def shared(removed: tuple[int, ...]) -> Losses:
        return blocks.without(alive(*removed), eligible(removed))

    for removed in ((), (2, 3)):
        ours, theirs = shared(removed), naive(removed)
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
        assert ours.without == pytest.approx(theirs.without, rel=1e-4)
    assert greedy(shared, 3)[0] == greedy(naive, 3)[0]
    # Nor does the batch: the plain forward pass of the pruned model, one segment at a time.
    pruned = load_decoder(checkpoint.keeping(alive(2, 3, 5)))
    with torch.no_grad():
        each = [torch.nn.functional.cross_entropy(pruned(ids[None])[0, :-1], ids[1:]) for ids in ids_NL]
    near = 1e-5 if not isinstance(format, NativeFormat) else 2e-2  # native: bfloat16 weights
    assert shared((2, 3)).without[5] == pytest.approx(float(torch.stack(each).mean()), rel=near)


# 3 --------------------------------------------------------------------------------------------------------------------

DRAWS = (0, 1, 2)
CRITERIA = ("sleb", "one_shot", "cosine")


@pytest.fixture(scope="module")
def default_context(default_model_path: Path, documentation: Corpus) -> BuildContext:
    """The default model with its artefacts where the engine keeps them."""
    checkpoint = open_checkpoint(default_model_path)
    return context_of(checkpoint, paths.home() / "artefacts")


def searched(context: BuildContext, technique: SLEB) -> bool:
    """Whether the search behind ``technique`` has been made: it takes minutes."""
    return technique.known(context) is not None


@pytest.mark.timeout(900)
def test_held_out_perplexity(default_context: BuildContext, default_model_path: Path) -> None:
    """At 6 of 30 removals, mean over calibration draws: SLEB below the criteria that look at the whole model once."""
    kinds = {(c, n, s): SLEB(criterion=c, remove=n, seed=s) for c in CRITERIA for n in (3, 6) for s in DRAWS}
    missing = [f"{c}, {n}, draw {s}" for (c, n, s), t in kinds.items() if not searched(default_context, t)]
    if missing:
        pytest.skip("`python -m benchmarks.sleb --quality` has not been run: no " + "; ".join(missing))
    held_out = Text(default_context.tokenizer, "test").windows(512, 12)

    def measured(blocks: tuple[int, ...]) -> float:
        llm = LLM(Plan(str(default_model_path), (Without(blocks=blocks),)), max_batch=1)
        return perplexity(llm.score(held_out))

    dense = measured(())
    known: dict[frozenset[int], float] = {}  # the same blocks in another order are the same model
    mean: dict[tuple[str, int], float] = {}
    for criterion in CRITERIA:
        for count in (3, 6):
            ratios = []
            for draw in DRAWS:
                removal = kinds[criterion, count, draw].removal(default_context)
                key = frozenset(removal.blocks)
                known[key] = known.get(key) or measured(removal.blocks)
                ratios.append(known[key] / dense)
                losses = [round(loss, 4) for loss in removal.losses]
                print(
                    f"{criterion} {count} draw {draw}: {removal.blocks} {ratios[-1]:.3f}x, calibration {losses}"
                )
            mean[criterion, count] = statistics.mean(ratios)
    chance = measured(SLEB(criterion="random", remove=6).removal(default_context).blocks) / dense
    print({f"{c} {n}": round(ratio, 3) for (c, n), ratio in mean.items()}, f"random 6: {chance:.2f}x")
    assert mean["sleb", 6] < mean["one_shot", 6]
    assert mean["sleb", 6] < mean["cosine", 6]
    assert mean["sleb", 3] <= 1.03 * min(mean[c, 3] for c in CRITERIA)
    assert max(mean[c, 6] for c in CRITERIA) < 0.5 * chance


# 5 --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("removed", [(), (1,), BLOCKS])
def test_kv_memory_falls_with_the_blocks(default_model_path: Path, removed: tuple[int, ...]) -> None:
    checkpoint = open_checkpoint(default_model_path)
    whole = make_cache(EngineSettings(kv_tokens=256), context_of(checkpoint, Path("unused")))
    view = RemoveBlocks(removed).apply(checkpoint)
    smaller = make_cache(EngineSettings(kv_tokens=256), context_of(view, Path("unused")))
    assert smaller.layers == 30 - len(removed)
    assert smaller.pool.count == whole.pool.count
    assert smaller.page_bytes * 30 == whole.page_bytes * (30 - len(removed))
    assert smaller.bytes() * 30 == whole.bytes() * (30 - len(removed))
    pages = {smaller.format.pages(layer).k_NGPD.data_ptr() for layer in range(smaller.layers)}
    assert len(pages) == smaller.layers


# 6 --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["sleb", "one_shot", "cosine", "random", "last"])
def test_the_first_and_last_block_stay(tmp_path: Path, criterion: str) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "tiny", layers=7))
    context = context_of(checkpoint, tmp_path, [list(range(3, 60))] * 3)
    technique = SLEB(criterion=criterion, remove=5, samples=2, sample_length=20)
    assert set(technique.removal(context).blocks) == {1, 2, 3, 4, 5}
    assert Search(technique, context).eligible(()) == [1, 2, 3, 4, 5]


def test_no_removal_is_the_model_itself(tmp_path: Path) -> None:
    path, ids = write_checkpoint(tmp_path / "tiny"), list(range(3, 40))
    ours = logits(engine(path, SLEB(remove=0), "auto"), ids, [27, 9, 1])
    assert torch.equal(ours, logits(engine(path, None, "auto"), ids, [27, 9, 1]))
