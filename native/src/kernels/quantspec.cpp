// Hierarchical 4+4-bit KV pages (QuantSpec, arXiv 2502.10424): packing a page, and attention over its planes.
//
// A page holds P tokens of a kv head. A number is S * U + Z with U in 0..15 (upper plane); the lower plane refines it to
// (16 U + L) * S / 16 + Z, L in -8..7. Keys share S and Z per channel of the page, values per token. Nibbles lie in blocks of 16
// lanes (8 bytes: lane i in the low half of byte i, lane 8 + i in its high half): keys [tokens / 16][D] blocks, so that a
// block's lanes are tokens, values [D / 16][P] blocks, lanes are channels. L is stored as L + 8, so that the two nibbles make
// one byte B = 16 U + L + 8, and a number is B * S / 16 + (Z - S / 2). S and Z are bfloat16, rounded outwards.
//
// Attention folds a key's S into the query and a value's S into the probability: the inner loop is a sum of
// coefficient times byte, the same for keys and values. Every query's sums run in the same order however many rows
// a call has, so a row's result does not depend on its company. Parts of a row (runs of pages, the full-precision
// tail) are joined by their log-sum-exp.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "hasten.h"
#include "simd.h"

namespace hasten {
namespace {

constexpr int kLanes = 16;        // of a block of codes
constexpr int kBlock = 8;         // its bytes
constexpr int kPartTokens = 1024; // of a part: fixed, so that results do not depend on rows or threads
constexpr int kTileRows = 16;     // query rows of a task
constexpr int kVectors = kLanes / vf::width;

struct Planes {
  const std::uint8_t *ku, *kl, *vu, *vl;
  const std::uint16_t *ks, *kz, *vs, *vz;  // bfloat16: [pages][groups][D] and [pages][groups][P]
  int pages, groups, page, size;
  int key_blocks() const { return (page + kLanes - 1) / kLanes; }
  std::size_t key_bytes() const { return static_cast<std::size_t>(key_blocks()) * size * kBlock; }
  std::size_t value_bytes() const { return static_cast<std::size_t>(page) * size / 2; }
};

// bfloat16 not above / not below x.
inline std::uint16_t bf16_down(float x) {
  std::uint32_t b;
  std::memcpy(&b, &x, 4);
  const bool inexact = b & 0xFFFFu;
  return static_cast<std::uint16_t>((b >> 16) + (inexact && (b >> 31) ? 1u : 0u));
}
inline std::uint16_t bf16_up(float x) {
  std::uint32_t b;
  std::memcpy(&b, &x, 4);
  const bool inexact = b & 0xFFFFu;
  return static_cast<std::uint16_t>((b >> 16) + (inexact && !(b >> 31) ? 1u : 0u));
}

struct Grid {
  std::uint16_t s, z;
  float step, zero;
};

// S and Z of numbers in [low, high]; NaN when they are not finite.
inline Grid grid(float low, float high) {
  Grid g{0x7FC0, 0x7FC0, NAN, NAN};
  if (!std::isfinite(high - low)) return g;
  g.z = bf16_down(low);
  g.zero = bf16_to_float(g.z);
  g.s = bf16_up((high - g.zero) / 15.0f);
  g.step = bf16_to_float(g.s);
  if (!std::isfinite(g.step)) return Grid{0x7FC0, 0x7FC0, NAN, NAN};
  return g;
}

inline void quantise(float x, const Grid& g, int& upper, int& lower) {
  upper = 0;
  lower = 8;
  if (!(g.step > 0)) return;
  const float u = std::min(std::max(std::nearbyint((x - g.zero) / g.step), 0.0f), 15.0f);
  const float rest = (x - g.zero) - u * g.step;
  const float l = std::min(std::max(std::nearbyint(rest / (g.step * 0.0625f)), -8.0f), 7.0f);
  upper = static_cast<int>(u);
  lower = static_cast<int>(l) + 8;
}

inline void put(std::uint8_t* block, int lane, int nibble) {
  std::uint8_t& byte = block[lane & 7];
  byte = static_cast<std::uint8_t>(lane < 8 ? (byte & 0xF0) | nibble : (byte & 0x0F) | (nibble << 4));
}

// One page of one kv head; `row` numbers lie between a token and the next.
void pack_head(const float* k, const float* v, std::size_t row, const Planes& p, std::size_t at) {
  auto* ku = const_cast<std::uint8_t*>(p.ku) + at * p.key_bytes();
  auto* kl = const_cast<std::uint8_t*>(p.kl) + at * p.key_bytes();
  auto* vu = const_cast<std::uint8_t*>(p.vu) + at * p.value_bytes();
  auto* vl = const_cast<std::uint8_t*>(p.vl) + at * p.value_bytes();
  auto* ks = const_cast<std::uint16_t*>(p.ks) + at * p.size;
  auto* kz = const_cast<std::uint16_t*>(p.kz) + at * p.size;
  auto* vs = const_cast<std::uint16_t*>(p.vs) + at * p.page;
  auto* vz = const_cast<std::uint16_t*>(p.vz) + at * p.page;
  std::memset(ku, 0, p.key_bytes());
  std::memset(kl, 0, p.key_bytes());
  for (int d = 0; d < p.size; ++d) {
    float low = k[d], high = k[d];
    bool finite = true;
    for (int t = 0; t < p.page; ++t) {
      const float x = k[t * row + d];
      finite = finite && std::isfinite(x);
      low = std::min(low, x);
      high = std::max(high, x);
    }
    const Grid g = grid(finite ? low : NAN, high);
    ks[d] = g.s;
    kz[d] = g.z;
    for (int t = 0; t < p.page; ++t) {
      int upper, lower;
      quantise(k[t * row + d], g, upper, lower);
      const std::size_t block = (static_cast<std::size_t>(t / kLanes) * p.size + d) * kBlock;
      put(ku + block, t % kLanes, upper);
      put(kl + block, t % kLanes, lower);
    }
  }
  for (int t = 0; t < p.page; ++t) {
    const float* x = v + t * row;
    float low = x[0], high = x[0];
    bool finite = true;
    for (int d = 0; d < p.size; ++d) {
      finite = finite && std::isfinite(x[d]);
      low = std::min(low, x[d]);
      high = std::max(high, x[d]);
    }
    const Grid g = grid(finite ? low : NAN, high);
    vs[t] = g.s;
    vz[t] = g.z;
    for (int d = 0; d < p.size; ++d) {
      int upper, lower;
      quantise(x[d], g, upper, lower);
      const std::size_t block = (static_cast<std::size_t>(d / kLanes) * p.page + t) * kBlock;
      put(vu + block, d % kLanes, upper);
      put(vl + block, d % kLanes, lower);
    }
  }
}

// The 16 numbers of a block: U, or B = 16 U + L + 8.
template <bool Full>
inline void unpack(const std::uint8_t* u, const std::uint8_t* l, vf* to) {
#if defined(__AVX2__)
  const __m128i nibble = _mm_set1_epi8(0x0F);
  const __m128i a = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(u));
  __m128i low = _mm_and_si128(a, nibble), high = _mm_and_si128(_mm_srli_epi16(a, 4), nibble);
  if constexpr (Full) {
    const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(l));
    high = _mm_or_si128(_mm_andnot_si128(nibble, a), _mm_and_si128(_mm_srli_epi16(b, 4), nibble));
    low = _mm_or_si128(_mm_slli_epi16(low, 4), _mm_and_si128(b, nibble));
  }
#if defined(__AVX512F__)
  to[0] = {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi64(low, high)))};
