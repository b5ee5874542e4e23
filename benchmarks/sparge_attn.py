"""Speed and quality of `sparge_attn` (acceptance 2, 4 and 6 of its specification): `python -m benchmarks.sparge_attn`.

``--attention`` and ``--quality`` as in `benchmarks.pbs_attn`, for rounding alone, block choice with and
without it, and the filter.
``--calibration``: calibrated heads on text they have not seen: error against its bound, sparsity, by layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.pbs_attn import Choose, Harness, Layer, arguments, density, measure, run
from hasten.attention.blocks import cached_of
from hasten.attention.dense import DenseKernel
from hasten.attention.pieces import Rows
from hasten.attention.policy import Dense
from hasten.attention.sparge_attn import HeadSettings, SpargeAttn, SpargePolicy, uniform
from hasten.attention.sparge_calibration import relative
from hasten.core.technique import Technique


def calibrated_case(case: Layer, policy: SpargePolicy) -> dict[str, Any]:
    """Error and sparsity by head of one layer."""
    kernel, rows = DenseKernel(), Rows.of(case.layout)
    plan = kernel.plan(case.layout)
    selection = policy.choose(0, case.layer, case.q_THD, cached_of(rows, 0, case.pages), case.spec)
    want, got = (
        kernel.run(plan, case.layer, case.q_THD, case.pages, case.layout, case.spec, choice).transpose(0, 1)
        for choice in (Dense(), (selection,))
    )
    heads = [
        1
        - density(
            type(selection)(0, selection.block, keep[None], query_block=selection.query_block),
            len(case.q_THD),
        )
        for keep in selection.keep_XQB
    ]
    return {
        "layer": case.layer,
        "sparsity": [round(x, 3) for x in heads],
        "error": [round(x, 4) for x in relative(got, want).tolist()],
        "skipped": selection.visits.share if selection.visits else 0.0,
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--calibration", action="store_true", help="calibrated heads on unseen text")
    args = parser.parse_args()
    if not (args.attention or args.quality or args.calibration):
        parser.error("nothing to measure: give --attention, --quality or --calibration")
    everything = {"mode": "cdf", "tau": 1.0, "theta": 1.0, "skip": 0.0}
    arms: list[Technique] = [
        SpargeAttn(**everything, bits=8),
        SpargeAttn(**everything, bits=12),
        SpargeAttn(bits=0, skip=0.0),
        SpargeAttn(),
        SpargeAttn(skip=20.0),
        SpargeAttn(topk=0.5),
    ]
    first = SpargeAttn()
    if args.calibration:
        first = SpargeAttn(mode="calibrated")
        arms.append(first)

    def records() -> Iterator[dict[str, Any]]:
        harness = Harness(first, args.model, args.tokens + args.scored)
        policy = harness.policy.inner
        assert isinstance(policy, SpargePolicy)
        tuned: HeadSettings = policy.heads

        def use(arm: Technique) -> Choose:
            assert isinstance(arm, SpargeAttn)
            policy.settings = arm
            policy.heads = tuned if arm.mode == "calibrated" else uniform(arm, *tuned.tau_LH.shape)
            return lambda layer, q, rows, pages, spec: policy.choose(
                0, layer, q, cached_of(rows, 0, pages), spec
            )

        if args.calibration:
            use(first)
            (_, ids), *_ = harness.texts(args.tokens, 1)
            found = [calibrated_case(case, policy) for case in harness.layers(ids, args.layers)]
            yield from found
            sparsity = torch.tensor([x for f in found for x in f["sparsity"]])
            yield {"layer": "all", "mean_sparsity": float(sparsity.mean())}
        yield from measure(args, harness, arms, use)

    run(args, records)


if __name__ == "__main__":
    main()
