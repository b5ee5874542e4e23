// Activations rounded to 8 bits, one float32 scale per 32 of them, against 4 and 8 bit codes: integer products, so several
// times the multiplications per instruction, for any number of rows. The result is that of the rounded activations with
// the dequantised weight. Groups are whole chunks here.
#include <cmath>
#include <limits>

#include "affine_codes.h"

namespace hasten::affine {
namespace {

constexpr int kTall = 4;    // rows at once
constexpr int kRows = 128;  // rows of a task
constexpr int kWords = 8;   // 32-bit words of a chunk's activations

// Tiles of kTall rows: a chunk of all rows of a tile lies together, so that addresses within it are constants.
struct Rows {
  std::int32_t* x;    // [tiles][chunks][kTall][8], bytes in the order in which words of codes meet them
  float* scale;       // [tiles][chunks][kTall]
  std::int32_t* sum;  // [tiles][chunks][kTall] of the rounded activations
  float* group_sum;   // [tiles][groups][kTall] of the rounded activations, scaled
  int chunks, groups;

  // From `row` on; not the first one of a tile only while rows are filled in.
  Rows from(int row) const {
    const std::ptrdiff_t tile = row / kTall, inner = row % kTall, at = tile * chunks * kTall + inner;
    return {x + tile * chunks * kTall * kWords + inner * kWords, scale + at, sum + at,
            group_sum + tile * groups * kTall + inner, chunks, groups};
  }
};

// Bytes of a chunk in the kernel's order: a word of 4 bit codes splits into its even and its odd nibbles.
template <int B>
constexpr int position(int column) {
  return B == 8 ? column : column / 8 * 8 + column % 2 * 4 + column % 8 / 2;
}

// Rounds a chunk to x[32] in the kernel's order and returns its sum. value * inverse lies in [-127, 127].
template <int B>
std::int32_t round_chunk(const float* value, float inverse, std::int8_t* x) {
#if defined(__AVX2__)
  const __m256 factor = _mm256_set1_ps(inverse);
  __m256i part[4];
  for (int i = 0; i < 4; ++i) part[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(value + 8 * i), factor));
  // Packing works on 128-bit halves: the permutation puts the groups of four back in order.
  __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(part[0], part[1]), _mm256_packs_epi32(part[2], part[3]));
  bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  if constexpr (B == 4)
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
    x[position<B>(i)] = static_cast<std::int8_t>(q);
    sum += q;
  }
  return sum;
#endif
}

template <int B>
void round_row(const Affine& a, const float* from, const Rows& to) {
  for (int g = 0; g < a.groups; ++g) to.group_sum[g * kTall] = 0.0f;
  for (int c = 0; c < a.chunks; ++c) {
    const float* value = from + c * kChunk;
    auto* x = reinterpret_cast<std::int8_t*>(to.x + static_cast<std::ptrdiff_t>(c) * kTall * kWords);
    float& scale = to.scale[c * kTall];
    std::int32_t& sum = to.sum[c * kTall];
    vf top = vf::zero(), poison = vf::zero();
    for (int i = 0; i < kChunk; i += vf::width) {
      const vf v = vf::load(value + i);
      top = max(top, max(v, vf::zero() - v));
      poison = fma(v, vf::zero(), poison);  // NaN if anything is NaN or infinite
    }
    // Such numbers cannot be rounded; a NaN scale carries them into every output.
    const float most = top.max();
    const bool finite = poison.sum() == 0.0f;
    const bool any = finite && most > 0.0f && 127.0f / most <= std::numeric_limits<float>::max();
    scale = finite ? (any ? most / 127.0f : 0.0f) : std::numeric_limits<float>::quiet_NaN();
    if (any) {
      sum = round_chunk<B>(value, 127.0f / most, x);
    } else {
      sum = 0;
      std::fill(x, x + kChunk, std::int8_t{0});
    }
    to.group_sum[2 * c / a.halves * kTall] += scale * static_cast<float>(sum);
  }
}

