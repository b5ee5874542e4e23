"""The Hugging Face GPTQ layout: integer weights in words, as ``transformers`` folders hold them.

A quantised linear ``NAME`` of I inputs and O outputs is stored as

    NAME.qweight  int32 [I * bits / 32, O]   codes, packed along the inputs
    NAME.qzeros   int32 [G, O * bits / 32]   zero points, packed along the outputs
    NAME.scales   float16 [G, O]
    NAME.g_idx    int32 [I]                  the group of every input
    NAME.bias     float [O]                  optional

Words are little-endian bit streams: value n takes bits [n * bits, (n + 1) * bits) (so with 3 bits, values 10 and 21 of
every 32 straddle words). The original layout ("gptq") stores zero - 1; "gptq_v2" stores the zero itself. A weight is
scale * (code - zero).

Legend: N packed values, W words, I inputs, O outputs, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.errors import IntegrityError, ModelFormatError, UnsupportedError

BITS = (2, 3, 4, 8)
FORMATS = ("gptq", "gptq_v2")
TENSORS = ("qweight", "qzeros", "scales", "g_idx")


def pack_words(values: Tensor, bits: int) -> Tensor:
    """Pack non-negative integers [..., N] below 2^bits into int32 words [..., ceil(N * bits / 32)]."""
    values = values.to(torch.uint8)
    if 8 % bits:  # values straddle bytes: lay out single bits
        values = ((values[..., None] >> torch.arange(bits, dtype=torch.uint8)) & 1).flatten(-2)
        bits = 1
    values = nn.functional.pad(values, (0, -values.shape[-1] % (32 // bits)))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    octets = (values.unflatten(-1, (-1, 8 // bits)) << shifts).sum(-1, dtype=torch.uint8)
    return octets.view(torch.int32)


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` values of int32 words [..., W] as uint8 [..., count]."""
    octets = words.contiguous().view(torch.uint8)
    unit = bits if 8 % bits == 0 else 1
    if unit < 8:
        shifts = torch.arange(0, 8, unit, dtype=torch.uint8)
        octets = ((octets[..., None] >> shifts) & ((1 << unit) - 1)).flatten(-2)
    if unit == bits:
        return octets[..., :count].contiguous()
    values = octets[..., : count * bits].unflatten(-1, (count, bits))
    return (values << torch.arange(bits, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


@dataclass(frozen=True)
class StoredSettings:
    """What a ``quantization_config`` says. group_size None: one group per row. v2: zeros stored as they are."""

    bits: int
    group_size: int | None
    symmetric: bool
    act_order: bool
    v2: bool


def stored_settings(quantization: Mapping[str, Any], where: str) -> StoredSettings:
    """Read and check a ``quantization_config``. Raises `UnsupportedError` or `ModelFormatError` naming ``where``."""
    bits = quantization.get("bits")
    if bits not in BITS or isinstance(bits, bool):
        raise UnsupportedError(f"{where}: GPTQ with bits = {bits!r} is not supported (supported: 2, 3, 4, 8)")
    group_size = quantization.get("group_size", 128)
    if (
        isinstance(group_size, bool)
        or not isinstance(group_size, int)
        or (group_size < 1 and group_size != -1)
    ):
        raise ModelFormatError(f"{where}: group_size must be -1 or a positive integer, not {group_size!r}")
    name = quantization.get("checkpoint_format") or quantization.get("format") or "gptq"
    if name not in FORMATS or quantization.get("is_marlin_format"):
        kind = "marlin" if quantization.get("is_marlin_format") else name
        raise UnsupportedError(
            f"{where}: GPTQ checkpoint_format {kind!r} is not supported (supported: {', '.join(FORMATS)}); "
            "convert the model to the plain gptq layout"
        )
    if quantization.get("dynamic"):
        raise UnsupportedError(f"{where}: per-module overrides ('dynamic') are not supported")
    return StoredSettings(
        bits=int(bits),
        group_size=None if group_size == -1 else group_size,
        symmetric=bool(quantization.get("sym", True)),
        act_order=bool(quantization.get("desc_act", False)),
        v2=name == "gptq_v2",
    )


@dataclass(frozen=True)
class GPTQTensors:
    """One linear, unpacked: scale * (code - zero). codes_OI: uint8. scale_OG: float32. zero_OG: uint8 or int16.

    group_I: int64, the group of every input.
    """

    bits: int
    codes_OI: Tensor
    scale_OG: Tensor
    zero_OG: Tensor
    group_I: Tensor

    def dequantize(self) -> Tensor:
        """The exact float32 weight [O, I]."""
        scale_OI, zero_OI = self.scale_OG[:, self.group_I], self.zero_OG[:, self.group_I]
        return (self.codes_OI.to(torch.float32) - zero_OI) * scale_OI


def write_linear(linear: GPTQTensors, v2: bool) -> dict[str, Tensor]:
    """The tensors (``qweight``, ``qzeros``, ``scales``, ``g_idx``) of one linear.

    Raises `UnsupportedError` for what the layout cannot hold: sides that do not fill words, and in the original
    format a zero point of 0.
    """
    outputs, inputs = linear.codes_OI.shape
    if inputs * linear.bits % 32 or outputs * linear.bits % 32:
        raise UnsupportedError(
            f"a linear of {outputs}x{inputs} cannot be stored with {linear.bits} bits in the GPTQ layout: both sides "
            "times bits must be multiples of 32"
        )
    zeros_GO = linear.zero_OG.t().to(torch.int64)
    if not v2:
        if bool((zeros_GO < 1).any()):
            raise UnsupportedError(
                "checkpoint_format 'gptq' cannot hold a zero point of 0; save as 'gptq_v2' or use a symmetric grid"
            )
        zeros_GO = zeros_GO - 1
    return {
        "qweight": pack_words(linear.codes_OI, linear.bits).t().contiguous(),
        "qzeros": pack_words(zeros_GO, linear.bits),
        "scales": linear.scale_OG.t().to(torch.float16).contiguous(),
        "g_idx": linear.group_I.to(torch.int32),
    }


def read_linear(
    find: Callable[[str], Tensor | None],
    name: str,
    outputs: int,
    inputs: int,
    settings: StoredSettings,
) -> GPTQTensors:
    """One quantised linear. ``find("qweight")`` gives a stored tensor or None; ``name`` is for messages.

    Raises `ModelFormatError` for missing tensors, wrong dtypes or shapes and impossible group indices,
    `IntegrityError` for scales that are NaN or infinite.
    """
    bits = settings.bits
    groups = 1 if settings.group_size is None else -(-inputs // settings.group_size)

    def take(leaf: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> Tensor:
        tensor = find(leaf)
        if tensor is None:
            raise ModelFormatError(f"tensor '{name}.{leaf}' is missing")
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
            raise ModelFormatError(
                f"tensor '{name}.{leaf}' is {tensor.dtype} {tuple(tensor.shape)}; a {outputs}x{inputs} linear with "
                f"{bits} bits and {groups} groups needs {dtypes[0]} {shape}"
            )
        return tensor

    if inputs * bits % 32 or outputs * bits % 32:
        raise UnsupportedError(
            f"'{name}': a {outputs}x{inputs} linear does not fill 32-bit words with {bits} bits"
        )
    qweight = take("qweight", (inputs * bits // 32, outputs), (torch.int32,))
    qzeros = take("qzeros", (groups, outputs * bits // 32), (torch.int32,))
    scales = take("scales", (groups, outputs), (torch.float16, torch.bfloat16, torch.float32)).to(
        torch.float32
    )
    if not torch.isfinite(scales).all():
        raise IntegrityError(f"tensor '{name}.scales' holds NaN or infinity; fetch the model again")
    zeros_GO = unpack_words(qzeros, bits, outputs)
    return GPTQTensors(
        bits,
        unpack_words(qweight.t(), bits, inputs),
        scales.t().contiguous(),
        # The original layout may mean 2^bits: a stored 2^bits - 1 is not wrapped, as no reader of it does.
        (zeros_GO if settings.v2 else zeros_GO.to(torch.int16) + 1).t().contiguous(),
        _groups(find, name, inputs, groups, settings),
    )


def _groups(
    find: Callable[[str], Tensor | None], name: str, inputs: int, groups: int, settings: StoredSettings
) -> Tensor:
    size = settings.group_size or inputs
    plain_I = torch.arange(inputs) // size
    stored = find("g_idx")
    if stored is None:
        if settings.act_order and groups > 1:
            raise ModelFormatError(
                f"tensor '{name}.g_idx' is missing; a model quantised with desc_act needs it"
            )
        return plain_I
    if tuple(stored.shape) != (inputs,) or stored.dtype.is_floating_point:
        raise ModelFormatError(
            f"tensor '{name}.g_idx' is {stored.dtype} {tuple(stored.shape)}, not integers ({inputs},)"
        )
    group_I = stored.to(torch.int64)
    # A reordered layer still visits its groups one after the other, so the counts are those of the plain order.
    if int(group_I.min()) < 0 or int(group_I.max()) >= groups:
        raise ModelFormatError(f"tensor '{name}.g_idx' names groups outside [0, {groups})")
    if not torch.equal(torch.bincount(group_I, minlength=groups), torch.bincount(plain_I, minlength=groups)):
        raise ModelFormatError(
            f"tensor '{name}.g_idx' gives groups of unequal sizes; group_size in config.json says {size}"
        )
    return group_I