#else
  to[0] = {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(low))};
  to[1] = {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(high))};
#endif
#else
  for (int i = 0; i < kBlock; ++i) {
    int low = u[i] & 15, high = u[i] >> 4;
    if constexpr (Full) {
      low = 16 * low + (l[i] & 15);
      high = 16 * high + (l[i] >> 4);
    }
    to[i] = vf::set(static_cast<float>(low));
    to[i + kBlock] = vf::set(static_cast<float>(high));
  }
#endif
}

// out[q][lane] = sum over i, in order, of coef[q * stride + i] * code i's lane, for Q queries; `code(i, x)` fills x.
template <int Q, typename Code>
inline void weigh(Code code, int n, const float* coef, std::size_t stride, float* out) {
  vf sum[Q][kVectors], x[kVectors];
  for (int q = 0; q < Q; ++q)
    for (int j = 0; j < kVectors; ++j) sum[q][j] = vf::zero();
  for (int i = 0; i < n; ++i) {
    code(i, x);
    for (int q = 0; q < Q; ++q) {
      const vf c = vf::set(coef[q * stride + i]);
      for (int j = 0; j < kVectors; ++j) sum[q][j] = fma(c, x[j], sum[q][j]);
    }
  }
  for (int q = 0; q < Q; ++q)
    for (int j = 0; j < kVectors; ++j) sum[q][j].store(out + q * kLanes + j * vf::width);
}

