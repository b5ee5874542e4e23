// Which cached tokens the decode rows of a layer read: an attention policy that runs inside a native step (decode.cpp).
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>

#include "hasten.h"

namespace hasten {

// Decode rows of a layer that reads densely: rotated queries of rows `stride` floats apart, the pages table[rows][width] and
// tokens of each, and where the layer's keys lie. Slots and pages have been checked.
struct Watched {
  const float* q;
  std::int64_t stride;
  int rows;
  const std::int32_t* table;
  int width;
  const std::int32_t* length;
  const void* k;
  int kind, page_size;  // a PageKind
  float scale, softcap;
};

struct Selector {
  int heads = 0, kv_heads = 0, size = 0;
  int pages = 0, page_size = 0;  // of the pool that it keeps something of; 0: of any
  int budget = 0;   // rows that see no more tokens read densely
  int choices = 0;  // of a row: its kv heads or its query heads
  bool watches = false;  // the layer reads densely in any case: `watch` is called in the place of `choose`
  virtual ~Selector() = default;
  virtual void watch(const Watched&) const {}
  // Tokens a choice has at most, in a step whose longest row sees `longest`.
  virtual int most(int longest) const { return longest < budget ? longest : budget; }
  // The rotated keys of `rows` rows [kv_heads][size], `stride` floats apart, were cached at `slot`.
  virtual void append(const float* k, std::int64_t stride, const std::int64_t* slot, int rows) const = 0;
  // index[rows][choices][most], ascending, and count[rows][choices], for rotated queries [heads][size] of rows that see
  // `length` tokens in the pages table[rows][width]; most: that of the longest. Slots and pages have been checked.
  virtual void choose(const float* q, std::int64_t stride, int rows, const std::int32_t* table, int width,
                      const std::int32_t* length, int most, std::int32_t* index, std::int32_t* count) const = 0;
};

inline constexpr const char* kSelectorName = "hasten.selector";

inline nb::capsule wrap_selector(std::unique_ptr<Selector> selector) {
  return nb::capsule(selector.release(), kSelectorName, [](void* p) noexcept { delete static_cast<Selector*>(p); });
}

inline const Selector& unwrap_selector(const nb::capsule& handle) {
  require(std::strcmp(handle.name(), kSelectorName) == 0, "not a selector");
  return *static_cast<const Selector*>(handle.data());
}

}  // namespace hasten
