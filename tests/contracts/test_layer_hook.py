from __future__ import annotations

import torch

from hasten.attention.layout import StepLayout
from hasten.lm.layers.hook import LayerHook

SLOT = "layer_hook"
DEFAULTS = {"identity": LayerHook}


def layout(counts: list[int]) -> StepLayout:
    total = sum(counts)
    start = torch.tensor([0, *counts]).cumsum(0).int()
    pages = torch.arange(len(counts), dtype=torch.int32)[:, None]
    slots = torch.cat([torch.arange(n) + 64 * s for s, n in enumerate(counts)])
    return StepLayout(
        start,
        torch.tensor(counts, dtype=torch.int32),
        pages,
        torch.arange(total),
        slots,
        64,
        tuple(range(len(counts))),
    )


def test_hidden_states_keep_their_shape_and_rows_are_dropped_by_the_rules(provider, context):
    hook, count = provider(), context.config.num_layers
    for counts in ([1], [5], [1, 1, 1], [7, 1, 12]):
        step = layout(counts)
        hook.begin_step(step)
        x_TE = torch.randn(
            sum(counts), context.config.hidden_size, generator=torch.Generator().manual_seed(1)
        )
        for layer in range(count + 1):
            if layer not in hook.layers(count):
                continue
            out_TE = hook.before(layer, x_TE.clone(), step)
            assert out_TE.shape == x_TE.shape
            assert out_TE.dtype == x_TE.dtype
            assert torch.isfinite(out_TE).all()
            if layer < count:
                kept = hook.keep_rows(layer, out_TE, step)
                if kept is not None:
                    assert kept.dtype == torch.int64
                    assert len(set(kept.tolist())) == len(kept)
                    assert set((step.query_start_S1[1:] - 1).tolist()) <= set(kept.tolist())
                skips = hook.skip(layer, step)
                assert [type(s) for s in skips] == [bool, bool]
                if kept is not None:
                    break  # the runner would give later layers another layout
    hook.forget(0)
    hook.forget(12345)  # never seen


def test_default_hook_does_nothing(context):
    hook, x_TE = LayerHook(), torch.randn(4, 8)
    assert list(hook.layers(3)) == [0, 1, 2, 3]
    assert hook.before(0, x_TE, layout([4])) is x_TE
    assert hook.keep_rows(0, x_TE, layout([4])) is None
    assert hook.skip(0, layout([4])) == (False, False)
