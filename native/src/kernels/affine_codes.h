// Group-quantised weights, w = scale * code + low, and how their codes lie in memory.
//
// Codes of B bits are packed in blocks of 16 outputs and chunks of 32 inputs: B words of 32 bits per output, the 16 outputs
// side by side, [blocks][chunks][B][16]. A word holds 32 / B codes of consecutive inputs from its low end up. 3 bits leave
// the top two bits of every word free: the last input of each half chunk is put together from those. 5 and 6 bits keep
// their low four bits as 4 bit codes lie, and the others in one or two words more: so every width is dense.
// For float32 activations, cutting a code out of a word takes one AND: a code at bit p reads as code * 2^p, and the
// activation it meets has been multiplied by 2^-p (both exact).
#pragma once

#include <bit>
#include <utility>
#include <vector>

#include "dense_tile.h"
#include "packed.h"

namespace hasten::affine {

constexpr int kBlock = dense::kBlock;
constexpr int kChunk = 32;
constexpr int kHalf = 16;  // groups begin and end at multiples of this
// Words fetched ahead where codes are multiplied as fast as they come from memory: the processor's own prefetcher stays
// too close.
constexpr int kAhead = 512;

// A vector of as many 32-bit integers as vf has floats. N: bits to the right, to the left if negative.
#if defined(__AVX512F__)
struct vi {
  __m512i v;
  static vi zero() { return {_mm512_setzero_si512()}; }
  static vi set(std::int32_t x) { return {_mm512_set1_epi32(x)}; }
  static vi load(const std::uint32_t* p) { return {_mm512_loadu_si512(p)}; }
  void store(std::uint32_t* p) const { _mm512_storeu_si512(p, v); }
  template <std::uint32_t M> vi mask() const { return {_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(M)))}; }
  template <int N> vi shift() const {
    if constexpr (N < 0) return {_mm512_slli_epi32(v, -N)};
    else return {_mm512_srli_epi32(v, N)};
  }
  template <int N> vi shift_halves() const { return {_mm512_srli_epi16(v, N)}; }
  vf to_float() const { return {_mm512_cvtepi32_ps(v)}; }
};
inline vi operator|(vi a, vi b) { return {_mm512_or_si512(a.v, b.v)}; }
// The products of both int16 halves of a and b, added to acc.
inline vi dot_pairs(vi a, vi b) { return {_mm512_madd_epi16(a.v, b.v)}; }
inline vi dot_pairs(vi acc, vi a, vi b) { return {_mm512_dpwssd_epi32(acc.v, a.v, b.v)}; }
#elif defined(__AVX2__)
struct vi {
  __m256i v;
  static vi zero() { return {_mm256_setzero_si256()}; }
  static vi set(std::int32_t x) { return {_mm256_set1_epi32(x)}; }
  static vi load(const std::uint32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
  void store(std::uint32_t* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  template <std::uint32_t M> vi mask() const { return {_mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(M)))}; }
  template <int N> vi shift() const {
    if constexpr (N < 0) return {_mm256_slli_epi32(v, -N)};
    else return {_mm256_srli_epi32(v, N)};
  }
  template <int N> vi shift_halves() const { return {_mm256_srli_epi16(v, N)}; }
  vf to_float() const { return {_mm256_cvtepi32_ps(v)}; }
};
inline vi operator|(vi a, vi b) { return {_mm256_or_si256(a.v, b.v)}; }
inline vi dot_pairs(vi a, vi b) { return {_mm256_madd_epi16(a.v, b.v)}; }
inline vi dot_pairs(vi acc, vi a, vi b) { return {_mm256_add_epi32(acc.v, _mm256_madd_epi16(a.v, b.v))}; }
#else
struct vi {
  std::uint32_t v;
  static vi zero() { return {0}; }
  static vi set(std::int32_t x) { return {static_cast<std::uint32_t>(x)}; }
  static vi load(const std::uint32_t* p) { return {*p}; }
  void store(std::uint32_t* p) const { *p = v; }
  template <std::uint32_t M> vi mask() const { return {v & M}; }
  template <int N> vi shift() const {
    if constexpr (N < 0) return {v << -N};
    else return {v >> N};
  }
  template <int N> vi shift_halves() const { return {v >> N & (0xffffu >> N) * 0x10001u}; }
  vf to_float() const { return {static_cast<float>(static_cast<std::int32_t>(v))}; }
};
inline vi operator|(vi a, vi b) { return {a.v | b.v}; }
inline vi dot_pairs(vi a, vi b) {
  const auto half = [](std::uint32_t x) { return static_cast<std::int32_t>(static_cast<std::int16_t>(x & 0xffffu)); };
  return {static_cast<std::uint32_t>(half(a.v) * half(b.v) + half(a.v >> 16) * half(b.v >> 16))};
}
inline vi dot_pairs(vi acc, vi a, vi b) { return {acc.v + dot_pairs(a, b).v}; }
#endif

// A code, or a part of one: `bits` bits from `bit` of a word on. Column C (0..31) of a chunk has one or two, lowest first.
struct Piece { int word, bit, bits; };

