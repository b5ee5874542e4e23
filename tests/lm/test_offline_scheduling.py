"""Schedulers that see a whole job: order, the two cursors of `blendserve`, pins, late requests."""

from __future__ import annotations

import pytest

from hasten.core.errors import SettingError
from hasten.lm.batch import Job
from hasten.lm.openai import TextBody
from hasten.lm.request import SamplingParams
from hasten.lm.scheduling.blendserve import BlendServe
from hasten.lm.scheduling.offline import OfflineOrder


def ask(llm, ids, tokens):
    return llm.engine.submit(ids, SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True))


def starts(llm):
    """Run to the end; numbers of requests in the order of their first rows."""
    number = {request: i for i, request in enumerate(llm.engine.requests)}
    found = []
    schedule = llm.engine.scheduler.schedule

    def watch():
        work = schedule()
        found.extend(n for w in work if (n := number[w.sequence.request]) not in found)
        return work

    llm.engine.scheduler.schedule = watch
    llm.engine.run()
    return found


GROUPS = [[group] * 12 + [group, 7 + i] for i in range(3) for group in (30, 20, 40)]


@pytest.mark.parametrize(
    ("order", "wanted"),
    [
        ("dfs", [1, 4, 7, 0, 3, 6, 2, 5, 8]),
        ("shortest", [8, *range(8)]),
        ("longest", [7, *range(7), 8]),
    ],
)
def test_fixed_orders(make_llm, order, wanted):
    llm = make_llm(OfflineOrder(order=order), max_batch=1)
    prompts = [list(ids) for ids in GROUPS]
    if order != "dfs":
        prompts[7].append(3)
        del prompts[8][-1]
    for ids in prompts:
        ask(llm, ids, 2)
    assert starts(llm) == wanted


def test_random_order_is_the_seeds(make_llm):
    found = []
    for seed in (0, 0, 1):
        llm = make_llm(OfflineOrder(order="random", seed=seed), max_batch=1)
        for ids in GROUPS:
            ask(llm, ids, 1)
        found.append(starts(llm))
    assert found[0] == found[1] != found[2]
    assert sorted(found[0]) == list(range(9))


def two_kinds(llm):
    """Eight requests that read and answer briefly, eight that write; returned in order of submission."""
    made = []
    for i in range(8):
        made.append(ask(llm, [5] * 20 + [50 + 8 * i + j for j in range(8)], 2))
        made.append(ask(llm, [6] * 4 + [60 + i], 40))
    return made


def test_both_ends_run_together_with_the_jobs_density(make_llm, hasten_home):
    llm = make_llm(BlendServe(lengths="limit"), max_batch=4, kv_tokens=200)
    two_kinds(llm)
    scheduler = llm.engine.scheduler
    llm.engine.step()
    lengths = {sequence.params.max_tokens for sequence in scheduler.running}
    assert lengths == {2, 40}
    shares = scheduler.shares()
    left, right, root = scheduler.density("left"), scheduler.density("right"), scheduler.tree.root.density
    assert left > root > right > 0
    memory = scheduler.capacity()
    assert shares["left"] + shares["right"] == pytest.approx(memory)
    assert shares["left"] * left + shares["right"] * right == pytest.approx(memory * root)
    llm.engine.run()


def test_lengths_are_learned_by_kind(make_llm, hasten_home):
    """Eight of the sixteen run first; then the others are expected to do what their kind did."""
    llm = make_llm(BlendServe(), max_batch=4)
    two_kinds(llm)
    scheduler = llm.engine.scheduler
    llm.engine.run()
    scheduler._renew()
    assert all(entry.known for entry in scheduler.tree.entries)
    expected = [node.expected for node in scheduler.tree.root.children]
    assert sorted(expected) == [2.0, 40.0]
    assert scheduler.capacity() == 4 * (8 * (28 + 2) + 8 * (5 + 40)) / 16
    assert scheduler.tree.root.seen == 16


def test_the_next_prefix_is_pinned_and_let_go_when_pages_are_short(make_llm, hasten_home):
    llm = make_llm(BlendServe(lengths="limit"), max_batch=2)
    two_kinds(llm)
    scheduler, cache = llm.engine.scheduler, llm.engine.cache
    while not scheduler._pins:
        llm.engine.step()
    assert all(cache.pool.refs[page] >= 2 for page in scheduler._pins)  # the store's, and the pin
    assert scheduler.spare()
    assert not scheduler.spare()
    llm.engine.cancel_all()
    cache.store.clear()
    assert cache.pool.free == cache.pool.count


@pytest.mark.parametrize("technique", [BlendServe(), OfflineOrder()], ids=lambda t: t.slug)
def test_requests_that_come_late_are_served(make_llm, technique, hasten_home):
    llm = make_llm(technique, max_batch=2)
    requests = two_kinds(llm)
    for i in range(30):
        llm.engine.step()
        if i % 3 == 0:
            requests.append(ask(llm, [9, 100 + i, 3], 3))
    llm.engine.run()
    assert all(request.done and request.failure is None for request in requests)


@pytest.mark.parametrize("technique", [BlendServe(), OfflineOrder(), None], ids=str)
def test_a_batch_file_is_known_as_a_whole(make_llm, technique, hasten_home):
    llm = make_llm(*(() if technique is None else (technique,)), max_batch=2)
    bodies = [TextBody(prompt=[3 + i, 4, 5], max_tokens=2, temperature=0) for i in range(12)]
    jobs = [Job(str(i), i, str(i), body) for i, body in enumerate(bodies)]
    first = []
    schedule = llm.engine.scheduler.schedule

    def watch():
        first.append(len(llm.engine.requests))
        return schedule()

    llm.engine.scheduler.schedule = watch
    assert len(list(llm.answer_jobs(jobs))) == 12
    assert first[0] == (4 if technique is None else 12)


def test_bad_settings():
    for bad in ({"sample": 0.0}, {"keep_sharing": 1.1}, {"prior": 0}, {"lengths": "oracle"}):
        with pytest.raises(SettingError, match=f"blendserve.{next(iter(bad))} = "):
            BlendServe(**bad)
    with pytest.raises(SettingError, match=r"offline_order.order = 'best'"):
        OfflineOrder(order="best")
