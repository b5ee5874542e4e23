// Few rows of float32 activations against packed codes: y = sum over groups of scale * (sum of code * x) + low * (sum of x).
// The activations are never rounded. Their sums per group are taken once per call and shared by all outputs.
#include "affine_codes.h"

namespace hasten::affine {
namespace {

struct Rows {
  const float* x;    // [rows][32 * chunks], scaled by 2^-excess, zero beyond the inputs
  const float* sum;  // [rows][groups]
  std::ptrdiff_t ldx, ldsum;
};

template <int B, int... C>
constexpr auto excess_table(std::integer_sequence<int, C...>) {
  struct Table { float at[kChunk]; };
  return Table{{1.0f / static_cast<float>(1u << Place<B>::excess(C))...}};
}

template <int B>
Rows prepare(const Affine& a, const float* x, std::ptrdiff_t ldx, int rows) {
  static constexpr auto factor = excess_table<B>(std::make_integer_sequence<int, kChunk>());
  const int width = a.chunks * kChunk, group = a.halves * kHalf;
  float* out = scratch<0>(static_cast<std::size_t>(rows) * (width + a.groups));
  float* sums = out + static_cast<std::size_t>(rows) * width;
  for (int r = 0; r < rows; ++r) {
    float* to = out + static_cast<std::size_t>(r) * width;
    gather(a, x + r * ldx, to);
    std::fill(to + a.width, to + width, 0.0f);
    for (int g = 0, i = 0; g < a.groups; ++g) {
      vf sum = vf::zero();
      for (const int end = std::min(width, i + group); i < end; i += vf::width) sum = sum + vf::load(to + i);
      sums[r * a.groups + g] = sum.sum();
    }
    for (int i = 0; i < width; i += vf::width) (vf::load(to + i) * vf::load(factor.at + i % kChunk)).store(to + i);
  }
  return {out, sums, width, a.groups};
}

#if defined(__AVX512F__)
constexpr int kWide = 1;
#elif defined(__AVX2__)
constexpr int kWide = 2;
#else
constexpr int kWide = 8;
#endif

// acc[P][R][V] += codes of half chunk H times activations. Consecutive columns go to different partial sums, so that
// the multiply-adds do not wait for each other.
template <int B, int H, int R, int V, int P, int... C>
inline void half_chunk(const std::uint32_t* words, const float* x, std::ptrdiff_t ldx, vf (&acc)[P][R][V],
                       std::integer_sequence<int, C...>) {
  auto column = [&]<int I>() {
    constexpr int c = H * kHalf + I;
    vf value[R];
    for (int r = 0; r < R; ++r) value[r] = vf::set(x[r * ldx + c]);
    for (int v = 0; v < V; ++v) {
      const vf weight = code<B, c>(words + v * vf::width).to_float();
      for (int r = 0; r < R; ++r) acc[I % P][r][v] = fma(weight, value[r], acc[I % P][r][v]);
    }
  };
  (column.template operator()<C>(), ...);
}

template <int B, int R>
void block_rows(const Affine& a, const std::uint32_t* words, const Rows& rows, const float* scale, const float* low,
                const float* bias, float* y, std::ptrdiff_t ldy) {
  constexpr int V = kWide;
  constexpr int P = vf::width == 1 || R * V >= 6 ? 1 : (R * V >= 3 ? 2 : 4);
  constexpr auto columns = std::make_integer_sequence<int, kHalf>();
  for (int at = 0; at < kBlock; at += V * vf::width) {
    vf total[R][V], acc[P][R][V];
    auto clear = [&] {
      for (int p = 0; p < P; ++p)
        for (int r = 0; r < R; ++r)
          for (int v = 0; v < V; ++v) acc[p][r][v] = vf::zero();
    };
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) total[r][v] = vf::load(bias + at + v * vf::width);
    clear();
    const float *s = scale + at, *m = low + at, *sum = rows.sum, *x = rows.x;
    const std::uint32_t* w = words + at;
    int left = a.halves;
    auto end_half = [&](bool last) {
      if (--left > 0 && !last) return;
      for (int v = 0; v < V; ++v) {
        const vf sv = vf::load(s + v * vf::width), mv = vf::load(m + v * vf::width);
        for (int r = 0; r < R; ++r) {
          vf dot = acc[0][r][v];
          for (int p = 1; p < P; ++p) dot = dot + acc[p][r][v];
          total[r][v] = fma(sv, dot, fma(mv, vf::set(sum[r * rows.ldsum]), total[r][v]));
        }
      }
      clear();
      s += kBlock, m += kBlock, ++sum, left = a.halves;
    };
    for (int chunk = 0; chunk < a.chunks; ++chunk, w += B * kBlock, x += kChunk) {
      for (int i = 0; i < B; ++i) __builtin_prefetch(w + (kAhead / (B * kBlock) * B + i) * kBlock);
      half_chunk<B, 0>(w, x, rows.ldx, acc, columns);
      end_half(false);
      half_chunk<B, 1>(w, x, rows.ldx, acc, columns);
      end_half(chunk + 1 == a.chunks);
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) total[r][v].store(y + r * ldy + at + v * vf::width);
  }
}

constexpr int kTall = 4;  // rows at once: more would not leave registers for the weights

template <int B, int... R>
constexpr auto height_table(std::integer_sequence<int, R...>) {
  using Function = void (*)(const Affine&, const std::uint32_t*, const Rows&, const float*, const float*, const float*,
                            float*, std::ptrdiff_t);
  struct Table { Function at[sizeof...(R)]; };
  return Table{{&block_rows<B, R + 1>...}};
}

template <int B>
void run(const Affine& a, const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy) {
  static constexpr auto table = height_table<B>(std::make_integer_sequence<int, kTall>());
  const Rows all = prepare<B>(a, x, ldx, rows);
  const bool parallel = worth_threads(rows, a.inputs, a.outputs);
  const int blocks = a.blocks(), passes = (rows + kTall - 1) / kTall;
  const std::size_t side = static_cast<std::size_t>(a.groups) * kBlock;
#pragma omp parallel for schedule(static) if (parallel)
  for (int b = 0; b < blocks; ++b) {
    float* scale = scratch<1>(2 * side);
    a.expand(b, 0, a.groups, scale, scale + side);
    const float* bias = a.bias != nullptr ? a.bias + b * kBlock : dense::zeros();
    const int valid = std::min(kBlock, a.outputs - b * kBlock);
    float edge[kTall * kBlock];
    const bool whole = valid == kBlock;
    for (int pass = 0, r = 0; pass < passes; ++pass) {
      const int count = (rows - r + passes - pass - 1) / (passes - pass);
      float* out = y + r * ldy + b * kBlock;
      table.at[count - 1](a, a.block_words(b), {all.x + r * all.ldx, all.sum + r * all.ldsum, all.ldx, all.ldsum},
                          scale, scale + side, bias, whole ? out : edge, whole ? ldy : kBlock);
      if (!whole)
        for (int i = 0; i < count; ++i) std::memcpy(out + i * ldy, edge + i * kBlock, valid * sizeof(float));
      r += count;
    }
  }
}

}  // namespace

void direct(const Affine& a, const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy) {
  switch (a.bits) {
    case 2: return run<2>(a, x, ldx, rows, y, ldy);
    case 3: return run<3>(a, x, ldx, rows, y, ldy);
    case 4: return run<4>(a, x, ldx, rows, y, ldy);
    case 5: return run<5>(a, x, ldx, rows, y, ldy);
    case 6: return run<6>(a, x, ldx, rows, y, ldy);
    default: return run<8>(a, x, ldx, rows, y, ldy);
  }
}

}  // namespace hasten::affine
