"""Acceptance of `longllmlingua`: the checks of its specification that are not about speed (that, and answers by
ablation, is `benchmarks/longllmlingua.py`).

1 the budget is kept and nothing but contexts is touched; 2 the document that holds the answer ranks first; 3 scores
read bit by bit equal two passes from scratch; 6 recovery, and contexts of every shape.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.core.errors import ConflictError, RequestError, SettingError
from hasten.core.plan import Plan
from hasten.lm.context.compress import Compressor, Encoded, arranged, ratios
from hasten.lm.context.likelihood import Reader, window
from hasten.lm.context.longllmlingua import CompressedContexts, LongLLMLingua
from hasten.lm.context.recovery import Shortened, recover
from hasten.lm.context.transform import Prompt
from hasten.lm.llm import LLM
from hasten.lm.request import SamplingParams
from hasten.workloads.document_qa import library, question

sys.path.insert(0, str(Path(__file__).parents[1] / "lm"))

from lm_tiny import write_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

ASK = "Who jumps over the dog?"
TEXTS = (
    "The quick brown fox jumps over the lazy dog. Every sequence of tokens enters the model, and the model answers.",
    "Rivers run to the sea; the sea is never full.\n\nWer rastet, der rostet. Über allen Gipfeln ist Ruh. ✓ done",
    "A model answers. The answer is a sequence of tokens; nobody reads it.\n\nDer Fuchs springt.",
    "x",
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("longllmlingua") / "tiny", layers=2, positions=1024)


def load(model: Path | str, dtype: str = "float32", kv_tokens: int = 4096, **settings: Any) -> LLM:
    engine = {"page_size": 8, "max_batch": 4, "kv_tokens": kv_tokens}
    return LLM(Plan(str(model), (LongLLMLingua(**{"segment": 16, **settings}),), dtype, engine))


def transform(llm: LLM) -> CompressedContexts:
    (found,) = llm.engine.parts.transforms
    assert isinstance(found, CompressedContexts)
    return found


def asked(llm: LLM, texts: Sequence[str] = TEXTS, question: str = ASK) -> Prompt:
    return llm.chat_prompt([{"role": "user", "content": question}], texts)


def kept(prompt: Prompt) -> list[Shortened]:
    return prompt.extra["longllmlingua"]


def no_pages_held(llm: LLM) -> bool:
    return llm.engine.cache.pool.used == len(llm.engine.cache.store)


# 1 --------------------------------------------------------------------------------------------------------------------


def test_rate_one_changes_nothing(tiny: Path) -> None:
    for settings in ({"rate": 1.0}, {"target": 5000}):
        with load(tiny, **settings) as llm:
            prompt = asked(llm)
            assert transform(llm).on_text(prompt) is prompt


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.4, 0.6, 0.8])
@pytest.mark.parametrize("settings", [{}, {"coarse": 4.0}, {"delta": 0.0, "segment": 200}])
def test_the_budget_is_kept_and_only_contexts_change(
    tiny: Path, rate: float, settings: dict[str, Any]
) -> None:
    texts = [f"{n}. {text}" for n in range(3) for text in TEXTS[:3]]
    with load(tiny, rate=rate, slack=20, **settings) as llm:
        prompt = asked(llm, texts)
        made = transform(llm).on_text(prompt)
        total = sum(len(llm.tokenizer.encode(text)) for text in texts)
        count = sum(len(set(part.token)) for part in kept(made))
        assert 0.9 * rate * total - 2 <= count <= 1.05 * rate * total + 1
        assert (made.head, made.tail, made.question) == (prompt.head, prompt.tail, prompt.question)
        assert made.joined().startswith(prompt.head)
        assert made.joined().endswith(ASK + prompt.joined().split(ASK)[1])
        for part in kept(made):
            assert part.original in texts
            assert [part.original[i] for i in part.at] == list(part.text)
        assert no_pages_held(llm)
        assert (
            transform(llm).on_text(prompt).contexts == made.contexts
        )  # what the prefix cache has changes nothing


def test_better_documents_keep_more_and_all_together_the_target() -> None:
    for lengths in ([50, 50, 50], [10, 200, 30, 7], [100], [3, 1, 1]):
        for target in (1, 5, sum(lengths) // 3, sum(lengths) - 1):
            for delta in (0.0, 0.3, 1.0):
                share = ratios(lengths, target, delta)
                assert share == sorted(share, reverse=True)
                assert all(0 <= s <= 1 for s in share)
                assert sum(n * s for n, s in zip(lengths, share, strict=True)) == pytest.approx(
                    target, abs=1e-6
                )
    first, middle, last = ratios([100, 100, 100], 150, 0.3)
    assert (first, middle, last) == pytest.approx((0.8, 0.5, 0.2))


def test_orders() -> None:
    places = [7, 2, 9, 4, 0]
    assert arranged(5, places, "sort") == [0, 1, 2, 3, 4]
    assert arranged(5, places, "original") == [4, 1, 3, 0, 2]
    assert arranged(5, places, "two_stage") == [0, 2, 4, 3, 1]


def test_selection_follows_the_rank_until_the_budget_is_used_up(tiny: Path) -> None:
    with load(tiny, coarse=2.0, slack=0) as llm:
        compressor = transform(llm).compressor
        documents = [Encoded("", (5,) * n, ((0, 0),) * n) for n in (10, 30, 0, 20)]
        assert compressor.select([1, 3, 0, 2], documents, 15) == [1]
        assert compressor.select([1, 3, 0, 2], documents, 16) == [1, 3]
        assert compressor.select([0, 3, 1, 2], documents, 1000) == [0, 3, 1]
        assert compressor.select([2, 0], documents, 1) == [2, 0]  # the first is taken whatever it is


# 2 --------------------------------------------------------------------------------------------------------------------


def test_the_answering_document_ranks_first(default_model_path: Path, documentation: object) -> None:
    with load(default_model_path, dtype="auto", kv_tokens=8192) as llm:
        passages = library(llm.tokenizer, 6, 48)
        compressor = transform(llm).compressor
        documents = [Encoded.of(llm.tokenizer, passage.text) for passage in passages]
        asks = [question(passages, about, 6, "rank").text for about in range(6)]
        place = [compressor.rank(documents, ask).index(about) for about, ask in enumerate(asks)]
        other = Compressor(llm.engine, LongLLMLingua(ranking="document"))
        worse = [other.rank(documents, ask).index(about) for about, ask in list(enumerate(asks))[:3]]
    print(f"rank of the gold document: {place}, by p(document | question): {worse}")
    assert sum(p < 3 for p in place) >= 0.9 * len(place)
    assert sum(place) / len(place) < sum(worse) / len(worse)


# 3 --------------------------------------------------------------------------------------------------------------------


def two_passes(llm: LLM, prefix: Sequence[int], ids: Sequence[int]) -> Tensor:
    """Losses of ``ids`` after ``prefix``, by the decoder's forward pass over everything at once."""
    with torch.inference_mode():
        logits = llm._loaded.decoder(torch.tensor([[*prefix, *ids]]))[0, len(prefix) - 1 : -1]
        return -torch.log_softmax(logits.float(), -1)[range(len(ids)), list(ids)]


