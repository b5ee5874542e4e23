"""``offload-decode``: one request at a time on a model whose weights do not fit its memory budget.

The baseline plan of this job runs from memory; what a technique that streams weights is compared with are its own
``baselines``: the same weights in another format or read in another way. Reads are of the disk, never of the page
cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from hasten.core.plan import Plan
from hasten.weights.endor import StreamedLinear
from hasten.weights.weight_store import WeightStore
from hasten.workloads.decode import Decode, DecodeOptions, DecodeSession
from hasten.workloads.workload import Session


class OffloadOptions(DecodeOptions):
    prompt_tokens: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (64,), min_length=1, description="lengths of the prompts, answered one after another"
    )
    tokens: int = Field(16, ge=2, description="tokens to generate for each prompt")
    quality_texts: int = Field(2, ge=1, description="texts scored for perplexity")
    quality_context: int = Field(32, ge=1, description="tokens before the first scored one of each text")
    quality_tokens: int = Field(32, ge=1, description="scored tokens of each text")
    reference: bool = Field(False, description="compare greedy answers with the float32 model's, as a fact")


class OffloadDecode(Decode):
    """Single-stream decoding with streamed weights. Timed: from the first token to the last.

    Facts: bytes resident, in buffers and streamed per token.
    """

    name = "offload-decode"
    title = "single-stream decoding beyond the memory budget"

    def open(self, plan: Plan, options: Mapping[str, Any] | None = None) -> Session:
        return OffloadSession(plan, OffloadOptions.read(self.name, options))


class OffloadSession(DecodeSession):
    def facts(self) -> Mapping[str, Any]:
        """The engine's figures, and where the weights are."""
        store = self.store()
        if store is None:
            return super().facts()
        memory = {f"{name}_bytes": size for name, size in store.memory().items()}
        return {**super().facts(), **memory, "streamed_bytes": store.streamed_bytes()}

    def store(self) -> WeightStore | None:
        """The store of the plan's weights; None if they are all in memory."""
        for module in self.llm.engine.runner.decoder.modules():
            if isinstance(module, StreamedLinear):
                return module.store
        return None

    def close(self) -> None:
        store = self.store()
        super().close()
        if store is not None:
            store.close()
