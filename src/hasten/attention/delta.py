"""`delta`: decode rows whose layers share a choice of pages, made by the few layers that read densely.

Source: Entezari Zarch et al., "DELTA: Dynamic Layer-Aware Token Attention for Efficient Long-Context Reasoning", 2025,
arXiv 2510.09883.

The layers of a list F read every token. Those of them that a sparse layer follows are *selection layers*: the
attention mass of each cached token, the largest over the query heads, is summed by page, and the pages with the largest
sums (the last few in any case) are what all sparse layers read until the next selection layer, all heads alike. The
choice is made anew in every step; keys and values of all tokens stay cached in all layers. Prefill, and sequences of no
more pages than are chosen, are dense.

F is calibrated: the first two layers, and then, one by one, the layer that makes the worst-served sparse layer's
attention mass within its pages largest.

A page here is ``page`` consecutive tokens of a sequence; pages of the cache may be larger or smaller.

Legend: T rows, R sparse rows, H query heads, G kv heads, L cached tokens, C pages of a row, K chosen tokens, N layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from hasten.attention.layout import AttentionSpec, HeadShape, KVPages, StepLayout
from hasten.attention.policy import AttentionPolicy, Dense, Selection, TokenSelection
from hasten.core.errors import SettingError, UnsupportedError
from hasten.core.technique import Technique
from hasten.kernels.page_mass import PageRule, PageSelector, page_choose, page_selectors
from hasten.kernels.reference.page_mass import by_page, top_pages
from hasten.weights.calibrate_data import token_digest

if TYPE_CHECKING:
    from hasten.models.context import BuildContext

CONTEXT = 8192  # tokens whose share of chosen pages the calibration imitates on a shorter text


class Delta(Technique):
    """A few dense layers choose, step by step, the pages that the other layers' decode rows read."""

    slug = "delta"
    slots = ("attention_policy",)
    lossless = False

    pages: int = Field(64, ge=1, description="pages a sparse layer reads, the last ones included")
    page: int = Field(16, ge=1, le=1024, description="tokens of a page")
    recent: int = Field(8, ge=1, description="last pages that are always read")
    keep_first: bool = Field(False, description="always read the first page too (not in the paper)")
    compression_ratio: float = Field(
        1.0, ge=1, description="sparse where a row has so many times `pages` pages"
    )
    full: tuple[int, ...] | None = Field(None, description="layers that read densely; None: calibrate")
    selections: int = Field(3, ge=1, description="layers that calibration adds to the first two")
    calibration_tokens: int = Field(2048, ge=64, description="tokens that the layers are chosen on")

    def provide(self, slot: str, context: BuildContext) -> AttentionPolicy:
        layers = context.config.num_layers
        if self.recent + self.keep_first > self.pages:
            raise SettingError(f"delta.recent = {self.recent}: must leave room within pages = {self.pages}")
        if any(context.config.attention(layer).window is not None for layer in range(layers)):
            raise UnsupportedError("delta needs layers that read the whole context, not a sliding window")
        full = self.full
        if full is None:
            full = choose_layers(coverage(context, self), self.selections)
        if 0 not in full or not all(0 <= layer < layers for layer in full):
            raise SettingError(f"delta.full = {list(full)}: must hold layer 0 and lie within 0..{layers - 1}")
        return DeltaPolicy(self, full, layers, context.config.shape)

    @property
    def rule(self) -> PageRule:
        """Which pages sparse layers read."""
        return PageRule(self.page, self.pages, self.recent, self.keep_first)


def selection_layers(full: Sequence[int], layers: int) -> frozenset[int]:
    """The dense layers that a sparse layer follows."""
    return frozenset(layer for layer in full if layer + 1 < layers and layer + 1 not in full)


class DeltaPolicy(AttentionPolicy):
    """The policy for one model of ``layers`` layers, those of ``full`` dense."""

    def __init__(self, settings: Delta, full: Sequence[int], layers: int, shape: HeadShape) -> None:
        self.settings, self.rule, self.shape = settings, settings.rule, shape
        self.full, self.layers = frozenset(full), layers
        self.choosing = selection_layers(full, layers)
        self.budget = (
            int(settings.compression_ratio * settings.pages) * settings.page
        )  # dense up to so many tokens
        self._selectors: tuple[PageSelector | None, ...] = ()
        self._rows: tuple[Tensor, Tensor, Tensor] | None = (
            None  # row_R, length_R, table_RM of the sparse rows
        )
        self._chosen: tuple[Tensor, Tensor] | None = None  # index_RK and count_R of the last selection layer

    def selectors(self) -> Sequence[PageSelector | None]:
        if not self._selectors:
            acting = [n for n in range(self.layers) if n in self.choosing or n not in self.full]
            heads, kv_heads, size = self.shape.heads, self.shape.kv_heads, self.shape.size
            made = page_selectors(
                [n in self.choosing for n in acting],
                self.rule,
                self.budget,
                heads=heads,
                kv_heads=kv_heads,
                size=size,
            )
            by_layer = dict(zip(acting, made, strict=True))
            self._selectors = tuple(by_layer.get(layer) for layer in range(self.layers))
        return self._selectors

    def begin_step(self, layout: StepLayout) -> None:
        chosen_S = layout.decode_rows() & (layout.kv_len_S > self.budget)
        self._rows = self._chosen = None
        if bool(chosen_S.any()):
            self._rows = (
                layout.query_start_S1[:-1][chosen_S].long(),
                layout.kv_len_S[chosen_S].contiguous(),
                layout.page_table_SM[chosen_S].contiguous(),
            )

    def select(
        self, layer: int, q_THD: Tensor, pages: KVPages, layout: StepLayout, spec: AttentionSpec
    ) -> Selection:
        if self._rows is None or (layer in self.full and layer not in self.choosing):
            return Dense()
        row_R, length_R, table_RM = self._rows
        if layer in self.choosing:
            if not isinstance(pages, KVPages):
                raise UnsupportedError(
                    f"delta cannot read keys from {type(pages).__name__}; remove the KV format of the plan"
                )
            self._chosen = page_choose(
                q_THD[row_R],
                pages.k_NGPD,
                table_RM,
                length_R,
                self.rule,
                scale=spec.scale,
                softcap=spec.softcap,
            )
            return Dense()
        if self._chosen is None:
            raise UnsupportedError(f"layer {layer} comes before any layer that chose pages")
        index_RK, count_R = self._chosen
        groups = self.shape.kv_heads
        return TokenSelection(
            row_R,
            index_RK[:, None].expand(-1, groups, -1).contiguous(),
            count_R[:, None].expand(-1, groups).contiguous(),
        )


