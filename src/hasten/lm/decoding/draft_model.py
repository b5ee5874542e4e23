"""A draft model: a second, smaller language model guesses, the first one verifies.

Source: Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding", 2023, arXiv
2211.17192, algorithm 1; Chen et al. 2023, arXiv 2302.01318. Drafting ends early where the draft model's best token is
improbable; how far it goes at most is chosen from what was accepted and what steps cost (`hasten.lm.decoding.depth`).

The draft model has pages of its own, run by the engine's own runner: as many pages as the engine has, counted against
the same memory budget, with a prefix store, so that texts with a common start are read once. All sequences of a step
are drafted together, one token a pass. What a sequence holds here is dropped when it loses its pages there.

Legend: S sequences, R rows, V vocabulary of the target, W vocabulary of the draft model, A proposed tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from hasten.core.errors import ConflictError
from hasten.core.technique import Technique
from hasten.lm.chunk import Chunk
from hasten.lm.decoding.depth import Acceptance, Depth
from hasten.lm.decoding.prompt_lookup import within_engine
from hasten.lm.decoding.speculate import Ask, Drafter, Proposal
from hasten.lm.kvcache.cache import KVCache, SequenceKV, bytes_of_page
from hasten.lm.kvcache.int8 import stored_as
from hasten.lm.kvcache.prefix import NoPrefixStore, RadixPrefixStore
from hasten.lm.sampler import truncate

if TYPE_CHECKING:
    from hasten.lm.runner import Runner
    from hasten.lm.settings import EngineSettings
    from hasten.models.context import BuildContext
    from hasten.models.decoder import Decoder
    from hasten.models.tokenizer import Tokenizer


class DraftModel(Technique):
    """A smaller model with the same vocabulary proposes a few tokens, the model verifies them in one pass."""

    slug = "draft_model"
    slots = ("drafter",)
    lossless = True

    model: str = Field(description="the draft model: a known name, a folder or a GGUF file")
    draft_tokens: int = Field(4, ge=1, le=1024, description="most tokens to guess at once")
    min_confidence: float = Field(
        0.4, ge=0, le=1, description="stop where the draft model's best token is less probable; 0: never"
    )
    adaptive: bool = Field(True, description="draft fewer tokens where few were kept, by measured step times")

    def provide(self, slot: str, context: BuildContext) -> Drafter:
        from hasten.lm import build
        from hasten.models import store
        from hasten.models.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(store.resolve(self.model))
        tokenizer = checkpoint.tokenizer()
        shared = shared_tokens(context.tokenizer, tokenizer, self.model)
        own = replace(context, config=checkpoint.config, checkpoint=checkpoint, tokenizer=tokenizer)
        decoder = build.load_weights(checkpoint, build.default_weight_format(own))
        return ModelDrafter(self, decoder, context.kv_dtype, context.config.vocab_size, shared)


def shared_tokens(target: Tokenizer, draft: Tokenizer, name: str) -> int:
    """How many ids, from 0 on, mean the same token to both; ids after them are known to one model only.

    Embeddings padded to different sizes are no difference. Raises `ConflictError` if an id means two things.
    """
    ours, theirs = target.backend.get_vocab(True), draft.backend.get_vocab(True)
    if ours == theirs:
        return min(target.vocab_size, draft.vocab_size)
    shared = min(target.vocab_size, draft.vocab_size)
    left = {i: token for token, i in ours.items() if i < shared}
    differ = sorted(i for token, i in theirs.items() if i < shared and left.get(i) != token)
    if differ or len(left) != sum(i < shared for i in theirs.values()):
        where = differ[0] if differ else min(set(left) - set(theirs.values()))
        raise ConflictError(
            f"draft_model: {name} has another vocabulary than the model: {len(differ) or 1} of {shared} ids differ; "
            f"id {where} is {target.backend.id_to_token(where)!r} to the model, but "
            f"{draft.backend.id_to_token(where)!r} to the draft. Choose a draft model of the same family, or use "
            "prompt_lookup"
        )
    return shared


@dataclass
class _State:
    """What the drafter holds of one sequence. ``valid``: tokens of ``kv`` that are the sequence's own."""

    token_ids: Sequence[int]
    kv: SequenceKV
    valid: int
    acceptance: Acceptance = field(default_factory=Acceptance)
    guess: tuple[int, int] | None = None  # (tokens the sequence had, tokens guessed)


