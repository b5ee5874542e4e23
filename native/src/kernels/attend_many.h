// The many-row way through a tile (see attend.h): packed operands and register-tiled products; and what a task needs to go
// either way.
#pragma once

#include "attend.h"

namespace hasten::attend {

// Scratch of one tile for the many-row path: keys transposed in strips [strip][d][kStrip], values [token][stride].
struct Packed {
  std::vector<float> k, v;
  int stride = 0;

  template <typename KV>
  void pack(const Tokens<KV>& tile, int tokens, int size, int padded) {
    pack_keys(tile, tokens, size);
    pack_values(tile, tokens, size, padded);
  }

  template <typename KV>
  void pack_values(const Tokens<KV>& tile, int tokens, int size, int padded) {
    stride = padded;
    v.resize(static_cast<std::size_t>(kTile) * padded);
    for (int t = 0; t < tokens; ++t) {
      float* to = v.data() + static_cast<std::size_t>(t) * padded;
      copy_token(tile.v[t], size, to);
      for (int d = size; d < padded; ++d) to[d] = 0.0f;
    }
  }

  template <typename KV>
  void pack_keys(const Tokens<KV>& tile, int tokens, int size) {
    k.resize(static_cast<std::size_t>(kTile) * size);
    const int filled = (tokens + kStrip - 1) / kStrip * kStrip;
    float* base = k.data();
    auto place = [&](int t, int d) {
      return base + (static_cast<std::size_t>(t / kStrip) * size + d) * kStrip + t % kStrip;
    };
    int t = 0;
#if defined(__AVX2__)
    for (; t + 8 <= tokens; t += 8) {
      float scale[8];
      for (int i = 0; i < 8; ++i) scale[i] = scale_of(tile.k[t + i], size);
      int d = 0;
      for (; d + 8 <= size; d += 8) {
        __m256 r[8];
        for (int i = 0; i < 8; ++i) r[i] = load8(tile.k[t + i] + d);
        if constexpr (kTail<KV> > 0)
          for (int i = 0; i < 8; ++i) r[i] = _mm256_mul_ps(r[i], _mm256_set1_ps(scale[i]));
        transpose8(r);
        for (int i = 0; i < 8; ++i) _mm256_storeu_ps(place(t, d + i), r[i]);
      }
      for (; d < size; ++d)
        for (int i = 0; i < 8; ++i) *place(t + i, d) = widen(tile.k[t + i][d]) * scale[i];
    }
#endif
    for (; t < filled; ++t) {
      const float scale = t < tokens ? scale_of(tile.k[t], size) : 0.0f;
      for (int d = 0; d < size; ++d) *place(t, d) = t < tokens ? widen(tile.k[t][d]) * scale : 0.0f;
    }
  }

#if defined(__AVX2__)
  static __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
  static __m256 load8(const std::uint16_t* p) {
    __m256i w = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(w, 16));
  }
  static __m256 load8(const std::int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static void transpose8(__m256* r) {
    __m256 a[8], b[8];
    for (int i = 0; i < 4; ++i) {
      a[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
      a[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
      b[4 * i] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0x44);
      b[4 * i + 1] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0xEE);
      b[4 * i + 2] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0x44);
      b[4 * i + 3] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0xEE);
    }
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
      r[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
  }
#endif
};

