"""RAGCache: the pages of retrieved documents, kept in two tiers and evicted by what computing them again would cost.

Source: Jin, Zhang, Jiang, Liu, Liu, Liu, Jin, "RAGCache: Efficient Knowledge Caching for Retrieval-Augmented
Generation", 2024, arXiv 2404.12457 (ACM TOCS 2025). Its parts: the knowledge tree and PGDSF (`knowledge_tree`), the
profile of prefill (`prefill_cost`), the host tier (`host_tier`), the order of the queue
(`hasten.lm.scheduling.order`), and computing ahead of the search (`hasten.lm.context.retrieval`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field

from hasten.core.errors import UnsupportedError
from hasten.core.technique import Technique
from hasten.kernels.native import level
from hasten.lm.context.transform import Prompt, PromptTransform
from hasten.lm.kvcache import prefill_cost
from hasten.lm.kvcache.format import KVFormat
from hasten.lm.kvcache.host_tier import HostTier
from hasten.lm.kvcache.knowledge_tree import FAST, HOST, KnowledgeTree, Node, Policy
from hasten.lm.kvcache.pages import PagePool
from hasten.lm.kvcache.prefill_cost import PrefillCost
from hasten.lm.kvcache.prefix import PrefixStore
from hasten.lm.kvcache.sidecar import Sidecars
from hasten.models.context import BuildContext
from hasten.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from hasten.lm.engine import Engine
    from hasten.lm.scheduling.order import AdmissionOrder


class RagCache(Technique):
    """Keeps the KV pages of documents by the sequence in which prompts hold them, in the page pool and a slower host
    tier, and evicts first what is used little and cheap to compute again. Waiting requests of which much is cached go
    first, and a retrieval's provisional documents are computed while the search goes on. A prompt names its documents
    by `Prompt.segments`, or by ``contexts`` that stand in its text; one that names none is kept page by page. Source:
    Jin et al., 2024, arXiv 2404.12457.
    """

    slug = "ragcache"
    slots = ("prefix_store", "prompt_transform")
    lossless = True
    baselines: ClassVar[tuple[dict[str, Any], ...]] = ({"engine": {"prefix_cache": False}}, {})

    policy: Policy = Field(
        "pgdsf", description="what is evicted first: pgdsf (the paper's), gdsf, lru or lfu"
    )
    host_mb: float = Field(1024.0, ge=0, description="host tier, 10^6 bytes; 0: only the page pool")
    host_folder: str | None = Field(
        None, description="keep the host tier in a file of this folder, not in memory"
    )
    frequency_window: int = Field(4096, ge=1, description="document accesses that count as recent")
    history: bool = Field(
        True,
        description="remember how often evicted documents were read; False: they start anew, as in plain LFU and GDSF",
    )
    reorder: bool = Field(True, description="admit first the waiting requests of which most is cached")
    reorder_window: int = Field(32, ge=1, description="later requests that may be admitted before one")
    speculate: int = Field(
        1,
        ge=0,
        description="compute ahead of the search while fewer prompts than this are being read; 0: never",
    )

    def provide(self, slot: str, context: BuildContext) -> PrefixStore | PromptTransform:
        if slot == "prompt_transform":
            return DocumentEnds(context.tokenizer)
        return KnowledgeStore(self, context)


class DocumentEnds(PromptTransform):
    """Finds where the ``contexts`` of a prompt's text end in its tokens, unless the caller said so."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def on_tokens(self, prompt: Prompt) -> Prompt:
        if prompt.segments or not prompt.contexts or prompt.text is None:
            return prompt
        places: list[int] = []
        at = 0
        for part in prompt.contexts:
            found = prompt.text.find(part, at)
            if found < 0:
                return prompt  # rewritten since: the parts do not stand in the text as they are
            if found > at or not places:
                places.append(found)  # what stands before it: instructions, separators
            at = found + len(part)
            places.append(at)
        wanted = [len(prompt.text[:place].encode()) for place in places]
        ends, seen, i = [], 0, 0
        for n, token in enumerate(prompt.token_ids, 1):
            seen += len(self.tokenizer.token_bytes(token))
            while i < len(wanted) and seen >= wanted[i]:
                ends.append(n)
                i += 1
        return prompt.replace(segments=tuple(sorted(set(ends) & set(range(1, len(prompt.token_ids) + 1)))))


