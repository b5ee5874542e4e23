"""The search of `sleb`: what is measured, what is kept, what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_tiny import write_checkpoint
from safetensors.torch import load_file, save_file

from hasten.core.artefact import ArtefactStore
from hasten.core.errors import ArtefactError, IntegrityError, SettingError
from hasten.lm.layers.sleb import SLEB, Search, calibration_tokens, greedy
from hasten.lm.layers.sleb_losses import BlockLosses, Losses
from hasten.lm.llm import LLM
from hasten.lm.request import SamplingParams
from hasten.models.checkpoint import Checkpoint, load_decoder, open_checkpoint
from hasten.models.context import BuildContext
from hasten.models.decoder import CausalAttend
from hasten.models.surgery import RemoveBlocks
from hasten.weights.dense import DenseFormat
from hasten.weights.gptq import GPTQ
from hasten.weights.native import NativeFormat

QUICK = {"samples": 3, "sample_length": 24, "evaluate": "float32"}
TEXT = torch.randint(3, 320, (8, 90), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture(scope="module")
def deep_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "deep", layers=6)


def context_of(path: Path, folder: Path, calibration: list[list[int]] | None = TEXT) -> BuildContext:
    checkpoint = open_checkpoint(path)
    return BuildContext.of(checkpoint, folder, weight_dtype=torch.float32, calibration=calibration)


@pytest.fixture
def context(deep_path: Path, tmp_path: Path) -> BuildContext:
    return context_of(deep_path, tmp_path)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The blocks alive in every table that is measured, as it happens."""
    seen: list[tuple[int, ...]] = []
    real = BlockLosses.without

    def without(self, alive, candidates, advance=lambda: None):
        seen.append(tuple(alive))
        return real(self, alive, candidates, advance)

    monkeypatch.setattr(BlockLosses, "without", without)
    return seen


# -- what is measured --------------------------------------------------------------------------------------------------


def test_losses_are_next_token_cross_entropy(context):
    decoder = load_decoder(context.checkpoint)
    ids_NL = calibration_tokens(SLEB(**QUICK), context)
    losses = BlockLosses(decoder, ids_NL, chunk_tokens=50)
    assert losses.chunks == 2
    with torch.no_grad():
        logits = decoder(ids_NL)[:, :-1].reshape(-1, 320)
    expected = float(torch.nn.functional.cross_entropy(logits.double(), ids_NL[:, 1:].reshape(-1)))
    assert losses.loss(range(6)) == pytest.approx(expected, rel=1e-6)
    assert losses.predicted == 3 * 23


def test_similarity_is_the_cosine_of_every_token(context):
    decoder = load_decoder(context.checkpoint)
    ids_NL = calibration_tokens(SLEB(**QUICK), context)
    near_BB = BlockLosses(decoder, ids_NL).similarity()
    with torch.no_grad():
        x, states = decoder.embed(ids_NL.reshape(-1)), []
        attend, position = CausalAttend(decoder, 3), torch.arange(24).repeat(3)
        states.append(x)
        for layer in decoder.layers:
            x = layer.mlp(layer.attention(x, position, attend))
            states.append(x)
    for a in range(7):
        for b in range(7):
            expected = torch.nn.functional.cosine_similarity(states[a], states[b]).mean()
            assert float(near_BB[a, b]) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("evaluate", ["auto", "bfloat16", "float32"])
def test_a_loss_does_not_depend_on_which_others_are_asked_for(context, evaluate):
    search = Search(SLEB(**QUICK | {"evaluate": evaluate}), context)
    alive = search.alive((2,))
    together = search.measured.without(alive, alive)
    assert together.loss == search.measured.loss(alive)
    for block in alive:
        assert search.measured.without(alive, [block]).without[block] == together.without[block]
    with pytest.raises(ValueError, match=r"candidates \[2\] are not among"):
        search.measured.without(alive, [2])


