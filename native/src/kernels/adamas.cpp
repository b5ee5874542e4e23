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

// Distances of one row and kv head. `query` points at `heads` codes of 2 B bytes; with `sum` the heads' distances are
// added into out[0..count), else head h writes out[h * stride + 0..count). Keys are `count` codes, one after the other.
struct Query {
  const std::uint8_t* codes;
  int heads, bytes;
  bool corrected, sum;
};

// Planes in 64-bit words; sizes below 64 are padded with zeros, which add nothing to a distance.
void distances_by_word(const Query& query, const std::uint8_t* keys, int count, std::uint16_t* out, std::int64_t stride) {
  const int bytes = query.bytes;
  auto word = [bytes](const std::uint8_t* plane, int at) {
    std::uint64_t w = 0;
    std::memcpy(&w, plane + at, static_cast<std::size_t>(std::min(8, bytes - at)));
    return w;
  };
  for (int h = 0; h < query.heads; ++h) {
    const std::uint8_t* q = query.codes + 2 * h * bytes;
    std::uint16_t* to = query.sum ? out : out + h * stride;
    const bool add = query.sum && h > 0;
    for (int i = 0; i < count; ++i) {
      const std::uint8_t* k = keys + static_cast<std::int64_t>(i) * 2 * bytes;
      int total = 0;
      for (int at = 0; at < bytes; at += 8) {
        const std::uint64_t high = word(q, at), low = word(q + bytes, at);
        const std::uint64_t x0 = low ^ word(k + bytes, at), x1 = high ^ word(k, at);
        const std::uint64_t pair = query.corrected ? high ^ low : 0;
        total += __builtin_popcountll(x0) + 2 * __builtin_popcountll(x1 & ~(x0 & pair));
      }
      to[i] = static_cast<std::uint16_t>(add ? to[i] + total : total);
    }
  }
}

#if defined(__AVX2__)
// The query of one head at D = 64: each plane in all four lanes.
struct Wide {
  __m256i high, low, pair;
};

Wide widen_query(const std::uint8_t* q, bool corrected) {
  std::uint64_t high, low;
  std::memcpy(&high, q, 8);
  std::memcpy(&low, q + 8, 8);
  auto all = [](std::uint64_t x) { return _mm256_set1_epi64x(static_cast<long long>(x)); };
  return {all(high), all(low), all(corrected ? high ^ low : 0)};
}

// Bits of `x` per byte, times the weight that is in `table` (16 counts, twice).
inline __m256i count_bits(__m256i x, __m256i table) {
  const __m256i nibble = _mm256_set1_epi8(15);
  return _mm256_add_epi8(_mm256_shuffle_epi8(table, _mm256_and_si256(x, nibble)),
                         _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(x, 4), nibble)));
}

inline __m256i bit_table(int weight) {
  const char w = static_cast<char>(weight), w2 = static_cast<char>(2 * weight), w3 = static_cast<char>(3 * weight);
  const char w4 = static_cast<char>(4 * weight);
  return _mm256_setr_epi8(0, w, w, w2, w, w2, w2, w3, w, w2, w2, w3, w2, w3, w3, w4,  //
                          0, w, w, w2, w, w2, w2, w3, w, w2, w2, w3, w2, w3, w3, w4);
}

// x0 and the repaired x1 of four tokens.
struct Unequal {
  __m256i low, high;
};

inline Unequal unequal(const Wide& q, __m256i high, __m256i low) {
  const __m256i x0 = _mm256_xor_si256(q.low, low), x1 = _mm256_xor_si256(q.high, high);
  return {x0, _mm256_andnot_si256(_mm256_and_si256(x0, q.pair), x1)};
}

inline __m256i bytes_of(const Unequal& u) {
  return _mm256_add_epi8(count_bits(u.low, bit_table(1)), count_bits(u.high, bit_table(2)));
}

