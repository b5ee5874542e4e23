// Dense layers: y = x W^T + bias with weights packed in blocks of 16 outputs, [blocks][inputs][16], float32 or bfloat16.
// A block streams linearly and needs no horizontal sums. See hasten/kernels/dense.py.
#include "dense_tile.h"

namespace hasten {
namespace {

using Address = std::uintptr_t;

template <typename W>
void run(const float* x, const W* w, const float* bias, float* y, int rows, int ldx, int inputs, int outputs, int ldy) {
  // Below some ten microseconds of work, waking the other threads costs more than it saves.
  const bool parallel = static_cast<double>(rows + 1) * inputs * outputs > 1e5;
  dense::product(x, ldx, rows, inputs, outputs, bias, y, ldy, parallel, [=](int b, int k, int) {
    return w + (static_cast<std::size_t>(b) * inputs + k) * dense::kBlock;
  });
}

// Addresses come from the Python face, which has checked them.
void dense_linear(Address x, Address w, Address bias, Address y, int rows, int ldx, int inputs, int outputs, int ldy,
                  bool bf16) {
  nb::gil_scoped_release release;
  const float* input = reinterpret_cast<const float*>(x);
  const float* b = reinterpret_cast<const float*>(bias);
  float* out = reinterpret_cast<float*>(y);
  if (bf16)
    run(input, reinterpret_cast<const std::uint16_t*>(w), b, out, rows, ldx, inputs, outputs, ldy);
  else
    run(input, reinterpret_cast<const float*>(w), b, out, rows, ldx, inputs, outputs, ldy);
}

HASTEN_KERNELS(m) { m.def("dense_linear", &dense_linear); }

}  // namespace
}  // namespace hasten
