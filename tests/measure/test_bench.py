import json
import sys

import pytest
from measure_fakes import HashJob, Quicker

from hasten import workloads
from hasten.catalog import loader
from hasten.core.errors import MeasureError, NotBuiltError, PlanError, SettingError, UnknownNameError
from hasten.core.plan import Plan
from hasten.measure import bench as module
from hasten.measure.bench import bench, publish, record_of
from hasten.measure.comparison import Comparison
from hasten.measure.environment import BusyMonitor, Busyness
from hasten.measure.store import ResultStore


@pytest.fixture
def catalogued(monkeypatch):
    """The fake technique and workload stand in the catalogue as ``quicker`` on ``hash``."""
    record = loader.Record(
        slug="quicker",
        title="Quicker hashing",
        source="nobody, 2026",
        family="lm",
        kind="fake",
        claim="2x",
        target="at least 1.5x",
        slots=("layer_hook",),
        lossless=False,
        state="experimental",
        technique="measure_fakes:Quicker",
        workload="hash",
    )
    planned = loader.Record(**{**record.to_dict(), "slug": "later", "state": "planned", "slots": ()})
    homeless = loader.Record(**{**record.to_dict(), "slug": "homeless", "workload": "fly", "slots": ()})
    neater = loader.Record(**{**record.to_dict(), "slug": "neater", "technique": "measure_fakes:Neater"})
    known = {r.slug: r for r in (record, planned, homeless, neater)}
    monkeypatch.setattr(loader, "records", lambda: known)
    monkeypatch.setitem(workloads._WORKLOADS, "hash", "measure_fakes:HashJob")
    sample = BusyMonitor.sample
    monkeypatch.setattr(BusyMonitor, "sample", lambda self: sample(self, 0.02))
    return record


HOW = {"pairs": 6, "threads": 1, "allow_busy": True, "progress": False, "options": {"rounds": 1000}}


def test_bench_runs_the_records_workload_with_the_settings(catalogued):
    (found,) = bench("quicker", {"quality": 11.0}, model="mine", **HOW)
    assert (found.system, found.workload, found.model) == ("quicker", "hash", "mine")
    assert (found.claim, found.target) == ("2x", "at least 1.5x")
    assert found.quality.candidate == 11.0
    assert found.plans["baseline"]["model"] == "mine"


def test_bench_against_every_baseline(catalogued, monkeypatch):
    monkeypatch.setattr(Quicker, "baselines", ({"dtype": "bfloat16"}, {"dtype": "float32"}), raising=False)
    found = list(bench("quicker", **HOW))
    assert [c.plans["baseline"]["dtype"] for c in found] == ["bfloat16", "float32"]
    assert {c.plans["candidate"]["dtype"] for c in found} == {"auto"}
    record = json.loads(json.dumps(record_of(found)))
    assert Comparison.from_dict(record) == found[0]
    assert [Comparison.from_dict(other) for other in record["others"]] == found[1:]
    (only,) = bench("quicker", against=[Plan(dtype="float32")], **HOW)
    assert only.plans["baseline"]["dtype"] == "float32"


def test_what_cannot_be_measured_is_refused_at_once(catalogued):
    with pytest.raises(UnknownNameError, match="did you mean 'quicker'"):
        bench("quickr")
    with pytest.raises(NotBuiltError, match="planned"):
        bench("later")
    with pytest.raises(NotBuiltError, match=r"workload 'fly'.*hasten compare WORKLOAD"):
        bench("homeless")
    with pytest.raises(UnknownNameError, match="factor"):
        bench("quicker", {"facter": 2})
    with pytest.raises(SettingError, match="factor"):
        bench("quicker", {"factor": "much"})


def test_publishing(another, tmp_path):
    quiet, noisy = another(unpublishable=()), another(unpublishable=("before the runs, cc1plus",))
    folder = tmp_path / "new" / "results"
    path = publish([quiet, another(unpublishable=())], folder)
    assert path == folder / "quicker.json"
    store = ResultStore(tmp_path / "r.sqlite")
    assert store.import_json(path) == 2
    assert store.all()[0] == quiet
    before = path.read_bytes()
    with pytest.raises(MeasureError, match=r"not published.*cc1plus"):
        publish([quiet, noisy], folder)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("state", "reason"), [((None, False), "no git checkout"), (("abc", True), "commit first")]
)
def test_only_committed_code_is_published(monkeypatch, state, reason):
    monkeypatch.setattr(module, "source_state", lambda: state)
    with pytest.raises(MeasureError, match=reason):
        module.publishable_source()


