// Activations rounded to 8 bits: how they are rounded and how they meet 4 bit codes.
#pragma once

#include "affine_rounded.h"

namespace hasten::affine {
namespace {

// Bytes of a chunk in the kernel's order: a word of 4 bit codes splits into its even and its odd nibbles.
constexpr int position(int column) { return column / 8 * 8 + column % 2 * 4 + column % 8 / 2; }

// Rounds a chunk to x[32] in the kernel's order and returns its sum. value * inverse lies in [-127, 127].
std::int32_t round_chunk(const float* value, float inverse, std::int8_t* x) {
#if defined(__AVX2__)
  const __m256 factor = _mm256_set1_ps(inverse);
  __m256i part[4];
  for (int i = 0; i < 4; ++i) part[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(value + 8 * i), factor));
  // Packing works on 128-bit halves: the permutation puts the groups of four back in order.
  __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(part[0], part[1]), _mm256_packs_epi32(part[2], part[3]));
  bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  bytes = _mm256_shuffle_epi8(bytes, _mm256_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15, 0, 2, 4, 6,
                                                        1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), bytes);
  const __m256i sums = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes), _mm256_set1_epi16(1));
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  sum = _mm_add_epi32(sum, _mm_unpackhi_epi64(sum, sum));
  return _mm_cvtsi128_si32(sum) + _mm_extract_epi32(sum, 1);
#else
  std::int32_t sum = 0;
  for (int i = 0; i < kChunk; ++i) {
    const int q = static_cast<int>(std::nearbyint(value[i] * inverse));
    x[position(i)] = static_cast<std::int8_t>(q);
    sum += q;
  }
  return sum;
#endif
}

struct Int8 {
  static constexpr int kWords = 8;
  static constexpr bool kChunkScales = true;

  template <int B, int I>
  HASTEN_INLINE static vi cut(const std::uint32_t* words) {
    if constexpr (B == kSpread) return vi::load(words + I * kBlock);
    else return vi::load(words + I / 2 * kBlock).template shift<I % 2 * 4>().template mask<0x0f0f0f0f>();
  }

  static void round_row(const Affine& a, const float* from, int row, const Rows& to) {
    for (int c = 0; c < a.chunks; ++c) {
      const float* value = from + c * kChunk;
      const Grid grid(largest(value, kChunk), 127.0f);
      auto* x = reinterpret_cast<std::int8_t*>(to.word(row, c));
      std::int32_t sum = 0;
      if (grid.inverse > 0.0f) sum = round_chunk(value, grid.inverse, x);
      else std::fill(x, x + kChunk, std::int8_t{0});
      to.chunk_scale[to.at(row, c, a.chunks)] = grid.scale;
      to.sum[to.at(row, c, a.chunks)] = grid.scale * static_cast<float>(sum);
    }
  }

#if defined(__AVX512F__)
  HASTEN_INLINE static vi first(vi codes, vi x) { return add(vi::zero(), codes, x); }
  HASTEN_INLINE static vi add(vi sum, vi codes, vi x) { return {_mm512_dpbusd_epi32(sum.v, codes.v, x.v)}; }
  HASTEN_INLINE static vf value(vi sum) { return sum.to_float(); }
#elif defined(__AVX2__)
  // Sums of 16 bits: two products of 15 * 127 per step and eight steps stay below 2^15.
  HASTEN_INLINE static vi first(vi codes, vi x) { return {_mm256_maddubs_epi16(codes.v, x.v)}; }
  HASTEN_INLINE static vi add(vi sum, vi codes, vi x) {
    return {_mm256_add_epi16(sum.v, _mm256_maddubs_epi16(codes.v, x.v))};
  }
  HASTEN_INLINE static vf value(vi sum) { return vi{_mm256_madd_epi16(sum.v, _mm256_set1_epi16(1))}.to_float(); }
#else
  static vi first(vi codes, vi x) { return add(vi::zero(), codes, x); }
  static vi add(vi sum, vi codes, vi x) {
    for (int i = 0; i < 32; i += 8)
      sum.v += (codes.v >> i & 0xffu) * static_cast<std::uint32_t>(static_cast<std::int8_t>(x.v >> i & 0xffu));
    return sum;
  }
  static vf value(vi sum) { return sum.to_float(); }
#endif
};

}  // namespace
}  // namespace hasten::affine
