// Stage (a): from a row of float32 inputs to codes, scale, offset and outliers, while the row is in L1.
#include <atomic>

#include "quik.h"

namespace hasten::quik {
namespace {

std::atomic<std::int64_t> count{0};

// 4 bits: a word of codes splits into its even and its odd nibbles.
constexpr int nibble_place(int c) { return c / 8 * 8 + c % 2 * 4 + c % 8 / 2; }
// 8 bits met as pairs of 16: the bytes (0, 2), then (1, 3) of every word.
constexpr int pair_place(int c) { return c / 4 * 4 + c % 2 * 2 + c % 4 / 2; }

#if defined(__AVX2__)
// Eight codes 0..255 as 32-bit integers.
__m256i codes_of(const float* value, __m256 zero, __m256 inverse) {
  return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(value), zero), inverse));
}

std::int32_t sum_of(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_unpackhi_epi64(s, s));
  return _mm_cvtsi128_si32(s) + _mm_extract_epi32(s, 1);
}

// The signed bytes of a chunk in the order of its columns.
__m256i bytes_of(const float* value, __m256 zero, __m256 inverse, int half) {
  const __m256i low = _mm256_packs_epi32(codes_of(value, zero, inverse), codes_of(value + 8, zero, inverse));
  const __m256i high = _mm256_packs_epi32(codes_of(value + 16, zero, inverse), codes_of(value + 24, zero, inverse));
  const __m256i shift = _mm256_set1_epi16(static_cast<std::int16_t>(half));
  const __m256i bytes = _mm256_packs_epi16(_mm256_sub_epi16(low, shift), _mm256_sub_epi16(high, shift));
  // Packing works on 128-bit halves: the permutation puts the groups of four back in order.
  return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

std::int32_t round_chunk(const Quik& q, const float* value, const Range& range, std::int32_t* to) {
  const __m256i bytes = bytes_of(value, _mm256_set1_ps(range.zero), _mm256_set1_ps(range.inverse), q.half());
  const __m256i ones = _mm256_set1_epi16(1);
  auto* out = reinterpret_cast<__m256i*>(to);
  if (q.bits == 4) {
    const __m256i order = _mm256_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15, 0, 2, 4, 6, 1, 3, 5, 7,
                                           8, 10, 12, 14, 9, 11, 13, 15);
    _mm256_storeu_si256(out, _mm256_shuffle_epi8(bytes, order));
  } else if (q.words() == 8) {
    _mm256_storeu_si256(out, bytes);
  } else {
    const __m256i order = _mm256_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15, 0, 2, 1, 3, 4, 6, 5, 7,
                                           8, 10, 9, 11, 12, 14, 13, 15);
    const __m256i ordered = _mm256_shuffle_epi8(bytes, order);
    _mm256_storeu_si256(out, _mm256_cvtepi8_epi16(_mm256_castsi256_si128(ordered)));
    _mm256_storeu_si256(out + 1, _mm256_cvtepi8_epi16(_mm256_extracti128_si256(ordered, 1)));
  }
  return sum_of(_mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes), ones));
}
#else
std::int32_t round_chunk(const Quik& q, const float* value, const Range& range, std::int32_t* to) {
  auto* bytes = reinterpret_cast<std::int8_t*>(to);
  std::int32_t sum = 0;
  for (int c = 0; c < kChunk; ++c) {
    const int code = static_cast<int>(std::nearbyint((value[c] - range.zero) * range.inverse)) - q.half();
    bytes[q.bits == 4 ? nibble_place(c) : c] = static_cast<std::int8_t>(code);
    sum += code;
  }
  return sum;
}
#endif

}  // namespace

int place_of(const Quik& q, int column) {
  return q.bits == 4 ? nibble_place(column) : q.words() == 8 ? column : pair_place(column);
}

void split_row(const Quik& q, const float* row, float* base, float* outlier) {
  for (const Span& s : q.spans) {
    const float* from = row + s.from;
    float* to = base + s.to;
    int i = 0;
#if defined(__AVX2__)
    // The last vector of a span may run into what the next one overwrites (`base` has room for one more).
    for (; i < s.count && s.from + i + 8 <= q.inputs; i += 8) _mm256_storeu_ps(to + i, _mm256_loadu_ps(from + i));
#endif
    for (; i < s.count; ++i) to[i] = from[i];
  }
  for (int f = 0; f < q.outliers; ++f) outlier[f] = row[q.outlier[f]];
}

