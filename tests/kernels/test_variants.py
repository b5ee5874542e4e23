"""Compiled variants: what is generated, how it is built and kept, and what is refused.

What the variants compute is tested in tests/acceptance/flashinfer.py. Here the compiler builds next to nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hasten.core.errors import UnsupportedError
from hasten.kernels import variants_build
from hasten.kernels.native import level, native
from hasten.kernels.schedule import Schedule
from hasten.kernels.variants import VANILLA, Batch, Variant, attend
from hasten.kernels.variants_build import CompileError, compiled
from hasten.kernels.variants_known import ALIBI, KNOWN, SIGMOID, SINKS

STUB = """
#include <cstdint>
extern "C" __attribute__((visibility("default"))) std::int64_t hasten_variant_size() { return NUMBER; }
extern "C" __attribute__((visibility("default"))) void hasten_variant_worker() {}
extern "C" __attribute__((visibility("default"))) void hasten_variant_join() {}
"""


def stub(number: int) -> str:
    """A variant that does nothing and compiles at once."""
    return STUB.replace("NUMBER", str(number))


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, hasten_home: Path) -> Path:
    """No variant is loaded yet, and the cache folder is empty."""
    monkeypatch.setattr(variants_build, "_LOADED", {})
    monkeypatch.delenv("CXX", raising=False)
    variants_build.compiler.cache_clear()
    yield hasten_home
    variants_build.compiler.cache_clear()


@pytest.fixture
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The compiler, through a script that writes a line per call that builds."""
    real = variants_build.compiler()
    assert real is not None
    variants_build.compiler.cache_clear()
    log, script = tmp_path / "calls", tmp_path / "counting-c++"
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] || echo call >> {log}\nexec {real[0]} "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(script))
    log.write_text("")
    return log


def calls(log: Path) -> int:
    return len(log.read_text().splitlines())


def inputs() -> tuple[Schedule, torch.Tensor, torch.Tensor, torch.Tensor]:
    one = np.array([0], np.int64)
    schedule = Schedule(
        one,
        np.array([0, 1]),
        one,
        np.array([0, 1]),
        one,
        one,
        np.array([3]),
        page_size=4,
        rows=1,
        heads=2,
        kv_heads=1,
        workers=1,
    )
    return schedule, torch.randn(1, 2, 8), torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8)


BATCH = Batch(*(torch.tensor(x, dtype=torch.int32) for x in ([0], [0, 1], [3])))


def test_built_once_and_kept(counting: Path, fresh: Path) -> None:
    first = compiled("stub", stub(3), "scalar")
    assert (first.call_size, calls(counting)) == (3, 1)
    assert compiled("stub", stub(3), "scalar") is first
    variants_build._LOADED.clear()
    assert compiled("stub", stub(3), "scalar").path == first.path
    assert calls(counting) == 1
    assert {p.suffix for p in first.path.parent.iterdir()} == {".so", ".cpp", ".lock", ".sha256"}


