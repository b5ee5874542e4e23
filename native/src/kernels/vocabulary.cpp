// Passes over rows of logits (one per sequence, as wide as the vocabulary): the highest entry, and whether all are finite.
#include "vocabulary.h"

#include "hasten.h"
#include "simd.h"

namespace hasten {
namespace {

constexpr std::int64_t kWorthThreads = 1 << 18;

// Lowest index of the highest entry; NaN never wins over a number.
std::int64_t highest(const float* x, std::int64_t count) {
  vf top = vf::set(-INFINITY);
  std::int64_t i = 0;
  for (; i + vf::width <= count; i += vf::width) top = max(vf::load(x + i), top);
  float best = top.max();
  for (; i < count; ++i) best = x[i] > best ? x[i] : best;
  for (i = 0; i < count; ++i)
    if (x[i] == best) return i;
  return 0;  // NaN only
}

// A sum of differences x - x is 0 if all are finite and NaN otherwise.
bool finite(const float* x, std::int64_t count) {
  vf sum = vf::zero();
  std::int64_t i = 0;
  for (; i + vf::width <= count; i += vf::width) {
    const vf v = vf::load(x + i);
    sum = sum + (v - v);
  }
  float rest = sum.sum();
  for (; i < count; ++i) rest += x[i] - x[i];
  return rest == 0.0f;
}

}  // namespace

std::int64_t best_token(const float* logits, std::int64_t count) {
  return finite(logits, count) ? highest(logits, count) : -1;
}

namespace {

HASTEN_KERNELS(m) {
  m.def("argmax", [](std::uintptr_t logits, std::int64_t rows, std::int64_t width, std::uintptr_t token) {
    require(rows == 0 || width > 0, "a row of logits must hold at least one");
    const float* x = reinterpret_cast<const float*>(logits);
    std::int64_t* out = reinterpret_cast<std::int64_t*>(token);
    nb::gil_scoped_release release;
#pragma omp parallel for schedule(static) if (rows > 1 && rows * width > kWorthThreads)
    for (std::int64_t r = 0; r < rows; ++r) out[r] = highest(x + r * width, width);
  });
  m.def("all_finite", [](std::uintptr_t logits, std::int64_t rows, std::int64_t width, std::uintptr_t flag) {
    const float* x = reinterpret_cast<const float*>(logits);
    bool* out = reinterpret_cast<bool*>(flag);
    nb::gil_scoped_release release;
#pragma omp parallel for schedule(static) if (rows > 1 && rows * width > kWorthThreads)
    for (std::int64_t r = 0; r < rows; ++r) out[r] = finite(x + r * width, width);
  });
}

}  // namespace
}  // namespace hasten
