"""Acceptance of `token_select` (checks 1-4 and 6 of its specification).

Check 5, and what takes long of 4: `benchmarks/token_select.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from hasten.attention.policy import CopySelection
from hasten.attention.token_select import TokenSelect, TokenSelectPolicy
from hasten.core.errors import SettingError, UnsupportedError
from hasten.core.plan import Plan
from hasten.kernels.reference.token_select import largest
from hasten.kernels.token_select import Ballot, token_votes
from hasten.lm.llm import LLM
from hasten.lm.request import SamplingParams
from hasten.models.checkpoint import load_decoder, open_checkpoint
from hasten.models.rope import Rope
from hasten.workloads.passkey import passkeys

from ..lm.lm_tiny import write_checkpoint

SMALL = {"n_init": 4, "n_local": 16, "k": 24, "chunk": 16}
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_checkpoint(
        tmp_path_factory.mktemp("token_select") / "tiny", layers=3, heads=6, kv_heads=2, head_size=32
    )


def ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 300, count).tolist()


def score(model: Path, use: list[object], given: list[int], mode: str, **engine: object) -> np.ndarray:
    """Log-probabilities of the tokens from the 100th on."""
    with LLM(model, use=use, dtype="float32", **engine) as llm:
        return np.array(llm.score(given, context=100, mode=mode).logprobs)


def run(model: Path, use: list[object], given: list[list[int]], **engine: object) -> list[tuple[int, ...]]:
    with LLM(model, use=use, dtype="float32", **engine) as llm:
        out = [c.token_ids for c in llm.generate(given, GREEDY)]
        assert llm.engine.cache.pool.used == llm.facts()["pages_stored"]
        assert not llm.engine.runner.policy._slots  # what was kept for a sequence went with it
    return out


# -- 1. unrotated keys and compact positions ----------


@pytest.mark.parametrize("mode", ["prefill", "decode"])
@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    ],
    ids=["plain", "linear", "dynamic", "yarn"],
)
def test_budget_of_the_whole_context_is_dense_attention(tiny, tmp_path, monkeypatch, mode, scaling):
    """Logits within 1e-4, though the cache holds keys before RoPE and every row reads a copy."""
    model, given = tiny, ids(160)
    if scaling is not None:
        model = write_checkpoint(tmp_path / "scaled", layers=2)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "rope_scaling": scaling}))
    answers: list[object] = []
    select = TokenSelectPolicy.select

    def spy(self, *args):
        answers.append(select(self, *args))
        return answers[-1]

    monkeypatch.setattr(TokenSelectPolicy, "select", spy)
    dense = score(model, [], given, mode)
    sparse = score(model, [TokenSelect(**{**SMALL, "k": 400})], given, mode)
    assert answers
    assert all(isinstance(answer, CopySelection) for answer in answers)
    np.testing.assert_allclose(sparse, dense, atol=1e-4)


def test_the_cache_holds_keys_before_rotation(tiny, monkeypatch):
    seen: list[torch.Tensor] = []

    def watch(self, layer, k_TGD, layout):
        if layer == 0:
            seen.append(k_TGD.clone())

    monkeypatch.setattr(TokenSelectPolicy, "on_append", watch)
    score(tiny, [TokenSelect(**SMALL)], [7] * 120, "prefill")
    k_TGD = torch.cat(
        seen
    )  # the same token everywhere: layer 0 has the same key everywhere, but for its rotation
    torch.testing.assert_close(k_TGD, k_TGD[:1].expand_as(k_TGD))


# -- the mechanism, written down once more ----------


class Explicit:
    """The attention of one sequence as the paper says it, in plain PyTorch."""

    def __init__(self, settings: TokenSelect, rope: Rope, scale: float) -> None:
        self.s, self.rope, self.scale = settings, rope, scale
        self.cache: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.hits = 0

    def attend(self, layer, q_CHD, k_CGD, v_CGD, _):
        group = q_CHD.shape[1] // k_CGD.shape[1]
        new = (k_CGD.repeat_interleave(group, 1), v_CGD.repeat_interleave(group, 1))
        if layer in self.cache:
            new = tuple(torch.cat(pair) for pair in zip(self.cache[layer], new, strict=True))
        self.cache[layer] = k_LHD, v_LHD = new
        index = self.chosen(layer, q_CHD, k_LHD)
        rows, count = q_CHD.shape[0], len(index)
        q_CHD = self.rope.rotate(q_CHD, count - rows + torch.arange(rows))
        k_KHD = self.rope.rotate(k_LHD[index], torch.arange(count))
        logits_HCK = torch.einsum("chd,khd->hck", q_CHD, k_KHD) * self.scale
        later = torch.arange(count) > count - rows + torch.arange(rows)[:, None]
        return torch.einsum(
            "hck,khd->chd", logits_HCK.masked_fill(later, -torch.inf).softmax(-1), v_LHD[index]
        )

    def chosen(self, layer, q_CHD, k_LHD):
        s, length, rows = self.s, len(k_LHD), len(q_CHD)
        local = s.n_local + (rows - 1 if s.whole_local else 0)
        if length <= s.n_init + s.k + local:
            return torch.arange(length)
        query = self.rope.rotate(q_CHD, s.n_local + torch.arange(rows)).mean(0)
        known = self.kept.get(layer)
        if rows == 1 and known and torch.cosine_similarity(query.flatten(), known[0], 0) >= s.theta:
            self.hits += 1
        else:
            votes_HL = torch.einsum("hd,lhd->hl", query, k_LHD[s.n_init : length - local]).softmax(-1)
            winners = largest(votes_HL.sum(0), s.k) + s.n_init
            self.kept[layer] = (query.flatten(), winners)
        return torch.cat((torch.arange(s.n_init), self.kept[layer][1], torch.arange(length - local, length)))


@pytest.mark.parametrize("whole_local", [True, False])
@pytest.mark.parametrize("theta", [1.01, 0.0, -1])
def test_engine_computes_what_the_paper_says(tiny, whole_local, theta):
    """100 prompt tokens in chunks, then token by token: log-probabilities within 1e-3 of an explicit computation."""
    settings = TokenSelect(**SMALL, whole_local=whole_local, theta=theta)
    # No token twice: equal tokens tie in the first layer, and which of them wins is not what is tested.
    given = (3 + np.random.default_rng(0).permutation(297)[:150]).tolist()
    with LLM(tiny, use=[settings], dtype="float32") as llm:
        got = np.array(llm.score(given, context=100, mode="decode").logprobs)
        figures = llm.facts()
    decoder = load_decoder(open_checkpoint(tiny), torch.float32).eval()
    explicit = Explicit(settings, decoder.rope(0), decoder.config.attention(0).scale)
    cuts = [*range(0, 100, 16), *range(100, 149)]
    want = []
    with torch.inference_mode():
        for start, stop in zip(cuts, [*cuts[1:], 149], strict=True):
            x_TE = decoder.embed(torch.tensor(given[start:stop]))
            for layer in decoder.layers:
                x_TE = layer.mlp(layer.attention(x_TE, torch.arange(start, stop), explicit.attend))
            if stop >= 100:
                want.append(decoder.logits(x_TE[-1:]).log_softmax(-1)[0])
    want = torch.stack(want).gather(1, torch.tensor(given[100:])[:, None])[:, 0]
    np.testing.assert_allclose(got, want.numpy(), atol=1e-3)
    assert figures["selection_hits"] == explicit.hits
    rows = 3 * 49
    assert explicit.hits == {1.01: 0, -1: rows}.get(theta, explicit.hits)
    if theta == 0.0:
        assert 0 < explicit.hits < rows  # both ways are taken


# -- 2. the vote ----------


def test_one_loud_head_changes_a_vote_by_sums_but_hardly_the_soft_vote():
    random = torch.Generator().manual_seed(0)
    keys = torch.randn(64, 2, 16, 32, generator=random)
    table, end = torch.arange(64, dtype=torch.int32)[None], torch.tensor([1024], dtype=torch.int32)
    mean = 0.3 * torch.randn(1, 6, 32, generator=random)
    loud = mean.clone()
    loud[0, 0] *= 10

    def kept(vote: str) -> float:
        top = [
            token_votes(q, keys, table, 0, end, Ballot(64, vote))[0].topk(64).indices for q in (mean, loud)
        ]
        return float(torch.isin(top[0], top[1]).float().mean())

    assert kept("sum") < 0.5
    assert kept("soft") > 0.8


# -- 3. the selection cache ----------


def test_reuse_bounds_how_long_a_choice_is_kept(tiny):
    with LLM(tiny, use=[TokenSelect(**SMALL, theta=-1, reuse=8)], dtype="float32") as llm:
        llm.score(ids(150), context=100, mode="decode")
        figures = llm.facts()
    # Of 49 decoded rows in three layers every ninth chooses; the prompt's chunks chose before.
    assert figures["selection_hits"] == 3 * (49 - 5)


# -- 4. beyond the trained length, and quality ----------


def test_positions_stay_within_the_budget_beyond_the_trained_length(tiny, monkeypatch):
    asked: list[int] = []
    whole = Rope.whole

    def spy(self, positions):
        asked.append(positions)
        return whole(self, positions)

    monkeypatch.setattr(Rope, "whole", spy)
    prompt = ids(700)  # the model's limit is 512
    (answer,) = run(tiny, [TokenSelect(**SMALL)], [prompt], max_context=1024)
    assert len(answer) == GREEDY.max_tokens
    assert max(asked) <= 4 + 24 + 16 + 15


@pytest.fixture(scope="module")
def llm(default_model_path) -> Iterator[LLM]:
    plan = Plan.of([TokenSelect()], model=str(default_model_path), engine={"kv_tokens": 4096})
    with LLM(plan) as loaded:
        yield loaded


def test_passkeys_are_found(llm):
    """In prompts half as long again as the budget (`benchmarks/token_select.py`: longer ones)."""
    prompts = passkeys(llm.tokenizer, 1200, texts=1, depths=(0.9, 0.5))
    params = SamplingParams(max_tokens=8, temperature=0)
    found = [p.found_in(llm.generate([list(p.token_ids)], params)[0].text) for p in prompts]
    assert found == [True] * 2
    assert llm.facts()["selection_choices"] > 0


# -- 6. memory, batches, and what is refused ----------


def test_the_kv_cache_takes_no_more_memory(tiny):
    size = []
    for use in ([], [TokenSelect(**SMALL)]):
        with LLM(tiny, use=use, dtype="float32", kv_tokens=512) as llm:
            size.append(llm.facts()["kv_bytes"])
    assert size[0] == size[1]


@pytest.mark.parametrize("theta", [1.01, 0.0])
def test_a_batch_gives_the_tokens_of_single_requests(tiny, theta):
    technique = TokenSelect(**SMALL, theta=theta)
    given = [ids(int(n), seed) for seed, n in enumerate((200, 45, 61, 130, 97))]
    given += [[*given[0][:100], 7, 8, 9], [*given[0][:100], 11]]  # share a prefix with the first
    alone = [run(tiny, [technique], [one], prefix_cache=False)[0] for one in given]
    assert run(tiny, [technique], given) == alone
    assert run(tiny, [technique], given, max_step_tokens=40) == alone
    with LLM(tiny, dtype="float32") as llm:
        assert [c.token_ids for c in llm.generate(given, GREEDY)] != alone  # the budget is felt at all


def test_choices_that_fork_and_are_preempted_end(tiny):
    technique = TokenSelect(**SMALL)
    with LLM(tiny, use=[technique], dtype="float32", kv_tokens=480, page_size=16) as llm:
        params = SamplingParams(max_tokens=16, temperature=0, n=2, ignore_eos=True)
        done = llm.generate([ids(150, seed) for seed in range(4)], params)
        assert all(len(sample.token_ids) == 16 for one in done for sample in one.samples)
        assert not llm.engine.runner.policy._slots


def test_bfloat16_pages_stay_close(tiny):
    technique, given = TokenSelect(**{**SMALL, "k": 400}), ids(150)
    exact = score(tiny, [technique], given, "decode")
    rounded = score(tiny, [technique], given, "decode", kv_dtype="bfloat16")
    dense = score(tiny, [], given, "decode", kv_dtype="bfloat16")
    assert 0 < np.abs(rounded - exact).mean() <= 3 * np.abs(dense - exact).mean()


def test_what_it_cannot_do_is_refused(tiny, tmp_path):
    with pytest.raises(UnsupportedError, match="int8 pages"):
        LLM(tiny, use=[TokenSelect()], dtype="float32", kv_dtype="int8")
    model = write_checkpoint(tmp_path / "sliding")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 32}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="sliding-window"):
        LLM(model, use=[TokenSelect()], dtype="float32")
    with pytest.raises(SettingError, match="chunk = 300 must not exceed n_local = 256"):
        TokenSelect(chunk=300)
    with pytest.raises(SettingError, match="pool = 2"):
        TokenSelect(pool=2)
