// Two-bit Hadamard codes of keys and queries, their Manhattan distance and the selection of the nearest tokens.
//
// Source: Adamas, arXiv 2510.18413, section 3. A head of D coordinates becomes two planes of D bits (high, low).
// With query bits (a1, a0) and key bits (b1, b0), x = a ^ b: |a - b| = x0 + 2 x1, except for the pair {1, 2}, whose XOR
// is 3 but whose distance is 1; the pair is marked by a1 ^ a0 of the query. Summed over coordinates:
//   popcount(x0) + 2 popcount(x1 & ~(x0 & (a1 ^ a0))).
//
// Legend: T rows, R decode rows, H query heads, G kv heads, X choices (G or H), D head size, B = D / 8 bytes of a
// plane, N pages, P page size, M pages of a row, K budget.
#include <algorithm>
#include <vector>

#include "simd.h"

namespace hasten {
namespace {

constexpr int max_size = 1024;

// In-place fast Walsh-Hadamard transform without the 1 / sqrt(n) factor (callers scale their cut points instead).
void walsh_hadamard(float* x, int n) {
  for (int half = 1; half < n; half *= 2) {
    for (int base = 0; base < n; base += 2 * half) {
      float* a = x + base;
      float* b = a + half;
      int i = 0;
      for (; i + vf::width <= half; i += vf::width) {
        vf u = vf::load(a + i), w = vf::load(b + i);
        (u + w).store(a + i);
        (u - w).store(b + i);
      }
      for (; i < half; ++i) {
        float u = a[i], w = b[i];
        a[i] = u + w;
        b[i] = u - w;
      }
    }
  }
}

// Codes of one head: planes[0..B) holds the high bits, planes[B..2B) the low bits; coordinate c is bit c % 8 of byte c / 8.
void encode_head(const float* x, int size, float cut, std::uint8_t* planes) {
  float y[max_size];
  std::memcpy(y, x, static_cast<std::size_t>(size) * sizeof(float));
  walsh_hadamard(y, size);
  const float outer = cut * std::sqrt(static_cast<float>(size));
  const int bytes = size / 8;
  for (int i = 0; i < bytes; ++i) {
#if defined(__AVX2__)
    __m256 v = _mm256_loadu_ps(y + 8 * i);
    int positive = _mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_GT_OQ));
    int above = _mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_set1_ps(outer), _CMP_GT_OQ));
    int over_low = _mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_set1_ps(-outer), _CMP_GT_OQ));
#else
    int positive = 0, above = 0, over_low = 0;
    for (int c = 0; c < 8; ++c) {
      float v = y[8 * i + c];
      positive |= (v > 0.0f) << c;
      above |= (v > outer) << c;
      over_low |= (v > -outer) << c;
    }
#endif
    planes[i] = static_cast<std::uint8_t>(positive);
    planes[bytes + i] = static_cast<std::uint8_t>(above | (over_low & ~positive));
  }
}

// A plane as 64-bit words; sizes below 64 are padded with zeros, which add nothing to a distance.
template <int Words>
struct Code {
  std::uint64_t high[Words];
  std::uint64_t low[Words];
};

template <int Words>
inline Code<Words> load_code(const std::uint8_t* p, int bytes) {
  Code<Words> code{};
  if (bytes == 8 * Words) {
    std::memcpy(code.high, p, 8 * Words);
    std::memcpy(code.low, p + 8 * Words, 8 * Words);
  } else {
    std::memcpy(code.high, p, static_cast<std::size_t>(bytes));
    std::memcpy(code.low, p + bytes, static_cast<std::size_t>(bytes));
  }
  return code;
}

// `pair` is a1 ^ a0 of the query, or zero for the uncorrected distance.
template <int Words>
inline int distance(const Code<Words>& query, const std::uint64_t* pair, const Code<Words>& key) {
  int low = 0, high = 0;
  for (int w = 0; w < Words; ++w) {
    std::uint64_t x0 = query.low[w] ^ key.low[w];
    std::uint64_t x1 = query.high[w] ^ key.high[w];
    low += __builtin_popcountll(x0);
    high += __builtin_popcountll(x1 & ~(x0 & pair[w]));
  }
  return low + 2 * high;
}