template <typename Code>
inline void weigh_all(Code code, int n, const float* coef, std::size_t stride, int queries, float* out) {
  int q = 0;
  for (; q + 4 <= queries; q += 4) weigh<4>(code, n, coef + q * stride, stride, out + q * kLanes);
  if (queries - q == 3) weigh<3>(code, n, coef + q * stride, stride, out + q * kLanes);
  else if (queries - q == 2) weigh<2>(code, n, coef + q * stride, stride, out + q * kLanes);
  else if (queries - q == 1) weigh<1>(code, n, coef + q * stride, stride, out + q * kLanes);
}

// n blocks of codes, weighed for all queries: unpacked as they are read, or once for many queries. The sums are the same.
template <bool Full>
inline void weigh_blocks(const std::uint8_t* u, const std::uint8_t* l, int n, const float* coef, std::size_t stride,
                         int queries, float* scratch, float* out) {
  if (queries <= 4) {
    weigh_all([=](int i, vf* x) { unpack<Full>(u + i * kBlock, l + i * kBlock, x); }, n, coef, stride, queries, out);
    return;
  }
  for (int i = 0; i < n; ++i) {
    vf x[kVectors];
    unpack<Full>(u + i * kBlock, l + i * kBlock, x);
    for (int j = 0; j < kVectors; ++j) x[j].store(scratch + i * kLanes + j * vf::width);
  }
  weigh_all(
      [=](int i, vf* x) {
        for (int j = 0; j < kVectors; ++j) x[j] = vf::load(scratch + i * kLanes + j * vf::width);
      },
      n, coef, stride, queries, out);
}

// e^x of n numbers in place (less `top`); their sum.
inline float exponentials(float* x, int n, float top) {
  int i = 0;
  vf total = vf::zero();
  for (; i + vf::width <= n; i += vf::width) {
    const vf e = exp(vf::load(x + i) - vf::set(top));
    e.store(x + i);
    total = total + e;
  }
  float sum = total.sum();
  for (; i < n; ++i) {
    x[i] = std::exp(x[i] - top);
    sum += x[i];
  }
  return sum;
}

// The largest of `top` and n numbers; NaN if one of them is not finite.
inline float largest(const float* x, int n, float top) {
  vf high = vf::set(top), odd = vf::zero();
  int i = 0;
  for (; i + vf::width <= n; i += vf::width) {
    const vf v = vf::load(x + i);
    high = max(v, high);
    odd = odd + (v - v);
  }
  float out = high.max(), rest = odd.sum();
  for (; i < n; ++i) {
    out = std::max(out, x[i]);
    rest += x[i] - x[i];
  }
  return out + rest;
}

// Folds scales into n factors, x -> x * S (/ 16); the sum of x * zero point.
template <bool Full>
inline float fold(float* x, const std::uint16_t* scale, const std::uint16_t* zero, int n) {
  const vf part = vf::set(Full ? 0.0625f : 1.0f), shift = vf::set(Full ? -0.5f : 0.0f);
  vf sum = vf::zero();
  int i = 0;
  for (; i + vf::width <= n; i += vf::width) {
    const vf v = vf::load(x + i), S = vf::load(scale + i);
    sum = fma(v, fma(S, shift, vf::load(zero + i)), sum);
    (v * S * part).store(x + i);
  }
  float out = sum.sum();
  for (; i < n; ++i) {
    const float S = bf16_to_float(scale[i]);
    out += x[i] * (bf16_to_float(zero[i]) + (Full ? -0.5f : 0.0f) * S);
    x[i] = x[i] * S * (Full ? 0.0625f : 1.0f);
  }
  return out;
}

