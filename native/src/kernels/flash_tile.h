// Register tiles of FlashAttention, forward and backward.
//
// Scores of a tile are kept transposed, s[key][lane]: the lanes of a vector are query vectors. Then maximum and sum of the
// softmax are vertical, keys and values are used where they lie (a key only gives broadcasts, a value only whole
// vectors), and just the queries are packed, once per block of rows. A strip is kStrip lanes: three vectors, so that
// 4 keys x 3 vectors, or 6 lanes x 2 vectors of a value, fill the registers of AVX2.
#pragma once

#include "attend_many.h"

namespace hasten::flash {

using attend::exp2;
using attend::tanh;
using attend::operator/;
using attend::kLn2;
using attend::kLog2e;

constexpr int W = vf::width;
constexpr int kStrip = W == 1 ? 24 : 3 * W;
constexpr int kVectors = kStrip / W;
constexpr int kKeys = 4;          // keys of a register tile
constexpr int kTall = 6;          // lanes of a register tile
constexpr int kDepth = 128;       // products that a score adds up in a row; longer sums are made of such parts
constexpr int kMostKeys = 256;    // most keys of a tile of the schedule

#if defined(__AVX512F__)
// y where low <= x < high, else `otherwise` (NaN in y stays NaN where it is seen).
inline vf seen(vf x, vf low, vf high, vf y, vf otherwise) {
  const __mmask16 in = _mm512_cmp_ps_mask(low.v, x.v, _CMP_LE_OQ) & _mm512_cmp_ps_mask(x.v, high.v, _CMP_LT_OQ);
  return {_mm512_mask_blend_ps(in, otherwise.v, y.v)};
}
inline vf zero_below(vf x, vf low, vf y) {  // 0 where x < low, else y
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, low.v, _CMP_NLT_UQ), y.v)};
}
#elif defined(__AVX2__)
inline vf seen(vf x, vf low, vf high, vf y, vf otherwise) {
  const __m256 in = _mm256_and_ps(_mm256_cmp_ps(low.v, x.v, _CMP_LE_OQ), _mm256_cmp_ps(x.v, high.v, _CMP_LT_OQ));
  return {_mm256_blendv_ps(otherwise.v, y.v, in)};
}
inline vf zero_below(vf x, vf low, vf y) { return {_mm256_andnot_ps(_mm256_cmp_ps(x.v, low.v, _CMP_LT_OQ), y.v)}; }
#else
inline vf seen(vf x, vf low, vf high, vf y, vf otherwise) { return low.v <= x.v && x.v < high.v ? y : otherwise; }
inline vf zero_below(vf x, vf low, vf y) { return {x.v < low.v ? 0.0f : y.v}; }
#endif

// 2^x for x <= 0 that is exactly 0 for -inf (and below -126).
inline vf exp2_zero(vf x) { return zero_below(x, vf::set(-126.0f), exp2(x)); }

