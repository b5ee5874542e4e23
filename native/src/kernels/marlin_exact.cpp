// Float32 activations against MARLIN codes. Few rows: a vector of weights is cut out of its words once and multiplied with
// as many rows as have their sums in registers. Many rows of dense codes: a panel is dequantised into L1 and multiplied by
// the dense tile. Sparse codes stay in registers whatever the rows: that is half the multiply-adds of a dense tile.
#include "marlin.h"

namespace hasten::marlin {
namespace {

#if defined(__AVX512F__)
constexpr int kDenseTall = 12, kWide = 1;
#elif defined(__AVX2__)
constexpr int kDenseTall = 6, kWide = 2;  // 12 sums, 2 weights, 1 broadcast of 16 registers; one load feeds two sums
#else
constexpr int kDenseTall = 4, kWide = 1;
#endif
constexpr int kSparseTall = 8;             // sums, beside 2 weights, 2 places, 1 choice
constexpr int kFewRows = 12;               // of dense codes

// Activations packed once per call in tiles of `height` rows, the last one of what is left: [tiles][chunks][rows of tile][32]
// times 2^-excess, and -8 times their sums, [tiles][units][rows of tile].
struct Activations {
  const float *x, *correction;
  int height;
};

// Bits to the left of which column C's code is cut out; see Place::excess.
constexpr int excess(bool sparse, int c) {
  const int nibble = sparse ? c / 4 : c % 8;
  return nibble == 7 ? 0 : 4 * nibble;
}

Activations prepare(const Marlin& m, const float* x, std::ptrdiff_t ldx, int rows, int tall) {
  const int chunks = m.w.chunks, unit = m.unit(), units = m.units();
  const int even = (rows + tall - 1) / tall;
  // Tiles of equal height, unless sub-problems must begin with one.
  const int height = rows > kRowsOfSub ? tall : (rows + even - 1) / even, tiles = (rows + height - 1) / height;
  float factor[kChunk];
  for (int c = 0; c < kChunk; ++c) factor[c] = 1.0f / static_cast<float>(1u << excess(m.sparse, c));
  float* to = scratch<6>(static_cast<std::size_t>(rows) * (chunks * kChunk + units));
  float* correction = to + static_cast<std::size_t>(rows) * chunks * kChunk;
  std::fill(correction, correction + static_cast<std::size_t>(rows) * units, 0.0f);
#pragma omp parallel for schedule(static) if (tiles > 1 && worth_threads(rows, m.inputs, m.outputs))
  for (int t = 0; t < tiles; ++t) {
    const std::size_t first = static_cast<std::size_t>(t) * height;
    const int count = std::min(height, rows - t * height);
    for (int r = 0; r < count; ++r)
      for (int c = 0; c < chunks; ++c) {
        float value[kChunk] = {};
        std::memcpy(value, x + (first + r) * ldx + c * kChunk, std::min(kChunk, m.inputs - c * kChunk) * sizeof(float));
        float* out = to + first * chunks * kChunk + (static_cast<std::size_t>(c) * count + r) * kChunk;
        vf sum = vf::zero();
        for (int i = 0; i < kChunk; i += vf::width) {
          const vf part = vf::load(value + i);
          sum = sum + part;
          (part * vf::load(factor + i)).store(out + i);
        }
        correction[first * units + c / unit * count + r] -= kZero * sum.sum();
      }
  }
  return {to, correction, height};
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
  constexpr int V = kWide, P = partial_sums(R * V);
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
  constexpr int V = R <= 3 ? kWide : 1, P = partial_sums(R * V);
  panel_rows<R, V, P, kSparseWords, false>(
      run, total, [](const std::uint32_t* w, const float* x, vf (&acc)[P][R][V]) HASTEN_INLINE {
        unroll<kChunk / 4>([&]<int q>() HASTEN_INLINE {
          unroll<V>([&]<int v>() HASTEN_INLINE {
            const std::uint32_t* word = w + v * vf::width;
            const vi place = vi::load(word + 2 * kBlock);
            const vi at[2] = {place.template shift<4 * q>(), place.template shift<4 * q + 2>()};
            const vf weight[2] = {kept<q, 0>(word), kept<q, 1>(word)};
            unroll<R>([&]<int r>() HASTEN_INLINE {
              const float* four = x + r * kChunk + 4 * q;
              unroll<2>([&]<int n>() HASTEN_INLINE {
                constexpr int p = (2 * q + n) % P;
                acc[p][r][v] = fma(weight[n], choose(four, at[n]), acc[p][r][v]);
              });
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

void in_registers(const Marlin& m, const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy) {
  static constexpr auto dense = panel_table<false>(std::make_integer_sequence<int, kDenseTall>());
  static constexpr auto sparse = panel_table<true>(std::make_integer_sequence<int, kSparseTall>());
  const auto* multiply = m.sparse ? sparse.at : dense.at;
  const Activations all = prepare(m, x, ldx, rows, m.sparse ? kSparseTall : kDenseTall);
  striped(m, rows, y, ldy, [&](const Column& c, int first, int last, bool owner, float* to, std::ptrdiff_t ld) {
    float scale[kPanel * kBlock], low[kPanel * kBlock];
    float* total = scratch<7>(kRowsOfSub * kBlock);
    std::fill(total, total + c.rows * kBlock, 0.0f);
    for (int p = first; p < last; ++p) {
      const int chunk = p * m.panel;
      m.expand(c.block, p, scale, low);
      for (int r = 0; r < c.rows; r += all.height) {
        const std::size_t row = c.first + r;
        const int count = std::min(all.height, c.rows - r);
        multiply[count - 1]({m.words(c.block, p),
                             all.x + (row * m.w.chunks + static_cast<std::size_t>(chunk) * count) * kChunk,
                             all.correction + row * m.units() + chunk / m.unit() * count, scale,
                             m.panel_end(p) - chunk, m.unit()},
                            total + r * kBlock);
      }
    }
    finish(m, c, owner, total, nullptr, to, ld);
  });
}

// The weights of a chunk as float32 [32][16].
template <int... C>
void dense_weights(const std::uint32_t* w, const float* scale, const float* low, float* to,
                   std::integer_sequence<int, C...>) {
  for (int v = 0; v < kBlock; v += vf::width) {
    const vf s = vf::load(scale + v), zero = vf::load(low + v);
    (fma(s, plain_code<4, C>(w + v).to_float(), zero).store(to + C * kBlock + v), ...);
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
        dense_weights(w, scale + u, low + u, tile + i * kChunk * kBlock, std::make_integer_sequence<int, kChunk>());
      }
      dense::block(x + c.first * ldx + begin * kChunk, ldx, c.rows, tile, depth, init, p > first ? ld : 0, to, ld);
      init = to;
    }
  });
}

}  // namespace

void exact(const Marlin& m, const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy) {
  if (m.sparse || rows <= kFewRows) in_registers(m, x, ldx, rows, y, ldy);
  else many(m, x, ldx, rows, y, ldy);
}

}  // namespace hasten::marlin
