// MARLIN layers (arXiv 2408.11743): symmetric 4 bit codes, optionally 2:4 sparse, for a handful of rows up to many.
//
// A work item is a panel of up to 256 inputs of one block of 16 outputs, for one sub-problem of up to 96 rows. Items are
// ordered down the columns (a column: one block of one sub-problem; panels fastest) and cut into equal stripes, one per
// thread. Weights of a stripe are one run of memory. A stripe that starts inside a column leaves its sums in a buffer
// of its own, and the caller adds them to what the stripe with the column's beginning has written, in the order of stripes.
//
// Dense codes lie as 4 bit codes do in affine_codes.h. Of 2:4 sparse ones, two of four consecutive inputs are kept: three
// words per output and chunk of 32 inputs, nibble q of word n being the n-th code kept of the q-th four inputs, and
// bits [4 q + 2 n, 4 q + 2 n + 2) of the third word its place among the four.
#pragma once

#include <omp.h>

#include "affine_rounded.h"

namespace hasten::marlin {

using namespace affine;

constexpr int kRowsOfSub = 96;     // rows of a sub-problem; a multiple of every tile height
constexpr int kSubUnit = 24;       // sub-problems begin at multiples of this, as tiles do
constexpr int kPanel = 8;          // chunks of a work item at most; whole groups
constexpr float kZero = 8.0f;      // the code of weight 0
constexpr int kSparseWords = 3;

// Panels [first, last) of one column.
struct Segment {
  std::int64_t column;
  int first, last;
};

// First of the items of stripe s; stripes differ by at most one item.
inline std::int64_t stripe_begin(std::int64_t items, int stripes, int s) { return items * s / stripes; }

// f(Segment) for the items of stripe s, in their order.
template <typename F>
void each_segment(std::int64_t columns, int panels, int stripes, int s, F f) {
  const std::int64_t items = columns * panels, end = stripe_begin(items, stripes, s + 1);
  for (std::int64_t i = stripe_begin(items, stripes, s); i < end;) {
    const int first = static_cast<int>(i % panels);
    const int last = static_cast<int>(std::min<std::int64_t>(panels, first + end - i));
    f(Segment{i / panels, first, last});
    i += last - first;
  }
}

struct Marlin final : Packed {
  Affine w;             // sparse: bits = 3 words per output and chunk, which is all that `bits` means then
  bool sparse = false;
  int panel = kPanel;   // chunks of a work item

  bool per_column() const { return w.groups == 1; }
  int panels() const { return (w.chunks + panel - 1) / panel; }
  // Chunks whose sums are scaled together; a panel holds whole units.
  int unit() const { return per_column() ? panel : w.halves / 2; }
  int units() const { return (w.chunks + unit() - 1) / unit(); }
  int panel_end(int p) const { return std::min(w.chunks, (p + 1) * panel); }
  const std::uint32_t* words(int block, int p) const {
    return w.block_words(block) + static_cast<std::size_t>(p) * panel * w.bits * kBlock;
  }
  // Scales and lows of the units of a panel, [units][16]. Scales of whole columns are left to `column_scale`.
  void expand(int block, int p, float* scale, float* low) const {
    if (per_column()) {
      std::fill(scale, scale + kBlock, 1.0f);
      std::fill(low, low + kBlock, -kZero);
    } else {
      const int first = p * panel / unit();
      w.expand(block, first, (panel_end(p) + unit() - 1) / unit() - first, scale, low);
    }
  }
  // What sums of a column are multiplied by at the end, [16].
  void column_scale(int block, float* scale) const {
    float low[kBlock];
    if (per_column()) w.expand(block, 0, 1, scale, low);
    else std::fill(scale, scale + kBlock, 1.0f);
  }
  const float* bias(int block, bool owner) const {
    return owner && w.bias != nullptr ? w.bias + block * kBlock : dense::zeros();
  }

  void forward(const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy) const override;
};

// Rows [first, first + rows) and outputs of one block.
struct Column {
  int first, rows, block;
};

// column(c, panel_begin, panel_end, owner, to, ld): to[c.rows][16] = what these panels add up to, bias included if owner.
template <typename F>
void striped(const Marlin& m, int rows, float* y, std::ptrdiff_t ldy, F column) {
  int subs = (rows + kRowsOfSub - 1) / kRowsOfSub;
  const int height = ((rows + subs - 1) / subs + kSubUnit - 1) / kSubUnit * kSubUnit;
  subs = (rows + height - 1) / height;
  const int blocks = m.w.blocks(), panels = m.panels();
  const std::int64_t columns = static_cast<std::int64_t>(subs) * blocks, items = columns * panels;
  // As many stripes whatever the rows, so that a row's sums do not depend on its company.
  const int stripes = omp_get_max_threads();
  constexpr std::size_t side = kRowsOfSub * kBlock;
  float* partial = scratch<4>(stripes * side);
  const auto place = [&](std::int64_t index) {
    const int first = static_cast<int>(index / blocks) * height;
    return Column{first, std::min(height, rows - first), static_cast<int>(index % blocks)};
  };
  const bool parallel = stripes > 1 && worth_threads(rows, m.inputs, m.outputs);
#pragma omp parallel for schedule(static, 1) if (parallel)
  for (int s = 0; s < stripes; ++s) {
    each_segment(columns, panels, stripes, s, [&](Segment g) {
      const Column c = place(g.column);
      float* out = y + c.first * ldy + c.block * kBlock;
      const int valid = std::min(kBlock, m.outputs - c.block * kBlock);
      const bool owner = g.first == 0, direct = owner && valid == kBlock;
      float* to = direct ? out : owner ? scratch<5>(side) : partial + s * side;
      column(c, g.first, g.last, owner, to, direct ? ldy : kBlock);
      if (owner && !direct)
        for (int r = 0; r < c.rows; ++r) std::memcpy(out + r * ldy, to + r * kBlock, valid * sizeof(float));
    });
  }
  for (int s = 1; s < stripes; ++s) {
    const std::int64_t begin = stripe_begin(items, stripes, s);
    if (begin % panels == 0 || begin == stripe_begin(items, stripes, s + 1)) continue;
    const Column c = place(begin / panels);
    const int valid = std::min(kBlock, m.outputs - c.block * kBlock);
    for (int r = 0; r < c.rows; ++r) {
      float* out = y + (c.first + r) * ldy + c.block * kBlock;
      const float* from = partial + s * side + r * kBlock;
      for (int i = 0; i < valid; ++i) out[i] += from[i];
    }
  }
}

// to[rows][16] = total * column scale * row scale + bias. row_scale: null for 1.
inline void finish(const Marlin& m, const Column& c, bool owner, const float* total, const float* row_scale, float* to,
                   std::ptrdiff_t ld) {
  float scale[kBlock];
  m.column_scale(c.block, scale);
  const float* bias = m.bias(c.block, owner);
  for (int r = 0; r < c.rows; ++r)
    for (int i = 0; i < kBlock; i += vf::width) {
      const vf factor = vf::load(scale + i) * vf::set(row_scale != nullptr ? row_scale[r] : 1.0f);
      fma(factor, vf::load(total + r * kBlock + i), vf::load(bias + i)).store(to + r * ld + i);
    }
}

// The products by what activations are rounded to.
void exact(const Marlin& m, const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy);
void rounded(const Marlin& m, const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy);

}  // namespace hasten::marlin