// Full adder of three one-bit numbers per bit position.
inline void add_bits(__m256i a, __m256i b, __m256i c, __m256i& sum, __m256i& carry) {
  const __m256i half = _mm256_xor_si256(a, b);
  sum = _mm256_xor_si256(half, c);
  carry = _mm256_or_si256(_mm256_and_si256(a, b), _mm256_and_si256(half, c));
}

// Distances of four tokens (one per 64-bit lane), summed over `n` heads. Three heads at a time go through a full adder:
// four counts instead of six.
inline __m256i four_distances(const Wide* q, int n, __m256i high, __m256i low) {
  __m256i total = _mm256_setzero_si256();
  int h = 0;
  for (; h + 3 <= n; h += 3) {
    const Unequal a = unequal(q[h], high, low), b = unequal(q[h + 1], high, low), c = unequal(q[h + 2], high, low);
    __m256i one, two, four, twice;
    add_bits(a.low, b.low, c.low, one, two);
    add_bits(a.high, b.high, c.high, twice, four);
    const __m256i some = _mm256_add_epi8(count_bits(one, bit_table(1)), count_bits(two, bit_table(2)));
    const __m256i rest = _mm256_add_epi8(count_bits(twice, bit_table(2)), count_bits(four, bit_table(4)));
    total = _mm256_add_epi64(total, _mm256_sad_epu8(_mm256_add_epi8(some, rest), _mm256_setzero_si256()));
  }
  for (; h < n; ++h)
    total = _mm256_add_epi64(total, _mm256_sad_epu8(bytes_of(unequal(q[h], high, low)), _mm256_setzero_si256()));
  return total;
}

// D = 64, sixteen tokens at a time. Vector m of four holds tokens 2m, 2m + 8, 2m + 1, 2m + 9, so that joining the four
// as 16-bit lanes leaves the even tokens in the lower half and the odd ones in the upper.
template <int N>
void sixteens(const Wide* q, int n, const std::uint8_t* keys, int count, std::uint16_t* out) {
  for (int i = 0; i + 16 <= count; i += 16) {
    const auto* k = reinterpret_cast<const __m256i*>(keys + 16 * i);
    __m256i joined = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m) {
      const __m256i a = _mm256_loadu_si256(k + m), b = _mm256_loadu_si256(k + 4 + m);
      const __m256i d = four_distances(q, N > 0 ? N : n, _mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
      joined = _mm256_or_si256(joined, _mm256_slli_epi64(d, 16 * m));
    }
    const __m128i even = _mm256_castsi256_si128(joined), odd = _mm256_extracti128_si256(joined, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm_unpacklo_epi16(even, odd));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i + 8), _mm_unpackhi_epi16(even, odd));
  }
}

void distances(const Query& query, const std::uint8_t* keys, int count, std::uint16_t* out, std::int64_t stride) {
  const int whole = query.bytes == 8 ? count / 16 * 16 : 0;
  if (whole > 0) {
    Wide wide[64];
    for (int h = 0; h < query.heads; ++h) wide[h] = widen_query(query.codes + 16 * h, query.corrected);
    if (!query.sum) {
      for (int h = 0; h < query.heads; ++h) sixteens<1>(wide + h, 1, keys, whole, out + h * stride);
    } else if (query.heads == 3) {
      sixteens<3>(wide, 3, keys, whole, out);
    } else {
      sixteens<0>(wide, query.heads, keys, whole, out);
    }
  }
  if (whole < count)
    distances_by_word(query, keys + static_cast<std::int64_t>(whole) * 2 * query.bytes, count - whole, out + whole, stride);
}

inline __m256i load16(const std::uint16_t* d) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(d)); }

// Bit 2i and 2i + 1: whether d[i] <= most (values are below 32768).
inline std::uint32_t at_most(const std::uint16_t* d, __m256i above) {
  return static_cast<std::uint32_t>(_mm256_movemask_epi8(_mm256_cmpgt_epi16(above, load16(d))));
}

