// The same product with its stages apart, every result through memory: what fusing them is measured against. And stage (a)
// alone, for tests.
#include "quik.h"

namespace hasten::quik {
namespace {

// What is fused: nothing | stage (a) | everything.
enum class Fusion { none, quantize, all };

// Stage (a) as three passes over all rows: split, range, codes.
Rows quantize_apart(const Quik& q, const float* x, std::ptrdiff_t ldx, int rows, bool parallel) {
  count_quantization();
  const Rows all = allocate(q, rows);
  const std::size_t width = static_cast<std::size_t>(all.chunks) * kChunk + 8;
  float* base = scratch<5>(width * rows);
  float* inverse = scratch<6>(rows);
#pragma omp parallel for schedule(static) if (parallel && rows > 8)
  for (int r = 0; r < rows; ++r)
    split_row(q, x + r * ldx, base + r * width, all.outlier + static_cast<std::size_t>(r) * q.outliers);
#pragma omp parallel for schedule(static) if (parallel && rows > 8)
  for (int r = 0; r < rows; ++r) {
    const Range range = range_of(q, base + r * width);
    all.scale[r] = range.scale, all.zero[r] = range.zero, inverse[r] = range.inverse;
  }
#pragma omp parallel for schedule(static) if (parallel && rows > 8)
  for (int r = 0; r < rows; ++r) round_row(q, base + r * width, {all.scale[r], all.zero[r], inverse[r]}, r, all);
  return all;
}

void forward_apart(const Quik& q, const float* x, std::ptrdiff_t ldx, int rows, float* y, Fusion fusion) {
  const bool parallel = worth_threads(rows, q.inputs, q.outputs);
  const Rows all = fusion == Fusion::none ? quantize_apart(q, x, ldx, rows, parallel) : quantize(q, x, ldx, rows, parallel);
  const auto panel = [&](int block, int start, int) {
    return q.outlier_block(block) + static_cast<std::size_t>(start) * kBlock;
  };
  // With no outliers this fills in the bias.
  dense::product(all.outlier, q.outliers, rows, q.outliers, q.outputs, q.base.bias, y, q.outputs, parallel, panel);
  const int blocks = (q.outputs + kBlock - 1) / kBlock, tasks = blocks * ((rows + kRows - 1) / kRows);
  const std::size_t width = static_cast<std::size_t>(blocks) * kBlock;
  auto* product = reinterpret_cast<std::uint32_t*>(scratch<7>(width * rows));
#pragma omp parallel for schedule(static) if (parallel)
  for (int task = 0; task < tasks; ++task) {
    const int b = task % blocks, begin = task / blocks * kRows, count = std::min(kRows, rows - begin);
    auto* total = reinterpret_cast<std::uint32_t*>(scratch<4>(2 * kRows * kBlock));
    accumulate(q, all, b, begin, begin + count, total);
    for (int r = 0; r < count; ++r)
      std::memcpy(product + (begin + r) * width + b * kBlock, total + r * kBlock, sizeof(float) * kBlock);
  }
#pragma omp parallel for schedule(static) if (parallel && rows > 8)
  for (int r = 0; r < rows; ++r)
    for (int b = 0; b < blocks; ++b) {
      float* out = y + static_cast<std::size_t>(r) * q.outputs + b * kBlock;
      const int valid = std::min(kBlock, q.outputs - b * kBlock);
      float edge[kBlock] = {};
      float* to = valid == kBlock ? out : edge;
      if (to == edge) std::memcpy(edge, out, valid * sizeof(float));
      rescale(q, all, b, r, r + 1, product + r * width + b * kBlock, to, 0, to, 0);
      if (to == edge) std::memcpy(out, edge, valid * sizeof(float));
    }
}

void quik_forward(const nb::capsule& handle, Address x, int rows, Address y, int fusion) {
  const Quik& q = unwrap_quik(handle);
  require(q.base.width > 0, "every feature is an outlier: nothing is rounded");
  if (rows <= 0) return;
  nb::gil_scoped_release release;
  const auto* from = reinterpret_cast<const float*>(x);
  auto* to = reinterpret_cast<float*>(y);
  if (static_cast<Fusion>(fusion) == Fusion::all) multiply(q, from, q.inputs, rows, to, q.outputs);
  else forward_apart(q, from, q.inputs, rows, to, static_cast<Fusion>(fusion));
}

// codes: int8 [rows][width] in stored order; scale, zero: [rows]; outlier: [rows][outliers].
void quik_quantize(const nb::capsule& handle, Address x, int rows, Address codes, Address scale, Address zero,
                   Address outlier) {
  const Quik& q = unwrap_quik(handle);
  require(q.base.width > 0, "every feature is an outlier: nothing is rounded");
  nb::gil_scoped_release release;
  const Rows all = quantize(q, reinterpret_cast<const float*>(x), q.inputs, rows, false);
  auto* out = reinterpret_cast<std::int8_t*>(codes);
  const int width = q.base.width;
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < width; ++i) {
      const std::int32_t* word = all.word(r, i / kChunk);
      const int place = place_of(q, i % kChunk);
      out[static_cast<std::size_t>(r) * width + i] =
          all.words == 16 ? static_cast<std::int8_t>(reinterpret_cast<const std::int16_t*>(word)[place])
                          : reinterpret_cast<const std::int8_t*>(word)[place];
    }
  std::memcpy(reinterpret_cast<void*>(scale), all.scale, sizeof(float) * rows);
  std::memcpy(reinterpret_cast<void*>(zero), all.zero, sizeof(float) * rows);
  std::memcpy(reinterpret_cast<void*>(outlier), all.outlier, sizeof(float) * rows * q.outliers);
}

HASTEN_KERNELS(m) {
  m.def("quik_forward", &quik_forward);
  m.def("quik_quantize", &quik_quantize);
}

}  // namespace
}  // namespace hasten::quik