template <int B>
struct Place {
  static constexpr bool planes = B == 5 || B == 6;  // four low bits, and the others elsewhere
  static constexpr bool split(int c) { return planes || (B == 3 && c % kHalf == kHalf - 1); }
  static constexpr int pieces(int c) { return split(c) ? 2 : 1; }
  static constexpr Piece piece(int c, int i) {
    if (planes) {
      if (i == 0) return {c / 8, c % 8 * 4, 4};
      // Byte k of the words beyond the fourth holds the high bits of nibble pair k of each word, words from the low end up.
      const int place = (c / 8 * 2 + c % 2) * (B - 4);
      return {4 + place / 8, c % 8 / 2 * 8 + place % 8, B - 4};
    }
    if (split(c)) return i == 0 ? Piece{c / kHalf, 30, 2} : Piece{2, 30 + c / kHalf, 1};
    const int index = B == 3 ? c - c / kHalf : c;
    return {index / (32 / B), index % (32 / B) * B, B};
  }
  // The power of two by which `code` comes out too large.
  static constexpr int excess(int c) { return split(c) || piece(c, 0).bit + B == 32 ? 0 : piece(c, 0).bit; }
};

// Piece I of column C moved to its place in the code.
template <int B, int C, int I>
inline vi part(const std::uint32_t* words) {
  constexpr Piece p = Place<B>::piece(C, I);
  constexpr int to = I == 0 ? 0 : Place<B>::piece(C, 0).bits;
  const vi word = vi::load(words + p.word * kBlock);
  if constexpr (p.bit + p.bits == 32 && to == 0) return word.template shift<p.bit>();
  else return word.template shift<p.bit - to>().template mask<((1u << p.bits) - 1) << to>();
}

// The codes of column C for vf::width outputs, times 2^excess(C). words: the chunk, moved on to the first of the outputs.
template <int B, int C>
inline vi code(const std::uint32_t* words) {
  using P = Place<B>;
  if constexpr (P::split(C)) {
    return part<B, C, 0>(words) | part<B, C, 1>(words);
  } else {
    constexpr Piece p = P::piece(C, 0);
    const vi word = vi::load(words + p.word * kBlock);
    if constexpr (p.bit + B == 32) return word.template shift<p.bit>();
    else return word.template mask<((1u << B) - 1) << p.bit>();
  }
}

// The same as plain integers.
template <int B, int C>
inline vi plain_code(const std::uint32_t* words) {
  constexpr int excess = Place<B>::excess(C);
  const vi value = code<B, C>(words);
  if constexpr (excess > 0) return value.template shift<excess>();
  else return value;
}

// How a number per group is stored: float16 | float32 | int8 times a float16 per several groups | (lows only) the same
// multiple of the scale everywhere | a multiple of the scale, uint8.
enum class Kind { half, single, nested, offset, zero };

// What activations are rounded to: nothing | 8 bits, a scale per chunk | 16 bits, a scale per row.
enum class Rounding { none, int8, int16 };

struct Affine final : Packed {
  int bits = 0;
  int width = 0;   // stored columns: the inputs, in another order or with gaps if `column` says so
  int chunks = 0;  // of 32 columns; what fills up the last one has code 0
  int halves = 0;  // half chunks per group
  int groups = 0;  // of all chunks
  int nest = 1;    // groups per outer number
  Kind scale_kind = Kind::half, low_kind = Kind::half;
  const std::uint32_t* words = nullptr;         // [blocks][chunks][bits][16]
  const void *scale = nullptr, *low = nullptr;  // [blocks][groups][16]; low is -multiple * scale for offset and zero
  const std::uint16_t *outer_scale = nullptr, *outer_low = nullptr;  // nested: [blocks][ceil(groups / nest)][16]
  float offset = 0;
  Rounding rounding = Rounding::none;
  const float* bias = nullptr;           // padded to whole blocks
  const std::int32_t* column = nullptr;  // the input that each stored column multiplies (-1: none), or null: in order

  int blocks() const { return (outputs + kBlock - 1) / kBlock; }
  const std::uint32_t* block_words(int block) const {
    return words + static_cast<std::size_t>(block) * chunks * bits * kBlock;
  }
  // Scales and lows of `count` groups of a block as float32 [count][16].
  void expand(int block, int first, int count, float* scale, float* low) const;
  void forward(const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy) const override;
  bool row(int output, float* to) const override;
};

// Few rows: codes are multiplied as they are cut out of their words.
constexpr int kDirect = 12;
void direct(const Affine& a, const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy);
// Activations rounded to 8 bits, codes of 4 bits, groups of whole chunks; any number of rows.
void rounded_int8(const Affine& a, const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy);
// Activations rounded to 16 bits, codes of 4, 5, 6 or 8 bits; any number of rows.
void rounded_int16(const Affine& a, const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy);
// Copies a row of inputs into stored order; what `column` leaves out becomes 0.
void gather(const Affine& a, const float* from, float* to);

// Scratch memory of the calling thread, grown when needed. Slot: an own one per use that overlaps with another.
template <int Slot>
float* scratch(std::size_t count) {
  static thread_local std::vector<float> memory;
  if (memory.size() < count) memory.resize(count);
  return memory.data();
}

}  // namespace hasten::affine
