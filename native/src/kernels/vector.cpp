// Elementwise float32 operations: exponential (the one inside every softmax).
#include "simd.h"

namespace hasten {
namespace {

void exp_inplace(float* x, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + vf::width <= n; i += vf::width) exp(vf::load(x + i)).store(x + i);
  if (i < n) {
    float tail[vf::width] = {};
    std::memcpy(tail, x + i, static_cast<std::size_t>(n - i) * sizeof(float));
    exp(vf::load(tail)).store(tail);
    std::memcpy(x + i, tail, static_cast<std::size_t>(n - i) * sizeof(float));
  }
}

HASTEN_KERNELS(m) {
  m.def("exp_", [](Array<float, -1> x) {
    nb::gil_scoped_release release;
    exp_inplace(x.data(), static_cast<std::int64_t>(x.shape(0)));
  });
}

}  // namespace
}  // namespace hasten