// s[j][lane] (+)= sum over d in [begin, end) of k_j[d] x_lane[d] for kKeys keys and V vectors of lanes; x is packed
// [size][kStrip].
template <int V>
inline void scores_tile(const float* const* k, const float* x, int begin, int end, float* s, int ld) {
  const float *k0 = k[0], *k1 = k[1], *k2 = k[2], *k3 = k[3];
  vf acc[kKeys][V];
#pragma GCC unroll 4
  for (int i = 0; i < kKeys; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[i][v] = vf::zero();
  x += begin * kStrip;
  for (int d = begin; d < end; ++d, x += kStrip) {
    vf a[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) a[v] = vf::load(x + v * W);
    // One broadcast at a time: 12 sums, 3 vectors of lanes and 1 key fill the 16 registers.
    auto meet = [&](int i, float key) {
      const vf b = vf::set(key);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[i][v] = fma(b, a[v], acc[i][v]);
    };
    meet(0, k0[d]), meet(1, k1[d]), meet(2, k2[d]), meet(3, k3[d]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kKeys; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* to = s + i * ld + v * W;
      (begin == 0 ? acc[i][v] : acc[i][v] + vf::load(to)).store(to);
    }
}

// Keys [begin, end) of a tile against `vectors` vectors of lanes. Keys are taken in fours: up to three rows past `end`
// are written, and as many pointers past it must be valid.
inline void scores(const float* const* k, int begin, int end, const float* x, int size, int vectors, float* s, int ld) {
  for (int j = begin; j < end; j += kKeys)
    for (int d = 0; d < size; d += kDepth) {
      const int to = std::min(size, d + kDepth);
      int v = 0;
      for (; v + 3 <= vectors; v += 3) scores_tile<3>(k + j, x + v * W, d, to, s + j * ld + v * W, ld);
      if (vectors - v == 2) scores_tile<2>(k + j, x + v * W, d, to, s + j * ld + v * W, ld);
      if (vectors - v == 1) scores_tile<1>(k + j, x + v * W, d, to, s + j * ld + v * W, ld);
    }
}

struct Flat {  // rows of `stride` floats
  float* base;
  int stride;
  float* operator()(int row) const { return base + static_cast<std::ptrdiff_t>(row) * stride; }
};

// How a product joins what is there: y + ab, f y + ab, or f y + g ab (f and g per row).
enum class Into { Add, Scale, Mix };

struct Factors {
  const float* f = nullptr;
  const float* g = nullptr;
};

// R rows x V vectors of y = a b. Across: a is [depth][lda] and rows lie side by side; else a is [rows][lda].
template <int R, int V, bool Across, Into into, typename Rows>
inline void product_tile(const float* a, int lda, const float* const* b, int column, int depth, const Rows& y, int row,
                         Factors factors) {
  vf acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[r][v] = vf::zero();
  for (int k = 0; k < depth; ++k) {
    vf x[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) x[v] = vf::load(b[k] + column + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vf w = vf::set(Across ? a[k * lda + r] : a[r * lda + k]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[r][v] = fma(w, x[v], acc[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      // What is there joins at the end: a sum over many tiles then rounds once per tile, not once per term.
      float* to = y(row + r) + column + v * W;
      vf sum = acc[r][v];
      if constexpr (into == Into::Mix) sum = sum * vf::set(factors.g[row + r]);
      if constexpr (into == Into::Add) sum = sum + vf::load(to);
      else sum = fma(vf::load(to), vf::set(factors.f[row + r]), sum);
      sum.store(to);
    }
}

template <int V, bool Across, Into into, typename Rows>
inline void product_rows(const float* a, int lda, int rows, const float* const* b, int column, int depth,
                         const Rows& y, Factors factors) {
  const int step = Across ? 1 : lda;
  int r = 0;
  for (; r + 6 <= rows; r += 6) product_tile<6, V, Across, into>(a + r * step, lda, b, column, depth, y, r, factors);
  if (r + 4 <= rows) product_tile<4, V, Across, into>(a + r * step, lda, b, column, depth, y, r, factors), r += 4;
  if (r + 2 <= rows) product_tile<2, V, Across, into>(a + r * step, lda, b, column, depth, y, r, factors), r += 2;
  if (r < rows) product_tile<1, V, Across, into>(a + r * step, lda, b, column, depth, y, r, factors);
}

// All rows x `vectors` vectors; `y(row)` is the address of a row. A pair of columns of b stays in L1 for all rows.
template <bool Across, Into into, typename Rows>
inline void product(const float* a, int lda, int rows, const float* const* b, int depth, int vectors, const Rows& y,
                    Factors factors = {}) {
  int v = 0;
  for (; v + 2 <= vectors; v += 2) product_rows<2, Across, into>(a, lda, rows, b, v * W, depth, y, factors);
  if (v < vectors) product_rows<1, Across, into>(a, lda, rows, b, v * W, depth, y, factors);
}

// Packs up to kStrip rows of `size` floats as [size][kStrip], times `factor`; missing rows are zero.
template <typename T>
inline void pack_strip(const T* const* row, int lanes, int size, float factor, float* x) {
  int lane = 0;
#if defined(__AVX2__)
  using attend::Packed;
  const __m256 f = _mm256_set1_ps(factor);
  for (; lane + 8 <= lanes; lane += 8) {
    int d = 0;
    for (; d + 8 <= size; d += 8) {
      __m256 r[8];
      for (int i = 0; i < 8; ++i) r[i] = _mm256_mul_ps(Packed::load8(row[lane + i] + d), f);
      Packed::transpose8(r);
      for (int i = 0; i < 8; ++i) _mm256_storeu_ps(x + (d + i) * kStrip + lane, r[i]);
    }
    for (; d < size; ++d)
      for (int i = 0; i < 8; ++i) x[d * kStrip + lane + i] = widen(row[lane + i][d]) * factor;
  }
#endif
  for (; lane < kStrip; ++lane)
    for (int d = 0; d < size; ++d) x[d * kStrip + lane] = lane < lanes ? widen(row[lane][d]) * factor : 0.0f;
}

// Copies a row as floats, padded with zeros to `stride`.
template <typename T>
inline void widen_row(const T* from, int size, int stride, float* to) {
  int d = 0;
  for (; d + W <= size; d += W) vf::load(from + d).store(to + d);
  for (; d < size; ++d) to[d] = widen(from[d]);
  for (; d < stride; ++d) to[d] = 0.0f;
}

}  // namespace hasten::flash
