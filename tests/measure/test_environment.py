import subprocess
import sys

import pytest

from hasten.measure import environment
from hasten.measure.environment import BusyMonitor, Busyness, machine, pinned_cpus, source_state, usable_cpus

SPIN = "import time\nend = time.monotonic() + 20\nwhile time.monotonic() < end: pass"


def test_machine_facts_are_real():
    facts = machine(2, [0, 1]).to_dict()
    assert facts["cpu"]
    assert facts["memory_mb"] > 100
    assert facts["cpus"] == len(usable_cpus())
    assert facts["threads"] == 2
    assert facts["affinity"] == [0, 1]
    assert facts["versions"]["numpy"][0].isdigit()
    assert set(facts["instruction_sets"]) <= set(environment._ISA)


def test_describing_the_machine_does_not_import_torch():
    code = (
        "import sys, hasten; from hasten.measure.comparison import compare; assert hasten.compare is compare\n"
        "from hasten.measure import environment, report, store; environment.machine(1, [0]); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pins_one_thread_per_core_first(monkeypatch):
    assert set(pinned_cpus()) <= set(usable_cpus())
    assert len(pinned_cpus(1)) == 1
    assert pinned_cpus(10_000) == pinned_cpus(len(usable_cpus()))
    monkeypatch.setattr(environment, "usable_cpus", lambda: (0, 1, 2, 3))
    monkeypatch.setattr(
        environment.Path,
        "read_text",
        lambda path: "0,2" if "cpu0" in str(path) or "cpu2" in str(path) else "1,3",
    )
    assert pinned_cpus() == (0, 1)
    assert pinned_cpus(3) == (0, 1, 2)


def test_names_the_process_that_is_busy():
    monitor = BusyMonitor()
    # A grandchild whose parent has gone is not ours any more.
    start = "import subprocess as s, sys; p = s.Popen([sys.executable, '-c', sys.argv[1]], stdout=s.DEVNULL)"
    orphan = [sys.executable, "-c", f"{start}; print(p.pid)", SPIN]
    spinner = subprocess.Popen(orphan, stdout=subprocess.PIPE)
    pid = int(spinner.communicate()[0])
    try:
        seen = monitor.sample(1.5)
    finally:
        subprocess.run(["kill", str(pid)], check=True)
    assert seen.others > 0.2
    assert pid in [p for _, p, _ in seen.processes]
    assert any(f"pid {pid}" in reason for reason in seen.reasons)


def test_our_own_children_are_not_somebody_else():
    spinner = subprocess.Popen([sys.executable, "-c", SPIN])
    try:
        seen = BusyMonitor().sample(1.0)
    finally:
        spinner.kill()
        spinner.wait()
    assert spinner.pid not in [pid for _, pid, _ in seen.processes]


def test_our_own_children_that_ended_are_not_somebody_else(monkeypatch):
    """One lived before the window and ended within, after 5 + 3 s; one lived within it, for 2 s."""
    me, child, other = (1, 0.0), (2, 0.0), (3, 0.0)
    others = {other: ("cc1plus", 7.0)}
    before = environment._Snapshot(100.0, 0.0, {me: 1.0, child: 5.0}, 4.0, others)
    after = environment._Snapshot(106.5, 0.0, {me: 1.5}, 4.0 + 8.0 + 2.0, {other: ("cc1plus", 8.0)})
    snapshots, times = iter([before, after]), iter([0.0, 10.0])
    monkeypatch.setattr(environment, "_snapshot", lambda: next(snapshots))
    monkeypatch.setattr(environment.time, "monotonic", lambda: next(times))
    monitor = BusyMonitor()
    monitor.start()
    seen = monitor.stop()
    assert seen.others == pytest.approx(0.1)  # 6.5 s were used, 5.5 of them by us
    assert seen.processes == (("cc1plus", 3, 0.1),)


def test_stop_before_start():
    with pytest.raises(RuntimeError, match="before start"):
        BusyMonitor().stop()


def test_reasons():
    assert Busyness(1, 0.05, 0.02).reasons == ()
    assert "small or short-lived processes 0.70" in Busyness(1, 0.7, 0.0).reasons[0]
    assert "hypervisor took 0.30" in Busyness(1, 0.0, 0.3).reasons[0]
    both = Busyness(1, 0.9, 0.0, (("cc1plus", 7, 0.5),)).reasons[0]
    assert "cc1plus (pid 7) 0.50, small or short-lived processes 0.40" in both


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git repository with src/environment.py, taken for ours; returns a function that runs git in it."""
    source = tmp_path / "src" / "environment.py"
    source.parent.mkdir()
    source.write_text("x = 1\n")
    (tmp_path / "README").write_text("x\n")

    def git(*args):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    monkeypatch.setattr(environment, "__file__", str(source))
    return git


def test_commit_of_a_clean_and_a_dirty_tree(checkout, tmp_path):
    assert source_state() == (None, False)  # not even tracked: somebody else's repository
    checkout("add", "-A")
    checkout("commit", "-qm", "x")
    head = checkout("rev-parse", "HEAD")
    assert source_state() == (head, False)
    (tmp_path / "README").write_text("results change\n")
    assert source_state() == (head, False)
    (tmp_path / "src" / "new.py").write_text("")
    assert source_state() == (head, True)


def test_no_repository_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    assert source_state() == (None, False)