int count_at_most(const std::uint16_t* d, int n, int most) {
  const __m256i above = _mm256_set1_epi16(static_cast<short>(most + 1));
  int total = 0, i = 0;
  while (i + 16 <= n) {
    const int stop = std::min(n, i + 16 * 32000);  // lanes count to 32767
    __m256i counts = _mm256_setzero_si256();
    for (; i + 16 <= stop; i += 16) counts = _mm256_sub_epi16(counts, _mm256_cmpgt_epi16(above, load16(d + i)));
    const __m256i pairs = _mm256_madd_epi16(counts, _mm256_set1_epi16(1));
    alignas(32) int lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), pairs);
    for (int x : lanes) total += x;
  }
  for (; i < n; ++i) total += d[i] <= most;
  return total;
}
#else
void distances(const Query& query, const std::uint8_t* keys, int count, std::uint16_t* out, std::int64_t stride) {
  distances_by_word(query, keys, count, out, stride);
}

int count_at_most(const std::uint16_t* d, int n, int most) {
  int total = 0;
  for (int i = 0; i < n; ++i) total += d[i] <= most;
  return total;
}
#endif

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

// Distances of tokens [begin, end) of one row and kv head, page by page.
void scan_range(const Shape& s, const Inputs& in, int row, int kv_head, int begin, int end, bool sum, std::uint16_t* out,
                std::int64_t stride) {
  const int group = s.group();
  const std::int64_t code_bytes = 2 * s.bytes;
  const Query query{in.query_RH2B + (static_cast<std::int64_t>(row) * s.heads + kv_head * group) * code_bytes, group,
                    s.bytes, in.corrected, sum};
  const std::int32_t* table = in.table_RM + static_cast<std::int64_t>(row) * s.table_width;
  for (int token = begin; token < end;) {
    const int offset = token % s.page_size;
    const int here = std::min(end - token, s.page_size - offset);
    const std::int64_t page = table[token / s.page_size];
    distances(query, in.codes_NGP2B + ((page * s.kv_heads + kv_head) * s.page_size + offset) * code_bytes, here,
              out + token, stride);
    token += here;
  }
}

