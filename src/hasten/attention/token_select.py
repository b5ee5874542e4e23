"""`token_select`: every chunk of query rows reads the cached tokens that all heads together vote for.

Source: Wu et al., "TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic
Token-Level KV Cache Selection", 2024, arXiv 2411.02886.

Keys are cached before RoPE. Once a sequence holds more than ``n_init + k + n_local`` tokens, each chunk of
prompt rows and
each decoded row reads so many: the first, the ``k`` with the most votes (section 3.3) and the last; a chunk reads its
own rows beside them. They are copied to pages of their own with the keys rotated to positions 0, 1, ... in
that order and read as
a short sequence, so that no distance exceeds the budget however long the context is. Up to the budget all tokens are
read that way, at their ordinary positions. All layers are treated alike; one choice serves all heads of a layer.

Decoded rows whose query resembles the last one that chose read what that one chose (section 3.4, selection cache).

Legend: T rows, S sequences, U units (chunks of rows), H query heads, G kv heads, D head size, L layers, M pages of a
sequence, C slots, K chosen tokens, W longest list, Z pages of the copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from hasten.attention.layout import AttentionSpec, KVPages, StepLayout
from hasten.attention.policy import AttentionPolicy, CopySelection, Selection
from hasten.core.errors import UnsupportedError
from hasten.core.technique import Technique
from hasten.kernels.token_select import Ballot, Kept, Turns, token_choose, token_gather, token_turn
from hasten.models.rope import Rope

if TYPE_CHECKING:
    from hasten.models.config import DecoderConfig
    from hasten.models.context import BuildContext


class TokenSelect(Technique):
    """Prompt chunks and decoded rows read the ``n_init`` first, ``k`` chosen and ``n_local`` last cached tokens."""

    slug = "token_select"
    slots = ("attention_policy",)
    lossless = False

    n_init: int = Field(64, ge=0, description="first tokens that every row reads")
    n_local: int = Field(256, ge=1, description="last tokens that every row reads, itself included")
    k: int = Field(512, ge=1, description="tokens chosen in between")
    chunk: int = Field(256, ge=1, description="prompt rows that choose together; at most n_local")
    whole_local: bool = Field(
        True,
        description="every row of a chunk reads the n_local tokens up to itself; False: only its last row does",
    )
    theta: float = Field(
        0.9,
        ge=-1,
        description="cosine of two decoded rows' queries above which a choice is kept; > 1: never",
    )
    reuse: int | None = Field(
        None,
        ge=0,
        description="decoded tokens after which a choice is made anew in any case; None: any number",
    )
    vote: Literal["soft", "sum", "topk"] = Field(
        "soft", description="sum of the heads' softmax; sum of logits or count of top k (ablations)"
    )
    pool: int = Field(0, ge=0, description="odd width of a maximum over neighbouring scores; 0: none")
    scaled: bool = Field(False, description="scale logits as attention does before they vote")

    @model_validator(mode="after")
    def _fits(self) -> TokenSelect:
        if self.chunk > self.n_local:
            raise ValueError(f"chunk = {self.chunk} must not exceed n_local = {self.n_local}")
        if self.pool and self.pool % 2 == 0:
            raise ValueError(f"pool = {self.pool} must be 0 or odd")
        return self

    def provide(self, slot: str, context: BuildContext) -> AttentionPolicy:
        config = context.config
        if context.kv_dtype is torch.int8:
            raise UnsupportedError(
                "token_select rotates cached keys as it reads them and cannot read int8 pages; set "
                'kv_dtype = "bfloat16"'
            )
        if any(config.attention(layer).window is not None for layer in range(config.num_layers)):
            raise UnsupportedError(
                "token_select gives the tokens it reads new positions; sliding-window layers cannot follow"
            )
        return TokenSelectPolicy(self, config)


@dataclass(frozen=True)
class _Step:
    """What all layers of a step share.

    judged_U, reusable_U: int32 0/1, units that choose, and those that may keep an earlier choice. length_U: cached
    tokens, local_U: how many of the last are read anyway, count_U: tokens read, table_UM: the pages they lie
    in. list_UW: which; a layer's choice goes in between.
    read: the layout of the copies, ``target`` pages for each unit.
    """

    layout: StepLayout
    row_start_U1: Tensor
    length_U: Tensor
    local_U: Tensor
    count_U: Tensor
    judged_U: Tensor
    reusable_U: Tensor
    slot_U: Tensor
    table_UM: Tensor
    list_UW: Tensor
    read: StepLayout
    target: int
    choosing: int
    positions: int
    turns: dict[int, Turns]


class TokenSelectPolicy(AttentionPolicy):
    """The policy for one model.

    hits, choices: decoded rows, counted per layer, that kept an earlier choice, and units that chose.
    """

    unrotated_keys = True

    def __init__(self, settings: TokenSelect, config: DecoderConfig) -> None:
        self.settings, self.grid = settings, settings.chunk
        self.layers, self.shape = config.num_layers, config.shape
        known: dict[bool, Rope] = {}
        for layer in range(config.num_layers):
            local = config.local_rope is not None and config.slides(layer)
            if local not in known:
                known[local] = Rope(config.rope_of(layer), config.max_positions)
        self.ropes = [known[config.local_rope is not None and config.slides(i)] for i in range(self.layers)]
        self.hits = self.choices = 0
        self._slots: dict[int, int] = {}
        self._seen: dict[int, int] = {}  # cached tokens of each sequence after its last step
        self._free: list[int] = []
        self._kept: list[Kept] = []
        self._copy: KVPages | None = None
        self._step: _Step | None = None

    # -- the step ---------------------------------------------------------------------------------------------------

    def begin_step(self, layout: StepLayout) -> None:
        """Cut the rows into units and list, for each, the tokens that do not depend on the layer."""
        s = self.settings
        start_S1 = layout.query_start_S1.numpy().astype(np.int64)
        rows_S = np.diff(start_S1)
        first_S = layout.kv_len_S.numpy().astype(np.int64) - rows_S
        expected = np.arange(layout.rows) + np.repeat(first_S - start_S1[:-1], rows_S)
        if not np.array_equal(layout.position_T.numpy(), expected):
            raise UnsupportedError("token_select assigns positions itself; a prompt with its own is refused")
        sequence, begin, length = _units(start_S1, first_S, s.chunk)
        row_U1 = np.append(begin, start_S1[-1])
        local_U = s.n_local + (np.diff(row_U1) - 1 if s.whole_local else 0 * begin)
        far = s.n_init + s.k  # where the last tokens begin in the list of a unit that chooses
        judged_U = length > far + local_U
        count_U = np.where(judged_U, far + local_U, length)
        width = int(count_U.max()) if len(count_U) else 1
        place_W = np.arange(width)
        list_UW = place_W + (length - count_U)[:, None] * (place_W >= far)
        reusable_U = judged_U & (rows_S[sequence] == 1)
        slot_U = np.zeros(len(length), np.int32)
        if judged_U.any():
            slot_S = self._places(layout, first_S, np.unique(sequence[judged_U]))
            slot_U[judged_U] = slot_S[sequence[judged_U]]
        target = max(1, -(-width // layout.page_size))
        pages_ZM = np.arange(len(length) * target, dtype=np.int32).reshape(-1, target)
        row_start_U1 = _ints(row_U1)
        read = StepLayout(
            query_start_S1=row_start_U1,
            kv_len_S=_ints(count_U),
            page_table_SM=torch.from_numpy(pages_ZM),
            position_T=layout.position_T,
            slot_T=layout.slot_T,
            page_size=layout.page_size,
            sequence_ids=tuple(layout.sequence_ids[i] for i in sequence.tolist()),
        )
        self._step = _Step(
            layout,
            row_start_U1,
            _ints(length),
            _ints(local_U),
            read.kv_len_S,
            _ints(judged_U),
            _ints(reusable_U),
            _ints(slot_U),
            layout.page_table_SM[torch.from_numpy(sequence)].contiguous(),
            _ints(list_UW),
            read,
            target,
            int(judged_U.sum()),
            max(width, s.n_local + s.chunk),
            {},
        )
        for i, identity in enumerate(layout.sequence_ids):
            self._seen[identity] = int(first_S[i] + rows_S[i])

    def select(
        self, layer: int, q_THD: Tensor, pages: KVPages, layout: StepLayout, spec: AttentionSpec
    ) -> Selection:
        step, s = self._step, self.settings
        if step is None or layout is not step.layout:
            raise UnsupportedError("token_select cannot follow a layer hook that drops rows")
        turns = self._turns(step, layer)
        q_THD, mean_UHD = token_turn(q_THD, step.row_start_U1, step.count_U, step.judged_U, s.n_local, turns)
        if step.choosing:
            hits = token_choose(
                mean_UHD,
                pages.k_NGPD,
                step.table_UM,
                step.length_U,
                step.local_U,
                step.judged_U,
                step.reusable_U,
                step.slot_U,
                step.list_UW,
                self._kept[layer],
                Ballot(s.k, s.vote, spec.scale if s.scaled else 1.0, s.pool),
                first=s.n_init,
                theta=s.theta,
                most_apart=-1 if s.reuse is None else s.reuse,
            )
            self.hits += hits
            self.choices += step.choosing - hits
        copy = self._pages_like(pages, step.read.page_table_SM.numel())
        token_gather(
            step.list_UW,
            step.count_U,
            pages.k_NGPD,
            pages.v_NGPD,
            step.table_UM,
            turns,
            copy.k_NGPD,
            copy.v_NGPD,
            step.target,
        )
        return CopySelection(q_THD, copy, step.read)

    def end_step(self, layout: StepLayout) -> None:
        self._step = None

    def forget(self, sequence_id: int) -> None:
        self._seen.pop(sequence_id, None)
        slot = self._slots.pop(sequence_id, None)
        if slot is not None:
            self._free.append(slot)

    def figures(self) -> dict[str, float]:
        """``selection_choices`` and ``selection_hits``, over all layers."""
        return {"selection_choices": self.choices, "selection_hits": self.hits}

    # -- storage ----------------------------------------------------------------------------------------------------

    def _turns(self, step: _Step, layer: int) -> Turns:
        """Rotary tables of the layer; ``dynamic`` scaling has one per unit, as long as what the unit reads."""
        rope, units = self.ropes[layer], step.count_U.numel()
        found = step.turns.get(id(rope))
        if found is None:
            if not rope.dynamic:
                found = Turns(*rope.whole(step.positions), torch.zeros(units, dtype=torch.int64))
            else:
                place = torch.arange(step.positions)
                tables = [rope.tables(place, count.expand_as(place)) for count in step.count_U.long()]
                cos, sin = (torch.cat(part) for part in zip(*tables, strict=True))
                found = Turns(cos, sin, torch.arange(units) * step.positions)
            step.turns[id(rope)] = found
        return found

    def _places(
        self, layout: StepLayout, first_S: NDArray[np.int64], who: NDArray[np.int64]
    ) -> NDArray[np.int32]:
        """int32 [S]: the slots of the sequences ``who``. A sequence that was cut since its last step starts anew."""
        slot_S = np.zeros(layout.sequences, np.int32)
        for i in who.tolist():
            identity = layout.sequence_ids[i]
            slot = self._slots.get(identity)
            fresh = slot is None
            if slot is None:
                if not self._free:
                    self._grow()
                slot = self._slots[identity] = self._free.pop()
            if fresh or self._seen.get(identity) != first_S[i]:
                for kept in self._kept:
                    kept.made_C[slot] = 0
            slot_S[i] = slot
        return slot_S

    def _grow(self) -> None:
        """Twice the slots."""
        old = self._kept[0].made_C.numel() if self._kept else 0
        new, width = max(1, 2 * old), self.shape.heads * self.shape.size
        grown = []
        for layer in range(self.layers):
            kept = Kept(
                torch.zeros(new, width),
                torch.zeros(new, self.settings.k, dtype=torch.int32),
                torch.zeros(new, dtype=torch.int32),
            )
            if old:
                before = self._kept[layer]
                kept.known_CF[:old], kept.kept_CK[:old] = before.known_CF, before.kept_CK
                kept.made_C[:old] = before.made_C
            grown.append(kept)
        self._kept = grown
        self._free += range(new - 1, old - 1, -1)

    def _pages_like(self, pages: KVPages, count: int) -> KVPages:
        """Room for the copies of a layer, ``count`` pages or more; all layers use the same, one after another."""
        copy, shape = self._copy, (count, *pages.k_NGPD.shape[1:])
        if copy is None or copy.k_NGPD.shape[0] < shape[0] or copy.k_NGPD.dtype is not pages.k_NGPD.dtype:
            dtype = pages.k_NGPD.dtype
            copy = self._copy = KVPages(torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype))
        return copy


def _units(
    start_S1: NDArray[np.int64], first_S: NDArray[np.int64], chunk: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Sequence, first row and cached tokens (the unit's included) of each unit: cuts at multiples of ``chunk``
    tokens.
    """
    sequence, begin, length = [], [], []
    for s, (row, stop, token) in enumerate(
        zip(start_S1[:-1].tolist(), start_S1[1:].tolist(), first_S.tolist(), strict=True)
    ):
        while row < stop:
            take = min(stop - row, chunk - token % chunk)
            sequence.append(s)
            begin.append(row)
            row, token = row + take, token + take
            length.append(token)
    return np.array(sequence, np.int64), np.array(begin, np.int64), np.array(length, np.int64)


def _ints(values: NDArray[np.int64] | NDArray[np.bool_] | NDArray[np.int32] | Sequence[int]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32))