Range range_of(const Quik& q, const float* base) {
  const int width = q.base.width, whole = width / (2 * vf::width) * 2 * vf::width;
  float low = base[0], high = base[0], bad = 0.0f;
  if (whole > 0) {
    vf lows[2] = {vf::load(base), vf::load(base)}, highs[2] = {lows[0], lows[0]}, bads[2] = {vf::zero(), vf::zero()};
    for (int i = 0; i < whole; i += 2 * vf::width)
      for (int j = 0; j < 2; ++j) {
        const vf value = vf::load(base + i + j * vf::width);
        lows[j] = min(lows[j], value), highs[j] = max(highs[j], value);
        bads[j] = fma(value, vf::zero(), bads[j]);  // NaN once anything is NaN or infinite
      }
    high = max(highs[0], highs[1]).max(), bad = (bads[0] + bads[1]).sum();
    low = -((vf::zero() - min(lows[0], lows[1])).max());
  }
  for (int i = whole; i < width; ++i) low = std::min(low, base[i]), high = std::max(high, base[i]), bad += base[i] * 0.0f;
  const float range = high - low, top = static_cast<float>(q.top());
  if (bad != 0.0f || !(range <= std::numeric_limits<float>::max()))
    return {std::numeric_limits<float>::quiet_NaN(), 0.0f, 0.0f};
  const float inverse = range > 0.0f ? top / range : 0.0f;
  if (!(inverse > 0.0f && inverse <= std::numeric_limits<float>::max())) return {0.0f, low, 0.0f};
  return {range / top, low, inverse};
}

void round_row(const Quik& q, float* base, const Range& range, int row, const Rows& to) {
  const int padded = to.chunks * kChunk, gap = padded - q.base.width;
  std::fill(base + q.base.width, base + padded, range.zero);
  std::int32_t sum = 0;
  if (range.inverse > 0.0f) {
    for (int c = 0; c < to.chunks; ++c) sum += round_chunk(q, base + c * kChunk, range, to.word(row, c));
  } else {
    std::fill(base, base + padded, 0.0f);
    const Range flat{0.0f, 0.0f, 0.0f};
    for (int c = 0; c < to.chunks; ++c) sum += round_chunk(q, base + c * kChunk, flat, to.word(row, c));
  }
  to.sum[row] = sum + gap * q.half();
  to.scale[row] = range.scale, to.zero[row] = range.zero;
}

Rows allocate(const Quik& q, int rows) {
  const std::size_t padded = (static_cast<std::size_t>(rows) + kTall - 1) / kTall * kTall;
  const std::size_t words = padded * q.base.chunks * q.words();
  float* memory = scratch<0>(words + padded * (3 + q.outliers));
  Rows all;
  all.x = reinterpret_cast<std::int32_t*>(memory), all.sum = all.x + words;
  all.scale = memory + words + padded, all.zero = all.scale + padded, all.outlier = all.zero + padded;
  all.chunks = q.base.chunks, all.words = q.words();
  return all;
}

Rows quantize(const Quik& q, const float* x, std::ptrdiff_t ldx, int rows, bool parallel) {
  count_quantization();
  const Rows all = allocate(q, rows);
  const std::size_t room = static_cast<std::size_t>(all.chunks) * kChunk + 8;
#pragma omp parallel for schedule(static) if (parallel && rows > 8)
  for (int r = 0; r < rows; ++r) {
    float* base = scratch<1>(room);
    split_row(q, x + r * ldx, base, all.outlier + static_cast<std::size_t>(r) * q.outliers);
    round_row(q, base, range_of(q, base), r, all);
  }
  return all;
}

void count_quantization() { count.fetch_add(1, std::memory_order_relaxed); }
std::int64_t quantizations() { return count.load(std::memory_order_relaxed); }

}  // namespace hasten::quik
