// What kernels on rounded activations share: the tiles of rows, the loops over blocks, segments and tiles, and scaling.
//
// A `Form` says how activations and codes meet. Products of a unit (a chunk, or half of one where groups begin and end
// within chunks) are summed up exactly as integers, then scaled in float32. Few rows multiply codes as they are cut out of
// their words; many share codes that were cut out once per task and stay in L1.
//
// struct Form {
//   static constexpr int kWords;         // 32-bit words of a chunk's activations, each meeting one vector of codes
//   static constexpr bool kChunkScales;  // activations have a scale per chunk, or one per row
//   template <int B, int I> static vi cut(const std::uint32_t* words);  // codes that meet word I; B = kSpread: spread ones
//   static vi first(vi codes, vi x);  static vi add(vi sum, vi codes, vi x);  static vf value(vi sum);
//   static void round_row(const Affine&, const float* ordered, int row, const Rows& to);
// };
#pragma once

#include <cmath>
#include <limits>

#include "affine_codes.h"

#define HASTEN_INLINE __attribute__((always_inline))

namespace hasten::affine {
namespace {

constexpr int kTall = 4;     // rows at once
constexpr int kRows = 128;   // rows of a task
constexpr int kSegment = 12;  // at most: chunks whose scales (and, for many rows, codes) are expanded together
constexpr int kSpread = 0;   // "bits" of codes that were cut out of their words before
constexpr int kV = vf::width >= 8 ? kBlock / vf::width : 1;

// Tiles of kTall rows: a chunk of all rows of a tile lies together, so that addresses within it are constants.
struct Rows {
  std::int32_t* x;     // [tiles][chunks][kTall][words], in the order in which codes meet them
  float* sum;          // [tiles][units][kTall] of the rounded activations, scaled if there is a scale per chunk
  float* chunk_scale;  // [tiles][chunks][kTall] or null
  float* scale;        // [rows] or null
  int chunks, units, words;

