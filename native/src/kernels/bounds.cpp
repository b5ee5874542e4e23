// Blocks of keys bounded by a box: minima and maxima of their coordinates, the scores that the box allows, and the blocks
// that promise most.
//
// Source: ReSA, arXiv 2506.04108, section 2 (blocks shared by the query heads of a kv head); the bound itself is that of
// Quest, arXiv 2406.10774. sum_c max(q_c low_c, q_c high_c) = q+ . high + q- . low, with q cut into its positive and its
// negative part: one pass over contiguous memory. A block of B tokens never crosses a page.
//
// Legend: T rows, R decode rows, H query heads, G kv heads, D head size, N pages, P page size, M pages of a row, B block.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "hasten.h"
#include "rope.h"
#include "select.h"
#include "simd.h"

namespace hasten {
namespace {

inline float narrow(float x, float*) { return x; }
inline std::uint16_t narrow(float x, std::uint16_t*) { return rope::to_bf16(x); }

struct Bounds {
  void* data = nullptr;  // [pages][kv_heads][page_size / block][2][size]: minima, then maxima
  bool bf16 = false;
  std::int64_t pages = 0;
  int kv_heads = 0, page_size = 0, block = 0, size = 0;

  int per_page() const { return page_size / block; }
  // First element of a block's minima.
  std::int64_t at(std::int64_t page, int head, int within) const {
    return ((page * kv_heads + head) * per_page() + within) * 2 * size;
  }
};

struct Rule {  // how many of a row's blocks are kept, and which of them in any case
  double ratio = 0.1;
  int least = 16, local = 1;

