// Activations rounded to 16 bits: how they are rounded and how they meet codes of 4, 5, 6 and 8 bits.
#pragma once

#include "affine_rounded.h"

namespace hasten::affine {
namespace {

constexpr int kPairs = 16;  // of a chunk

// Eight columns become four pairs: (0, 4), (2, 6), (1, 5), (3, 7), or from bytes (0, 2), (1, 3), (4, 6), (5, 7).
constexpr int position(bool bytes, int column) {
  const int n = column % 8;
  return column - n + (bytes ? n / 4 * 4 + n % 2 * 2 + n % 4 / 2 : n % 2 * 4 + n % 4 / 2 * 2 + n / 4);
}

// Rounds 16 columns to x[16] in that order and returns their sum. value * inverse lies in [-32767, 32767].
std::int32_t round_half(const float* value, float inverse, bool bytes, std::int16_t* x) {
#if defined(__AVX2__)
  const __m256 factor = _mm256_set1_ps(inverse);
  const __m256i first = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(value), factor));
  const __m256i second = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(value + 8), factor));
  __m256i all = _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xd8);
  const __m128i order = bytes ? _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15)
                              : _mm_setr_epi8(0, 1, 8, 9, 4, 5, 12, 13, 2, 3, 10, 11, 6, 7, 14, 15);
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

struct Int16 {
  static constexpr int kWords = kPairs;
  static constexpr bool kChunkScales = false;

  // Eight columns have the pairs 0, 2, 1, 3: those cut out of the same bytes, one after the other.
  template <int B, int I>
  HASTEN_INLINE static vi cut(const std::uint32_t* words) {
    if constexpr (B == kSpread) {
      return vi::load(words + I * kBlock);
    } else if constexpr (B == 8) {
      const vi word = vi::load(words + I / 2 * kBlock);
      if constexpr (I % 2 == 0) return word.mask<0xff00ff>();
      else return word.shift_halves<8>();
    } else {
      constexpr int quarter = I / 4, odd = I / 2 % 2, upper = I % 2;
      const vi word = vi::load(words + quarter * kBlock);
      if constexpr (B == 4 && odd + upper == 2) {
        return word.shift_halves<12>();
      } else if constexpr (B == 4) {
        return word.template shift<4 * odd + 8 * upper>().template mask<0xf000f>();
      } else {
        // Bytes of the even or odd nibbles with their high bits, then every other byte.
        constexpr int high = B - 4, place = (2 * quarter + odd) * high;
        const vi more = vi::load(words + (4 + place / 8) * kBlock);
        const vi bytes = word.template shift<odd * 4>().template mask<0x0f0f0f0f>() |
                         more.template shift<place % 8 - 4>().template mask<((1u << high) - 1) * 0x10101010u>();
        if constexpr (upper == 0) return bytes.template mask<0xff00ff>();
        else return bytes.template shift_halves<8>();
      }
    }
  }

  HASTEN_INLINE static vi first(vi codes, vi x) { return dot_pairs(codes, x); }
  HASTEN_INLINE static vi add(vi sum, vi codes, vi x) { return dot_pairs(sum, codes, x); }
  HASTEN_INLINE static vf value(vi sum) { return sum.to_float(); }

  static void round_row(const Affine& a, const float* from, int row, const Rows& to) {
    const Grid grid(largest(from, a.chunks * kChunk), 32767.0f);
    to.scale[row] = grid.scale;
    const bool two = to.units != a.chunks;
    for (int c = 0; c < a.chunks; ++c) {
      auto* x = reinterpret_cast<std::int16_t*>(to.word(row, c));
      std::int32_t low = 0, high = 0;
      if (grid.inverse > 0.0f) {
        low = round_half(from + c * kChunk, grid.inverse, a.bits == 8, x);
        high = round_half(from + c * kChunk + kHalf, grid.inverse, a.bits == 8, x + kHalf);
      } else {
        std::fill(x, x + kChunk, std::int16_t{0});
      }
      if (two) {
        to.sum[to.at(row, 2 * c, to.units)] = static_cast<float>(low);
        to.sum[to.at(row, 2 * c + 1, to.units)] = static_cast<float>(high);
      } else {
        to.sum[to.at(row, c, to.units)] = static_cast<float>(low + high);
      }
    }
  }
};

}  // namespace
}  // namespace hasten::affine
