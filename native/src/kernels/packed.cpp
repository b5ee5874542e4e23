// Calling packed linear layers from Python, and layers made of several parts one under the other.
#include "packed.h"

#include <nanobind/stl/vector.h>

#include <cstring>

namespace hasten {
namespace {

// Parts in different storage that share their input (q and k in one quantisation, v in another).
struct Stack final : Packed {
  std::vector<const Packed*> parts;  // owned by their capsules, which the Python side keeps
  void forward(const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy) const override {
    for (const Packed* part : parts) {
      part->forward(x, ldx, rows, y, ldy);
      y += part->outputs;
    }
  }
  bool row(int output, float* to) const override {
    for (const Packed* part : parts) {
      if (output < part->outputs) return part->row(output, to);
      output -= part->outputs;
    }
    return false;
  }
};

nb::capsule packed_stack(const std::vector<nb::capsule>& handles) {
  auto stack = std::make_unique<Stack>();
  require(!handles.empty(), "a stack needs at least one part");
  for (const nb::capsule& handle : handles) {
    const Packed& part = unwrap(handle);
    stack->inputs = stack->parts.empty() ? part.inputs : stack->inputs;
    require(part.inputs == stack->inputs, "the parts of a stack differ in inputs");
    stack->outputs += part.outputs;
    stack->parts.push_back(&part);
  }
  return wrap(std::move(stack));
}

void packed_forward(const nb::capsule& handle, Address x, int rows, Address y) {
  const Packed& layer = unwrap(handle);
  nb::gil_scoped_release release;
  layer.forward(reinterpret_cast<const float*>(x), layer.inputs, rows, reinterpret_cast<float*>(y), layer.outputs);
}

void packed_row(const nb::capsule& handle, int output, Address y) {
  const Packed& layer = unwrap(handle);
  require(output >= 0 && output < layer.outputs, "the row lies outside the layer's outputs");
  require(layer.row(output, reinterpret_cast<float*>(y)), "this packed layer cannot be read row by row");
}

HASTEN_KERNELS(m) {
  m.def("packed_row", &packed_row);
  m.def("packed_stack", &packed_stack);
  m.def("packed_forward", &packed_forward);
}

}  // namespace
}  // namespace hasten
