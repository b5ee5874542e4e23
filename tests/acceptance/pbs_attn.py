"""Acceptance of `pbs_attn` (checks 1-4 of its specification; 5 and 6 are speed: `benchmarks/pbs_attn.py`).

Checks 3 and 4 at 8K, and passkeys, are `benchmarks/pbs_attn.py`; here a text of 2K stands for it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.pbs_attn import Harness, continuation
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.attention.blocks import block_lists, cached_of
from hasten.attention.layout import AttentionSpec, HeadShape
from hasten.attention.pbs_attn import PbsAttn, PbsPolicy
from hasten.attention.pieces import Rows
from hasten.attention.policy import BlockSelection
from hasten.core.errors import SettingError
from hasten.kernels.block_list import Cached, attend_blocks
from hasten.lm.llm import LLM
from hasten.lm.native import DecodeRound
from hasten.lm.request import SamplingParams

from ..lm.lm_tiny import write_checkpoint

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
SMALL = {"block": 16, "segment": 32, "min_rows": 2}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_checkpoint(
        tmp_path_factory.mktemp("pbs") / "tiny", layers=3, heads=6, kv_heads=2, head_size=32
    )


def prompts(count: int, low: int = 60, high: int = 200) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, 300, int(n)).tolist() for n in rng.integers(low, high, count)]


def run(model: Path, use: list[object], given: list[list[int]], **engine: object) -> list[tuple[int, ...]]:
    with LLM(model, use=use, dtype="float32", **engine) as llm:
        return [c.token_ids for c in llm.generate(given, GREEDY)]


# -- 1. everything kept is dense attention, permuted or not ----------


@pytest.mark.parametrize("permute", [True, False])
def test_keeping_every_block_is_dense_attention(permute):
    q, cached, spec = problem(1, 700, HeadShape(6, 2, 64))
    policy = PbsPolicy(PbsAttn(threshold=1, permute=permute), 1)
    selection = policy.choose(0, 0, q, cached, spec)
    assert (selection.order_XL is not None) is permute
    if permute:
        assert not torch.equal(selection.order_XL[0], selection.order_XL[1])
    got = read(q, cached, selection, spec)
    position = torch.arange(700)
    want = naive(q, *tokens(cached), spec.scale, (position <= position[:, None]).expand(6, -1, -1))
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("step", [512, 70])
def test_keeping_every_block_answers_as_dense_does(tiny, step):
    given = prompts(3)
    dense = run(tiny, [], given)
    assert run(tiny, [PbsAttn(threshold=1, **SMALL)], given, max_step_tokens=step) == dense
    with LLM(tiny, dtype="float32") as llm:
        want = llm.score(given, mode="prefill")
    with LLM(tiny, use=[PbsAttn(threshold=1, **SMALL)], dtype="float32", max_step_tokens=step) as llm:
        got = llm.score(given, mode="prefill")
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


# -- 2. against the paper's steps written down with masks in token space ----------


def problem(seed: int, length: int, shape: HeadShape, page: int = 16) -> tuple[Tensor, Cached, AttentionSpec]:
    """Queries and keys whose attention is peaked enough to select by."""
    generator = torch.Generator().manual_seed(seed)
    pages = -(-length // page)
    k, v = torch.randn(2, pages, shape.kv_heads, page, shape.size, generator=generator)
    q = torch.randn(length, shape.heads, shape.size, generator=generator) * 1.5
    table = torch.randperm(pages, generator=generator).to(torch.int32)
    return q, Cached(k, v, table, length), AttentionSpec(shape, shape.size**-0.5)


def tokens(cached: Cached) -> tuple[Tensor, Tensor]:
    """(k_GLD, v_GLD)."""
    return tuple(
        x[cached.table_M.long()].transpose(0, 1).flatten(1, 2)[:, : cached.length]
        for x in (cached.k_NGPD, cached.v_NGPD)
    )


def read(q_THD: Tensor, cached: Cached, selection: BlockSelection, spec: AttentionSpec) -> Tensor:
    lists = block_lists(selection, q_THD.shape[0], cached.length, spec)
    return attend_blocks(q_THD, cached, lists, spec.scale)[0]


def naive(q_THD: Tensor, k_GLD: Tensor, v_GLD: Tensor, scale: float, seen_HTL: Tensor) -> Tensor:
    repeat = q_THD.shape[1] // k_GLD.shape[0]
    k, v = (x.repeat_interleave(repeat, 0).double() for x in (k_GLD, v_GLD))
    logits = torch.einsum("thd,hld->htl", q_THD.double(), k) * scale
    return torch.einsum("htl,hld->thd", logits.masked_fill(~seen_HTL, -torch.inf).softmax(-1), v)


def paper(
    q_THD: Tensor, k_GLD: Tensor, scale: float, block: int, segment: int, threshold: float
) -> tuple[Tensor, float]:
    """bool [H, T, L]: what each row sees in cache order, by steps 1-6 literally; and how near a choice was to a tie."""
    length, heads, size = q_THD.shape
    q = q_THD.double().transpose(0, 1)
    k = k_GLD.double().repeat_interleave(heads // k_GLD.shape[0], 0)
    if length <= segment:
        span = torch.arange(length)
        return (span <= span[:, None]).expand(heads, -1, -1), 1.0
    whole, tie = length // segment * segment, 1.0
    probe = (q[:, -block:] @ k[:, :whole].transpose(1, 2) * scale).softmax(-1).mean(1)
    blocks = -(-length // block)
    seen = torch.zeros(heads, length, length, dtype=torch.bool)
    for h in range(heads):
        perm = torch.arange(length)
        for start in range(0, whole, segment):
            ranked = probe[h, start : start + segment].argsort(stable=True, dim=0, descending=True)
            perm[start : start + segment] = ranked + start
            value = probe[h, perm[start : start + segment]]
            tie = min(tie, float((value[block - 1 : -1 : block] - value[block::block]).min() / value.mean()))
        padded = torch.zeros(2, blocks * block, size, dtype=torch.float64)
        padded[0, :length], padded[1, :length] = q[h], k[h, perm]
        q_mean, k_mean = padded.view(2, blocks, block, size).mean(2)
        score = q_mean @ k_mean.T * scale
        for i in range(blocks):
            own = i * block // segment
            allowed = [j for j in range(blocks) if j <= i and j * block // segment != own]
            kept = {j for j in range(blocks) if j * block // segment == own}
            kept.add(int((perm == 0).nonzero()) // block)
            share = score[i, allowed].softmax(-1)
            total = 0.0
            for j in share.argsort(descending=True).tolist():
                if total >= threshold:
                    break
                kept.add(allowed[j])
                total += float(share[j])
                tie = min(tie, abs(total - threshold))
            for j in kept:
                key = perm[j * block : (j + 1) * block]
                for row in range(i * block, min((i + 1) * block, length)):
                    seen[h, row, key[key <= row]] = True
    return seen, tie


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    length=st.integers(1, 900),
    blocks=st.sampled_from([(16, 32), (32, 128), (128, 256)]),
    threshold=st.sampled_from([0.3, 0.6, 0.9]),
)
@example(seed=1, length=2000, blocks=(128, 256), threshold=0.9)
@example(seed=2, length=512, blocks=(128, 256), threshold=0.5)
@example(seed=3, length=257, blocks=(128, 256), threshold=0.9)
def test_equals_the_paper_written_down(seed, length, blocks, threshold):
    block, segment = blocks
    q, cached, spec = problem(seed, length, HeadShape(2, 1, 16))
    seen, tie = paper(q, tokens(cached)[0], spec.scale, block, segment, threshold)
    policy = PbsPolicy(PbsAttn(block=block, segment=segment, threshold=threshold), 1)
    if length <= segment:
        return
    selection = policy.choose(0, 0, q, cached, spec)
    got = read(q, cached, selection, spec)
    if tie > 1e-5:  # else rounding may decide a choice
        torch.testing.assert_close(
            got.double(), naive(q, *tokens(cached), spec.scale, seen), atol=1e-5, rtol=1e-5
        )


def test_a_chunk_reads_what_the_whole_prompt_would_if_it_is_the_end_of_it():
    """Blocks and segments lie at fixed positions, so the rows of the last chunk choose as in one step."""
    q, cached, spec = problem(5, 1000, HeadShape(6, 2, 32))
    policy = PbsPolicy(PbsAttn(**SMALL), 1)
    whole = read(q, cached, policy.choose(0, 0, q, cached, spec), spec)
    for rows in (500, 488, 200):  # from a block's edge, and from within one
        part = read(q[-rows:], cached, policy.choose(0, 0, q[-rows:].contiguous(), cached, spec), spec)
        skip = 0 if (1000 - rows) % 16 == 0 else 16 - (1000 - rows) % 16  # of a partly filled block
        torch.testing.assert_close(part[skip:], whole[1000 - rows + skip :], atol=1e-5, rtol=1e-5)


def test_decoding_goes_on_in_whole_native_steps(tiny, monkeypatch):
    native: list[bool] = []
    run_round = DecodeRound.run

    def spy(self, chunks):
        found = run_round(self, chunks)
        native.append(found is not None)
        return found

    monkeypatch.setattr(DecodeRound, "run", spy)
    run(tiny, [PbsAttn(**SMALL)], prompts(1, 150, 151))
    assert sum(native) >= 8


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_pages_of_every_kind_are_read(tiny, kv_dtype):
    given = prompts(2)
    dense = run(tiny, [], given, kv_dtype=kv_dtype)
    assert run(tiny, [PbsAttn(threshold=1, **SMALL)], given, kv_dtype=kv_dtype) == dense
    assert all(run(tiny, [PbsAttn(threshold=0.5, **SMALL)], given, kv_dtype=kv_dtype, page_size=7))


def test_settings_that_do_not_fit_are_refused(tiny):
    with pytest.raises(SettingError, match="segment = 200 must be whole blocks"):
        LLM(tiny, use=[PbsAttn(segment=200)], dtype="float32")
    with pytest.raises(SettingError, match="threshold"):
        PbsAttn(threshold=0.0)


# -- 3 and 4. quality on the default model ----------

PROMPT, SCORED = 1920, 128


@pytest.fixture(scope="module")
def harness(default_model_path, documentation) -> Harness:
    return Harness(PbsAttn(), str(default_model_path), PROMPT + SCORED)


@pytest.fixture(scope="module")
def ids(harness) -> list[int]:
    ((_, ids),) = harness.texts(PROMPT + SCORED, 1)
    return ids


def test_permuted_keys_need_fewer_blocks_for_the_same_error(harness, ids):
    """Density at a relative L1 error of 5%, interpolated over thresholds, mean over layers."""
    mean = {True: 0.0, False: 0.0}
    with torch.inference_mode():
        for case in harness.layers(ids[:PROMPT], (6, 14, 22)):
            rows = Rows.of(case.layout)
            # The last rows are enough, and a quarter of the work.
            q, cached = case.q_THD[-512:].contiguous(), cached_of(rows, 0, case.pages)
            everything = PbsPolicy(PbsAttn(threshold=1), 1).choose(0, 0, q, cached, case.spec)
            dense = read(q, cached, everything, case.spec)
            for permute in mean:
                points = []
                for threshold in (0.6, 0.75, 0.85, 0.92, 0.97):
                    policy = PbsPolicy(PbsAttn(threshold=threshold, permute=permute), 1)
                    selection = policy.choose(0, 0, q, cached, case.spec)
                    off = read(q, cached, selection, case.spec) - dense
                    kept = float(selection.keep_XQB.double().mean())
                    points.append((float(off.abs().sum() / dense.abs().sum()), kept))
                points.append((0.0, float(everything.keep_XQB.double().mean())))
                points.sort()
                mean[permute] += float(np.interp(0.05, *zip(*points, strict=True))) / 3
    print(f"blocks read at 5% error: {mean[True]:.3f} permuted, {mean[False]:.3f} in cache order")
    assert mean[True] < mean[False]


def test_perplexity_after_a_prompt(harness, ids):
    """Rises by at most 1.5%."""
    with torch.inference_mode():
        found = continuation(harness, ids, PROMPT)()
    print(found)
    assert found["density"] < 0.8
    assert found["perplexity"] <= 0.015
    assert found["kl"] <= 0.02
