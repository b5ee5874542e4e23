// TokenSelect (arXiv 2411.02886): which cached tokens a few query rows read, and a copy of those with compact positions.
//
// Keys lie unrotated in the pages. A unit is up to a chunk of consecutive query rows of one sequence. Its fingerprint is
// the mean of its queries, rotated to fixed far positions; every candidate token gets the votes of all heads; the `k`
// winners join the first and the last tokens. Then the chosen keys are copied, rotated by their rank among the chosen,
// and exact attention reads the copy as if it were a short sequence.
//
// Legend: U units, T query rows, H query heads, G kv heads, D head size, F = H D, R rotated dimensions, N pages, P page
// size, M pages of a sequence, C slots of kept choices, K chosen tokens, W longest list.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <type_traits>
#include <vector>

#include "hasten.h"
#include "pages.h"
#include "rope.h"

namespace hasten {
namespace {

constexpr int kBlock = 128;  // tokens of a scoring tile
constexpr int kLive = 4;     // heads scored while a key is at hand

enum Vote : int { kSoft = 0, kSum = 1, kTopK = 2 };

struct Source {
  const void *k, *v;  // [N][G][P][D]
  int pages, groups, page, size, kind;
  const std::int32_t* table;  // [U][width]
  int width;

  // The element at which token `t` of unit `u` begins, for kv head 0.
  std::int64_t token(int u, int t) const {
    const std::int64_t at = table[static_cast<std::int64_t>(u) * width + t / page];
    return (at * groups * page + t % page) * size;
  }
  std::int64_t head() const { return static_cast<std::int64_t>(page) * size; }

