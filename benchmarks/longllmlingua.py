"""Speed and quality of `longllmlingua` (acceptance 2, 4, 5 of its specification): `python -m benchmarks.longllmlingua`.

``--speed``: from the question to the last token of the answer, over ``--passages`` passages; the full prompt against
the compressed one, compression included. The compressor is the answering model, and the one of ``--compressor``
(smaller). Neither arm finds the prompt in its prefix cache; with ``--warm`` the passages were ranked before, so their
beginnings are cached for the compressor. Paired and interleaved; run it on a quiet machine.

``--quality``: exact match, F1 and loss of the right answer, and tokens of the contexts, for the full prompt, the
method, the method without each of its parts, and what is easier at equal tokens: whole passages by BM25, random tokens.
``--ranking``: the place of the passage that holds the answer, by p(question | document) and p(document | question).
"""

from __future__ import annotations

import argparse
import hashlib
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.recording import record, recording
from hasten.core.plan import Plan
from hasten.lm.context.compress import Compressor, Encoded
from hasten.lm.context.longllmlingua import CompressedContexts, LongLLMLingua
from hasten.lm.context.recovery import Shortened
from hasten.lm.context.transform import Prompt
from hasten.lm.llm import LLM
from hasten.lm.scoring import answer_logprobs
from hasten.measure.environment import usable_cpus
from hasten.measure.statistics import median_interval
from hasten.workloads.document_qa import Passage, Question, library, question
from hasten.workloads.language import greedy

ENGINE = {"max_batch": 4, "kv_memory_mb": 1000}


def transform(llm: LLM) -> CompressedContexts:
    (found,) = llm.engine.parts.transforms
    assert isinstance(found, CompressedContexts)
    return found


def tokens(llm: LLM, texts: Sequence[str]) -> int:
    return sum(len(llm.tokenizer.encode(text)) for text in texts)


# -- speed --------------------------------------------------------------------------------------------------------


def speed(args: argparse.Namespace, compressor: str | None) -> dict[str, Any]:
    full = LLM(Plan(args.model, (), "auto", ENGINE))
    use = LongLLMLingua(rate=args.rate, compressor=compressor)
    short = LLM(Plan(args.model, (use,), "auto", ENGINE))
    passages = library(full.tokenizer, args.passages, args.passage_tokens)
    seconds: dict[str, list[float]] = {"full": [], "short": []}
    first: dict[str, list[float]] = {"full": [], "short": []}
    read: dict[str, list[int]] = {"full": [], "short": []}
    for turn in range(args.rounds + 1):
        asked = question(passages, turn % args.passages, args.passages, "speed", turn)
        arms = {"full": full, "short": short}
        for name in list(arms) if turn % 2 == 0 else list(arms)[::-1]:
            if not args.warm:
                arms[name].forget_prefixes()
            done = arms[name].generate([asked.prompt(arms[name])], greedy(args.tokens))[0]
            seconds[name].append(done.timing.total)
            first[name].append(done.timing.first_token)
            read[name].append(len(done.prompt_token_ids))
    out: dict[str, Any] = {"compressor": compressor or args.model, "rate": args.rate, "tokens": args.tokens}
    for what, times in (("first_token", first), ("total", seconds)):
        pairs = [a / b for a, b in zip(times["full"][1:], times["short"][1:], strict=True)]
        out[f"{what}_speedup"] = median_interval(pairs).to_dict()
    out["prompt_tokens"] = {name: statistics.fmean(counts) for name, counts in read.items()}
    out["median_seconds"] = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    full.close()
    short.close()
    return out


# -- quality ------------------------------------------------------------------------------------------------------

Rewrite = Callable[[Prompt, Question], Prompt]


def judged(llm: LLM, asked: Sequence[Question], rewrite: Rewrite) -> dict[str, float]:
    """Means over the questions. Prompts are rewritten here, so one loaded model serves every arm."""
    rows = []
    for one in asked:
        prompt = rewrite(one.prompt(llm), one)
        count = tokens(llm, prompt.contexts)
        whole = Prompt(text=prompt.joined(), extra={**prompt.extra, "templated": True})
        ids = llm.tokenizer.encode(f" {one.passage.answer}")
        logprob_AV = answer_logprobs(llm.engine, whole, ids)
        text = llm.generate([whole], greedy(12))[0].text
        if "longllmlingua" in prompt.extra:
            text = transform(llm).on_answer(prompt, text)
        loss = -float(logprob_AV[range(len(ids)), ids].mean())
        rows.append(
            {"exact": float(one.exact(text)), "f1": one.f1(text), "loss": loss, "tokens": float(count)}
        )
    return {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}


def by_method(llm: LLM, settings: LongLLMLingua) -> Rewrite:
    """The transform with other settings, on the compressor that is loaded."""
    made = CompressedContexts(settings)
    made.engine = llm.engine
    made.compressor = Compressor(transform(llm).compressor.engine, settings)
    if settings.recover:
        return lambda prompt, asked: made.on_text(prompt)

    def unrecovered(prompt: Prompt, asked: Question) -> Prompt:
        out = made.on_text(prompt)
        return out.replace(extra={k: v for k, v in out.extra.items() if k != "longllmlingua"})

    return unrecovered


