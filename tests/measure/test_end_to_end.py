"""The whole road on the real model: command, child processes, engine, record. Small, and not about speed."""

import json
import os
import subprocess
import sys

import pytest

from hasten.measure.comparison import Comparison
from hasten.measure.store import ResultStore

OPTIONS = ["prompt_tokens=[16]", "tokens=4", "quality_texts=1", "quality_context=8", "quality_tokens=16"]


@pytest.mark.model
@pytest.mark.corpus
def test_compare_command_on_the_default_model(default_model_path, documentation, tmp_path):
    out, store = tmp_path / "out.json", tmp_path / "results.sqlite"
    command = [sys.executable, "-m", "hasten.cli.main", "compare", "decode", "--dtype", "float32"]
    command += ["--against", "bfloat16", "--pairs", "6", "--threads", "1", "--allow-busy"]
    command += ["--json", str(out), "--store", str(store)]
    for option in OPTIONS:
        command += ["--option", option]
    environment = {**os.environ, "COLUMNS": "160"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    record = Comparison.from_dict(json.loads(out.read_text()))
    assert ResultStore(store).all() == [record]
    assert record.speedup.pairs == 6
    assert record.speedup.median > 0
    # float32 and bfloat16 storage of the same weights: nearly the same perplexity, unlike memory.
    assert record.quality.candidate == pytest.approx(record.quality.baseline, rel=0.05)
    assert 2 < record.quality.candidate < 200
    assert record.facts["candidate"]["greedy_agreement"] == 1.0
    assert (
        record.facts["candidate"]["weight_bytes_per_token"]
        > record.facts["baseline"]["weight_bytes_per_token"]
    )
    assert record.memory.candidate_mb > record.memory.baseline_mb > 200
    assert f"{record.speedup.median:.2f}x" in done.stdout
    assert "perplexity" in done.stdout