  // Raises ValueError unless the first `length` tokens of unit `u` have pages.
  void check(int u, int length) const {
    require(length >= 0 && (length + page - 1) / page <= width, "length_U exceeds the pages of table_UM");
    for (int i = 0; i < (length + page - 1) / page; ++i) {
      const int at = table[static_cast<std::int64_t>(u) * width + i];
      require(at >= 0 && at < pages, "table_UM names a page outside the pool");
    }
  }
};

// Half-split rotation of one head (see rope.cpp), from storage to floats.
template <typename KV>
void turn(const KV* from, const float* cos, const float* sin, int rotated, int size, float* to) {
  const int half = rotated / 2;
  int i = 0;
  for (; i + vf::width <= half; i += vf::width) {
    const vf a = load_stored(from + i), b = load_stored(from + half + i);
    (a * vf::load(cos + i) - b * vf::load(sin + i)).store(to + i);
    fma(b, vf::load(cos + half + i), a * vf::load(sin + half + i)).store(to + half + i);
  }
  for (; i < half; ++i) {
    const float a = widen(from[i]), b = widen(from[half + i]);
    to[i] = a * cos[i] - b * sin[i];
    to[half + i] = b * cos[half + i] + a * sin[half + i];
  }
  for (i = rotated; i < size; ++i) to[i] = widen(from[i]);
}

// -- scoring --------------------------------------------------------------------------------------------------------

template <int Heads, typename KV>
void dots(const float* q, const KV* k, int size, float* out, std::int64_t stride) {
  vf sum[Heads];
  for (int h = 0; h < Heads; ++h) sum[h] = vf::zero();
  int d = 0;
  for (; d + vf::width <= size; d += vf::width) {
    const vf x = load_stored(k + d);
    for (int h = 0; h < Heads; ++h) sum[h] = fma(vf::load(q + h * size + d), x, sum[h]);
  }
  for (int h = 0; h < Heads; ++h) {
    float total = sum[h].sum();
    for (int e = d; e < size; ++e) total += q[h * size + e] * widen(k[e]);
    out[h * stride] = total;
  }
}

// Logits [H][count] of the candidates [first, first + count) of unit `u`: each key is read once for its query heads.
template <typename KV>
void logits(const Source& s, int u, const float* q, int heads, int first, int count, float scale, float* out) {
  const int repeat = heads / s.groups, blocks = (count + kBlock - 1) / kBlock;
  const KV* keys = static_cast<const KV*>(s.k);
#pragma omp parallel for schedule(static) if (static_cast<std::int64_t>(count) * heads * s.size > 200000)
  for (int task = 0; task < s.groups * blocks; ++task) {
    const int g = task % s.groups, begin = task / s.groups * kBlock, end = std::min(count, begin + kBlock);
    const float* qg = q + static_cast<std::int64_t>(g) * repeat * s.size;
    float* rows = out + static_cast<std::int64_t>(g) * repeat * count;
    for (int t = begin; t < end; ++t) {
      const KV* k = keys + s.token(u, first + t) + g * s.head();
      int h = 0;
      for (; h + kLive <= repeat; h += kLive) dots<kLive>(qg + h * s.size, k, s.size, rows + h * std::int64_t{count} + t, count);
      const float* left = qg + h * s.size;
      float* to = rows + h * std::int64_t{count} + t;
      if (repeat - h == 3) dots<3>(left, k, s.size, to, count);
      else if (repeat - h == 2) dots<2>(left, k, s.size, to, count);
      else if (repeat - h == 1) dots<1>(left, k, s.size, to, count);
    }
    if (scale != 1.0f)
      for (int h = 0; h < repeat; ++h)
        for (int t = begin; t < end; ++t) rows[static_cast<std::int64_t>(h) * count + t] *= scale;
  }
}

// e^(x - max) in place; returns 1 / sum.
float exponentials(float* x, int count) {
  float top = -INFINITY;
  for (int i = 0; i < count; ++i) top = x[i] > top ? x[i] : top;
  const vf shift = vf::set(top);
  vf sum = vf::zero();
  int i = 0;
  for (; i + vf::width <= count; i += vf::width) {
    const vf e = exp(vf::load(x + i) - shift);
    e.store(x + i);
    sum = sum + e;
  }
  float total = sum.sum();
  for (; i < count; ++i) {
    x[i] = std::exp(x[i] - top);
    total += x[i];
  }
  return 1.0f / total;
}

// An unsigned number that orders as the float does, to three digits; what is not a number comes last. Equal tokens have
// equal keys in the first layer wherever they stand: the order of a sum must not decide which of them wins.
std::uint32_t order(float x) {
  if (x != x) return 0;
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits &= 0xFFFFF000u;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The `k` largest of `count` scores (the later of those equal to three digits), as ascending indices plus `base`. Returns how many.
int largest(const float* score, int count, int k, int base, std::int32_t* out) {
  if (count <= k) {
    for (int i = 0; i < count; ++i) out[i] = base + i;
    return count;
  }
  if (k == 0) return 0;
  constexpr int kShift = 21;
  static thread_local std::vector<std::uint32_t> key, rest;
  key.resize(static_cast<std::size_t>(count));
  int bins[1 << (32 - kShift)] = {};
  for (int i = 0; i < count; ++i) ++bins[(key[i] = order(score[i])) >> kShift];
  int above = 0;
  std::uint32_t bin = (1u << (32 - kShift)) - 1;
  while (above + bins[bin] < k) above += bins[bin--];
  rest.clear();
  for (int i = 0; i < count; ++i)
    if (key[i] >> kShift == bin) rest.push_back(key[i]);
  auto last = rest.begin() + (k - above - 1);
  std::nth_element(rest.begin(), last, rest.end(), std::greater<>());
  const std::uint32_t least = *last;
  int greater = above, equal = 0;
  for (std::uint32_t x : rest) greater += x > least, equal += x == least;
  int skip = equal - (k - greater), n = 0;  // the earliest of the equal ones lose
  for (int i = 0; i < count; ++i)
    if (key[i] > least || (key[i] == least && skip-- <= 0)) out[n++] = base + i;
  return n;
}

struct Ballot {
  int vote, k, pool;
  float scale;
};

// Scores [count] of the candidates [first, first + count): the heads' votes, summed.
void votes(const Source& s, int u, const float* q, int heads, int first, int count, const Ballot& b, float* score) {
  static thread_local std::vector<float> scratch;
  scratch.resize(static_cast<std::size_t>(heads) * count);
  float* c = scratch.data();
  if (s.kind == kPagesBfloat16) logits<std::uint16_t>(s, u, q, heads, first, count, b.scale, c);
  else logits<float>(s, u, q, heads, first, count, b.scale, c);
  const bool parallel = static_cast<std::int64_t>(count) * heads > 30000;
  if (b.vote == kTopK) {
    static thread_local std::vector<std::int32_t> chosen;
    chosen.resize(static_cast<std::size_t>(std::min(b.k, count)));
    std::fill_n(score, count, 0.0f);
    for (int h = 0; h < heads; ++h) {
      const int n = largest(c + static_cast<std::int64_t>(h) * count, count, b.k, 0, chosen.data());
      for (int i = 0; i < n; ++i) score[chosen[i]] += 1.0f;
    }
  } else {
    static thread_local std::vector<float> share;
    share.assign(static_cast<std::size_t>(heads), 1.0f);
    float* weight = share.data();  // thread_local names are another object inside a parallel region
    if (b.vote == kSoft) {
#pragma omp parallel for schedule(static) if (parallel)
      for (int h = 0; h < heads; ++h) weight[h] = exponentials(c + static_cast<std::int64_t>(h) * count, count);
    }
#pragma omp parallel for schedule(static) if (parallel)
    for (int block = 0; block < (count + kBlock - 1) / kBlock; ++block) {
      const int begin = block * kBlock, end = std::min(count, begin + kBlock);
      std::fill(score + begin, score + end, 0.0f);
      for (int h = 0; h < heads; ++h) {
        const float* row = c + static_cast<std::int64_t>(h) * count;
        for (int t = begin; t < end; ++t) score[t] += weight[h] * row[t];
      }
    }
  }
  if (b.pool > 1) {
    static thread_local std::vector<float> plain;
    plain.assign(score, score + count);
    for (int t = 0; t < count; ++t) {
      const int from = std::max(0, t - b.pool / 2), to = std::min(count, t + b.pool / 2 + 1);
      score[t] = *std::max_element(plain.begin() + from, plain.begin() + to);
    }
  }
}

float cosine(const float* a, const float* b, int count) {
  vf ab = vf::zero(), aa = vf::zero(), bb = vf::zero();
  int i = 0;
  for (; i + vf::width <= count; i += vf::width) {
    const vf x = vf::load(a + i), y = vf::load(b + i);
    ab = fma(x, y, ab), aa = fma(x, x, aa), bb = fma(y, y, bb);
  }
  double dot = ab.sum(), one = aa.sum(), other = bb.sum();
  for (; i < count; ++i) dot += a[i] * b[i], one += a[i] * a[i], other += b[i] * b[i];
  return one > 0 && other > 0 ? static_cast<float>(dot / std::sqrt(one * other)) : 0.0f;
}

// -- faces ------------------------------------------------------------------------------------------------------------

using Ints = Array<const std::int32_t, -1>;
using Floats2 = Array<const float, -1, -1>;

Source source(std::uintptr_t k, std::uintptr_t v, int pages, int groups, int page, int size, int kind,
              const Array<const std::int32_t, -1, -1>& table) {
  return {reinterpret_cast<const void*>(k), reinterpret_cast<const void*>(v), pages, groups, page, size, kind,
          table.data(), static_cast<int>(table.shape(1))};
}

void token_turn(std::uintptr_t q_address, std::int64_t stride, int rows, int heads, int size, Ints row_start, Ints length,
                Ints judged, Array<const std::int64_t, -1> offset, int far, Floats2 cos, Floats2 sin,
                std::uintptr_t out_address, std::uintptr_t mean_address) {
  const int units = static_cast<int>(length.shape(0)), rotated = static_cast<int>(cos.shape(1));
  require(static_cast<int>(row_start.shape(0)) == units + 1 && static_cast<int>(judged.shape(0)) == units &&
              static_cast<int>(offset.shape(0)) == units,
          "row_start_U1, length_U, judged_U and offset_U differ in units");
  require(row_start.data()[0] == 0 && row_start.data()[units] == rows, "row_start_U1 must run from 0 to the rows of q_THD");
  const auto table = static_cast<std::int64_t>(cos.shape(0));
  for (int u = 0; u < units; ++u) {
    const int count = row_start.data()[u + 1] - row_start.data()[u];
    require(count >= 0 && count <= length.data()[u], "a unit has more rows than tokens");
    const int most = std::max(length.data()[u], judged.data()[u] ? far + count : 0);
    require(offset.data()[u] >= 0 && offset.data()[u] + most <= table, "cos_NR and sin_NR have too few positions");
  }
  const std::int32_t *start = row_start.data(), *tokens = length.data(), *wanted = judged.data();
  const std::int64_t* from = offset.data();
  const float *c = cos.data(), *s = sin.data(), *q = reinterpret_cast<const float*>(q_address);
  float *out = reinterpret_cast<float*>(out_address), *mean = reinterpret_cast<float*>(mean_address);
  nb::gil_scoped_release release;
#pragma omp parallel for schedule(static) if (static_cast<std::int64_t>(rows) * heads * size > 100000)
  for (int task = 0; task < units * heads; ++task) {
    const int u = task / heads, h = task % heads, count = start[u + 1] - start[u];
    static thread_local std::vector<float> scratch;
    scratch.resize(static_cast<std::size_t>(size));
    float* total = mean + (static_cast<std::int64_t>(u) * heads + h) * size;
    std::fill_n(total, size, 0.0f);
    for (int i = 0; i < count; ++i) {
      const std::int64_t row = start[u] + i, near = (from[u] + tokens[u] - count + i) * rotated;
      const float* x = q + row * stride + static_cast<std::int64_t>(h) * size;
      turn(x, c + near, s + near, rotated, size, out + (row * heads + h) * size);
      if (!wanted[u]) continue;
      const std::int64_t away = (from[u] + far + i) * rotated;
      turn(x, c + away, s + away, rotated, size, scratch.data());
      for (int d = 0; d < size; ++d) total[d] += scratch[d];
    }
    if (count > 1)
      for (int d = 0; d < size; ++d) total[d] /= static_cast<float>(count);
  }
}

void token_votes(Array<const float, -1, -1, -1> mean, std::uintptr_t k, int pages, int groups, int page, int kind,
                 Array<const std::int32_t, -1, -1> table, int first, Ints end, int vote, int top, float scale, int pool,
                 Array<float, -1, -1> score) {
  const int units = static_cast<int>(mean.shape(0)), heads = static_cast<int>(mean.shape(1));
  const int size = static_cast<int>(mean.shape(2)), width = static_cast<int>(score.shape(1));
  const Source s = source(k, k, pages, groups, page, size, kind, table);
  require(static_cast<int>(table.shape(0)) == units && static_cast<int>(end.shape(0)) == units &&
              static_cast<int>(score.shape(0)) == units,
          "mean_UHD, table_UM and end_U differ in units");
  for (int u = 0; u < units; ++u) {
    s.check(u, end.data()[u]);
    require(end.data()[u] - first <= width, "score_UL is too narrow");
  }
  nb::gil_scoped_release release;
  for (int u = 0; u < units; ++u)
    votes(s, u, mean.data() + static_cast<std::int64_t>(u) * heads * size, heads, first, std::max(0, end.data()[u] - first),
          {vote, top, pool, scale}, score.data() + static_cast<std::int64_t>(u) * width);
}

int token_choose(Array<const float, -1, -1, -1> mean, std::uintptr_t k, int pages, int groups, int page, int kind,
                 Array<const std::int32_t, -1, -1> table, Ints length, Ints local, Ints judged, Ints reusable, Ints slot,
                 int first, int vote, int top, float scale, int pool, float theta, int most_apart,
                 Array<float, -1, -1> known, Array<std::int32_t, -1, -1> kept, Array<std::int32_t, -1> made,
                 Array<std::int32_t, -1, -1> list) {
  const int units = static_cast<int>(mean.shape(0)), heads = static_cast<int>(mean.shape(1));
  const int size = static_cast<int>(mean.shape(2)), slots = static_cast<int>(made.shape(0));
  const int width = static_cast<int>(list.shape(1));
  const Source s = source(k, k, pages, groups, page, size, kind, table);
  for (auto n : {table.shape(0), length.shape(0), local.shape(0), judged.shape(0), reusable.shape(0), slot.shape(0),
                 list.shape(0)})
    require(static_cast<int>(n) == units, "table_UM, length_U, local_U, judged_U, reusable_U, slot_U and list_UW differ in units");
  require(static_cast<int>(known.shape(0)) == slots && static_cast<int>(kept.shape(0)) == slots &&
              static_cast<int>(known.shape(1)) == heads * size && static_cast<int>(kept.shape(1)) == top,
          "known_CF, kept_CK and made_C do not fit");
  for (int u = 0; u < units; ++u) {
    if (!judged.data()[u]) continue;
    s.check(u, length.data()[u]);
    require(slot.data()[u] >= 0 && slot.data()[u] < slots, "slot_U names no slot");
    const int least = first + top + local.data()[u];
    require(local.data()[u] >= 0 && length.data()[u] >= least && least <= width,
            "a unit that chooses has fewer tokens than it reads, or list_UW is too narrow");
  }
  int hits = 0;
  nb::gil_scoped_release release;
  static thread_local std::vector<float> score;
  for (int u = 0; u < units; ++u) {
    if (!judged.data()[u]) continue;
    const float* q = mean.data() + static_cast<std::int64_t>(u) * heads * size;
    const std::int64_t c = slot.data()[u];
    float* last = known.data() + c * heads * size;
    std::int32_t* chosen = kept.data() + c * top;
    const int tokens = length.data()[u], age = tokens - made.data()[c];
    if (reusable.data()[u] && made.data()[c] > 0 && (most_apart < 0 || age <= most_apart) &&
        cosine(q, last, heads * size) >= theta) {
      ++hits;
    } else {
      const int count = tokens - local.data()[u] - first;
      score.resize(static_cast<std::size_t>(count));
      votes(s, u, q, heads, first, count, {vote, top, pool, scale}, score.data());
      largest(score.data(), count, top, first, chosen);
      std::copy_n(q, heads * size, last);
      made.data()[c] = tokens;
    }
    std::copy_n(chosen, top, list.data() + static_cast<std::int64_t>(u) * width + first);
  }
  return hits;
}

template <typename KV>
void put(const float* from, KV* to, int size) {
  if constexpr (std::is_same_v<KV, float>) std::copy_n(from, size, to);
  else
    for (int d = 0; d < size; ++d) to[d] = rope::to_bf16(from[d]);
}

template <typename KV>
bool gather(const Source& s, int units, int width, const std::int32_t* list, const std::int32_t* count,
            const std::int64_t* offset, const float* cos, const float* sin, int rotated, int target, KV* k_out, KV* v_out) {
  constexpr int ahead = 6;  // tokens to fetch before they are needed
  std::atomic<bool> bad{false};
  const int blocks = (width + kBlock - 1) / kBlock;
  const KV *keys = static_cast<const KV*>(s.k), *values = static_cast<const KV*>(s.v);
#pragma omp parallel for schedule(static) if (static_cast<std::int64_t>(units) * width * s.groups * s.size > 100000)
  for (int task = 0; task < units * blocks; ++task) {
    const int u = task / blocks, begin = task % blocks * kBlock, end = std::min(count[u], begin + kBlock);
    static thread_local std::vector<float> scratch;
    scratch.resize(static_cast<std::size_t>(s.size));
    const std::int32_t* chosen = list + static_cast<std::int64_t>(u) * width;
    auto valid = [&](int i) {
      if (chosen[i] < 0 || chosen[i] / s.page >= s.width) return false;
      const int at = s.table[static_cast<std::int64_t>(u) * s.width + chosen[i] / s.page];
      return at >= 0 && at < s.pages;
    };
    for (int i = begin; i < end; ++i) {
      if (i + ahead < end && valid(i + ahead)) {
        const std::int64_t next = s.token(u, chosen[i + ahead]);
        for (int g = 0; g < s.groups; ++g)
          for (int d = 0; d < s.size; d += 64 / static_cast<int>(sizeof(KV))) {
            __builtin_prefetch(keys + next + g * s.head() + d);
            __builtin_prefetch(values + next + g * s.head() + d);
          }
      }
      if (!valid(i)) {
        bad.store(true, std::memory_order_relaxed);
        continue;
      }
      const std::int64_t from = s.token(u, chosen[i]);
      const std::int64_t page = static_cast<std::int64_t>(u) * target + i / s.page;
      const std::int64_t to = (page * s.groups * s.page + i % s.page) * s.size;
      const std::int64_t at = (offset[u] + i) * rotated;
      for (int g = 0; g < s.groups; ++g) {
        turn(keys + from + g * s.head(), cos + at, sin + at, rotated, s.size, scratch.data());
        put(scratch.data(), k_out + to + g * s.head(), s.size);
        std::copy_n(values + from + g * s.head(), s.size, v_out + to + g * s.head());
      }
    }
  }
  return !bad.load();
}

void token_gather(std::uintptr_t k, std::uintptr_t v, int pages, int groups, int page, int size, int kind,
                  Array<const std::int32_t, -1, -1> table, Array<const std::int32_t, -1, -1> list, Ints count,
                  Array<const std::int64_t, -1> offset, Floats2 cos, Floats2 sin, int target, std::int64_t room,
                  std::uintptr_t k_out, std::uintptr_t v_out) {
  const int units = static_cast<int>(list.shape(0)), width = static_cast<int>(list.shape(1));
  const Source s = source(k, v, pages, groups, page, size, kind, table);
  require(static_cast<int>(table.shape(0)) == units && static_cast<int>(count.shape(0)) == units &&
              static_cast<int>(offset.shape(0)) == units,
          "table_UM, list_UW, count_U and offset_U differ in units");
  require(static_cast<std::int64_t>(units) * target <= room, "the copy's pages are too few");
  for (int u = 0; u < units; ++u) {
    require(count.data()[u] >= 0 && count.data()[u] <= width && count.data()[u] <= target * page,
            "count_U exceeds the entries of list_UW or the pages of the copy");
    require(offset.data()[u] >= 0 && offset.data()[u] + count.data()[u] <= static_cast<std::int64_t>(cos.shape(0)),
            "cos_NR and sin_NR have too few positions");
  }
  bool found;
  {
    nb::gil_scoped_release release;
    auto run = [&]<typename KV>(KV*) {
      return gather(s, units, width, list.data(), count.data(), offset.data(), cos.data(), sin.data(),
                    static_cast<int>(cos.shape(1)), target, reinterpret_cast<KV*>(k_out), reinterpret_cast<KV*>(v_out));
    };
    found = kind == kPagesBfloat16 ? run(static_cast<std::uint16_t*>(nullptr)) : run(static_cast<float*>(nullptr));
  }
  require(found, "list_UW names a token without a page");
}

HASTEN_KERNELS(m) {
  m.def("token_turn", &token_turn);
  m.def("token_votes", &token_votes);
  m.def("token_choose", &token_choose);
  m.def("token_gather", &token_gather);
}

}  // namespace
}  // namespace hasten
