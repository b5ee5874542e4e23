// Float32 activations against MARLIN codes. Up to a dozen rows, a vector of weights is cut out of its words once and
// multiplied with every row, held in registers; for more, a panel is dequantised into L1 and multiplied by the dense tile.
#include "marlin.h"

namespace hasten::marlin {
namespace {

constexpr int kDenseRows = 12, kSparseRows = 8;  // rows at once in registers

// Activations packed once per call, [chunks][rows][32] times 2^-excess, and -8 times their sums, [units][rows].
struct Activations {
  const float *x, *correction;
};

// Bits to the left of which column C's code is cut out; see Place::excess.
constexpr int excess(bool sparse, int c) {
  const int nibble = sparse ? c / 4 : c % 8;
  return nibble == 7 ? 0 : 4 * nibble;
}

Activations prepare(const Marlin& m, const float* x, std::ptrdiff_t ldx, int rows) {
  const int chunks = m.w.chunks, unit = m.unit(), units = m.units();
  float factor[kChunk];
  for (int c = 0; c < kChunk; ++c) factor[c] = 1.0f / static_cast<float>(1u << excess(m.sparse, c));
  float* to = scratch<6>(static_cast<std::size_t>(rows) * (chunks * kChunk + units));
  float* correction = to + static_cast<std::size_t>(rows) * chunks * kChunk;
  std::fill(correction, correction + rows * units, 0.0f);
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < chunks; ++c) {
      float value[kChunk] = {};
      const int first = c * kChunk, count = std::min(kChunk, m.inputs - first);
      std::memcpy(value, x + r * ldx + first, count * sizeof(float));
      float* out = to + (static_cast<std::size_t>(c) * rows + r) * kChunk;
      vf sum = vf::zero();
      for (int i = 0; i < kChunk; i += vf::width) {
        const vf part = vf::load(value + i);
        sum = sum + part;
        (part * vf::load(factor + i)).store(out + i);
      }
      correction[c / unit * rows + r] -= kZero * sum.sum();
    }
  return {to, correction};
}

// A panel, each pointer moved on to its first chunk or unit.
struct Run {
  const std::uint32_t* words;
  const float *x, *correction, *scale;
  int chunks, unit;
};

// Partial sums, so that multiply-adds do not wait for each other.
constexpr int partial_sums(int chains) { return vf::width == 1 || chains >= 6 ? 1 : chains >= 3 ? 2 : 4; }

// total[R][16] += scale * acc, per unit of chunks. chunk(words, x, acc) adds the products of one chunk.
template <int R, int V, int P, int Words, bool Corrected, typename Chunk>
HASTEN_INLINE inline void panel_rows(const Run& run, float* total, Chunk chunk) {
  for (int at = 0; at < kBlock; at += V * vf::width) {
    const std::uint32_t* w = run.words + at;
    const float *x = run.x, *correction = run.correction, *s = run.scale + at;
    for (int c = 0; c < run.chunks; c += run.unit, s += kBlock, correction += R) {
      vf acc[P][R][V];
      unroll<R>([&]<int r>() HASTEN_INLINE {
        unroll<V>([&]<int v>() HASTEN_INLINE {
          acc[0][r][v] = Corrected ? vf::set(correction[r]) : vf::zero();
          unroll<P - 1>([&]<int p>() HASTEN_INLINE { acc[p + 1][r][v] = vf::zero(); });
        });
      });
      for (int i = std::min(run.unit, run.chunks - c); i > 0; --i, w += Words * kBlock, x += R * kChunk) {
        for (int j = 0; j < Words; ++j) __builtin_prefetch(w + (kAhead / (Words * kBlock) * Words + j) * kBlock, 0, 0);
        chunk(w, x, acc);
      }
      unroll<V>([&]<int v>() HASTEN_INLINE {
        const vf sv = vf::load(s + v * vf::width);
        unroll<R>([&]<int r>() HASTEN_INLINE {
          vf sum = acc[0][r][v];
          unroll<P - 1>([&]<int p>() HASTEN_INLINE { sum = sum + acc[p + 1][r][v]; });
          float* to = total + r * kBlock + at + v * vf::width;
          fma(sv, sum, vf::load(to)).store(to);
        });
      });
    }
  }
}

template <int R>
void dense_panel(const Run& run, float* total) {
  constexpr int V = vf::width == 8 && R <= 6 ? 2 : 1, P = partial_sums(R * V);
  panel_rows<R, V, P, 4, true>(run, total, [](const std::uint32_t* w, const float* x, vf (&acc)[P][R][V]) HASTEN_INLINE {
    unroll<kChunk>([&]<int c>() HASTEN_INLINE {
      vf weight[V];
      unroll<V>([&]<int v>() HASTEN_INLINE { weight[v] = code<4, c>(w + v * vf::width).to_float(); });
      unroll<R>([&]<int r>() HASTEN_INLINE {
        const vf value = vf::set(x[r * kChunk + c]);
        unroll<V>([&]<int v>() HASTEN_INLINE { acc[c % P][r][v] = fma(weight[v], value, acc[c % P][r][v]); });
      });
    });
  });
}

// Per lane, one of four consecutive floats, by the low two bits of the lane's index.
HASTEN_INLINE inline vf choose(const float* four, vi index) {
#if defined(__AVX512F__)
  return {_mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(four)), index.v)};
