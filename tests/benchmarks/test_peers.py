"""`benchmarks.peers` with fake engines in real processes, and hasten's own engine on a tiny checkpoint."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.peers import __main__ as command
from benchmarks.peers import catalogue, files, rows
from benchmarks.peers.catalogue import OURS, EngineSpec, engines
from benchmarks.peers.engines.engine import Clock, Limits
from benchmarks.peers.jobs import CASES, Sizes, jobs
from benchmarks.peers.measure import Quality, QualityInput, Setup, qualities, run_job
from benchmarks.peers.progress import Progress
from lm_tiny import write_checkpoint

from hasten.core.errors import MeasureError, ModelError, NotBuiltError, UnknownNameError, UnsupportedError
from hasten.measure.environment import Busyness
from hasten.models.checkpoint import open_checkpoint

SMALL = Sizes(
    decode=(4, 8),
    prefill=(8, 16),
    long=16,
    batch=(2, 3),
    batch_prompt=5,
    prefix=6,
    questions=3,
    start=4,
    tokens=5,
)


def fake(kind: str, name: str | None = None, **more: object) -> EngineSpec:
    return EngineSpec(name or kind.lower(), f"peer_fakes:{kind}", None, "model", **more)


OUR_FAKE = fake("Fake", OURS.name)


def setup(tmp_path: Path, **more: object) -> Setup:
    files = {"model": "nowhere", "log": str(tmp_path / "log")}
    return Setup(**{"home": tmp_path, "files": files, "threads": 1, "timeout": 30.0, **more})


def inputs(job: object, runs: int) -> list[list[list[int]]]:
    shared = list(range(100, 100 + job.shared))
    rest = 1 if job.shared else job.length
    return [
        [
            shared + [run * 10 + prompt] * rest if shared else [run * 10 + prompt] * rest
            for prompt in range(job.prompts)
        ]
        for run in range(runs)
    ]


def measure(tmp_path: Path, job: object, *specs: EngineSpec, pairs: int = 6, **more: object):
    return run_job(
        job, [OUR_FAKE, *specs], inputs(job, pairs + 1), setup(tmp_path, **more), Progress(1, shown=False)
    )


def job_of(*cases: str, number: int = 0):
    return jobs(cases, SMALL)[number]


# -- what is asked ---------------------------------------------------------------------------------------------------


def test_cases_that_can_be_read_from_the_same_runs_share_a_job():
    found = {job.name: [f.case for f in job.figures] for job in jobs(sizes=SMALL)}
    assert found == {
        "single-4": ["decode"],
        "single-8": ["decode", "prefill"],
        "single-16": ["prefill", "long"],
        "batch-2": ["batch"],
        "batch-3": ["batch"],
        "shared": ["shared"],
        "fresh": ["start", "memory"],
    }


def test_default_sizes_are_those_of_the_targets():
    labels = [figure.label for job in jobs() for figure in job.figures]
    assert labels == [
        "decode, context 64",
        "decode, context 512",
        "prefill of 512",
        "prefill of 4096",
        "decode, context 4096",
        "decode, batch 16",
        "decode, batch 32",
        "16 questions on a shared prefix of 2048",
        "process start to first token",
        "peak memory of decoding",
    ]


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(UnknownNameError, match="'decode'"):
        jobs(["decod"])
    with pytest.raises(UnknownNameError, match="openvino"):
        engines(["openvin"])


def test_hasten_comes_first_and_once():
    assert [spec.name for spec in engines(["llama.cpp", "hasten", "llama.cpp"])] == ["hasten", "llama.cpp"]
    assert {spec.name for spec in engines()} == set(catalogue.ENGINES)


def test_every_peer_has_pinned_requirements():
    folder = catalogue.ROOT / "benchmarks" / "peers" / "requirements"
    for spec in engines():
        if spec.environment is not None:
            lines = (folder / f"{spec.environment}.txt").read_text().split()
            assert lines
            assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)


# -- the clock -------------------------------------------------------------------------------------------------------


def test_the_clock_starts_counting_when_every_prompt_has_its_first_token(monkeypatch):
    times = iter([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    clock = Clock(2, began=next(times))
    clock.hear(0, [7])
    clock.hear(0, [8])
    clock.hear(1, [5])  # the last first token: at 3
    clock.hear(0, [9])
    clock.hear(1, [6, 4])
    answer = clock.answer(3)
    assert answer.tokens == [[7, 8, 9], [5, 6, 4]]
    assert (answer.first, answer.total, answer.late) == (3.0, 5.0, 3)
    with pytest.raises(MeasureError, match="prompt 0 got 3 new tokens instead of 4"):
        clock.answer(4)


# -- runs and statistics ---------------------------------------------------------------------------------------------


def test_engines_run_in_turn_on_the_same_prompts(tmp_path):
    measured = measure(tmp_path, job_of("decode"), fake("Slow"), pairs=3)
    log = (tmp_path / "log").read_text().split("\n")[:-1]
    assert log[:2] == ["Fake load", "Slow load"]
    order = [(line.split()[0], int(line.split()[2])) for line in log[2:]]
    assert order == [
        *(("Fake", 0), ("Slow", 0)),  # warm-up
        *(("Slow", 10), ("Fake", 10)),
        *(("Fake", 20), ("Slow", 20)),
        *(("Slow", 30), ("Fake", 30)),
    ]
    assert [len(lane.runs) for lane in measured.lanes] == [3, 3]


def test_a_row_has_figure_ratio_and_quality(tmp_path):
    measured = measure(tmp_path, job_of("decode"), fake("Slow"))
    quality = {"hasten": Quality(1.0, 2.0), "slow": Quality(0.4, None, "shows no logits")}
    ours, slow, bound = rows.rows(measured, quality)
    assert (ours.value, slow.value) == (pytest.approx(100), pytest.approx(50))
    assert ours.ratio is None
    assert (slow.ratio.median, slow.ratio.low, slow.ratio.high) == pytest.approx((2, 2, 2))
    assert slow.ratio.pairs == slow.pairs == 6
    assert slow.alike == pytest.approx(2 / 5)
    assert slow.quality.agreement == 0.4
    assert slow.version == "fake 1"
    # 4 MB of weights and 10 kB for each of 4 + 2.5 tokens, at 1 GB/s
    assert bound.engine == rows.BOUND
    assert bound.value == pytest.approx(1e9 / (4e6 + 6.5e4))
    assert bound.ratio.median == pytest.approx(100 / bound.value)
    json.dumps([row.to_dict() for row in (ours, slow, bound)], allow_nan=False)


def test_a_job_of_two_cases_gives_both_figures(tmp_path):
    measured = measure(tmp_path, job_of("prefill", "long", number=1), fake("Slow"))
    found = {(row.case, row.engine): row for row in rows.rows(measured, {})}
    assert found["prefill", "slow"].value == pytest.approx(16 / 1.0)
    assert found["long", "slow"].value == pytest.approx(50)
    assert ("prefill", rows.BOUND) not in found
    assert ("long", rows.BOUND) in found


def test_batch_and_shared_count_all_tokens(tmp_path):
    batch, _ = rows.rows(measure(tmp_path, job_of("batch"), fake("Slow")), {})
    assert batch.value == pytest.approx(2 * 100)
    shared, _ = rows.rows(measure(tmp_path, job_of("shared"), fake("Slow")), {})
    assert shared.value == pytest.approx(3 * 5 / (0.5 + 4 * 0.01))


def test_prefix_caches_are_on_only_where_the_case_is_about_them(tmp_path):
    specs = [
        fake("Slow", prefix_cache="never"),
        fake("CannotBatch", prefix_cache="only shared"),
    ]
    measured = measure(tmp_path, job_of("decode"), *specs, pairs=1)
    assert [lane.spec.name for lane in measured.lanes] == ["hasten", "slow"]
    assert "True" not in (tmp_path / "log").read_text()
    (tmp_path / "log").unlink()
    measured = measure(tmp_path, job_of("shared"), *specs, pairs=1)
    assert [lane.spec.name for lane in measured.lanes] == ["hasten", "slow", "cannotbatch"]
    log = (tmp_path / "log").read_text()
    assert "Fake generate 100 3 6 True" in log
    assert "Slow generate 100 3 6 False" in log


def test_below_six_pairs_there_is_no_interval(tmp_path):
    _, slow, bound = rows.rows(measure(tmp_path, job_of("decode"), fake("Slow"), pairs=5), {})
    assert slow.value is not None
    assert slow.ratio is None
    assert bound.ratio is None


def test_start_and_memory_are_measured_in_fresh_processes(tmp_path):
    measured = measure(tmp_path, job_of("start", "memory"), fake("Slow"), pairs=2)
    assert (tmp_path / "log").read_text().count("load") == 6
    start, slow_start, memory, slow_memory = rows.rows(measured, {})
    assert start.unit == "ms"
    assert start.value > 500  # the fake's own half second to the first token, and the process before it
    assert slow_start.value - start.value > 250
    assert 1 < memory.value < 500
    assert 1 < slow_memory.value < 500
    assert measured.lanes[0].runs[0]["load_peak_mb"] > 1


# -- engines that fail -----------------------------------------------------------------------------------------------

FAILURES = {
    "Cannot": ("cannot", "reads no such weights"),
    "Dies": ("failed", r"was killed by SIGSEGV during generate; it printed:\nlast words"),
    "DiesLater": ("failed", "exited with code 3 during generate"),
    "Hangs": ("failed", "generate took longer than 1.5 s"),
    "Garbage": ("failed", r"generate was answered with b'\}\{ not json', which is no reply"),
    "Number": ("failed", "generate was answered with b'17', which is no reply"),
    "TooFew": ("failed", "single-4 was not answered with 1 x 5 tokens"),
    "NoTime": ("failed", r"single-4 took 0.0 s \(first\)"),
    "NaNTime": ("failed", r"single-4 took nan s \(first\)"),
    "Raises": ("failed", "generate failed: ValueError: bad sümething\nTraceback"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_an_engine_that_fails_has_a_row_that_says_how_and_leaves_the_others_alone(tmp_path, kind):
    state, reason = FAILURES[kind]
    timeout = 1.5 if kind == "Hangs" else 30.0
    measured = measure(tmp_path, job_of("decode"), fake(kind), fake("Slow"), timeout=timeout)
    ours, bad, slow, _ = rows.rows(measured, {})
    assert bad.state == state
    assert re.search(reason, bad.reason)
    assert not bad.reason.startswith(kind.lower())
    assert (bad.value, bad.ratio, bad.pairs, bad.alike) == (None, None, 0, None)
    assert ours.pairs == slow.pairs == 6
    assert slow.ratio.median == pytest.approx(2)
    rows.table([ours, bad, slow], "x")


def test_what_one_case_asks_too_much_another_may_not(tmp_path):
    _, single, _ = rows.rows(measure(tmp_path, job_of("decode"), fake("CannotBatch"), pairs=1), {})
    _, batch = rows.rows(measure(tmp_path, job_of("batch"), fake("CannotBatch"), pairs=1), {})
    assert single.state == "ok"
    assert (batch.state, batch.reason) == ("cannot", "one prompt at a time")


def test_an_engine_that_is_not_installed_says_how_to_install_it(tmp_path):
    spec = EngineSpec("absent", "peer_fakes:Fake", "absent", "model")
    _, absent, _ = rows.rows(measure(tmp_path, job_of("decode"), spec, pairs=1), {})
    assert absent.state == "missing"
    assert "make peers" in absent.reason
    half = tmp_path / "absent" / "bin"
    half.mkdir(parents=True)
    (half / "python").touch()  # an installation that was interrupted
    with pytest.raises(NotBuiltError, match="make peers"):
        spec.python(tmp_path)


def test_an_interpreter_that_does_not_start(tmp_path):
    folder = tmp_path / "broken"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").write_text("no program")
    (folder / ".installed").touch()
    spec = EngineSpec("broken", "peer_fakes:Fake", "broken", "model")
    _, row, _ = rows.rows(measure(tmp_path, job_of("decode"), spec, pairs=1), {})
    assert row.state == "failed"
    assert "python cannot be started" in row.reason


def test_weights_that_could_not_be_made_are_the_reason(tmp_path):
    spec = EngineSpec("needs ct2", "peer_fakes:Fake", None, "ct2")
    problems = {"ct2": MeasureError("the converter failed")}
    _, row, _ = rows.rows(measure(tmp_path, job_of("decode"), spec, pairs=1, problems=problems), {})
    assert (row.state, row.reason) == ("failed", "the converter failed")


def test_without_hasten_there_are_figures_but_no_ratios(tmp_path):
    job = job_of("decode")
    specs = [fake("Dies", OURS.name), fake("Slow")]
    measured = run_job(job, specs, inputs(job, 7), setup(tmp_path), Progress(1, shown=False))
    ours, slow = rows.rows(measured, {})
    assert ours.state == "failed"
    assert slow.value == pytest.approx(50)
    assert slow.ratio is None


# -- weights ---------------------------------------------------------------------------------------------------------


def test_the_same_weights_as_a_hugging_face_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_SHARD", 100_000)
    source = open_checkpoint(write_checkpoint(tmp_path / "tiny"))
    (tmp_path / "written").mkdir()
    files.write_hf(tmp_path / "written", source)
    written = open_checkpoint(tmp_path / "written")
    assert len(written.files()) > 2
    assert set(written.names()) == set(source.names())
    assert all(torch.equal(written.tensor(name), source.tensor(name)) for name in source.names())
    assert written.tokenizer().encode("the sea") == source.tokenizer().encode("the sea")


def test_models_that_are_no_gguf_file_are_said_to_be_none(tmp_path, monkeypatch, hasten_home):
    found = files.ModelFiles(str(write_checkpoint(tmp_path / "tiny")), tmp_path)
    found.prepare(engines())
    assert set(found.paths) == {"model", "hf"}
    assert "make peers" in str(found.problems["ct2"])
    with pytest.raises(UnsupportedError, match="reads gguf files and this model is none"):
        Limits(found.paths, threads=1, context=1).file("gguf")


def test_a_converter_that_fails_says_what_it_printed():
    with pytest.raises(MeasureError, match=r"(?s)failed with code 7:.*no such layer"):
        files._run([sys.executable, "-c", "import sys; print('no such layer', file=sys.stderr); sys.exit(7)"])


# -- quality ---------------------------------------------------------------------------------------------------------


def test_quality_is_agreement_with_the_reference_and_perplexity(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.peers.measure.REFERENCE", fake("Fake", "reference"))
    given = QualityInput([[1, 2], [3, 4]], 5, [[1, 2, 3, 4]], 2)
    specs = [OUR_FAKE, fake("Slow"), fake("Dies"), fake("Fake", "again", like="slow")]
    found = qualities(specs, given, setup(tmp_path), Progress(1, shown=False))
    assert list(found) == ["reference", "hasten", "slow", "dies"]
    assert found["hasten"].agreement == 1
    assert found["hasten"].perplexity == pytest.approx(2.718281828)
    assert found["slow"] == Quality(0.4, None, "shows no logits")
    assert found["dies"].agreement is None
    assert "SIGSEGV" in found["dies"].reason


def test_a_broken_reference_stops_everything(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.peers.measure.REFERENCE", fake("Cannot", "reference"))
    with pytest.raises(UnsupportedError, match="no such weights"):
        qualities([OUR_FAKE], QualityInput([[1]], 2, [[1, 2]], 1), setup(tmp_path), Progress(1, shown=False))


# -- the command -----------------------------------------------------------------------------------------------------


class NumberedPrompts:
    """Stands for the corpus: its tokens would be foreign to the tiny model."""

    def __init__(self, tokenizer: object) -> None:
        self.text = self

    def windows(self, length: int, number: int, *, skip: int = 0) -> list[list[int]]:
        return [[3 + (7 * i + j) % 300 for j in range(length)] for i in range(skip, skip + number)]

    def of(self, job: object, runs: int) -> list[list[list[int]]]:
        windows = self.windows(job.length, job.prompts * runs)
        return [windows[start : start + job.prompts] for start in range(0, len(windows), job.prompts)]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "Prompts", NumberedPrompts)
    return write_checkpoint(tmp_path / "tiny")


def test_hasten_itself_on_a_tiny_model(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(catalogue.ENGINES, "broken", fake("Raises", "broken"))
    monkeypatch.setitem(catalogue.ENGINES, "absent", EngineSpec("absent", "x:Y", "absent", "gguf"))
    out = tmp_path / "out.json"
    arguments = ["--cases", "batch", "--engines", "broken,absent", "--model", str(tiny), "--pairs", "1"]
    more = ["--threads", "1", "--allow-busy", "--json", str(out), "--peers", str(tmp_path)]
    sizes = Sizes(decode=(4,), batch=(3,), batch_prompt=8, tokens=6, quality=2)
    assert command.main([*arguments, *more], sizes) == 1
    record = json.loads(out.read_text())
    ours, broken, absent = record["rows"]
    assert (ours["engine"], ours["state"], ours["unit"]) == ("hasten", "ok", "tok/s")
    assert ours["value"] > 0
    assert (
        ours["quality"]["agreement"] == 1.0
    )  # bfloat16 KV pages, but the tiny model's logits are wide apart
    assert ours["quality"]["perplexity"] == pytest.approx(
        record["quality"]["reference"]["perplexity"], rel=0.05
    )
    assert broken["state"] == "failed"
    assert absent["state"] == "missing"
    assert record["model"] == "tiny"
    assert record["machine"]["threads"] == 1
    assert any("broken: generate failed" in reason for reason in record["unpublishable"])
    shown = capsys.readouterr()
    assert "decode, batch 3" in shown.out
    assert "absent: not installed" in shown.err


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (["--pairs", "0"], MeasureError, "--pairs 0: must be at least 1"),
        (["--tokens", "1"], MeasureError, "--tokens 1: must be at least 2"),
        (["--threads", "0"], MeasureError, "--threads 0"),
        (["--timeout", "nan"], MeasureError, "--timeout nan"),
        (["--cases", "décode"], UnknownNameError, "unknown case"),
        (["--engines", "vllm"], UnknownNameError, "unknown engine 'vllm'"),
        (["--model", "/nowhere/model.gguf", "--allow-busy"], ModelError, "no model folder or .gguf file"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, error, match):
    with pytest.raises(error, match=match):
        command.main(arguments)


def test_a_busy_machine_is_refused(monkeypatch):
    busy = Busyness(1.0, 0.7, 0.0, (("cc1plus", 7, 0.7),))
    monkeypatch.setattr("hasten.measure.environment.BusyMonitor.sample", lambda self: busy)
    with pytest.raises(MeasureError, match=r"busy.*cc1plus.*--allow-busy"):
        command.main(["--cases", "decode"])


def test_only_clean_records_are_published(tmp_path):
    record = {
        "model": "tiny model.gguf",
        "machine": {"cpu": "a CPU", "threads": 2},
        "commit": "c" * 40,
        "created": "2026-01-02T03:04:05+00:00",
        "quality": {"reference": {"perplexity": 12.5}},
        "unpublishable": ["decode, x: died"],
    }
    found = rows.rows(measure(tmp_path, job_of("decode"), fake("Slow"), fake("Cannot")), {})
    with pytest.raises(MeasureError, match="not published: decode, x: died"):
        command._publish(tmp_path / "out", record, found)
    assert not (tmp_path / "out").exists()
    command._publish(tmp_path / "out", {**record, "unpublishable": []}, found)
    text = (tmp_path / "out" / "peers-tiny-model.md").read_text()
    assert "| decode, context 4 | slow | 50 tok/s | 2.00x [2.00, 2.00] | – | – |" in text
    assert "| decode, context 4 | cannot | reads no such weights | – | – | – |" in text
    assert json.loads((tmp_path / "out" / "peers-tiny-model.json").read_text())["model"] == "tiny model.gguf"


def test_publishing_needs_committed_code_and_enough_pairs(monkeypatch):
    monkeypatch.setattr(command, "publishable_source", lambda: None)
    with pytest.raises(MeasureError, match="--pairs 5: a published figure needs at least 6"):
        command.main(["--pairs", "5", "--publish", "x"])


def test_every_case_is_described():
    text = (catalogue.ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert all(f"| `{case}` |" in text for case in CASES)
