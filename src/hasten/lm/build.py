"""From a plan to a running engine: load the model, ask the techniques for their providers, fill in the defaults."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from hasten.attention.kernel import AttentionKernel
from hasten.attention.policy import AttentionPolicy
from hasten.core import paths
from hasten.core.artefact import ArtefactStore
from hasten.core.errors import ConflictError, SettingError, UnsupportedError
from hasten.core.plan import Plan
from hasten.core.slots import SLOTS
from hasten.lm.decoding.speculate import ExactVerifier
from hasten.lm.engine import Engine, Parts
from hasten.lm.kvcache.cache import KVCache, bytes_of_page, pages_in_budget
from hasten.lm.kvcache.format import KVFormat
from hasten.lm.kvcache.int8 import stored_as
from hasten.lm.kvcache.prefix import NoPrefixStore, PrefixStore, RadixPrefixStore
from hasten.lm.prepared import Prepared
from hasten.lm.runner import Runner
from hasten.lm.scheduling.continuous import ContinuousBatching
from hasten.lm.settings import EngineSettings
from hasten.models import store
from hasten.models.checkpoint import Checkpoint, load_decoder, open_checkpoint
from hasten.models.context import BuildContext
from hasten.models.decoder import Decoder
from hasten.models.surgery import ModelSurgery
from hasten.models.tokenizer import Tokenizer
from hasten.weights.format import WeightFormat

_DEFAULT_KV_BYTES = 2_000_000_000


@dataclass(frozen=True)
class Loaded:
    """A plan, loaded."""

    plan: Plan
    settings: EngineSettings
    path: Path
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    decoder: Decoder
    engine: Engine
    artefacts: ArtefactStore


class Providers:
    """What the plan's techniques provide for one model, checked against the slots' interfaces."""

    def __init__(self, plan: Plan, context: BuildContext) -> None:
        self.plan, self.context = plan, context

    def all(self, slot: str) -> list[Any]:
        """Providers of an additive slot, in plan order."""
        return [self._provide(slot, technique) for technique in self.plan.filling(slot)]

    def one(self, slot: str) -> Any | None:
        """The provider of an exclusive slot, or None."""
        found = self.all(slot)
        return found[0] if found else None

    def operate(self) -> BuildContext:
        """Let the plan's model surgery change the checkpoint, in plan order; every later provider sees the result."""
        for technique in self.plan.filling("model_surgery"):
            surgery: ModelSurgery = self._provide("model_surgery", technique)
            checkpoint = surgery.apply(self.context.checkpoint)
            self.context = replace(
                self.context,
                checkpoint=checkpoint,
                config=checkpoint.config,
                artefacts=self.context.artefacts.of_model(checkpoint.fingerprint),
            )
        return self.context

    def _provide(self, slot: str, technique: Any) -> Any:
        provider = technique.provide(slot, self.context)
        module, _, name = (SLOTS[slot].interface or "").partition(":")
        interface = getattr(importlib.import_module(module), name)
        if not isinstance(provider, interface):
            raise TypeError(
                f"{technique.slug} provides a {type(provider).__name__} for slot {slot!r}, not a {name}"
            )
        return provider


def load(plan: Plan, calibration: Sequence[Sequence[int]] | None = None) -> Loaded:
    """Load the plan's model and build its engine. Raises the plan's, the model's or a technique's error.

    calibration: token sequences for techniques that calibrate; None for the documentation corpus. A model that is a
    prepared folder brings its own plan, which ``plan`` adds to, and its own artefacts.
    """
    prepared = Prepared.at(plan.model)
    root = paths.home() / "artefacts"
    if prepared is not None:
        plan, root = prepared.extended(plan), prepared.artefacts
        calibration = prepared.calibration() if calibration is None else calibration
    plan.check()
    settings = EngineSettings.of(dict(plan.engine))
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    path = store.resolve(plan.model)
    checkpoint = open_checkpoint(path)
    config, tokenizer = checkpoint.config, checkpoint.tokenizer()
    context = BuildContext(
        config=config,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        weight_dtype={"float32": torch.float32, "bfloat16": torch.bfloat16}.get(plan.dtype),
        kv_dtype=_kv_dtype(plan, settings),
        # The fingerprint reads the whole file; without techniques nobody asks for an artefact.
        artefacts=ArtefactStore(
            root, checkpoint.fingerprint if plan.techniques else "unused", sealed=prepared is not None
        ),
        seed=settings.seed,
        calibration=calibration,
    )
    providers = Providers(plan, context)
    context = providers.operate()
    checkpoint, config = context.checkpoint, context.config
    if plan.filling("expert_router"):
        raise UnsupportedError(
            f"{config.family} models have no experts to route to; remove the expert router"
        )
    decoder = load_weights(checkpoint, providers.one("weight_format") or default_weight_format(context))
    policy: AttentionPolicy | None = providers.one("attention_policy")
    format: KVFormat | None = providers.one("kv_format")
    settings = _page_size(plan, settings, format)
    kernel = _own_kernel(plan, format) or providers.one("attention_kernel") or default_kernel()
    if settings.kv_dtype == "int8" and not kernel.reads_int8:
        slug = plan.filling("attention_kernel")[0].slug
        raise ConflictError(f'{slug} does not read int8 pages; set kv_dtype = "bfloat16" or remove {slug}')
    drafter, verifier = providers.one("drafter"), providers.one("verifier")
    cache = make_cache(
        settings,
        context,
        policy,
        format,
        providers.one("prefix_store"),
        beside=0 if drafter is None else drafter.page_bytes(settings.page_size),
    )
    runner = Runner(decoder, cache, kernel, policy, providers.all("layer_hook"))
    scheduler = providers.one("scheduler") or ContinuousBatching()
    if policy is not None and policy.repair is not None and not scheduler.repairs:
        slug, other = plan.filling("attention_policy")[0].slug, type(scheduler).__name__
        raise ConflictError(
            f"{slug} has cached tokens computed again, which {other} does not schedule; "
            f"use another scheduler or have {slug} never repair"
        )
    if verifier is not None and drafter is None:
        slug = plan.filling("verifier")[0].slug
        raise ConflictError(
            f"{slug} verifies drafts but nothing proposes any; add a drafter or remove {slug}"
        )
    parts = Parts(
        scheduler=scheduler,
        transforms=providers.all("prompt_transform"),
        drafter=drafter,
        verifier=verifier or ExactVerifier(),
        stop_policies=providers.all("stop_policy"),
    )
    engine = Engine(runner, tokenizer, settings, parts)
    cache.store.ready(engine)
    return Loaded(plan, settings, path, checkpoint, tokenizer, decoder, engine, context.artefacts)


