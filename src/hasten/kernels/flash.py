"""FlashAttention: exact tiled attention, forward and backward, in the order of version 1 or of version 2.

Sources: Dao, Fu, Ermon, Rudra, Re, arXiv 2205.14135 (version 1, algorithms 1, 2, 4 and 5); Dao, arXiv 2307.08691
(version 2, algorithms 1 and 2). One native template serves both; a `Schedule` says which of their differences are on.

Row i of a sequence with T query and S key tokens stands at position i + S - T: masks are aligned bottom right.

Legend: B sequences, H query heads, G kv heads, T query tokens, S key tokens, D head size, R tokens of a packed batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hasten.kernels.attention import merge
from hasten.kernels.flash_terms import LONGEST, VERSION_2, Masking, Schedule, Stats
from hasten.kernels.native import native

__all__ = ["Batch", "backward", "describe", "forward"]


@dataclass(frozen=True)
class Batch:
    """Where sequences lie in their tensors: int64 [B, 7] offsets of q, k, v, out, lse in elements, rows, keys."""

    sequences: npt.NDArray[np.int64]
    heads: int
    groups: int
    size: int

    @property
    def longest(self) -> tuple[int, int]:
        """Most query and most key tokens of a sequence."""
        rows, keys = self.sequences[:, 5:].max(0, initial=0)
        return int(rows), int(keys)


def _aligned(value: Tensor) -> Tensor:
    return value if value.stride(-1) == 1 or value.shape[-1] == 1 else value.contiguous()


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, value in (("q", q), ("k", k), ("v", v)):
        if value.dtype not in (torch.float32, torch.bfloat16) or value.dtype is not q.dtype:
            raise TypeError(
                f"q, k and v must all be float32 or all bfloat16; q is {q.dtype}, {name} {value.dtype}"
            )
        if value.device.type != "cpu":
            raise ValueError(f"{name} is on {value.device}; this kernel runs on the CPU")
        if value.dim() != q.dim():
            raise ValueError(f"{name} has shape {tuple(value.shape)}, q {tuple(q.shape)}: dimensions differ")
    if k.shape != v.shape:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} must have one shape")
    if q.shape[-1] != k.shape[-1] or q.shape[-1] == 0:
        raise ValueError(f"head size of q is {q.shape[-1]}, of k and v {k.shape[-1]}")
    heads, groups = q.shape[1], k.shape[1]
    if groups == 0 or heads == 0 or heads % groups:
        raise ValueError(f"{heads} query heads do not share {groups} kv heads evenly")


def _starts(name: str, value: Tensor | Sequence[int], tokens: int) -> npt.NDArray[np.int64]:
    start = torch.as_tensor(value).to(torch.int64).numpy()
    if (
        start.ndim != 1
        or len(start) < 1
        or start[0] != 0
        or start[-1] != tokens
        or (np.diff(start) < 0).any()
    ):
        raise ValueError(f"{name} must rise from 0 to {tokens} tokens, not {start.tolist()}")
    return start


def _batch(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Any, cu_k: Any, out: tuple[int, int], lse: tuple[int, int]
) -> Batch:
    """``out``, ``lse``: elements between neighbours of the batch, or of the packed axis."""
    _check(q, k, v)
    if q.dim() == 4:
        if cu_q is not None or cu_k is not None:
            raise ValueError("cu_q and cu_k belong to packed tensors [tokens, heads, size]")
        if q.shape[0] != k.shape[0]:
            raise ValueError(f"q holds {q.shape[0]} sequences, k and v {k.shape[0]}")
        at = np.arange(q.shape[0], dtype=np.int64)
        rows, keys = np.full_like(at, q.shape[2]), np.full_like(at, k.shape[2])
        steps = (q.stride(0), k.stride(0), v.stride(0), out[0], lse[0])
        columns = [at * step for step in steps]
    elif q.dim() == 3:
        if cu_q is None or cu_k is None:
            raise ValueError("packed tensors [tokens, heads, size] need cu_q and cu_k")
        first_q, first_k = _starts("cu_q", cu_q, q.shape[0]), _starts("cu_k", cu_k, k.shape[0])
        if len(first_q) != len(first_k):
            raise ValueError(f"cu_q names {len(first_q) - 1} sequences, cu_k {len(first_k) - 1}")
        rows, keys = np.diff(first_q), np.diff(first_k)
        columns = [first_q[:-1] * q.stride(0), first_k[:-1] * k.stride(0), first_k[:-1] * v.stride(0)]
        columns += [first_q[:-1] * out[0], first_q[:-1] * lse[0]]
    else:
        raise ValueError(f"q must be [B, H, T, D] or packed [R, H, D], not shape {tuple(q.shape)}")
    table = np.ascontiguousarray(np.stack([*columns, rows, keys], 1), np.int64)
    if len(table) and table[:, 5:].max() >= LONGEST:
        raise ValueError(f"a sequence must be shorter than {LONGEST} tokens")
    return Batch(table, q.shape[1], k.shape[1], q.shape[-1])


def _head_strides(value: Tensor) -> tuple[int, int]:
    """(token, head) strides of [B, H, T, D] or [R, H, D]."""
    return (value.stride(2), value.stride(1)) if value.dim() == 4 else (value.stride(0), value.stride(1))


def describe(batch: Batch, masking: Masking, schedule: Schedule) -> dict[str, Any]:
    """What the native kernels read, apart from the tensors: fields of that name are zero here.

    Tensors under ``held`` must outlive the call.
    """
    count, heads = len(batch.sequences), batch.heads
    rows, keys = batch.longest
    held: list[Tensor] = []
    out: dict[str, Any] = {
        "heads": heads,
        "groups": batch.groups,
        "size": batch.size,
        "sequences": batch.sequences,
        "scale": float(masking.scale),
        "softcap": 0.0 if masking.softcap is None else float(masking.softcap),
        "left": -1 if masking.left is None else masking.left,
        "right": -1 if masking.right is None else masking.right,
        "bias": 0,
        "slope": 0,
        "keep": 0,
        "keep_width": 0,
        "block": masking.block,
        "threshold": masking.threshold,
        "seed": masking.seed,
        "inverse": 1.0 / (1.0 - masking.threshold / 2**32),
        "held": held,
        "q_bf16": False,
        "kv_bf16": False,
        "sum": 0,
        "table": 0,
        "table_width": 0,
        "page": 1,
        "out_split": 0,
        "lse_split": 0,
        **{name: getattr(schedule, name) for name in Schedule.__dataclass_fields__},
    }
    strides: tuple[int, ...] = (0, 0, 0, 0)
    if (bias := masking.bias_BHTS) is not None:
        if bias.dtype is not torch.float32:
            raise TypeError(f"bias_BHTS must be float32, not {bias.dtype}")
        if bias.requires_grad:
            raise ValueError("bias_BHTS has no gradient here; detach it")
        bias = _expand("bias_BHTS", bias, (count, heads, rows, keys))
        held.append(bias)
        out["bias"], strides = bias.data_ptr(), bias.stride()
    out |= dict(zip(("bias_batch", "bias_head", "bias_row", "bias_key"), strides, strict=True))
    if (slope := masking.alibi_H) is not None:
        if slope.dtype is not torch.float32:
            raise TypeError(f"alibi_H must be float32, not {slope.dtype}")
        if slope.shape != (heads,):
            raise ValueError(f"alibi_H must have shape ({heads},), not {tuple(slope.shape)}")
        held.append(slope.detach().contiguous())
        out["slope"] = held[-1].data_ptr()
    strides = (0, 0, 0, 0)
    if (keep := masking.keep_BHQK) is not None:
        if keep.dtype is not torch.bool:
            raise TypeError(f"keep_BHQK must be bool, not {keep.dtype}")
        block = masking.block
        keep = _expand("keep_BHQK", keep, (count, heads, -(-rows // block), -(-keys // block)))
        if 0 not in keep.shape[2:] and keep.stride()[2:] != (keep.shape[3], 1):
            keep = keep.contiguous()
        held.append(keep)
        out["keep"], strides = keep.data_ptr(), keep.stride()
        out["keep_width"] = keep.shape[3]
    out["keep_batch"], out["keep_head"] = strides[:2]
    return out


def _expand(name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    try:
        return value.detach().expand(shape)
    except RuntimeError:
        raise ValueError(f"{name} of shape {tuple(value.shape)} does not expand to {shape}") from None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    masking: Masking,
    schedule: Schedule = VERSION_2,
    *,
    cu_q: Tensor | Sequence[int] | None = None,
    cu_k: Tensor | Sequence[int] | None = None,
    module: ModuleType | None = None,
) -> tuple[Tensor, Stats]:
    """Attention output, shaped and typed like ``q``, and the rows' float32 statistics.

    q: [B, H, T, D]; k, v: [B, G, S, D]; or packed [R, H, D] and [R', G, D] with ``cu_q``, ``cu_k`` [B + 1], the prefix
    sums of the sequences' tokens. All float32 or all bfloat16, any strides with contiguous heads; H a multiple of
    G. Sums are float32. A row that sees nothing gives 0 and -inf.

    ``module`` is a native module of another level (tests). Raises TypeError for a wrong dtype and ValueError for shapes
    or settings that do not fit.
    """
    lib = native() if module is None else module
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    if schedule.splits > 1:
        return _split(q, k, v, masking, schedule, cu_q, cu_k, lib)
    out = torch.empty(q.shape)
    lse = torch.empty(q.shape[:3] if q.dim() == 4 else q.shape[1::-1])
    batch = _batch(q, k, v, cu_q, cu_k, (out.stride(0), 0), (lse.stride(0) if q.dim() == 4 else 1, 0))
    total = None if schedule.deferred else torch.empty_like(lse)
    _call(lib, batch, q, k, v, masking, schedule, out, lse, total)
    return out.to(q.dtype), Stats(lse, total)


def _lse_stride(lse: Tensor) -> tuple[int, int]:
    """(token, head) strides of [B, H, T] or [H, R]."""
    return (1, lse.stride(-2))


def _call(
    lib: ModuleType,
    batch: Batch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    masking: Masking,
    schedule: Schedule,
    out: Tensor,
    lse: Tensor,
    total: Tensor | None,
    **more: Any,
) -> None:
    """Run the native forward kernel; ``more`` replaces fields of its description."""
    description = describe(batch, masking, schedule) | {
        "q": q.data_ptr(),
        "k": k.data_ptr(),
        "v": v.data_ptr(),
        "q_bf16": q.dtype is torch.bfloat16,
        "kv_bf16": k.dtype is torch.bfloat16,
        "q_stride": _head_strides(q),
        "k_stride": _head_strides(k),
        "v_stride": _head_strides(v),
        "out": out.data_ptr(),
        "out_stride": _head_strides(out),
        "lse": lse.data_ptr(),
        "lse_stride": _lse_stride(lse),
        "sum": 0 if total is None else total.data_ptr(),
    }
    lib.flash_forward(description | more)


def _split(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    masking: Masking,
    schedule: Schedule,
    cu_q: Any,
    cu_k: Any,
    lib: ModuleType,
) -> tuple[Tensor, Stats]:
    """Parts of the keys apart, [splits, rows, H, D], merged by their log-sum-exp."""
    heads, size, dense = q.shape[1], q.shape[-1], q.dim() == 4
    per = q.shape[2] if dense else 1
    rows = q.shape[0] * per
    splits = schedule.splits
    out, lse = torch.empty(splits, rows, heads, size), torch.empty(splits, rows, heads)
    batch = _batch(q, k, v, cu_q, cu_k, (per * heads * size, 0), (per * heads, 0))
    where = {
        "out_stride": (heads * size, size),
        "lse_stride": (heads, 1),
        "out_split": rows * heads * size,
        "lse_split": rows * heads,
    }
    _call(lib, batch, q, k, v, masking, schedule, out[0], lse[0], None, **where)
    start = torch.arange(rows + 1, dtype=torch.int32) * splits
    entry = torch.arange(splits * rows, dtype=torch.int32).view(splits, rows).T.contiguous().view(-1)
    joined, joined_lse = merge(out.view(-1, heads, size), lse.view(-1, heads), start, entry, module=lib)
    if not dense:
        return joined.to(q.dtype), Stats(joined_lse.T.contiguous())
    shape = (q.shape[0], per, heads)
    return (
        joined.view(*shape, size).transpose(1, 2).to(q.dtype, memory_format=torch.contiguous_format),
        Stats(joined_lse.view(shape).transpose(1, 2).contiguous()),
    )


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    stats: Stats,
    masking: Masking,
    schedule: Schedule = VERSION_2,
    *,
    cu_q: Tensor | Sequence[int] | None = None,
    cu_k: Tensor | Sequence[int] | None = None,
    module: ModuleType | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, shaped and typed like them, from what `forward` returned under the same settings.

    Weights are recomputed tile by tile; gradients of kv heads are summed over their query heads in place. Sums are
    float32. Raises as `forward` does.
    """
    lib = native() if module is None else module
    if (stats.sum is None) != schedule.deferred:
        raise ValueError("stats were made by another version than the schedule's")
    if dout.shape != q.shape or out.shape != q.shape:
        raise ValueError(f"dout {tuple(dout.shape)}, out {tuple(out.shape)}, q {tuple(q.shape)} must agree")
    size = q.shape[-1]
    pad = -size % lib.flash_vector
    # Gradients run on whole float32 vectors: other inputs are copied, which costs memory linear in length.
    q32, k32, v32 = (_aligned(_whole(x, pad)) for x in (q, k, v))
    dout32, out32 = (_whole(x, pad).contiguous() for x in (dout, out))
    dq, dk, dv = torch.zeros_like(dout32), torch.empty(k32.shape), torch.empty(v32.shape)
    lse = stats.lse.contiguous()
    dense = q.dim() == 4
    batch = _batch(q32, k32, v32, cu_q, cu_k, (out32.stride(0), 0), (lse.stride(0) if dense else 1, 0))
    if dense:
        offset = np.arange(len(batch.sequences), dtype=np.int64) * dk.stride(0)
    else:
        offset = torch.as_tensor(cu_k).to(torch.int64).numpy()[:-1] * dk.stride(0)
    description = describe(batch, masking, replace(schedule, splits=1)) | {
        "q": q32.data_ptr(),
        "k": k32.data_ptr(),
        "v": v32.data_ptr(),
        "q_stride": _head_strides(q32),
        "k_stride": _head_strides(k32),
        "v_stride": _head_strides(v32),
        "out": out32.data_ptr(),
        "dout": dout32.data_ptr(),
        "out_stride": _head_strides(out32),
        "lse": lse.data_ptr(),
        "lse_stride": _lse_stride(lse),
        "sum": 0 if stats.sum is None else stats.sum.data_ptr(),
        "dq": dq.data_ptr(),
        "dq_size": dq.numel(),
        "dk": dk.data_ptr(),
        "dv": dv.data_ptr(),
        "kv_gradient_offset": np.ascontiguousarray(offset),
        "kv_gradient_stride": _head_strides(dk),
    }
    lib.flash_backward(description)
    return tuple(x[..., :size].to(q.dtype) for x in (dq, dk, dv))  # type: ignore[return-value]


def _whole(value: Tensor, pad: int) -> Tensor:
    value = value.detach().float()
    return torch.nn.functional.pad(value, (0, pad)) if pad else value
