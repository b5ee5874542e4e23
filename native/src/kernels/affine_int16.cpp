// Activations rounded to 16 bits, one float32 scale per row, against codes of 4, 5, 6 and 8 bits: two integer products per
// 32 bits and instruction, for any number of rows. The rounding is finer than bfloat16's: its error is at most
// max |x| / 65534 per activation, so at most sqrt(inputs) / 65534 of a row's norm.
#include "affine_int16.h"

namespace hasten::affine {
namespace {

template <int U>
void run_bits(const Affine& a, const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy) {
  switch (a.bits) {
    case 4: return run<Int16, 4, U>(a, x, ldx, rows, y, ldy);
    case 5: return run<Int16, 5, U>(a, x, ldx, rows, y, ldy);
    case 6: return run<Int16, 6, U>(a, x, ldx, rows, y, ldy);
    default: return run<Int16, 8, U>(a, x, ldx, rows, y, ldy);
  }
}

}  // namespace

void rounded_int16(const Affine& a, const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy) {
  if (a.halves % 2 == 0) run_bits<1>(a, x, ldx, rows, y, ldy);
  else run_bits<2>(a, x, ldx, rows, y, ldy);
}

}  // namespace hasten::affine
