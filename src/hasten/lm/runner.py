"""The runner: one step of the model over a ragged batch of chunks, on the paged KV cache.

Per layer: hooks -> attention (rotate, append to the pages, ask the policy, run the kernel) -> MLP. Then the logits
of the rows somebody asked for. Without hooks and policies none of their branches is entered: then, on packed weights
and plain pages, all layers are one native call, and steps that only continue the one before them are one from token ids
to logits (see `hasten.lm.native`).

Where a hook drops rows or skips attention, a layer holds fewer tokens of a sequence than another layer does. Then the
layer gets its own `StepLayout` (its lengths and slots), built once per step for all layers that agree.

Legend: T rows of the step, S sequences, E hidden size, H query heads, G kv heads, D head size, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten.attention.kernel import AttentionKernel
from hasten.attention.layout import StepLayout
from hasten.attention.policy import AttentionPolicy, CopySelection, Dense, DensePolicy
from hasten.core.errors import UnsupportedError
from hasten.kernels.block import Reading
from hasten.kernels.decode import Selector
from hasten.lm.chunk import Chunk
from hasten.lm.kvcache.cache import KVCache, SequenceKV
from hasten.lm.kvcache.repair import note_exact
from hasten.lm.layers.hook import LayerHook
from hasten.lm.native import DecodeRound, Layer, NativeStack, native_layers, native_logits
from hasten.models.decoder import Decoder

_DENSE = Dense()


class Runner:
    """Runs steps of one decoder. Not thread-safe; a step runs to its end.

    best: the token of the highest of each row of logits of the last run, -1 where one is not finite; None if the
    run did not look.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        kernel: AttentionKernel,
        policy: AttentionPolicy | None = None,
        hooks: Sequence[LayerHook] = (),
    ) -> None:
        self.decoder, self.cache, self.kernel = decoder, cache, kernel
        # The dense policy answers the same for every layer: not asking it is the same thing, for free.
        self.policy = None if policy is None or type(policy) is DensePolicy else policy
        self.hooks = tuple(hooks)
        native = native_layers(decoder)
        self.native = native is not None
        self.layers: Sequence[Layer] = native or tuple(decoder.layers)  # type: ignore[arg-type]
        self._stack: NativeStack | None = None
        if native and not self.hooks and cache.format.plain:
            self._stack = NativeStack(decoder, native, cache.format)
        self._round: DecodeRound | None = None
        self.best: list[int] | None = None
        count = decoder.config.num_layers
        # Whether chunks may end in token trees: nothing but the kernel looks at which row sees what.
        self.trees = self.policy is None and not self.hooks and cache.format.plain and kernel.trees
        self.trees = self.trees and not any(decoder.rope(i).dynamic for i in range(count))
        self._hooks_at = {
            layer: found
            for layer in range(count + 1)
            if (found := tuple(h for h in self.hooks if layer in h.layers(count)))
        }
        if self.policy is not None:
            if self.policy.unrotated_keys and not cache.format.plain:
                raise UnsupportedError(
                    "the attention policy rotates keys as it reads them and cannot read "
                    f"{type(cache.format).__name__} pages"
                )
            self.policy.bind(cache.sidecars.by_name)

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """Run the chunks, cache their keys and values, and return the asked-for logits.

        float32 [R, V] with R the sum of ``chunk.logits``, in chunk order. Every chunk's ``kv`` has a row
        (`KVCache.attach`) and reserved slots for its tokens; its length is advanced.
        """
        if not self.trees and any(chunk.tree for chunk in chunks):
            raise UnsupportedError("this plan's attention cannot follow a token tree")
        self.best = None
        if self._round is not None and (logits_RV := self._continue(self._round, chunks)) is not None:
            return logits_RV
        step = _Step(self, chunks)
        x_TE = self._embed(chunks)
        readings: list[Reading] | None = None
        selectors: Sequence[Selector | None] = () if self.policy is None else self.policy.selectors()
        if self._stack is not None and (self.policy is None or selectors):
            readings = step.readings(self._stack)
        if self.hooks or self.policy is not None:
            x_TE = self._walk(step, x_TE)
        elif self._stack is not None and readings is not None:
            step.run_stack(self._stack, readings, x_TE)
        else:
            for layer in self.layers:
                x_TE = layer.mlp(layer.attention(x_TE, step.position_T, step.attend))
        if self._stack is not None and readings is not None:
            self._round = self._stack.round(chunks, step.layout, readings, selectors)
        step.commit()
        row_R = step.logit_rows()
        if row_R.numel() == 0:
            return torch.empty(0, self.decoder.config.vocab_size)
        x_RE = x_TE if row_R.numel() == x_TE.shape[0] else x_TE[row_R]
        return native_logits(self.decoder, x_RE) if self.native else self.decoder.logits(x_RE)

    def _continue(self, last: DecodeRound, chunks: Sequence[Chunk]) -> Tensor | None:
        """Logits of a step that goes on where the last one was; None if it does not."""
        self._round = None  # unless the step succeeds
        if self.policy is not None and self.policy.selectors() is not last.selectors:
            return None
        found = last.run(chunks)
        if found is None:
            return None
        for chunk in chunks:
            chunk.kv.length = max(chunk.kv.length, chunk.start + 1)
        self._round = last
        logits_TV, self.best = found
        return logits_TV

    def forget(self, sequence_id: int) -> None:
        """A sequence has ended: whoever keeps state for it may drop it."""
        for part in (self.kernel, self.policy, *self.hooks):
            if part is not None:
                part.forget(sequence_id)

    def _embed(self, chunks: Sequence[Chunk]) -> Tensor:
        ids: list[int] = []
        for chunk in chunks:
            ids.extend(chunk.token_ids)
        x_TE = self.decoder.embed(torch.tensor(ids))
        if any(chunk.embeddings_TE is not None for chunk in chunks):
            x_TE = x_TE.clone()
            start = 0
            for chunk in chunks:
                if chunk.embeddings_TE is not None:
                    x_TE[start : start + len(chunk.embeddings_TE)] = chunk.embeddings_TE
                start += len(chunk.token_ids)
        return x_TE

    def _walk(self, step: _Step, x_TE: Tensor) -> Tensor:
        """The layers with hooks and a policy at work."""
        for hook in self.hooks:
            hook.begin_step(step.layout)
        if self.policy is not None:
            self.policy.begin_step(step.layout)
        count = self.decoder.config.num_layers
        for index, layer in enumerate(self.layers):
            skip_attention = skip_mlp = False
            for hook in self._hooks_at.get(index, ()):
                layout = step.layout_of(index)
                x_TE = hook.before(index, x_TE, layout)
                kept = hook.keep_rows(index, x_TE, layout)
                if kept is not None:
                    x_TE = step.keep(index, x_TE, kept)
                    layout = step.layout_of(index)
                attention, mlp = hook.skip(index, layout)
                skip_attention, skip_mlp = skip_attention or attention, skip_mlp or mlp
            if skip_attention:
                step.skipped(index)
            else:
                x_TE = layer.attention(x_TE, step.position_T, step.attend)
            if not skip_mlp:
                x_TE = layer.mlp(x_TE)
        for hook in self._hooks_at.get(count, ()):
            x_TE = hook.before(count, x_TE, step.layout_of(count))
        if self.policy is not None:
            self.policy.end_step(step.layout)
        return x_TE