@dataclass
class Chain:
    """A guess in the making."""

    ask: Ask
    kv: SequenceKV
    limit: int
    token_ids: list[int] = field(default_factory=list)
    probs_V: list[Tensor] = field(default_factory=list)

    def draw(self, logits_V: Tensor, min_confidence: float) -> bool:
        """Draw the next token; False where the best one is less probable than ``min_confidence``.

        logits_V: the draft's, float32 [V], -inf for tokens it does not know. Whether to draw depends on the
        distribution alone, never on the token drawn: else the tokens that are proposed would not follow the
        distribution that they are verified against.
        """
        params, processor = self.ask.params, self.ask.processor
        if bool(logits_V.isnan().any()):
            return False
        if processor is not None:
            logits_V = logits_V.clone()
            processor.apply(logits_V, self.token_ids)
        if params.temperature == 0:
            best, token = logits_V.max(0)
            if float((best - logits_V.logsumexp(0)).exp()) < min_confidence:
                return False
            self.token_ids.append(int(token))
            return True
        scaled_1V = (logits_V / params.temperature)[None]
        truncate(scaled_1V, [params])
        probs_V = torch.softmax(scaled_1V[0], -1)
        if float(probs_V.max()) < min_confidence:
            return False
        self.token_ids.append(int(torch.multinomial(probs_V, 1, generator=self.ask.generator)))
        self.probs_V.append(probs_V)
        return True

    def proposal(self) -> Proposal | None:
        if not self.token_ids:
            return None
        probs = torch.stack(self.probs_V) if self.probs_V else None
        return Proposal(tuple(self.token_ids), tuple(range(-1, len(self.token_ids) - 1)), probs)


