// Two-bit Hadamard codes of keys and queries, their Manhattan distance and the selection of the nearest tokens.
//
// Source: Adamas, arXiv 2510.18413, section 3. A head of D coordinates becomes D codes 0..3 of two bits, four in a byte.
//
// Distances are sums of table look-ups: two neighbouring codes of a key are a nibble, and the query makes a table of 16
// distances per nibble, which is one byte shuffle for 32 tokens (the scan of product-quantised vectors of Andre,
// Kermarrec and Le Scouarnec, VLDB 2015). Query heads that share a choice share the tables: their entries are added. So
// that shuffles see one nibble of many tokens, the codes of W tokens of a page lie transposed: byte j of token t is at
// (t / W) W B + j W + t % W, with W = 32, 16 or 1, the largest that divides the page size.
//
// Legend: T rows, R decode rows, H query heads, G kv heads, X choices (G or H), D head size, B = D / 4 bytes of a code,
// N pages, P page size, M pages of a row, K budget.
#include <algorithm>
#include <vector>

#include "hadamard.h"
#include "hasten.h"
#include "select.h"
#include "simd.h"

namespace hasten {
namespace {

using hadamard::block_width;
using hadamard::encode_head;

constexpr int widest = 32;  // W at most; distances are written in whole blocks of this


// Tables of one choice: entry[n][k] is the distance, summed over the choice's query heads, of their codes 2n and 2n + 1
// to a key nibble k. `run`: how many entries may be added in a byte.
struct Tables {
  std::vector<std::uint8_t> entry;
  int nibbles = 0, run = 0;

  void build(const std::uint8_t* query, int heads, int bytes, bool corrected) {
    nibbles = 2 * bytes;
    run = 255 / (6 * heads);
    entry.assign(static_cast<std::size_t>(16 * nibbles), 0);
    const auto& rows = parts(corrected);
    for (int h = 0; h < heads; ++h)
      for (int n = 0; n < nibbles; ++n) {
        const std::uint64_t* part = rows[query[h * bytes + n / 2] >> (4 * (n % 2)) & 15];
        std::uint64_t sum[2];  // 16 bytes; none overflows (42 heads at most)
        std::memcpy(sum, entry.data() + 16 * n, 16);
        sum[0] += part[0];
        sum[1] += part[1];
        std::memcpy(entry.data() + 16 * n, sum, 16);
      }
  }

 private:
  using Parts = std::uint64_t[16][2];

  // What one head adds: 16 distances of a query nibble to every key nibble.
  static const Parts& parts(bool corrected) {
    struct Both {
      Parts of[2];
      Both() {
        for (int c = 0; c < 2; ++c)
          for (int q = 0; q < 16; ++q) {
            std::uint8_t row[16];
            auto apart = [c](int x, int y) { return c ? std::abs(x - y) : x ^ y; };
            for (int k = 0; k < 16; ++k) row[k] = static_cast<std::uint8_t>(apart(q & 3, k & 3) + apart(q >> 2, k >> 2));
            std::memcpy(of[c][q], row, 16);
          }
      }
    };
    static const Both both;
    return both.of[corrected];
  }
};

// Distances of tokens [0, count) of a page part whose codes lie in blocks of `width`; `out` may be written up to the
// next multiple of `widest`.
void distances_by_token(const Tables& t, const std::uint8_t* codes, int width, int first, int count, std::uint16_t* out) {
  const int bytes = t.nibbles / 2;
  for (int i = first; i < count; ++i) {
    const std::uint8_t* c = codes + static_cast<std::int64_t>(i / width) * width * bytes + i % width;
    const std::uint8_t* entry = t.entry.data();
    int total = 0;
    for (int j = 0; j < bytes; ++j, entry += 32) {
      const int pair = c[static_cast<std::int64_t>(j) * width];
      total += entry[pair & 15] + entry[16 + (pair >> 4)];
    }
    out[i] = static_cast<std::uint16_t>(total);
  }
}

#if defined(__AVX2__)
template <int W>
inline __m256i load_row(const std::uint8_t* codes, int bytes, int j) {
  if (W == 32) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 32 * j));
  const auto* low = reinterpret_cast<const __m128i*>(codes + 16 * j);
  return _mm256_set_m128i(_mm_loadu_si128(low + bytes), _mm_loadu_si128(low));
}

