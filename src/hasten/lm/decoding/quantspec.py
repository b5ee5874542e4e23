"""QuantSpec: the model drafts for itself, with 4-bit weights and the 4-bit half of its own KV cache.

Source: Tiwari et al., "QuantSpec: Self-Speculative Decoding with Hierarchical Quantized KV Cache", ICML 2025, arXiv
2502.10424. One network, one KV store, two precisions: the target runs the plan's weights and reads both planes of the
pages (8 bits), the draft runs a 4-bit copy of the linear layers and reads the upper plane. Answers are those of the
target with its 8-bit cache (``draft=false``), not those of a full-precision cache.

What the draft writes into the full-precision ring is provisional: the verify pass runs over the same positions with
the target's weights, and replaces it (`hasten.lm.kvcache.quantspec`).

Legend: S sequences, R rows, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from hasten.core.errors import ConflictError, UnsupportedError
from hasten.core.technique import Technique
from hasten.lm.chunk import Chunk
from hasten.lm.decoding.depth import Acceptance, Depth
from hasten.lm.decoding.draft_model import Chain
from hasten.lm.decoding.prompt_lookup import within_engine
from hasten.lm.decoding.speculate import Ask, Drafter, Proposal
from hasten.lm.kvcache.quantspec import QuantSpecKernel, QuantSpecKV
from hasten.weights.format import LinearSource, PackedLinear, WeightFormat
from hasten.weights.gptq import GPTQ
from hasten.weights.gptq_grid import make_grid
from hasten.weights.gptq_pack import pack_head, pack_weight
from hasten.weights.gptq_sweep import round_to_nearest
from hasten.weights.native import NativeFormat

if TYPE_CHECKING:
    from hasten.lm.kvcache.cache import KVCache
    from hasten.lm.runner import Runner
    from hasten.lm.settings import EngineSettings
    from hasten.models.context import BuildContext
    from hasten.models.decoder import Decoder


class QuantSpec(Technique):
    """The model guesses with 4-bit weights and a 4-bit view of its cache, and verifies with its own and 8 bits."""

    slug: ClassVar[str] = "quantspec"
    slots: ClassVar[tuple[str, ...]] = ("kv_format", "drafter")
    lossless: ClassVar[bool] = False  # against a full-precision cache; it is against its own 8-bit one

    # What it speeds up is a model with 16-bit weights: both sides of its comparisons run them.
    measured_on: ClassVar[Mapping[str, Any]] = {"dtype": "bfloat16"}
    baselines: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "use": {"quantspec": {"draft": False}}},
        {"dtype": "auto", "use": {"quantspec": {"draft": False}}},
    )

    group: int = Field(128, ge=4, le=1024, description="tokens that share a key's scale, and of a page")
    draft: bool = Field(True, description="guess; false: the 8-bit cache alone")
    draft_tokens: int = Field(3, ge=1, le=64, description="most tokens to guess at once")
    draft_weights: Literal["native", "rtn", "gptq"] = Field(
        "native",
        description="the draft's weights: the checkpoint's own 4-bit codes, rounded to 4 bits, or by GPTQ",
    )
    weight_group: int = Field(64, ge=1, description="inputs that share a scale, for rtn and gptq")
    adaptive: bool = Field(
        False, description="guess fewer tokens where few were kept, by measured step times"
    )
    min_confidence: float = Field(
        0.0, ge=0, le=1, description="stop where the draft's best token is less probable; 0: never"
    )

    @model_validator(mode="after")
    def _room(self) -> QuantSpec:
        if self.group <= self.draft_tokens + 1:
            raise ValueError("group must be above draft_tokens + 1: guesses stay in full precision")
        return self

    def provide(self, slot: str, context: BuildContext) -> QuantSpecKV | QuantSpecDrafter:
        """Raises `UnsupportedError` for a model with sliding windows, or no 4-bit weights to draft with."""
        config = context.config
        windows = [i for i in range(config.num_layers) if config.attention(i).window is not None]
        if windows:
            raise UnsupportedError(
                f"quantspec reads the whole context, but layer {windows[0]} of {config.family} has a sliding window"
            )
        if slot == "kv_format":
            return QuantSpecKV(self.group, self.draft_tokens + 1, context.kv_dtype)
        return QuantSpecDrafter(self, self._decoder(context) if self.draft else None)

    def _decoder(self, context: BuildContext) -> Decoder:
        from hasten.lm.build import load_weights

        weights: WeightFormat
        if self.draft_weights == "native":
            weights = FourBitNative()
        elif self.draft_weights == "rtn":
            weights = RoundedFormat(self.weight_group)
        else:
            weights = GPTQ(bits=4, group_size=self.weight_group).provide("weight_format", context)
        return load_weights(context.checkpoint, weights)


class FourBitNative(WeightFormat):
    """The checkpoint's own codes, where they have at most 5 bits."""

    def __init__(self) -> None:
        self._native = NativeFormat()

    def pack(self, source: LinearSource) -> PackedLinear:
        if source.name != "lm_head" and source.blocks is None:
            raise UnsupportedError(
                f"quantspec.draft_weights = 'native': the model stores {source.name} unquantised; use 'rtn' or 'gptq'"
            )
        return self._native.pack(source)


