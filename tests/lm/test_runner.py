from __future__ import annotations

import pytest
import torch

from hasten.attention.kernel import AttentionKernel
from hasten.attention.policy import AttentionPolicy, Dense, SidecarSpec, TokenSelection
from hasten.core.errors import UnsupportedError
from hasten.lm.chunk import Chunk
from hasten.lm.kvcache.cache import KVCache, SequenceKV
from hasten.lm.kvcache.format import PlainKV
from hasten.lm.kvcache.prefix import NoPrefixStore
from hasten.lm.layers.hook import LayerHook
from hasten.lm.runner import Runner
from hasten.models.decoder import CausalAttend


@pytest.fixture
def decoder(llm):
    return llm._loaded.decoder


def make(decoder, policy=None, hooks=(), pages=64):
    from hasten.attention.dense import DenseKernel

    config = decoder.config
    cache = KVCache(
        PlainKV(),
        NoPrefixStore(),
        layers=config.num_layers,
        shape=config.shape,
        pages=pages,
        page_size=4,
        rows=8,
        context=config.max_positions,
        sidecars=() if policy is None else policy.sidecars(),
    )
    return Runner(decoder, cache, DenseKernel(), policy, hooks)


def opened(runner, name: int = 0) -> SequenceKV:
    kv = runner.cache.open(name)
    runner.cache.attach(kv)
    return kv


def chunk(runner, kv, ids, start, logits=None, **more) -> Chunk:
    assert runner.cache.reserve(kv, start, start + len(ids))
    positions = more.pop("positions", range(start, start + len(ids)))
    return Chunk(kv, start, ids, positions, len(ids) if logits is None else logits, **more)


