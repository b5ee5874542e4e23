// The tile loops of exact attention, shared by attend_pieces and attend_tokens.
//
// A tile is up to kTile tokens, given as one pointer per token to its key and its value, so that pages, runs and
// gathered tokens are the same to the arithmetic. Two ways through a tile:
//   few rows   (decode): keys and values are used where they lie, each loaded once for up to 3 query vectors
//              (3 x 4 accumulators, 3 queries and a key fill the 16 registers of AVX2);
//   many rows  (prefill, shared prefix): keys are transposed and values copied to scratch once per block of rows,
//              then register-tiled products run at near GEMM rate.
// Scores are kept in base 2 (query prescaled by scale * log2 e); the running maximum m and sum l of the online
// softmax (Milakov and Gimelshein 2018) are per query vector; the output stays unnormalised until the end.
#pragma once

#include <algorithm>
#include <cfloat>
#include <vector>

#include "pages.h"

namespace hasten::attend {

constexpr int kTile = 64;       // tokens per tile; a multiple of every vf::width
constexpr int kGroup = 6;       // query vectors per register tile of the many-row path
constexpr int kFew = 8;         // up to this many query vectors go the few-row way
constexpr int kBlock = 96;      // query vectors per task of the many-row path
constexpr int kStrip = 2 * vf::width;
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
constexpr float kHidden = -FLT_MAX;  // score of a token that a row does not see

static_assert(kTile % kStrip == 0);

#if defined(__AVX512F__)
inline vf operator/(vf a, vf b) { return {_mm512_div_ps(a.v, b.v)}; }
#elif defined(__AVX2__)
inline vf operator/(vf a, vf b) { return {_mm256_div_ps(a.v, b.v)}; }
#else
inline vf operator/(vf a, vf b) { return {a.v / b.v}; }
#endif

// 2^x for x <= 0, to about 1 ulp; below -126 the result is 2^-126. NaN stays NaN. Degree-6 minimax polynomial.
inline vf exp2(vf x) {
  x = max(vf::set(-126.0f), x);
  vf n = round(x);
  vf r = x - n;
  vf p = vf::set(1.5345811492e-4f);
  p = fma(p, r, vf::set(1.3399931215e-3f));
  p = fma(p, r, vf::set(9.6184889590e-3f));
  p = fma(p, r, vf::set(5.5503287770e-2f));
  p = fma(p, r, vf::set(2.4022646891e-1f));
  p = fma(p, r, vf::set(6.9314720574e-1f));
  p = fma(p, r, vf::set(1.0f));
  return p * pow2i(n);
}

// tanh to 3e-7: odd rational minimax approximation, saturated beyond 7.9.
inline vf tanh(vf x) {
  x = min(vf::set(7.90531110763549805f), max(vf::set(-7.90531110763549805f), x));
  vf z = x * x;
  vf p = vf::set(-2.76076847742355e-16f);
  p = fma(p, z, vf::set(2.00018790482477e-13f));
  p = fma(p, z, vf::set(-8.60467152213735e-11f));
  p = fma(p, z, vf::set(5.12229709037114e-08f));
  p = fma(p, z, vf::set(1.48572235717979e-05f));
  p = fma(p, z, vf::set(6.37261928875436e-04f));
  p = fma(p, z, vf::set(4.89352455891786e-03f));
  vf q = vf::set(1.19825839466702e-06f);
  q = fma(q, z, vf::set(1.18534705686654e-04f));
  q = fma(q, z, vf::set(2.26843463243900e-03f));
  q = fma(q, z, vf::set(4.89352518554385e-03f));
  return x * p / q;
}

// Folds the tokens' scales into their scores or weights: rows of kTile floats.
template <int Q, typename KV>
inline void fold(const KV* const* token, int low, int high, int size, float* score) {
  if constexpr (kTail<KV> > 0)
    for (int t = low; t < high; ++t) {
      const float scale = scale_of(token[t], size);
      for (int i = 0; i < Q; ++i) score[i * kTile + t] *= scale;
    }
}

template <typename KV>
struct Tokens {
  const KV* k[kTile];
  const KV* v[kTile];

