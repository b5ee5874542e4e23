"""What happens to the children when the measuring process ends in ways it did not choose."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hasten.core.errors import MeasureError
from hasten.measure.process import SessionProcess

HERE = Path(__file__).parent

_MEASURE = """
import sys
sys.path.insert(0, {here!r})
from measure_fakes import HashJob, Quicker
from hasten.core.plan import Plan
from hasten.measure.comparison import compare
compare(HashJob(), Plan(techniques=(Quicker(),)), pairs=6, threads=1, allow_busy=True, progress=False,
        options={{"run_failure": "hang", "hung": {hung!r}}})
"""


def _start_hanging(tmp_path):
    hung = tmp_path / "hung"
    code = _MEASURE.format(here=str(HERE), hung=str(hung))
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (hung.exists() and hung.read_text()):
        assert time.monotonic() < deadline, "the measurement did not start"
        assert parent.poll() is None, parent.stderr.read()
        time.sleep(0.05)
    return parent, int(hung.read_text())


def _gone(pid):
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_child_outlives_its_parent(tmp_path, how):
    parent, child = _start_hanging(tmp_path)
    children = [c.pid for c in psutil.Process(parent.pid).children()]
    assert child in children
    assert len(children) == 2
    os.kill(parent.pid, how)
    _, errors = parent.communicate(timeout=20)
    assert all(_gone(pid) for pid in children)
    if how == signal.SIGINT:
        assert b"KeyboardInterrupt" in errors
        assert parent.returncode != 0


def test_using_a_process_that_is_not_running():
    side = SessionProcess("candidate", threads=1)
    with pytest.raises(MeasureError, match="not running"):
        side.run()


def test_running_before_opening():
    with (
        SessionProcess("candidate", threads=1) as side,
        pytest.raises(MeasureError, match="no session is open"),
    ):
        side.run()


def test_killed_between_commands():
    with SessionProcess("baseline", threads=1) as side:
        with pytest.raises(MeasureError, match="no session"):
            side.run()
        os.kill(side.pid, signal.SIGKILL)
        with pytest.raises(MeasureError, match="killed by SIGKILL"):
            side.run()