def ids_of(count: int, seed: int = 0, vocabulary: int = 320) -> list[int]:
    return torch.randint(3, vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def plain(decoder, ids):
    return decoder(torch.tensor([ids]))[0]


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sizes", [[37], [1] * 37, [5, 1, 16, 1, 14]])
def test_chunks_give_the_plain_forward(decoder, sizes):
    runner, ids = make(decoder), ids_of(37)
    kv, start, found = opened(runner), 0, []
    for size in sizes:
        found.append(runner.run([chunk(runner, kv, ids[start : start + size], start)]))
        start += size
    close(torch.cat(found), plain(decoder, ids))
    assert kv.length == 37


def test_a_ragged_batch_gives_each_sequence_its_own(decoder):
    runner = make(decoder)
    prompts = [ids_of(n, seed=n) for n in (3, 11, 1, 8)]
    kvs = [opened(runner, i) for i in range(4)]
    runner.run([chunk(runner, kvs[1], prompts[1][:6], 0, logits=0)])
    steps = [
        chunk(runner, kvs[0], prompts[0], 0, logits=1),
        chunk(runner, kvs[1], prompts[1][6:], 6),
        chunk(runner, kvs[2], prompts[2], 0, logits=0),
        chunk(runner, kvs[3], prompts[3], 0, logits=2),
    ]
    found = runner.run(steps)
    assert found.shape == (1 + 5 + 0 + 2, decoder.config.vocab_size)
    close(found[:1], plain(decoder, prompts[0])[-1:])
    close(found[1:6], plain(decoder, prompts[1])[6:])
    close(found[6:], plain(decoder, prompts[3])[-2:])


def test_recomputing_in_place_changes_nothing_it_should_not(decoder):
    runner, ids = make(decoder), ids_of(20)
    kv = opened(runner)
    runner.run([chunk(runner, kv, ids, 0, logits=0)])
    runner.cache.format.pages(1).k_NGPD[kv.pages[2]] = 0  # damage tokens 8..11 of layer 1
    runner.run([chunk(runner, kv, ids[8:12], 8, logits=0)])
    assert kv.length == 20
    close(runner.run([chunk(runner, kv, [5], 20)]), plain(decoder, [*ids, 5])[-1:])


def test_explicit_positions(decoder):
    runner, ids = make(decoder), ids_of(6)
    kv = opened(runner)
    shifted = runner.run([chunk(runner, kv, ids, 0, positions=[p + 100 for p in range(6)])])
    close(shifted, plain(decoder, ids))  # rotary attention knows distances only
    kv = opened(runner, 1)
    stretched = runner.run([chunk(runner, kv, ids, 0, positions=[0, 1, 2, 30, 31, 32])])
    assert (stretched[-1] - shifted[-1]).abs().max() > 1e-2


def test_embeddings_replace_the_first_tokens(decoder):
    runner, ids = make(decoder), ids_of(7)
    with torch.inference_mode():
        rows = decoder.embed(torch.tensor(ids[:3]))
    kv = opened(runner)
    found = runner.run([chunk(runner, kv, [0, 0, 0, *ids[3:]], 0, embeddings_TE=rows)])
    close(found, plain(decoder, ids))


class Scale(LayerHook):
    """Multiplies hidden states at one layer; sees every layer boundary it asked for."""

    def __init__(self, at: int) -> None:
        self.at, self.seen = at, []

    def layers(self, count):
        return {self.at}

    def before(self, layer, x_TE, layout):
        self.seen.append((layer, layout.rows))
        return x_TE * 2


def test_hooks_see_and_change_hidden_states(decoder):
    count = decoder.config.num_layers
    last, ids = Scale(count), ids_of(5)
    runner = make(decoder, hooks=(last,))
    close(
        runner.run([chunk(runner, opened(runner), ids, 0)]), plain(decoder, ids)
    )  # the final norm undoes a scale
    assert last.seen == [(count, 5)]
    middle = Scale(1)
    runner = make(decoder, hooks=(middle,))
    assert (runner.run([chunk(runner, opened(runner), ids, 0)]) - plain(decoder, ids)).abs().max() > 1e-2


class Drop(LayerHook):
    """Drops every other row (never the last of a sequence) from layer 1 on, in prefill."""

    def keep_rows(self, layer, x_TE, layout):
        if layer != 1 or bool(layout.decode_rows().all()):
            return None
        end = layout.query_start_S1[1:].tolist()
        start = layout.query_start_S1[:-1].tolist()
        return torch.tensor(
            [r for a, b in zip(start, end, strict=True) for r in range(a, b) if (b - 1 - r) % 2 == 0]
        )


@torch.inference_mode()
def dropped(decoder, ids, keep_until):
    """The same without a cache: rows at odd distance from the prompt's end leave after layer 0."""
    position_T = torch.arange(len(ids))
    alive = [i for i in range(len(ids)) if i >= keep_until or (keep_until - 1 - i) % 2 == 0]
    x = decoder.embed(torch.tensor(ids))
    for index, layer in enumerate(decoder.layers):
        if index == 1:
            x, position_T = x[alive], position_T[alive]
        x = layer.mlp(layer.attention(x, position_T, CausalAttend(decoder)))
    return decoder.logits(x)[-1]


def test_dropped_rows_leave_later_layers_shorter(decoder):
    runner = make(decoder, hooks=(Drop(),))
    prompts = [ids_of(9, 1), ids_of(6, 2)]
    kvs = [opened(runner, 0), opened(runner, 1)]
    found = runner.run([chunk(runner, kv, p, 0, logits=1) for kv, p in zip(kvs, prompts, strict=True)])
    for row, p in zip(found, prompts, strict=True):
        close(row, dropped(decoder, p, len(p)))
    assert [kv.missing.tolist() for kv in kvs] == [[0, 4, 4], [0, 3, 3]]
    # Decode goes on after different lengths per layer, beside a sequence that dropped nothing.
    fresh = opened(runner, 2)
    more = [7, 9, 11]
    for i, token in enumerate(more):
        steps = [chunk(runner, kv, [token], len(p) + i) for kv, p in zip(kvs, prompts, strict=True)]
        found = runner.run([*steps, chunk(runner, fresh, [token], i)])
        for row, p in zip(found, prompts, strict=False):
            close(row, dropped(decoder, p + more[: i + 1], len(p)))
        close(found[2], plain(decoder, more[: i + 1])[-1])
    forked = runner.cache.fork(kvs[0], 9)
    runner.cache.attach(forked)
    a = runner.run([chunk(runner, forked, [20], 12)])[0]
    b = runner.run([chunk(runner, kvs[0], [21], 12)])[0]
    close(a, dropped(decoder, [*prompts[0], *more, 20], 9))
    close(b, dropped(decoder, [*prompts[0], *more, 21], 9))
    with pytest.raises(UnsupportedError, match="dropped rows"):
        runner.cache.truncate(forked, 5)
    with pytest.raises(UnsupportedError, match="recomputed in place"):
        runner.run([chunk(runner, kvs[0], [1, 2], 3)])


def test_logits_of_dropped_rows_and_dropped_last_rows_are_refused(decoder):
    runner = make(decoder, hooks=(Drop(),))
    with pytest.raises(UnsupportedError, match="logits were asked"):
        runner.run([chunk(runner, opened(runner), ids_of(6), 0, logits=3)])

    class DropLast(LayerHook):
        def keep_rows(self, layer, x_TE, layout):
            return torch.arange(x_TE.shape[0] - 1) if layer == 2 else None

    runner = make(decoder, hooks=(DropLast(),))
    with pytest.raises(UnsupportedError, match="last row"):
        runner.run([chunk(runner, opened(runner), ids_of(6), 0, logits=1)])


class Skip(LayerHook):
    """Skips the attention of one layer and the MLP of another; ``until`` limits it to the first steps."""

    def __init__(self, attention: int, mlp: int, until: int = 10**9) -> None:
        self.attention, self.mlp, self.until = attention, mlp, until
        self.steps = 0

    def begin_step(self, layout):
        self.steps += 1

    def skip(self, layer, layout):
        return layer == self.attention and self.steps <= self.until, layer == self.mlp


@torch.inference_mode()
def skipped(decoder, ids):
    x = decoder.embed(torch.tensor(ids))
    for index, layer in enumerate(decoder.layers):
        if index != 1:
            x = layer.attention(x, torch.arange(len(ids)), CausalAttend(decoder))
        if index != 0:
            x = layer.mlp(x)
    return decoder.logits(x)


def test_skipped_blocks_leave_no_keys(decoder):
    runner, ids = make(decoder, hooks=(Skip(1, 0),)), ids_of(12)
    kv = opened(runner)
    found = [runner.run([chunk(runner, kv, ids[:7], 0)])]
    found += [runner.run([chunk(runner, kv, [token], 7 + i)]) for i, token in enumerate(ids[7:])]
    close(torch.cat(found), skipped(decoder, ids))
    assert kv.missing.tolist() == [0, 12, 0]
    runner.cache.truncate(kv, 9)  # a layer without any token does not mind
    close(runner.run([chunk(runner, kv, ids[9:], 9)]), skipped(decoder, ids)[9:])


def test_a_layer_that_wakes_up_sees_only_its_own_tokens(decoder):
    runner, ids = make(decoder, hooks=(Skip(1, 9, until=1),)), ids_of(9)
    kv = opened(runner)
    runner.run([chunk(runner, kv, ids[:5], 0, logits=0)])
    assert torch.isfinite(runner.run([chunk(runner, kv, ids[5:], 5)])).all()
    assert kv.missing.tolist() == [0, 5, 0]
    runner.cache.truncate(kv, 6)
    with pytest.raises(UnsupportedError, match="dropped rows"):
        runner.cache.truncate(kv, 4)


class Recent(AttentionPolicy):
    """Decode rows read the last ``count`` tokens of their sequence; notes everything it is told."""

    def __init__(self, count: int) -> None:
        self.count, self.calls = count, []

    def sidecars(self):
        return (SidecarSpec("sum", (), torch.float32),)

    def bind(self, sidecars):
        self.sums = sidecars["sum"]

    def begin_step(self, layout):
        self.calls.append("begin")

    def end_step(self, layout):
        self.calls.append("end")

    def forget(self, sequence_id):
        self.calls.append(("forget", sequence_id))

    def on_append(self, layer, k_TGD, layout):
        page, offset = layout.slot_T // layout.page_size, layout.slot_T % layout.page_size
        self.sums[layer][page, :, offset] = k_TGD.sum(-1)

    def select(self, layer, q_THD, pages, layout, spec):
        # The sidecar describes every cached key, also those of earlier steps.
        for s in range(layout.sequences):
            n = int(layout.kv_len_S[s])
            ids = layout.page_table_SM[s, : -(-n // layout.page_size)].long()
            keys = pages.k_NGPD[ids].transpose(1, 2).reshape(-1, *pages.k_NGPD.shape[1::2])[:n]
            codes = self.sums[layer][ids].transpose(1, 2).reshape(-1, pages.k_NGPD.shape[1])[:n]
            torch.testing.assert_close(keys.sum(-1), codes)
        if not bool(layout.decode_rows().all()):
            return Dense()
        length_S = layout.kv_len_S
        index = (length_S[:, None] - self.count + torch.arange(self.count, dtype=torch.int32)).clamp(min=0)
        groups = spec.shape.kv_heads
        return TokenSelection(
            torch.arange(layout.rows),
            index[:, None].expand(-1, groups, -1).contiguous().int(),
            torch.full((layout.rows, groups), self.count, dtype=torch.int32),
        )


def test_policy_chooses_what_decode_reads(decoder):
    policy, ids = Recent(4), ids_of(14)
    runner = make(decoder, policy)
    kv = opened(runner)
    runner.run([chunk(runner, kv, ids[:13], 0, logits=0)])
    sparse = runner.run([chunk(runner, kv, ids[13:], 13)])
    assert (sparse - plain(decoder, ids)[-1:]).abs().max() > 1e-3
    runner.forget(5)
    assert policy.calls == ["begin", "end", "begin", "end", ("forget", 5)]
    all_of_it = Recent(14)
    runner = make(decoder, all_of_it)
    kv = opened(runner)
    runner.run([chunk(runner, kv, ids[:13], 0, logits=0)])
    close(runner.run([chunk(runner, kv, ids[13:], 13)]), plain(decoder, ids)[-1:])


def test_kernel_plans_once_per_step_and_layout(decoder):
    from hasten.attention.dense import DenseKernel

    class Counting(DenseKernel):
        plans = runs = 0

        def plan(self, layout):
            self.plans += 1
            return super().plan(layout)

        def run(self, *args, **kwargs):
            self.runs += 1
            return super().run(*args, **kwargs)

    runner = make(decoder)
    kernel: AttentionKernel = Counting()
    runner.kernel = kernel
    runner.run([chunk(runner, opened(runner), ids_of(5), 0)])
    assert (kernel.plans, kernel.runs) == (1, decoder.config.num_layers)
    runner = make(decoder, hooks=(Drop(),))
    runner.kernel = kernel = Counting()
    runner.run([chunk(runner, opened(runner), ids_of(5), 0, logits=1)])
    assert (kernel.plans, kernel.runs) == (2, decoder.config.num_layers)


# -- steps that continue one another ----------


def continued(monkeypatch) -> list[bool]:
    """Whether each run so far was one native call from token ids to logits."""
    seen: list[bool] = []
    run = Runner.run

    def spy(self, chunks):
        logits = run(self, chunks)
        seen.append(self.best is not None)
        return logits

    monkeypatch.setattr(Runner, "run", spy)
    return seen


def decode(runner, kvs, prompts, steps):
    """Logits of greedy decoding, a row per sequence and step."""
    for kv, prompt in zip(kvs, prompts, strict=True):
        runner.run([chunk(runner, kv, prompt, 0, logits=0)])
    ids, out = [5] * len(kvs), []
    for _ in range(steps):
        chunks = [chunk(runner, kv, [i], kv.length) for kv, i in zip(kvs, ids, strict=True)]
        out.append(runner.run(chunks))
        ids = out[-1].argmax(-1).tolist()
        assert runner.best in (None, ids)
    return torch.stack(out)


@pytest.mark.parametrize("lengths", [[9], [3, 17, 8]])
def test_continued_steps_are_planned_steps(decoder, monkeypatch, lengths):
    prompts = [ids_of(n, seed=n) for n in lengths]
    seen = continued(monkeypatch)
    runner = make(decoder)
    fast = decode(runner, [opened(runner, i) for i in range(len(lengths))], prompts, 14)
    assert sum(seen) >= 5
    monkeypatch.setattr(Runner, "_continue", lambda *_: None)
    runner = make(decoder)
    slow = decode(runner, [opened(runner, i) for i in range(len(lengths))], prompts, 14)
    close(fast, slow)


def test_a_sequence_that_was_cut_or_copied_does_not_continue(decoder):
    """Same ids, other pages: the round must not write where it wrote before."""
    runner, ids = make(decoder), ids_of(30)
    kv = opened(runner)
    runner.run([chunk(runner, kv, ids[:13], 0)])
    expected = plain(decoder, ids)
    for at in (13, 14):
        close(runner.run([chunk(runner, kv, ids[at : at + 1], at)]), expected[at : at + 1])
    other = runner.cache.fork(kv, 1)  # the page that is being written is shared now
    runner.cache.attach(other)
    close(runner.run([chunk(runner, kv, [7], 15)]), plain(decoder, [*ids[:15], 7])[15:])
    close(runner.run([chunk(runner, other, ids[15:16], 15)]), expected[15:16])
    runner.cache.truncate(kv, 9)
    for at in range(9, 20):
        close(runner.run([chunk(runner, kv, ids[at : at + 1], at)]), expected[at : at + 1])
        if at > 15:
            close(runner.run([chunk(runner, other, ids[at : at + 1], at)]), expected[at : at + 1])


def test_a_row_that_is_not_finite_is_told(decoder, monkeypatch):
    runner = make(decoder)
    kvs = [opened(runner, i) for i in range(2)]
    seen = continued(monkeypatch)
    runner.run([chunk(runner, kv, ids_of(5, seed=i), 0, logits=0) for i, kv in enumerate(kvs)])
    for at in (5, 6):
        runner.run([chunk(runner, kv, [9], at) for kv in kvs])
    page = kvs[1].pages[0]
    runner.cache.format.pages(1).k_NGPD[page] = float("nan")
    logits = runner.run([chunk(runner, kv, [9], 7) for kv in kvs])
    assert seen[-1]
    assert runner.best is not None
    assert runner.best[0] == int(logits[0].argmax())
    assert runner.best[1] == -1


def test_ids_outside_the_vocabulary_are_refused(decoder):
    runner = make(decoder)
    kv = opened(runner)
    runner.run([chunk(runner, kv, [3, 4], 0)])
    runner.run([chunk(runner, kv, [5], 2)])
    with pytest.raises((ValueError, IndexError)):
        runner.run([chunk(runner, kv, [320], 3)])
    assert kv.length == 3