  // Repeats the last of `count` tokens, so that every address may be prefetched.
  void fill(int count) {
    std::fill(k + count, k + kTile, k[count - 1]);
    std::fill(v + count, v + kTile, v[count - 1]);
  }
};

struct Span {  // tokens of a tile that a row sees: [low, high)
  int low, high;
};

// Sums of four accumulators.
inline void reduce4(vf a, vf b, vf c, vf d, float* out) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  auto half = [](__m512 x) { return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)); };
  __m256 a8 = half(a.v), b8 = half(b.v), c8 = half(c.v), d8 = half(d.v);
#else
  __m256 a8 = a.v, b8 = b.v, c8 = c.v, d8 = d.v;
#endif
  __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(a8, b8), _mm256_hadd_ps(c8, d8));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
#else
  out[0] = a.sum(), out[1] = b.sum(), out[2] = c.sum(), out[3] = d.sum();
#endif
}

template <typename KV>
inline void prefetch_token(const KV* p, int bytes) {
  const char* at = reinterpret_cast<const char*>(p);
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(at + i);
}

// Vectors of a key or value in one cache line; the next tile is asked for line by line as this one is used, which keeps
// the memory busy all the time (asked for in bursts, it waits while the arithmetic runs, and the other way round).
template <typename KV>
constexpr int kLine = std::max(1, 64 / (vf::width * static_cast<int>(sizeof(KV))));

