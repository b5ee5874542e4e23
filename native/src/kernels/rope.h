// Rotary embedding and the append to the KV pages, for other kernels; see rope.cpp.
#pragma once

#include <cstdint>
#include <cstring>

#include "hasten.h"
#include "pages.h"

namespace hasten::rope {

inline std::uint16_t to_bf16(float x) {  // round to nearest even, as torch does
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FC0;
  return static_cast<std::uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

struct Rows {  // float rows of `heads` heads; rows lie `stride` floats apart (they may be slices of a fused projection)
  float* data;
  std::int64_t stride;
  int heads;
};

struct Tables {  // [rows][rotated]
  const float *cos, *sin;
  int rotated;
};

struct Pool {
  void *k, *v;  // [pages][heads][page][size], of int8 [size + 4]
  std::int64_t pages;
  int page;
  int kind;  // a PageKind
};

// Raises ValueError for a slot outside the pool.
void check_slots(const std::int64_t* slots, std::int64_t rows, std::int64_t pages, int page);
void append(Rows q, Rows k, Rows v, int size, Tables tables, bool rotate_keys, const std::int64_t* slots,
            std::int64_t rows, const Pool& pool);

}  // namespace hasten::rope
