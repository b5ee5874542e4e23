from typing import ClassVar

import pytest

from hasten import workloads
from hasten.core.errors import UnknownNameError
from hasten.core.technique import Technique
from hasten.workloads.baselines import baselines


class Format(Technique):
    slug: ClassVar[str] = "format"
    slots: ClassVar[tuple[str, ...]] = ("weight_format",)
    lossless: ClassVar[bool] = False


class Policy(Technique):
    slug: ClassVar[str] = "policy"
    slots: ClassVar[tuple[str, ...]] = ("attention_policy",)
    lossless: ClassVar[bool] = False


class Own(Policy):
    slug: ClassVar[str] = "own"
    baselines: ClassVar = ({"engine": {"prefix_cache": False}}, {"dtype": "float32", "model": "other"})


class Wrong(Policy):
    slug: ClassVar[str] = "wrong"
    baselines: ClassVar = ({"dtyp": "float32"},)


JOB = workloads.get("decode")


def test_a_policy_is_compared_with_the_default_plan():
    assert baselines(JOB, Policy) == (JOB.baseline(),)
    assert baselines(JOB, Policy, "m.gguf") == (JOB.baseline("m.gguf"),)


def test_a_weight_format_is_compared_with_dense_weights_first_and_the_stored_ones_too():
    plans = baselines(JOB, Format, "m.gguf")
    assert [plan.dtype for plan in plans] == ["bfloat16", "float32", "auto"]
    assert {plan.model for plan in plans} == {"m.gguf"}


def test_a_technique_may_bring_its_own():
    first, second = baselines(JOB, Own)
    assert first.engine == {"prefix_cache": False}
    assert first.model == JOB.baseline().model
    assert (second.dtype, second.model) == ("float32", "other")


def test_a_typo_in_its_own_is_refused():
    with pytest.raises(UnknownNameError, match="did you mean 'dtype'"):
        baselines(JOB, Wrong)
