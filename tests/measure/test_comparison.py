import json
import os
import time

import measure_fakes
import psutil
import pytest
from measure_fakes import HashJob, Quicker

from hasten.core.errors import ConflictError, MeasureError, ModelError, UnknownNameError
from hasten.core.plan import Plan
from hasten.measure import comparison as module
from hasten.measure.comparison import Comparison, Quality, compare
from hasten.measure.environment import BusyMonitor, Busyness
from hasten.measure.statistics import Stopping

# The keys that the JSON of `hasten bench` and `hasten compare` promises.
PROMISED = [
    *("system", "workload", "plans", "speedup", "quality", "memory"),
    *("claim", "target", "machine", "commit"),
]


@pytest.fixture(autouse=True)
def short_look(monkeypatch):
    """Watch the machine for a moment instead of a second before each measurement."""
    sample = BusyMonitor.sample
    monkeypatch.setattr(module.BusyMonitor, "sample", lambda self: sample(self, 0.02))


def fake(technique=None, **kwargs):
    kwargs = {"pairs": 6, "threads": 1, "allow_busy": True, "progress": False, **kwargs}
    kwargs["options"] = {"rounds": 2000, **kwargs.get("options", {})}
    return compare(HashJob(), Plan(model="none", techniques=(technique or Quicker(),)), **kwargs)


def test_measures_a_real_difference(measured):
    assert measured.speedup.pairs == 6
    assert 1.2 < measured.speedup.median < 3.5  # half the work, on a machine that may be busy
    assert measured.speedup.low <= measured.speedup.median <= measured.speedup.high
    assert measured.quality == Quality("badness", 10.0, 10.5, "lower", "points")
    assert measured.system == "quicker"
    assert measured.label("candidate") == "quicker"
    assert measured.label("baseline") == "baseline"


def test_json_has_the_promised_shape(measured):
    data = json.loads(json.dumps(measured.to_dict()))
    for key in PROMISED:
        assert key in data
    assert set(data["speedup"]) == {"median", "low", "high", "pairs"}
    assert {"metric", "baseline", "candidate", "better"} <= set(data["quality"])
    assert set(data["memory"]) == {"baseline_mb", "candidate_mb"}
    assert len(data["runs"]["baseline"]["seconds"]) == len(data["runs"]["candidate"]["units"]) == 6
    assert data["machine"]["cpu"]
    assert data["machine"]["versions"]["torch"]
    assert data["plans"]["candidate"]["use"]["quicker"]["factor"] == 2.0
    assert Comparison.from_dict(data) == measured


def test_runs_are_interleaved_abba_after_the_warm_up(tmp_path):
    log = tmp_path / "order"
    result = fake(warmup=2, options={"log": str(log)})
    order = [line[0] for line in log.read_text().splitlines()]
    assert "".join(order) == "bc" * 2 + "bccb" * 3
    assert result.runs["first"] == ["baseline", "candidate"] * 3


def test_each_side_has_its_own_pinned_process(measured):
    facts = measured.facts
    assert facts["baseline"]["pid"] != facts["candidate"]["pid"]
    assert os.getpid() not in (facts["baseline"]["pid"], facts["candidate"]["pid"])
    for side in facts.values():
        assert side["threads"] == "1"
        assert side["affinity"] == measured.machine["affinity"]
        assert not psutil.pid_exists(side["pid"])


def test_memory_is_the_peak_of_the_runs_per_side():
    result = fake(options={"run_mb": 150})
    assert 130 < result.memory.candidate_mb - result.memory.baseline_mb < 200
    assert result.loading_mb["candidate"] < result.memory.candidate_mb - 100


def test_adaptive_stopping_measures_more_pairs_until_the_limit():
    result = fake(pairs=None, stopping=Stopping(max_pairs=9, half_width=0))
    assert result.speedup.pairs == 9


@pytest.mark.parametrize("step", ["open", "run", "quality"])
def test_a_failing_job_shows_its_traceback(step):
    with pytest.raises(MeasureError, match=rf"(?s)candidate \(quicker\): {step} failed.*went wrong.*_fail"):
        fake(options={f"{step}_failure": "raise"})


def test_errors_of_a_side_keep_their_class():
    with pytest.raises(ModelError, match=r"candidate.*no tokenizer\.json") as caught:
        fake(options={"open_failure": "model"})
    assert caught.value.exit_code == 4
    with pytest.raises(UnknownNameError, match="did you mean 'tokens'"):
        fake(options={"open_failure": "name"})


def test_a_crash_is_reported_with_the_last_words():
    with pytest.raises(MeasureError, match=r"(?s)exited with code 7 during run.*last words é"):
        fake(options={"run_failure": "exit"})
    with pytest.raises(MeasureError, match="killed by SIGSEGV during run"):
        fake(options={"run_failure": "segfault"})