  int kept(int blocks) const {
    // The slack keeps a product that is whole but for rounding (0.1 * 30) whole.
    const int share = static_cast<int>(std::ceil(blocks * ratio - 1e-9));
    return std::min(blocks, std::max(share, least));
  }
};

// Keys of rows [kv_heads][size], `stride` floats apart, that were cached at `slot`, rows of a block in order: the first
// token of a block begins its box, the others widen it.
template <typename T>
void append(const Bounds& b, const float* k, std::int64_t stride, const std::int64_t* slot, int rows) {
  T* data = static_cast<T*>(b.data);
#pragma omp parallel for schedule(static) if (rows > 64)
  for (int g = 0; g < b.kv_heads; ++g)
    for (int t = 0; t < rows; ++t) {
      const int offset = static_cast<int>(slot[t] % b.page_size);
      T* low = data + b.at(slot[t] / b.page_size, g, offset / b.block);
      T* high = low + b.size;
      const float* key = k + t * stride + static_cast<std::int64_t>(g) * b.size;
      if (offset % b.block == 0) {
        for (int c = 0; c < b.size; ++c) low[c] = high[c] = narrow(key[c], low);
      } else {
        for (int c = 0; c < b.size; ++c) {
          const T x = narrow(key[c], low);
          const float value = widen(x);
          if (value < widen(low[c])) low[c] = x;
          if (value > widen(high[c])) high[c] = x;
        }
      }
    }
}

// The boxes of blocks `which` (page * P / B + block of the page), made anew from the first `count` keys of each.
template <typename T, typename KV>
void rebuild(const Bounds& b, const KV* keys, const std::int64_t* which, const std::int32_t* count, int blocks) {
  const std::int64_t token = b.size + kTail<KV>;
#pragma omp parallel for collapse(2) schedule(static) if (blocks > 8)
  for (int i = 0; i < blocks; ++i)
    for (int g = 0; g < b.kv_heads; ++g) {
      const std::int64_t page = which[i] / b.per_page();
      const int within = static_cast<int>(which[i] % b.per_page());
      T* low = static_cast<T*>(b.data) + b.at(page, g, within);
      T* high = low + b.size;
      const KV* key = keys + ((page * b.kv_heads + g) * b.page_size + static_cast<std::int64_t>(within) * b.block) * token;
      for (int j = 0; j < count[i]; ++j, key += token) {
        const float scale = scale_of(key, b.size);
        for (int c = 0; c < b.size; ++c) {
          const T x = narrow(widen(key[c]) * scale, low);
          const float value = widen(x);
          if (j == 0 || value < widen(low[c])) low[c] = x;
          if (j == 0 || value > widen(high[c])) high[c] = x;
        }
      }
    }
}

template <typename T>
float score(const T* low, const T* high, const float* minus, const float* plus, int size) {
  vf sum = vf::zero();
  int c = 0;
  for (; c + vf::width <= size; c += vf::width)
    sum = fma(vf::load(minus + c), load_stored(low + c), fma(vf::load(plus + c), load_stored(high + c), sum));
  float out = sum.sum();
  for (; c < size; ++c) out += minus[c] * widen(low[c]) + plus[c] * widen(high[c]);
  return out == out ? out : -std::numeric_limits<float>::infinity();  // NaN has no place in an order
}

struct Query {
  const float* q;  // rows of [heads][size]
  std::int64_t stride;
  int heads;
  const std::int32_t *table, *length;  // [rows][width], [rows]
  int width;
};

constexpr int kSegment = 256;  // blocks a thread scores at a time

// Scores of all blocks: out[rows][kv_heads][most]. Call in a parallel region.
template <typename T>
void scan(const Bounds& b, const Query& in, int rows, int most, float* out) {
  static thread_local std::vector<float> part;
  part.resize(std::max(part.size(), static_cast<std::size_t>(2 * b.size)));
  float *minus = part.data(), *plus = minus + b.size;
  const T* data = static_cast<const T*>(b.data);
  const int group = in.heads / b.kv_heads, segments = (most + kSegment - 1) / kSegment, per = b.per_page();
  const float share = 1.0f / (static_cast<float>(group) * std::sqrt(static_cast<float>(b.size)));
  const int ahead = std::max(1, 8 / per);  // pages asked for in advance: they lie anywhere in the pool
  const std::int64_t units = static_cast<std::int64_t>(rows) * b.kv_heads, bytes = static_cast<std::int64_t>(per) * 2 * b.size * sizeof(T);
  std::int64_t pooled = -1;
#pragma omp for schedule(dynamic, 1)
  for (std::int64_t task = 0; task < units * segments; ++task) {
    const std::int64_t unit = task / segments;
    const int r = static_cast<int>(unit / b.kv_heads), g = static_cast<int>(unit % b.kv_heads);
    const int blocks = (in.length[r] + b.block - 1) / b.block;
    const int begin = static_cast<int>(task % segments) * kSegment, end = std::min(blocks, begin + kSegment);
    if (begin >= end) continue;
    if (pooled != unit) {
      const float* q = in.q + r * in.stride + static_cast<std::int64_t>(g) * group * b.size;
      for (int c = 0; c < b.size; ++c) {
        float mean = 0;
        for (int h = 0; h < group; ++h) mean += q[static_cast<std::int64_t>(h) * b.size + c];
        mean *= share;
        minus[c] = std::min(mean, 0.0f), plus[c] = std::max(mean, 0.0f);
      }
      pooled = unit;
    }
    const std::int32_t* table = in.table + static_cast<std::int64_t>(r) * in.width;
    const int last = (blocks - 1) / per;
    for (int i = begin; i < end; ++i) {
      if (i % per == 0 && i / per + ahead <= last) {
        const char* next = reinterpret_cast<const char*>(data + b.at(table[i / per + ahead], g, 0));
        for (std::int64_t j = 0; j < bytes; j += 64) __builtin_prefetch(next + j);
      }
      const T* low = data + b.at(table[i / per], g, i % per);
      out[unit * most + i] = score(low, low + b.size, minus, plus, b.size);
    }
  }
}

// The tokens of the best blocks, ascending; the last `local` blocks are among them. Equal scores: the later block.
int pick(const float* scores, int length, int block, const Rule& rule, std::vector<std::int32_t>& order, std::int32_t* index) {
  const int blocks = (length + block - 1) / block, kept = rule.kept(blocks), local = std::min(rule.local, kept);
  order.resize(std::max(order.size(), static_cast<std::size_t>(blocks)));
  std::int32_t* first = order.data();
  for (int i = 0; i < blocks; ++i) first[i] = blocks - 1 - i;
  if (kept < blocks)
    std::nth_element(first + local, first + kept, first + blocks, [&](std::int32_t a, std::int32_t c) {
      return scores[a] > scores[c] || (scores[a] == scores[c] && a > c);
    });
  std::sort(first, first + kept);
  int n = 0;
  for (int i = 0; i < kept; ++i)
    for (int t = first[i] * block, stop = std::min(length, t + block); t < stop; ++t) index[n++] = t;
  return n;
}

// index[rows][kv_heads][most tokens], count[rows][kv_heads].
void choose(const Bounds& b, const Rule& rule, const Query& in, int rows, int most, std::int32_t* index, std::int32_t* count) {
  if (rows == 0) return;
  const int blocks = (*std::max_element(in.length, in.length + rows) + b.block - 1) / b.block;
  const std::int64_t tasks = static_cast<std::int64_t>(rows) * b.kv_heads;
  thread_local std::vector<float> memory;
  memory.resize(std::max(memory.size(), static_cast<std::size_t>(tasks * blocks)));
  float* scores = memory.data();  // threads of the team must not name the thread_local themselves
#pragma omp parallel if (tasks * blocks > 256)
  {
    static thread_local std::vector<std::int32_t> order;
    if (b.bf16)
      scan<std::uint16_t>(b, in, rows, blocks, scores);
    else
      scan<float>(b, in, rows, blocks, scores);
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t task = 0; task < tasks; ++task)
      count[task] = pick(scores + task * blocks, in.length[task / b.kv_heads], b.block, rule, order, index + task * most);
  }
}

struct BoundsSelector final : Selector {
  Bounds bounds;
  Rule rule;