@given(
    st.integers(1, 7),
    st.integers(1, 3),
    st.dictionaries(st.frozensets(st.integers(0, 9)), st.floats(0, 9), max_size=200),
)
@settings(max_examples=50, deadline=None)
def test_greedy_measures_anew_and_takes_the_first_of_equals(count, rest, given_losses):
    blocks = range(count + rest)
    asked = []

    def table(removed):
        asked.append(removed)
        left = [block for block in blocks if block not in removed]
        loss = {block: given_losses.get(frozenset((*removed, block)), 1.0) for block in left}
        return Losses(given_losses.get(frozenset(removed), 1.0), loss)

    removed, losses = greedy(table, count)
    assert asked == [tuple(removed[:n]) for n in range(count)]
    assert len(set(removed)) == count
    assert losses[0] == table(()).loss
    for n, block in enumerate(removed):
        found = table(tuple(removed[:n])).without
        assert losses[n + 1] == found[block] == min(found.values())
        assert block == min(b for b, loss in found.items() if loss == found[block])


# -- criteria ----------------------------------------------------------------------------------------------------------


def test_static_criteria_rank_the_whole_model(context):
    def chosen(criterion: str, **more: int) -> tuple[int, ...]:
        return SLEB(criterion=criterion, remove=3, **QUICK | more).removal(context).blocks

    search = Search(SLEB(**QUICK), context)
    losses = search.table(()).without
    assert chosen("one_shot") == tuple(sorted(losses, key=lambda b: losses[b])[:3])
    near_BB = search.measured.similarity()
    assert chosen("cosine") == tuple(sorted(range(1, 5), key=lambda b: -near_BB[b, b + 1])[:3])
    assert chosen("last") == (4, 3, 2)
    draws = {chosen("random", seed=seed) for seed in range(6)}
    assert len(draws) > 2
    assert all(set(draw) <= {1, 2, 3, 4} for draw in draws)


@pytest.mark.parametrize("criterion", ["sleb", "one_shot", "cosine", "random", "last"])
def test_losses_are_those_of_what_is_left(context, criterion):
    technique = SLEB(criterion=criterion, remove=2, **QUICK)
    removal = technique.removal(context)
    search = Search(technique, context)
    for count in range(3):
        alive = search.alive(removal.blocks[:count])
        assert removal.losses[count] == search.measured.loss(alive)
    assert removal.predicted == 69
    fresh = replace(context, artefacts=ArtefactStore(context.artefacts.root / "again", "x"))
    assert technique.removal(fresh) == removal


def test_barriers_are_the_first_and_last_of_what_is_left(context):
    search = Search(SLEB(keep_first=2, keep_last=1, **QUICK), context)
    assert search.eligible(()) == [2, 3, 4]
    assert search.eligible((3,)) == [2, 4]
    none = Search(SLEB(keep_first=0, keep_last=0, remove=5, **QUICK), context)
    assert none.eligible(()) == list(range(6))
    assert len(set(none.removal().blocks)) == 5


def test_the_search_finds_blocks_that_do_nothing(deep_path, tmp_path):
    """Blocks 2 and 4 add next to nothing to the residual stream."""
    idle = tmp_path / "idle"
    write_checkpoint(idle, layers=6)
    tensors = load_file(idle / "model.safetensors")
    for block in (2, 4):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"model.layers.{block}.{name}.weight"] *= 1e-3
    save_file(tensors, idle / "model.safetensors")
    for criterion in ("sleb", "cosine", "one_shot"):
        removal = SLEB(remove=2, criterion=criterion, **QUICK).removal(context_of(idle, tmp_path / criterion))
        # One-shot and greedy go by the loss, which on a random model may fall without a working block too.
        if criterion == "cosine":
            assert set(removal.blocks) == {2, 4}
        assert removal.losses[2] <= removal.losses[0] + 1e-3


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_a_killed_search_goes_on_with_the_removal_it_was_at(context, monkeypatch, measured):
    whole = SLEB(remove=3, **QUICK).removal(
        replace(context, artefacts=ArtefactStore(context.artefacts.root / "whole", "m"))
    )
    measured.clear()
    counted = BlockLosses.without

    def killed(self, alive, candidates, advance=lambda: None):
        if len(alive) == 5:
            raise KeyboardInterrupt
        return counted(self, alive, candidates, advance)

    monkeypatch.setattr(BlockLosses, "without", killed)
    with pytest.raises(KeyboardInterrupt):
        SLEB(remove=3, **QUICK).prepare(context)
    monkeypatch.setattr(BlockLosses, "without", counted)
    assert SLEB(remove=3, **QUICK).removal(context) == whole
    assert [len(alive) for alive in measured] == [6, 5, 4]  # the first was not measured again
    assert not [path for path in context.artefacts.root.iterdir() if "building" in path.name]