def test_a_hang_ends_at_the_timeout_and_leaves_nothing_behind():
    began = time.monotonic()
    with pytest.raises(MeasureError, match="run took longer than 3 s"):
        fake(options={"run_failure": "hang", "sleeper": True}, timeout=3)
    assert time.monotonic() - began < 30
    while _sleepers():
        assert time.monotonic() - began < 30


def test_broken_quality_is_refused():
    with pytest.raises(MeasureError, match="quality is nan"):
        fake(options={"nan": True})


@pytest.mark.parametrize("pairs", [-1, 0, 1, 5])
def test_too_few_pairs_are_refused_before_any_work(pairs, monkeypatch):
    monkeypatch.setattr(module, "SessionProcess", None)
    with pytest.raises(MeasureError, match="too few"):
        fake(pairs=pairs)


def test_bad_plans_are_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(module, "SessionProcess", None)
    with pytest.raises(ConflictError, match="used twice"):
        compare(HashJob(), Plan(techniques=(Quicker(), Quicker())))
    with pytest.raises(UnknownNameError, match="long-decode"):
        compare("long-decod")
    with pytest.raises(UnknownNameError, match="dtype"):
        compare(HashJob(), against=Plan(dtype="float23"))
    with pytest.raises(MeasureError, match="threads = 0"):
        fake(threads=0)
    with pytest.raises(MeasureError, match="warm-up"):
        fake(warmup=0)
    with pytest.raises(MeasureError, match="not both"):
        compare(HashJob(), Plan(), use=["gptq"])


def test_a_class_no_other_process_can_import_is_refused():
    class Local(Quicker):
        slug = "local"

    with pytest.raises(MeasureError, match="top level of a module"):
        fake(Local())


BUSY = Busyness(1.0, 0.8, 0.0, (("cc1plus", 4711, 0.75),))


def test_a_busy_machine_is_refused_with_names(monkeypatch):
    monkeypatch.setattr(module.BusyMonitor, "sample", lambda self: BUSY)
    with pytest.raises(MeasureError, match=r"cc1plus \(pid 4711\) 0.75.*--allow-busy"):
        fake(allow_busy=False)


def test_allow_busy_marks_the_record(monkeypatch):
    monkeypatch.setattr(module.BusyMonitor, "sample", lambda self: BUSY)
    result = fake()
    assert any("cc1plus" in reason for reason in result.unpublishable)
    assert result.busy["before"]["reasons"]


def test_becoming_busy_during_the_runs_marks_the_record(monkeypatch):
    quiet = Busyness(1.0, 0.0, 0.0)
    monkeypatch.setattr(module.BusyMonitor, "sample", lambda self: quiet)
    monkeypatch.setattr(module.BusyMonitor, "stop", lambda self: BUSY)
    assert any(r.startswith("during the runs") for r in fake(allow_busy=False).unpublishable)


def test_unusual_settings_reach_the_child():
    result = fake(Quicker(note='naïve "quoted"\n🙂', quality=11))
    assert result.plans["candidate"]["use"]["quicker"]["note"] == 'naïve "quoted"\n🙂'
    assert result.quality.candidate == 11


@pytest.mark.parametrize(
    ("better", "baseline", "candidate", "change"),
    [
        ("lower", 10, 9, 0.1),
        ("lower", 10, 11, -0.1),
        ("higher", 0.5, 0.25, -0.5),
        ("higher", 0, 1, None),
        ("lower", 0, 0, 0),
    ],
)
def test_quality_change_is_positive_when_better(better, baseline, candidate, change):
    quality = Quality("m", baseline, candidate, better)
    assert quality.change == (None if change is None else pytest.approx(change))


def test_headline_never_shows_a_ratio_without_quality(measured):
    assert "badness 10 → 10.5 points (-5.00% worse)" in measured.headline()
    assert f"{measured.speedup.median:.2f}x" in measured.headline()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speedup": {"median": 2.0}}, "speedup.low"),
        ({"speedup": {"median": "fast", "low": 1, "high": 2, "pairs": 6}}, "speedup.median"),
        ({"speedup": {"median": -1, "low": 1, "high": 2, "pairs": 6}}, "speedup.median"),
        ({"quality": None}, "quality"),
        (
            {"quality": {"metric": "m", "baseline": float("nan"), "candidate": 1, "better": "lower"}},
            "baseline",
        ),
        ({"quality": {"metric": "m", "baseline": 1, "candidate": 1, "better": "faster"}}, "better"),
        ({"id": ""}, "id"),
        ({"format": 99}, "format 99"),
    ],
)
def test_malformed_records_are_refused(measured, change, message):
    with pytest.raises(MeasureError, match=message):
        Comparison.from_dict({**measured.to_dict(), **change})


@pytest.mark.parametrize("data", [None, [], "text", 3, {}])
def test_what_is_no_record_is_refused(data):
    with pytest.raises(MeasureError):
        Comparison.from_dict(data)


def _sleepers():
    return [
        p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", measure_fakes.SLEEP]
    ]
