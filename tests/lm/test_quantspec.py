"""QuantSpec's pages and rings as a state machine, in the cache and in the engine."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.attention.layout import AttentionSpec, HeadShape, StepLayout
from hasten.attention.policy import Dense, TokenSelection
from hasten.core.errors import ConflictError, SettingError, UnsupportedError
from hasten.kernels.reference import quantspec as reference
from hasten.lm.decoding.draft_model import DraftModel
from hasten.lm.decoding.quantspec import QuantSpec
from hasten.lm.kvcache.cache import KVCache
from hasten.lm.kvcache.prefix import RadixPrefixStore
from hasten.lm.kvcache.quantspec import QuantSpecKernel, QuantSpecKV

from .test_speculation import idle, ids_of, params

SHAPE = HeadShape(heads=4, kv_heads=2, size=16)
G, GAMMA = 8, 3
TINY = {"group": 4, "draft_tokens": 2, "draft_weights": "rtn", "weight_group": 32}


class Machine:
    """A cache of one layer, and what each sequence's tokens ought to be."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.format = QuantSpecKV(G, GAMMA + 1, dtype)
        self.cache = KVCache(
            self.format, RadixPrefixStore(), layers=1, shape=SHAPE, pages=40, page_size=G, rows=4, context=200
        )
        self.generator = torch.Generator().manual_seed(0)
        self.want: dict[int, Tensor] = {}

    def open(self, id: int, tokens: list[int] = ()) -> object:
        kv = self.cache.open(id, tokens)
        self.cache.attach(kv)
        self.want[id] = torch.empty(2, 0, SHAPE.kv_heads, SHAPE.size)
        return kv

    def append(self, kv, count: int) -> Tensor:
        """Run ``count`` rows; the layer's output."""
        start, id = kv.length, kv.id
        assert self.cache.reserve(kv, start, start + count)
        new = torch.randn(2, count, SHAPE.kv_heads, SHAPE.size, generator=self.generator)
        self.want[id] = torch.cat((self.want[id][:, :start], new), 1)
        layout = StepLayout(
            torch.tensor([0, count], dtype=torch.int32),
            torch.tensor([start + count], dtype=torch.int32),
            self.cache.layout_tables([kv.row], -(-(start + count) // G)),
            torch.arange(start, start + count),
            torch.zeros(count, dtype=torch.int64),
            G,
            (id,),
        )
        self.format.append(0, new[0], new[1], layout)
        kv.length = start + count
        q = torch.randn(count, SHAPE.heads, SHAPE.size, generator=self.generator)
        kernel, spec = self.format.kernel(), AttentionSpec(SHAPE, 0.25)
        out = kernel.run(kernel.plan(layout), 0, q, self.format.pages(0), layout, spec, Dense())
        for row in (0, count - 1):
            self.check(kv, q[row], out[row], start + row)
        return out

    def check(self, kv, q_HD: Tensor, out_HD: Tensor, position: int) -> None:
        """A row reads its pages from the planes, and at least the newest G tokens exactly as they came."""
        exact = max(0, (position + 1) // G - 1) * G
        assert position + 1 - exact >= min(G, position + 1)
        k, v = self.want[kv.id][:, : position + 1].clone()
        if exact:
            ids = torch.tensor(kv.pages[: exact // G])
            for x, held in zip((k, v), reference.unpack(self.format.planes[0], ids, True), strict=True):
                held = held.transpose(1, 2).reshape(exact, SHAPE.kv_heads, SHAPE.size)
                assert (held - x[:exact]).abs().max() < 0.05  # eight bits of numbers within +-5
                x[:exact] = held
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        probs = (torch.einsum("hd,lhd->hl", q_HD, k) * 0.25).softmax(-1)
        torch.testing.assert_close(out_HD, torch.einsum("hl,lhd->hd", probs, v), atol=1e-5, rtol=1e-4)


@given(
    prompt=st.sampled_from([0, G - 1, G, 2 * G - 1, 2 * G, 2 * G + GAMMA, 5 * G + 3]),
    rounds=st.lists(st.tuples(st.integers(1, GAMMA + 1), st.integers(0, GAMMA)), max_size=25),
)
@settings(max_examples=40, deadline=None)
def test_any_sequence_of_appends_and_rejections(prompt: int, rounds: list[tuple[int, int]]) -> None:
    """Order is kept, a quantised page never changes, the newest G tokens stay as they came, a page is packed once."""
    machine = Machine()
    kv = machine.open(0)
    if prompt:
        machine.append(kv, prompt)
    frozen: dict[int, list[Tensor]] = {}
    for count, rejected in rounds:
        machine.append(kv, count)
        machine.cache.truncate(kv, kv.length - min(rejected, count - 1))
        done = machine.format.rings[
            0
        ].done  # `check` has seen that rows read the newest G from the ring nevertheless
        for i in range(done):
            now = [x[kv.pages[i]].clone() for x in machine.format.planes[0].tensors]
            assert all(torch.equal(a, b) for a, b in zip(frozen.setdefault(i, now), now, strict=True))
        assert kv.length - done * G >= G - GAMMA or done == 0
        assert machine.format.rotations == done  # once a page, never again


def test_a_prompt_may_be_cut_in_any_way() -> None:
    def outputs(cuts: list[int]) -> tuple[Tensor, list[Tensor]]:
        machine = Machine()
        kv = machine.open(0)
        torch_rows = torch.randn(3, 61, 4, SHAPE.size, generator=torch.Generator().manual_seed(4))
        rows, start = [], 0
        for count in cuts:
            assert machine.cache.reserve(kv, start, start + count)
            layout = StepLayout(
                torch.tensor([0, count], dtype=torch.int32),
                torch.tensor([start + count], dtype=torch.int32),
                machine.cache.layout_tables([kv.row], -(-(start + count) // G)),
                torch.arange(start, start + count),
                torch.zeros(count, dtype=torch.int64),
                G,
                (0,),
            )
            q, k, v = torch_rows[:, start : start + count]
            machine.format.append(0, k[:, :2].contiguous(), v[:, :2].contiguous(), layout)
            kernel = machine.format.kernel()
            pages = machine.format.pages(0)
            rows.append(
                kernel.run(kernel.plan(layout), 0, q, pages, layout, AttentionSpec(SHAPE, 0.25), Dense())
            )
            start = kv.length = start + count
        planes = [x[kv.pages[:6]] for x in machine.format.planes[0].tensors]
        return torch.cat(rows), planes

    want, planes = outputs([61])
    for cuts in ([1] * 61, [30, 31], [5, 7, 4, 4, 41], [3] * 20 + [1]):
        got, mine = outputs(cuts)
        assert torch.equal(got, want)
        assert all(torch.equal(a, b) for a, b in zip(mine, planes, strict=True))


def test_a_fork_has_a_ring_of_its_own() -> None:
    machine = Machine()
    kv = machine.open(0)
    machine.append(kv, 3 * G + 2)
    other = machine.cache.fork(kv, -1)
    machine.cache.rename(other, 1)
    machine.cache.attach(other)
    machine.want[1] = machine.want[0]
    for _ in range(3 * G):  # both rotate, by turns, through pages that they share and pages that they do not
        machine.append(kv, 1)
        machine.append(other, 2)
    assert kv.pages[:3] == other.pages[:3]
    assert not set(kv.pages[3:]) & set(other.pages[3:])
    machine.cache.close(kv)
    machine.append(other, GAMMA)
    machine.cache.close(other)
    assert not machine.format.rings
    assert machine.cache.pool.used == 0


def test_only_quantised_groups_are_shared() -> None:
    machine = Machine()
    tokens = list(range(5 * G + 3))
    kv = machine.open(0, tokens)
    machine.append(kv, len(tokens))
    machine.cache.offer_prefix(kv, tokens)
    assert len(machine.cache.store) == 4  # of the five whole pages, those that are quantised
    first = [x[kv.pages[:4]].clone() for x in machine.format.planes[0].tensors]
    shared = machine.open(1, tokens[: 5 * G])
    assert shared.length == 3 * G  # at least G tokens are computed anew
    assert shared.pages == kv.pages[:3]
    machine.want[1] = torch.cat(
        [
            x.transpose(1, 2).reshape(1, -1, SHAPE.kv_heads, SHAPE.size)
            for x in reference.unpack(machine.format.planes[0], torch.tensor(shared.pages), True)
        ]
    )
    kernel_rows = machine.format.rotations
    machine.cache.close(kv)
    for _ in range(2 * G):
        # Rows read the shared pages from the planes, even those that would else still be in full precision.
        assert machine.cache.reserve(shared, shared.length, shared.length + 1)
        layout = StepLayout(
            torch.tensor([0, 1], dtype=torch.int32),
            torch.tensor([shared.length + 1], dtype=torch.int32),
            machine.cache.layout_tables([shared.row], shared.length // G + 1),
            torch.tensor([shared.length]),
            torch.zeros(1, dtype=torch.int64),
            G,
            (1,),
        )
        k = torch.randn(1, 2, SHAPE.size)
        machine.format.append(0, k, k, layout)
        assert int(machine.format.step(layout).bound_T) == max(3, (shared.length + 1) // G - 1)
        shared.length += 1
    assert machine.format.rotations == kernel_rows + 1
    now = [x[shared.pages[:3]] for x in machine.format.planes[0].tensors]
    assert all(torch.equal(a[:3], b) for a, b in zip(first, now, strict=True))


def test_what_is_quantised_cannot_be_undone() -> None:
    machine = Machine()
    kv = machine.open(0)
    machine.append(kv, 6 * G)
    machine.cache.truncate(kv, G + 1)
    with pytest.raises(UnsupportedError, match=r"cannot be cut to 9 tokens.*quantised"):
        machine.append(kv, 1)
    lost = machine.open(1)
    assert machine.cache.reserve(lost, 0, 3)
    lost.length = 3
    machine.want[1] = torch.zeros(2, 3, SHAPE.kv_heads, SHAPE.size)
    with pytest.raises(UnsupportedError, match="full-precision tokens are gone"):
        machine.append(lost, 1)


def test_bytes_shrink() -> None:
    """Allocated, not computed: a page of 128 tokens takes about half of bfloat16, the draft reads about a quarter."""
    shape = HeadShape(9, 3, 64)
    format = QuantSpecKV(128, 4, torch.bfloat16)
    format.allocate(1, 5, 128, shape)
    plain = 5 * 2 * 3 * 128 * 64 * 2
    assert format.planes[0].bytes() == 5 * format.page_bytes(1, 128, shape)
    assert format.planes[0].bytes(upper_only=True) == 5 * format.draft_bytes(1, 128, shape)
    scales = 5 * 3 * 4 * (128 + 64)
    assert format.planes[0].bytes() == plain / 2 + scales
    assert format.planes[0].bytes(upper_only=True) == plain / 4 + scales
    assert scales < 0.025 * plain


@pytest.mark.parametrize("adaptive", [False, True])
def test_greedy_answers_are_those_of_its_own_cache(make_llm, adaptive: bool) -> None:
    """Several sequences at once, preempted, forked, with shared prefixes: with and without guesses the same tokens."""
    prompts = [ids_of(n, n) for n in (1, 9, 23, 40)] + [ids_of(40, 40)[:30] + ids_of(5, 77)]
    own = make_llm(QuantSpec(**TINY, draft=False), kv_tokens=400)
    want = [c.token_ids for c in own.generate(prompts, params(24))]
    for engine in ({"kv_tokens": 400}, {"kv_tokens": 104, "prefix_cache": False}, {"max_step_tokens": 7}):
        llm = make_llm(QuantSpec(**TINY, adaptive=adaptive), **engine)
        requests = [llm.engine.submit(p, params(24)) for p in prompts]
        llm.engine.run()
        assert [r.completion().token_ids for r in requests] == want
        assert llm.engine.speculation.accepted > 0
        if "prefix_cache" in engine:
            assert sum(r.ledger.preemptions for r in requests) > 0
        idle(llm)
        assert not llm.engine.cache.format.rings
        assert not llm.engine.parts.drafter._seen
    forks = make_llm(QuantSpec(**TINY)).generate([prompts[2]], params(24, n=3))[0].samples
    assert [s.token_ids for s in forks] == [want[2]] * 3


def test_a_running_request_can_be_forked(make_llm) -> None:
    llm = make_llm(QuantSpec(**TINY))
    request = llm.engine.submit(ids_of(30, 3), params(20))
    for _ in range(4):
        llm.engine.step()
    so_far = list(request.sequences[0].token_ids)
    fork = llm.engine.fork(request, params(50 - len(so_far)))
    llm.engine.run()
    assert so_far[30:] + list(fork.completion().token_ids) == list(request.completion().token_ids)
    idle(llm)


def test_drafts_are_replaced_by_the_target(make_llm) -> None:
    """After a round, the ring holds the target's keys: those of a run without drafts."""
    held: list[dict[int, Tensor]] = []
    for draft in (True, False):
        llm = make_llm(QuantSpec(**TINY, draft=draft))
        request = llm.engine.submit(ids_of(10, 3), params(40))
        while len(request.sequences[0].token_ids) < 24:
            llm.engine.step()
        kv, format = request.sequences[0].kv, llm.engine.cache.format
        first, last = kv.length - 6, min(kv.length, 22)
        ring = format.rings[kv.id].data_2LRGD
        held.append({t: ring[:, :, t % format.capacity].clone() for t in range(first, last)})
        llm.engine.cancel_all()
    common = set(held[0]) & set(held[1])
    assert common
    for t in common:
        torch.testing.assert_close(held[0][t], held[1][t], atol=1e-5, rtol=1e-4)


def test_what_does_not_fit_is_refused(make_llm, tiny_path) -> None:
    with pytest.raises(ConflictError, match=r"page_size = 4, but quantspec has pages of 8"):
        make_llm(QuantSpec(**TINY | {"group": 8}))
    with pytest.raises(SettingError, match="above draft_tokens"):
        QuantSpec(group=4, draft_tokens=3)
    with pytest.raises(UnsupportedError, match=r"stores .* unquantised; use 'rtn' or 'gptq'"):
        make_llm(QuantSpec(**TINY | {"draft_weights": "native"}))
    with pytest.raises(ConflictError, match="stores KV pages in its own way"):
        make_llm(QuantSpec(**TINY), kv_dtype="int8")
    with pytest.raises(ConflictError, match="drafter"):
        make_llm(QuantSpec(**TINY), DraftModel(model=str(tiny_path)))
    from hasten.attention.adamas import Adamas

    with pytest.raises(ConflictError, match="adamas reads plain KV pages"):
        make_llm(QuantSpec(**TINY), Adamas(budget=16, calibration_tokens=256))
    format = QuantSpecKV(4, 2, torch.float32)
    with pytest.raises(SettingError, match="page_size = 8 must equal group = 4"):
        format.allocate(1, 4, 8, SHAPE)
    kernel, spec = QuantSpecKernel(format, True), AttentionSpec(SHAPE, 1.0, window=5)
    chosen = TokenSelection(torch.tensor([0]), torch.zeros(1, 1, 1), torch.zeros(1, 1))
    for selection, match in ((chosen, "densely"), (Dense(), "sliding window")):
        with pytest.raises(UnsupportedError, match=match):
            kernel.run(None, 0, torch.zeros(1, 4, 16), None, None, spec, selection)  # type: ignore[arg-type]