def test_more_removals_and_one_shot_start_from_what_is_known(context, measured):
    first = SLEB(remove=1, **QUICK).removal(context)
    more = SLEB(remove=3, **QUICK).removal(context)
    assert more.blocks[:1] == first.blocks
    assert more.losses[:2] == first.losses
    SLEB(remove=2, criterion="one_shot", **QUICK).removal(context)
    assert [len(alive) for alive in measured] == [6, 5, 4]
    again = SLEB(remove=3, **QUICK).removal(context)
    assert again == more
    assert len(measured) == 3


@pytest.mark.parametrize(
    "other", [{"samples": 2}, {"sample_length": 30}, {"seed": 1}, {"evaluate": "bfloat16"}]
)
def test_other_calibration_is_another_artefact(context, other):
    folders = {SLEB(remove=1, **QUICK | changed).prepare(context) for changed in ({}, other)}
    assert len(folders) == 2


def test_a_damaged_artefact_is_refused(context):
    folder = SLEB(remove=1, **QUICK).prepare(context)
    (folder / "removal.json").write_text('{"blocks": [4], "losses": [], "predicted": 1}')
    with pytest.raises(ArtefactError, match="missing or damaged"):
        SLEB(remove=1, **QUICK).prepare(context)


def test_the_list_says_what_it_is(context):
    folder = SLEB(remove=2, **QUICK).prepare(context)
    data = json.loads((folder / "removal.json").read_text())
    assert (len(data["blocks"]), len(data["losses"]), data["of"], data["criterion"]) == (2, 3, 6, "sleb")


def test_nothing_removed_is_the_model_itself(context, measured):
    surgery = SLEB(remove=0).provide("model_surgery", context)
    assert surgery.apply(context.checkpoint) is context.checkpoint
    assert not measured
    assert not list(context.artefacts.root.iterdir())


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"remove": 5}, r"sleb.remove = 5: the model has 6 blocks.*remove at most 4"),
        ({"remove": 1, "keep_first": 4, "keep_last": 4}, "remove at most 0"),
        ({"remove": 6, "keep_first": 0, "keep_last": 0}, "at least one must be left"),
        ({"remove": 10**9}, "remove at most 4"),
        ({"sample_length": 500}, "no calibration document has 500 tokens"),
    ],
)
def test_what_cannot_be_is_refused(context, given, message):
    with pytest.raises(SettingError, match=message):
        SLEB(**QUICK | given).provide("model_surgery", context)


@pytest.mark.parametrize(
    "given", [{"remove": -1}, {"criterion": "best"}, {"sample_length": 1}, {"evaluate": "int8"}]
)
def test_wrong_settings_are_refused(given):
    with pytest.raises(SettingError, match=rf"^sleb\.{next(iter(given))} = "):
        SLEB(**given)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [([], "must not be empty"), ([[]], "must not be empty"), ([[5, 400] * 30], "token 400 is outside")],
)
def test_calibration_that_does_not_fit_is_refused(deep_path, tmp_path, calibration, message):
    with pytest.raises(SettingError, match=message):
        SLEB(**QUICK).prepare(context_of(deep_path, tmp_path, calibration))


def test_segments_that_predict_nothing_are_refused(context):
    with pytest.raises(SettingError, match="predict nothing"):
        BlockLosses(load_decoder(context.checkpoint), torch.full((4, 1), 7))


@pytest.mark.parametrize("criterion", ["sleb", "cosine"])
def test_weights_that_overflow_are_refused(tmp_path, criterion):
    path = write_checkpoint(tmp_path / "huge", layers=4)
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] *= 1e38
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(IntegrityError, match="loss is not finite"):
        SLEB(remove=1, criterion=criterion, **QUICK).prepare(context_of(path, tmp_path / "artefacts"))


