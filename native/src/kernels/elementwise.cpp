// RMSNorm (Zhang and Sennrich, arXiv 1910.07467, equation 4), SwiGLU and GeGLU (Shazeer, arXiv 2002.05202), sums.
#include "hasten.h"
#include "elementwise.h"

#include "attend.h"

namespace hasten {
namespace {

using attend::operator/;

constexpr std::int64_t kWorthThreads = 1 << 17;  // floats: about ten microseconds on one thread

vf activation(vf x, bool gelu) {
  if (!gelu) return x / (vf::set(1.0f) + exp(vf::zero() - x));
  // 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
  const vf inner = vf::set(0.7978845608028654f) * fma(vf::set(0.044715f) * x * x, x, x);
  return vf::set(0.5f) * x * (vf::set(1.0f) + attend::tanh(inner));
}

float activation(float x, bool gelu) {
  if (!gelu) return x / (1.0f + std::exp(-x));
  return 0.5f * x * (1.0f + std::tanh(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}

}  // namespace

void rms_norm(const float* x, std::int64_t ldx, std::int64_t rows, int size, const float* weight, float eps, float* y,
              std::int64_t ldy) {
#pragma omp parallel for schedule(static) if (rows * size > kWorthThreads)
  for (std::int64_t r = 0; r < rows; ++r) {
    const float* from = x + r * ldx;
    float* to = y + r * ldy;
    vf a = vf::zero(), b = vf::zero();
    int i = 0;
    for (; i + 2 * vf::width <= size; i += 2 * vf::width) {
      const vf p = vf::load(from + i), q = vf::load(from + i + vf::width);
      a = fma(p, p, a), b = fma(q, q, b);
    }
    float sum = (a + b).sum();
    for (; i < size; ++i) sum += from[i] * from[i];
    const float factor = 1.0f / std::sqrt(sum / static_cast<float>(size) + eps);
    const vf f = vf::set(factor);
    for (i = 0; i + vf::width <= size; i += vf::width) (vf::load(from + i) * f * vf::load(weight + i)).store(to + i);
    for (; i < size; ++i) to[i] = from[i] * factor * weight[i];
  }
}

void gated(float* gate_up, std::int64_t rows, int inner, bool gelu) {
#pragma omp parallel for schedule(static) if (rows * inner > kWorthThreads / 8)
  for (std::int64_t r = 0; r < rows; ++r) {
    float *g = gate_up + r * 2 * inner, *u = g + inner;
    int i = 0;
    for (; i + vf::width <= inner; i += vf::width) (activation(vf::load(g + i), gelu) * vf::load(u + i)).store(g + i);
    for (; i < inner; ++i) g[i] = activation(g[i], gelu) * u[i];
  }
}

void add(const float* a, const float* b, std::int64_t count, float* y) {
#pragma omp parallel for schedule(static) if (count > kWorthThreads)
  for (std::int64_t i = 0; i < count / 64; ++i)
    for (int j = 0; j < 64; j += vf::width) (vf::load(a + i * 64 + j) + vf::load(b + i * 64 + j)).store(y + i * 64 + j);
  for (std::int64_t i = count / 64 * 64; i < count; ++i) y[i] = a[i] + b[i];
}

namespace {

HASTEN_KERNELS(m) {
  m.def("rms_norm", [](std::uintptr_t x, std::int64_t rows, int size, std::uintptr_t weight, float eps, std::uintptr_t y) {
    nb::gil_scoped_release release;
    rms_norm(reinterpret_cast<const float*>(x), size, rows, size, reinterpret_cast<const float*>(weight), eps,
             reinterpret_cast<float*>(y), size);
  });
  m.def("gated", [](std::uintptr_t gate_up, std::int64_t rows, int inner, bool gelu) {
    nb::gil_scoped_release release;
    gated(reinterpret_cast<float*>(gate_up), rows, inner, gelu);
  });
}

}  // namespace
}  // namespace hasten