struct Shape {
  int rows, heads, kv_heads, page_size, bytes, table_width;
  int group() const { return heads / kv_heads; }
};

struct Inputs {
  const std::uint8_t* query_RH2B;
  const std::uint8_t* codes_NGP2B;
  const std::int32_t* table_RM;
  const std::int32_t* length_R;
  bool corrected;
};

// Distances of tokens [begin, end) of one row and kv head. `out` holds one array per choice, `stride` apart; with
// `sum` the query heads' distances are added into a single array.
template <int Words>
void distances(const Shape& s, const Inputs& in, int row, int kv_head, int begin, int end, bool sum, std::uint16_t* out,
               std::int64_t stride) {
  const int group = s.group(), code_bytes = 2 * s.bytes;
  Code<Words> query[64];
  std::uint64_t pair[64][Words];
  for (int h = 0; h < group; ++h) {
    const std::int64_t head = static_cast<std::int64_t>(row) * s.heads + kv_head * group + h;
    query[h] = load_code<Words>(in.query_RH2B + head * code_bytes, s.bytes);
    for (int w = 0; w < Words; ++w) pair[h][w] = in.corrected ? query[h].high[w] ^ query[h].low[w] : 0;
  }
  const std::int32_t* table = in.table_RM + static_cast<std::int64_t>(row) * s.table_width;
  for (int token = begin; token < end;) {
    const int offset = token % s.page_size;
    const int here = std::min(end - token, s.page_size - offset);
    const std::int64_t page = table[token / s.page_size];
    const std::uint8_t* p =
        in.codes_NGP2B + ((page * s.kv_heads + kv_head) * s.page_size + offset) * static_cast<std::int64_t>(code_bytes);
    for (int i = 0; i < here; ++i, p += code_bytes) {
      const Code<Words> key = load_code<Words>(p, s.bytes);
      if (sum) {
        int total = 0;
        for (int h = 0; h < group; ++h) total += distance<Words>(query[h], pair[h], key);
        out[token + i] = static_cast<std::uint16_t>(total);
      } else {
        for (int h = 0; h < group; ++h)
          out[h * stride + token + i] = static_cast<std::uint16_t>(distance<Words>(query[h], pair[h], key));
      }
    }
    token += here;
  }
}

using Distances = void (*)(const Shape&, const Inputs&, int, int, int, int, bool, std::uint16_t*, std::int64_t);

Distances distances_for(int bytes) {
  if (bytes <= 8) return &distances<1>;
  if (bytes == 16) return &distances<2>;
  if (bytes == 32) return &distances<4>;
  if (bytes == 64) return &distances<8>;
  return &distances<16>;
}

// The `budget - 1` smallest distances among tokens [0, length - 1), the most recent of equal ones first, and the last
// token; ascending. Counting selection: O(length), distances are at most `largest`.
int choose(const std::uint16_t* d, int length, int budget, int largest, std::int32_t* index) {
  const int others = length - 1, wanted = std::min(budget - 1, others);
  int n = 0;
  if (wanted > 0) {
    thread_local std::vector<int> histogram;
    histogram.assign(static_cast<std::size_t>(largest) + 1, 0);
    for (int j = 0; j < others; ++j) ++histogram[d[j]];
    int threshold = 0, below = 0;
    while (below + histogram[threshold] < wanted) below += histogram[threshold++];
    int skip = histogram[threshold] - (wanted - below);  // oldest ties that are left out
    for (int j = 0; j < others && n < wanted; ++j) {
      const bool tie = d[j] == threshold;
      const bool take = d[j] < threshold || (tie && skip <= 0);
      skip -= tie;
      index[n] = j;
      n += take;
    }
  }
  index[n++] = length - 1;
  return n;
}

