// Activations rounded to 16 or 8 bits against dense MARLIN codes: the integer products of affine_rounded.h, in stripes.
#include "affine_int16.h"
#include "affine_int8.h"
#include "marlin.h"

namespace hasten::marlin {
namespace {

constexpr int kFew = 2 * kTall;  // rows that cut codes out of their words themselves; more share spread codes

template <typename Form>
void run(const Marlin& m, const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy) {
  const Affine& w = m.w;
  const affine::Rows all =
      affine::prepare<Form>(w, x, ldx, rows, w.chunks, worth_threads(rows, m.inputs, m.outputs));
  striped(m, rows, y, ldy, [&](const Column& c, int first, int last, bool owner, float* to, std::ptrdiff_t ld) {
    constexpr int side = kPanel * kBlock;
    float* scale = scratch<7>(2 * side + kRowsOfSub * kBlock + kPanel * Form::kWords * kBlock);
    float *low = scale + side, *total = low + side;
    auto* codes = reinterpret_cast<std::uint32_t*>(total + kRowsOfSub * kBlock);
    std::fill(total, total + c.rows * kBlock, 0.0f);
    const bool few = c.rows <= kFew;
    for (int p = first; p < last; ++p) {
      const int begin = p * m.panel, chunks = m.panel_end(p) - begin;
      const std::uint32_t* words = m.words(c.block, p);
      m.expand(c.block, p, scale, low);
      if (!few) affine::spread<Form, 4>(words, chunks, codes);
      for (int r = 0; r < c.rows; r += kTall) {
        const int row = c.first + r, count = std::min(kTall, c.rows - r);
        const affine::Run part{few ? words : codes, all.word(row, begin), all.sum + all.at(row, begin, all.units),
                               Form::kChunkScales ? all.chunk_scale + all.at(row, begin, w.chunks) : nullptr,
                               scale, low, chunks, m.unit(), m.unit()};
        if (few) affine::multiply_of<Form, 4, 1>(count)(part, total + r * kBlock);
        else affine::multiply_of<Form, affine::kSpread, 1>(count)(part, total + r * kBlock);
      }
    }
    finish(m, c, owner, total, Form::kChunkScales ? nullptr : all.scale + c.first, to, ld);
  });
}

}  // namespace

void rounded(const Marlin& m, const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy) {
  if (m.w.rounding == Rounding::int8) run<affine::Int8>(m, x, ldx, rows, y, ldy);
  else run<affine::Int16>(m, x, ldx, rows, y, ldy);
}

}  // namespace hasten::marlin
