// Shared by all kernel files: tensor views at the Python border and the list of modules' binders.
//
// A kernel file registers its functions with `HASTEN_KERNELS(m) { m.def(...); }`; module.cpp runs them all. Tensors arrive as
// nanobind ndarrays (zero-copy from torch through DLPack); shape, dtype and contiguity are part of the type,
// further checks raise ValueError through `require`. The GIL is released around the work.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "bf16.h"

namespace nb = nanobind;

namespace hasten {

template <typename T, int... Shape>
using Array = nb::ndarray<T, nb::shape<Shape...>, nb::device::cpu, nb::c_contig>;

inline void require(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(message);
}

// Chain of binder functions, one per kernel file, built by static constructors before the module is initialised.
struct Binder {
  using Function = void (*)(nb::module_&);
  explicit Binder(Function f) : run(f), next(head) { head = this; }
  Function run;
  Binder* next;
  static inline Binder* head = nullptr;
};

#define HASTEN_KERNELS(m)                                  \
  static void hasten_bind(nb::module_& m);                 \
  static const ::hasten::Binder hasten_binder{&hasten_bind}; \
  static void hasten_bind(nb::module_& m)

}  // namespace hasten
