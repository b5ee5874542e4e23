// Activations rounded to 16 bits, one float32 scale per row, against codes of 4, 5, 6 and 8 bits: two integer products per
// 32 bits and instruction, for any number of rows. The rounding is finer than bfloat16's: its error is at most
// max |x| / 65534 per activation, so at most sqrt(inputs) / 1.1e5 of a row's norm.
//
// Pairs of int16 codes are multiplied by pairs of activations and summed up exactly, in 32 bits, over a unit: a chunk, or
// half of one where groups begin and end within chunks. A unit's sum is then scaled in float32.
#include <cmath>
#include <limits>

#include "affine_codes.h"

#define HASTEN_INLINE __attribute__((always_inline))

namespace hasten::affine {
namespace {

constexpr int kTall = 4;      // rows at once
constexpr int kRows = 128;    // rows of a task
constexpr int kPairs = 16;    // pairs of a chunk
constexpr int kSegment = 8;   // chunks whose scales (and, for many rows, pairs) are expanded together: they stay in L1
constexpr int kV = vf::width >= 8 ? kBlock / vf::width : 1;

// Tiles of kTall rows: a chunk of all rows of a tile lies together, so that addresses within it are constants.
struct Rows {
  std::int32_t* x;  // [tiles][chunks][kTall][16] pairs, in the order in which pairs of codes meet them
  float* sum;       // [tiles][units][kTall] of the rounded activations
  float* scale;     // [rows]
  int chunks, units;

  const std::int32_t* pairs(int tile, int chunk) const {
    return x + (static_cast<std::ptrdiff_t>(tile) * chunks + chunk) * kTall * kPairs;
  }
};

// Eight columns become four pairs: (0, 4), (1, 5), (2, 6), (3, 7), or from bytes (0, 2), (1, 3), (4, 6), (5, 7).
constexpr int position(bool bytes, int column) {
  const int n = column % 8;
  return column - n + (bytes ? n / 4 * 4 + n % 2 * 2 + n % 4 / 2 : n % 4 * 2 + n / 4);
}

// Rounds 16 columns to x[16] in that order and returns their sum. value * inverse lies in [-32767, 32767].
std::int32_t round_half(const float* value, float inverse, bool bytes, std::int16_t* x) {
#if defined(__AVX2__)
  const __m256 factor = _mm256_set1_ps(inverse);
  const __m256i first = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(value), factor));
  const __m256i second = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(value + 8), factor));
  __m256i all = _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xd8);
  const __m128i order = bytes ? _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15)
                              : _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
  all = _mm256_shuffle_epi8(all, _mm256_broadcastsi128_si256(order));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), all);
  const __m256i sums = _mm256_add_epi32(first, second);
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  sum = _mm_add_epi32(sum, _mm_unpackhi_epi64(sum, sum));
  return _mm_cvtsi128_si32(sum) + _mm_extract_epi32(sum, 1);
#else
  std::int32_t sum = 0;
  for (int i = 0; i < kHalf; ++i) {
    const int q = static_cast<int>(std::nearbyint(value[i] * inverse));
    x[position(bytes, i)] = static_cast<std::int16_t>(q);
    sum += q;
  }
  return sum;
#endif
}

void round_row(const Affine& a, const float* from, int row, const Rows& to) {
  const int width = a.chunks * kChunk, per_chunk = to.units / a.chunks;
  vf top = vf::zero(), poison = vf::zero();
  for (int i = 0; i < width; i += vf::width) {
    const vf v = vf::load(from + i);
    top = max(top, max(v, vf::zero() - v));
    poison = fma(v, vf::zero(), poison);  // NaN if anything is NaN or infinite
  }
  // Such numbers cannot be rounded; a NaN scale carries them into every output.
  const float most = top.max();
  const bool finite = poison.sum() == 0.0f;
  const bool any = finite && most > 0.0f && 32767.0f / most <= std::numeric_limits<float>::max();
  const float inverse = any ? 32767.0f / most : 0.0f;
  to.scale[row] = finite ? (any ? most / 32767.0f : 0.0f) : std::numeric_limits<float>::quiet_NaN();
  const std::ptrdiff_t tile = row / kTall, inner = row % kTall;
  float* sum = to.sum + tile * to.units * kTall + inner;
  for (int c = 0; c < a.chunks; ++c) {
    auto* x = reinterpret_cast<std::int16_t*>(to.x + ((tile * a.chunks + c) * kTall + inner) * kPairs);
    if (!any) {
      std::fill(x, x + kChunk, std::int16_t{0});
      for (int u = 0; u < per_chunk; ++u, sum += kTall) *sum = 0.0f;
      continue;
    }
    const std::int32_t low = round_half(from + c * kChunk, inverse, a.bits == 8, x);
    const std::int32_t high = round_half(from + c * kChunk + kHalf, inverse, a.bits == 8, x + kHalf);
    if (per_chunk == 1) {
      *sum = static_cast<float>(low + high);
    } else {
      sum[0] = static_cast<float>(low), sum[kTall] = static_cast<float>(high);
    }
    sum += per_chunk * kTall;
  }
}