class TestCommands:
    """The commands themselves, in this process: `main` without the shell."""

    @pytest.fixture(autouse=True)
    def _home(self, monkeypatch, tmp_path):
        monkeypatch.setenv("HASTEN_HOME", str(tmp_path / "home"))

    def run(self, *arguments):
        from typer import Typer
        from typer.testing import CliRunner

        from hasten.cli.bench import bench
        from hasten.cli.compare import compare
        from hasten.cli.report import report

        app = Typer()
        for command in (bench, compare, report):
            app.command()(command)
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result

    quick = ("--pairs", 6, "--threads", 1, "--allow-busy", "--option", "rounds=1000")

    def test_bench_writes_json_stores_and_prints_a_table(self, catalogued, tmp_path):
        file = tmp_path / "out.json"
        shown = self.run("bench", "quicker", "--json", file, "--set", "quality=9.5", *self.quick).output
        record = json.loads(file.read_text())
        assert record["quality"]["candidate"] == 9.5
        assert record["options"] == {"rounds": 1000}
        assert ResultStore().all() == [Comparison.from_dict(record)]
        for text in (f"{record['speedup']['median']:.2f}x", "badness", "claim: 2x", "target: at least 1.5x"):
            assert text in shown

    def test_bench_json_to_standard_output_is_json_alone(self, catalogued):
        result = self.run("bench", "quicker", "--json", "-", *self.quick)
        assert json.loads(result.stdout)["system"] == "quicker"

    def test_publish_is_refused_before_measuring(self, catalogued, monkeypatch, tmp_path):
        monkeypatch.setattr(module, "bench", None)
        with pytest.raises(MeasureError, match="exclude each other"):
            self.run("bench", "quicker", "--publish", tmp_path, "--allow-busy")
        monkeypatch.setattr(module, "source_state", lambda: ("abc", True))
        with pytest.raises(MeasureError, match="commit first"):
            self.run("bench", "quicker", "--publish", tmp_path)

    def test_publish_is_refused_when_others_worked_during_the_runs(self, catalogued, monkeypatch, tmp_path):
        from hasten.measure import comparison

        monkeypatch.setattr(module, "source_state", lambda: ("abc", False))
        monkeypatch.setattr(comparison.BusyMonitor, "sample", lambda self: Busyness(1, 0, 0))
        busy = Busyness(1, 0.9, 0, (("cc1plus", 7, 0.9),))
        monkeypatch.setattr(comparison.BusyMonitor, "stop", lambda self: busy)
        with pytest.raises(MeasureError, match=r"not published.*cc1plus \(pid 7\)"):
            self.run("bench", "quicker", "--publish", tmp_path, "--pairs", 6, "--threads", 1)
        assert list(tmp_path.glob("*.json")) == []
        assert len(ResultStore().all()) == 1  # measured and kept all the same

    def test_compare(self, catalogued, tmp_path):
        file = tmp_path / "out.json"
        arguments = ["--use", "quicker:factor=3", "--against", "quicker:factor=1.5"]
        shown = self.run("compare", "hash", *arguments, "--json", file, *self.quick).output
        record = json.loads(file.read_text())
        assert record["plans"]["candidate"]["use"]["quicker"]["factor"] == 3
        assert record["plans"]["baseline"]["label"] == "quicker(factor=1.5)"
        assert "badness" in shown
        assert len(ResultStore().all()) == 1

    def test_compare_with_the_parts_of_a_plan(self, catalogued, tmp_path):
        file = tmp_path / "out.json"
        both = ["--use", "quicker:factor=3", "--use", "neater"]
        self.run("compare", "hash", *both, "--parts", "--json", file, *self.quick)
        first = json.loads(file.read_text())
        assert first["system"] == "quicker+neater"
        against = [c["plans"]["baseline"]["label"] for c in (first, *first["others"])]
        assert against == ["baseline", "quicker(factor=3.0)", "neater"]
        assert len({json.dumps(c["plans"]["candidate"]) for c in (first, *first["others"])}) == 1
        assert len(ResultStore().all()) == 3
        with pytest.raises(PlanError, match="name at least two"):
            self.run("compare", "hash", "--use", "quicker", "--parts", *self.quick)
        with pytest.raises(MeasureError, match="exclude each other"):
            self.run("compare", "hash", *both, "--publish", tmp_path, *self.quick)

    def test_compare_against_a_plan_file_and_a_dtype(self, catalogued, tmp_path):
        plan = tmp_path / "theirs.toml"
        plan.write_text('dtype = "float32"\n[engine]\nmax_batch = 3\n')
        file = tmp_path / "out.json"
        self.run("compare", "hash", "--use", "quicker", "--against", plan, "--json", file, *self.quick)
        assert json.loads(file.read_text())["plans"]["baseline"]["engine"] == {"max_batch": 3}
        self.run("compare", "hash", "--use", "quicker", "--against", "bfloat16", "--json", file, *self.quick)
        assert json.loads(file.read_text())["plans"]["baseline"]["dtype"] == "bfloat16"

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            (("compare", "hsh"), UnknownNameError, "did you mean 'hash'"),
            (("compare", "hash", "--use", "quickr"), UnknownNameError, "did you mean 'quicker'"),
            (("compare", "hash", "--use", "quicker:factr=1"), UnknownNameError, "factor"),
            (("compare", "hash", "--option", "rounds"), PlanError, "key=value"),
            (("compare", "hash", "--option", "=3"), PlanError, "key=value"),
            (("compare", "hash", "--against", "missing.toml"), PlanError, "no plan file"),
            (("compare", "hash", "--pairs", "5"), MeasureError, "too few"),
            (("bench", "nothing"), UnknownNameError, "nothing"),
            (("bench", "quicker", "--set", "factor"), PlanError, "key=value"),
            (("report", "--import", "missing.json"), MeasureError, "no file"),
        ],
    )
    def test_mistakes(self, catalogued, arguments, error, message):
        with pytest.raises(error, match=message):
            self.run(*arguments)

    def test_report(self, another, tmp_path):
        one, two = another(workload="a"), another(workload="b")
        for comparison in (one, two):
            ResultStore().add(comparison)
        page = tmp_path / "deep" / "page.html"
        assert "2 comparisons" in self.run("report", "-o", page).output
        assert page.read_text().count('id="row-') == 2
        found = json.loads(self.run("report", "--json", "--workload", "b").stdout)
        assert [Comparison.from_dict(record) for record in found] == [two]
        exported = tmp_path / "more.json"
        exported.write_text(json.dumps([another(workload="c").to_dict()]))
        assert len(json.loads(self.run("report", "--json", "--import", exported).stdout)) == 3

    def test_report_of_nothing(self, tmp_path):
        page = tmp_path / "page.html"
        self.run("report", "-o", page)
        assert "Nothing has been measured yet" in page.read_text()
        assert json.loads(self.run("report", "--json").stdout) == []

    def test_a_workload_given_as_a_path_in_the_child_is_the_registered_one(self, catalogued):
        assert type(workloads.get("hash")).__module__ == HashJob.__module__ == "measure_fakes"
        assert "measure_fakes" in sys.modules


