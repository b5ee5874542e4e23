"""Acceptance of `ape`: the checks of its specification that are not about speed (that, and quality over many questions,
is `benchmarks/ape.py`).

1 one context is sequential encoding, and two groups at T = S = 1 are softmax over the union; 2 order does not matter
and nothing is encoded twice; 3 quality; 5 more context than the window; 6 one prefix, shared pages, no eviction in use.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hasten.attention.layout import AttentionSpec, Extent, HeadShape, KVPages, StepLayout
from hasten.attention.policy import Dense, TokenSelection
from hasten.attention.two_group import TwoGroupKernel
from hasten.core.errors import ArtefactError, ConflictError, RequestError, UnsupportedError
from hasten.core.plan import Plan
from hasten.lm.chunk import Chunk
from hasten.lm.context.ape import APE, ParallelContexts
from hasten.lm.context.transform import Prompt
from hasten.lm.llm import LLM
from hasten.lm.request import SamplingParams
from hasten.lm.scoring import answer_logprobs
from hasten.workloads.document_qa import library, question

sys.path.insert(0, str(Path(__file__).parents[1] / "lm"))

from lm_tiny import write_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
TEXTS = (
    "The quick brown fox jumps over the lazy dog.\n\n",
    "Rivers run to the sea; the sea is never full. Wer rastet, der rostet.\n\n",
    "Über allen Gipfeln ist Ruh.\n\n",
)
ASK = "What does the fox do?"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("ape") / "tiny", layers=3, positions=256)


def load(model: Path | str, *use: APE, dtype: str = "float32", **engine: object) -> LLM:
    return LLM(Plan(str(model), use, dtype, {"page_size": 8, "max_batch": 4, **engine}))


def asked(llm: LLM, texts: Sequence[str] = TEXTS, question: str = ASK) -> Prompt:
    return llm.chat_prompt([{"role": "user", "content": question}], texts)


def transform(llm: LLM) -> ParallelContexts:
    (found,) = llm.engine.parts.transforms
    assert isinstance(found, ParallelContexts)
    return found


def logits(llm: LLM, prompt: Prompt, tail: Sequence[int] = ()) -> Tensor:
    """float32 [tokens of the question and ``tail``, V]: logits of a prompt's own tokens, then of ``tail``."""
    engine = llm.engine
    made = engine.intake.prompt(prompt)
    kv = engine.cache.open(engine.new_id(), states=made.states)
    try:
        ids = [*made.token_ids[kv.length :], *tail]
        places = range(len(made.token_ids)) if made.position_ids is None else list(made.position_ids)
        own = [*places[kv.length :], *range(max(places) + 1, max(places) + 1 + len(tail))]
        assert engine.cache.reserve(kv, kv.length, kv.length + len(ids))
        engine.cache.attach(kv)
        return engine.runner.run([Chunk(kv, kv.length, ids, own, len(ids))]).clone()
    finally:
        engine.cache.close(kv)
        engine.runner.forget(kv.id)


def sequential(llm: LLM, prompt: Prompt, tail: Sequence[int] = ()) -> Tensor:
    """The same rows, all parts read in a row by the decoder itself: no cache, no kernel of the engine."""
    encode = llm.tokenizer.encode
    parts = [encode(text) for text in (prompt.head, *prompt.contexts, prompt.ending())]
    ids = [token for part in parts for token in part] + list(tail)
    with torch.inference_mode():
        return llm._loaded.decoder(torch.tensor([ids]))[0, -len(parts[-1]) - len(tail) :]


# 1 --------------------------------------------------------------------------------------------------------------------


def test_one_context_is_sequential_encoding(tiny: Path) -> None:
    with load(tiny, APE(temperature=1, scale=1)) as llm:
        prompt = asked(llm, TEXTS[:1])
        torch.testing.assert_close(
            logits(llm, prompt, [9, 8]), sequential(llm, prompt, [9, 8]), atol=1e-4, rtol=0
        )
        answer = llm.generate([prompt], GREEDY)[0].token_ids
    with load(tiny) as plain:
        ids = [
            t for text in (prompt.head, *prompt.contexts, prompt.tail) for t in plain.tokenizer.encode(text)
        ]
        assert answer == plain.generate([ids], GREEDY)[0].token_ids