class ModelDrafter(Drafter):
    """Drafts with ``decoder``. ``vocabulary``: V. Ids below ``shared`` mean the same to both models."""

    def __init__(
        self, settings: DraftModel, decoder: Decoder, kv_dtype: torch.dtype, vocabulary: int, shared: int
    ) -> None:
        self.settings, self.decoder = settings, decoder
        self.vocabulary, self.shared = vocabulary, min(shared, vocabulary, decoder.config.vocab_size)
        self.depth = Depth(drafts_cost=True)
        self._format = stored_as(kv_dtype)
        self._states: dict[int, _State] = {}
        self._past: dict[int, Acceptance] = {}  # of suspended sequences

    def page_bytes(self, page_size: int) -> int:
        config = self.decoder.config
        return bytes_of_page(self._format, (), config.num_layers, page_size, config.shape)

    def bind(self, cache: KVCache, settings: EngineSettings) -> None:
        from hasten.attention.dense import DenseKernel
        from hasten.lm.runner import Runner

        within_engine(self.settings, self.settings.draft_tokens, settings)
        config = self.decoder.config
        self.room = settings.max_step_tokens
        self.cache = KVCache(
            self._format,
            RadixPrefixStore() if settings.prefix_cache else NoPrefixStore(),
            layers=config.num_layers,
            shape=config.shape,
            pages=cache.pool.count,
            page_size=cache.page_size,
            rows=settings.max_batch,
            context=min(cache.context, config.max_positions),
        )
        self.runner: Runner = Runner(self.decoder, self.cache, DenseKernel())

    def propose(self, sequence_id: int, token_ids: Sequence[int], limit: int) -> Proposal | None:
        return self.propose_all([Ask(sequence_id, token_ids, limit)])[0]

    def propose_all(self, asks: Sequence[Ask]) -> list[Proposal | None]:
        """Draft for all sequences together. One whose text is not read yet reads on and proposes nothing so far."""
        out: list[Proposal | None] = [None] * len(asks)
        able = [i for i, ask in enumerate(asks) if self._able(ask)]
        chains = {
            i: chain for i, chain in zip(able, self._chosen([asks[i] for i in able]), strict=True) if chain
        }
        logits_RV, ready = self._read(list(chains.values()))
        self._draft(ready, logits_RV)
        for i, chain in chains.items():
            out[i] = chain.proposal()
            if out[i] is not None:
                self._states[asks[i].sequence_id].guess = (len(chain.ask.token_ids), len(chain.token_ids))
        return out

    def commit(self, sequence_id: int, token_ids: Sequence[int]) -> None:
        state = self._states.get(sequence_id)
        if state is None or state.guess is None:
            return
        length, drafted = state.guess
        state.guess = None
        state.acceptance.saw(drafted, len(token_ids) - length - 1)
        state.valid = min(state.kv.length, len(token_ids) - 1)

    def timed(self, rows: int, seconds: float) -> None:
        self.depth.target.add(rows, seconds)

    def suspend(self, sequence_id: int) -> None:
        state = self._states.get(sequence_id)
        if state is not None:
            self._past[sequence_id] = state.acceptance
            self._close(sequence_id)

    def forget(self, sequence_id: int) -> None:
        self._past.pop(sequence_id, None)
        self._close(sequence_id)

    def forget_prefixes(self) -> None:
        self.cache.store.clear()

    def _close(self, sequence_id: int) -> None:
        state = self._states.pop(sequence_id, None)
        if state is not None:
            self.cache.offer_prefix(state.kv, state.token_ids[: state.valid])
            self.cache.close(state.kv)
            self.runner.forget(sequence_id)

    # -- one round -----------------------------------------------------------------------------------------------

    def _able(self, ask: Ask) -> bool:
        """Whether the draft model can read the text: known tokens, no embeddings or positions of the prompt's own."""
        if not ask.plain or len(ask.token_ids) >= self.cache.context:
            return False
        state = self._states.get(ask.sequence_id)
        return all(token < self.shared for token in ask.token_ids[0 if state is None else state.valid :])

    def _chosen(self, asks: Sequence[Ask]) -> list[Chain | None]:
        """A chain for each sequence that is to be drafted or read, with its pages reserved."""
        states = [self._open(ask) for ask in asks]
        limit_S = [
            min(ask.limit, self.settings.draft_tokens, self.cache.context - len(ask.token_ids))
            for ask in asks
        ]
        if self.settings.adaptive:
            chance_S = [(s.acceptance if s else Acceptance()).chance for s in states]
            limit_S = self.depth.choose(chance_S, limit_S)
        chains: list[Chain | None] = []
        for ask, state, limit in zip(asks, states, limit_S, strict=True):
            if state is None:
                chains.append(None)
                continue
            self.cache.truncate(state.kv, state.valid)
            if limit == 0:
                state.acceptance.fade()
            reach = len(ask.token_ids) + max(0, limit - 1)  # the last guess is not read
            fits = self.cache.reserve(state.kv, state.kv.length, reach)
            # Without a guess to make, a text that is behind by a few tokens may stay so.
            wanted = limit > 0 or len(ask.token_ids) - state.kv.length > self.cache.page_size
            chains.append(Chain(ask, state.kv, limit) if fits and wanted else None)
        return chains

    def _open(self, ask: Ask) -> _State | None:
        state = self._states.get(ask.sequence_id)
        if state is None:
            if self.cache.free_rows == 0:
                return None
            kv = self.cache.open(ask.sequence_id, ask.token_ids)
            self.cache.attach(kv)
            known = self._past.pop(ask.sequence_id, Acceptance())
            state = _State(ask.token_ids, kv, kv.length, known)
            self._states[ask.sequence_id] = state
        return state

    def _read(self, chains: Sequence[Chain]) -> tuple[Tensor, list[Chain]]:
        """Run what is not cached yet, within the rows of a step: (logits_RW, the chain that each row continues)."""
        chunks, ready, room = [], [], self.room
        for chain in sorted(chains, key=lambda c: len(c.ask.token_ids) - c.kv.length):
            start = chain.kv.length
            stop = min(len(chain.ask.token_ids), start + room)
            if stop == start:
                continue
            room -= stop - start
            last = stop == len(chain.ask.token_ids) and chain.limit > 0
            chunks.append(
                Chunk(chain.kv, start, chain.ask.token_ids[start:stop], range(start, stop), int(last))
            )
            if last:
                ready.append(chain)
        if not chunks:
            return torch.empty(0, self.decoder.config.vocab_size), []
        begin = time.perf_counter()
        logits_RW = self.runner.run(chunks)
        rows = sum(len(chunk.token_ids) for chunk in chunks)
        if rows <= 2 * len(chunks):  # after a round that kept everything, its last guess is not read yet
            self.depth.draft.add(len(chunks), time.perf_counter() - begin)
        for chain in chains:
            state = self._states[chain.ask.sequence_id]
            if chain.kv.length - state.valid > self.cache.page_size:  # a prompt: the next may share it
                self.cache.offer_prefix(chain.kv, chain.ask.token_ids)
            state.valid = chain.kv.length
        return logits_RW, ready

    def _draft(self, chains: list[Chain], logits_RW: Tensor) -> None:
        """Add tokens to the chains, one a pass, until each is at its limit or unsure."""
        while chains:
            going = [(chain, row) for row, chain in enumerate(chains) if self._add(chain, logits_RW[row])]
            chains = [chain for chain, _ in going if len(chain.token_ids) < chain.limit]
            if not chains:
                return
            begin = time.perf_counter()
            logits_RW = self.runner.run(
                [Chunk(c.kv, c.kv.length, c.token_ids[-1:], (c.kv.length,), 1) for c in chains]
            )
            self.depth.draft.add(len(chains), time.perf_counter() - begin)

    def _add(self, chain: Chain, logits_W: Tensor) -> bool:
        """Draw the chain's next token from the draft model; False where its best token is too improbable.

        Whether to draw depends on the distribution alone, never on the token drawn: else the tokens that are proposed
        would not follow the distribution that they are verified against.
        """
        logits_V = logits_W[: self.shared]
        if self.shared < self.vocabulary:
            logits_V = torch.full((self.vocabulary,), float("-inf"))
            logits_V[: self.shared] = logits_W[: self.shared]
        return chain.draw(logits_V, self.settings.min_confidence)