def test_scores_are_those_of_two_passes_from_scratch(tiny: Path) -> None:
    """Each segment is judged after what was kept of those before it, in both readings."""
    with load(tiny, rate=0.5, coarse=4.0) as llm:
        compressor = transform(llm).compressor
        seen: list[tuple[list[int], list[int], Tensor]] = []
        original = Compressor.scores

        def watched(self: Compressor, tracks: Sequence[Reader], ids: Sequence[int]) -> Tensor:
            history = [list(track.token_ids) for track in tracks]
            score = original(self, tracks, ids)
            wanted = two_passes(llm, history[0], ids) - two_passes(llm, history[1], ids)
            torch.testing.assert_close(score, wanted, atol=1e-4, rtol=0)
            seen.append((history[0], list(ids), score))
            return score

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Compressor, "scores", watched)
            parts = compressor.compress(TEXTS, ASK)
        assert len(seen) > 4
        # what each segment was judged after is the text that came out, not the text that went in
        text = "".join(part.text for part in parts)
        for history, _, _ in seen[1:]:
            assert text.startswith(llm.tokenizer.decode(history[1:]).rstrip("\ufffd"))
        assert no_pages_held(llm)


def test_a_reader_gives_the_loss_of_the_token_itself(tiny: Path) -> None:
    with load(tiny) as llm:
        ids = llm.tokenizer.encode(TEXTS[0])
        with Reader(llm.engine, [1]) as reader:
            losses = torch.cat(
                [reader.read(ids[:1]), reader.read(ids[1:9]), reader.read([]), reader.read(ids[9:])]
            )
            torch.testing.assert_close(losses, two_passes(llm, [1], ids), atol=1e-4, rtol=0)
            reader.replace(5, [*ids[4:6], 9, 9])  # the first two are as they were
            assert reader.token_ids == [1, *ids[:6], 9, 9]
            again = reader.read(ids[3:20])
            torch.testing.assert_close(
                again, two_passes(llm, [1, *ids[:6], 9, 9], ids[3:20]), atol=1e-4, rtol=0
            )
            reader.remember()
        with Reader(llm.engine, [1, *ids[:6], 9, 9]) as reader:
            assert reader.kv.length == 8  # a page of the prefix cache
        assert no_pages_held(llm)


def test_a_history_longer_than_the_window_loses_its_oldest_tokens(tiny: Path) -> None:
    texts = [f"{n}. {text}" for n in range(12) for text in TEXTS[:3]]
    with load(tiny, rate=0.8, slack=0, kv_tokens=320) as llm:
        compressor = transform(llm).compressor
        parts = compressor.compress(texts, ASK)
        assert sum(len(set(part.token)) for part in parts) > window(llm.engine)
        assert no_pages_held(llm)


# 6 --------------------------------------------------------------------------------------------------------------------


def shortened(text: str, left_out: str) -> Shortened:
    """``text`` by characters, those marked in ``left_out`` (anything but a space) removed."""
    spans = [(i, i + 1) for i in range(len(text))]
    return Shortened.of(text, spans, [i for i, mark in enumerate(left_out.ljust(len(text))) if mark == " "])