def test_one_context_is_sequential_encoding_on_the_default_model(default_model_path: Path) -> None:
    with load(default_model_path, APE(temperature=1, scale=1), page_size=32, kv_tokens=1024) as llm:
        prompt = asked(llm, TEXTS[:1])
        ours, theirs = logits(llm, prompt), sequential(llm, prompt)
        torch.testing.assert_close(ours, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=0)


def attention(
    q_THD: Tensor, k_LGD: Tensor, v_LGD: Tensor, seen_TL: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    share = q_THD.shape[1] // k_LGD.shape[1]
    k, v = (x.repeat_interleave(share, 1).double() for x in (k_LGD, v_LGD))
    score_HTL = torch.einsum("thd,lhd->htl", q_THD.double(), k) * scale
    score_HTL = score_HTL.masked_fill(~seen_TL, -torch.inf)
    return torch.einsum("htl,lhd->thd", score_HTL.softmax(-1), v), score_HTL.logsumexp(-1).T


@pytest.mark.parametrize(("temperature", "scale"), [(1.0, 1.0), (0.9, 0.9), (0.5, 1.0), (1.0, 0.3)])
@pytest.mark.parametrize("rows", [1, 5])
def test_two_groups_are_what_the_paper_says(temperature: float, scale: float, rows: int) -> None:
    """Against a plain computation over gathered tokens; the second sequence of the step is an ordinary one."""
    torch.manual_seed(0)
    page, shape = 4, HeadShape(4, 2, 8)
    pages = KVPages(*(torch.randn(12, shape.kv_heads, page, shape.size) for _ in range(2)))
    pages.k_NGPD[7, :, 2:], pages.v_NGPD[7, :, 2:] = torch.nan, torch.inf  # empty slots hold anything
    extents = (Extent(0, 3, False), Extent(4, 4, True), Extent(8, 6, True))
    table = [[5, 2, 9, 7, 3, 0], [1, 4, -1, -1, -1, -1]]
    lengths, counts = [16 + rows, 4 + 1], [rows, 1]
    kernel = TwoGroupKernel(temperature, scale)
    starts = torch.tensor([0, rows, rows + 1], dtype=torch.int32)
    layout = StepLayout(
        query_start_S1=starts,
        kv_len_S=torch.tensor(lengths, dtype=torch.int32),
        page_table_SM=torch.tensor(table, dtype=torch.int32),
        position_T=torch.zeros(rows + 1, dtype=torch.int64),
        slot_T=torch.zeros(rows + 1, dtype=torch.int64),
        page_size=page,
        sequence_ids=(1, 2),
        extents={0: extents},
    )
    spec = AttentionSpec(shape, shape.size**-0.5)
    q = torch.randn(sum(counts), shape.heads, shape.size)
    out = kernel.run(kernel.plan(layout), 0, q, pages, layout, spec, Dense())

    def gathered(x_NGPD: Tensor, s: int) -> Tensor:
        return x_NGPD[torch.tensor(table[s]).clamp_min(0)].transpose(1, 2).flatten(0, 1)[: lengths[s]]

    k, v = gathered(pages.k_NGPD, 0), gathered(pages.v_NGPD, 0)
    rest = torch.tensor([*range(3), *range(16, 16 + rows)])
    inside = torch.tensor([*range(4, 8), *range(8, 14)])
    causal = torch.arange(len(rest)) <= 3 + torch.arange(rows)[:, None]
    everything = torch.ones(rows, len(inside), dtype=torch.bool)
    o_r, l_r = attention(q[:rows], k[rest], v[rest], causal, spec.scale)
    o_c, l_c = attention(q[:rows], k[inside], v[inside], everything, spec.scale / temperature)
    weight = torch.softmax(torch.stack((scale * temperature * l_c, l_r)), 0)[..., None]
    torch.testing.assert_close(out[:rows].double(), weight[0] * o_c + weight[1] * o_r, atol=1e-5, rtol=1e-5)
    if temperature == scale == 1:
        union, seen = torch.cat((rest, inside)), torch.cat((causal, everything), 1)
        torch.testing.assert_close(
            out[:rows].double(),
            attention(q[:rows], k[union], v[union], seen, spec.scale)[0],
            atol=1e-5,
            rtol=1e-5,
        )
    own_k, own_v = gathered(pages.k_NGPD, 1), gathered(pages.v_NGPD, 1)
    seen = torch.ones(1, 5, dtype=torch.bool)
    other = attention(q[rows:], own_k, own_v, seen, spec.scale)[0]
    torch.testing.assert_close(out[rows:].double(), other, atol=1e-5, rtol=1e-5)
    nothing = torch.zeros(0, 1, 1, dtype=torch.int32)
    chosen = TokenSelection(torch.zeros(0, dtype=torch.int64), nothing, nothing[..., 0])
    with pytest.raises(UnsupportedError, match="remove the attention policy"):
        kernel.run(kernel.plan(layout), 0, q, pages, layout, spec, chosen)


# 2 --------------------------------------------------------------------------------------------------------------------


def test_order_does_not_matter_and_nothing_is_encoded_twice(tiny: Path) -> None:
    with load(tiny, APE()) as llm:
        store = transform(llm).store
        first = logits(llm, asked(llm))
        assert store.encoded == 4  # the prefix and three texts
        for order in ((2, 0, 1), (1, 2, 0)):
            again = logits(llm, asked(llm, [TEXTS[i] for i in order]))
            torch.testing.assert_close(again, first, atol=2e-4, rtol=1e-4)
        assert store.encoded == 4
        logits(llm, asked(llm, [*TEXTS, "One more.\n\n"]))
        assert store.encoded == 5
        logits(llm, asked(llm, question="Another question, same texts?"))
        assert store.encoded == 5


def test_plain_parallel_encoding_reads_each_context_alone(tiny: Path) -> None:
    """Against the decoder's own forward pass: a context's keys do not depend on the prefix, only the question's do."""
    with load(tiny, APE(temperature=1, scale=1, shared_prefix=False)) as llm:
        made = transform(llm).on_text(asked(llm))
        assert made.states is not None
        assert made.position_ids is not None
        assert [made.position_ids[extent.start] for extent in made.states.extents] == [0] * 4
        longest = max(extent.length for extent in made.states.extents)
        assert (
            max(made.position_ids[len(made.states.pages) * 8 :])
            == longest + len(llm.tokenizer.encode(asked(llm).ending())) - 1
        )
        own = logits(llm, asked(llm))
    with load(tiny, APE(temperature=1, scale=1)) as llm:
        assert not torch.allclose(logits(llm, asked(llm)), own, atol=1e-2)


def test_positions_go_on_after_the_longest_context(tiny: Path) -> None:
    with load(tiny, APE()) as llm:
        prompt = asked(llm)
        made = transform(llm).on_text(prompt)
        head, *texts, tail = (
            len(llm.tokenizer.encode(t)) for t in (prompt.head, *prompt.contexts, prompt.ending())
        )
        assert made.states is not None
        assert made.position_ids is not None
        assert [e.length for e in made.states.extents] == [head, *texts]
        for extent in made.states.extents[1:]:
            assert made.position_ids[extent.start] == head
        first = head + max(texts)
        assert made.position_ids[-tail:] == tuple(range(first, first + tail))
        request = llm.engine.submit(prompt, GREEDY)
        (sequence,) = request.sequences
        length = len(made.token_ids)
        assert list(sequence.positions(length, length + 2)) == [first + tail, first + tail + 1]
        llm.engine.cancel(request)


# 3, 5 -----------------------------------------------------------------------------------------------------------------


def test_answers_come_close_to_sequential_encoding(default_model_path: Path, documentation: object) -> None:
    """A small sample: means over many questions, with intervals, are the benchmark's."""
    figures: dict[str, float] = {}
    wanted: list[Tensor] = []
    for name, use in {"sequential": (), "ape": (APE(),)}.items():
        with load(default_model_path, *use, dtype="auto", page_size=32, kv_tokens=4096) as llm:
            passages = library(llm.tokenizer, 4, 64)
            losses, divergence = [], []
            for about in range(3):
                one = question(passages, about, 4, "acceptance")
                ids = llm.tokenizer.encode(f" {one.passage.answer}")
                logprob_AV = answer_logprobs(llm.engine, one.prompt(llm), ids)
                losses.append(-float(logprob_AV[range(len(ids)), ids].mean()))
                if name == "sequential":
                    wanted.append(logprob_AV)
                else:
                    true_AV = wanted[about]
                    divergence.append(float((true_AV.exp() * (true_AV - logprob_AV)).sum(-1).mean()))
            figures[name] = sum(losses) / len(losses)
    figures["kl"] = sum(divergence) / len(divergence)
    print({key: round(value, 3) for key, value in figures.items()})
    assert figures["ape"] < 3.0  # eleven nats without the passage
    assert figures["kl"] < 1.5


def test_more_context_than_the_window(tmp_path: Path) -> None:
    """Twice as many tokens of contexts as the model has positions; reading them in a row is refused."""
    checkpoint = write_checkpoint(tmp_path / "short", layers=2, positions=256)
    texts = [f"Passage {n}. {TEXTS[n % 3].strip()} {TEXTS[(n + 1) % 3].strip()}" for n in range(12)]
    with load(checkpoint, APE(), max_context=1200, kv_tokens=4000) as llm:
        prompt = asked(llm, texts)
        lengths = [len(llm.tokenizer.encode(text)) for text in prompt.contexts]
        assert sum(lengths) > 2 * 256
        assert bool(answer_logprobs(llm.engine, prompt, [5, 6, 7]).isfinite().all())
        made = transform(llm).on_text(prompt)
        assert made.position_ids is not None
        assert max(made.position_ids) < 256
        assert len(llm.generate([prompt], GREEDY)[0].token_ids) == 6
    with load(checkpoint) as llm, pytest.raises(RequestError, match="the context holds 256"):
        llm.generate([prompt], GREEDY)


# 6 --------------------------------------------------------------------------------------------------------------------


def test_requests_share_pages_that_cannot_be_evicted_meanwhile(tiny: Path) -> None:
    with load(tiny, APE()) as llm:
        engine, store = llm.engine, transform(llm).store
        pool = engine.cache.pool
        one = engine.submit(asked(llm), GREEDY)
        two = engine.submit(asked(llm, TEXTS[::-1], "And the sea?"), GREEDY)
        for segment in store.segments.values():
            assert {pool.refs[page] for page in segment.pages} == {
                3
            }  # the store and two requests, prefix included
        engine.step()
        assert {pool.refs[page] for s in store.segments.values() for page in s.pages} == {
            5
        }  # and two sequences
        kept = pool.used
        assert store.evict(100) == 0
        assert len(store.segments) == 4
        own = sum(len(s.kv.pages) for r in (one, two) for s in r.sequences if s.kv) - 2 * sum(
            len(s.pages) for s in store.segments.values()
        )
        assert kept == own + store.bytes() // engine.cache.page_bytes
        engine.run()
        assert one.completion().samples[0].finish == two.completion().samples[0].finish == "length"
        assert {pool.refs[page] for s in store.segments.values() for page in s.pages} == {1}
        llm.forget_prefixes()
        assert pool.used == 0


def test_answers_are_the_same_alone_together_preempted_and_sampled_twice(tiny: Path) -> None:
    longer = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    with load(tiny, APE()) as llm:
        prompts = [asked(llm, TEXTS[:2]), asked(llm, TEXTS[1:], "And the sea?"), "An ordinary prompt."]
        alone = [llm.generate([p], longer)[0].token_ids for p in prompts]
        assert [c.token_ids for c in llm.generate(prompts, longer)] == alone
        twice = llm.generate(
            [prompts[0]], SamplingParams(max_tokens=5, temperature=0.0, n=2, ignore_eos=True)
        )[0]
        assert {s.token_ids for s in twice.samples} == {alone[0][:5]}
        request = llm.engine.submit(prompts[0], longer)
        for _ in range(6):
            llm.engine.step()
        fork = llm.engine.fork(request, append=[7])
        llm.engine.run()
        assert fork.completion().samples[0].finish == "length"
        with pytest.raises(RequestError, match="submit it anew"):
            llm.engine.fork(request)
    pages = [len(llm.tokenizer.encode(t)) for t in (prompts[0].head, *TEXTS)]
    kept = sum(-(-n // 8) for n in pages)
    with load(tiny, APE(store_mb=1000), kv_tokens=8 * (kept + 18), prefix_cache=False) as small:
        requests = [small.engine.submit(p, longer) for p in prompts]
        small.engine.run()
        assert [r.completion().token_ids for r in requests] == alone
        assert sum(r.ledger.preemptions for r in requests) > 0


# the store ------------------------------------------------------------------------------------------------------------


def test_the_store_keeps_to_its_bytes(tiny: Path) -> None:
    with load(tiny, APE(store_mb=0.1), kv_tokens=2048, max_context=2000) as llm:
        store = transform(llm).store
        for number in range(30):
            llm.generate([asked(llm, [f"Text number {number}. " + TEXTS[0]])], GREEDY)
            assert store.bytes() <= 0.1e6
        assert store.encoded > 30
        assert len(store.segments) < 30
        with pytest.raises(RequestError, match="raise store_mb"):
            llm.generate([asked(llm, [f"Text {n}. " + TEXTS[1] for n in range(30)])], GREEDY)
        assert llm.engine.cache.pool.used == store.bytes() // llm.engine.cache.page_bytes + len(
            llm.engine.cache.store
        )


def test_ordinary_requests_get_the_pages_of_unused_contexts(tiny: Path) -> None:
    with load(tiny, APE(), kv_tokens=256, prefix_cache=False) as llm:
        llm.generate([asked(llm)], GREEDY)
        assert transform(llm).store.bytes() > 0
        assert len(llm.generate([list(range(3, 240))], GREEDY)[0].token_ids) == 6
        assert transform(llm).store.bytes() == 0


def test_files_are_read_by_the_next_process_and_checked(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "contexts ü"
    with load(tiny, APE(folder=str(folder))) as llm:
        first = logits(llm, asked(llm))
    files = sorted(folder.iterdir())
    assert len(files) == 3
    with load(tiny, APE(folder=str(folder))) as llm:
        assert torch.equal(logits(llm, asked(llm)), first)
        assert (transform(llm).store.loaded, transform(llm).store.encoded) == (3, 1)
    with load(tiny, APE(folder=str(folder)), dtype="bfloat16") as llm:  # another cache format: other files
        logits(llm, asked(llm))
        assert transform(llm).store.loaded == 0
    files[0].write_bytes(files[0].read_bytes()[:100])
    with load(tiny, APE(folder=str(folder))) as llm:
        with pytest.raises(ArtefactError, match="not a readable context"):
            llm.generate([asked(llm)], GREEDY)
        store = transform(llm).store
        assert llm.engine.cache.pool.used == store.bytes() // llm.engine.cache.page_bytes


def test_files_of_other_weights_are_refused(tiny: Path, tmp_path: Path) -> None:
    with load(tiny, APE(folder=str(tmp_path))) as llm:
        logits(llm, asked(llm))
    with load(tiny, APE(folder=str(tmp_path))) as llm, torch.inference_mode():
        block = llm._loaded.decoder
        block.embed_tokens.weight[: len(block.embed_tokens.weight) // 2] *= 1.5
        block.embed_tokens.weight[:, 0] += 1.0
        with pytest.raises(ArtefactError, match="other weights"):
            llm.generate([asked(llm)], GREEDY)


# bad input ------------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused_by_name(tiny: Path) -> None:
    with load(tiny, APE(), max_context=400, kv_tokens=1000) as llm:
        before = llm.engine.cache.pool.used
        cases = [
            (Prompt(contexts=TEXTS, question=ASK), "prefix that the contexts follow"),
            (Prompt(head="Read.", contexts=TEXTS), "no question"),
            (asked(llm, [TEXTS[1] * 12]), "split the context"),
            (asked(llm, [f"{n}. {TEXTS[1]}" for n in range(20)]), "max_context"),
        ]
        for prompt, message in cases:
            with pytest.raises(RequestError, match=message):
                llm.generate([prompt], GREEDY)
        with pytest.raises(RequestError, match="one text"):
            llm.chat_prompt([{"role": "user", "content": ASK}], "abc")
        with pytest.raises(RequestError, match="last message of the user"):
            llm.chat_prompt([{"role": "assistant", "content": ASK}], TEXTS)
        assert llm.engine.cache.pool.used == before
        assert (
            len(llm.generate([asked(llm, [""])], GREEDY)[0].token_ids) == 6
        )  # an empty context is two newlines
        assert len(llm.generate([Prompt(head="a", contexts=("",), question="b")], GREEDY)[0].token_ids) == 6
    with pytest.raises(ConflictError, match="densely"):
        LLM(str(tiny), use=["ape", "adamas"])


def test_contexts_are_read_in_a_row_without_the_technique(tiny: Path) -> None:
    with load(tiny) as llm:
        prompt = asked(llm, TEXTS, "What about [contexts]?")
        whole = llm.tokenizer.apply_chat(
            [{"role": "user", "content": "".join(TEXTS) + "What about [contexts]?"}]
        )
        assert prompt.joined() == whole
        assert llm.generate([prompt], GREEDY)[0].prompt_token_ids == tuple(llm.tokenizer.encode(whole))