// score[i][t] = q_i . k_t for Q query vectors (rows of `stride` floats) and tokens [low, high).
template <int Q, bool Ahead, typename KV>
void few_scores(const float* q, int stride, const Tokens<KV>& tile, int low, int high, int nv, float* score,
                const Tokens<KV>& next) {
  constexpr int W = vf::width;
  constexpr int T = Q == 1 ? 8 : 4;
  int t = low;
  for (; t + T <= high; t += T) {
    vf acc[Q][T];
#pragma GCC unroll 8
    for (int i = 0; i < Q; ++i)
#pragma GCC unroll 8
      for (int u = 0; u < T; ++u) acc[i][u] = vf::zero();
    for (int c = 0; c < nv; ++c) {
      if constexpr (Ahead) {
        if (c % kLine<KV> == 0) {
#pragma GCC unroll 8
          for (int u = 0; u < T; ++u) __builtin_prefetch(next.k[t + u] + c * W);
        }
      }
      vf x[Q];
#pragma GCC unroll 8
      for (int i = 0; i < Q; ++i) x[i] = vf::load(q + i * stride + c * W);
#pragma GCC unroll 8
      for (int u = 0; u < T; ++u) {
        vf y = load_stored(tile.k[t + u] + c * W);
#pragma GCC unroll 8
        for (int i = 0; i < Q; ++i) acc[i][u] = fma(x[i], y, acc[i][u]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < Q; ++i)
#pragma GCC unroll 8
      for (int u = 0; u < T; u += 4)
        reduce4(acc[i][u], acc[i][u + 1], acc[i][u + 2], acc[i][u + 3], score + i * kTile + t + u);
  }
  for (; t < high; ++t) {
    vf acc[Q];
    for (int i = 0; i < Q; ++i) acc[i] = vf::zero();
    for (int c = 0; c < nv; ++c) {
      vf y = load_stored(tile.k[t] + c * W);
      for (int i = 0; i < Q; ++i) acc[i] = fma(vf::load(q + i * stride + c * W), y, acc[i]);
    }
    for (int i = 0; i < Q; ++i) score[i * kTile + t] = acc[i].sum();
  }
}

// o_i += sum over tokens [low, high) of p_it * v_t, for Q query vectors and V vectors of the head starting at column c.
template <int Q, int V, bool Ahead, typename KV>
inline void few_values(const float* p, const Tokens<KV>& tile, int low, int high, float* o, int stride, int c,
                       const Tokens<KV>& next) {
  constexpr int W = vf::width;
  vf acc[Q][V];
#pragma GCC unroll 8
  for (int i = 0; i < Q; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) acc[i][j] = vf::load(o + i * stride + (c + j) * W);
  for (int t = low; t < high; ++t) {
    const KV* v = tile.v[t] + c * W;
    if constexpr (Ahead) {
#pragma GCC unroll 8
      for (int j = 0; j < V; j += kLine<KV>) __builtin_prefetch(next.v[t] + (c + j) * W);
    }
    vf x[Q];  // weights, not values, stay in registers: 3 x 4 accumulators, 3 weights and 1 value fill all 16
#pragma GCC unroll 8
    for (int i = 0; i < Q; ++i) x[i] = vf::set(p[i * kTile + t]);
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) {
      const vf y = load_stored(v + j * W);
#pragma GCC unroll 8
      for (int i = 0; i < Q; ++i) acc[i][j] = fma(x[i], y, acc[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Q; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) acc[i][j].store(o + i * stride + (c + j) * W);
}

template <int Q, bool Ahead, typename KV>
void few_values_all(const float* p, const Tokens<KV>& tile, int low, int high, float* o, int stride, int nv,
                    const Tokens<KV>& next) {
  constexpr int V = Q == 1 ? 8 : 4;
  int c = 0;
  for (; c + V <= nv; c += V) few_values<Q, V, Ahead>(p, tile, low, high, o, stride, c, next);
  if constexpr (V > 4)
    for (; c + 4 <= nv; c += 4) few_values<Q, 4, Ahead>(p, tile, low, high, o, stride, c, next);
  for (; c + 2 <= nv; c += 2) few_values<Q, 2, Ahead>(p, tile, low, high, o, stride, c, next);
  for (; c < nv; ++c) few_values<Q, 1, Ahead>(p, tile, low, high, o, stride, c, next);
}

// Turns scores of tokens [low, high) of a tile into weights, updates the row's m and l, and returns the factor for what
// was accumulated before. Only `span` is visible; the rest becomes 0. The buffer holds whole vectors around [low, high).
inline float softmax_row(float* s, int low, int high, Span span, float cap, float& m, float& l) {
  constexpr int W = vf::width;
  const int from = low - low % W, to = (high + W - 1) / W * W;
  span.low = std::max(span.low, low);
  span.high = std::min(span.high, high);
  if (span.low >= span.high) {
    std::fill(s + low, s + high, 0.0f);
    return 1.0f;
  }
  if (cap > 0) {
    const vf c = vf::set(cap);
    for (int t = from; t < to; t += W) (c * tanh(vf::load(s + t))).store(s + t);
  }
  std::fill(s + from, s + span.low, kHidden);
  std::fill(s + span.high, s + to, kHidden);
  vf top = vf::set(m);
  for (int t = from; t < to; t += W) top = max(top, vf::load(s + t));
  const float peak = top.max();
  const vf peaks = vf::set(peak);
  vf total = vf::zero();
  for (int t = from; t < to; t += W) {
    vf e = exp2(vf::load(s + t) - peaks);
    e.store(s + t);
    total = total + e;
  }
  std::fill(s + from, s + span.low, 0.0f);
  std::fill(s + span.high, s + to, 0.0f);
  const float factor = l == 0.0f ? 0.0f : std::exp2(m - peak);
  l = l * factor + total.sum();
  m = peak;
  return factor;
}

// How scores become weights: the policy of plain softmax attention. Query vectors are multiplied by `query` beforehand, and
// with soft-capping (`cap` > 0) the product then becomes cap * tanh(product). Other policies: attend_variant.h.
struct Logits {
  static constexpr bool copies = false;  // whether keys or values are transformed, and so copied, as they are read
  float query;
  float cap;
  Logits(float scale, float softcap)
      : query(softcap > 0 ? scale / softcap : scale * kLog2e), cap(softcap > 0 ? softcap * kLog2e : 0.0f) {}

  // Scores of tokens [low, high) of a tile become weights of query vector `row`; returns the factor for what was summed
  // before.
  float weights(float* s, int low, int high, Span span, int /*row*/, float& m, float& l) const {
    return softmax_row(s, low, high, span, cap, m, l);
  }
};

inline void scale_row(float* o, int size, float factor) {
  const vf f = vf::set(factor);
  for (int c = 0; c < size; c += vf::width) (vf::load(o + c) * f).store(o + c);
}

// Running state of the query vectors of one task. Rows are padded to `stride` floats with zeros.
struct State {
  std::vector<float> q, o, m, l;
  int stride = 0;
  int count = 0;

  void begin(int rows, int size) {
    count = rows;
    stride = (size + vf::width - 1) / vf::width * vf::width;
    const std::size_t padded = static_cast<std::size_t>((rows + kGroup - 1) / kGroup * kGroup);
    q.assign(padded * stride, 0.0f);
    o.assign(padded * stride, 0.0f);
    m.assign(padded, -INFINITY);
    l.assign(padded, 0.0f);
  }

  void load(int row, const float* from, int size, float factor) {
    float* to = q.data() + static_cast<std::size_t>(row) * stride;
    for (int d = 0; d < size; ++d) to[d] = from[d] * factor;
  }

  // The normalised output of a row, and its log-sum-exp (natural logarithm).
  float finish(int row, float* out, int size) const {
    const float* from = o.data() + static_cast<std::size_t>(row) * stride;
    if (l[row] == 0.0f) {
      std::fill(out, out + size, 0.0f);
      return -INFINITY;
    }
    const float inverse = 1.0f / l[row];
    for (int d = 0; d < size; ++d) out[d] = from[d] * inverse;
    return (m[row] + std::log2(l[row])) * kLn2;
  }
};

template <int Q, bool Ahead, typename KV, typename Policy>
void few_rows(State& st, int row, const Tokens<KV>& tile, const Span* span, const Policy& policy,
              const Tokens<KV>& next) {
  alignas(64) float score[Q * kTile];
  int low = kTile, high = 0;
  for (int i = 0; i < Q; ++i) {
    if (span[row + i].low >= span[row + i].high) continue;
    low = std::min(low, span[row + i].low);
    high = std::max(high, span[row + i].high);
  }
  if (low >= high) return;
  const int nv = st.stride / vf::width;
  float* o = st.o.data() + static_cast<std::size_t>(row) * st.stride;
  const float* q = st.q.data() + static_cast<std::size_t>(row) * st.stride;
  few_scores<Q, Ahead>(q, st.stride, tile, low, high, nv, score, next);
  fold<Q>(tile.k, low, high, st.stride, score);
  for (int i = 0; i < Q; ++i) {
    const float factor = policy.weights(score + i * kTile, low, high, span[row + i], row + i, st.m[row + i], st.l[row + i]);
    if (factor != 1.0f) scale_row(o + i * st.stride, st.stride, factor);
  }
  fold<Q>(tile.v, low, high, st.stride, score);
  few_values_all<Q, Ahead>(score, tile, low, high, o, st.stride, nv, next);
}

// One tile for all rows of the state, keys and values where they lie (the head size is a multiple of vf::width). The
// first rows ask for the tile `next` (null: there is none; all its kTile addresses must be set).
template <typename KV, typename Policy>
void few_tile(State& st, const Tokens<KV>& tile, const Span* span, const Policy& policy, const Tokens<KV>* next) {
  auto rows = [&]<bool Ahead>(int row, int left) {
    const Tokens<KV>& after = Ahead ? *next : tile;
    if (left == 1) return few_rows<1, Ahead>(st, row, tile, span, policy, after), 1;
    if (left == 2 || left == 4) return few_rows<2, Ahead>(st, row, tile, span, policy, after), 2;
    return few_rows<3, Ahead>(st, row, tile, span, policy, after), 3;
  };
  int row = next == nullptr ? 0 : rows.template operator()<true>(0, st.count);
  while (row < st.count) row += rows.template operator()<false>(row, st.count - row);
}

// A key or value as floats.
template <typename KV>
inline void copy_token(const KV* from, int size, float* to) {
  const float scale = scale_of(from, size);
  int d = 0;
  for (; d + vf::width <= size; d += vf::width) {
    if constexpr (kTail<KV> > 0) (load_stored(from + d) * vf::set(scale)).store(to + d);
    else load_stored(from + d).store(to + d);
  }
  for (; d < size; ++d) to[d] = widen(from[d]) * scale;
}

// A tile copied to float scratch with rows padded to whole vectors: for head sizes that are not a multiple of vf::width, and
// for keys and values that are transformed as they are read.
struct Padded {
  std::vector<float> k, v;
  int filled = 0;
  Tokens<float> tokens;

  template <typename KV>
  void copy(const Tokens<KV>& tile, int count, int size, int stride) {
    if (size != filled) {  // so that the padding is zero
      k.assign(static_cast<std::size_t>(kTile) * stride, 0.0f);
      v.assign(static_cast<std::size_t>(kTile) * stride, 0.0f);
      filled = size;
    }
    for (int t = 0; t < count; ++t) {
      float* kt = k.data() + static_cast<std::size_t>(t) * stride;
      float* vt = v.data() + static_cast<std::size_t>(t) * stride;
      copy_token(tile.k[t], size, kt);
      copy_token(tile.v[t], size, vt);
      tokens.k[t] = kt;
      tokens.v[t] = vt;
    }
  }
};

}  // namespace hasten::attend