Rows prepare(const Affine& a, const float* x, std::ptrdiff_t ldx, int rows, int units, bool parallel) {
  const std::size_t padded = (static_cast<std::size_t>(rows) + kTall - 1) / kTall * kTall;
  const std::size_t pairs = padded * a.chunks * kPairs;
  float* memory = scratch<2>(pairs + padded * (units + 1));
  const Rows all{reinterpret_cast<std::int32_t*>(memory), memory + pairs, memory + pairs + padded * units, a.chunks, units};
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
    round_row(a, row, r, all);
  }
  return all;
}

// Keeps the compiler from collecting many products before adding them up, which spills most of them.
inline void settle(vi& acc) {
#if defined(__AVX2__) && defined(__GNUC__)
  asm("" : "+x"(acc.v));
#else
  (void)acc;
#endif
}

// f.operator()<0>(), <1>(), ...: an unrolled loop (with constants, so that no compiler decides otherwise).
template <int N, typename F>
HASTEN_INLINE inline void unroll(F f) {
  [&]<int... I>(std::integer_sequence<int, I...>) HASTEN_INLINE { (f.template operator()<I>(), ...); }
  (std::make_integer_sequence<int, N>());
}

// Pair I of quarter Q (8 columns) of a chunk; B = 16: words are pairs already.
template <int B, int Q, int I>
HASTEN_INLINE inline vi pair(const std::uint32_t* words) {
  if constexpr (B == 16) {
    return vi::load(words + (4 * Q + I) * kBlock);
  } else if constexpr (B == 8) {
    const vi word = vi::load(words + (2 * Q + I / 2) * kBlock);
    if constexpr (I % 2 == 0) return word.mask<0xff00ff>();
    else return word.shift_halves<8>();
  } else {
    const vi word = vi::load(words + Q * kBlock);
    if constexpr (B == 4 && I == 3) {
      return word.shift_halves<12>();
    } else if constexpr (B == 4) {
      return word.template shift<4 * I>().template mask<0xf000f>();
    } else {
      // Bytes of the even or odd nibbles with their high bits, then every other byte.
      constexpr int high = B - 4, place = (2 * Q + I % 2) * high;
      const vi more = vi::load(words + (4 + place / 8) * kBlock);
      const vi bytes = word.template shift<I % 2 * 4>().template mask<0x0f0f0f0f>() |
                       more.template shift<place % 8 - 4>().template mask<((1u << high) - 1) * 0x10101010u>();
      if constexpr (I < 2) return bytes.mask<0xff00ff>();
      else return bytes.shift_halves<8>();
    }
  }
}

// acc += (First: =) the products of quarter Q.
template <int B, int Q, bool First, int R>
HASTEN_INLINE inline void quarter_dot(const std::uint32_t* words, const std::int32_t* x, vi (&acc)[R][kV]) {
  unroll<4>([&]<int N>() HASTEN_INLINE {
    constexpr int I = N % 2 * 2 + N / 2;  // what is cut out of the same bytes, one after the other
    vi p[kV];
    unroll<kV>([&]<int v>() HASTEN_INLINE { p[v] = pair<B, Q, I>(words + v * vf::width); });
    unroll<R>([&]<int r>() HASTEN_INLINE {
      const vi value = vi::set(x[r * kPairs + 4 * Q + I]);
      unroll<kV>([&]<int v>() HASTEN_INLINE {
        if constexpr (First && N == 0) acc[r][v] = dot_pairs(p[v], value);
        else acc[r][v] = dot_pairs(acc[r][v], p[v], value);
        settle(acc[r][v]);
      });
    });
  });
}

// Where the scales of a run of units begin, and how many units are left of the first group.
struct Scales {
  const float *scale, *low;  // [groups][16]
  int left, per_group;       // units
};