template <typename A>
int dim(const A& a, int i) {
  return static_cast<int>(a.shape(static_cast<std::size_t>(i)));
}

using Codes4 = Array<std::uint8_t, -1, -1, 2, -1>;
using Codes5 = Array<std::uint8_t, -1, -1, -1, 2, -1>;

Shape shape_of(const Codes4& query, const Codes5& codes, const Array<std::int32_t, -1, -1>& table,
               const Array<std::int32_t, -1>& length) {
  Shape s{dim(query, 0), dim(query, 1), dim(codes, 1), dim(codes, 2), dim(query, 3), dim(table, 1)};
  require(dim(codes, 4) == s.bytes, "query and key codes differ in head size");
  require(s.kv_heads > 0 && s.heads % s.kv_heads == 0, "query heads must be a multiple of kv heads");
  require(s.group() <= 64, "at most 64 query heads per kv head");
  require(s.bytes <= max_size / 8, "head size is at most 1024");
  require(dim(table, 0) == s.rows && dim(length, 0) == s.rows, "one page-table row and one length per query row");
  for (int r = 0; r < s.rows; ++r) {
    const int pages = (length.data()[r] + s.page_size - 1) / s.page_size;
    require(length.data()[r] >= 1 && pages <= s.table_width, "a length needs at least one token and its pages");
    for (int m = 0; m < pages; ++m) {
      const std::int32_t page = table.data()[static_cast<std::int64_t>(r) * s.table_width + m];
      require(page >= 0 && page < dim(codes, 0), "a page id lies outside the pool");
    }
  }
  return s;
}

constexpr int block = 1024;  // tokens a thread scans at a time

void scan(const Shape& s, const Inputs& in, bool sum, int longest, std::uint16_t* out) {
  const Distances run = distances_for(s.bytes);
  const int choices = sum ? s.kv_heads : s.heads, per_kv = sum ? 1 : s.group();
  const int blocks = (longest + block - 1) / block;
  const std::int64_t tasks = static_cast<std::int64_t>(s.rows) * s.kv_heads * blocks;
#pragma omp parallel for schedule(dynamic, 1) if (tasks > 1)
  for (std::int64_t task = 0; task < tasks; ++task) {
    const int b = static_cast<int>(task % blocks), g = static_cast<int>(task / blocks % s.kv_heads);
    const int r = static_cast<int>(task / blocks / s.kv_heads);
    const int begin = b * block, end = std::min(in.length_R[r], begin + block);
    std::uint16_t* base = out + (static_cast<std::int64_t>(r) * choices + g * per_kv) * longest;
    if (begin < end) run(s, in, r, g, begin, end, sum, base, longest);
  }
}

int longest_of(const std::int32_t* length, int rows) { return rows ? *std::max_element(length, length + rows) : 0; }

