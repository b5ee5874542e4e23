// attend_blocks: exact attention of one sequence's rows over lists of key blocks, a list per (head group, query block).
//
// Sources: PBS-Attn (arXiv 2510.21270) and SpargeAttn (arXiv 2502.18137) for what is asked of it; the tiles are those of every
// other kernel (attend_many.h). A block is a set of tokens: `order` may place any tokens in it, and since a softmax does not
// care in which order it meets them, a block lists its tokens by rising position. So what a row sees of a block is a
// prefix of it, and causality under a permutation costs nothing.
//
// Where a head's `floor` is below 0, a tile whose scores lie more than that below what a group of rows has seen (base 2) is left out: its
// weights could not change the result by more than 2^floor each (SpargeAttn section 3.4, lambda log2 e).
// With codes, scores are integer products: queries are rounded per query block, keys come rounded per tile (SageAttention;
// `quantise_keys`). AVX2 multiplies 16-bit integers, so codes of up to 12 bits cost what 8 bits do.
//
// Legend: X head groups of the lists, Q query blocks, L tokens, T rows (the last ones of the L), D head size.
#include <omp.h>

#include <atomic>
#include <numeric>

#include "block_list.h"

namespace hasten {

using namespace attend;

namespace {

struct Call {
  blocks::Cached cached;
  const float* q;
  float *out, *lse;
  int rows, heads, choices, block, query_block, queries, window;  // window 0: none
  const std::int32_t *start, *list;  // list[start[x * queries + i] ..): key blocks that query block i reads, rising
  const std::int32_t* order;         // [choices][length], or null for cache order
  const std::int16_t* codes;         // [groups][tiles][size / 2][kTile][2], or null
  const float* code_scale;           // [groups][tiles]
  int code_limit;                    // largest code
  const float* floor;                // [heads], or null
  float scale, cap;

  int first() const { return cached.length - rows; }  // position of the first row
};

struct Counts {
  std::atomic<std::int64_t> tiles{0}, skipped{0};
};

// Softmax that leaves out what is negligible; counts what it met (groups of rows x tiles).
struct Filtered : Logits {
  float floor;
  mutable std::int64_t met = 0, skipped = 0;
  Filtered(float scale, float cap, float floor_) : Logits(scale, cap), floor(floor_) {}

  bool negligible(const float* score, const Span* span, const float* m) const {
    ++met;
    if (!(floor < 0)) return false;
    for (int i = 0; i < kGroup; ++i) {
      const float* s = score + i * kTile;
      const float limit = m[i] + floor;
      const Span seen = span[i];
      if (seen.low >= seen.high) continue;
      float top = -INFINITY;
      int t = seen.low;
      if (t % vf::width == 0) {
        vf tops = vf::set(-INFINITY);
        for (; t + vf::width <= seen.high; t += vf::width) tops = max(tops, vf::load(s + t));
        top = tops.max();
      }
      for (; t < seen.high; ++t) top = std::max(top, s[t]);
      if (!(top < limit)) return false;  // a row that has seen nothing has limit -inf
    }
    ++skipped;
    return true;
  }
};

// Query vectors rounded with one scale: [group of rows][size / 2][kGroup][2].
struct Rounded {
  std::vector<std::int16_t> code;
  float scale = 0;