class _Step:
    """The layouts of one step, and the attention its layers call."""

    def __init__(self, runner: Runner, chunks: Sequence[Chunk]) -> None:
        self.chunks = chunks
        self.decoder, self.cache = runner.decoder, runner.cache
        self.kernel, self.policy = runner.kernel, runner.policy
        self.format = runner.cache.format
        self.count_S = np.array([len(c.token_ids) for c in chunks], dtype=np.int64)
        self.start_S = np.array([c.start for c in chunks], dtype=np.int64)
        positions: list[int] = []
        for chunk in chunks:
            positions.extend(chunk.positions)
        self.position_T = torch.tensor(positions)
        self.row_T: Tensor | None = None  # original rows still alive, once a hook dropped some
        # Per layer and sequence: tokens cached before the step that the layer lacks, and rows it loses in this step.
        self.lack_LS: NDArray[np.int64] | None = None
        self.lost_LS: NDArray[np.int64] | None = None
        if any(c.kv.missing is not None for c in chunks):
            self._track()
        self.recomputed = frozenset(s for s, c in enumerate(chunks) if c.start < c.kv.length)
        self.reading = frozenset(s for s, c in enumerate(chunks) if c.prompt)
        self.by_layer: dict[int, StepLayout] = {}
        self._layouts: dict[bytes, StepLayout] = {}
        self.layout = self._layout(self.start_S, self.count_S, self.position_T, self.by_layer)
        self._plans: dict[int, Any] = {}
        self._tables: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    # -- layouts ------------------------------------------------------------------------------------------------

    def _layout(
        self,
        start_S: NDArray[np.int64],
        count_S: NDArray[np.int64],
        position_T: Tensor,
        by_layer: dict[int, StepLayout],
    ) -> StepLayout:
        """The layout in which sequence s writes ``count_S`` rows after ``start_S`` cached tokens."""
        size = self.cache.page_size
        total = int(count_S.sum())
        query_start_S1 = np.zeros(len(count_S) + 1, dtype=np.int32)
        np.cumsum(count_S, out=query_start_S1[1:])
        kv_len_S = start_S + count_S
        rows_S = [c.kv.row for c in self.chunks]
        if total == len(count_S) and (count_S == 1).all():
            index_T, table_T = start_S, np.array(rows_S)
        else:
            index_T = np.arange(total) + np.repeat(start_S - query_start_S1[:-1], count_S)
            table_T = np.repeat(rows_S, count_S)
        slot_T = self.cache.table_RM[table_T, index_T // size].astype(np.int64) * size + index_T % size
        return StepLayout(
            query_start_S1=torch.from_numpy(query_start_S1),
            kv_len_S=torch.from_numpy(kv_len_S.astype(np.int32)),
            page_table_SM=self.cache.layout_tables(rows_S, max(1, -(-int(kv_len_S.max()) // size))),
            position_T=position_T,
            slot_T=torch.from_numpy(slot_T),
            page_size=size,
            sequence_ids=tuple(c.kv.id for c in self.chunks),
            layers=by_layer,
            trees={s: chunk.tree for s, chunk in enumerate(self.chunks) if chunk.tree},
            extents={s: chunk.kv.extents for s, chunk in enumerate(self.chunks) if chunk.kv.extents},
            recomputed=self.recomputed,
            reading=self.reading,
        )

    def layout_of(self, layer: int) -> StepLayout:
        """What ``layer`` sees; the base layout unless its tokens differ."""
        if self.lack_LS is None or self.lost_LS is None:
            return self.layout
        found = self.by_layer.get(layer)
        if found is None:
            lack_S, lost_S = self.lack_LS[layer], self.lost_LS[layer]
            if not lack_S.any() and not lost_S.any():
                found = self.layout
            else:
                key = lack_S.tobytes() + lost_S.tobytes()
                found = self._layouts.get(key)
                if found is None:
                    found = self._layout(
                        self.start_S - lack_S, self.count_S - lost_S, self.position_T, self.by_layer
                    )
                    self._layouts[key] = found
            self.by_layer[layer] = found
        return found

    def _track(self) -> None:
        if self.lack_LS is not None:
            return
        layers = self.decoder.config.num_layers
        # One more than the layers: the state after the last one, which hooks may see too.
        self.lack_LS = np.zeros((layers + 1, len(self.chunks)), dtype=np.int64)
        self.lost_LS = np.zeros_like(self.lack_LS)
        for s, chunk in enumerate(self.chunks):
            if chunk.kv.missing is not None:
                if chunk.start < chunk.kv.length:
                    raise UnsupportedError(
                        "rows were dropped from this sequence: it cannot be recomputed in place"
                    )
                self.lack_LS[:layers, s] = chunk.kv.missing

    def keep(self, layer: int, x_TE: Tensor, kept_R: Tensor) -> Tensor:
        """Only rows ``kept_R`` (ascending, of the current rows) go on from ``layer``."""
        self._track()
        assert self.lost_LS is not None
        before = self.layout_of(layer)
        start_S1 = before.query_start_S1
        kept_R = kept_R.sort().values
        alive_T = torch.zeros(x_TE.shape[0], dtype=torch.bool)
        alive_T[kept_R] = True
        if not bool(alive_T[start_S1[1:].long() - 1].all()):
            raise UnsupportedError("a layer hook dropped the last row of a sequence; its logits are needed")
        prefix_T1 = torch.nn.functional.pad(alive_T.long().cumsum(0), (1, 0))
        left_S = (prefix_T1[start_S1[1:].long()] - prefix_T1[start_S1[:-1].long()]).numpy()
        self.lost_LS[layer:] = self.count_S - left_S
        for later in [index for index in self.by_layer if index >= layer]:
            del self.by_layer[later]
        self.position_T = self.position_T[kept_R]
        self.row_T = kept_R if self.row_T is None else self.row_T[kept_R]
        return x_TE[kept_R]

    def skipped(self, layer: int) -> None:
        """``layer`` runs no attention in this step and caches nothing of it."""
        self._track()
        assert self.lost_LS is not None
        self.lost_LS[layer] = self.count_S

    # -- attention ----------------------------------------------------------------------------------------------

    def readings(self, native: NativeStack) -> list[Reading] | None:
        """What each kind of layer reads, if all of them read densely what a schedule says."""
        if self.lack_LS is not None:
            return None
        plan = self._plan(self.layout)
        readings = []
        for layer in native.spec_layers:
            spec = self.decoder.config.attention(layer)
            part = self.kernel.reading(plan, spec)
            if part is None:
                return None
            readings.append(Reading(part.schedule, spec.scale, spec.softcap))
        return readings

    def run_stack(self, native: NativeStack, readings: Sequence[Reading], x_TE: Tensor) -> None:
        """Run all layers on ``x_TE`` in place."""
        tables = [self._rope(layer, self.layout) for layer in native.rope_layers]
        native.stack.step(x_TE, self.layout.slot_T, tables, readings)

    def _plan(self, layout: StepLayout) -> Any:
        plan = self._plans.get(id(layout))
        if plan is None:
            plan = self._plans[id(layout)] = self.kernel.plan(layout)
        return plan

    def attend(self, layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, position_T: Tensor) -> Tensor:
        """The `Attend` of this step: rotate, append, select, read."""
        layout = self.layout if self.lack_LS is None else self.layout_of(layer)
        cos_TR, sin_TR = self._rope(layer, layout)
        q_THD, k_TGD = self.format.rotate_append(layer, q_THD, k_TGD, v_TGD, cos_TR, sin_TR, layout)
        pages = self.format.pages(layer)
        spec = self.decoder.config.attention(layer)
        if self.policy is None:
            return self.kernel.run(self._plan(layout), layer, q_THD, pages, layout, spec, _DENSE)
        self.policy.on_append(layer, k_TGD, layout)
        selection = self.policy.select(layer, q_THD, pages, layout, spec)
        if isinstance(selection, CopySelection):
            q_THD, pages, layout, selection = selection.q_THD, selection.pages, selection.layout, _DENSE
        return self.kernel.run(
            self._plan(layout), layer, q_THD, pages, layout, spec, selection, self.policy.observe
        )

    def _rope(self, layer: int, layout: StepLayout) -> tuple[Tensor, Tensor]:
        rope = self.decoder.rope(layer)
        key = (id(rope), id(layout))
        tables = self._tables.get(key)
        if tables is None and self.policy is not None and self.policy.unrotated_keys:
            nothing_TR = torch.empty(layout.rows, 0)  # tables that rotate no dimension
            tables = self._tables[key] = (nothing_TR, nothing_TR)
        if tables is None:
            length_T = None
            if rope.dynamic:
                length_T = self.layout.kv_len_S.long()[layout.row_sequence_T()]
            tables = self._tables[key] = rope.tables(layout.position_T, length_T)
        return tables

    # -- the end of the step ------------------------------------------------------------------------------------

    def commit(self) -> None:
        """The rows are cached: advance the sequences."""
        repair = None if self.policy is None else self.policy.repair
        for s, chunk in enumerate(self.chunks):
            kv = chunk.kv
            if repair is not None:
                note_exact(kv, repair, chunk.start, len(chunk.token_ids), chunk.prompt)
            kv.length = max(kv.length, chunk.start + len(chunk.token_ids))
            if self.lack_LS is not None and self.lost_LS is not None:
                self._commit_missing(kv, chunk.start, self.lack_LS[:-1, s], self.lost_LS[:-1, s])

    def _commit_missing(
        self, kv: SequenceKV, start: int, lack_L: NDArray[np.int64], lost_L: NDArray[np.int64]
    ) -> None:
        missing_L = lack_L + lost_L
        if not missing_L.any():
            return
        # A layer that has never cached anything can be cut anywhere, one with gaps only after the last gap.
        absent_L = missing_L == kv.length
        if (lost_L[~absent_L] > 0).any():
            kv.floor = kv.length
        elif ((lack_L == start) & ~absent_L).any():
            kv.floor = max(kv.floor, start)
        kv.missing = missing_L

    def logit_rows(self) -> Tensor:
        """Indices, into the rows that are left, of the rows whose logits were asked for."""
        rows: list[int] = []
        end = 0
        for chunk in self.chunks:
            end += len(chunk.token_ids)
            rows.extend(range(end - chunk.logits, end))
        row_R = torch.tensor(rows, dtype=torch.int64)
        if self.row_T is None:
            return row_R
        where_R = torch.searchsorted(self.row_T, row_R)
        if not bool((self.row_T[where_R] == row_R).all()):
            raise UnsupportedError("logits were asked for rows that a layer hook dropped")
        return where_R
