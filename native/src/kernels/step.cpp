// A whole step of the decoder stack in one call, for steps in which every layer reads densely what a schedule says (see
// attend_work.h): layers of packed weights. Everything that differs from step to step comes
// with the call; everything that does not was checked when the stack was made.
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>

#include "attend_tokens.h"
#include "stack.h"

namespace hasten {
namespace {

// Cos and sin [rows][rotated] and how many dimensions they turn.
using Tables = std::tuple<Address, Address, int>;
// Schedule, softmax scale, soft cap (0: none).
using Reading = std::tuple<nb::capsule, float, float>;

nb::capsule stack(const std::vector<nb::capsule>& blocks, const std::vector<Address>& k, const std::vector<Address>& v,
                  const std::vector<int>& rope, const std::vector<int>& reading, std::int64_t pages, int page,
                  int kind) {
  auto s = std::make_unique<Stack>();
  const std::size_t count = blocks.size();
  require(count > 0 && k.size() == count && v.size() == count && rope.size() == count && reading.size() == count,
          "a stack needs pages, a rope and a reading for each of its layers");
  require(pages > 0 && page > 0, "the page pool is empty");
  s->pages = pages, s->page = page, s->kind = kind;
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

}  // namespace

const Stack& unwrap_stack(const nb::capsule& handle) {
  require(std::strcmp(handle.name(), "hasten.stack") == 0, "not a decoder stack");
  return *static_cast<const Stack*>(handle.data());
}

void check_reads(const Stack& stack, const std::vector<Read>& reads, int rows) {
  require(static_cast<int>(reads.size()) == stack.readings, "one schedule per reading of the stack");
  for (const Stack::Layer& layer : stack.layers)
    attend::check_schedule(*reads[layer.reading].work, rows, layer.block->heads, layer.block->kv_heads,
                           static_cast<int>(std::min<std::int64_t>(stack.pages, INT32_MAX)), stack.page);
}

bool run_stack(const Stack& stack, float* x, int rows, const std::int64_t* slot, const std::vector<rope::Tables>& tables,
               const std::vector<Read>& reads, const Choosing* choosing) {
  static thread_local std::vector<float> qkv_memory, part_memory, lse_memory, out_memory;
  static thread_local std::vector<std::int32_t> index_memory, count_memory;
  for (std::size_t i = 0; i < stack.layers.size(); ++i) {
    const Stack::Layer& layer = stack.layers[i];
    const Block& b = *layer.block;
    const Read& read = reads[layer.reading];
    const attend::Plan& plan = *read.work->plan;
    const int width = b.qkv_width(), query = b.heads * b.size;
    float* qkv = grown(qkv_memory, static_cast<std::size_t>(rows) * width);
    float* out = grown(out_memory, static_cast<std::size_t>(rows) * query);
    float* part = grown(part_memory, static_cast<std::size_t>(plan.slots) * query);
    float* lse = grown(lse_memory, static_cast<std::size_t>(plan.slots + rows) * b.heads);
    float *k = qkv + query, *row_lse = lse + static_cast<std::size_t>(plan.slots) * b.heads;
    b.attention_in(x, rows, qkv);
    rope::append({qkv, width, b.heads}, {k, width, b.kv_heads}, {k + b.kv_heads * b.size, width, b.kv_heads}, b.size,
                 tables[layer.rope], true, slot, rows, {layer.k, layer.v, stack.pages, stack.page, stack.kind});
    const Selector* selector = choosing == nullptr ? nullptr : choosing->selector[i];
    if (selector != nullptr) selector->append(k, width, slot, rows);
    const bool past = selector != nullptr && choosing->shortest > selector->budget;
    if (past && selector->watches)
      selector->watch({qkv, width, rows, choosing->table, choosing->width, choosing->length, layer.k, stack.kind, stack.page,
                       read.scale, read.softcap});
    if (past && !selector->watches) {
      const std::size_t choices = static_cast<std::size_t>(rows) * selector->choices;
      const int most = selector->most(choosing->longest);
      std::int32_t* index = grown(index_memory, choices * most);
      std::int32_t* count = grown(count_memory, choices);
      selector->choose(qkv, width, rows, choosing->table, choosing->width, choosing->length, most, index,
                       count);
      const attend::Chosen chosen{qkv, width, layer.k, layer.v, choosing->table, index, count, b.heads, b.kv_heads, b.size,
                                  static_cast<int>(stack.pages), stack.page, choosing->width, selector->choices,
                                  most, read.scale, read.softcap};
      if (!attend::tokens(chosen, rows, stack.kind, out, row_lse)) return false;
    } else {
      const attend::Call call{qkv, width, layer.k, layer.v, out, row_lse, part, lse, b.heads, b.kv_heads, b.size,
                              stack.page, read.scale, read.softcap};
      attend::run(read.work->view(), plan, call, stack.kind);
      attend::join_parts(plan, call);
    }
    b.attention_out(out, x, rows, x);
    b.mlp(x, rows, x);
  }
  return true;
}

namespace {

// x[rows][hidden] goes through all layers in place; keys and values are cached at `slot`.
void stack_step(const nb::capsule& handle, Address address, int rows, Array<const std::int64_t, -1> slot,
                const std::vector<Tables>& ropes, const std::vector<Reading>& readings) {
  const Stack& stack = unwrap_stack(handle);
  require(static_cast<int>(slot.shape(0)) == rows, "slot_T must name a slot per row");
  rope::check_slots(slot.data(), rows, stack.pages, stack.page);
  require(static_cast<int>(ropes.size()) == stack.ropes, "one pair of rotary tables per rope of the stack");
  std::vector<Read> reads;
  for (const auto& [schedule, scale, softcap] : readings)
    reads.push_back({&attend::unwrap_work(schedule, attend::kSchedule), scale, softcap});
  check_reads(stack, reads, rows);
  std::vector<rope::Tables> tables;
  for (const auto& [cos, sin, rotated] : ropes) {
    require(rotated >= 0 && rotated % 2 == 0, "rotary tables need an even width");
    tables.push_back({reinterpret_cast<const float*>(cos), reinterpret_cast<const float*>(sin), rotated});
  }
  for (const Stack::Layer& layer : stack.layers)
    require(tables[layer.rope].rotated <= layer.block->size, "rotary tables are wider than a head");
  nb::gil_scoped_release release;
  run_stack(stack, reinterpret_cast<float*>(address), rows, slot.data(), tables, reads, nullptr);
}

HASTEN_KERNELS(m) {
  m.def("stack", &stack);
  m.def("stack_step", &stack_step);
}

}  // namespace
}  // namespace hasten
