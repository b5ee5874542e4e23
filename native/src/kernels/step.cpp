// A whole step of the decoder stack in one call, for steps in which every layer reads densely what a schedule says (see
// attend_work.h): layers of packed weights, float32 or bfloat16 pages. Everything that differs from step to step comes
// with the call; everything that does not was checked when the stack was made.
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>

#include "attend_work.h"
#include "block.h"
#include "rope.h"

namespace hasten {
namespace {

struct Layer {
  const Block* block;
  void *k, *v;
  int rope, reading;  // which of a step's rotary tables and readings it uses
};

struct Stack {
  std::vector<Layer> layers;
  std::int64_t pages = 0;
  int page = 0;
  bool bf16 = false;
  int ropes = 0, readings = 0;
};

// Cos and sin [rows][rotated] and how many dimensions they turn.
using Tables = std::tuple<Address, Address, int>;
// Schedule, softmax scale, soft cap (0: none).
using Reading = std::tuple<nb::capsule, float, float>;

nb::capsule stack(const std::vector<nb::capsule>& blocks, const std::vector<Address>& k, const std::vector<Address>& v,
                  const std::vector<int>& rope, const std::vector<int>& reading, std::int64_t pages, int page,
                  bool bf16) {
  auto s = std::make_unique<Stack>();
  const std::size_t count = blocks.size();
  require(count > 0 && k.size() == count && v.size() == count && rope.size() == count && reading.size() == count,
          "a stack needs pages, a rope and a reading for each of its layers");
  require(pages > 0 && page > 0, "the page pool is empty");
  s->pages = pages, s->page = page, s->bf16 = bf16;
  for (std::size_t i = 0; i < count; ++i) {
    const Block& b = unwrap_block(blocks[i]);
    const Block& first = unwrap_block(blocks[0]);
    require(b.hidden == first.hidden, "the layers of a stack differ in hidden size");
    require(rope[i] >= 0 && reading[i] >= 0, "a layer's rope and reading are counted from 0");
    s->layers.push_back({&b, reinterpret_cast<void*>(k[i]), reinterpret_cast<void*>(v[i]), rope[i], reading[i]});
    s->ropes = std::max(s->ropes, rope[i] + 1), s->readings = std::max(s->readings, reading[i] + 1);
  }
  return nb::capsule(s.release(), "hasten.stack", [](void* p) noexcept { delete static_cast<Stack*>(p); });
}

float* grown(std::vector<float>& memory, std::size_t count) {
  if (memory.size() < count) memory.resize(count);
  return memory.data();
}

// x[rows][hidden] goes through all layers in place; keys and values are cached at `slot`.
void stack_step(const nb::capsule& handle, Address address, int rows, Array<const std::int64_t, -1> slot,
                const std::vector<Tables>& ropes, const std::vector<Reading>& readings) {
  require(std::strcmp(handle.name(), "hasten.stack") == 0, "not a decoder stack");
  const Stack& stack = *static_cast<const Stack*>(handle.data());
  require(static_cast<int>(slot.shape(0)) == rows, "slot_T must name a slot per row");
  rope::check_slots(slot.data(), rows, stack.pages, stack.page);
  require(static_cast<int>(ropes.size()) == stack.ropes, "one pair of rotary tables per rope of the stack");
  require(static_cast<int>(readings.size()) == stack.readings, "one schedule per reading of the stack");
  struct Read {
    const attend::Work* work;
    float scale, softcap;
  };
  std::vector<Read> reads;
  for (const auto& [schedule, scale, softcap] : readings)
    reads.push_back({&attend::unwrap_work(schedule, attend::kSchedule), scale, softcap});
  for (const auto& [cos, sin, rotated] : ropes) require(rotated >= 0 && rotated % 2 == 0, "rotary tables need an even width");
  for (const Layer& layer : stack.layers) {
    const Block& b = *layer.block;
    require(std::get<2>(ropes[layer.rope]) <= b.size, "rotary tables are wider than a head");
    attend::check_schedule(*reads[layer.reading].work, rows, b.heads, b.kv_heads,
                           static_cast<int>(std::min<std::int64_t>(stack.pages, INT32_MAX)), stack.page);
  }
  float* x = reinterpret_cast<float*>(address);
  const std::int64_t* slots = slot.data();
  nb::gil_scoped_release release;
  static thread_local std::vector<float> qkv_memory, part_memory, lse_memory, out_memory;
  for (std::size_t i = 0; i < stack.layers.size(); ++i) {
    const Layer& layer = stack.layers[i];
    const Block& b = *layer.block;
    const Read& read = reads[layer.reading];
    const attend::Plan& plan = *read.work->plan;
    const int width = b.qkv_width(), query = b.heads * b.size;
    float* qkv = grown(qkv_memory, static_cast<std::size_t>(rows) * width);
    float* out = grown(out_memory, static_cast<std::size_t>(rows) * query);
    float* part = grown(part_memory, static_cast<std::size_t>(plan.slots) * query);
    float* lse = grown(lse_memory, static_cast<std::size_t>(plan.slots + rows) * b.heads);
    b.attention_in(x, rows, qkv);
    const auto& [cos, sin, rotated] = ropes[layer.rope];
    rope::append({qkv, width, b.heads}, {qkv + query, width, b.kv_heads},
                 {qkv + query + b.kv_heads * b.size, width, b.kv_heads}, b.size,
                 {reinterpret_cast<const float*>(cos), reinterpret_cast<const float*>(sin), rotated}, true, slots, rows,
                 {layer.k, layer.v, stack.pages, stack.page, stack.bf16});
    const attend::Call call{qkv, width, layer.k, layer.v, out, lse + static_cast<std::size_t>(plan.slots) * b.heads,
                            part, lse, b.heads, b.kv_heads, b.size, stack.page, read.scale, read.softcap};
    attend::run(read.work->view(), plan, call, stack.bf16);
    attend::join_parts(plan, call);
    b.attention_out(out, x, rows, x);
    b.mlp(x, rows, x);
  }
}

HASTEN_KERNELS(m) {
  m.def("stack", &stack);
  m.def("stack_step", &stack_step);
}

}  // namespace
}  // namespace hasten