  std::int32_t* word(int row, int chunk) const {
    return x + ((static_cast<std::ptrdiff_t>(row / kTall) * chunks + chunk) * kTall + row % kTall) * words;
  }
  std::ptrdiff_t at(int row, int unit, int count) const {
    return (static_cast<std::ptrdiff_t>(row / kTall) * count + unit) * kTall + row % kTall;
  }
};

// Largest magnitude of count values, a multiple of 32; NaN if anything is NaN or infinite. Without its sign, the bits of
// a float are in the order of their values, and those of NaN and infinity come last.
inline float largest(const float* value, int count) {
#if defined(__AVX512F__)
  __m512i top = _mm512_setzero_si512();
  for (int i = 0; i < count; i += 16)
    top = _mm512_max_epu32(top, _mm512_and_si512(_mm512_loadu_si512(value + i), _mm512_set1_epi32(0x7fffffff)));
  const std::uint32_t bits = _mm512_reduce_max_epu32(top);
#elif defined(__AVX2__)
  __m256i part[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
  for (int i = 0; i < count; i += 16)
    for (int j = 0; j < 2; ++j) {
      const __m256i next = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(value + i + 8 * j));
      part[j] = _mm256_max_epu32(part[j], _mm256_and_si256(next, _mm256_set1_epi32(0x7fffffff)));
    }
  const __m256i both = _mm256_max_epu32(part[0], part[1]);
  __m128i top = _mm_max_epu32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
  top = _mm_max_epu32(top, _mm_unpackhi_epi64(top, top));
  top = _mm_max_epu32(top, _mm_shuffle_epi32(top, 1));
  const auto bits = static_cast<std::uint32_t>(_mm_cvtsi128_si32(top));
#else
  std::uint32_t bits = 0;
  for (int i = 0; i < count; ++i) bits = std::max(bits, std::bit_cast<std::uint32_t>(value[i]) & 0x7fffffffu);
#endif
  return bits < 0x7f800000u ? std::bit_cast<float>(bits) : std::numeric_limits<float>::quiet_NaN();
}

// How values up to `largest` become integers up to `most`: times `inverse`, and back times `scale`. What is too small for
// that becomes 0; NaN and infinity cannot be rounded, and a NaN scale carries them into every output.
struct Grid {
  float inverse = 0.0f, scale = 0.0f;
  Grid(float largest, float most) {
    if (largest > 0.0f && most / largest <= std::numeric_limits<float>::max()) {
      inverse = most / largest, scale = largest / most;
    } else if (largest != largest) {
      scale = largest;
    }
  }
};

template <typename Form>
Rows prepare(const Affine& a, const float* x, std::ptrdiff_t ldx, int rows, int units, bool parallel) {
  const std::size_t padded = (static_cast<std::size_t>(rows) + kTall - 1) / kTall * kTall;
  const std::size_t words = padded * a.chunks * Form::kWords, scales = Form::kChunkScales ? padded * a.chunks : padded;
  float* memory = scratch<2>(words + padded * units + scales);
  float *sum = memory + words, *scale = sum + padded * units;
  const Rows all{reinterpret_cast<std::int32_t*>(memory), sum, Form::kChunkScales ? scale : nullptr,
                 Form::kChunkScales ? nullptr : scale, a.chunks, units, Form::kWords};
  const int width = a.chunks * kChunk;
#pragma omp parallel for schedule(static) if (parallel && rows > 8)
  for (int r = 0; r < rows; ++r) {
    const float* row = x + r * ldx;
    if (a.column != nullptr || a.width != width) {
      float* ordered = scratch<3>(static_cast<std::size_t>(width));
      gather(a, row, ordered);
      std::fill(ordered + a.width, ordered + width, 0.0f);
      row = ordered;
    }
    Form::round_row(a, row, r, all);
  }
  return all;
}

// Keeps the compiler from collecting many products before adding them up, which spills most of them.
HASTEN_INLINE inline void settle(vi& sum) {
#if defined(__AVX2__) && !defined(__AVX512F__) && defined(__GNUC__)
  asm("" : "+x"(sum.v));
#else
  (void)sum;
#endif
}

// f.operator()<0>(), <1>(), ...: an unrolled loop (with constants, so that no compiler decides otherwise).
template <int N, typename F>
HASTEN_INLINE inline void unroll(F f) {
  [&]<int... I>(std::integer_sequence<int, I...>) HASTEN_INLINE { (f.template operator()<I>(), ...); }
  (std::make_integer_sequence<int, N>());
}

// What a run of chunks meets, each moved on to its first one.
struct Run {
  const std::uint32_t* words;
  const std::int32_t* x;                       // [chunks][kTall][words]
  const float *sum, *chunk_scale;              // [units][kTall], [chunks][kTall]
  const float *scale, *low;                    // [groups][16]
  int chunks, left, per_group;                 // units left of the first group, and units of a group
};

// total[R][16] += the products of a run, U units per chunk.
template <typename Form, int B, int R, int U>
void multiply(Run run, float* total) {
  constexpr int stride = (B == kSpread ? Form::kWords : B) * kBlock, part = Form::kWords / U;
  for (int at = 0; at < kBlock; at += kV * vf::width) {
    const std::uint32_t* w = run.words + at;
    const std::int32_t* x = run.x;
    const float *s = run.scale + at, *m = run.low + at, *sum = run.sum, *factor = run.chunk_scale;
    float* y = total + at;
    const int chunks = run.chunks, per_group = run.per_group;
    int left = run.left;
    for (int c = 0; c < chunks; ++c, w += stride, x += kTall * Form::kWords) {
      if constexpr (B != kSpread)
        for (int i = 0; i < B; ++i) __builtin_prefetch(w + kAhead / stride * stride + i * kBlock);
      unroll<U>([&]<int u>() HASTEN_INLINE {
        vi acc[R][kV];
        unroll<part>([&]<int n>() HASTEN_INLINE {
          vi codes[kV];
          unroll<kV>([&]<int v>() HASTEN_INLINE { codes[v] = Form::template cut<B, u * part + n>(w + v * vf::width); });
          unroll<R>([&]<int r>() HASTEN_INLINE {
            const vi value = vi::set(x[r * Form::kWords + u * part + n]);
            unroll<kV>([&]<int v>() HASTEN_INLINE {
              acc[r][v] = n == 0 ? Form::first(codes[v], value) : Form::add(acc[r][v], codes[v], value);
              settle(acc[r][v]);
            });
          });
        });
        unroll<kV>([&]<int v>() HASTEN_INLINE {
          const vf sv = vf::load(s + v * vf::width), mv = vf::load(m + v * vf::width);
          unroll<R>([&]<int r>() HASTEN_INLINE {
            float* to = y + r * kBlock + v * vf::width;
            vf product = Form::value(acc[r][v]);
            if constexpr (Form::kChunkScales) product = product * vf::set(factor[r]);
            fma(sv, product, fma(mv, vf::set(sum[r]), vf::load(to))).store(to);
          });
        });
        sum += kTall;
        if (--left == 0) s += kBlock, m += kBlock, left = per_group;
      });
      if constexpr (Form::kChunkScales) factor += kTall;
    }
  }
}

// The codes of `chunks` chunks as they meet activations, [chunks][words][16].
template <typename Form, int B>
void spread(const std::uint32_t* words, int chunks, std::uint32_t* to) {
  for (int c = 0; c < chunks; ++c, words += B * kBlock)
    unroll<Form::kWords>([&]<int I>() HASTEN_INLINE {
      for (int v = 0; v < kBlock; v += vf::width) Form::template cut<B, I>(words + v).store(to + v);
      to += kBlock;
    });
}

template <typename Form, int B, int U>
auto multiply_of(int rows) {
  switch (rows) {
    case 1: return &multiply<Form, B, 1, U>;
    case 2: return &multiply<Form, B, 2, U>;
    case 3: return &multiply<Form, B, 3, U>;
    default: return &multiply<Form, B, 4, U>;
  }
}

template <typename Form, int B, int U>
void run(const Affine& a, const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy) {
  // What no checkpoint holds (6 bits in groups of whole chunks, others in groups of 16) does without own instances.
  constexpr bool direct = (B == 6) == (U == 2);
  // Up to two tiles cut codes out themselves, one where that takes more steps.
  const bool parallel = worth_threads(rows, a.inputs, a.outputs), few = direct && rows <= (B == 5 || B == 6 ? 1 : 2) * kTall;
  const Rows all = prepare<Form>(a, x, ldx, rows, a.chunks * U, parallel);
  const int blocks = a.blocks(), tasks = blocks * ((rows + kRows - 1) / kRows), per_group = a.halves * U / 2;
  const int segments = (a.chunks + kSegment - 1) / kSegment;
  constexpr int side = kSegment * U * kBlock;
#pragma omp parallel for schedule(static) if (parallel)
  for (int task = 0; task < tasks; ++task) {
    const int b = task % blocks, begin = task / blocks * kRows, end = std::min(rows, begin + kRows);
    float* scale = scratch<1>(2 * side + kRows * kBlock + kSegment * Form::kWords * kBlock);
    float* total = scale + 2 * side;
    auto* codes = reinterpret_cast<std::uint32_t*>(total + kRows * kBlock);
    std::fill(total, total + (end - begin) * kBlock, 0.0f);
    const std::uint32_t* words = a.block_words(b);
    for (int c = 0, i = 0, chunks; c < a.chunks; c += chunks, ++i, words += chunks * B * kBlock) {
      chunks = (a.chunks - c + segments - i - 1) / (segments - i);  // of about equal length
      const int unit = c * U, group = unit / per_group;
      a.expand(b, group, (unit + chunks * U - 1) / per_group + 1 - group, scale, scale + side);
      if (!few) spread<Form, B>(words, chunks, codes);
      for (int r = begin; r < end; r += kTall) {
        const Run part{few ? words : codes, all.word(r, c), all.sum + all.at(r, unit, all.units),
                       Form::kChunkScales ? all.chunk_scale + all.at(r, c, a.chunks) : nullptr, scale, scale + side,
                       chunks, per_group - unit % per_group, per_group};
        const int count = std::min(kTall, end - r);
        if (few) multiply_of<Form, direct ? B : kSpread, U>(count)(part, total + (r - begin) * kBlock);
        else multiply_of<Form, kSpread, U>(count)(part, total + (r - begin) * kBlock);
      }
    }
    const float* bias = a.bias != nullptr ? a.bias + b * kBlock : dense::zeros();
    const int valid = std::min(kBlock, a.outputs - b * kBlock);
    for (int r = begin; r < end; ++r, total += kBlock) {
      const vf factor = vf::set(Form::kChunkScales ? 1.0f : all.scale[r]);
      float* out = y + r * ldy + b * kBlock;
      float* to = valid == kBlock ? out : total;
      for (int i = 0; i < kBlock; i += vf::width) fma(factor, vf::load(total + i), vf::load(bias + i)).store(to + i);
      if (to != out) std::memcpy(out, to, valid * sizeof(float));
    }
  }
}

}  // namespace
}  // namespace hasten::affine
