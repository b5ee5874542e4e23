from collections import Counter

import pytest

from hasten.core.errors import MeasureError
from hasten.lm.scheduling.prefix_tree import Entry, PrefixTree
from hasten.lm.scheduling.resources import Rates
from hasten.workloads.mixes import Kind, job, saved, synthetic

RATES = Rates(token=2e-3, pair=6.5e-7, read=2e-5)
KINDS = {"classify": Kind(600, 8), "write": Kind(60, 300)}


@pytest.mark.parametrize(("density", "sharing"), [(1.4, 0.35), (0.9, 0.05)])
def test_a_job_has_the_density_and_sharing_asked_for(density, sharing):
    shapes = job(RATES, requests=300, density=density, sharing=sharing, **KINDS)
    assert shapes == job(RATES, requests=300, density=density, sharing=sharing, **KINDS)
    assert len(shapes) == 300
    assert saved(shapes) / sum(shape.prompt for shape in shapes) == pytest.approx(sharing, abs=0.01)
    tree = PrefixTree([Entry(one.prompt, float(one.output)) for one in synthetic(shapes, template=2)])
    tree.cost(RATES)
    assert tree.root.density == pytest.approx(density, rel=0.06)  # instructions are shared too
    assert tree.root.saved / sum(shape.prompt for shape in shapes) == pytest.approx(sharing, abs=0.02)


def test_prompts_share_their_kind_and_their_group_only():
    shapes = job(RATES, requests=40, writing=0.5, sharing=0.2, group=4, **KINDS)
    assert sum(shape.group < 0 for shape in shapes) == 20
    assert set(Counter(s.group for s in shapes if s.group >= 0).values()) == {4}
    made = synthetic(shapes)
    assert [len(one.prompt) for one in made] == [shape.prompt for shape in shapes]
    for a, one in zip(shapes, made, strict=True):
        for b, other in zip(shapes, made, strict=True):
            if one is not other:
                common = next(
                    i for i, (x, y) in enumerate(zip(one.prompt, other.prompt, strict=False)) if x != y
                )
                same = a.group == b.group >= 0
                assert common == (a.shared if same else 16 if (a.group < 0) == (b.group < 0) else 0)


def test_impossible_mixes_are_refused():
    with pytest.raises(MeasureError, match="density 1000 cannot be had"):
        job(RATES, requests=20, density=1000, sharing=0.1, **KINDS)
    with pytest.raises(
        MeasureError, match=r"sharing 0\.9 cannot be had in this mix: its prompts share at most 0\.\d+"
    ):
        job(RATES, requests=20, sharing=0.9, **KINDS)
    with pytest.raises(MeasureError, match=r"sharing 0\.1 cannot be had"):
        job(RATES, requests=20, writing=1.0, sharing=0.1, **KINDS)