struct Work {
  const float* q;  // [T][heads][size]
  const Planes& planes;
  int heads, repeat, parts;
  float scale, softcap;
  float *part_out, *part_lse;  // [T][heads][parts][size], [T][heads][parts]
};

struct Task {
  int head, row, rows, part;             // kv head; rows of the step; which part of each
  std::int64_t position;                 // of the first row
  const std::int32_t* bound;             // [rows]: pages that each row reads from the planes
  const std::int32_t* table;             // page table of the sequence
  int first, last;                       // pages, for a part of the planes
  const void *k, *v;                     // full-precision tail: token t at (t - base) % capacity
  std::int64_t base, capacity;
  bool tail;
};

struct Scratch {
  std::vector<float> codes, coef, base, score, sums, out, top, total;  // base: what the zero points add, per query
};

inline float capped(float x, float cap) { return cap > 0 ? cap * std::tanh(x / cap) : x; }

// A run of pages through the planes.
template <bool Full>
void run_planes(const Work& w, const Task& t) {
  static thread_local Scratch s;
  const Planes& p = w.planes;
  const int D = p.size, P = p.page, padded = p.key_blocks() * kLanes;
  const int queries = t.rows * w.repeat;
  s.codes.resize(static_cast<std::size_t>(std::max(D, P)) * kLanes);
  s.coef.resize(static_cast<std::size_t>(queries) * D);
  s.base.resize(queries);
  s.score.resize(static_cast<std::size_t>(queries) * padded);
  s.sums.resize(static_cast<std::size_t>(queries) * kLanes);
  s.out.assign(static_cast<std::size_t>(queries) * D, 0.0f);
  s.top.assign(queries, -INFINITY);
  s.total.assign(queries, 0.0f);
  for (int page = t.first; page < t.last; ++page) {
    int begin = 0;  // later rows read at least as many pages
    while (begin < t.rows && t.bound[begin] <= page) ++begin;
    if (begin == t.rows) break;
    const int q0 = begin * w.repeat, active = queries - q0;
    const std::size_t at = static_cast<std::size_t>(t.table[page]) * p.groups + t.head;
    const std::uint16_t *ks = p.ks + at * D, *kz = p.kz + at * D, *vs = p.vs + at * P, *vz = p.vz + at * P;
    for (int i = q0; i < queries; ++i) {
      const int row = t.row + i / w.repeat, head = t.head * w.repeat + i % w.repeat;
      const float* q = w.q + (static_cast<std::size_t>(row) * w.heads + head) * D;
      float* x = &s.coef[static_cast<std::size_t>(i) * D];
      for (int d = 0; d < D; ++d) x[d] = q[d] * w.scale;
      s.base[i] = fold<Full>(x, ks, kz, D);
    }
    for (int b = 0; b < p.key_blocks(); ++b) {
      const std::size_t from = at * p.key_bytes() + static_cast<std::size_t>(b) * D * kBlock;
      weigh_blocks<Full>(p.ku + from, p.kl + from, D, &s.coef[static_cast<std::size_t>(q0) * D], D, active,
                         s.codes.data(), s.sums.data());
      for (int i = 0; i < active; ++i) {
        float* to = &s.score[static_cast<std::size_t>(q0 + i) * padded + b * kLanes];
        const vf zero = vf::set(s.base[q0 + i]);
        for (int j = 0; j < kLanes; j += vf::width) (vf::load(&s.sums[i * kLanes + j]) + zero).store(to + j);
        if (w.softcap > 0)
          for (int j = 0; j < kLanes; ++j) to[j] = capped(to[j], w.softcap);
      }
    }
    for (int i = q0; i < queries; ++i) {
      float* x = &s.score[static_cast<std::size_t>(i) * padded];
      const float top = largest(x, P, s.top[i]);
      const float fade = s.top[i] == -INFINITY ? 0.0f : std::exp(s.top[i] - top);
      s.total[i] = s.total[i] * fade + exponentials(x, P, top);
      s.top[i] = top;
      s.base[i] = fold<Full>(x, vs, vz, P);
      float* out = &s.out[static_cast<std::size_t>(i) * D];
      for (int d = 0; d < D; ++d) out[d] *= fade;
    }
    for (int c = 0; c < D / kLanes; ++c) {
      const std::size_t from = at * p.value_bytes() + static_cast<std::size_t>(c) * P * kBlock;
      weigh_blocks<Full>(p.vu + from, p.vl + from, P, &s.score[static_cast<std::size_t>(q0) * padded], padded, active,
                         s.codes.data(), s.sums.data());
      for (int i = 0; i < active; ++i) {
        float* out = &s.out[static_cast<std::size_t>(q0 + i) * D + c * kLanes];
        const vf zero = vf::set(s.base[q0 + i]);
        for (int j = 0; j < kLanes; j += vf::width)
          (vf::load(out + j) + (vf::load(&s.sums[i * kLanes + j]) + zero)).store(out + j);
      }
    }
  }
  for (int i = 0; i < queries; ++i) {
    const int row = t.row + i / w.repeat, head = t.head * w.repeat + i % w.repeat;
    const std::size_t to = (static_cast<std::size_t>(row) * w.heads + head) * w.parts + t.part;
    const bool empty = s.top[i] == -INFINITY;
    w.part_lse[to] = empty ? -INFINITY : s.top[i] + std::log(s.total[i]);
    for (int d = 0; d < D; ++d)
      w.part_out[to * D + d] = empty ? 0.0f : s.out[static_cast<std::size_t>(i) * D + d] / s.total[i];
  }
}

