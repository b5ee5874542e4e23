// A decoder layer (Llama, SmolLM2, Mistral, Qwen2, Qwen3, Gemma 3: hasten/models/decoder.py is the definition) in three
// calls around attention, instead of some twenty tensor operations.
#include "block.h"

#include <cstring>
#include <vector>

#include "elementwise.h"

namespace hasten {
namespace {

// Scratch of the calling thread, grown when needed; threads of a team get plain pointers into it.
template <int Slot>
float* scratch(std::size_t count) {
  static thread_local std::vector<float> memory;
  if (memory.size() < count) memory.resize(count);
  return memory.data();
}

std::size_t floats(int rows, int width) { return static_cast<std::size_t>(rows) * width; }

// y = x + norm(z); z is overwritten.
void residual(const float* x, float* z, int rows, int hidden, const float* norm, float eps, float* y) {
  if (norm != nullptr) rms_norm(z, hidden, rows, hidden, norm, eps, z, hidden);
  add(x, z, static_cast<std::int64_t>(rows) * hidden, y);
}

}  // namespace

void Block::attention_in(const float* x, int rows, float* out) const {
  float* normed = scratch<0>(floats(rows, hidden));
  rms_norm(x, hidden, rows, hidden, input_norm, eps, normed, hidden);
  const int width = qkv_width();
  qkv->forward(normed, hidden, rows, out, width);
  if (q_norm == nullptr) return;
  for (int h = 0; h < heads; ++h) rms_norm(out + h * size, width, rows, size, q_norm, eps, out + h * size, width);
  float* k = out + heads * size;
  for (int g = 0; g < kv_heads; ++g) rms_norm(k + g * size, width, rows, size, k_norm, eps, k + g * size, width);
}

void Block::attention_out(const float* out, const float* x, int rows, float* y) const {
  float* z = scratch<0>(floats(rows, hidden));
  o->forward(out, heads * size, rows, z, hidden);
  residual(x, z, rows, hidden, post_attention_norm, eps, y);
}

void Block::mlp(const float* x, int rows, float* y) const {
  const int inner = down->inputs;
  float* z = scratch<0>(floats(rows, hidden));
  float* both = scratch<1>(floats(rows, 2 * inner));
  rms_norm(x, hidden, rows, hidden, mlp_norm, eps, z, hidden);
  gate_up->forward(z, hidden, rows, both, 2 * inner);
  gated(both, rows, inner, gelu);
  down->forward(both, 2 * inner, rows, z, hidden);
  residual(x, z, rows, hidden, post_mlp_norm, eps, y);
}

const Block& unwrap_block(const nb::capsule& handle) {
  require(std::strcmp(handle.name(), "hasten.block") == 0, "not a decoder layer");
  return *static_cast<const Block*>(handle.data());
}

namespace {

const float* floats_at(Address address) { return reinterpret_cast<const float*>(address); }

nb::capsule block(nb::capsule qkv, nb::capsule o, nb::capsule gate_up, nb::capsule down, Address input_norm,
                  Address mlp_norm, Address q_norm, Address k_norm, Address post_attention_norm, Address post_mlp_norm,
                  int heads, int kv_heads, int size, float eps, bool gelu) {
  auto b = std::make_unique<Block>();
  b->qkv = &unwrap(qkv), b->o = &unwrap(o), b->gate_up = &unwrap(gate_up), b->down = &unwrap(down);
  b->input_norm = floats_at(input_norm), b->mlp_norm = floats_at(mlp_norm);
  b->q_norm = floats_at(q_norm), b->k_norm = floats_at(k_norm);
  b->post_attention_norm = floats_at(post_attention_norm), b->post_mlp_norm = floats_at(post_mlp_norm);
  b->hidden = b->qkv->inputs, b->heads = heads, b->kv_heads = kv_heads, b->size = size, b->eps = eps, b->gelu = gelu;
  require(b->input_norm != nullptr && b->mlp_norm != nullptr, "a decoder layer needs its input and MLP norms");
  require((b->q_norm == nullptr) == (b->k_norm == nullptr), "QK-norm needs the weights of queries and of keys");
  require(heads > 0 && kv_heads > 0 && size > 0 && heads % kv_heads == 0, "query heads must be a multiple of kv heads");
  require(b->qkv->outputs == b->qkv_width(), "qkv_proj does not fit the heads");
  require(b->o->inputs == heads * size && b->o->outputs == b->hidden, "o_proj does not fit the heads and the hidden size");
  require(b->gate_up->inputs == b->hidden && b->down->outputs == b->hidden && b->gate_up->outputs == 2 * b->down->inputs,
          "gate_up_proj and down_proj do not fit each other and the hidden size");
  return nb::capsule(b.release(), "hasten.block", [](void* p) noexcept { delete static_cast<Block*>(p); });
}

HASTEN_KERNELS(m) {
  m.def("block", &block);
  m.def("block_attention_in", [](const nb::capsule& handle, Address x, int rows, Address qkv) {
    const Block& b = unwrap_block(handle);
    nb::gil_scoped_release release;
    b.attention_in(floats_at(x), rows, reinterpret_cast<float*>(qkv));
  });
  m.def("block_attention_out", [](const nb::capsule& handle, Address out, Address x, int rows, Address y) {
    const Block& b = unwrap_block(handle);
    nb::gil_scoped_release release;
    b.attention_out(floats_at(out), floats_at(x), rows, reinterpret_cast<float*>(y));
  });
  m.def("block_mlp", [](const nb::capsule& handle, Address x, int rows, Address y) {
    const Block& b = unwrap_block(handle);
    nb::gil_scoped_release release;
    b.mlp(floats_at(x), rows, reinterpret_cast<float*>(y));
  });
}

}  // namespace
}  // namespace hasten
