"""CTranslate2: its generator on a folder converted from the dequantised weights, linears in int8."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.engines.engine import Answer, Clock, Engine, Limits


class CTranslate2Engine(Engine):
    """``compute_type="int8"``. A shared prefix is its static prompt: computed once for the batch."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        import ctranslate2

        self.ctranslate2 = ctranslate2
        folder = limits.file("ct2")
        self.generator = ctranslate2.Generator(
            folder, device="cpu", compute_type="int8", inter_threads=1, intra_threads=limits.threads
        )
        self.tokens: list[str] = json.loads((Path(folder) / "vocabulary.json").read_text(encoding="utf-8"))

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int, shared: int = 0) -> Answer:
        start = shared if self.limits.prefix_cache else 0
        given = [[self.tokens[i] for i in prompt[start:]] for prompt in prompts]
        static = [self.tokens[i] for i in prompts[0][:start]] if start else None
        clock = Clock(len(prompts))

        def hear(step: Any) -> bool:
            clock.hear(step.batch_id, [step.token_id])
            return False

        self.generator.generate_batch(
            given,
            static_prompt=static,
            cache_static_prompt=False,  # for this call alone: no state is kept from one run to the next
            max_length=tokens,
            min_length=tokens,
            # The end token is to be a token like any other: name one that ends nothing instead.
            end_token=[len(self.tokens) - 1],
            sampling_topk=1,
            beam_size=1,
            include_prompt_in_result=False,
            callback=hear,
        )
        return clock.answer(tokens)

    def score(self, texts: Sequence[Sequence[int]], context: int) -> list[list[float]]:
        out = []
        for text in texts:
            found = self.generator.score_batch([[self.tokens[i] for i in text]])[0]
            out.append([float(value) for value in found.log_probs[-(len(text) - context) :]])
        return out

    def facts(self) -> dict[str, Any]:
        return {
            "version": f"ctranslate2 {self.ctranslate2.__version__}",
            "settings": f"compute_type={self.generator.compute_type}",
        }
