"""Attention variants as a few lines of C++ given as strings, compiled over the engine's tile loops when first used.

The customisation template of FlashInfer (Ye et al., arXiv 2501.01005, section 3.2.3). A `Variant` names the functors it
changes; each is the body of a C++ member function with these arguments:

    query_transform(float* q, int size, int batch, int qo, int qo_head)
        changes a query vector, before it is scaled
    key_transform(float* k, int size, int kv, int kv_head), value_transform(float* v, ...)
        changes a key or value as it is read
    float logits_transform(float logit, int batch, int qo, int kv, int qo_head, int kv_head)
    bool logits_mask(int batch, int qo, int kv, int qo_head, int kv_head)
        whether the token is seen
    update(float& m, float& d, int batch, int qo, int qo_head)
        changes the maximum and the sum of the softmax, once per row and head
    output_transform(float* o, int size, int batch, int qo, int qo_head)
        changes the output vector, after all parts are joined

``qo`` counts the request's query rows of the step, ``kv`` its cached tokens; logits are scaled and natural. Bodies may
use the extra parameters by name, ``kv_len(batch)``, ``qo_len(batch)``, ``position(batch, qo)`` (a row's absolute
position), and ``exp``, ``tanh``, ``sigmoid``, which vectorise. Without softmax the weights are the transformed logits.

Legend: T query rows, H query heads, G kv heads, D head size, N pages, P page size, B requests.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hasten.kernels.attention import cap_of, float_rows, index_array, pages_of
from hasten.kernels.schedule import Schedule
from hasten.kernels.variants_build import Compiled, compiled

__all__ = ["VANILLA", "Batch", "Variant", "attend"]

# Parameter types: how they read in C++, and how they arrive.
_SCALARS: dict[str, Any] = {"float": ctypes.c_float, "int": ctypes.c_int32}
_ARRAYS = {
    "float*": (torch.float32, "const float*"),
    "int32*": (torch.int32, "const std::int32_t*"),
    "int64*": (torch.int64, "const std::int64_t*"),
    "uint8*": (torch.uint8, "const std::uint8_t*"),
}
_CACHED = {torch.float32: "float", torch.bfloat16: "std::uint16_t"}

# Functor: (flag in C++, return type, arguments).
_FUNCTORS = {
    "query_transform": ("on_query", "void", "float* q, int size, int batch, int qo, int qo_head"),
    "key_transform": ("on_key", "void", "float* k, int size, int kv, int kv_head"),
    "value_transform": ("on_value", "void", "float* v, int size, int kv, int kv_head"),
    "logits_transform": (
        "on_logits",
        "float",
        "float logit, int batch, int qo, int kv, int qo_head, int kv_head",
    ),
    "logits_mask": ("on_mask", "bool", "int batch, int qo, int kv, int qo_head, int kv_head"),
    "update": ("on_update", "void", "float& m, float& d, int batch, int qo, int qo_head"),
    "output_transform": ("on_output", "void", "float* o, int size, int batch, int qo, int qo_head"),
}
_HELPERS = {"exp", "tanh", "sigmoid", "position", "kv_len", "qo_len", "take", "use_softmax", "batch_"}
_RESERVED = {
    *_HELPERS,
    *_FUNCTORS,
    *(flag for flag, _, _ in _FUNCTORS.values()),
    *(name for _, _, given in _FUNCTORS.values() for name in re.findall(r"(\w+)(?:,|$)", given)),
}


@dataclass(frozen=True)
class Variant:
    """One attention variant; see the module's text for the functors.

    params: extra parameters, name -> "float", "int", "float*", "int32*", "int64*" or "uint8*".
    Raises ValueError for a name or type that cannot be.
    """

    name: str
    query_transform: str = ""
    key_transform: str = ""
    value_transform: str = ""
    logits_transform: str = ""
    logits_mask: str = ""
    update: str = ""
    output_transform: str = ""
    use_softmax: bool = True
    params: Mapping[str, str] = field(default_factory=dict)
    # What a layer's call would otherwise make again: the parameters' structure, and what was built.
    _structure: Any = field(init=False, repr=False, compare=False)
    _built: dict[tuple[torch.dtype, str], Compiled] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise ValueError(f"variant name {self.name!r} must be lower-case letters, digits and _")
        for name, kind in self.params.items():
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or name in _RESERVED:
                raise ValueError(f"variant {self.name}: a parameter cannot be called {name!r}")
            if kind not in _SCALARS and kind not in _ARRAYS:
                known = ", ".join([*_SCALARS, *_ARRAYS])
                raise ValueError(
                    f"variant {self.name}: parameter {name} has type {kind!r}; use one of {known}"
                )
        if not self.use_softmax and self.update:
            raise ValueError(f"variant {self.name}: without softmax there is no maximum and sum to update")
        kinds = [(name, _SCALARS.get(kind, ctypes.c_void_p)) for name, kind in self.params.items()]
        object.__setattr__(self, "_structure", type("Params", (ctypes.Structure,), {"_fields_": kinds}))

    @property
    def prebuilt(self) -> bool:
        """Whether the engine's own kernel computes it: plain softmax attention (windows and soft caps are settings)."""
        return self.use_softmax and not any(getattr(self, name) for name in _FUNCTORS)

    def source(self, cached: torch.dtype) -> str:
        """The C++ translation unit, for pages of dtype ``cached``."""
        lines = [f"// Attention variant {self.name}.", '#include "attend_variant.h"', "", "namespace {", ""]
        lines += ["struct Params {"]
        for name, kind in self.params.items():
            lines.append(f"  {kind if kind in _SCALARS else _ARRAYS[kind][1]} {name};")
        lines += ["};", "", "struct Variant : hasten::attend::VariantBase, Params {"]
        lines.append(f"  static constexpr bool use_softmax = {str(self.use_softmax).lower()};")
        given = [name for name in _FUNCTORS if getattr(self, name)]
        flags = [f"{_FUNCTORS[name][0]} = true" for name in given]
        if flags:
            lines.append(f"  static constexpr bool {', '.join(flags)};")
        if self.params:
            lines.append(
                "  void take(const void* p) { static_cast<Params&>(*this) = *static_cast<const Params*>(p); }"
            )
        else:
            lines.append("  void take(const void*) {}")
        for name in given:
            _, returns, arguments = _FUNCTORS[name]
            plain = ", ".join(f"[[maybe_unused]] {argument}" for argument in arguments.split(", "))
            lines += [f"  {returns} {name}({plain}) const {{", f'#line 1 "{self.name}.{name}"']
            lines += [getattr(self, name), "  }"]
        lines += ["};", "", "}  // namespace", "", f"HASTEN_VARIANT(Variant, {_CACHED[cached]})", ""]
        return "\n".join(lines)

    def compiled(self, cached: torch.dtype, level: str) -> Compiled:
        """The built variant, from the cache folder or the compiler. Raises `UnsupportedError` without a compiler."""
        found = self._built.get((cached, level))
        if found is None:
            found = self._built[cached, level] = compiled(self.name, self.source(cached), level)
        return found

    def pack(self, given: Mapping[str, Any]) -> ctypes.Structure:
        """The parameters as C++ reads them. Raises ValueError or TypeError for ones that are missing or wrong."""
        if set(given) != set(self.params):
            raise ValueError(
                f"variant {self.name} takes the parameters {sorted(self.params) or 'none'}, not {sorted(given)}"
            )
        packed: ctypes.Structure = self._structure()
        for name, kind in self.params.items():
            value = given[name]
            if kind in _SCALARS:
                setattr(packed, name, value)
                continue
            dtype = _ARRAYS[kind][0]
            if not isinstance(value, Tensor) or value.dtype is not dtype:
                found = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"variant {self.name}: {name} must be a {dtype} tensor, not {found}")
            if not value.is_contiguous() or value.device.type != "cpu":
                raise ValueError(f"variant {self.name}: {name} must be contiguous and on the CPU")
            setattr(packed, name, value.data_ptr())
        return packed


