"""The engine on int8 pages: halved memory, near the float32 answers, exact under sharing, refused where not read."""

from __future__ import annotations

import pytest
import torch

from hasten.attention.flash_attention import FlashAttention
from hasten.attention.hydragen import Hydragen
from hasten.core.errors import ConflictError, SettingError
from hasten.core.technique import Technique
from hasten.lm.kvcache.format import PlainKV
from hasten.lm.kvcache.int8 import Int8KV
from hasten.lm.request import SamplingParams
from hasten.models.config import HeadShape


def ids_of(count: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 320, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_a_page_takes_half_the_memory():
    shape = HeadShape(heads=9, kv_heads=3, size=64)
    half = Int8KV().page_bytes(30, 32, shape) / PlainKV(torch.bfloat16).page_bytes(30, 32, shape)
    assert half == (64 + 4) / 128
    format = Int8KV()
    format.allocate(2, 5, 4, shape)
    real = sum(t.numel() * t.element_size() for kv in format.layers for t in (kv.k_NGPD, kv.v_NGPD))
    assert real == 5 * format.page_bytes(2, 4, shape)


def test_scores_stay_near_and_prefill_equals_decode(make_llm):
    text = ids_of(120)
    exact = torch.tensor(make_llm().score([text])[0].logprobs)
    llm = make_llm(kv_dtype="int8")
    assert isinstance(llm.engine.cache.format, Int8KV)
    whole = torch.tensor(llm.score([text])[0].logprobs)
    assert (whole - exact).abs().mean() < 0.1
    assert not torch.equal(whole, exact)
    stepwise = torch.tensor(make_llm(kv_dtype="int8", max_step_tokens=7).score([text])[0].logprobs)
    torch.testing.assert_close(whole, stepwise, atol=5e-3, rtol=0)


def test_pages_are_shared_copied_and_preempted_without_a_trace(make_llm):
    shared = ids_of(30)
    prompts = [shared + ids_of(n, n) for n in (3, 5, 6, 9)]
    wanted = SamplingParams(max_tokens=12, temperature=0.8, seed=3, n=2, ignore_eos=True)

    def answers(**engine):
        llm = make_llm(kv_dtype="int8", **engine)
        requests = [llm.engine.submit(p, wanted) for p in prompts]
        llm.engine.run()
        preempted = sum(r.ledger.preemptions for r in requests)
        return [[s.token_ids for s in r.completion().samples] for r in requests], preempted

    alone, _ = answers(prefix_cache=False, max_batch=2)
    few, preempted = answers(kv_tokens=80)
    assert preempted > 0
    assert answers()[0] == alone
    assert few == alone


def test_shared_prefixes_are_read_together(make_llm):
    shared = ids_of(60)
    prompts = [[*shared, n, 2 * n] for n in range(5, 10)]
    wanted = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    apart, together = (
        [c.token_ids for c in make_llm(*use, kv_dtype="int8").generate(prompts, wanted)]
        for use in ([], [Hydragen(min_prefix=8)])
    )
    assert together == apart


def test_what_does_not_read_int8_pages_is_refused(make_llm):
    with pytest.raises(ConflictError, match="flash_attention does not read int8 pages"):
        make_llm(FlashAttention(), kv_dtype="int8")
    with pytest.raises(SettingError, match="kv_dtype"):
        make_llm(kv_dtype="int4")

    class Own(Technique):
        slug = "own_pages"
        slots = ("kv_format",)
        lossless = True

        def provide(self, slot, context):
            return PlainKV()

    with pytest.raises(ConflictError, match="own_pages stores KV pages in its own way"):
        make_llm(Own(), kv_dtype="int8")


def test_plain_dtypes_can_be_chosen(make_llm):
    assert make_llm(kv_dtype="bfloat16").engine.cache.format.dtype is torch.bfloat16
    assert make_llm().engine.cache.format.dtype is torch.float32