# -- which layers choose ------------------------------------------------------------------------------------------


def coverage(context: BuildContext, settings: Delta) -> Tensor:
    """float32 [N, N]: the share of layer j's attention mass that lies in the pages that layer i would choose.

    Averaged over rows of calibration text and heads; as large a share of the pages is chosen, and of the last ones
    kept, as of `CONTEXT` tokens. Kept as an artefact of the model.
    """
    from hasten.attention.calibration import calibration_ids

    ids = calibration_ids(context, settings.calibration_tokens)
    choice = settings.model_dump(include={"pages", "page", "recent", "keep_first"})
    made_from = {"tokens": token_digest([ids]), "choice": choice, "version": 2}

    def write(folder: Path) -> None:
        save_file({"coverage": measure(context, settings, ids)}, folder / "coverage.safetensors")

    folder = context.artefacts.build("delta-coverage", made_from, write)
    return load_file(folder / "coverage.safetensors")["coverage"]


@torch.inference_mode()
def measure(context: BuildContext, settings: Delta, ids: Sequence[int], rows: int = 32) -> Tensor:
    """`coverage`, measured on ``rows`` rows of the second half of ``ids``."""
    from hasten.attention.calibration import capture

    q_NTHD, k_NTGD = capture(context, ids)
    row_R = torch.linspace(len(ids) // 2, len(ids) - 1, min(rows, len(ids) // 2)).long()
    pages_R = row_R // settings.page + 1
    recent = max(1, settings.recent * len(ids) // CONTEXT)
    wanted = max(recent + settings.keep_first + 1, settings.pages * len(ids) // CONTEXT)
    wanted = min(wanted, int(pages_R.min()))
    if wanted <= settings.keep_first:
        raise SettingError(
            f"delta.calibration_tokens = {len(ids)}: too few for pages of {settings.page} tokens; give more, or name "
            "the layers with delta.full"
        )
    rule = PageRule(settings.page, wanted, min(recent, wanted - settings.keep_first), settings.keep_first)
    hidden_RT = torch.arange(len(ids)) > row_R[:, None]
    mass_N, chosen_N = [], []
    for layer, (q_THD, k_TGD) in enumerate(zip(q_NTHD, k_NTGD, strict=True)):
        spec = context.config.attention(layer)
        groups = k_TGD.shape[1]
        q_RGJD = q_THD[row_R].view(len(row_R), groups, -1, q_THD.shape[2])
        logit_RHT = (torch.einsum("rgjd,tgd->rgjt", q_RGJD, k_TGD) * spec.scale).flatten(1, 2)
        if spec.softcap is not None:
            logit_RHT = spec.softcap * torch.tanh(logit_RHT / spec.softcap)
        probs_RHT = logit_RHT.masked_fill(hidden_RT[:, None], float("-inf")).softmax(-1)
        mass_N.append(by_page(probs_RHT.mean(1), settings.page))
        mass_RC = by_page(probs_RHT.amax(1), settings.page)
        chosen_N.append(top_pages(mass_RC, pages_R, rule))
    share = [[float(mass.gather(1, chosen).sum(1).mean()) for mass in mass_N] for chosen in chosen_N]
    return torch.tensor(share)


def choose_layers(coverage_NN: Tensor, count: int) -> tuple[int, ...]:
    """F: layers 0 and 1 and, one by one, ``count`` more, each for the worst-covered sparse layer."""
    layers = coverage_NN.shape[0]
    full = [layer for layer in (0, 1) if layer < layers]

    def served(chosen: Sequence[int]) -> tuple[float, float]:
        """Coverage of the worst sparse layer, and the mean."""
        got = [
            float(coverage_NN[max(f for f in chosen if f < layer), layer])
            for layer in range(layers)
            if layer not in chosen
        ]
        return (min(got), sum(got) / len(got)) if got else (1.0, 1.0)

    for _ in range(min(count, layers - len(full))):
        full = sorted(
            [*full, max((c for c in range(layers) if c not in full), key=lambda c: served([*full, c]))]
        )
    return tuple(full)
