"""hasten itself, through its engine interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.peers.engines.engine import Answer, Clock, Engine, Limits


class HastenEngine(Engine):
    """The default plan with the techniques of ``--use``: weights as the file stores them, bfloat16 KV pages."""

    dtype = "auto"

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        from hasten import LLM

        self.llm = LLM(
            limits.file("model"),
            use=limits.use,
            dtype=self.dtype,
            threads=limits.threads,
            max_context=limits.context,
            max_batch=limits.batch,
            kv_tokens=limits.batch * (limits.context + 32),
            prefix_cache=limits.prefix_cache,
        )

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int, shared: int = 0) -> Answer:
        from hasten.lm.request import Delta
        from hasten.workloads.language import greedy

        engine = self.llm.engine
        clock = Clock(len(prompts))

        def listener(number: int) -> Any:
            def hear(delta: Delta) -> None:
                clock.hear(number, delta.token_ids)

            return hear

        requests = [
            engine.submit(list(prompt), greedy(tokens), on_delta=listener(number))
            for number, prompt in enumerate(prompts)
        ]
        engine.run()
        for request in requests:
            if request.failure is not None:
                raise request.failure
        return clock.answer(tokens)

    def score(self, texts: Sequence[Sequence[int]], context: int) -> list[list[float]]:
        return [list(score.logprobs) for score in self.llm.score([list(t) for t in texts], context=context)]

    def bandwidth(self) -> float:
        """Bytes a second that this process reads from memory."""
        from hasten.kernels.peak import read_bandwidth

        return read_bandwidth()

    def facts(self) -> dict[str, Any]:
        import hasten

        plan = self.llm.plan
        known = self.llm.facts()
        return {
            "version": hasten.__version__,
            "settings": f"dtype={plan.dtype}" + "".join(f" +{t.slug}" for t in plan.techniques),
            "weight_bytes_per_token": known["weight_bytes_per_token"],
            "kv_bytes_per_token": known["kv_bytes_per_token"],
        }


class HastenReference(HastenEngine):
    """The exact float32 path: what every engine's greedy tokens are compared with."""

    dtype = "float32"
