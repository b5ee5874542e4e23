// Linear layers whose weights and inputs are both rounded to 4 (or 8) bits, but for a few outlier features (QUIK, Ashkboos
// et al., arXiv 2310.09259, sections 3.1-3.3 and appendix on kernels).
//
// With base features I and outlier features O, weights s_n q_w (one scale per output n) and inputs s_t (q_x + half) + z_t
// (one scale and offset per row t):
//   y[t,n] = s_t s_n sum_I q_x q_w + (z_t + half s_t) wred[n] + sum_O x w + bias,   wred[n] = s_n sum_I q_w
// Weight codes are stored as q_w + half (0..15 or 0..255) in the words of affine_codes.h: unsigned bytes meet the signed
// bytes of the inputs, and half times a row's sum of q_x comes off the integer sum.
// Stages: (a) one pass over a row splits it, finds its range, rounds and lays out its codes; (b) the product of the
// outliers starts the output; (c) integer product; (d) its scaling onto the output, a tile of rows x 16 outputs at a time.
#pragma once

#include "affine_rounded.h"

namespace hasten::quik {

using affine::kBlock;
using affine::kChunk;

constexpr int kTall = 4;    // rows multiplied at once
constexpr int kRows = 128;  // rows of a task

// 32-bit words that the inputs of a chunk take up in the order in which weight codes meet them. Without VNNI, products of
// 8 by 8 bits do not fit the 16-bit sums of vpmaddubsw: those inputs are widened to 16 bits.
constexpr int words_of(int bits) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return bits == 8 ? 16 : 8;
#else
  (void)bits;
  return 8;
#endif
}

struct Span { int from, to, count; };  // neighbouring base features: inputs from.., stored columns to..

struct Quik final : Packed {
  affine::Affine base;  // the codes as a weight-only layer; its `column` lists the base features, its bias is the layer's
  int bits = 4, outliers = 0;
  int min_rows = 0;                           // fewer rows are not rounded
  const float *scale = nullptr, *wred = nullptr;  // [blocks * 16]
  const std::int32_t* outlier = nullptr;          // [outliers], ascending
  const std::uint16_t* outlier_weight = nullptr;  // bfloat16 [blocks][outliers][16]
  std::vector<Span> spans;

  int half() const { return 1 << (bits - 1); }
  int top() const { return (1 << bits) - 1; }
  int words() const { return words_of(bits); }
  const std::uint16_t* outlier_block(int block) const {
    return outlier_weight + static_cast<std::size_t>(block) * outliers * kBlock;
  }
  const float* bias_block(int block) const {
    return base.bias != nullptr ? base.bias + block * kBlock : dense::zeros();
  }
  void forward(const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy) const override;
};

// Rounded inputs, computed once per input whatever number of outputs reads them.
struct Rows {
  std::int32_t* x = nullptr;    // [tiles][chunks][kTall][words]; what fills up a chunk has code -half
  std::int32_t* sum = nullptr;  // [rows] of q_x over the base features
  float *scale = nullptr, *zero = nullptr;  // [rows]
  float* outlier = nullptr;                 // [rows][outliers]
  int chunks = 0, words = 0;

  std::int32_t* word(int row, int chunk) const {
    return x + ((static_cast<std::ptrdiff_t>(row / kTall) * chunks + chunk) * kTall + row % kTall) * words;
  }
};

// s_t, z_t and 1 / s_t of a row. NaN or infinity in it, or a range beyond float32, make the scale NaN, and with it every
// output; a range too small to divide by is taken as 0.
struct Range { float scale, zero, inverse; };

// Base features of a row in stored order to base[chunks * 32], outliers to outlier[outliers].
void split_row(const Quik& q, const float* row, float* base, float* outlier);
Range range_of(const Quik& q, const float* base);
// Codes and their sum. What follows the base features in `base` is overwritten.
void round_row(const Quik& q, float* base, const Range& range, int row, const Rows& to);
// Stage (a) of all rows in memory of the calling thread; counted.
Rows quantize(const Quik& q, const float* x, std::ptrdiff_t ldx, int rows, bool parallel);
// The same memory, empty.
Rows allocate(const Quik& q, int rows);
void count_quantization();
std::int64_t quantizations();
// Column of a chunk -> where its code lies among the 32 of `word` (bytes, or 16 bits if words() is 16).
int place_of(const Quik& q, int column);

// Stage (c) for a block and rows [begin, end): sums q_x q_w to total[end - begin][16].
void accumulate(const Quik& q, const Rows& all, int block, int begin, int end, std::uint32_t* total);
// Stage (d): y = init + s_t s_n total + (z_t + half s_t) wred. y may be init; ldinit may be 0.
void rescale(const Quik& q, const Rows& all, int block, int begin, int end, const std::uint32_t* total,
             const float* init, std::ptrdiff_t ldinit, float* y, std::ptrdiff_t ldy);
// All stages, fused.
void multiply(const Quik& q, const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy);

// Scratch memory of the calling thread, grown when needed. Slot: an own one per use that overlaps with another.
template <int Slot>
float* scratch(std::size_t count) {
  static thread_local std::vector<float> memory;
  if (memory.size() < count) memory.resize(count);
  return memory.data();
}

const Quik& unwrap_quik(const nb::capsule& handle);

}  // namespace hasten::quik
