// MARLIN layers: making them, choosing the product, and what the tests of the partition look at.
#include "marlin.h"

#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <tuple>

namespace hasten::marlin {

void Marlin::forward(const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy) const {
  if (rows <= 0) return;
  if (w.rounding == Rounding::none) exact(*this, x, ldx, rows, y, ldy);
  else rounded(*this, x, ldx, rows, y, ldy);
}

namespace {

nb::capsule finished(std::unique_ptr<Marlin> m) {
  const int group = m->per_column() ? 1 : m->w.halves / 2;
  require(m->w.halves % 2 == 0 && kPanel % group == 0, "groups must be 32, 64, 128, 256 or all inputs");
  // Panels of about equal length that hold whole groups.
  const int count = (m->w.chunks + kPanel - 1) / kPanel, even = (m->w.chunks + count - 1) / count;
  m->panel = (even + group - 1) / group * group;
  m->inputs = m->w.inputs, m->outputs = m->w.outputs;
  return wrap(std::move(m));
}

// A layer over the tensors of an affine one, which must outlive it.
nb::capsule packed_marlin(const nb::capsule& handle) {
  const auto* affine = dynamic_cast<const Affine*>(&unwrap(handle));
  require(affine != nullptr && affine->bits == 4, "not a layer of 4 bit codes");
  require(affine->low_kind == Kind::offset && affine->offset == kZero, "the code of 0 must be 8");
  require(affine->column == nullptr, "inputs must be in order");
  auto m = std::make_unique<Marlin>();
  m->w = *affine;
  return finished(std::move(m));
}

// Addresses and sizes come from the Python face, which has checked them.
nb::capsule packed_marlin_sparse(int inputs, int outputs, int halves, int groups, Address words, bool half,
                                 Address scale, Address bias) {
  auto m = std::make_unique<Marlin>();
  m->sparse = true;
  Affine& w = m->w;
  w.inputs = w.width = inputs, w.outputs = outputs, w.bits = kSparseWords;
  w.chunks = (inputs + kChunk - 1) / kChunk, w.halves = halves, w.groups = groups;
  w.scale_kind = half ? Kind::half : Kind::single, w.low_kind = Kind::offset, w.offset = kZero;
  w.words = reinterpret_cast<const std::uint32_t*>(words);
  w.scale = reinterpret_cast<const void*>(scale), w.bias = reinterpret_cast<const float*>(bias);
  return finished(std::move(m));
}

// (stripe, column, first panel, last panel) of every segment, in order.
std::vector<std::tuple<int, std::int64_t, int, int>> marlin_stripes(std::int64_t columns, int panels, int stripes) {
  require(columns >= 0 && panels > 0 && stripes > 0, "columns >= 0, panels > 0 and stripes > 0 are needed");
  std::vector<std::tuple<int, std::int64_t, int, int>> out;
  for (int s = 0; s < stripes; ++s)
    each_segment(columns, panels, stripes, s, [&](Segment g) { out.emplace_back(s, g.column, g.first, g.last); });
  return out;
}

HASTEN_KERNELS(m) {
  m.def("packed_marlin", &packed_marlin);
  m.def("packed_marlin_sparse", &packed_marlin_sparse);
  m.def("marlin_stripes", &marlin_stripes);
}

}  // namespace
}  // namespace hasten::marlin