// Scores of kGroup query vectors (interleaved: q[d][kGroup]) against one strip of transposed keys.
inline void many_scores(const float* q, const float* k, int size, float* score) {
  constexpr int W = vf::width;
  vf acc[kGroup][2];
#pragma GCC unroll 8
  for (int i = 0; i < kGroup; ++i) acc[i][0] = acc[i][1] = vf::zero();
  for (int d = 0; d < size; ++d) {
    const vf a = vf::load(k + d * kStrip), b = vf::load(k + d * kStrip + W);
#pragma GCC unroll 8
    for (int i = 0; i < kGroup; ++i) {
      const vf x = vf::set(q[d * kGroup + i]);
      acc[i][0] = fma(x, a, acc[i][0]);
      acc[i][1] = fma(x, b, acc[i][1]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kGroup; ++i) {
    acc[i][0].store(score + i * kTile);
    acc[i][1].store(score + i * kTile + W);
  }
}

// o_i += sum over tokens [low, high) of p_it * v_t for kGroup query vectors and N vectors of the head.
template <int N>
inline void many_values(const float* p, const float* v, int low, int high, float* o, int stride) {
  constexpr int W = vf::width;
  vf acc[kGroup][N];
#pragma GCC unroll 8
  for (int i = 0; i < kGroup; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) acc[i][j] = vf::load(o + i * stride + j * W);
  for (int t = low; t < high; ++t) {
    vf y[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) y[j] = vf::load(v + static_cast<std::size_t>(t) * stride + j * W);
#pragma GCC unroll 8
    for (int i = 0; i < kGroup; ++i) {
      const vf x = vf::set(p[i * kTile + t]);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) acc[i][j] = fma(x, y[j], acc[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kGroup; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) acc[i][j].store(o + i * stride + j * W);
}

// Interleave the query rows of a state in place of [row][stride]: [group][d][kGroup].
inline void interleave(const State& st, int size, std::vector<float>& out) {
  const int groups = (st.count + kGroup - 1) / kGroup;
  out.resize(static_cast<std::size_t>(groups) * size * kGroup);
  for (int g = 0; g < groups; ++g)
    for (int i = 0; i < kGroup; ++i) {
      const float* from = st.q.data() + static_cast<std::size_t>(g * kGroup + i) * st.stride;
      float* to = out.data() + static_cast<std::size_t>(g) * size * kGroup + i;
      for (int d = 0; d < size; ++d) to[d * kGroup] = from[d];
    }
}

// One packed tile for all rows of the state. `span` has an entry per padded row (padding: empty). `scores(row, low, high, to)`
// writes the scores of kGroup rows from `row` on against tokens [low, high) as rows of kTile floats. A policy may find what a
// group of rows would add negligible; then nothing of the tile is added to them.
template <typename Scores, typename Policy>
void many_tile(State& st, const Packed& tile, const Span* span, const Policy& policy, const Scores& scores) {
  alignas(64) float score[kGroup * kTile];
  const int nv = st.stride / vf::width;
  for (int row = 0; row < st.count; row += kGroup) {
    int low = kTile, high = 0;
    for (int i = 0; i < kGroup; ++i) {
      if (span[row + i].low >= span[row + i].high) continue;
      low = std::min(low, span[row + i].low);
      high = std::max(high, span[row + i].high);
    }
    if (low >= high) continue;
    scores(row, low, high, score);
    if constexpr (requires { policy.negligible(score, span + row, st.m.data() + row); })
      if (policy.negligible(score, span + row, st.m.data() + row)) continue;
    float* o = st.o.data() + static_cast<std::size_t>(row) * st.stride;
    for (int i = 0; i < kGroup; ++i) {
      const float factor = policy.weights(score + i * kTile, low, high, span[row + i], row + i, st.m[row + i], st.l[row + i]);
      if (factor != 1.0f) scale_row(o + i * st.stride, st.stride, factor);
    }
    int c = 0;
    for (; c + 2 <= nv; c += 2)
      many_values<2>(score, tile.v.data() + c * vf::width, low, high, o + c * vf::width, st.stride);
    if (c < nv) many_values<1>(score, tile.v.data() + c * vf::width, low, high, o + c * vf::width, st.stride);
  }
}

// Scores of packed keys and interleaved queries.
template <typename Policy>
void many_tile(State& st, const float* q, const Packed& tile, int size, const Span* span, const Policy& policy) {
  many_tile(st, tile, span, policy, [&](int row, int low, int high, float* to) {
    const float* x = q + static_cast<std::size_t>(row) * size;
    for (int t = low - low % kStrip; t < high; t += kStrip)
      many_scores(x, tile.k.data() + static_cast<std::size_t>(t) * size, size, to + t);
  });
}

// Everything one task needs: the state of its query vectors and the scratch of either way through a tile.
struct Scratch {
  State state;
  std::vector<Span> span;  // what each query vector sees of the current tile; set by the caller
  Packed packed;
  Padded padded;
  std::vector<float> query;
  bool few = true;

  // Call after the query vectors are loaded.
  void ready(int size) {
    few = state.count <= kFew;
    if (!few) interleave(state, size, query);
    span.assign(state.m.size(), Span{0, 0});
  }

  template <typename KV, typename Policy>
  void add(const Tokens<KV>& tile, int count, int size, const Policy& policy, const Tokens<KV>* next) {
    if constexpr (Policy::copies) {
      padded.copy(tile, count, size, state.stride);
      policy.transform(padded.k.data(), padded.v.data(), count, state.stride);
      add_plain<float>(padded.tokens, count, size, policy, nullptr);
    } else {
      add_plain<KV>(tile, count, size, policy, next);
    }
  }

 private:
  template <typename KV, typename Policy>
  void add_plain(const Tokens<KV>& tile, int count, int size, const Policy& policy, const Tokens<KV>* next) {
    if (!few) {
      packed.pack(tile, count, size, state.stride);
      many_tile(state, query.data(), packed, size, span.data(), policy);
    } else if (size % vf::width == 0 || Policy::copies) {
      few_tile(state, tile, span.data(), policy, next);
    } else {
      padded.copy(tile, count, size, state.stride);
      few_tile<float>(state, padded.tokens, span.data(), policy, nullptr);
    }
  }
};

}  // namespace hasten::attend
