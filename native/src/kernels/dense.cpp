// Dense layers: y = x W^T + bias with weights packed in blocks of 16 outputs, [blocks][inputs][16], float32 or bfloat16.
// A block streams linearly and needs no horizontal sums. See hasten/kernels/dense.py.
#include <bit>
#include <type_traits>

#include "dense_tile.h"
#include "packed.h"

namespace hasten {
namespace {

template <typename W>
struct Dense final : Packed {
  const W* weight = nullptr;
  const float* bias = nullptr;  // padded to whole blocks

  void forward(const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy) const override {
    const auto panel = [this](int block, int start, int) {
      return weight + (static_cast<std::size_t>(block) * inputs + start) * dense::kBlock;
    };
    dense::product(x, ldx, rows, inputs, outputs, bias, y, ldy, worth_threads(rows, inputs, outputs), panel);
  }

  bool row(int output, float* to) const override {
    const W* from = weight + static_cast<std::size_t>(output / dense::kBlock) * inputs * dense::kBlock + output % dense::kBlock;
    for (int i = 0; i < inputs; ++i, from += dense::kBlock) {
      if constexpr (std::is_same_v<W, float>) to[i] = *from;
      else to[i] = std::bit_cast<float>(static_cast<std::uint32_t>(*from) << 16);
    }
    return true;
  }
};

template <typename W>
nb::capsule make(Address weight, Address bias, int inputs, int outputs) {
  auto layer = std::make_unique<Dense<W>>();
  layer->inputs = inputs, layer->outputs = outputs;
  layer->weight = reinterpret_cast<const W*>(weight), layer->bias = reinterpret_cast<const float*>(bias);
  return wrap(std::move(layer));
}

// Addresses and sizes come from the Python face, which has checked them.
nb::capsule packed_dense(Address weight, Address bias, int inputs, int outputs, bool bf16) {
  return bf16 ? make<std::uint16_t>(weight, bias, inputs, outputs) : make<float>(weight, bias, inputs, outputs);
}

HASTEN_KERNELS(m) { m.def("packed_dense", &packed_dense); }

}  // namespace
}  // namespace hasten
