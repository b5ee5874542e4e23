// Activations rounded to 8 bits, one float32 scale per 32 of them, against 4 bit codes: four integer products per 32 bits
// and instruction, for any number of rows. Groups are whole chunks here.
#include "affine_int8.h"

namespace hasten::affine {

void rounded_int8(const Affine& a, const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy) {
  run<Int8, 4, 1>(a, x, ldx, rows, y, ldy);
}

}  // namespace hasten::affine