  void fill(const float* q, std::size_t stride, int rows, int size, int limit) {
    float most = 0;
    for (int r = 0; r < rows; ++r)
      for (int d = 0; d < size; ++d) most = std::max(most, std::fabs(q[r * stride + d]));
    scale = most / static_cast<float>(limit) + 1e-7f;
    const int padded = (rows + kGroup - 1) / kGroup * kGroup;
    code.assign(static_cast<std::size_t>(padded) * size, 0);
    const float steps = 1.0f / scale;
    for (int r = 0; r < rows; ++r) {
      std::int16_t* to = code.data() + static_cast<std::size_t>(r / kGroup) * kGroup * size + r % kGroup * 2;
      for (int d = 0; d < size; ++d)
        to[d / 2 * kGroup * 2 + d % 2] = blocks::code_of(q[r * stride + d] * steps);
    }
  }
};

// Like many_scores, of codes: q [size / 2][kGroup][2], k a strip of [size / 2][kTile][2].
inline void code_scores(const std::int16_t* q, const std::int16_t* k, int pairs, float factor, float* score) {
#if defined(__AVX512F__)
  __m512i acc[kGroup][2];
#pragma GCC unroll 8
  for (int i = 0; i < kGroup; ++i) acc[i][0] = acc[i][1] = _mm512_setzero_si512();
  for (int d = 0; d < pairs; ++d, k += kTile * 2, q += kGroup * 2) {
    const __m512i a = _mm512_loadu_si512(k), b = _mm512_loadu_si512(k + 32);
#pragma GCC unroll 8
    for (int i = 0; i < kGroup; ++i) {
      std::int32_t pair;
      std::memcpy(&pair, q + i * 2, sizeof pair);
      const __m512i x = _mm512_set1_epi32(pair);
      acc[i][0] = _mm512_add_epi32(acc[i][0], _mm512_madd_epi16(x, a));
      acc[i][1] = _mm512_add_epi32(acc[i][1], _mm512_madd_epi16(x, b));
    }
  }
  const __m512 f = _mm512_set1_ps(factor);
#pragma GCC unroll 8
  for (int i = 0; i < kGroup; ++i) {
    _mm512_storeu_ps(score + i * kTile, _mm512_mul_ps(f, _mm512_cvtepi32_ps(acc[i][0])));
    _mm512_storeu_ps(score + i * kTile + 16, _mm512_mul_ps(f, _mm512_cvtepi32_ps(acc[i][1])));
  }
#elif defined(__AVX2__)
  // One vector of keys at a time: two would need 12 sums, and with them GCC runs out of registers.
  const __m256 f = _mm256_set1_ps(factor);
  for (int half = 0; half < kStrip; half += 8) {
    __m256i acc[kGroup];
#pragma GCC unroll 8
    for (int i = 0; i < kGroup; ++i) acc[i] = _mm256_setzero_si256();
    for (int d = 0; d < pairs; ++d) {
      const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(k + (d * kTile + half) * 2));
#pragma GCC unroll 8
      for (int i = 0; i < kGroup; ++i) {
        std::int32_t pair;
        std::memcpy(&pair, q + (d * kGroup + i) * 2, sizeof pair);
        acc[i] = _mm256_add_epi32(acc[i], _mm256_madd_epi16(_mm256_set1_epi32(pair), a));
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kGroup; ++i)
      _mm256_storeu_ps(score + i * kTile + half, _mm256_mul_ps(f, _mm256_cvtepi32_ps(acc[i])));
  }
#else
  for (int i = 0; i < kGroup; ++i)
    for (int t = 0; t < kStrip; ++t) {
      std::int32_t sum = 0;
      for (int d = 0; d < pairs; ++d)
        for (int j = 0; j < 2; ++j) sum += q[(d * kGroup + i) * 2 + j] * k[(d * kTile + t) * 2 + j];
      score[i * kTile + t] = factor * static_cast<float>(sum);
    }
#endif
}

struct Work {
  Scratch scratch;
  Rounded rounded;
};

// One head of one query block. True if every row saw something.
template <typename KV>
bool run_block(const Call& c, int head, int query, Counts& counts) {
  static thread_local Work work;
  Scratch& scratch = work.scratch;
  State& st = scratch.state;
  const blocks::Cached& kv = c.cached;
  const int size = kv.size, group = head / (c.heads / kv.groups);
  const int choice = static_cast<int>(static_cast<std::int64_t>(head) * c.choices / c.heads);
  const int from_block = c.first() / c.query_block + query;
  // Positions of the query block's rows; a row at position p sees the tokens (p - window, p].
  const int begin = std::max(c.first(), from_block * c.query_block);
  const int end = std::min<std::int64_t>(kv.length, static_cast<std::int64_t>(from_block + 1) * c.query_block);
  const int count = end - begin;
  const std::size_t stride = static_cast<std::size_t>(c.heads) * size;
  const float* q = c.q + static_cast<std::size_t>(begin - c.first()) * stride + static_cast<std::size_t>(head) * size;

  const Filtered policy(c.scale, c.cap, c.floor ? c.floor[head] : 0.0f);
  st.begin(count, size);
  for (int i = 0; i < count; ++i) st.load(i, q + i * stride, size, policy.query);
  scratch.ready(size);
  if (c.codes) work.rounded.fill(q, stride, count, size, c.code_limit);

  Tokens<KV> tile;
  auto lowest = [&](int position) { return c.window > 0 ? std::max(0, position + 1 - c.window) : 0; };
  auto read = [&](int tokens, int at) {
    // Codes go the many-row way whatever the number of rows: all rows of a block are rounded alike.
    if (c.codes == nullptr) return scratch.add(tile, tokens, size, policy, static_cast<const Tokens<KV>*>(nullptr));
    scratch.packed.pack_values(tile, tokens, size, st.stride);
    const int tiles = (kv.length + kTile - 1) / kTile;
    const std::size_t place = static_cast<std::size_t>(group) * tiles + at / kTile;
    const std::int16_t* codes = c.codes + place * size * kTile;
    const float factor = work.rounded.scale * c.code_scale[place] * policy.query;
    many_tile(st, scratch.packed, scratch.span.data(), policy, [&](int row, int low, int high, float* to) {
      const std::int16_t* x = work.rounded.code.data() + static_cast<std::size_t>(row) * size;
      for (int t = low - low % kStrip; t < high; t += kStrip) code_scores(x, codes + t * 2, size / 2, factor, to + t);
    });
  };

  const std::int32_t* list = c.list + c.start[choice * c.queries + query];
  const std::int32_t* stop = c.list + c.start[choice * c.queries + query + 1];
  if (c.order) {
    for (; list < stop; ++list) {
      const int from = *list * c.block, to = std::min(from + c.block, kv.length);
      const std::int32_t* order = c.order + static_cast<std::size_t>(choice) * kv.length;
      for (int t = from; t < to; t += kTile) {
        const std::int32_t* token = order + t;
        const int tokens = std::min(kTile, to - t);
        if (token[0] >= end || token[tokens - 1] < lowest(begin)) continue;
        for (int i = 0; i < tokens; ++i)
          tile.k[i] = kv.key<KV>(token[i], group), tile.v[i] = kv.value<KV>(token[i], group);
        Span seen{0, 0};  // both ends only move up from row to row
        for (int i = 0; i < count; ++i) {
          while (seen.low < tokens && token[seen.low] < lowest(begin + i)) ++seen.low;
          while (seen.high < tokens && token[seen.high] <= begin + i) ++seen.high;
          scratch.span[i] = seen;
        }
        read(tokens, t);
      }
    }
  } else {
    while (list < stop) {
      const int from = *list * c.block;
      std::int64_t to = static_cast<std::int64_t>(from) + c.block;
      for (++list; list < stop && *list == to / c.block; ++list) to += c.block;  // neighbours are one run
      to = std::min<std::int64_t>(to, end);
      for (int t = from; t < to; t += kTile) {
        const int tokens = std::min<int>(kTile, static_cast<int>(to) - t);
        if (t + tokens <= lowest(begin)) continue;
        for (int i = 0; i < tokens;) {
          const int run = std::min(kv.page - (t + i) % kv.page, tokens - i);
          const std::size_t step = static_cast<std::size_t>(size) + kTail<KV>;
          const KV *k = kv.key<KV>(t + i, group), *v = kv.value<KV>(t + i, group);
          for (int j = 0; j < run; ++j) tile.k[i + j] = k + j * step, tile.v[i + j] = v + j * step;
          i += run;
        }
        for (int i = 0; i < count; ++i)
          scratch.span[i] = {std::max(0, lowest(begin + i) - t), std::min(tokens, begin + i + 1 - t)};
        read(tokens, t);
      }
    }
  }
  bool all = true;
  for (int i = 0; i < count; ++i) {
    const std::size_t at = static_cast<std::size_t>(begin - c.first() + i) * c.heads + head;
    all &= st.l[i] != 0.0f;
    c.lse[at] = st.finish(i, c.out + at * size, size);
  }
  counts.tiles += policy.met, counts.skipped += policy.skipped;
  return all;
}

void check_lists(const Call& c, std::size_t starts, std::size_t entries) {
  const int lists = c.choices * c.queries;
  require(starts == static_cast<std::size_t>(lists) + 1 && c.start[0] == 0 &&
              c.start[lists] == static_cast<std::int64_t>(entries) && std::is_sorted(c.start, c.start + lists + 1),
          "start_J1 must rise from 0 to the length of block_C, one list per head group and query block");
  const int most = (c.cached.length + c.block - 1) / c.block;
  for (int j = 0; j < lists; ++j)
    for (int i = c.start[j]; i < c.start[j + 1]; ++i)
      require(c.list[i] >= 0 && c.list[i] < most && (i == c.start[j] || c.list[i] > c.list[i - 1]),
              "block_C must name blocks of the sequence, rising within a list");
}

void check_order(const Call& c) {
  std::vector<bool> seen;
  const int length = c.cached.length;
  for (int x = 0; x < c.choices; ++x) {
    const std::int32_t* order = c.order + static_cast<std::size_t>(x) * length;
    seen.assign(static_cast<std::size_t>(length), false);
    for (int t = 0; t < length; ++t) {
      require(order[t] >= 0 && order[t] < length && !seen[order[t]], "order_XL must name every token once");
      require(t % c.block == 0 || order[t] > order[t - 1], "order_XL must rise within a block");
      seen[order[t]] = true;
    }
  }
}

// Returns (groups of rows x tiles met, those left out).
nb::tuple attend_blocks(std::uintptr_t q, std::uintptr_t k, std::uintptr_t v, std::uintptr_t out, std::uintptr_t lse,
                        blocks::Table table, Array<const std::int32_t, -1> start, Array<const std::int32_t, -1> list,
                        std::uintptr_t order, std::uintptr_t codes, std::uintptr_t code_scale, std::uintptr_t floor, int code_limit,
                        int rows, int length, int heads, int groups, int size, int pages, int page, int kind, int choices, int block,
                        int query_block, int window, float scale, float softcap) {
  require(block > 0 && query_block > 0, "block and query_block must be positive");
  require(rows >= 0 && rows <= length, "the rows are the last of the sequence's tokens; there are more rows than tokens");
  require(choices == 1 || (choices > 0 && heads % choices == 0 && choices % groups == 0),
          "lists must be one, or one per kv head, or one per query head");
  require(floor == 0 || softcap == 0, "floor_H cannot be used with softcap");
  blocks::check_table(table, length, pages, page);
  const int queries = rows == 0 ? 0 : (length - 1) / query_block - (length - rows) / query_block + 1;
  const Call c{{reinterpret_cast<const void*>(k), reinterpret_cast<const void*>(v), table.data(), length, groups, size, page},
               reinterpret_cast<const float*>(q), reinterpret_cast<float*>(out), reinterpret_cast<float*>(lse),
               rows, heads, choices, block, query_block, queries, window, start.data(), list.data(),
               reinterpret_cast<const std::int32_t*>(order), reinterpret_cast<const std::int16_t*>(codes),
               reinterpret_cast<const float*>(code_scale), code_limit, reinterpret_cast<const float*>(floor), scale, softcap};
  check_lists(c, start.shape(0), list.shape(0));
  if (c.order) check_order(c);
  require(c.codes == nullptr || (c.order == nullptr && block % kTile == 0 && size % 2 == 0 && softcap == 0),
          "codes need cache order, blocks of whole tiles of 64 tokens, an even head size and no softcap");
  require(c.codes == nullptr || (code_limit > 0 && code_limit < 32768 &&
                                 static_cast<std::int64_t>(code_limit) * code_limit * size <= INT32_MAX),
          "sums of products of such codes do not fit 32 bits");
  Counts counts;
  std::atomic<bool> all{true};
  {
    nb::gil_scoped_release release;
    // The longest lists first, so that no thread is left with one at the end.
    std::vector<std::int32_t> task(static_cast<std::size_t>(heads) * queries);
    std::iota(task.begin(), task.end(), 0);
    auto blocks_of = [&](std::int32_t t) {
      const int j = static_cast<int>(static_cast<std::int64_t>(t % heads) * choices / heads) * queries + t / heads;
      return c.start[j + 1] - c.start[j];
    };
    std::stable_sort(task.begin(), task.end(), [&](auto a, auto b) { return blocks_of(a) > blocks_of(b); });
    const int tasks = static_cast<int>(task.size());
#pragma omp parallel for schedule(dynamic, 1) if (tasks > 1)
    for (int i = 0; i < tasks; ++i)
      blocks::with_kind(kind, [&](auto* p) {
        if (!run_block<blocks::Stored<decltype(p)>>(c, task[i] % heads, task[i] / heads, counts)) all = false;
      });
  }
  require(all, "the lists leave a row nothing to read");
  return nb::make_tuple(counts.tiles.load(), counts.skipped.load());
}

HASTEN_KERNELS(m) { m.def("attend_blocks", &attend_blocks); }

}  // namespace
}  // namespace hasten
