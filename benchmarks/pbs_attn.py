"""Speed and quality of `pbs_attn` (acceptance 3-6 of its specification): `python -m benchmarks.pbs_attn --json FILE`.

``--attention``: the attention of single layers over a whole prompt, on the model's own queries and keys. Dense reads
everything; the technique chooses and reads. Same tensors, paired and interleaved (run it on a quiet machine), with
density (share of causal blocks read), relative L1 error, and what choosing costs as a share of dense attention.

``--quality``: a prompt read by the technique, then the tokens that follow it read densely, against the same with a
dense prompt: change of perplexity, mean KL divergence, density; and passkeys found.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.recording import record, recording
from hasten.attention.blocks import cached_of
from hasten.attention.dense import DenseKernel
from hasten.attention.layout import AttentionSpec, KVPages, StepLayout
from hasten.attention.pbs_attn import PbsAttn, PbsPolicy
from hasten.attention.pieces import Rows
from hasten.attention.policy import AttentionPolicy, BlockSelection, Dense, Selection
from hasten.core.plan import Plan
from hasten.core.technique import Technique
from hasten.lm.chunk import Chunk
from hasten.lm.llm import LLM
from hasten.lm.request import SamplingParams
from hasten.measure.environment import usable_cpus
from hasten.measure.statistics import median_interval
from hasten.workloads.passkey import passkeys
from hasten.workloads.text import Text

Choose = Callable[[int, Tensor, Rows, KVPages, AttentionSpec], BlockSelection]


@dataclass
class Layer:
    """What one layer's attention of a prompt gets."""

    layer: int
    q_THD: Tensor
    pages: KVPages
    layout: StepLayout
    spec: AttentionSpec


class Watched(AttentionPolicy):
    """Dense, or ``inner``; notes densities, and what the layers in ``watch`` were given."""

    def __init__(self, inner: AttentionPolicy) -> None:
        self.inner, self.sparse = inner, False
        self.watch: tuple[int, ...] = ()
        self.seen: list[Layer] = []
        self.density: list[float] = []

    def begin_step(self, layout: StepLayout) -> None:
        self.inner.begin_step(layout)

    def select(
        self, layer: int, q_THD: Tensor, pages: KVPages, layout: StepLayout, spec: AttentionSpec
    ) -> Selection:
        if layer in self.watch:
            kept = KVPages(pages.k_NGPD.clone(), pages.v_NGPD.clone())
            self.seen.append(Layer(layer, q_THD.contiguous().clone(), kept, layout, spec))
        if not self.sparse:
            return Dense()
        selection = self.inner.select(layer, q_THD, pages, layout, spec)
        if isinstance(selection, tuple):
            self.density += [density(part, q_THD.shape[0]) for part in selection]  # of a step of one sequence
        return selection


class Watch(Technique):
    """`Watched` over another technique's policy."""

    slug = "pbs_attn"
    slots = ("attention_policy",)
    lossless = False

    inner: Any

    def provide(self, slot: str, context: Any) -> AttentionPolicy:
        return Watched(self.inner.provide(slot, context))


def density(selection: BlockSelection, rows: int) -> float:
    """Share of the blocks before or at a query block that are read."""
    keep_XQB = selection.keep_XQB
    query = selection.query_block or selection.block
    last_Q = torch.arange(1, keep_XQB.shape[1] + 1) * query - 1
    visible_QB = torch.arange(keep_XQB.shape[2]) * selection.block <= last_Q[:, None].clamp_max(rows - 1)
    return float((keep_XQB & visible_QB).sum() / (visible_QB.sum() * keep_XQB.shape[0]))