  int most(int longest) const override { return rule.kept((longest + bounds.block - 1) / bounds.block) * bounds.block; }
  void append(const float* k, std::int64_t stride, const std::int64_t* slot, int rows) const override {
    bounds.bf16 ? hasten::append<std::uint16_t>(bounds, k, stride, slot, rows) : hasten::append<float>(bounds, k, stride, slot, rows);
  }
  void choose(const float* q, std::int64_t stride, int rows, const std::int32_t* table, int width,
              const std::int32_t* length, int most, std::int32_t* index, std::int32_t* count) const override {
    hasten::choose(bounds, rule, {q, stride, heads, table, length, width}, rows, most, index, count);
  }
};

// Addresses come from the Python face, which has checked what they lead to.
Bounds bounds_of(std::uintptr_t data, bool bf16, std::int64_t pages, int kv_heads, int page_size, int block, int size) {
  require(pages > 0 && kv_heads > 0 && size > 0 && block > 0 && page_size > 0, "the bounds' shape must be positive");
  require(page_size % block == 0, "the page size must be a multiple of the block");
  return {reinterpret_cast<void*>(data), bf16, pages, kv_heads, page_size, block, size};
}

Rule rule_of(double ratio, int least, int local) {
  require(ratio > 0 && ratio <= 1 && least >= 1 && local >= 0 && local <= least, "no such share of blocks");
  return {ratio, least, local};
}

HASTEN_KERNELS(m) {
  using Address = std::uintptr_t;

  m.def("bounds_append", [](Address k_TGD, int rows, Address slot_T, Address data, bool bf16, std::int64_t pages,
                            int kv_heads, int page_size, int block, int size) {
    const Bounds b = bounds_of(data, bf16, pages, kv_heads, page_size, block, size);
    const auto* slot = reinterpret_cast<const std::int64_t*>(slot_T);
    rope::check_slots(slot, rows, pages, page_size);
    const auto* k = reinterpret_cast<const float*>(k_TGD);
    const std::int64_t stride = static_cast<std::int64_t>(kv_heads) * size;
    nb::gil_scoped_release release;
    bf16 ? append<std::uint16_t>(b, k, stride, slot, rows) : append<float>(b, k, stride, slot, rows);
  });

  m.def("bounds_rebuild", [](Address keys, int kind, Address which_W, Address count_W, int blocks, Address data, bool bf16,
                             std::int64_t pages, int kv_heads, int page_size, int block, int size) {
    const Bounds b = bounds_of(data, bf16, pages, kv_heads, page_size, block, size);
    const auto* which = reinterpret_cast<const std::int64_t*>(which_W);
    const auto* count = reinterpret_cast<const std::int32_t*>(count_W);
    for (int i = 0; i < blocks; ++i) {
      require(which[i] >= 0 && which[i] < pages * b.per_page(), "a block lies outside the pool");
      require(count[i] >= 1 && count[i] <= block, "a block has one token at least and `block` at most");
    }
    nb::gil_scoped_release release;
    auto run = [&]<typename KV>(const KV* k) {
      bf16 ? rebuild<std::uint16_t>(b, k, which, count, blocks) : rebuild<float>(b, k, which, count, blocks);
    };
    if (kind == kPagesFloat32)
      run(reinterpret_cast<const float*>(keys));
    else if (kind == kPagesBfloat16)
      run(reinterpret_cast<const std::uint16_t*>(keys));
    else
      run(reinterpret_cast<const std::int8_t*>(keys));
  });

  m.def("bounds_choose", [](Address q_RHD, int rows, int heads, Address table_RM, int width, Address length_R,
                            double ratio, int least, int local, int most, Address index_RGK, Address count_RG, Address data,
                            bool bf16, std::int64_t pages, int kv_heads, int page_size, int block, int size) {
    const Bounds b = bounds_of(data, bf16, pages, kv_heads, page_size, block, size);
    const Rule rule = rule_of(ratio, least, local);
    const auto* table = reinterpret_cast<const std::int32_t*>(table_RM);
    const auto* length = reinterpret_cast<const std::int32_t*>(length_R);
    require(heads > 0 && heads % kv_heads == 0, "query heads must be a multiple of kv heads");
    for (int r = 0; r < rows; ++r) {
      require(length[r] >= 1 && (length[r] - 1) / page_size < width, "a length needs at least one token and its pages");
      require(rule.kept((length[r] + block - 1) / block) * block <= most, "no room for the chosen tokens");
      for (int i = 0; i <= (length[r] - 1) / page_size; ++i) {
        const std::int32_t page = table[static_cast<std::int64_t>(r) * width + i];
        require(page >= 0 && page < pages, "a page id lies outside the pool");
      }
    }
    nb::gil_scoped_release release;
    choose(b, rule, {reinterpret_cast<const float*>(q_RHD), static_cast<std::int64_t>(heads) * size, heads, table, length, width},
           rows, most, reinterpret_cast<std::int32_t*>(index_RGK), reinterpret_cast<std::int32_t*>(count_RG));
  });

  m.def("bounds_selector", [](int heads, int budget, double ratio, int least, int local, Address data, bool bf16,
                              std::int64_t pages, int kv_heads, int page_size, int block, int size) {
    require(heads > 0 && heads % kv_heads == 0, "query heads must be a multiple of kv heads");
    require(pages <= std::numeric_limits<std::int32_t>::max(), "too many pages");
    auto s = std::make_unique<BoundsSelector>();
    s->bounds = bounds_of(data, bf16, pages, kv_heads, page_size, block, size), s->rule = rule_of(ratio, least, local);
    s->heads = heads, s->kv_heads = kv_heads, s->size = size, s->pages = static_cast<int>(pages), s->page_size = page_size;
    s->budget = budget, s->choices = kv_heads;
    return wrap_selector(std::move(s));
  });
}

}  // namespace
}  // namespace hasten