// The full-precision tail of each row: from the first token that it does not read from the planes to itself.
template <typename KV>
void run_tail(const Work& w, const Task& t) {
  static thread_local Scratch s;
  const Planes& p = w.planes;
  const int D = p.size;
  const std::size_t row_size = static_cast<std::size_t>(p.groups) * D;
  const KV *keys = static_cast<const KV*>(t.k) + static_cast<std::size_t>(t.head) * D;
  const KV *values = static_cast<const KV*>(t.v) + static_cast<std::size_t>(t.head) * D;
  for (int r = 0; r < t.rows; ++r) {
    const std::int64_t low = static_cast<std::int64_t>(t.bound[r]) * p.page;
    const int n = static_cast<int>(t.position + r + 1 - low);
    s.score.resize(static_cast<std::size_t>(w.repeat) * n);
    const float* q = w.q + (static_cast<std::size_t>(t.row + r) * w.heads + t.head * w.repeat) * D;
    std::int64_t slot = (low - t.base) % t.capacity;
    const std::int64_t begin = slot;
    for (int j = 0; j < n; ++j) {
      const KV* k = keys + static_cast<std::size_t>(slot) * row_size;
      for (int i = 0; i < w.repeat; ++i) {
        vf sum = vf::zero();
        for (int d = 0; d < D; d += vf::width) sum = fma(vf::load(q + i * D + d), vf::load(k + d), sum);
        s.score[static_cast<std::size_t>(i) * n + j] = capped(sum.sum() * w.scale, w.softcap);
      }
      if (++slot == t.capacity) slot = 0;
    }
    for (int i = 0; i < w.repeat; ++i) {
      const std::size_t to = (static_cast<std::size_t>(t.row + r) * w.heads + t.head * w.repeat + i) * w.parts + t.part;
      float* x = &s.score[static_cast<std::size_t>(i) * n];
      const float top = largest(x, n, -INFINITY);
      const float total = exponentials(x, n, top);
      w.part_lse[to] = top + std::log(total);
      float* out = w.part_out + to * D;
      const vf share = vf::set(1.0f / total);
      for (int d = 0; d < D; d += kLanes) {
        vf sum[kVectors];
        for (vf& v : sum) v = vf::zero();
        slot = begin;
        for (int j = 0; j < n; ++j) {
          const KV* v = values + static_cast<std::size_t>(slot) * row_size + d;
          for (int m = 0; m < kVectors; ++m) sum[m] = fma(vf::set(x[j]), vf::load(v + m * vf::width), sum[m]);
          if (++slot == t.capacity) slot = 0;
        }
        for (int m = 0; m < kVectors; ++m) (sum[m] * share).store(out + d + m * vf::width);
      }
    }
  }
}