class Harness:
    """A model whose prompts are read dense or by a policy's settings, whole in one step."""

    def __init__(self, technique: Technique, model: str, longest: int) -> None:
        engine = {"kv_tokens": longest + 64, "max_step_tokens": longest, "prefix_cache": False}
        self.llm = LLM(Plan.of([Watch(inner=technique)], model=model, engine=engine))
        policy = self.llm.engine.runner.policy
        assert isinstance(policy, Watched)
        self.policy = policy

    def texts(self, length: int, number: int) -> list[tuple[str, list[int]]]:
        placed = Text(self.llm.tokenizer).placed(length, number)
        return [(document.name, ids) for document, ids in placed]

    def read(self, ids: Sequence[int], prompt: int, sparse: bool) -> tuple[Tensor, float]:
        """(log probabilities after the prompt [T, V], mean density); the rest of ``ids`` is read densely."""
        engine, policy = self.llm.engine, self.policy
        kv = engine.cache.open(engine.new_id())
        assert engine.cache.reserve(kv, 0, len(ids))
        engine.cache.attach(kv)
        policy.sparse, policy.density = sparse, []
        engine.runner.run([Chunk(kv, 0, list(ids[:prompt]), range(prompt), 0)])
        policy.sparse = False
        rest = list(ids[prompt:])
        logits = engine.runner.run([Chunk(kv, prompt, rest, range(prompt, len(ids)), len(rest))])
        engine.cache.close(kv)
        engine.runner.forget(kv.id)
        return torch.log_softmax(logits.float(), -1), statistics.fmean(policy.density or [1.0])

    def layers(self, ids: Sequence[int], watch: Sequence[int]) -> list[Layer]:
        """What those layers were given while the prompt was read densely."""
        self.policy.watch, self.policy.seen = tuple(watch), []
        self.read([*ids, ids[0]], len(ids), False)
        self.policy.watch, found = (), self.policy.seen[: len(watch)]
        self.policy.seen = []
        return found


def attention_case(case: Layer, choose: Choose, rounds: int) -> dict[str, Any]:
    """Ratio of dense attention to choosing and reading, on one layer."""
    kernel, rows = DenseKernel(), Rows.of(case.layout)
    plan = kernel.plan(case.layout)

    def dense() -> Tensor:
        return kernel.run(plan, case.layer, case.q_THD, case.pages, case.layout, case.spec, Dense())

    def chosen() -> BlockSelection:
        return choose(case.layer, case.q_THD, rows, case.pages, case.spec)

    def sparse() -> Tensor:
        return kernel.run(plan, case.layer, case.q_THD, case.pages, case.layout, case.spec, (chosen(),))

    seconds: dict[str, list[float]] = {"dense": [], "choose": [], "sparse": []}
    want, got = dense(), sparse()
    for i in range(rounds):
        arms = [("dense", dense), ("choose", chosen), ("sparse", sparse)]
        for name, run in arms if i % 2 == 0 else arms[::-1]:
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    ratio = [d / s for d, s in zip(seconds["dense"], seconds["sparse"], strict=True)]
    return {
        "layer": case.layer,
        "tokens": case.q_THD.shape[0],
        "density": density(chosen(), case.q_THD.shape[0]),
        "error": float((got - want).abs().sum() / want.abs().sum()),
        "speedup": median_interval(ratio).to_dict() if rounds >= 6 else {"median": statistics.median(ratio)},
        "choosing": statistics.median(
            c / d for c, d in zip(seconds["choose"], seconds["dense"], strict=True)
        ),
        "dense_ms": 1e3 * min(seconds["dense"]),
    }


def continuation(harness: Harness, ids: list[int], prompt: int) -> Callable[[], dict[str, float]]:
    """A function that compares the policy as it is now with dense, on the tokens after the prompt."""
    dense_TV, _ = harness.read(ids, prompt, False)
    dense_TV, target_T1 = dense_TV[:-1], torch.tensor(ids[prompt + 1 :])[:, None]

    def compare() -> dict[str, float]:
        sparse_TV, share = harness.read(ids, prompt, True)
        sparse_TV = sparse_TV[:-1]
        loss = float((dense_TV - sparse_TV).gather(1, target_T1).mean())
        kl = float((dense_TV.exp() * (dense_TV - sparse_TV)).sum(-1).mean())
        return {"perplexity": math.expm1(loss), "kl": kl, "density": share}

    return compare


