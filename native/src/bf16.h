// Free of nanobind: also compiled into attention variants at run time (hasten/kernels/variants.py).
#pragma once

#include <cstdint>

namespace hasten {

// bfloat16 is passed as its bits: torch tensors are viewed as int16 on the Python side.
inline float bf16_to_float(std::uint16_t bits) {
  std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float out;
  __builtin_memcpy(&out, &wide, sizeof out);
  return out;
}

}  // namespace hasten
