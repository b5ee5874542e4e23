// Group-quantised weights, w = scale * code + low, and how their codes lie in memory.
//
// Codes of B bits are packed in blocks of 16 outputs and chunks of 32 inputs: B words of 32 bits per output, the 16 outputs
// side by side, [blocks][chunks][B][16]. A word holds 32 / B codes of consecutive inputs from its low end up. 3, 5 and
// 6 bits leave the top two bits of every word free: the last input of each half chunk is put together from those,
// so that every width is dense. Cutting a code out takes one AND: a code at bit p reads as code * 2^p, and the
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

// A vector of as many 32-bit integers as vf has floats.
#if defined(__AVX512F__)
struct vi {
  __m512i v;
  static vi load(const std::uint32_t* p) { return {_mm512_loadu_si512(p)}; }
  template <std::uint32_t M> vi mask() const { return {_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(M)))}; }
  template <int N> vi shift() const { return {_mm512_srli_epi32(v, N)}; }
  vf to_float() const { return {_mm512_cvtepi32_ps(v)}; }
};
inline vi operator|(vi a, vi b) { return {_mm512_or_si512(a.v, b.v)}; }
#elif defined(__AVX2__)
struct vi {
  __m256i v;
  static vi load(const std::uint32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
  template <std::uint32_t M> vi mask() const { return {_mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(M)))}; }
  template <int N> vi shift() const { return {_mm256_srli_epi32(v, N)}; }
  vf to_float() const { return {_mm256_cvtepi32_ps(v)}; }
};
inline vi operator|(vi a, vi b) { return {_mm256_or_si256(a.v, b.v)}; }
#else
struct vi {
  std::uint32_t v;
  static vi load(const std::uint32_t* p) { return {*p}; }
  template <std::uint32_t M> vi mask() const { return {v & M}; }
  template <int N> vi shift() const { return {v >> N}; }
  vf to_float() const { return {static_cast<float>(static_cast<std::int32_t>(v))}; }
};
inline vi operator|(vi a, vi b) { return {a.v | b.v}; }
#endif

// Where the code of column C (0..31 of a chunk) lies when codes have B bits.
template <int B>
struct Place {
  static constexpr int per_word = 32 / B;
  static constexpr bool spare = per_word * B != 32;
  static constexpr std::uint32_t top = (1u << B) - 1;
  static constexpr bool split(int c) { return spare && c % kHalf == kHalf - 1; }
  static constexpr int index(int c) { return spare ? c - c / kHalf : c; }
  static constexpr int word(int c) { return index(c) / per_word; }
  static constexpr int bit(int c) { return index(c) % per_word * B; }
  // The power of two by which `code` comes out too large.
  static constexpr int excess(int c) { return split(c) || bit(c) + B == 32 ? 0 : bit(c); }
};

// The split code of half H: pieces (word, lowest bit, count of bits), lowest first.
struct Piece { int word, bit, bits; };
template <int B>
constexpr Piece piece(int half, int i) {
  // Two spare bits per word: 3 bits need words 0 | 1 and half of word 2; 5 bits words 0, 1 | 2, 3 and half of 4; 6 bits
  // words 0, 1, 2 | 3, 4, 5.
  constexpr int whole = B / 2;
  if (i < whole) return {half * whole + i, 30, 2};
  return {B - 1, 30 + half, 1};
}
template <int B>
constexpr int pieces = (B + 1) / 2;

template <int B, int H, int I = 0>
inline vi split_code(const std::uint32_t* words) {
  constexpr Piece p = piece<B>(H, I);
  vi part = vi::load(words + p.word * kBlock);
  if constexpr (p.bit - 2 * I >= 0 && p.bit + p.bits == 32 && I == 0) {
    part = part.template shift<p.bit>();
  } else {
    part = part.template shift<p.bit - 2 * I>().template mask<((1u << p.bits) - 1) << (2 * I)>();
  }
  if constexpr (I + 1 < pieces<B>) part = part | split_code<B, H, I + 1>(words);
  return part;
}

// The codes of column C for vf::width outputs, times 2^excess(C). words: the chunk, moved on to the first of the outputs.
template <int B, int C>
inline vi code(const std::uint32_t* words) {
  using P = Place<B>;
  if constexpr (P::split(C)) {
    return split_code<B, C / kHalf>(words);
  } else {
    const vi word = vi::load(words + P::word(C) * kBlock);
    if constexpr (P::bit(C) + B == 32) return word.template shift<P::bit(C)>();
    else return word.template mask<P::top << P::bit(C)>();
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
  bool rounded = false;  // activations to 8 bits
  const float* bias = nullptr;           // padded to whole blocks
  const std::int32_t* column = nullptr;  // the input that each stored column multiplies (-1: none), or null: in order

  int blocks() const { return (outputs + kBlock - 1) / kBlock; }
  const std::uint32_t* block_words(int block) const {
    return words + static_cast<std::size_t>(block) * chunks * bits * kBlock;
  }
  // Scales and lows of a block as float32 [groups][16].
  void expand(int block, float* scale, float* low) const;
  void forward(const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy) const override;
};

// Few rows: codes are multiplied as they are cut out of their words.
constexpr int kDirect = 12;
void direct(const Affine& a, const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy);
// Activations rounded to 8 bits, codes of 4 or 8 bits, groups of whole chunks; any number of rows.
void rounded(const Affine& a, const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy);
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