def found_passkeys(harness: Harness, length: int, texts: int) -> dict[str, int]:
    """How many dense finds, and how many of those are found by the policy as it is now."""
    known = kept = 0
    for prompt in passkeys(harness.llm.tokenizer, length, texts=texts):
        right = []
        for sparse in (False, True):
            harness.policy.sparse = sparse
            answer = harness.llm.generate(
                [list(prompt.token_ids)], SamplingParams(max_tokens=8, temperature=0)
            )
            right.append(prompt.found_in(answer[0].text))
        known, kept = known + right[0], kept + all(right)
    harness.policy.sparse = False
    return {"dense": known, "kept": kept}


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What both block-sparse benchmarks take."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the result there too")
    parser.add_argument("--attention", action="store_true", help="speed of single layers")
    parser.add_argument("--quality", action="store_true", help="perplexity, divergence, passkeys")
    parser.add_argument("--tokens", type=int, default=7936, help="of a prompt")
    parser.add_argument("--scored", type=int, default=256, help="tokens after it, of --quality")
    parser.add_argument("--texts", type=int, default=3)
    parser.add_argument("--passkeys", type=int, default=2, help="texts of five passkey prompts each; 0: none")
    parser.add_argument("--passkey-tokens", type=int, default=1536)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8, 14, 20, 26])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(usable_cpus()))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    return parser


def measure(
    args: argparse.Namespace, harness: Harness, arms: Sequence[Technique], use: Callable[[Technique], Choose]
) -> Iterator[dict[str, Any]]:
    """A record per measurement. ``use`` makes the policy follow an arm and gives its way to choose."""
    if args.attention:
        (_, ids), *_ = harness.texts(args.tokens, 1)
        for case in harness.layers(ids, args.layers):
            for arm in arms:
                yield {"arm": str(arm), **attention_case(case, use(arm), args.rounds)}
    if args.quality:
        found: dict[str, list[dict[str, float]]] = {str(arm): [] for arm in arms}
        for name, ids in harness.texts(args.tokens + args.scored, args.texts):
            compare = continuation(harness, ids, args.tokens)
            for arm in arms:
                use(arm)
                found[str(arm)].append(compare())
                yield {"text": name, "arm": str(arm), **found[str(arm)][-1]}
        for arm in arms:
            use(arm)
            values = {key: statistics.fmean(f[key] for f in found[str(arm)]) for key in found[str(arm)][0]}
            if args.passkeys:
                values |= found_passkeys(harness, args.passkey_tokens, args.passkeys)
            yield {"text": "mean", "arm": str(arm), **values}


def run(args: argparse.Namespace, records: Callable[[], Iterator[dict[str, Any]]]) -> None:
    """Print the records as they come, and write them all at the end."""
    with recording(args.threads, args.json) as result, torch.inference_mode():
        record(result, "records", records())


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--threshold", type=float, nargs="+", default=[0.8, 0.9, 0.95])
    args = parser.parse_args()
    if not (args.attention or args.quality):
        parser.error("nothing to measure: give --attention, --quality or both")
    arms = [PbsAttn(threshold=t, permute=p) for t in args.threshold for p in (True, False)]

    def records() -> Iterator[dict[str, Any]]:
        harness = Harness(PbsAttn(), args.model, args.tokens + args.scored)
        policy = harness.policy.inner
        assert isinstance(policy, PbsPolicy)

        def use(arm: Technique) -> Choose:
            assert isinstance(arm, PbsAttn)
            policy.settings = arm
            return lambda layer, q, rows, pages, spec: policy.choose(
                0, layer, q, cached_of(rows, 0, pages), spec
            )

        yield from measure(args, harness, arms, use)

    run(args, records)


if __name__ == "__main__":
    main()
