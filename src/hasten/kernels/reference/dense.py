"""Reference of the dense linear kernel.

Legend: T rows, I inputs, O outputs, N blocks of 16 outputs.
"""

from __future__ import annotations

from torch import Tensor


def dense_linear(x_TI: Tensor, packed_NI16: Tensor, outputs: int, bias_P: Tensor | None = None) -> Tensor:
    """``x_TI @ W^T + bias`` on the unpacked weight, float32 [T, O]."""
    weight_IO = packed_NI16.float().permute(1, 0, 2).flatten(1)[:, :outputs]
    y_TO = x_TI @ weight_IO
    return y_TO if bias_P is None else y_TO + bias_P[:outputs]
