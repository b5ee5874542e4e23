"""The slots: every place in an engine where a technique may act. Data only; no torch.

A slot is *exclusive* (one provider per plan, e.g. one KV format) or *additive* (providers stack in plan
order, e.g. hidden-state hooks). ``interface`` is the import path of the abstract class that a provider
returns; it lives in the room named for that part of the computation, and `tests/contracts` checks it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hasten.core.errors import UnknownNameError

Engine = Literal["lm", "train", "visual", "domain"]


@dataclass(frozen=True)
class Slot:
    """An extension point. ``name`` is what plans, records and error messages use."""

    name: str
    engine: Engine
    exclusive: bool
    question: str
    interface: str | None = None  # None: the engine that owns the slot is not built yet

    def __str__(self) -> str:
        return self.name


def _lm(name: str, question: str, interface: str | None, *, exclusive: bool = True) -> Slot:
    return Slot(name, "lm", exclusive, question, interface)


def _later(engine: Engine, name: str, question: str, *, exclusive: bool = True) -> Slot:
    return Slot(name, engine, exclusive, question)


_ALL = (
    _lm(
        "prompt_transform",
        "which text or cached states enter the model",
        "hasten.lm.context.transform:PromptTransform",
        exclusive=False,
    ),
    _lm("prefix_store", "which KV pages already exist", "hasten.lm.kvcache.prefix:PrefixStore"),
    _lm("scheduler", "what runs in the next step", "hasten.lm.scheduling.scheduler:Scheduler"),
    _lm(
        "weight_format",
        "how a linear layer stores and multiplies its weights",
        "hasten.weights.format:WeightFormat",
    ),
    _lm("kv_format", "how a page stores keys and values", "hasten.lm.kvcache.format:KVFormat"),
    _lm(
        "attention_policy",
        "which cached tokens a query reads",
        "hasten.attention.policy:AttentionPolicy",
    ),
    _lm(
        "attention_kernel",
        "how the chosen tokens are read",
        "hasten.attention.kernel:AttentionKernel",
    ),
    _lm(
        "layer_hook",
        "what happens to hidden states between layers",
        "hasten.lm.layers.hook:LayerHook",
        exclusive=False,
    ),
    _lm("expert_router", "which experts a token visits", "hasten.lm.moe.router:ExpertRouter"),
    _later("lm", "expert_dispatch", "how tokens reach their experts and come back"),
    _later("lm", "expert_placement", "which device holds which expert"),
    _lm("drafter", "which tokens are guessed", "hasten.lm.decoding.speculate:Drafter"),
    _lm("verifier", "which guesses are kept", "hasten.lm.decoding.speculate:Verifier"),
    _lm(
        "stop_policy",
        "when to stop generating",
        "hasten.lm.decoding.stop:StopPolicy",
        exclusive=False,
    ),
    _later("lm", "unmask_policy", "which masked positions a diffusion language model commits"),
    _later("lm", "orchestration", "which requests a job becomes", exclusive=False),
    _lm(
        "model_surgery",
        "which weights, blocks or neurons the model keeps",
        "hasten.models.surgery:ModelSurgery",
        exclusive=False,
    ),
    _later("lm", "serving", "what happens outside the model", exclusive=False),
    _later("train", "data_selection", "which examples are trained on", exclusive=False),
    _later("train", "batch_composition", "which examples share a micro-batch, and in what layout"),
    _later("train", "linear_precision", "the precision of a linear layer's three products"),
    _later("train", "activation_storage", "how activations wait for the backward pass"),
    _later("train", "optimizer_state", "how optimizer state is stored"),
    _later("train", "gradient_communication", "what is sent between workers, and when"),
    _later("train", "sequence_schedule", "how a long sequence is split over workers"),
    _later("train", "pipeline_schedule", "the order of forward and backward blocks"),
    _later("train", "adaptation", "which parameters train"),
    _later("train", "gradient_estimator", "how a gradient is obtained"),
    _later("train", "update_rule", "how a gradient becomes an update"),
    _later("train", "train_kernel", "how an operation's forward and backward run", exclusive=False),
    _later("visual", "visual_attention", "which blocks of a (T, H, W) grid attend, per head"),
    _later("visual", "visual_tokens", "which visual tokens stay", exclusive=False),
    _later("visual", "sampler", "which denoising steps and modules run"),
    _later("domain", "transport", "how bytes move between processes"),
    _later("domain", "evaluation", "how methods are run, scored and compared", exclusive=False),
    _later("domain", "system", "a whole accelerated system beside its baseline"),
)

SLOTS: dict[str, Slot] = {slot.name: slot for slot in _ALL}


def slot(name: str) -> Slot:
    """Return the slot called ``name``; raise `UnknownNameError` with the nearest names otherwise."""
    try:
        return SLOTS[name]
    except KeyError:
        raise UnknownNameError("slot", name, SLOTS) from None