// 32 tokens against C choices, whose tables are `entry[c]`; the rows are read once for all of them.
template <int C, int W>
inline void block_distances(const Tables* tables, const std::uint8_t* codes, std::uint16_t* out, std::int64_t stride) {
  const __m256i nibble = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
  const int bytes = tables[0].nibbles / 2, run = tables[0].run / 2;
  const int step = run < bytes && run >= 4 && bytes % 4 == 0 ? 4 : run;  // a loop of fixed length costs no misprediction
  const __m128i* entry[C];
  for (int c = 0; c < C; ++c) entry[c] = reinterpret_cast<const __m128i*>(tables[c].entry.data());
  __m256i even[C], odd[C], sum[C];
  auto add_row = [&](int j) {
    const __m256i row = load_row<W>(codes, bytes, j);
    const __m256i low = _mm256_and_si256(row, nibble), high = _mm256_and_si256(_mm256_srli_epi16(row, 4), nibble);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const __m256i a = _mm256_broadcastsi128_si256(_mm_loadu_si128(entry[c] + 2 * j));
      const __m256i b = _mm256_broadcastsi128_si256(_mm_loadu_si128(entry[c] + 2 * j + 1));
      sum[c] = _mm256_add_epi8(sum[c], _mm256_add_epi8(_mm256_shuffle_epi8(a, low), _mm256_shuffle_epi8(b, high)));
    }
  };
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) even[c] = odd[c] = zero;
  for (int from = 0; from < bytes; from += step) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sum[c] = zero;
    if (step == 4) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) add_row(from + j);
    } else {
      for (int j = from; j < std::min(bytes, from + step); ++j) add_row(j);
    }
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      even[c] = _mm256_add_epi16(even[c], _mm256_unpacklo_epi8(sum[c], zero));
      odd[c] = _mm256_add_epi16(odd[c], _mm256_unpackhi_epi8(sum[c], zero));
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) {
    auto* to = reinterpret_cast<__m256i*>(out + c * stride);
    _mm256_storeu_si256(to, _mm256_permute2x128_si256(even[c], odd[c], 0x20));
    _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(even[c], odd[c], 0x31));
  }
}