class KnowledgeStore(PrefixStore):
    """The store for one model; see `RagCache`.

    loaded / swapped: pages copied from and to the host tier so far.
    """

    def __init__(self, settings: RagCache, context: BuildContext) -> None:
        self.settings, self.context = settings, context
        self.speculative_prefills = settings.speculate
        self.host: HostTier | None = None
        self.loaded = self.swapped = 0
        self._held = 0
        self._own = 0  # tensors of a page's content that are the format's; what is kept beside pages follows
        config = context.config
        width = config.shape.heads * config.shape.size
        # Until the engine is there to be measured: operations per token, of the layers and of attention.
        layer = 2 * width * config.hidden_size + 3 * config.hidden_size * config.intermediate_size
        self.cost = PrefillCost.estimate(config.num_layers * layer, 2 * config.num_layers * width)
        self.tree = self._fresh()

    def _fresh(self) -> KnowledgeTree:
        s = self.settings
        return KnowledgeTree(s.policy, s.frequency_window, lambda a, b: self.cost(a, b), s.history)

    def bind(
        self, pool: PagePool, format: KVFormat, page_size: int, sidecars: Sidecars | None = None
    ) -> None:
        """Raises `UnsupportedError` if the format's pages cannot leave the pool, `SettingError` for a bad host tier."""
        super().bind(pool, format, page_size, sidecars)
        if self.settings.host_mb > 0:
            folder = self.settings.host_folder
            try:
                like = self._content(0)
            except UnsupportedError as error:
                raise UnsupportedError(f"{error}; ragcache:host_mb=0 keeps them where they are") from None
            self._own = len(format.read_page(0))
            self.host = HostTier(
                like, self.settings.host_mb, None if folder is None else Path(folder).expanduser()
            )

    def ready(self, engine: Engine) -> None:
        """Measure the engine's prefill, or read what was measured before on the same model, plan and machine."""
        runner = engine.runner
        kinds = sorted({type(module).__name__ for _, module in runner.decoder.linears()})
        made_from = {
            "grid": [prefill_cost.CACHED, prefill_cost.NEW],
            "linears": kinds,
            "attention": [type(runner.kernel).__name__, type(runner.policy).__name__],
            "hooks": [type(hook).__name__ for hook in runner.hooks],
            "pages": [type(self.format).__name__, str(self.context.kv_dtype), self.page_size],
            "step": engine.settings.max_step_tokens,
            "reach": min(engine.context, engine.cache.pool.count * self.page_size, 4096),
            "machine": [level(), torch.get_num_threads(), prefill_cost.cpu_name()],
        }

        def write(folder: Path) -> None:
            prefill_cost.measure(engine).save(folder)

        self.cost = PrefillCost.load(self.context.artefacts.build("ragcache", made_from, write))
        self.clear()  # what measuring itself left behind

    # -- the interface -------------------------------------------------------------------------------------------

    def match(self, token_ids: Sequence[int], segments: Sequence[int] = ()) -> list[int]:
        """Loads what lies in the host tier into the pool, parents first, as far as pages can be had."""
        path = list(self.tree.walk(token_ids, self._cuts(segments, len(token_ids))))
        pages: list[int] = []
        for node in path:
            node.pins += 1
        try:
            for node in path:
                if not node.pages and not self._load(node):
                    break
                pages += node.pages
        finally:
            for node in path:
                node.pins -= 1
        return pages

    def cached(self, token_ids: Sequence[int], segments: Sequence[int] = ()) -> int:
        """In either tier; nothing is moved."""
        return sum(len(n.key) for n in self.tree.walk(token_ids, self._cuts(segments, len(token_ids))))

    def accessed(self, token_ids: Sequence[int], segments: Sequence[int], cached: int) -> None:
        self.tree.access(token_ids, self._cuts(segments, len(token_ids)), cached)

    def insert(self, token_ids: Sequence[int], pages: Sequence[int], segments: Sequence[int] = ()) -> None:
        """Keeps the documents that are complete; never what follows the last one, if there are documents."""
        node, start = self.tree.root, 0
        for stop in self._cuts(segments, min(len(token_ids), len(pages) * self.page_size)):
            node = self.tree.child(node, tuple(token_ids[start:stop]))
            if not node.pages:
                mine = list(pages[start // self.page_size : stop // self.page_size])
                self.pool.retain(mine)
                self._arrive(node, mine)
            start = stop

    def evict(self, count: int) -> int:
        """Whole documents: copied to the host tier when they leave the pool for the first time."""
        freed, refs = 0, self.pool.refs
        if count <= 0:
            return 0
        victims = self.tree.victims(FAST)
        for node in victims:
            if node.pins or any(refs[page] > 1 for page in node.pages):
                continue
            freed += self._leave(node)
            if freed >= count:
                break
        victims.close()
        return freed

    def clear(self) -> None:
        for node in self.tree.nodes():
            self.pool.release(node.pages)
            for slot in node.slots:
                assert self.host is not None
                self.host.drop(slot)
        self.tree = self._fresh()
        self._held = 0

    def __len__(self) -> int:
        return self._held

    @property
    def empty(self) -> bool:
        return self.tree.count == 0

    def cut(self, tokens: int, segments: Sequence[int], *, after: bool = False) -> int:
        """Documents are kept when they are complete, so a prompt that is inside one will be kept to its end."""
        size = self.page_size
        if not segments:
            return tokens // size * size
        cuts = [end // size * size for end in segments]
        if after:
            return next((cut for cut in cuts if cut >= tokens), cuts[-1])
        return max((cut for cut in cuts if cut <= tokens), default=0)

    def admission_order(self) -> AdmissionOrder | None:
        if not self.settings.reorder:
            return None
        from hasten.lm.scheduling.order import CacheAware

        return CacheAware(self, self.settings.reorder_window)

    # -- moving --------------------------------------------------------------------------------------------------

    def _cuts(self, segments: Sequence[int], length: int) -> list[int]:
        """Where the tree cuts a prompt, up to ``length`` tokens: after each document's whole pages, or every page."""
        size = self.page_size
        if not segments:
            return list(range(size, length + 1, size))
        cuts: list[int] = []
        for end in segments:
            cut = end // size * size
            if cut > length:
                break
            if cut > (cuts[-1] if cuts else 0):
                cuts.append(cut)
        return cuts

    def _content(self, page: int) -> list[torch.Tensor]:
        beside = [] if self.sidecars is None else self.sidecars.read_page(page)
        return [*self.format.read_page(page), *beside]

    def _arrive(self, node: Node, pages: list[int]) -> None:
        """The node is in the pool now; the reference of each page is the store's."""
        assert node.parent is not None
        node.pages = pages
        node.parent.fast_children += 1
        self._held += len(pages)
        for changed in (node, node.parent):
            self.tree.queue(changed, FAST)
            self.tree.queue(changed, HOST)

    def _leave(self, node: Node) -> int:
        """Take a leaf out of the pool; the pages that became free."""
        self.tree.evicted(node, FAST)
        kept = bool(node.slots) or self._swap_out(node)
        count = len(node.pages)
        self.pool.release(node.pages)
        node.pages = []
        self._held -= count
        assert node.parent is not None
        node.parent.fast_children -= 1
        self.tree.queue(node.parent, FAST)
        if kept:
            self.tree.queue(node, HOST)
        else:
            self._forget(node)
        return count

    def _swap_out(self, node: Node) -> bool:
        """Copy a document to the host tier, once in its life; False if no room can be made for it."""
        host, need = self.host, len(node.pages)
        if host is None or need > host.capacity:
            return False
        if host.free < need:
            victims = self.tree.victims(HOST)
            for other in victims:
                if other.pins:
                    continue
                self.tree.evicted(other, HOST)
                self._forget(other)
                if host.free >= need:
                    break
            victims.close()
            if host.free < need:
                return False
        node.slots = [host.put(self._content(page)) for page in node.pages]
        node.swaps += 1
        self.swapped += need
        return True

    def _load(self, node: Node) -> bool:
        """Copy a document back into the pool; False if there is no room. The copy in the host tier stays."""
        need = len(node.slots)
        if self.pool.free < need:
            self.evict(need - self.pool.free)
            if self.pool.free < need:
                return False
        assert self.host is not None
        pages = [self.pool.allocate() for _ in range(need)]
        for slot, page in zip(node.slots, pages, strict=True):
            content = self.host.get(slot)
            self.format.write_page(page, content[: self._own])
            if self.sidecars is not None:
                self.sidecars.write_page(page, content[self._own :])
        self.loaded += need
        self._arrive(node, pages)
        return True

    def _forget(self, node: Node) -> None:
        """Remove a node that is in the pool no more, with what lies behind it in the host tier."""
        behind = [node]
        for one in behind:  # grows while it is walked: parents before children
            behind.extend(one.children.values())
        for one in reversed(behind):
            for slot in one.slots:
                assert self.host is not None
                self.host.drop(slot)
            one.slots = []
            self.tree.remove(one)