template <int B>
Rows prepare(const Affine& a, const float* x, std::ptrdiff_t ldx, int rows, bool parallel) {
  const std::size_t padded = (static_cast<std::size_t>(rows) + kTall - 1) / kTall * kTall, chunks = padded * a.chunks;
  float* memory = scratch<2>(chunks * (kWords + 2) + padded * a.groups);
  float* scale = memory + chunks * kWords;
  const Rows all{reinterpret_cast<std::int32_t*>(memory), scale, reinterpret_cast<std::int32_t*>(scale + chunks),
                 scale + 2 * chunks, a.chunks, a.groups};
#pragma omp parallel for schedule(static) if (parallel && rows > 8)
  for (int r = 0; r < rows; ++r) {
    float* ordered = scratch<3>(static_cast<std::size_t>(a.chunks) * kChunk);
    gather(a, x + r * ldx, ordered);
    std::fill(ordered + a.width, ordered + a.chunks * kChunk, 0.0f);
    round_row<B>(a, ordered, all.from(r));
  }
  return all;
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// Keeps the compiler from collecting all products of a chunk before adding them up, which spills most of them.
inline void settle(__m256i& acc) {
#if defined(__GNUC__)
  asm("" : "+x"(acc));
#endif
}
#endif

// out[R]: sum over a chunk of code * activation for vf::width outputs, exact. words: the chunk, moved on to the first
// of the outputs. x: [kTall][8]; sum: [kTall].
#if defined(__AVX512F__)
template <int B, int R>
inline void chunk_dot(const std::uint32_t* words, const std::int32_t* x, const std::int32_t*, vf (&out)[R]) {
  const __m512i nibble = _mm512_set1_epi8(15);
  __m512i acc[R];
  for (int r = 0; r < R; ++r) acc[r] = _mm512_setzero_si512();
  for (int w = 0; w < B; ++w) {
    const __m512i word = _mm512_loadu_si512(words + w * kBlock);
    if constexpr (B == 8) {
      for (int r = 0; r < R; ++r) acc[r] = _mm512_dpbusd_epi32(acc[r], word, _mm512_set1_epi32(x[r * kWords + w]));
    } else {
      const __m512i even = _mm512_and_si512(word, nibble), odd = _mm512_and_si512(_mm512_srli_epi32(word, 4), nibble);
      for (int r = 0; r < R; ++r) {
        acc[r] = _mm512_dpbusd_epi32(acc[r], even, _mm512_set1_epi32(x[r * kWords + 2 * w]));
        acc[r] = _mm512_dpbusd_epi32(acc[r], odd, _mm512_set1_epi32(x[r * kWords + 2 * w + 1]));
      }
    }
  }
  for (int r = 0; r < R; ++r) out[r] = {_mm512_cvtepi32_ps(acc[r])};
}
#elif defined(__AVX2__)
template <int B, int R>
inline void chunk_dot(const std::uint32_t* words, const std::int32_t* x, const std::int32_t* sum, vf (&out)[R]) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i acc[R];
  for (int r = 0; r < R; ++r) acc[r] = _mm256_setzero_si256();
  if constexpr (B == 4) {
    // Two products of 15 * 127 per step and eight steps stay below 2^15.
    const __m256i nibble = _mm256_set1_epi8(15);
    for (int w = 0; w < 4; ++w) {
      const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + w * kBlock));
      const __m256i even = _mm256_and_si256(word, nibble), odd = _mm256_and_si256(_mm256_srli_epi32(word, 4), nibble);
      for (int r = 0; r < R; ++r) {
        const __m256i p = _mm256_maddubs_epi16(even, _mm256_set1_epi32(x[r * kWords + 2 * w]));
        const __m256i q = _mm256_maddubs_epi16(odd, _mm256_set1_epi32(x[r * kWords + 2 * w + 1]));
        acc[r] = _mm256_add_epi16(acc[r], _mm256_add_epi16(p, q));
        settle(acc[r]);
      }
    }
    for (int r = 0; r < R; ++r) out[r] = {_mm256_cvtepi32_ps(_mm256_madd_epi16(acc[r], ones))};
  } else {
    // code - 128 is signed: |code - 128| times the activation with its sign; two products of 128 * 127 stay below 2^15.
    const __m256i flip = _mm256_set1_epi8(-128);
    for (int w = 0; w < 8; ++w) {
      const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + w * kBlock));
      const __m256i code = _mm256_xor_si256(raw, flip), size = _mm256_abs_epi8(code);
      for (int r = 0; r < R; ++r) {
        const __m256i signed_x = _mm256_sign_epi8(_mm256_set1_epi32(x[r * kWords + w]), code);
        acc[r] = _mm256_add_epi32(acc[r], _mm256_madd_epi16(_mm256_maddubs_epi16(size, signed_x), ones));
        settle(acc[r]);
      }
    }
    for (int r = 0; r < R; ++r)
      out[r] = {_mm256_cvtepi32_ps(_mm256_add_epi32(acc[r], _mm256_set1_epi32(128 * sum[r])))};
  }
}
#else
template <int B, int R>
inline void chunk_dot(const std::uint32_t* words, const std::int32_t* x, const std::int32_t*, vf (&out)[R]) {
  for (int r = 0; r < R; ++r) {
    const auto* value = reinterpret_cast<const std::int8_t*>(x + r * kWords);
    std::int32_t acc = 0;
    for (int c = 0; c < kChunk; ++c) {
      const std::uint32_t word = words[c / (32 / B) * kBlock];
      acc += static_cast<std::int32_t>(word >> (c % (32 / B) * B) & ((1u << B) - 1)) * value[position<B>(c)];
    }
    out[r] = {static_cast<float>(acc)};
  }
}
#endif