void distances(const Tables* tables, int choices, const std::uint8_t* codes, int width, int count, std::uint16_t* out,
               std::int64_t stride) {
  const int bytes = tables[0].nibbles / 2;
  // A last block of 32 may be read beyond `count`, never beyond the page.
  const int whole = tables[0].run < 2 || width == 1 ? 0 : width == 32 ? count : count / 32 * 32;
  auto run = [&]<int W>() {
    for (int i = 0; i < whole; i += 32) {
      const std::uint8_t* block = codes + static_cast<std::int64_t>(i) * bytes;
      int c = 0;
      for (; c + 3 <= choices; c += 3) block_distances<3, W>(tables + c, block, out + c * stride + i, stride);
      for (; c < choices; ++c) block_distances<1, W>(tables + c, block, out + c * stride + i, stride);
    }
  };
  width == 32 ? run.template operator()<32>() : run.template operator()<16>();
  if (whole < count)
    for (int c = 0; c < choices; ++c) distances_by_token(tables[c], codes, width, whole, count, out + c * stride);
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
void distances(const Tables* tables, int choices, const std::uint8_t* codes, int width, int count, std::uint16_t* out,
               std::int64_t stride) {
  for (int c = 0; c < choices; ++c) distances_by_token(tables[c], codes, width, 0, count, out + c * stride);
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
  const std::uint8_t* query_RHB;
  const std::uint8_t* codes_NGPB;
  const std::int32_t* table_RM;
  const std::int32_t* length_R;
  bool corrected;
};

constexpr int block = 1024;  // tokens a thread scans at a time

std::int64_t padded(int longest) { return (static_cast<std::int64_t>(longest) + widest - 1) / widest * widest; }

// Distances of all tokens: out [rows, choices, padded(longest)]. Call in a parallel region.
void scan(const Shape& s, const Inputs& in, bool sum, int longest, std::uint16_t* out) {
  const int per_kv = sum ? 1 : s.group(), heads = sum ? s.group() : 1;  // choices of a kv head, heads of a choice
  const int blocks = (longest + block - 1) / block, width = block_width(s.page_size);
  const int ahead = std::max(1, 128 / s.page_size);  // pages asked for in advance: pages lie anywhere in the pool
  const std::int64_t units = static_cast<std::int64_t>(s.rows) * s.kv_heads, stride = padded(longest);
  static thread_local std::vector<Tables> tables;
  tables.resize(std::max(tables.size(), static_cast<std::size_t>(per_kv)));
  std::int64_t built = -1;
#pragma omp for schedule(dynamic, 1)
  for (std::int64_t task = 0; task < units * blocks; ++task) {
    const std::int64_t unit = task / blocks;
    const int r = static_cast<int>(unit / s.kv_heads), g = static_cast<int>(unit % s.kv_heads);
    const int begin = static_cast<int>(task % blocks) * block, end = std::min(in.length_R[r], begin + block);
    if (begin >= end) continue;
    if (built != unit)
      for (int c = 0; c < per_kv; ++c)
        tables[c].build(in.query_RHB + (unit * s.group() + c) * s.bytes, heads, s.bytes, in.corrected);
    built = unit;
    std::uint16_t* to = out + unit * per_kv * stride;
    const std::int32_t* table = in.table_RM + static_cast<std::int64_t>(r) * s.table_width;
    const std::int64_t page_bytes = static_cast<std::int64_t>(s.page_size) * s.bytes;
    for (int token = begin; token < end;) {  // W divides 1024 and the page size: no block of codes is torn
      const int offset = token % s.page_size, here = std::min(end - token, s.page_size - offset);
      auto page = [&](int at) {
        return in.codes_NGPB + (static_cast<std::int64_t>(table[at / s.page_size]) * s.kv_heads + g) * page_bytes;
      };
      if (const int later = token - offset + ahead * s.page_size; later < end) {
        const std::uint8_t* next = page(later);
        for (std::int64_t i = 0; i < page_bytes; i += 64) __builtin_prefetch(next + i);
      }
      distances(tables.data(), per_kv, page(token) + static_cast<std::int64_t>(offset) * s.bytes, width, here, to + token,
                stride);
      token += here;
    }
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

int longest_of(const std::int32_t* length, int rows) { return rows ? *std::max_element(length, length + rows) : 0; }

void select(const Shape& s, const Inputs& in, bool per_head, int budget, std::int32_t* index, std::int32_t* count) {
  const int choices = per_head ? s.heads : s.kv_heads;
  const int largest = 12 * s.bytes * (per_head ? 1 : s.group());
  require(largest < 32767, "too many query heads per kv head for summed distances");
  require(per_head || s.group() <= 42, "at most 42 query heads may share a choice");
  const int longest = longest_of(in.length_R, s.rows);
  const std::int64_t tasks = static_cast<std::int64_t>(s.rows) * choices, stride = padded(longest);
  thread_local std::vector<std::uint16_t> scratch;
  scratch.resize(static_cast<std::size_t>(tasks * stride));
  std::uint16_t* d = scratch.data();  // threads of the team must not name the thread_local themselves
#pragma omp parallel if (tasks * longest > 4096)
  {
    scan(s, in, !per_head, longest, d);
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t task = 0; task < tasks; ++task)
      count[task] = choose(d + task * stride, in.length_R[task / choices], budget, largest, index + task * budget);
  }
}

// Encodes queries [heads][size], rows `stride` floats apart, and selects.
void nearest(const Shape& s, const float* q, std::int64_t stride, float cut, Inputs in, bool per_head, int budget,
             std::int32_t* index, std::int32_t* count) {
  thread_local std::vector<std::uint8_t> scratch;
  const int vectors = s.rows * s.heads, size = 4 * s.bytes;
  scratch.resize(static_cast<std::size_t>(vectors) * s.bytes);
  std::uint8_t* query = scratch.data();  // threads of the team must not name the thread_local themselves
#pragma omp parallel for schedule(static) if (vectors > 256)
  for (int i = 0; i < vectors; ++i)
    encode_head(q + i / s.heads * stride + static_cast<std::int64_t>(i % s.heads) * size, size, cut,
                query + static_cast<std::int64_t>(i) * s.bytes, 1);
  in.query_RHB = query;
  select(s, in, per_head, budget, index, count);
}

struct HadamardSelector final : Selector {
  std::uint8_t* codes = nullptr;  // [pages][kv_heads][page_size][size / 4]
  float cut_q = 0, cut_k = 0;
  bool corrected = true;

  void append(const float* k, std::int64_t stride, const std::int64_t* slot, int rows) const override {
    hadamard::append(k, stride, cut_k, codes, slot, rows, kv_heads, size, page_size);
  }
  void choose(const float* q, std::int64_t stride, int rows, const std::int32_t* table, int width,
              const std::int32_t* length, int most, std::int32_t* index, std::int32_t* count) const override {
    const Shape s{rows, heads, kv_heads, page_size, size / 4, width};
    nearest(s, q, stride, cut_q, {nullptr, codes, table, length, corrected}, choices != kv_heads || heads == kv_heads,
            most, index, count);
  }
};

// Addresses and sizes come from the Python face, which has checked them.
nb::capsule selector(std::uintptr_t codes, float cut_q, float cut_k, int heads, int kv_heads, int size, int pages,
                     int page_size, int budget, bool per_head, bool corrected) {
  require(kv_heads > 0 && heads % kv_heads == 0, "query heads must be a multiple of kv heads");
  require(size > 0 && size % 8 == 0 && size <= hadamard::kMaxSize, "head size must be a multiple of 8, at most 1024");
  require(budget >= 1 && pages > 0 && page_size > 0, "budget, pages and page size must be positive");
  require(per_head || heads / kv_heads <= 42, "at most 42 query heads may share a choice");
  auto s = std::make_unique<HadamardSelector>();
  s->heads = heads, s->kv_heads = kv_heads, s->size = size, s->pages = pages, s->page_size = page_size;
  s->budget = budget, s->choices = per_head ? heads : kv_heads;
  s->codes = reinterpret_cast<std::uint8_t*>(codes), s->cut_q = cut_q, s->cut_k = cut_k, s->corrected = corrected;
  return wrap_selector(std::move(s));
}

template <typename A>
int dim(const A& a, int i) {
  return static_cast<int>(a.shape(static_cast<std::size_t>(i)));
}

using Codes3 = Array<const std::uint8_t, -1, -1, -1>;
using Codes4 = Array<const std::uint8_t, -1, -1, -1, -1>;
using Table = Array<const std::int32_t, -1, -1>;
using Lengths = Array<const std::int32_t, -1>;

void check(const Shape& s, int pages, const std::int32_t* table, const std::int32_t* length) {
  require(s.kv_heads > 0 && s.heads % s.kv_heads == 0, "query heads must be a multiple of kv heads");
  require(s.bytes > 0 && s.bytes <= hadamard::kMaxSize / 4 && s.bytes % 2 == 0, "head size must be a multiple of 8 up to 1024");
  for (int r = 0; r < s.rows; ++r) {
    require(length[r] >= 1 && (length[r] - 1) / s.page_size < s.table_width, "a length needs at least one token and its pages");
    const std::int32_t* page = table + static_cast<std::int64_t>(r) * s.table_width;
    for (int m = 0; m <= (length[r] - 1) / s.page_size; ++m)
      require(page[m] >= 0 && page[m] < pages, "a page id lies outside the pool");
  }
}

Shape shape_of(const Codes3& query, const Codes4& codes, const Table& table, const Lengths& length) {
  Shape s{dim(query, 0), dim(query, 1), dim(codes, 1), dim(codes, 2), dim(query, 2), dim(table, 1)};
  require(dim(codes, 3) == s.bytes, "query and key codes differ in head size");
  require(dim(table, 0) == s.rows && dim(length, 0) == s.rows, "one page-table row and one length per query row");
  check(s, dim(codes, 0), table.data(), length.data());
  return s;
}

HASTEN_KERNELS(m) {
  // Distances [rows, heads, longest rounded up to 32].
  m.def("hadamard_distance", [](Codes3 query_RHB, Codes4 codes_NGPB, Table table_RM, Lengths length_R, bool corrected,
                                Array<std::uint16_t, -1, -1, -1> out_RHL) {
    const Shape s = shape_of(query_RHB, codes_NGPB, table_RM, length_R);
    const int longest = longest_of(length_R.data(), s.rows);
    require(dim(out_RHL, 0) == s.rows && dim(out_RHL, 1) == s.heads && dim(out_RHL, 2) == padded(longest),
            "out must be [rows, heads, longest rounded up to 32]");
    const Inputs in{query_RHB.data(), codes_NGPB.data(), table_RM.data(), length_R.data(), corrected};
    nb::gil_scoped_release release;
#pragma omp parallel
    scan(s, in, false, longest, out_RHL.data());
  });

  m.def("hadamard_select", [](Codes3 query_RHB, Codes4 codes_NGPB, Table table_RM, Lengths length_R, bool per_head,
                              bool corrected, Array<std::int32_t, -1, -1, -1> index_RXK,
                              Array<std::int32_t, -1, -1> count_RX) {
    const Shape s = shape_of(query_RHB, codes_NGPB, table_RM, length_R);
    const int choices = per_head ? s.heads : s.kv_heads;
    require(dim(index_RXK, 0) == s.rows && dim(index_RXK, 1) == choices && dim(index_RXK, 2) >= 1,
            "index must be [rows, choices, budget]");
    require(dim(count_RX, 0) == s.rows && dim(count_RX, 1) == choices, "count must be [rows, choices]");
    const Inputs in{query_RHB.data(), codes_NGPB.data(), table_RM.data(), length_R.data(), corrected};
    nb::gil_scoped_release release;
    select(s, in, per_head, dim(index_RXK, 2), index_RXK.data(), count_RX.data());
  });

  // Encode and select in one call: float32 queries [rows, heads, size], int32 table [rows, table_width] and lengths;
  // index int32 [rows, choices, budget].
  m.def("hadamard_nearest", [](std::uintptr_t q_RHD, float cut, std::uintptr_t codes_NGPB, std::uintptr_t table_RM,
                               std::uintptr_t length_R, int rows, int table_width, int heads, int kv_heads, int size,
                               int pages, int page_size, int budget, bool per_head, bool corrected,
                               std::uintptr_t index_RXK, std::uintptr_t count_RX) {
    const Shape s{rows, heads, kv_heads, page_size, size / 4, table_width};
    const auto* table = reinterpret_cast<const std::int32_t*>(table_RM);
    const auto* length = reinterpret_cast<const std::int32_t*>(length_R);
    require(size % 8 == 0, "head size must be a multiple of 8");
    require(budget >= 1, "budget must be at least 1");
    check(s, pages, table, length);
    nb::gil_scoped_release release;
    nearest(s, reinterpret_cast<const float*>(q_RHD), static_cast<std::int64_t>(heads) * size, cut,
            {nullptr, reinterpret_cast<const std::uint8_t*>(codes_NGPB), table, length, corrected}, per_head, budget,
            reinterpret_cast<std::int32_t*>(index_RXK), reinterpret_cast<std::int32_t*>(count_RX));
  });

  m.def("hadamard_selector", &selector);
}

}  // namespace
}  // namespace hasten
