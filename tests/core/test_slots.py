"""The table of slots: names, interfaces and the error for a wrong name."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hasten.core.errors import UnknownNameError
from hasten.core.slots import SLOTS, slot


def test_every_slot_is_found_under_its_name():
    for name, found in SLOTS.items():
        assert slot(name) is found
        assert str(found) == found.name == name
        assert found.question
        assert found.interface is None or found.interface.count(":") == 1


def test_a_wrong_name_suggests_the_nearest():
    with pytest.raises(UnknownNameError, match=r"unknown slot 'kv_fromat'; did you mean 'kv_format'"):
        slot("kv_fromat")


def test_only_the_language_model_engine_has_interfaces():
    assert {found.engine for found in SLOTS.values() if found.interface} == {"lm"}


def test_core_does_not_import_torch():
    code = (
        "import sys, hasten.core.plan, hasten.core.artefact, hasten.core.fetch, hasten.core.corpus, "
        "hasten.catalog.loader; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