def by_bm25(llm: LLM, rate: float) -> Rewrite:
    """Whole passages, best first, as many as the budget holds (at least one)."""

    def words(text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())

    def rewrite(prompt: Prompt, asked: Question) -> Prompt:
        documents = [Counter(words(text)) for text in prompt.contexts]
        mean = statistics.fmean(sum(d.values()) for d in documents)
        score = []
        for d in documents:
            length, total = sum(d.values()), 0.0
            for word in set(words(asked.text)):
                df = sum(word in other for other in documents)
                idf = math.log(1 + (len(documents) - df + 0.5) / (df + 0.5))
                total += idf * d[word] * 2.2 / (d[word] + 1.2 * (0.25 + 0.75 * length / mean))
            score.append(total)
        left, kept = rate * tokens(llm, prompt.contexts), []
        for k in sorted(range(len(documents)), key=lambda k: -score[k]):
            size = tokens(llm, prompt.contexts[k : k + 1])
            if kept and size > left:
                break
            kept.append(k)
            left -= size
        return prompt.replace(contexts=tuple(prompt.contexts[k] for k in kept))

    return rewrite


def at_random(llm: LLM, rate: float) -> Rewrite:
    """A share of the tokens, wherever they stand."""

    def rewrite(prompt: Prompt, asked: Question) -> Prompt:
        texts = []
        for number, text in enumerate(prompt.contexts):
            encoded = Encoded.of(llm.tokenizer, text)
            digest = [
                hashlib.sha256(f"{asked.text} {number} {i}".encode()).digest() for i in range(len(encoded))
            ]
            kept = sorted(sorted(range(len(encoded)), key=digest.__getitem__)[: round(rate * len(encoded))])
            texts.append(Shortened.of(text, encoded.spans, kept).text)
        return prompt.replace(contexts=tuple(texts))

    return rewrite


def quality(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    base = {"rate": args.rate, "compressor": args.compressor if args.small else None}
    llm = LLM(Plan(args.model, (LongLLMLingua(**base),), "auto", ENGINE))
    passages = library(llm.tokenizer, args.passages, args.passage_tokens)
    asked = [
        question(passages, i % args.passages, args.passages, "quality", i) for i in range(args.questions)
    ]
    arms: dict[str, Rewrite] = {"full prompt": lambda prompt, asked: prompt}
    for name, change in {
        "longllmlingua": {},
        "paper's coarse budget (twice the target)": {"coarse": 2.0, "slack": 0},
        "without ranking": {"ranking": "none"},
        "ranked by p(document | question)": {"ranking": "document"},
        "without reordering": {"order": "original"},
        "one ratio for all documents": {"delta": 0.0},
        "without the question in token scores": {"contrastive": False},
        "without recovery": {"recover": False},
        "LLMLingua (no question at all)": {"ranking": "none", "contrastive": False, "delta": 0.0, "order": "original"},
    }.items():  # fmt: skip
        arms[name] = by_method(llm, LongLLMLingua(**{**base, **change}))
    arms["BM25 at equal tokens"] = by_bm25(llm, args.rate)
    arms["random tokens"] = at_random(llm, args.rate)
    for name, rewrite in arms.items():
        yield {"arm": name, **judged(llm, asked, rewrite)}
    llm.close()


def ranking(args: argparse.Namespace, compressor: str | None) -> dict[str, Any]:
    llm = LLM(Plan(args.model, (LongLLMLingua(compressor=compressor),), "auto", ENGINE))
    judge = transform(llm).compressor.engine
    passages: list[Passage] = library(llm.tokenizer, args.passages, args.passage_tokens)
    documents = [Encoded.of(judge.tokenizer, passage.text) for passage in passages]
    out: dict[str, Any] = {"compressor": compressor or args.model, "documents": args.passages}
    for way in ("question", "document"):
        chosen = Compressor(judge, LongLLMLingua(ranking=way))
        count = min(args.questions, args.passages)
        place = [
            chosen.rank(documents, Question(tuple(passages), about).text).index(about)
            for about in range(count)
        ]
        out[way] = {"top3": statistics.fmean(p < 3 for p in place), "mean_place": statistics.fmean(place)}
    llm.close()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the result there too")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--ranking", action="store_true")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--compressor", default="documentation-14m", help="the smaller compressor")
    parser.add_argument("--small", action="store_true", help="--quality with the smaller compressor")
    parser.add_argument("--warm", action="store_true", help="--speed with passages that were ranked before")
    parser.add_argument("--rate", type=float, default=0.25)
    parser.add_argument("--passages", type=int, default=16)
    parser.add_argument("--passage-tokens", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--threads", type=int, default=len(usable_cpus()))
    args = parser.parse_args()
    if not (args.speed or args.quality or args.ranking):
        parser.error("nothing to measure: give --speed, --quality or --ranking")
    with recording(args.threads, args.json) as result:
        parts: dict[str, Iterator[dict[str, Any]]] = {}
        if args.speed:
            parts["speed"] = (speed(args, name) for name in (None, args.compressor))
        if args.ranking:
            parts["ranking"] = (ranking(args, name) for name in (None, args.compressor))
        if args.quality:
            parts["quality"] = quality(args)
        for name, records in parts.items():
            record(result, name, records)


if __name__ == "__main__":
    main()
