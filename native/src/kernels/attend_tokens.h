// Attention over chosen tokens, for other kernels; see attend_tokens.cpp.
#pragma once

#include <cstdint>

namespace hasten::attend {

struct Chosen {
  const float* q;         // rows of [heads][size]
  std::int64_t q_stride;  // floats from row to row
  const void *k, *v;      // [pages][groups][page][size]
  const std::int32_t *table, *index, *count;  // [rows][width], [rows][choices][most], [rows][choices]
  int heads, groups, size, pages, page, width, choices, most;  // width: pages per row; most: tokens per choice
  float scale, softcap;
};

// out[rows][heads][size] and lse[rows][heads]; kind: a PageKind. False if a choice named a token without a page.
bool tokens(const Chosen& chosen, int rows, int kind, float* out, float* lse);

}  // namespace hasten::attend