// total[R][16] += the products of `chunks` chunks, U units each.
template <int B, int R, int U>
void multiply(const std::uint32_t* words, const std::int32_t* x, const float* sum, Scales scales, int chunks, float* total) {
  for (int at = 0; at < kBlock; at += kV * vf::width) {
    const std::uint32_t* w = words + at;
    const std::int32_t* value = x;
    const float *s = scales.scale + at, *m = scales.low + at, *part = sum;
    int left = scales.left;
    float* y = total + at;
    vi acc[R][kV];
    const auto end_unit = [&]() HASTEN_INLINE {
      for (int v = 0; v < kV; ++v) {
        const vf sv = vf::load(s + v * vf::width), mv = vf::load(m + v * vf::width);
        unroll<R>([&]<int r>() HASTEN_INLINE {
          float* to = y + r * kBlock + v * vf::width;
          fma(sv, acc[r][v].to_float(), fma(mv, vf::set(part[r]), vf::load(to))).store(to);
        });
      }
      part += kTall;
      if (--left == 0) s += kBlock, m += kBlock, left = scales.per_group;
    };
    for (int c = 0; c < chunks; ++c, w += B * kBlock, value += kTall * kPairs) {
      quarter_dot<B, 0, true>(w, value, acc);
      quarter_dot<B, 1, false>(w, value, acc);
      if constexpr (U == 2) end_unit();
      quarter_dot<B, 2, U == 2>(w, value, acc);
      quarter_dot<B, 3, false>(w, value, acc);
      end_unit();
    }
  }
}

// The pairs of `chunks` chunks, [chunks][16][16].
template <int B>
void spread(const std::uint32_t* words, int chunks, std::uint32_t* to) {
  for (int c = 0; c < chunks; ++c, words += B * kBlock)
    unroll<kPairs>([&]<int I>() HASTEN_INLINE {
      for (int v = 0; v < kBlock; v += vf::width) pair<B, I / 4, I % 4>(words + v).store(to + v);
      to += kBlock;
    });
}

using Multiply = void (*)(const std::uint32_t*, const std::int32_t*, const float*, Scales, int, float*);
template <int B, int U>
Multiply multiply_of(int rows) {
  switch (rows) {
    case 1: return &multiply<B, 1, U>;
    case 2: return &multiply<B, 2, U>;
    case 3: return &multiply<B, 3, U>;
    default: return &multiply<B, 4, U>;
  }
}

template <int B, int U>
void run(const Affine& a, const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy) {
  const bool parallel = worth_threads(rows, a.inputs, a.outputs), few = rows <= kTall;
  const Rows all = prepare(a, x, ldx, rows, a.chunks * U, parallel);
  const int blocks = a.blocks(), tasks = blocks * ((rows + kRows - 1) / kRows), per_group = a.halves * U / 2;
  constexpr int side = kSegment * U * kBlock;
#pragma omp parallel for schedule(static) if (parallel)
  for (int task = 0; task < tasks; ++task) {
    const int b = task % blocks, begin = task / blocks * kRows, end = std::min(rows, begin + kRows);
    float* scale = scratch<1>(2 * side + (few ? kTall : kRows) * kBlock + (few ? 0 : kSegment * kPairs * kBlock));
    float* total = scale + 2 * side;
    auto* pairs = reinterpret_cast<std::uint32_t*>(total + kRows * kBlock);
    std::fill(total, total + (end - begin) * kBlock, 0.0f);
    const std::uint32_t* words = a.block_words(b);
    for (int c = 0; c < a.chunks; c += kSegment, words += kSegment * B * kBlock) {
      const int chunks = std::min(kSegment, a.chunks - c), unit = c * U, group = unit / per_group;
      a.expand(b, group, (unit + chunks * U - 1) / per_group + 1 - group, scale, scale + side);
      const Scales scales{scale, scale + side, per_group - unit % per_group, per_group};
      if (!few) spread<B>(words, chunks, pairs);
      for (int r = begin; r < end; r += kTall) {
        const int tile = r / kTall, count = std::min(kTall, end - r);
        const float* sum = all.sum + (static_cast<std::ptrdiff_t>(tile) * all.units + unit) * kTall;
        if (few) multiply_of<B, U>(count)(words, all.pairs(tile, c), sum, scales, chunks, total);
        else multiply_of<16, U>(count)(pairs, all.pairs(tile, c), sum, scales, chunks, total + (r - begin) * kBlock);
      }
    }
    const float* bias = a.bias != nullptr ? a.bias + b * kBlock : dense::zeros();
    const int valid = std::min(kBlock, a.outputs - b * kBlock);
    for (int r = begin; r < end; ++r, total += kBlock) {
      const float factor = all.scale[r];
      float* out = y + r * ldy + b * kBlock;
      for (int i = 0; i < valid; ++i) out[i] = bias[i] + factor * total[i];
    }
  }
}

template <int U>
void run_bits(const Affine& a, const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy) {
  switch (a.bits) {
    case 4: return run<4, U>(a, x, ldx, rows, y, ldy);
    case 5: return run<5, U>(a, x, ldx, rows, y, ldy);
    case 6: return run<6, U>(a, x, ldx, rows, y, ldy);
    default: return run<8, U>(a, x, ldx, rows, y, ldy);
  }
}

}  // namespace

void rounded_int16(const Affine& a, const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy) {
  if (a.halves % 2 == 0) run_bits<1>(a, x, ldx, rows, y, ldy);
  else run_bits<2>(a, x, ldx, rows, y, ldy);
}

}  // namespace hasten::affine