// o = sum e^(l_j - m) o_j / sum e^(l_j - m).
void join(const float* out, const float* lse, int parts, int size, float* to, float* to_lse) {
  float top = -INFINITY;
  for (int j = 0; j < parts; ++j) top = lse[j] > top || std::isnan(lse[j]) ? lse[j] : top;
  std::fill(to, to + size, 0.0f);
  *to_lse = top;
  if (top == -INFINITY) return;
  float total = 0;
  for (int j = 0; j < parts; ++j) total += lse[j] == -INFINITY ? 0.0f : std::exp(lse[j] - top);
  for (int j = 0; j < parts; ++j) {
    if (lse[j] == -INFINITY) continue;
    const float weight = std::exp(lse[j] - top) / total;
    for (int d = 0; d < size; ++d) to[d] += weight * out[static_cast<std::size_t>(j) * size + d];
  }
  *to_lse = top + std::log(total);
}

Planes planes_of(const nb::tuple& address, int pages, int groups, int page, int size) {
  require(nb::len(address) == 8, "the planes are eight tensors");
  auto at = [&](int i) { return reinterpret_cast<const void*>(nb::cast<std::uintptr_t>(address[i])); };
  auto bytes = [&](int i) { return static_cast<const std::uint8_t*>(at(i)); };
  auto halves = [&](int i) { return static_cast<const std::uint16_t*>(at(i)); };
  return {bytes(0), bytes(1), bytes(4), bytes(5), halves(2), halves(3), halves(6), halves(7), pages, groups, page, size};
}

// k, v: float32 [n][page][groups][size], what becomes of pages `ids`.
void quantspec_pack(std::uintptr_t k, std::uintptr_t v, Array<const std::int64_t, -1> ids, nb::tuple address, int pages,
                    int groups, int page, int size) {
  const Planes p = planes_of(address, pages, groups, page, size);
  require(size % kLanes == 0, "the head size must be a multiple of 16");
  const int n = static_cast<int>(ids.shape(0));
  for (int i = 0; i < n; ++i) require(ids.data()[i] >= 0 && ids.data()[i] < pages, "page_n names a page that is not there");
  const std::size_t row = static_cast<std::size_t>(groups) * size;
  nb::gil_scoped_release release;
#pragma omp parallel for schedule(static) if (n * groups > 1)
  for (int i = 0; i < n * groups; ++i) {
    const std::size_t from = static_cast<std::size_t>(i / groups) * page * row + static_cast<std::size_t>(i % groups) * size;
    pack_head(reinterpret_cast<const float*>(k) + from, reinterpret_cast<const float*>(v) + from, row, p,
              static_cast<std::size_t>(ids.data()[i / groups]) * groups + i % groups);
  }
}

