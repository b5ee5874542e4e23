"""Speed and quality of `adamas` (acceptance 3 and 5 of its specification): `python -m benchmarks.adamas --json FILE`.

``--attention``: one layer's attention of one decode step. Dense reads every token; adamas appends the key's code,
encodes the query, selects and attends. Same tensors, paired and interleaved; run it on a quiet machine.

``--quality``: windows of real text against dense attention, by policy, selection and budget. The last ``--scored``
tokens of a window are decode rows: each row's attention reads what the policy chose for it. They run as one chunk,
which gives the logits of decoding them one by one (a layer's keys depend only on the rows themselves), in a fraction
of the time. Policies: adamas; quest (pages of 16, per query head); exact (the tokens with the highest true scores).
Windows come from the test split of the corpus (documents in corpus order), or from plain text files (``--text FILE``).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.hydragen import decode_layout, random_pages
from benchmarks.recording import record, recording
from hasten.attention.adamas import SIDECAR, Adamas, AdamasPolicy
from hasten.attention.dense import DenseKernel
from hasten.attention.layout import AttentionSpec, HeadShape, KVPages, StepLayout
from hasten.attention.policy import AttentionPolicy, Dense, Selection, SidecarSpec, TokenSelection
from hasten.attention.quest import Quest, QuestPolicy
from hasten.core.plan import Plan
from hasten.core.technique import Technique
from hasten.kernels import codes
from hasten.lm.build import Loaded, load
from hasten.lm.chunk import Chunk
from hasten.lm.kvcache.cache import SequenceKV
from hasten.measure.environment import usable_cpus
from hasten.measure.statistics import median_interval
from hasten.workloads.text import Text

SHAPE = HeadShape(9, 3, 64)
SELECT = ("per_head", "group")
ROWS = 64  # query rows at a time where scores of all tokens are made


# -- attention of one layer ---------------------------------------------------------------------------------------


def attention_case(select: str, context: int, budget: int, rounds: int) -> dict[str, Any]:
    """How much faster adamas' attention of one layer is than dense, at the end of ``context`` tokens."""
    layer, cut = 2, torch.full((3,), 0.67)
    spec = AttentionSpec(SHAPE, SHAPE.size**-0.5)
    layout = decode_layout([torch.randperm(context // 32).tolist()])
    pages = random_pages(context // 32, SHAPE, torch.bfloat16)
    policy = AdamasPolicy(Adamas(budget=budget, select=select), 3, SHAPE.heads, SHAPE.size, cut, cut)
    sidecar = torch.empty(*pages.k_NGPD.shape[:3], SHAPE.size // 4, dtype=torch.uint8)
    keys = pages.k_NGPD.float().transpose(1, 2).reshape(-1, SHAPE.kv_heads, SHAPE.size)
    codes.hadamard_append(keys, 0.67, sidecar, torch.arange(context))
    policy.bind({SIDECAR: {layer: sidecar}})
    q, k = torch.randn(1, SHAPE.heads, SHAPE.size), torch.randn(1, SHAPE.kv_heads, SHAPE.size)
    kernel = DenseKernel()
    plan = kernel.plan(layout)
    policy.begin_step(layout)

    def sparse() -> None:
        policy.on_append(layer, k, layout)
        selection = policy.select(layer, q, pages, layout, spec)
        kernel.run(plan, layer, q, pages, layout, spec, selection)

    dense = partial(kernel.run, plan, layer, q, pages, layout, spec, Dense())
    seconds = interleaved({"dense": dense, "adamas": sparse}, rounds)
    ratio = median_interval([d / s for d, s in zip(seconds["dense"], seconds["adamas"], strict=True)])
    return {
        "select": select,
        "context": context,
        "budget": budget,
        "median_us": {name: 1e6 * statistics.median(values) for name, values in seconds.items()},
        "speedup": ratio.to_dict(),
    }


def interleaved(
    arms: Mapping[str, Callable[[], object]], rounds: int, repeat: int = 20
) -> dict[str, list[float]]:
    """Seconds per call: every round runs each arm ``repeat`` times, in turn forwards and backwards."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(rounds + 1):
        for name in list(arms) if i % 2 == 0 else list(arms)[::-1]:
            begin = time.perf_counter()
            for _ in range(repeat):
                arms[name]()
            seconds[name].append((time.perf_counter() - begin) / repeat)
    return {name: values[1:] for name, values in seconds.items()}  # the first round warms up


# -- quality ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """What decode rows read: ``policy`` is adamas, quest or exact; ``select`` per_head or group."""

    policy: str
    select: str
    budget: int


class ArmsPolicy(AttentionPolicy):
    """All arms on one cache; ``arm`` None is dense. Every row of a step counts as a decode row of its own length."""

    def __init__(self, adamas: AdamasPolicy, quest: QuestPolicy) -> None:
        self.adamas, self.quest = adamas, quest
        self.arm: Arm | None = None

    def sidecars(self) -> tuple[SidecarSpec, ...]:
        return (*self.adamas.sidecars(), *self.quest.sidecars())

    def bind(self, sidecars: Mapping[str, Mapping[int, Tensor]]) -> None:
        self.adamas.bind(sidecars)
        self.quest.bind(sidecars)

    def begin_step(self, layout: StepLayout) -> None:
        if self.arm is None:
            return
        (length,) = layout.kv_len_S.tolist()
        self.adamas.row_R = torch.arange(layout.rows)
        self.adamas.length_R = torch.arange(length - layout.rows + 1, length + 1, dtype=torch.int32)
        self.adamas.table_RM = layout.page_table_SM.expand(layout.rows, -1).contiguous()

    def on_append(self, layer: int, k_TGD: Tensor, layout: StepLayout) -> None:
        self.adamas.on_append(layer, k_TGD, layout)
        self.quest.on_append(layer, k_TGD, layout)

    def select(
        self, layer: int, q_THD: Tensor, pages: KVPages, layout: StepLayout, spec: AttentionSpec
    ) -> Selection:
        arm, ours = self.arm, self.adamas
        if arm is None or layer not in ours.codes:
            return Dense()
        assert ours.row_R is not None
        assert ours.length_R is not None
        assert ours.table_RM is not None
        if arm.policy == "adamas":
            ours.settings = Adamas(budget=arm.budget, select=arm.select)
            return TokenSelection(ours.row_R, *ours.nearest(layer, q_THD))
        parts = []
        for start in range(0, layout.rows, ROWS):
            rows = slice(start, start + ROWS)
            q_RHD, length_R = q_THD[rows], ours.length_R[rows].long()
            if arm.policy == "quest":
                self.quest.settings = Quest(budget=arm.budget)
                table_RM = ours.table_RM[rows].long()
                parts.append(self.quest.choose(layer, q_RHD, table_RM, length_R, layout.page_size))
            else:
                parts.append(exact(q_RHD, pages, layout.page_table_SM[0].long(), length_R, arm, spec))
        index_RXK, count_RX = (torch.cat(part).contiguous() for part in zip(*parts, strict=True))
        return TokenSelection(ours.row_R, index_RXK, count_RX.to(torch.int32))


def exact(
    q_RHD: Tensor, pages: KVPages, table_M: Tensor, length_R: Tensor, arm: Arm, spec: AttentionSpec
) -> tuple[Tensor, Tensor]:
    """(index_RXK, count_RX): the heaviest tokens (of a group: by its heads' summed attention), the current one."""
    rows, heads, size = q_RHD.shape
    groups = spec.shape.kv_heads
    k_GLD = pages.k_NGPD[table_M].transpose(0, 1).reshape(groups, -1, size).float()
    q_RGJD = q_RHD.view(rows, groups, heads // groups, size)
    score_RGJL = torch.einsum("rgjd,gld->rgjl", q_RGJD, k_GLD) * spec.scale
    hidden_RL = torch.arange(k_GLD.shape[1]) >= length_R[:, None]
    score_RGJL = score_RGJL.masked_fill(hidden_RL[:, None, None], -math.inf)
    score_RXL = score_RGJL.flatten(1, 2) if arm.select == "per_head" else score_RGJL.softmax(-1).sum(2)
    current = (length_R - 1)[:, None, None].expand(-1, score_RXL.shape[1], 1)
    score_RXL = score_RXL.scatter(2, current, math.inf)
    index_RXK = score_RXL.topk(arm.budget, dim=2).indices.sort(dim=2).values
    return index_RXK.to(torch.int32), torch.full(index_RXK.shape[:2], arm.budget)


class Arms(Technique):
    """`ArmsPolicy` as a plan's technique."""

    slug = "adamas"
    slots = ("attention_policy",)
    lossless = False

    def provide(self, slot: str, context: Any) -> ArmsPolicy:
        quest = QuestPolicy(Quest(), context.config.num_layers, context.config.shape.size)
        return ArmsPolicy(Adamas().provide(slot, context), quest)


def windows(
    loaded: Loaded, files: list[Path], documents: int, length: int
) -> Iterator[tuple[str, list[int]]]:
    """(name, token ids): evenly spread windows of each file, or the first documents of the test split."""
    if not files:
        placed = Text(loaded.tokenizer).placed(length, documents)
        yield from ((document.name, ids) for document, ids in placed)
    for path in files:
        ids = loaded.tokenizer.encode(path.read_text(encoding="utf-8"))
        for i in range(documents):
            start = i * (len(ids) - length) // max(documents - 1, 1)
            yield f"{path.name} at {start}", ids[start : start + length]


def losses(loaded: Loaded, ids: list[int], scored: int, arms: list[Arm]) -> dict[Arm, dict[str, float]]:
    """Per arm: mean difference of the loss to dense and mean KL divergence, over the last ``scored`` tokens."""
    engine, policy = loaded.engine, loaded.engine.runner.policy
    assert isinstance(policy, ArmsPolicy)
    page = engine.cache.page_size
    first = (len(ids) - scored) // page * page  # whole pages: Quest's bounds of the text stay as they are
    kv = engine.cache.open(engine.new_id())
    assert engine.cache.reserve(kv, 0, len(ids))
    engine.cache.attach(kv)

    def feed(kv: SequenceKV, start: int, stop: int, logits: bool) -> Tensor:
        assert engine.cache.reserve(kv, start, stop)
        chunk = Chunk(kv, start, ids[start:stop], range(start, stop), stop - start if logits else 0)
        return torch.log_softmax(engine.runner.run([chunk]).float(), -1)

    policy.arm = None
    for start in range(0, first, 512):
        feed(kv, start, min(start + 512, first), logits=False)
    out: dict[Arm, dict[str, float]] = {}
    target_T1 = torch.tensor(ids[first + 1 :])[:, None]
    dense_TV = None
    for arm in (None, *arms):
        policy.arm = arm
        logprob_TV = feed(kv, first, len(ids) - 1, logits=True)
        engine.cache.truncate(kv, first)
        if arm is None or dense_TV is None:
            dense_TV = logprob_TV
            continue
        out[arm] = {
            "loss": float((dense_TV - logprob_TV).gather(1, target_T1).mean()),
            "kl": float((dense_TV.exp() * (dense_TV - logprob_TV)).sum(-1).mean()),
        }
    policy.arm = None
    engine.cache.close(kv)
    return out


def quality(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One record per window and arm, then the means over windows."""
    engine = {"kv_tokens": args.length, "page_size": 16, "prefix_cache": False}
    loaded = load(Plan.of([Arms()], model=args.model, engine=engine))
    arms = [Arm("adamas", select, budget) for select in SELECT for budget in args.budget]
    arms += [Arm("quest", "per_head", budget) for budget in args.budget]
    arms += [Arm("exact", select, budget) for select in SELECT for budget in args.budget]
    found: list[dict[Arm, dict[str, float]]] = []
    for name, ids in windows(loaded, args.text, args.windows, args.length):
        found.append(losses(loaded, ids, args.scored, arms))
        for arm, figures in found[-1].items():
            yield {"text": name, **arm.__dict__, **figures, "perplexity": math.expm1(figures["loss"])}
    for arm in arms:
        loss, kl = (statistics.fmean(one[arm][key] for one in found) for key in ("loss", "kl"))
        yield {"text": "mean", **arm.__dict__, "loss": loss, "kl": kl, "perplexity": math.expm1(loss)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the result there too")
    parser.add_argument("--attention", action="store_true", help="speed of one layer's attention")
    parser.add_argument(
        "--quality", action="store_true", help="perplexity and divergence by policy and budget"
    )
    parser.add_argument(
        "--context", type=int, nargs="+", default=[8192, 32768], help="tokens, of --attention"
    )
    parser.add_argument("--budget", type=int, nargs="+", default=None, help="256; of --quality 64 to 512")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=len(usable_cpus()))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument(
        "--text", type=Path, nargs="+", default=[], help="plain text files instead of the corpus"
    )
    parser.add_argument(
        "--windows", type=int, default=4, help="documents of the corpus, or windows of each file"
    )
    parser.add_argument("--length", type=int, default=8192, help="tokens of a window")
    parser.add_argument("--scored", type=int, default=512, help="tokens scored at its end")
    args = parser.parse_args()
    if not (args.attention or args.quality):
        parser.error("nothing to measure: give --attention, --quality or both")
    with recording(args.threads, args.json) as result:
        if args.attention:
            result["attention"] = []
            for select in SELECT:
                for context in args.context:
                    for budget in args.budget or [256]:
                        with torch.inference_mode():
                            case = attention_case(select, context, budget, args.rounds)
                        result["attention"].append(case)
                        print(json.dumps(case), flush=True)
        if args.quality:
            args.budget = args.budget or [64, 128, 256, 512]
            record(result, "quality", quality(args))


if __name__ == "__main__":
    main()