VANILLA = Variant("vanilla")


@dataclass(frozen=True)
class Batch:
    """Which request each query row belongs to (``of_row_T``), where their rows start, their cached tokens. int32."""

    of_row_T: Tensor
    query_start_B1: Tensor
    length_B: Tensor


def attend(
    variant: Variant,
    schedule: Schedule,
    q_THD: Tensor,
    k_NGPD: Tensor,
    v_NGPD: Tensor,
    scale: float,
    batch: Batch | None,
    softcap: float | None = None,
    **params: Any,
) -> tuple[Tensor, Tensor | None]:
    """Run a schedule with a variant: ``(out_THD, lse_TH)`` float32; lse is None without softmax.

    ``softcap`` belongs to the prebuilt kernel; a compiled variant caps in its own functor. Raises `UnsupportedError`
    when the variant has to be compiled and there is no compiler, TypeError and ValueError for inputs that do not fit.
    """
    packed = variant.pack(params)
    if variant.prebuilt:
        return schedule.run(q_THD, k_NGPD, v_NGPD, scale, softcap)
    if batch is None:
        raise ValueError(
            f"variant {variant.name} is compiled: it needs to know which request each row belongs to"
        )
    if cap_of(softcap):
        raise ValueError(f"variant {variant.name} is compiled: put the soft cap into its logits_transform")
    rows, heads, size = float_rows("q_THD", q_THD)
    pages, groups, page, _ = pages_of(q_THD, k_NGPD, v_NGPD, int8=False)
    built = variant.compiled(k_NGPD.dtype, str(schedule.module.level))
    out = torch.empty((rows, heads, size))
    lse = torch.empty((rows, heads))
    schedule.module.schedule_run_variant(
        schedule.handle,
        built.worker,
        built.join,
        built.call_size,
        q_THD.data_ptr(),
        k_NGPD.data_ptr(),
        v_NGPD.data_ptr(),
        out.data_ptr(),
        lse.data_ptr(),
        rows,
        heads,
        groups,
        size,
        pages,
        page,
        scale,
        index_array("batch.of_row_T", batch.of_row_T, 1),
        index_array("batch.query_start_B1", batch.query_start_B1, 1),
        index_array("batch.length_B", batch.length_B, 1),
        ctypes.addressof(packed),
    )
    return out, lse if variant.use_softmax else None