HASTEN_KERNELS(m) {
  m.def("hadamard_encode", [](Array<const float, -1, -1, -1> x_RHD, float cut, Codes4 out_RH2B) {
    const int size = dim(x_RHD, 2), bytes = dim(out_RH2B, 3);
    require(size == 8 * bytes && size <= max_size, "codes must hold head size / 8 bytes a plane");
    const std::int64_t heads = static_cast<std::int64_t>(dim(x_RHD, 0)) * dim(x_RHD, 1);
    require(dim(out_RH2B, 0) == dim(x_RHD, 0) && dim(out_RH2B, 1) == dim(x_RHD, 1), "codes must match x");
    nb::gil_scoped_release release;
#pragma omp parallel for schedule(static) if (heads > 256)
    for (std::int64_t i = 0; i < heads; ++i)
      encode_head(x_RHD.data() + i * size, size, cut, out_RH2B.data() + i * 2 * bytes);
  });

  m.def("hadamard_append", [](Array<const float, -1, -1, -1> x_TGD, float cut, Codes5 codes_NGP2B,
                              Array<const std::int64_t, -1> slot_T) {
    const int rows = dim(x_TGD, 0), kv_heads = dim(x_TGD, 1), size = dim(x_TGD, 2);
    const int page_size = dim(codes_NGP2B, 2), bytes = dim(codes_NGP2B, 4);
    require(size == 8 * bytes && size <= max_size, "codes must hold head size / 8 bytes a plane");
    require(dim(codes_NGP2B, 1) == kv_heads && dim(slot_T, 0) == rows, "codes and slots must match x");
    const std::int64_t slots = static_cast<std::int64_t>(dim(codes_NGP2B, 0)) * page_size;
    for (int t = 0; t < rows; ++t)
      require(slot_T.data()[t] >= 0 && slot_T.data()[t] < slots, "a slot lies outside the pool");
    nb::gil_scoped_release release;
#pragma omp parallel for schedule(static) if (rows * kv_heads > 256)
    for (int t = 0; t < rows; ++t) {
      const std::int64_t page = slot_T.data()[t] / page_size, offset = slot_T.data()[t] % page_size;
      for (int g = 0; g < kv_heads; ++g)
        encode_head(x_TGD.data() + (static_cast<std::int64_t>(t) * kv_heads + g) * size, size, cut,
                    codes_NGP2B.data() + ((page * kv_heads + g) * page_size + offset) * 2 * bytes);
    }
  });

  m.def("hadamard_distance",
        [](Codes4 query_RH2B, Codes5 codes_NGP2B, Array<std::int32_t, -1, -1> table_RM,
           Array<std::int32_t, -1> length_R, bool corrected, Array<std::uint16_t, -1, -1, -1> out_RHL) {
          const Shape s = shape_of(query_RH2B, codes_NGP2B, table_RM, length_R);
          const int longest = longest_of(length_R.data(), s.rows);
          require(dim(out_RHL, 0) == s.rows && dim(out_RHL, 1) == s.heads && dim(out_RHL, 2) == longest,
                  "out must be [rows, heads, longest]");
          const Inputs in{query_RH2B.data(), codes_NGP2B.data(), table_RM.data(), length_R.data(), corrected};
          nb::gil_scoped_release release;
          scan(s, in, false, longest, out_RHL.data());
        });

  m.def("hadamard_select",
        [](Codes4 query_RH2B, Codes5 codes_NGP2B, Array<std::int32_t, -1, -1> table_RM,
           Array<std::int32_t, -1> length_R, bool per_head, bool corrected, Array<std::int32_t, -1, -1, -1> index_RXK,
           Array<std::int32_t, -1, -1> count_RX) {
          const Shape s = shape_of(query_RH2B, codes_NGP2B, table_RM, length_R);
          const int choices = per_head ? s.heads : s.kv_heads, budget = dim(index_RXK, 2);
          require(dim(index_RXK, 0) == s.rows && dim(index_RXK, 1) == choices && budget >= 1,
                  "index must be [rows, choices, budget]");
          require(dim(count_RX, 0) == s.rows && dim(count_RX, 1) == choices, "count must be [rows, choices]");
          const int largest = 3 * 8 * s.bytes * (per_head ? 1 : s.group());
          require(largest <= 65535, "too many query heads per kv head for summed distances");
          const int longest = longest_of(length_R.data(), s.rows);
          const Inputs in{query_RH2B.data(), codes_NGP2B.data(), table_RM.data(), length_R.data(), corrected};
          nb::gil_scoped_release release;
          thread_local std::vector<std::uint16_t> scratch;
          scratch.resize(static_cast<std::size_t>(s.rows) * choices * longest);
          std::uint16_t* d = scratch.data();  // threads of the team must not name the thread_local themselves
          scan(s, in, !per_head, longest, d);
          const std::int64_t tasks = static_cast<std::int64_t>(s.rows) * choices;
#pragma omp parallel for schedule(dynamic, 1) if (tasks > 1)
          for (std::int64_t task = 0; task < tasks; ++task)
            count_RX.data()[task] = choose(d + task * longest, in.length_R[task / choices], budget, largest,
                                           index_RXK.data() + task * budget);
        });
}

}  // namespace
}  // namespace hasten