template <int B, int R>
void block_rows(const Affine& a, const std::uint32_t* words, const Rows& rows, const float* scale, const float* low,
                const float* bias, float* y, std::ptrdiff_t ldy) {
  // One vector of outputs at a time when there are rows to share it: a second one would spill the broadcast activations.
  constexpr int V = vf::width >= 8 ? (R == 1 ? kBlock / vf::width : 1) : 8;
  const int per_group = a.halves / 2;
  for (int at = 0; at < kBlock; at += V * vf::width) {
    vf total[R][V], acc[R][V];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) total[r][v] = vf::load(bias + at + v * vf::width), acc[r][v] = vf::zero();
    int left = per_group, g = 0;
    for (int c = 0; c < rows.chunks; ++c) {
      for (int v = 0; v < V; ++v) {
        vf dot[R];
        chunk_dot<B, R>(words + static_cast<std::ptrdiff_t>(c) * B * kBlock + at + v * vf::width,
                        rows.x + static_cast<std::ptrdiff_t>(c) * kTall * kWords, rows.sum + c * kTall, dot);
        for (int r = 0; r < R; ++r) acc[r][v] = fma(vf::set(rows.scale[c * kTall + r]), dot[r], acc[r][v]);
      }
      if (--left > 0 && c + 1 < rows.chunks) continue;
      for (int v = 0; v < V; ++v) {
        const std::ptrdiff_t i = static_cast<std::ptrdiff_t>(g) * kBlock + at + v * vf::width;
        const vf s = vf::load(scale + i), m = vf::load(low + i);
        for (int r = 0; r < R; ++r) {
          total[r][v] = fma(s, acc[r][v], fma(m, vf::set(rows.group_sum[g * kTall + r]), total[r][v]));
          acc[r][v] = vf::zero();
        }
      }
      ++g, left = per_group;
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) total[r][v].store(y + r * ldy + at + v * vf::width);
  }
}

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
  const bool parallel = worth_threads(rows, a.inputs, a.outputs);
  const Rows all = prepare<B>(a, x, ldx, rows, parallel);
  const int blocks = a.blocks(), tasks = blocks * ((rows + kRows - 1) / kRows);
  const std::size_t side = static_cast<std::size_t>(a.groups) * kBlock;
#pragma omp parallel for schedule(static) if (parallel)
  for (int task = 0; task < tasks; ++task) {
    const int b = task % blocks, begin = task / blocks * kRows, end = std::min(rows, begin + kRows);
    float* scale = scratch<1>(2 * side);
    a.expand(b, 0, a.groups, scale, scale + side);
    const float* bias = a.bias != nullptr ? a.bias + b * kBlock : dense::zeros();
    const int valid = std::min(kBlock, a.outputs - b * kBlock);
    float edge[kTall * kBlock];
    const bool whole = valid == kBlock;
    for (int r = begin; r < end; r += kTall) {
      const int count = std::min(kTall, end - r);
      float* out = y + r * ldy + b * kBlock;
      table.at[count - 1](a, a.block_words(b), all.from(r), scale, scale + side, bias, whole ? out : edge,
                          whole ? ldy : kBlock);
      if (!whole)
        for (int i = 0; i < count; ++i) std::memcpy(out + i * ldy, edge + i * kBlock, valid * sizeof(float));
    }
  }
}

}  // namespace

void rounded_int8(const Affine& a, const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy) {
  if (a.bits == 4) run<4>(a, x, ldx, rows, y, ldy);
  else run<8>(a, x, ldx, rows, y, ldy);
}

}  // namespace hasten::affine
