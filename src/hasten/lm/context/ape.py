"""`ape`: contexts encoded apart from each other and reused by any request, at the same positions, in any order.

Source: Yang, Chen, Chen, "APE: Faster and Longer Context-Augmented Generation via Adaptive Parallel Encoding", ICLR
2025, arXiv 2502.05431, section 4. A request's prompt is [P; C_1 .. C_n; q]. The prefix P (chat header, instructions) is
computed once; every context is encoded as what follows P, so all of them stand at positions p .. p + |C_i| - 1 and
only their own keys and values are kept. The question begins at p + max |C_i|: the positions used are bounded by
the longest context, and many more tokens than the model's window can be read. The question and what is generated
read the contexts with temperature T and the scale S on their log-sum-exp (`hasten.attention.two_group`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from hasten.attention.kernel import AttentionKernel
from hasten.attention.two_group import TwoGroupKernel
from hasten.core.errors import RequestError, UnsupportedError
from hasten.core.technique import Technique
from hasten.lm.context.store import ContextStore
from hasten.lm.context.transform import Prompt, PromptTransform

if TYPE_CHECKING:
    from hasten.lm.engine import Engine
    from hasten.models.context import BuildContext

_DENSE = "it chooses among cached tokens, and contexts side by side are read densely"


class APE(Technique):
    """Contexts of a request are read side by side from states that were computed once per text."""

    slug = "ape"
    slots = ("prompt_transform", "attention_kernel")
    lossless = False
    conflicts = {  # noqa: RUF012
        **dict.fromkeys(("adamas", "token_select", "resa", "delta", "pbs_attn", "sparge_attn"), _DENSE),
        "longllmlingua": "what it leaves of a context depends on the question, so nothing could be reused",
    }

    temperature: float = Field(
        0.9, gt=0, le=1, description="T: below 1 sharpens attention within the contexts"
    )
    scale: float = Field(0.9, gt=0, le=1, description="S: below 1 lowers the weight of all contexts together")
    shared_prefix: bool = Field(
        True, description="off: every context is encoded alone (plain parallel encoding, to compare with)"
    )
    store_mb: float | None = Field(
        None, gt=0, description="most 10^6 bytes of contexts kept in the KV cache; None: half of it"
    )
    folder: str | None = Field(None, description="keep encoded contexts in files there, for later processes")

    def provide(self, slot: str, context: BuildContext) -> AttentionKernel | PromptTransform:
        if context is not None:
            layers = range(context.config.num_layers)
            if any(context.config.attention(layer).window is not None for layer in layers):
                raise UnsupportedError(
                    "ape needs full attention in every layer; this model has sliding-window layers"
                )
        if slot == "attention_kernel":
            return TwoGroupKernel(self.temperature, self.scale)
        return ParallelContexts(self, context)


class ParallelContexts(PromptTransform):
    """Turns a prompt with contexts into one that starts with their states. Other prompts pass unchanged."""

    store: ContextStore

    def __init__(self, settings: APE, context: BuildContext) -> None:
        self.settings, self.context = settings, context

    def bind(self, engine: Engine) -> None:
        decoder = engine.runner.decoder
        if any(decoder.rope(layer).dynamic for layer in range(decoder.config.num_layers)):
            raise UnsupportedError(
                "ape cannot keep contexts of a model whose rotation changes with the length"
            )
        settings = self.settings
        capacity = None if settings.store_mb is None else settings.store_mb * 1e6
        folder = None if settings.folder is None else Path(settings.folder).expanduser()
        identity = ""
        if folder is not None:
            kind = type(engine.cache.format).__name__
            identity = f"{self.context.checkpoint.fingerprint} {kind} {self.context.kv_dtype}"
        self.engine = engine
        self.store = ContextStore(engine, capacity, folder, identity)

    def on_text(self, prompt: Prompt) -> Prompt:
        """Raises `RequestError` for a prompt without a head or a question, or one that does not fit."""
        if not prompt.contexts or prompt.text is not None or prompt.token_ids:
            return prompt
        tokenizer = self.context.tokenizer
        start = tokenizer.adds_bos and not prompt.extra.get("templated", False)
        head, tail = tokenizer.encode(prompt.head, start), tokenizer.encode(prompt.ending())
        texts = [ids for text in prompt.contexts if (ids := tokenizer.encode(text))]
        if not head:
            raise RequestError(
                "ape needs a prefix that the contexts follow (a chat header, instructions); the prompt's head is empty"
            )
        if not tail:
            raise RequestError("the contexts are followed by no question: give at least one token")
        if not texts:
            return prompt.replace(token_ids=(*head, *tail))
        shared = self.settings.shared_prefix
        begin = len(head) if shared else 0
        place = max(len(head), begin + max(map(len, texts)))
        size, longest = self.engine.cache.page_size, self.context.config.max_positions
        if place + len(tail) >= longest:
            raise RequestError(
                f"the longest context, the prefix and the question take {place + len(tail)} positions, the model has "
                f"{longest}; split the context"
            )
        slots = sum(-(-len(ids) // size) * size for ids in (head, *texts)) + len(tail)
        if slots >= self.engine.context:
            raise RequestError(
                f"the contexts and the question take {slots} slots of the KV cache, a request may have "
                f"{self.engine.context}; raise max_context (it may exceed the model's window) or the KV memory"
            )
        with self.store.states(head, texts, shared) as states:
            slotted: list[int] = []
            positions: list[int] = []
            for number, part in enumerate((head, *texts)):
                empty = -len(part) % size
                slotted += [*part, *part[-1:] * empty]  # slots that nobody reads
                first = begin if number else 0
                positions += [*range(first, first + len(part)), *[0] * empty]
            return prompt.replace(
                token_ids=(*slotted, *tail),
                position_ids=(*positions, *range(place, place + len(tail))),
                states=states,
            )

    def forget_prefixes(self) -> None:
        self.store.clear()
