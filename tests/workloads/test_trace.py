import pytest

from hasten import workloads
from hasten.core.errors import MeasureError
from hasten.lm.scheduling.fastgen import FastGen
from hasten.workloads.text import Text
from hasten.workloads.trace import Served, play, summary, unloaded_rate
from hasten.workloads.traffic import Item, TrafficOptions, traffic

SMALL = {"requests": 6, "clients": 2, "prompt_tokens": 60, "tokens": 5, "quality_requests": 3}


@pytest.fixture
def session(tiny_plan, small_corpus):
    with workloads.get("trace").open(tiny_plan(), SMALL) as session:
        yield session


def drawn(session, **options):
    return traffic(
        session.text, TrafficOptions(**{"requests": 6, "prompt_tokens": 60, "tokens": 5, **options})
    )


def test_traffic_is_the_same_for_the_same_options(session):
    assert drawn(session) == drawn(session)
    assert drawn(session) != drawn(session, seed=1)
    items = drawn(session)
    assert len({len(item.prompt) for item in items}) > 1
    assert all(6 <= len(item.prompt) <= 120 for item in items)
    assert all(2 <= item.tokens <= 10 for item in items)
    assert [item.at for item in items] == [0.0] * 6


def test_windows_do_not_overlap(session):
    found = Text(session.llm.tokenizer).cuts([50, 90, 30, 90])
    assert list(map(len, found)) == [50, 90, 30, 90]
    assert len({tuple(ids) for ids in found}) == 4
    with pytest.raises(MeasureError, match="no window of 100000 tokens left after 1"):
        Text(session.llm.tokenizer).cuts([5, 100_000])


@pytest.mark.parametrize("arrivals", ["poisson", "bursty"])
def test_requests_come_at_the_rate_asked_for(session, arrivals):
    many = drawn(session, requests=400, prompt_tokens=2, spread=0, arrivals=arrivals, rate=5.0, burst=4.0)
    times = [item.at for item in many]
    assert times == sorted(times)
    assert times[0] == 0
    assert 400 / times[-1] == pytest.approx(5.0, rel=0.3)
    bursts = len(set(times))
    assert bursts == 400 if arrivals == "poisson" else 60 < bursts < 150


@pytest.mark.parametrize("arrivals", ["closed", "poisson"])
def test_everybody_is_served_in_order_of_arrival(session, arrivals):
    items = drawn(session, arrivals=arrivals, rate=300.0)
    most = 0
    submit = session.llm.engine.submit

    def watch(*args, **more):
        nonlocal most
        request = submit(*args, **more)
        most = max(most, len(session.llm.engine.requests))
        return request

    session.llm.engine.submit = watch
    served = play(session.llm.engine, items, arrivals, 2)
    assert [one.item for one in served] == items
    assert all(len(one.at) == one.item.tokens and one.first > 0 for one in served)
    if arrivals == "closed":
        assert most == 2
    found = summary(served, 1e-6, 4.0)
    assert found["generated"] == sum(item.tokens for item in items)
    assert found["missed_2"] == pytest.approx(1 - found["effective_2"] * found["seconds"] / 6)


def test_an_agreement_is_about_the_first_token_and_every_later_one():
    item = Item([1] * 100, 4, 0.0)
    even = Served(item, 10.0, at=[11.0, 11.2, 11.4, 11.6])
    assert even.meets(4, prompt_rate=400, patience=4)
    assert not even.meets(6, prompt_rate=400, patience=4)  # 5 tokens per second
    assert not even.meets(4, prompt_rate=400, patience=3.9)
    frozen = Served(item, 10.0, at=[10.1, 10.2, 10.3, 12.5])
    assert not frozen.meets(2, prompt_rate=400, patience=4)  # the average gap rises to 0.52 s
    assert Served(item, 10.0, at=[10.1, 10.2, 10.3, 12.3]).meets(2, prompt_rate=400, patience=4)
    with pytest.raises(MeasureError, match="second token"):
        summary([Served(item, 0.0, at=[1.0])], 1.0, 1.0)


def test_figures_and_quality_of_a_scheduler(tiny_plan, small_corpus):
    options = {**SMALL, "figure": "throughput"}
    with workloads.get("trace").open(tiny_plan(FastGen(budget=7)), options) as session:
        run = session.run()
        assert run.units == sum(item.tokens for item in session.items)
        assert run.seconds == run.detail["seconds"]
        assert session.quality() == 1.0
        assert session.facts()["step_budget"] == 7
        with pytest.raises(MeasureError, match="prompt_rate"):
            unloaded_rate(session.llm, [3])