# -- in the engine -----------------------------------------------------------------------------------------------------


def test_a_start_token_leads_every_segment(context):
    ids_NL = calibration_tokens(SLEB(**QUICK), context)
    context.tokenizer.adds_bos = True
    led_NL = calibration_tokens(SLEB(**QUICK), context)
    assert led_NL[:, 0].tolist() == [context.tokenizer.bos_id] * 3
    assert torch.equal(led_NL[:, 1:], ids_NL[:, 1:])


def test_other_techniques_see_the_smaller_model(
    deep_path, tmp_path, monkeypatch, greedy: Callable[[LLM, list[int], int], list[int]]
):
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path))
    use = ("sleb:remove=2,samples=3,sample_length=24", "gptq:group_size=32,samples=4,sample_length=64")
    for order in (use, use[::-1]):
        llm = LLM(deep_path, order, dtype="float32", calibration=TEXT, page_size=4)
        assert llm.facts()["kv_bytes_per_token"] == 4 * (2 * 2 * 16) * 4
        params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
        ours = llm.generate([TEXT[0][:40]], params)[0].token_ids
        assert ours == tuple(greedy(llm, TEXT[0][:40], 8))
    artefacts = [
        p.name for p in (tmp_path / "artefacts").iterdir() if p.is_dir() and p.name.startswith("gptq")
    ]
    assert len(artefacts) == 1  # keyed by the smaller model, whatever the order of the plan
    record = json.loads((tmp_path / "artefacts" / artefacts[0] / "artefact.json").read_text())
    assert record["model"] == llm._loaded.checkpoint.fingerprint != open_checkpoint(deep_path).fingerprint
    assert len(record["files"]) == 4


def test_packed_and_plain_weights_lose_alike(context):
    """The native layers that the search runs on are the model."""
    ids_NL = calibration_tokens(SLEB(**QUICK), context)
    plain = BlockLosses(load_decoder(context.checkpoint), ids_NL)
    packed = BlockLosses(load_decoder(context.checkpoint, pack=DenseFormat("float32").pack), ids_NL)
    alive, candidates = [0, 1, 3, 4, 5], [1, 3, 4]
    theirs, ours = plain.without(alive, candidates), packed.without(alive, candidates)
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    for block in candidates:
        assert math.isclose(ours.without[block], theirs.without[block], rel_tol=1e-5)
    assert RemoveBlocks([2]).apply(context.checkpoint).config.num_layers == 5


def test_models_with_packed_weights_can_be_cut(context, tmp_path):
    """A folder of packed weights can be cut, and a cut model can be packed and written: both are the same model."""
    technique = GPTQ(group_size=32, symmetric=True, samples=2, sample_length=24)
    ids = torch.tensor([TEXT[0][:30]])

    def logits(checkpoint: Checkpoint) -> torch.Tensor:
        with torch.no_grad():
            return load_decoder(checkpoint, pack=NativeFormat().pack)(ids)

    whole = open_checkpoint(technique.save(context, tmp_path / "whole"))
    cut = RemoveBlocks([1, 4]).apply(whole)
    decoder = load_decoder(whole, pack=NativeFormat().pack)
    for block in (1, 4):
        decoder.layers[block].attention = lambda x_TE, *_: x_TE
        decoder.layers[block].mlp = lambda x_TE: x_TE
    with torch.no_grad():
        assert torch.equal(logits(cut), decoder(ids))

    view = RemoveBlocks([1, 4]).apply(context.checkpoint)
    smaller = replace(
        context, checkpoint=view, config=view.config, artefacts=ArtefactStore(tmp_path, view.fingerprint)
    )
    written = open_checkpoint(technique.save(smaller, tmp_path / "smaller"))
    assert written.config.num_layers == 4
    packed = load_decoder(view, pack=technique.provide("weight_format", smaller).pack)
    stored = dict(load_decoder(written, pack=NativeFormat().pack).linears())
    for name, linear in packed.linears():
        if name != "lm_head":
            assert torch.equal(stored[name].dequantize(), linear.dequantize())
