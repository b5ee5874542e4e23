// A linear layer packed for the native kernels. Python holds it as a capsule beside the tensors that own the memory; the
// layer's call then passes three addresses, because converting tensors one by one would cost as much as a small layer.
#pragma once

#include <cstddef>
#include <memory>

#include "hasten.h"

namespace hasten {

using Address = std::uintptr_t;

struct Packed {
  int inputs = 0, outputs = 0;
  virtual ~Packed() = default;
  // y[rows][outputs] = x[rows][inputs] W^T + bias; ldx, ldy: floats from row to row.
  virtual void forward(const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy) const = 0;
  // The weights of one output, to[inputs], as a tied embedding looks them up; false where the layout cannot tell.
  virtual bool row(int, float*) const { return false; }
};

inline constexpr const char* kPackedName = "hasten.packed";

inline nb::capsule wrap(std::unique_ptr<Packed> layer) {
  return nb::capsule(layer.release(), kPackedName, [](void* p) noexcept { delete static_cast<Packed*>(p); });
}

inline const Packed& unwrap(const nb::capsule& handle) {
  require(std::string(handle.name()) == kPackedName, "not a packed linear layer");
  return *static_cast<const Packed*>(handle.data());
}

// Below some ten microseconds of work, waking the other threads costs more than it saves.
inline bool worth_threads(int rows, int inputs, int outputs) {
  return (1.0 + rows) * inputs * outputs > 1e5;
}

}  // namespace hasten