// tail: per sequence the addresses of its full-precision keys and values, the token at index 0, and the ring's capacity.
void quantspec_attend(std::uintptr_t q, std::uintptr_t out, std::uintptr_t lse, nb::tuple address,
                      Array<const std::int32_t, -1> query_start, Array<const std::int64_t, -1> position,
                      Array<const std::int32_t, -1> bound, Array<const std::int32_t, -1, -1> table,
                      Array<const std::int64_t, -1, 4> tail, int pages, int groups, int page, int size, int heads,
                      bool full, bool half, float scale, float softcap) {
  const Planes p = planes_of(address, pages, groups, page, size);
  require(size % kLanes == 0, "the head size must be a multiple of 16");
  require(groups > 0 && heads % groups == 0, "query heads must be a multiple of kv heads");
  const int sequences = static_cast<int>(position.shape(0));
  require(static_cast<int>(query_start.shape(0)) == sequences + 1 && static_cast<int>(table.shape(0)) == sequences &&
              static_cast<int>(tail.shape(0)) == sequences,
          "query_start_S1, position_S, page_table_SM and tail_S4 differ in sequences");
  const std::int32_t* start = query_start.data();
  const int rows = start[sequences], width = static_cast<int>(table.shape(1));
  require(start[0] == 0 && static_cast<int>(bound.shape(0)) == rows, "bound_T must have a number for every row");
  int most = 0;
  for (int s = 0; s < sequences; ++s) {
    require(start[s] <= start[s + 1], "query_start_S1 must not fall");
    for (int r = start[s]; r < start[s + 1]; ++r) {
      const std::int32_t b = bound.data()[r];
      const std::int64_t low = static_cast<std::int64_t>(b) * page, row = position.data()[s] + r - start[s];
      require(b >= 0 && b <= width && low <= row && (r == start[s] || bound.data()[r - 1] <= b),
              "bound_T must rise within a sequence, up to pages before the row");
      const std::int64_t *x = tail.data() + 4 * s, capacity = x[3];
      require(low >= x[2] && row + 1 - low <= capacity, "the full-precision tail does not reach back far enough");
      most = std::max(most, b);
    }
    if (start[s] < start[s + 1])
      for (int j = 0; j < bound.data()[start[s + 1] - 1]; ++j) {
        const std::int32_t id = table.data()[static_cast<std::size_t>(s) * width + j];
        require(id >= 0 && id < pages, "page_table_SM names a page that is not there");
      }
  }
  nb::gil_scoped_release release;
  const int run = std::max(1, kPartTokens / page);
  const int plane_parts = (most + run - 1) / run, parts = plane_parts + 1;
  static thread_local std::vector<float> part_out, part_lse;
  static thread_local std::vector<Task> tasks;
  const std::size_t lines = static_cast<std::size_t>(rows) * heads;
  part_out.resize(lines * parts * size);
  part_lse.assign(lines * parts, -INFINITY);
  tasks.clear();
  for (int s = 0; s < sequences; ++s)
    for (int r = start[s]; r < start[s + 1]; r += kTileRows) {
      const int count = std::min(kTileRows, start[s + 1] - r);
      const std::int64_t* x = tail.data() + 4 * s;
      Task t{0, r, count, 0, position.data()[s] + r - start[s], bound.data() + r,
             table.data() + static_cast<std::size_t>(s) * width, 0, 0, reinterpret_cast<const void*>(x[0]),
             reinterpret_cast<const void*>(x[1]), x[2], x[3], false};
      const int pages_read = bound.data()[r + count - 1];
      for (t.head = 0; t.head < groups; ++t.head) {
        t.tail = false;
        for (t.part = 0; t.part * run < pages_read; ++t.part) {
          t.first = t.part * run;
          t.last = std::min(pages_read, t.first + run);
          tasks.push_back(t);
        }
        t.tail = true;
        t.part = plane_parts;
        tasks.push_back(t);
      }
    }
  const Work w{reinterpret_cast<const float*>(q), p, heads, heads / groups, parts, scale, softcap, part_out.data(), part_lse.data()};
  const Task* list = tasks.data();
  const int count = static_cast<int>(tasks.size());
  float *to = reinterpret_cast<float*>(out), *to_lse = reinterpret_cast<float*>(lse);
#pragma omp parallel if (count > 1)
  {
#pragma omp for schedule(dynamic, 1)
    for (int i = 0; i < count; ++i) {
      if (list[i].tail) {
        if (half) run_tail<std::uint16_t>(w, list[i]);
        else run_tail<float>(w, list[i]);
      } else if (full) run_planes<true>(w, list[i]);
      else run_planes<false>(w, list[i]);
    }
#pragma omp for schedule(static)
    for (std::int64_t i = 0; i < static_cast<std::int64_t>(lines); ++i)
      join(w.part_out + i * parts * size, w.part_lse + i * parts, parts, size, to + i * size, to_lse + i);
  }
}

HASTEN_KERNELS(m) {
  m.def("quantspec_pack", &quantspec_pack);
  m.def("quantspec_attend", &quantspec_attend);
}

}  // namespace
}  // namespace hasten