def _kv_dtype(plan: Plan, settings: EngineSettings) -> torch.dtype:
    """What plain pages store. `ConflictError` if a technique stores them in its own way."""
    owners = plan.filling("kv_format")
    if settings.kv_dtype is not None and owners:
        slug = owners[0].slug
        raise ConflictError(
            f"kv_dtype = {settings.kv_dtype!r}, but {slug} stores KV pages in its own way; remove one of them"
        )
    if settings.kv_dtype is not None:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}[settings.kv_dtype]
    return torch.float32 if plan.dtype == "float32" else torch.bfloat16


def _page_size(plan: Plan, settings: EngineSettings, format: KVFormat | None) -> EngineSettings:
    """The settings with the page size that the KV format asks for. `ConflictError` if the plan names another."""
    if format is None or format.page_size in (None, settings.page_size):
        return settings
    if "page_size" in settings.model_fields_set:
        slug = plan.filling("kv_format")[0].slug
        raise ConflictError(
            f"page_size = {settings.page_size}, but {slug} has pages of {format.page_size} tokens; "
            f"leave page_size out or change {slug}'s setting"
        )
    return settings.model_copy(update={"page_size": format.page_size})


def _own_kernel(plan: Plan, format: KVFormat | None) -> AttentionKernel | None:
    """The kernel that the KV format brings. `ConflictError` if the plan has something that reads plain pages."""
    kernel = None if format is None else format.kernel()
    if kernel is not None:
        for slot in ("attention_kernel", "attention_policy"):
            for technique in plan.filling(slot):
                slug = plan.filling("kv_format")[0].slug
                raise ConflictError(
                    f"{technique.slug} reads plain KV pages, {slug} has pages and a kernel of its own; "
                    f"remove one of them"
                )
    return kernel


def load_weights(checkpoint: Checkpoint, weights: WeightFormat) -> Decoder:
    """The decoder with every linear packed by ``weights``. A calibrating format sees the exact model first."""
    if type(weights).begin is not WeightFormat.begin:
        weights.begin(load_decoder(checkpoint, torch.float32).eval())
    return load_decoder(checkpoint, pack=weights.pack).eval()


def default_weight_format(context: BuildContext) -> WeightFormat:
    if context.weight_dtype is None:
        from hasten.weights.native import NativeFormat

        return NativeFormat()
    from hasten.weights.dense import DenseFormat

    return DenseFormat(str(context.weight_dtype).removeprefix("torch."))


def default_kernel() -> AttentionKernel:
    from hasten.attention.dense import DenseKernel

    return DenseKernel()


def make_cache(
    settings: EngineSettings,
    context: BuildContext,
    policy: AttentionPolicy | None = None,
    format: KVFormat | None = None,
    prefix: PrefixStore | None = None,
    *,
    beside: int = 0,
) -> KVCache:
    """The cache that fits the memory budget. Raises `SettingError` when the budget holds no context worth the name.

    beside: bytes of the budget that somebody else keeps for every page (see `Drafter.page_bytes`).
    """
    config = context.config
    format = format or stored_as(context.kv_dtype)
    sidecars = () if policy is None else policy.sidecars()
    length = settings.max_context or config.max_positions
    size = settings.page_size
    page = bytes_of_page(format, sidecars, config.num_layers, size, config.shape) + beside
    full = -(-length // size) * settings.max_batch
    if settings.kv_tokens is not None:
        pages = -(-settings.kv_tokens // size)
    elif settings.kv_memory_mb is not None:
        # More pages than every sequence at full length can use would only lie idle, but the prefix store uses them.
        pages = pages_in_budget(settings.kv_memory_mb * 1e6, page)
    else:
        pages = min(
            full, pages_in_budget(min(_DEFAULT_KV_BYTES, psutil.virtual_memory().available / 4), page)
        )
    if pages * size < 2:
        raise SettingError(f"kv_tokens = {settings.kv_tokens}: at least 2")
    if prefix is None:
        prefix = RadixPrefixStore() if settings.prefix_cache else NoPrefixStore()
    return KVCache(
        format,
        prefix,
        layers=config.num_layers,
        shape=config.shape,
        pages=pages,
        page_size=size,
        rows=settings.max_batch,
        context=length,
        sidecars=sidecars,
        grid=1 if policy is None else policy.grid,
    )