class TestPublishing:
    """`benchmarks/publish.py`, which is not part of the package."""

    @pytest.fixture
    def script(self):
        import importlib.util
        from pathlib import Path

        path = Path(__file__).parents[2] / "benchmarks" / "publish.py"
        spec = importlib.util.spec_from_file_location("publish_script", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def test_table_shows_quality_beside_speed_and_skips_other_files(self, script, another, tmp_path):
        publish([another(unpublishable=()), another(unpublishable=(), system="quick|er")], tmp_path)
        (tmp_path / "kernels.json").write_text('{"arms": []}')
        (tmp_path / "list.json").write_text("[1]")
        assert script.main(["--table", "--results", str(tmp_path)]) == 0
        text = (tmp_path / "README.md").read_text()
        rows = [line for line in text.splitlines() if line.startswith("| quick")]
        assert len(rows) == 2
        assert all("badness 10 → 10.5 points (-5.00% worse)" in row for row in rows)
        assert r"quick\|er" in rows[1]

    def test_measures_publishes_and_goes_on_after_a_failure(
        self, script, catalogued, monkeypatch, tmp_path, capsys
    ):
        from hasten.measure import comparison

        monkeypatch.setenv("HASTEN_HOME", str(tmp_path / "home"))
        monkeypatch.setattr(module, "source_state", lambda: ("abc", False))
        monkeypatch.setattr(comparison, "_unpublishable", lambda *_: ())
        monkeypatch.setattr(comparison.BusyMonitor, "sample", lambda self: Busyness(1, 0, 0))
        results = tmp_path / "results"
        assert script.main(["later", "quicker", "--results", str(results), "--pairs", "6"]) == 1
        seen = capsys.readouterr()
        assert "later is planned" in seen.err
        assert "badness" in seen.out
        assert sorted(p.name for p in results.iterdir()) == ["README.md", "quicker.json"]
        assert script.measurable() == ["quicker", "neater"]

    def test_refuses_changed_code_before_measuring(self, script, monkeypatch, tmp_path):
        monkeypatch.setattr(module, "source_state", lambda: ("abc", True))
        with pytest.raises(MeasureError, match="commit first"):
            script.main(["quicker", "--results", str(tmp_path)])