class RoundedFormat(WeightFormat):
    """Linears rounded to a symmetric 4-bit grid, one scale for ``group`` inputs; the LM head in 8 bits."""

    def __init__(self, group: int) -> None:
        self.group, self.grid = group, make_grid(4, True, False)

    def pack(self, source: LinearSource) -> PackedLinear:
        if source.name == "lm_head":
            return pack_head(source, "int8")
        return pack_weight(round_to_nearest(source.dense().float(), self.grid, self.group), source.bias_O)


@dataclass
class _Seen:
    """What is known of a sequence's guesses. ``guess``: (tokens the sequence had, tokens guessed)."""

    acceptance: Acceptance = field(default_factory=Acceptance)
    guess: tuple[int, int] | None = None


class QuantSpecDrafter(Drafter):
    """Runs ``decoder`` on the engine's own pages and rings, at the draft's precision. None: proposes nothing.

    seconds: what drafting took so far.
    """

    def __init__(self, settings: QuantSpec, decoder: Decoder | None) -> None:
        self.settings, self.decoder = settings, decoder
        self.depth = Depth(drafts_cost=True)
        self.seconds = 0.0
        self._seen: dict[int, _Seen] = {}

    def bind(self, cache: KVCache, settings: EngineSettings) -> None:
        from hasten.lm.runner import Runner

        if not isinstance(cache.format, QuantSpecKV):
            raise ConflictError(
                f"quantspec drafts on its own KV pages, not on {type(cache.format).__name__}; it fills both slots"
            )
        within_engine(self.settings, self.settings.draft_tokens, settings)
        self.cache, self.room = cache, settings.max_step_tokens
        if self.decoder is not None:
            kernel = QuantSpecKernel(cache.format, full=False)
            self.runner: Runner = Runner(self.decoder, cache, kernel)

    def propose(self, sequence_id: int, token_ids: Sequence[int], limit: int) -> Proposal | None:
        return self.propose_all([Ask(sequence_id, token_ids, limit)])[0]

    def propose_all(self, asks: Sequence[Ask]) -> list[Proposal | None]:
        """Draft for all sequences together, a token a pass; None for one without pages or room for guesses."""
        if self.decoder is None:
            return [None] * len(asks)
        began = time.perf_counter()
        able = [i for i, ask in enumerate(asks) if ask.kv is not None and ask.plain][: self.room]
        limits = self._limits([asks[i] for i in able])
        chains: dict[int, Chain] = {}
        for i, limit in zip(able, limits, strict=True):
            ask, kv = asks[i], asks[i].kv
            assert kv is not None
            if limit and self.cache.reserve(kv, kv.length, kv.length + limit):
                chains[i] = Chain(ask, kv, limit)
        lengths = {i: chain.kv.length for i, chain in chains.items()}
        try:
            self._draft(list(chains.values()))
        finally:
            for i, chain in chains.items():
                chain.kv.length = lengths[i]  # the guesses' keys and values are not the sequence's
        out: list[Proposal | None] = [None] * len(asks)
        for i, chain in chains.items():
            out[i] = chain.proposal()
            if out[i] is not None:
                seen = self._seen.setdefault(asks[i].sequence_id, _Seen())
                seen.guess = (len(chain.ask.token_ids), len(chain.token_ids))
        self.seconds += time.perf_counter() - began
        return out

    def commit(self, sequence_id: int, token_ids: Sequence[int]) -> None:
        seen = self._seen.get(sequence_id)
        if seen is not None and seen.guess is not None:
            length, drafted = seen.guess
            seen.guess = None
            seen.acceptance.saw(drafted, len(token_ids) - length - 1)

    def timed(self, rows: int, seconds: float) -> None:
        self.depth.target.add(rows, seconds)

    def forget(self, sequence_id: int) -> None:
        self._seen.pop(sequence_id, None)
        if self.decoder is not None:
            self.runner.forget(sequence_id)

    def _limits(self, asks: Sequence[Ask]) -> list[int]:
        limit_S = [min(ask.limit, self.settings.draft_tokens) for ask in asks]
        if not self.settings.adaptive:
            return limit_S
        known = [self._seen.setdefault(ask.sequence_id, _Seen()).acceptance for ask in asks]
        chosen = self.depth.choose([acceptance.chance for acceptance in known], limit_S)
        for acceptance, limit in zip(known, chosen, strict=True):
            if limit == 0:
                acceptance.fade()
        return chosen

    def _draft(self, chains: list[Chain]) -> None:
        """Add tokens to the chains until each is at its limit or unsure."""
        while chains:
            begin = time.perf_counter()
            chunks = []
            for chain in chains:
                token = chain.token_ids[-1] if chain.token_ids else chain.ask.token_ids[-1]
                chunks.append(Chunk(chain.kv, chain.kv.length, [token], (chain.kv.length,), 1))
            logits_RV: Tensor = self.runner.run(chunks)
            self.depth.draft.add(len(chains), time.perf_counter() - begin)
            going = [
                chain
                for row, chain in enumerate(chains)
                if chain.draw(logits_RV[row], self.settings.min_confidence)
            ]
            chains = [chain for chain in going if len(chain.token_ids) < chain.limit]
