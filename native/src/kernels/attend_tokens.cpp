// attend_tokens: exact attention over chosen tokens, read straight from the pages (nothing is gathered into a copy).
//
// A unit is one row and one choice of tokens: the query heads of a kv head when they share it, or a single query head.
// With fewer units than work for the threads, the tokens of a unit are split and the parts merged.
#include "attend_tokens.h"

#include <omp.h>

#include <atomic>

#include "hasten.h"
#include "attend_many.h"

namespace hasten {
namespace {

using namespace attend;

constexpr int kPart = 64;          // fewest tokens of a part
constexpr int kUnitsPerThread = 4;  // tasks per thread that splitting aims for

struct Call : Chosen {
  std::atomic<bool>* bad;
};

template <typename KV>
int locate(const Call& c, int row, int head, const std::int32_t* index, int count, Tokens<KV>& tile) {
  const std::int32_t* table = c.table + static_cast<std::size_t>(row) * c.width;
  int filled = 0;
  for (int i = 0; i < count; ++i) {
    const std::uint32_t at = static_cast<std::uint32_t>(index[i]);
    const std::uint32_t slot = at / static_cast<std::uint32_t>(c.page);
    const std::int32_t page = index[i] >= 0 && slot < static_cast<std::uint32_t>(c.width) ? table[slot] : -1;
    if (page < 0 || page >= c.pages) {
      c.bad->store(true, std::memory_order_relaxed);
      continue;
    }
    const std::size_t offset =
        ((static_cast<std::size_t>(page) * c.groups + head) * c.page + at % static_cast<std::uint32_t>(c.page)) *
        (c.size + kTail<KV>);
    tile.k[filled] = static_cast<const KV*>(c.k) + offset;
    tile.v[filled] = static_cast<const KV*>(c.v) + offset;
    ++filled;
  }
  return filled;
}

// Tokens [begin, end) of a unit's choice; writes `out` [heads of the unit, size] and `lse`.
template <typename KV>
void run_part(const Call& c, int row, int choice, int begin, int end, float* out, float* lse) {
  static thread_local Scratch scratch;
  State& st = scratch.state;
  const int repeat = c.heads / c.choices;
  const int head = choice / (c.choices / c.groups);
  const Logits logits(c.scale, c.softcap);
  st.begin(repeat, c.size);
  const float* q = c.q + row * c.q_stride + static_cast<std::int64_t>(choice) * repeat * c.size;
  for (int i = 0; i < repeat; ++i) st.load(i, q + static_cast<std::size_t>(i) * c.size, c.size, logits.query);
  scratch.ready(c.size);
  const std::int32_t* index = c.index + (static_cast<std::size_t>(row) * c.choices + choice) * c.most;
  Tokens<KV> tiles[2];
  int now = 0;
  int count = locate(c, row, head, index + begin, std::min(kTile, end - begin), tiles[now]);
  for (int i = 0; i < count; ++i) {
    prefetch_token(tiles[now].k[i], (c.size + kTail<KV>) * static_cast<int>(sizeof(KV)));
    prefetch_token(tiles[now].v[i], (c.size + kTail<KV>) * static_cast<int>(sizeof(KV)));
  }
  for (int t = begin; t < end; t += kTile) {
    const int ahead =
        t + kTile < end ? locate(c, row, head, index + t + kTile, std::min(kTile, end - t - kTile), tiles[1 - now]) : 0;
    if (ahead > 0) tiles[1 - now].fill(ahead);
    std::fill_n(scratch.span.begin(), repeat, Span{0, count});
    scratch.add(tiles[now], count, c.size, logits, ahead > 0 ? &tiles[1 - now] : nullptr);
    now = 1 - now;
    count = ahead;
  }
  for (int i = 0; i < repeat; ++i) lse[i] = st.finish(i, out + static_cast<std::size_t>(i) * c.size, c.size);
}

// Joins `parts` partial results (stride `stride` heads apart) of one head.
void join(const float* out, const float* lse, int parts, std::size_t stride, int size, float* to, float* to_lse) {
  float top = -INFINITY;
  for (int p = 0; p < parts; ++p) {
    const float x = lse[p * stride];
    top = x > top || std::isnan(x) ? x : top;
  }
  std::fill(to, to + size, 0.0f);
  *to_lse = top;
  if (top == -INFINITY) return;
  float total = 0;
  for (int p = 0; p < parts; ++p) total += std::exp(lse[p * stride] - top);
  for (int p = 0; p < parts; ++p) {
    const float weight = std::exp(lse[p * stride] - top) / total;
    if (weight == 0.0f) continue;
    const float* from = out + p * stride * size;
    for (int d = 0; d < size; ++d) to[d] += weight * from[d];
  }
  *to_lse = top + std::log(total);
}

}  // namespace

bool attend::tokens(const Chosen& chosen, int rows, int kind, float* out, float* lse) {
  std::atomic<bool> bad{false};
  const Call c{chosen, &bad};
  const int units = rows * c.choices;
  const int repeat = c.heads / c.choices;
  const bool parallel = static_cast<std::int64_t>(units) * c.most * repeat * c.size > 100000;
  const int wanted = parallel ? kUnitsPerThread * omp_get_max_threads() : 1;
  const int parts = units == 0 ? 1 : std::max(1, std::min(c.most / kPart, (wanted + units - 1) / units));
  static thread_local std::vector<float> scratch;
  if (parts > 1) scratch.resize(static_cast<std::size_t>(parts) * rows * c.heads * (c.size + 1));
  float* part_out = parts > 1 ? scratch.data() : out;
  float* part_lse = parts > 1 ? part_out + static_cast<std::size_t>(parts) * rows * c.heads * c.size : lse;
  const std::size_t stride = static_cast<std::size_t>(rows) * c.heads;
#pragma omp parallel for schedule(dynamic, 1) if (parallel && units * parts > 1)
  for (int i = 0; i < units * parts; ++i) {
    const int unit = i / parts, part = i % parts;
    const std::int64_t n = c.count[unit];
    const int begin = static_cast<int>(n * part / parts), end = static_cast<int>(n * (part + 1) / parts);
    const std::size_t at = part * stride + static_cast<std::size_t>(unit) * repeat;
    auto run = [&]<typename KV>(const KV*) {
      run_part<KV>(c, unit / c.choices, unit % c.choices, begin, end, part_out + at * c.size, part_lse + at);
    };
    if (kind == kPagesBfloat16) run(static_cast<const std::uint16_t*>(nullptr));
    else if (kind == kPagesInt8) run(static_cast<const std::int8_t*>(nullptr));
    else run(static_cast<const float*>(nullptr));
  }
  if (parts > 1)
    for (std::size_t h = 0; h < stride; ++h)
      join(part_out + h * c.size, part_lse + h, parts, stride, c.size, out + h * c.size, lse + h);
  return !bad.load();
}

namespace {

void attend_tokens(std::uintptr_t q, std::uintptr_t k, std::uintptr_t v, Array<const std::int32_t, -1, -1> table,
                   Array<const std::int32_t, -1, -1, -1> index, Array<const std::int32_t, -1, -1> count,
                   std::uintptr_t out_address, std::uintptr_t lse_address, int heads, int groups, int size, int pages,
                   int page, int kind, float scale, float softcap) {
  const int rows = static_cast<int>(table.shape(0));
  const int choices = static_cast<int>(index.shape(1));
  const int most = static_cast<int>(index.shape(2));
  require(static_cast<int>(index.shape(0)) == rows && static_cast<int>(count.shape(0)) == rows &&
              static_cast<int>(count.shape(1)) == choices,
          "page_table_RM, index_RXK and count_RX differ in rows or choices");
  require(choices == groups || choices == heads, "index_RXK must have one choice per kv head or per query head");
  for (int i = 0; i < rows * choices; ++i)
    require(count.data()[i] >= 0 && count.data()[i] <= most, "count_RX is negative or exceeds the entries of index_RXK");
  const Chosen c{reinterpret_cast<const float*>(q), static_cast<std::int64_t>(heads) * size,
                 reinterpret_cast<const void*>(k), reinterpret_cast<const void*>(v), table.data(), index.data(),
                 count.data(), heads, groups, size, pages, page, static_cast<int>(table.shape(1)), choices, most, scale,
                 softcap};
  bool found;
  {
    nb::gil_scoped_release release;
    found = tokens(c, rows, kind, reinterpret_cast<float*>(out_address), reinterpret_cast<float*>(lse_address));
  }
  require(found, "index_RXK names a token without a page (outside page_table_RM or the pool)");
}

HASTEN_KERNELS(m) { m.def("attend_tokens", &attend_tokens); }

}  // namespace
}  // namespace hasten
