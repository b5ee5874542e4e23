// A sequence's cached tokens as block-sparse attention sees them: any order, any blocks. See block_list.cpp.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>

#include "attend_many.h"
#include "hasten.h"

namespace hasten::blocks {

using attend::kTile;

// Pages [pages][groups][page][size] of one sequence of `length` tokens.
struct Cached {
  const void *k, *v;
  const std::int32_t* table;
  int length, groups, size, page;

  template <typename KV>
  std::size_t at(int token, int group) const {
    return ((static_cast<std::size_t>(table[token / page]) * groups + group) * page + token % page) *
           (static_cast<std::size_t>(size) + kTail<KV>);
  }
  template <typename KV>
  const KV* key(int token, int group) const {
    return static_cast<const KV*>(k) + at<KV>(token, group);
  }
  template <typename KV>
  const KV* value(int token, int group) const {
    return static_cast<const KV*>(v) + at<KV>(token, group);
  }
};

using Table = Array<const std::int32_t, -1>;

// Raises ValueError unless the table names a page of the pool for every token.
inline void check_table(const Table& table, int length, int pages, int page) {
  require(length >= 0 && page > 0, "the length must not be negative");
  const int used = (length + page - 1) / page;
  require(static_cast<int>(table.shape(0)) >= used, "table_M has fewer pages than the sequence needs");
  for (int i = 0; i < used; ++i)
    require(table.data()[i] >= 0 && table.data()[i] < pages, "table_M names a page outside the pool");
}

// x rounded to the nearest integer, halves away from zero (std::round would be a call per number).
inline std::int16_t code_of(float x) { return static_cast<std::int16_t>(static_cast<int>(x + std::copysign(0.5f, x))); }

// Calls f with a null pointer of the pages' number type.
template <typename F>
void with_kind(int kind, const F& f) {
  if (kind == kPagesBfloat16) f(static_cast<const std::uint16_t*>(nullptr));
  else if (kind == kPagesInt8) f(static_cast<const std::int8_t*>(nullptr));
  else f(static_cast<const float*>(nullptr));
}

// The number type that with_kind chose.
template <typename T>
using Stored = std::remove_const_t<std::remove_pointer_t<T>>;

}  // namespace hasten::blocks
