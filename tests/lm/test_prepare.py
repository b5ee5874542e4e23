"""Prepared folders: what goes in, what comes out again, what is refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hasten.attention.adamas import Adamas
from hasten.core.errors import ArtefactError, HastenError, PlanError
from hasten.core.plan import Plan
from hasten.core.technique import Technique
from hasten.lm import prepare as module
from hasten.lm.layers.sleb import SLEB
from hasten.lm.llm import LLM
from hasten.lm.prepare import prepare
from hasten.lm.prepared import Prepared
from hasten.lm.request import SamplingParams
from hasten.weights.gptq import GPTQ

pytestmark = pytest.mark.usefixtures("hasten_home")

TEXT = torch.randint(3, 320, (6, 70), generator=torch.Generator().manual_seed(3)).tolist()
GREEDY = SamplingParams(max_tokens=16, ignore_eos=True)
PROMPT = list(range(40, 90))
ALL = (
    SLEB(remove=1, samples=2, sample_length=24, evaluate="float32"),
    GPTQ(bits=4, group_size=16, samples=4, sample_length=32),
    Adamas(budget=24, dense_layers=1),
)


def plan(path: Path, *techniques: Technique, **engine: object) -> Plan:
    return Plan(str(path), techniques, "float32", {"page_size": 4, "max_step_tokens": 32, **engine})


def tokens(llm: LLM) -> tuple[int, ...]:
    return llm.generate([PROMPT], GREEDY)[0].token_ids


def digests(folder: Path) -> dict[str, dict[str, str]]:
    found = sorted((folder / "artefacts").glob("*/artefact.json"))
    return {path.parent.name: json.loads(path.read_text())["files"] for path in found}


@pytest.fixture
def prepared(tiny_path: Path, tmp_path: Path) -> Prepared:
    return prepare(plan(tiny_path, *ALL), tmp_path / "préparé", TEXT)


def test_a_prepared_folder_answers_as_the_plan_does(prepared: Prepared, tiny_path: Path) -> None:
    expected = tokens(LLM(plan(tiny_path, *ALL), calibration=TEXT))
    llm = LLM(prepared.folder)
    assert tokens(llm) == expected
    assert llm.plan.techniques == ALL
    assert llm.plan.engine["page_size"] == 4
    assert tokens(LLM(Plan(str(prepared.folder)))) == expected  # wherever a model can be named


def test_it_holds_all_it_needs_and_no_more(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tokens(LLM(prepared.folder))
    assert {name.rpartition("-")[0] for name in digests(prepared.folder)} == {
        "sleb",
        "gptq",
        "coordinate-spread",
    }
    elsewhere = tmp_path / "elsewhere"
    shutil.move(prepared.folder, elsewhere)
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path / "empty"))
    assert tokens(LLM(elsewhere)) == expected
    assert not list((tmp_path / "empty").rglob("artefact.json"))


def test_the_same_things_make_the_same_files(
    prepared: Prepared, tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path / "another home"))
    again = prepare(plan(tiny_path, *ALL), tmp_path / "again", TEXT)
    files, others = digests(prepared.folder), digests(again.folder)
    assert files.keys() == others.keys()
    for name, found in files.items():
        for file, digest in found.items():
            if file.startswith("block-"):  # a GPTQ block's header says how many seconds it took
                one, two = (load_file(p.folder / "artefacts" / name / file) for p in (prepared, again))
                assert one.keys() == two.keys()
                assert all(torch.equal(tensor, two[key]) for key, tensor in one.items())
            else:
                assert digest == others[name][file]
    assert again.provenance["request"] == prepared.provenance["request"]


def test_preparing_twice_keeps_the_folder(prepared: Prepared, tiny_path: Path) -> None:
    before = prepared.provenance
    assert prepare(plan(tiny_path, *ALL), prepared.folder, TEXT).provenance == before
    with pytest.raises(ArtefactError, match="another model or plan"):
        prepare(plan(tiny_path, Adamas(budget=8)), prepared.folder, TEXT)
    assert Prepared.at(str(prepared.folder)) is not None


def test_what_was_not_prepared_is_refused(prepared: Prepared) -> None:
    other = GPTQ(bits=3, group_size=16, samples=4, sample_length=32)
    with pytest.raises(ArtefactError, match=r"not prepared for this use of gptq.*hasten prepare"):
        LLM(prepared.folder, use=[other])
    with pytest.raises(ArtefactError, match="not prepared"):
        LLM(prepared.folder, calibration=TEXT[:3])
    # A setting that changes nothing of what was computed is free, and so is a technique that computes nothing.
    llm = LLM(prepared.folder, use=[Adamas(budget=64, dense_layers=1), "flash_attention"])
    assert [t.slug for t in llm.plan.techniques] == ["sleb", "gptq", "adamas", "flash_attention"]


def test_damage_is_named(prepared: Prepared, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(prepared.folder, tmp_path / name))

    cut = copy("cut")
    block = next((cut / "artefacts").glob("gptq-*/block-000.safetensors"))
    block.write_bytes(block.read_bytes()[:-8])
    with pytest.raises(ArtefactError, match=r"block-000\.safetensors is missing or damaged"):
        LLM(cut)
    gone = copy("gone")
    shutil.rmtree(gone / "model")
    with pytest.raises(ArtefactError, match="not in the folder"):
        LLM(gone)
    outside = copy("outside")
    text = (outside / "plan.toml").read_text()
    (outside / "plan.toml").write_text(text.replace('model = "model"', 'model = "../gone"'))
    with pytest.raises(ArtefactError, match="not in the folder"):
        LLM(outside)
    unreadable = copy("unreadable")
    (unreadable / "calibration.safetensors").write_bytes(b"\0" * 9)
    with pytest.raises(ArtefactError, match="calibration"):
        LLM(unreadable)
    (unreadable / "provenance.json").write_text("[]")
    with pytest.raises(ArtefactError, match=r"provenance\.json"):
        Prepared(unreadable).provenance["request"]


def test_bad_requests(tiny_path: Path, tmp_path: Path, prepared: Prepared) -> None:
    with pytest.raises(PlanError, match="no technique"):
        prepare(plan(tiny_path), tmp_path / "x")
    with pytest.raises(PlanError, match="prepared folder already"):
        prepare(plan(prepared.folder, Adamas()), tmp_path / "x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    with pytest.raises(ArtefactError, match="not a prepared folder"):
        prepare(plan(tiny_path, Adamas()), tmp_path / "full", TEXT)
    assert (tmp_path / "full" / "mine.txt").read_text() == "kept"
    with pytest.raises(HastenError, match="choose another folder"):
        prepare(plan(tiny_path, Adamas()), tmp_path / "full" / "mine.txt" / "below", TEXT)
    # Settings of the engine that exclude each other stay as they are.
    assert LLM(prepare(plan(tiny_path, Adamas(), kv_memory_mb=4), tmp_path / "y", TEXT).folder).plan.engine[
        "kv_memory_mb"
    ] == pytest.approx(4)


def test_a_failed_copy_leaves_nothing(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr(module, "_save_calibration", fail)
    with pytest.raises(HastenError, match="No space left"):
        prepare(plan(tiny_path, Adamas()), tmp_path / "out", TEXT)
    assert [p.name for p in tmp_path.iterdir() if p.name not in (".out.lock", "home")] == []


def test_a_killed_run_leaves_no_folder_and_the_next_one_succeeds(
    tiny_path: Path, tmp_path: Path, hasten_home: Path
) -> None:
    target = tmp_path / "out"
    code = (
        "import sys, time; from hasten.lm import prepare as m; from hasten.core.plan import Plan\n"
        "from hasten.attention.adamas import Adamas\n"
        "m._save_calibration = lambda *_: (print('copied', flush=True), time.sleep(60))\n"
        "m.prepare(Plan(sys.argv[1], (Adamas(),), 'float32'), sys.argv[2], [list(range(40))])\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tiny_path), str(target)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "copied\n"
    child.send_signal(signal.SIGKILL)
    child.wait(timeout=30)
    assert not target.exists()
    prepare(plan(tiny_path, Adamas()), target, TEXT)
    assert len(tokens(LLM(target))) == 16
    assert not target.with_name(".out.preparing").exists()