def test_recovery_restores_what_was_cut_inside() -> None:
    cases = [
        (
            "The harbour of Saint Petersburg opened in 1703.",
            "                     xxxxx                     ",
        ),
        ("Call +49 30 1234567 before noon.", "         xx  xx                 "),
        ("Dr. Anna-Maria Schmidt signed it.", "         xxxxxx                  "),
        ("On 12 March 1994 it began.", "      xxx                 "),
        ("Version 3.14.159 of the library", "          xxx                  "),
        ("amber falcon 47 is the name", "  xx                      "),
        ("größte Brücke über die Spree", "          xxx               "),
        ("the file /etc/hosts.conf is read", "             xx                 "),
        ("one two three four five", "        xxx            "),
        ("Mount Kilimanjaro rises 5895 m", "          xxx                 "),
    ]
    good = 0
    for original, mask in cases:
        text = shortened(original, mask)
        assert text.text != original
        good += recover(f"It says: {text.text}", [text]).endswith(original)
    assert good >= 0.9 * len(cases)


def test_recovery_leaves_the_rest_alone() -> None:
    text = shortened("The harbour of Saint Petersburg opened in 1703.", "                     xxxxx")
    for answer in ("", "Nothing shared here at all!", "  odd   spacing\n\tkept ", "💡 ünïcode"):
        assert recover(answer, [text]) == answer
        assert recover(answer, []) == answer
    assert recover("in  1703 ,  The", [text]) == "in  1703 ,  The"  # found, with nothing cut out
    cut = shortened("a Petersburg opened", "       xxx")
    assert recover("the Peterrg, opened", [cut]) == "the Petersburg, opened"
    # more left out than a span may lack: two separate runs stay as they are
    wide = shortened("alpha " + "b" * 30 + " omega", "      " + "x" * 31)
    assert wide.text == "alpha omega"
    assert recover("alpha omega", [wide]) == "alpha omega"
    # of two places the shorter one
    mask = "     " + 13 * "x" + 14 * " " + "xxx"
    twice = shortened("John Ronald Reuel Tolkien. John R. Tolkien.", mask)
    assert recover("John Tolkien", [twice]) == "John R. Tolkien"


def test_answers_are_recovered_and_streams_are_not(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    with load(tiny) as llm:
        done = llm.generate([asked(llm)], params)[0]
        text = llm.tokenizer.decode(done.token_ids)
        seen = []
        monkeypatch.setattr(
            CompressedContexts,
            "on_answer",
            lambda self, prompt, text: seen.append((kept(prompt), text)) or "mended",
        )
        assert llm.generate([asked(llm)], params)[0].text == "mended"
        assert seen[0][1] == text
        assert "".join(delta.text for delta in llm.stream(asked(llm), params)) == text


def test_contexts_of_every_shape(tiny: Path) -> None:
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    shapes: list[tuple[str, ...]] = [
        TEXTS[:1],
        ("",),
        ("", TEXTS[0], ""),
        ("\n\n", "x"),
        TEXTS * 3,
        ("💡" * 20, "é" * 30),
    ]
    ways: list[dict[str, Any]] = [
        {},
        {"target": 1},
        {"sentences": True, "rate": 0.4, "coarse": 3.0},
        {"ranking": "document"},
        {"ranking": "none", "order": "original", "contrastive": False},
        {"keep_breaks": True},
    ]
    for settings in ways:
        with load(tiny, **settings) as llm:
            for texts in shapes:
                assert len(llm.generate([asked(llm, texts)], params)[0].token_ids) == 2
                assert no_pages_held(llm)


def test_bad_input_is_refused_by_name(tiny: Path) -> None:
    with load(tiny) as llm:
        with pytest.raises(RequestError, match="give the prompt a question"):
            llm.generate([Prompt(contexts=TEXTS, tail="x")])
        with pytest.raises(RequestError, match="question is empty"):
            llm.generate([Prompt(contexts=TEXTS, question="  ")])
        with pytest.raises(RequestError, match="leaves the compressor's 1024 no room"):
            llm.generate([Prompt(contexts=TEXTS, question="fox jumps " * 900)])
        assert no_pages_held(llm)
        assert llm.generate(["no contexts, no change"])[0].prompt_token_ids == tuple(
            llm.tokenizer.encode("no contexts, no change")
        )
    with pytest.raises(SettingError, match="rate"):
        LongLLMLingua(rate=0)
    with pytest.raises(ConflictError):
        LLM(str(tiny), use=["ape", "longllmlingua"])


def test_another_model_can_judge(tiny: Path, tmp_path: Path) -> None:
    """Its tokens are its own: what is kept is text."""
    judge = write_checkpoint(tmp_path / "judge", layers=1, positions=512, vocabulary=300, seed=3)
    with load(tiny, compressor=str(judge)) as llm:
        compressor = transform(llm).compressor
        assert compressor.engine is not llm.engine
        made = transform(llm).on_text(asked(llm))
        assert made.contexts
        llm.forget_prefixes()
        assert compressor.engine.cache.pool.used == 0