// The `budget - 1` smallest distances among tokens [0, length - 1), the most recent of equal ones first, and the last
// token; ascending. The distances are integers up to `largest`, so bisection finds the threshold in log2(largest)
// passes, each a count at memory speed; nothing is sorted.
int choose(const std::uint16_t* d, int length, int budget, int largest, std::int32_t* index) {
  const int others = length - 1, wanted = std::min(budget - 1, others);
  int n = 0;
  if (wanted > 0) {
    int low = 0, high = largest;  // the smallest threshold that at least `wanted` tokens meet
    int reached = others;
    while (low < high) {
      const int middle = (low + high) / 2, count = count_at_most(d, others, middle);
      if (count >= wanted) {
        high = middle;
        reached = count;
      } else {
        low = middle + 1;
      }
    }
    int skip = reached - wanted;  // oldest ties that are left out
    auto look = [&](int j) {
      if (d[j] < low || (d[j] == low && --skip < 0)) index[n++] = j;
    };
    int j = 0;
#if defined(__AVX2__)
    const __m256i above = _mm256_set1_epi16(static_cast<short>(low + 1));
    for (; j + 16 <= others; j += 16)
      for (std::uint32_t mask = at_most(d + j, above) & 0x55555555u; mask != 0; mask &= mask - 1)
        look(j + __builtin_ctz(mask) / 2);
#endif
    for (; j < others; ++j) look(j);
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

void check(const Shape& s, int pages, const std::int32_t* table, const std::int32_t* length) {
  require(s.kv_heads > 0 && s.heads % s.kv_heads == 0, "query heads must be a multiple of kv heads");
  require(s.group() <= 64, "at most 64 query heads per kv head");
  require(s.bytes > 0 && s.bytes <= max_size / 8, "head size is at most 1024");
  for (int r = 0; r < s.rows; ++r) {
    const int used = (length[r] + s.page_size - 1) / s.page_size;
    require(length[r] >= 1 && used <= s.table_width, "a length needs at least one token and its pages");
    const std::int32_t* page = table + static_cast<std::int64_t>(r) * s.table_width;
    for (int m = 0; m < used; ++m) require(page[m] >= 0 && page[m] < pages, "a page id lies outside the pool");
  }
}

Shape shape_of(const Codes4& query, const Codes5& codes, const Array<std::int32_t, -1, -1>& table,
               const Array<std::int32_t, -1>& length) {
  Shape s{dim(query, 0), dim(query, 1), dim(codes, 1), dim(codes, 2), dim(query, 3), dim(table, 1)};
  require(dim(codes, 4) == s.bytes, "query and key codes differ in head size");
  require(dim(table, 0) == s.rows && dim(length, 0) == s.rows, "one page-table row and one length per query row");
  check(s, dim(codes, 0), table.data(), length.data());
  return s;
}

constexpr int block = 1024;  // tokens a thread scans at a time

// Call in a parallel region.
void scan(const Shape& s, const Inputs& in, bool sum, int longest, std::uint16_t* out) {
  const int choices = sum ? s.kv_heads : s.heads, per_kv = sum ? 1 : s.group();
  const int blocks = (longest + block - 1) / block;
  const std::int64_t tasks = static_cast<std::int64_t>(s.rows) * s.kv_heads * blocks;
#pragma omp for schedule(dynamic, 1)
  for (std::int64_t task = 0; task < tasks; ++task) {
    const int b = static_cast<int>(task % blocks), g = static_cast<int>(task / blocks % s.kv_heads);
    const int r = static_cast<int>(task / blocks / s.kv_heads);
    const int begin = b * block, end = std::min(in.length_R[r], begin + block);
    std::uint16_t* base = out + (static_cast<std::int64_t>(r) * choices + g * per_kv) * longest;
    if (begin < end) scan_range(s, in, r, g, begin, end, sum, base, longest);
  }
}

int longest_of(const std::int32_t* length, int rows) { return rows ? *std::max_element(length, length + rows) : 0; }

void select(const Shape& s, const Inputs& in, bool per_head, int budget, std::int32_t* index, std::int32_t* count) {
  const int choices = per_head ? s.heads : s.kv_heads;
  const int largest = 3 * 8 * s.bytes * (per_head ? 1 : s.group());
  require(largest < 32767, "too many query heads per kv head for summed distances");
  const int longest = longest_of(in.length_R, s.rows);
  thread_local std::vector<std::uint16_t> scratch;
  scratch.resize(static_cast<std::size_t>(s.rows) * choices * longest);
  std::uint16_t* d = scratch.data();  // threads of the team must not name the thread_local themselves
  const std::int64_t tasks = static_cast<std::int64_t>(s.rows) * choices;
#pragma omp parallel if (tasks * longest > 4096)
  {
    scan(s, in, !per_head, longest, d);
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t task = 0; task < tasks; ++task)
      count[task] = choose(d + task * longest, in.length_R[task / choices], budget, largest, index + task * budget);
  }
}

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

  // Addresses where tensors would cost more than the work: float32 keys [rows, kv heads, size], codes [pages, kv heads,
  // page size, 2, size / 8].
  m.def("hadamard_append", [](std::uintptr_t k_TGD, float cut, std::uintptr_t codes_NGP2B,
                              Array<const std::int64_t, -1> slot_T, int kv_heads, int size, int pages, int page_size) {
    const int rows = dim(slot_T, 0), bytes = size / 8;
    require(size > 0 && size % 8 == 0 && size <= max_size, "head size must be a multiple of 8, at most 1024");
    const std::int64_t slots = static_cast<std::int64_t>(pages) * page_size;
    for (int t = 0; t < rows; ++t)
      require(slot_T.data()[t] >= 0 && slot_T.data()[t] < slots, "a slot lies outside the pool");
    const float* k = reinterpret_cast<const float*>(k_TGD);
    auto* codes = reinterpret_cast<std::uint8_t*>(codes_NGP2B);
    nb::gil_scoped_release release;
#pragma omp parallel for schedule(static) if (rows * kv_heads > 256)
    for (int t = 0; t < rows; ++t) {
      const std::int64_t page = slot_T.data()[t] / page_size, offset = slot_T.data()[t] % page_size;
      for (int g = 0; g < kv_heads; ++g)
        encode_head(k + (static_cast<std::int64_t>(t) * kv_heads + g) * size, size, cut,
                    codes + ((page * kv_heads + g) * page_size + offset) * 2 * bytes);
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
#pragma omp parallel
          scan(s, in, false, longest, out_RHL.data());
        });

  m.def("hadamard_select",
        [](Codes4 query_RH2B, Codes5 codes_NGP2B, Array<std::int32_t, -1, -1> table_RM,
           Array<std::int32_t, -1> length_R, bool per_head, bool corrected, Array<std::int32_t, -1, -1, -1> index_RXK,
           Array<std::int32_t, -1, -1> count_RX) {
          const Shape s = shape_of(query_RH2B, codes_NGP2B, table_RM, length_R);
          const int choices = per_head ? s.heads : s.kv_heads;
          require(dim(index_RXK, 0) == s.rows && dim(index_RXK, 1) == choices && dim(index_RXK, 2) >= 1,
                  "index must be [rows, choices, budget]");
          require(dim(count_RX, 0) == s.rows && dim(count_RX, 1) == choices, "count must be [rows, choices]");
          const Inputs in{query_RH2B.data(), codes_NGP2B.data(), table_RM.data(), length_R.data(), corrected};
          nb::gil_scoped_release release;
          select(s, in, per_head, dim(index_RXK, 2), index_RXK.data(), count_RX.data());
        });

  // Encode and select in one call: float32 queries [rows, heads, size]; index int32 [rows, choices, budget].
  m.def("hadamard_nearest", [](std::uintptr_t q_RHD, float cut, std::uintptr_t codes_NGP2B,
                               Array<const std::int32_t, -1, -1> table_RM, Array<const std::int32_t, -1> length_R,
                               int heads, int kv_heads, int size, int pages, int page_size, int budget, bool per_head,
                               bool corrected, std::uintptr_t index_RXK, std::uintptr_t count_RX) {
    const Shape s{dim(table_RM, 0), heads, kv_heads, page_size, size / 8, dim(table_RM, 1)};
    require(size % 8 == 0, "head size must be a multiple of 8");
    require(dim(length_R, 0) == s.rows, "one page-table row and one length per query row");
    require(budget >= 1, "budget must be at least 1");
    check(s, pages, table_RM.data(), length_R.data());
    nb::gil_scoped_release release;
    thread_local std::vector<std::uint8_t> scratch;
    const int vectors = s.rows * heads;
    scratch.resize(static_cast<std::size_t>(vectors) * 2 * s.bytes);
    std::uint8_t* query = scratch.data();  // threads of the team must not name the thread_local themselves
    const float* q = reinterpret_cast<const float*>(q_RHD);
#pragma omp parallel for schedule(static) if (vectors > 256)
    for (int i = 0; i < vectors; ++i)
      encode_head(q + static_cast<std::int64_t>(i) * size, size, cut, query + static_cast<std::int64_t>(i) * 2 * s.bytes);
    const Inputs in{query, reinterpret_cast<const std::uint8_t*>(codes_NGP2B), table_RM.data(), length_R.data(), corrected};
    select(s, in, per_head, budget, reinterpret_cast<std::int32_t*>(index_RXK), reinterpret_cast<std::int32_t*>(count_RX));
  });
}

}  // namespace
}  // namespace hasten
