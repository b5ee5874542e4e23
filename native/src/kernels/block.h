// One decoder layer on packed weights: what happens before and after attention, and the MLP. See block.cpp.
#pragma once

#include <memory>

#include "packed.h"

namespace hasten {

struct Block {
  const Packed *qkv = nullptr, *o = nullptr, *gate_up = nullptr, *down = nullptr;  // kept alive by the Python side
  const float *input_norm = nullptr, *mlp_norm = nullptr;
  const float *q_norm = nullptr, *k_norm = nullptr;                      // null: none
  const float *post_attention_norm = nullptr, *post_mlp_norm = nullptr;  // null: none
  int hidden = 0, heads = 0, kv_heads = 0, size = 0;
  float eps = 0;
  bool gelu = false;

  int qkv_width() const { return (heads + 2 * kv_heads) * size; }
  // qkv[rows][qkv_width] from x[rows][hidden]: norm, projections, QK-norm.
  void attention_in(const float* x, int rows, float* qkv) const;
  // y = x + norm(out W_o); out[rows][heads * size]; y may be x.
  void attention_out(const float* out, const float* x, int rows, float* y) const;
  // y = x + norm(MLP(norm(x))); y may be x.
  void mlp(const float* x, int rows, float* y) const;
};

const Block& unwrap_block(const nb::capsule& handle);

}  // namespace hasten
