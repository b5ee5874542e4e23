// The work list of one step's attention (which query rows read which runs of pages) and the calls that run it: behind
// the Python face attend_pieces, and inside a decoder step (block.cpp).
#pragma once

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "hasten.h"

namespace hasten::attend {

struct Task {  // one kv head of one block of the rows of a piece
  int piece, begin, end, head;
  double cost;
};

struct Work {
  std::vector<std::int32_t> page, page_start, row_start, row, first, limit;
  int page_size = 0;
  std::int32_t top_page = -1, top_row = -1;
  std::map<std::pair<int, int>, std::vector<Task>> tasks;  // by (query heads per kv head, kv heads); built under the GIL

  int pieces() const { return static_cast<int>(page_start.size()) - 1; }
  int entries() const { return static_cast<int>(row.size()); }
  const std::vector<Task>& plan(int repeat, int groups);
};

Work& unwrap_work(const nb::capsule& handle);

struct Call {
  const float* q;
  std::int64_t q_stride;  // floats from row to row
  const void *k, *v;
  float *out, *lse;
  int heads, groups, size, page;
  float scale, softcap;
};

// Raises ValueError unless the work fits `rows` query rows and a pool of `pages` pages of `page` tokens.
void check_work(const Work& work, int rows, int pages, int page);
// Partial results of all entries. tasks: the work's plan for the call's heads.
void run(const Work& work, const std::vector<Task>& tasks, const Call& call, bool bf16);

// Joins the parts entry[start[t] .. start[t + 1]) of each row t; see merge.cpp.
void merge(const float* out, const float* lse, const std::int32_t* start, const std::int32_t* entry, int rows, int heads,
           int size, float* to, float* to_lse);
// Raises ValueError unless the parts are among `entries`.
void check_parts(const std::int32_t* start, int rows, const std::int32_t* entry, std::int64_t count, int entries);

}  // namespace hasten::attend