def test_another_source_level_or_compiler_builds_anew(
    counting: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {compiled("stub", stub(3), "scalar").path, compiled("stub", stub(4), "scalar").path}
    if "avx2" in level():
        paths.add(compiled("stub", stub(3), "avx2").path)
    before = len(paths)
    monkeypatch.delenv("CXX")
    variants_build.compiler.cache_clear()
    variants_build._LOADED.clear()
    paths.add(compiled("stub", stub(3), "scalar").path)
    assert len(paths) == before + 1


def test_changed_headers_build_anew(counting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compiled("stub", stub(3), "scalar").path
    variants_build._LOADED.clear()
    monkeypatch.setattr(variants_build, "_headers", lambda: ("other", str(variants_build.HEADERS)))
    assert compiled("stub", stub(3), "scalar").path != first


def _build(number: int) -> int:
    return compiled("stub", stub(number), "scalar").call_size


@pytest.mark.parametrize("keep", [0, 100, 4000])
def test_a_damaged_file_is_built_again(counting: Path, fresh: Path, keep: int) -> None:
    """Built by another process: what this one has loaded it would not load again."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.map(_build, [5]) == [5]
    (path,) = fresh.glob("variants/*.so")
    path.write_bytes(path.read_bytes()[:keep])
    assert compiled("stub", stub(5), "scalar").call_size == 5
    assert calls(counting) == 2


def test_processes_that_want_the_same_build_it_once(counting: Path) -> None:
    context = multiprocessing.get_context("fork")
    with context.Pool(4) as pool:
        assert pool.map(_build, [7] * 4, chunksize=1) == [7] * 4
    assert calls(counting) == 1


def test_no_compiler_is_said_and_plain_attention_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    schedule, q, k, v = inputs()
    with pytest.raises(UnsupportedError, match=r"'alibi'.*no C\+\+ compiler: `apt-get install g\+\+`"):
        attend(replace(ALIBI), schedule, q, k, v, 0.3, BATCH, slopes=torch.ones(2))
    out, lse = attend(VANILLA, schedule, q, k, v, 0.3, None, softcap=5.0)
    assert torch.isfinite(out).all()
    assert lse is not None


def test_a_variant_built_before_needs_a_compiler_only_to_be_named(counting: Path) -> None:
    """Another compiler would give another file; without one there is no way to know which."""
    compiled("stub", stub(3), "scalar")
    os.environ["CXX"] = "/nonexistent"
    os.environ["PATH"], kept = "", os.environ["PATH"]
    variants_build.compiler.cache_clear()
    try:
        assert compiled("stub", stub(3), "scalar").call_size == 3  # loaded in this process
    finally:
        os.environ["PATH"] = kept


def test_what_does_not_compile_is_quoted_with_the_functors_line(fresh: Path) -> None:
    wrong = Variant("wrong", logits_transform="float x = 1;\nreturn logit + undeclared;")
    with pytest.raises(CompileError, match=r"wrong\.logits_transform:2:.*undeclared"):
        wrong.compiled(torch.float32, "scalar")
    assert not list(fresh.glob("variants/*.so"))
    assert not list(fresh.glob("variants/.*"))


def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule, q, k, v = inputs()
    monkeypatch.setattr(Variant, "compiled", lambda *_: compiled("stub", stub(8), "scalar"))
    with pytest.raises(ValueError, match="another version of the kernels"):
        attend(SIGMOID, schedule, q, k, v, 0.3, BATCH, bias=0.0)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"name": "Ünicode"}, "variant name"),
        ({"name": "../evil"}, "variant name"),
        ({"name": ""}, "variant name"),
        ({"params": {"q": "float"}}, "cannot be called 'q'"),
        ({"params": {"logit": "float"}}, "cannot be called"),
        ({"params": {"kv_len": "float"}}, "cannot be called"),
        ({"params": {"2x": "float"}}, "cannot be called"),
        ({"params": {"x": "double"}}, "type 'double'; use one of float"),
        ({"use_softmax": False, "update": "d += 1;"}, "no maximum and sum"),
    ],
)
def test_bad_variants_are_refused(given: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Variant(**({"name": "x"} | given))


def test_bad_parameters_are_refused() -> None:
    schedule, q, k, v = inputs()

    def run(variant: Variant, batch: Batch | None = BATCH, **named: Any) -> None:
        attend(variant, schedule, q, k, v, 0.3, batch, **named)

    with pytest.raises(ValueError, match=r"takes the parameters \['slopes'\], not \[\]"):
        run(ALIBI)
    with pytest.raises(ValueError, match=r"takes the parameters none, not \['slopes'\]"):
        run(VANILLA, slopes=torch.ones(2))
    with pytest.raises(TypeError, match=r"slopes must be a torch.float32 tensor, not torch.float64"):
        run(ALIBI, slopes=torch.ones(2).double())
    with pytest.raises(TypeError, match="not list"):
        run(SINKS, sinks=[1.0])
    with pytest.raises(ValueError, match="contiguous"):
        run(ALIBI, slopes=torch.ones(4)[::2])
    with pytest.raises(ValueError, match="which request each row belongs to"):
        run(ALIBI, None, slopes=torch.ones(2))
    with pytest.raises(ValueError, match="into its logits_transform"):
        run(ALIBI, slopes=torch.ones(2), softcap=3.0)


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        (([0, 0], [0, 1], [3]), "entry per query row"),
        (([0], [0], [3]), "one entry more"),
        (([1], [0, 1], [3]), "do not include the row"),
        (([-1], [0, 1], [3]), "do not include the row"),
        (([0], [1, 1], [3]), "do not include the row"),
    ],
)
def test_bad_batches_are_refused(
    batch: tuple[list[int], ...], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule, q, k, v = inputs()
    size = native().variant_call_size  # checked before the batch
    monkeypatch.setattr(Variant, "compiled", lambda *_: compiled("stub", stub(size), "scalar"))
    with pytest.raises(ValueError, match=match):
        attend(
            SIGMOID,
            schedule,
            q,
            k,
            v,
            0.3,
            Batch(*(torch.tensor(x, dtype=torch.int32) for x in batch)),
            bias=0.0,
        )


@pytest.mark.parametrize("variant", KNOWN.values(), ids=lambda v: v.name)
def test_the_source_says_what_the_variant_is(variant: Variant) -> None:
    source = variant.source(torch.bfloat16)
    assert "HASTEN_VARIANT(Variant, std::uint16_t)" in source
    for name in variant.params:
        assert f" {name};" in source
    assert variant.source(torch.float32) != source
    assert not variant.prebuilt


def test_nothing_of_the_headers_needs_python() -> None:
    """Variants are compiled on machines without Python's or nanobind's headers."""
    assert native().level == level()
    for header in variants_build.HEADERS.glob("*.h"):
        assert "nanobind" not in header.read_text().replace("free of nanobind", "").replace(
            "Free of nanobind", ""
        )