#elif defined(__AVX2__)
  return {_mm256_permutevar_ps(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(four)), index.v)};
#else
  return {four[index.v & 3u]};
#endif
}

// Kept weight n of four inputs q, times 2^excess, before its scale.
template <int q, int n>
HASTEN_INLINE inline vf kept(const std::uint32_t* w) {
  const vi word = vi::load(w + n * kBlock);
  constexpr float zero = kZero * static_cast<float>(1u << excess(true, 4 * q));
  if constexpr (q == 7) return word.template shift<28>().to_float() - vf::set(zero);
  else return word.template mask<15u << 4 * q>().to_float() - vf::set(zero);
}

template <int R>
void sparse_panel(const Run& run, float* total) {
  constexpr int V = 1, P = partial_sums(R);
  panel_rows<R, V, P, kSparseWords, false>(
      run, total, [](const std::uint32_t* w, const float* x, vf (&acc)[P][R][V]) HASTEN_INLINE {
        unroll<kChunk / 4>([&]<int q>() HASTEN_INLINE {
          const vi place = vi::load(w + 2 * kBlock);
          const vi at[2] = {place.template shift<4 * q>(), place.template shift<4 * q + 2>()};
          const vf weight[2] = {kept<q, 0>(w), kept<q, 1>(w)};
          unroll<R>([&]<int r>() HASTEN_INLINE {
            const float* four = x + r * kChunk + 4 * q;
            unroll<2>([&]<int n>() HASTEN_INLINE {
              constexpr int p = (2 * q + n) % P;
              acc[p][r][0] = fma(weight[n], choose(four, at[n]), acc[p][r][0]);
            });
          });
        });
      });
}

template <bool Sparse, int... R>
constexpr auto panel_table(std::integer_sequence<int, R...>) {
  using Function = void (*)(const Run&, float*);
  struct Table { Function at[sizeof...(R)]; };
  if constexpr (Sparse) return Table{{&sparse_panel<R + 1>...}};
  else return Table{{&dense_panel<R + 1>...}};
}

void few(const Marlin& m, const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy) {
  static constexpr auto dense = panel_table<false>(std::make_integer_sequence<int, kDenseRows>());
  static constexpr auto sparse = panel_table<true>(std::make_integer_sequence<int, kSparseRows>());
  const auto multiply = m.sparse ? sparse.at[rows - 1] : dense.at[rows - 1];
  const Activations all = prepare(m, x, ldx, rows);
  striped(m, rows, y, ldy, [&](const Column& c, int first, int last, bool owner, float* to, std::ptrdiff_t ld) {
    float scale[kPanel * kBlock], low[kPanel * kBlock], total[kDenseRows * kBlock];
    std::fill(total, total + rows * kBlock, 0.0f);
    for (int p = first; p < last; ++p) {
      const int chunk = p * m.panel;
      m.expand(c.block, p, scale, low);
      multiply({m.words(c.block, p), all.x + static_cast<std::size_t>(chunk) * rows * kChunk,
                all.correction + chunk / m.unit() * rows, scale, m.panel_end(p) - chunk, m.unit()},
               total);
    }
    finish(m, c, owner, total, nullptr, to, ld);
  });
}

// The weights of a chunk as float32 [32][16].
void dense_weights(const std::uint32_t* w, const float* scale, const float* low, float* to) {
  for (int v = 0; v < kBlock; v += vf::width) {
    const vf s = vf::load(scale + v), zero = vf::load(low + v);
    unroll<kChunk>([&]<int c>() HASTEN_INLINE {
      fma(s, plain_code<4, c>(w + v).to_float(), zero).store(to + c * kBlock + v);
    });
  }
}

// `value` in the lanes whose index is J, else 0.
template <int J>
HASTEN_INLINE inline vf where(vi index, vf value) {
#if defined(__AVX512F__)
  return {_mm512_maskz_mov_ps(_mm512_cmpeq_epi32_mask(index.v, _mm512_set1_epi32(J)), value.v)};
#elif defined(__AVX2__)
  const __m256i same = _mm256_cmpeq_epi32(index.v, _mm256_set1_epi32(J));
  return {_mm256_and_ps(value.v, _mm256_castsi256_ps(same))};
#else
  return {index.v == J ? value.v : 0.0f};
#endif
}

void sparse_weights(const std::uint32_t* w, const float* scale, float* to) {
  for (int v = 0; v < kBlock; v += vf::width) {
    const vi place = vi::load(w + 2 * kBlock + v);
    unroll<kChunk / 4>([&]<int q>() HASTEN_INLINE {
      const vf s = vf::load(scale + v) * vf::set(1.0f / static_cast<float>(1u << excess(true, 4 * q)));
      const vf first = s * kept<q, 0>(w + v), second = s * kept<q, 1>(w + v);
      const vi at = place.template shift<4 * q>().template mask<3>();
      const vi then = place.template shift<4 * q + 2>().template mask<3>();
      unroll<4>([&]<int j>() HASTEN_INLINE {
        (where<j>(at, first) + where<j>(then, second)).store(to + (4 * q + j) * kBlock + v);
      });
    });
  }
}

void many(const Marlin& m, const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy) {
  striped(m, rows, y, ldy, [&](const Column& c, int first, int last, bool owner, float* to, std::ptrdiff_t ld) {
    constexpr int side = kPanel * kBlock;
    float* scale = scratch<7>(2 * side + kPanel * kChunk * kBlock + kBlock);
    float *low = scale + side, *tile = low + side, *whole = tile + kPanel * kChunk * kBlock;
    m.column_scale(c.block, whole);
    const float* init = m.bias(c.block, owner);
    for (int p = first; p < last; ++p) {
      const int begin = p * m.panel, end = m.panel_end(p), depth = std::min(end * kChunk, m.inputs) - begin * kChunk;
      m.expand(c.block, p, scale, low);
      if (m.per_column())
        for (int i = 0; i < kBlock; ++i) scale[i] *= whole[i], low[i] *= whole[i];
      const std::uint32_t* w = m.words(c.block, p);
      for (int i = 0; i < end - begin; ++i, w += m.w.bits * kBlock) {
        const int u = i / m.unit() * kBlock;
        float* out = tile + i * kChunk * kBlock;
        if (m.sparse) sparse_weights(w, scale + u, out);
        else dense_weights(w, scale + u, low + u, out);
      }
      dense::block(x + c.first * ldx + begin * kChunk, ldx, c.rows, tile, depth, init, p > first ? ld : 0, to, ld);
      init = to;
    }
  });
}

}  // namespace

void exact(const Marlin& m, const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy) {
  if (rows <= (m.sparse ? kSparseRows : kDenseRows)) few(m, x, ldx, rows, y, ldy);
  else many(m, x, ldx, rows, y, ldy);
}

}  // namespace hasten::marlin
