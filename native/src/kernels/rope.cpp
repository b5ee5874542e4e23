// rope_append: rotary embedding of queries and keys in place, and the append of keys and values to the KV pages.
//
// Half-split rotation (RoFormer section 3.2, in the layout of Hugging Face checkpoints): dimension i < R / 2 pairs with
// i + R / 2; dimensions beyond R pass through.
#include "rope.h"

#include "simd.h"

namespace hasten {
namespace {

using rope::Rows;
using rope::to_bf16;

void rotate(float* x, const float* cos, const float* sin, int half) {
  int i = 0;
  for (; i + vf::width <= half; i += vf::width) {
    const vf a = vf::load(x + i), b = vf::load(x + half + i);
    (a * vf::load(cos + i) - b * vf::load(sin + i)).store(x + i);
    fma(b, vf::load(cos + half + i), a * vf::load(sin + half + i)).store(x + half + i);
  }
  for (; i < half; ++i) {
    const float a = x[i], b = x[half + i];
    x[i] = a * cos[i] - b * sin[i];
    x[half + i] = b * cos[half + i] + a * sin[half + i];
  }
}

void store(const float* from, float* to, int size) { std::memcpy(to, from, static_cast<std::size_t>(size) * sizeof *to); }
void store(const float* from, std::uint16_t* to, int size) {
  for (int d = 0; d < size; ++d) to[d] = to_bf16(from[d]);
}

// Codes of at most 127 steps either way, then their scale, of which a number that is not finite makes infinity or NaN.
void store(const float* from, std::int8_t* to, int size) {
  float most = 0.0f;
  for (int d = 0; d < size; ++d) {
    const float a = std::fabs(from[d]);
    most = a > most || a != a ? a : most;
  }
  const float scale = most / 127.0f, steps = 127.0f / most;
  if (steps > 0.0f && steps < 1e38f)
    for (int d = 0; d < size; ++d) to[d] = static_cast<std::int8_t>(std::nearbyint(from[d] * steps));
  else
    std::memset(to, 0, static_cast<std::size_t>(size));
  std::memcpy(to + size, &scale, sizeof scale);
}

template <typename KV>
void write(const Rows& from, std::int64_t row, KV* pages, std::int64_t slot, int page, int size) {
  const int stored = size + kTail<KV>;
  KV* to = pages + ((slot / page * from.heads) * page + slot % page) * stored;
  for (int g = 0; g < from.heads; ++g)
    store(from.data + row * from.stride + static_cast<std::int64_t>(g) * size,
          to + static_cast<std::int64_t>(g) * page * stored, size);
}

}  // namespace

namespace rope {

void check_slots(const std::int64_t* slots, std::int64_t rows, std::int64_t pages, int page) {
  for (std::int64_t t = 0; t < rows; ++t)
    require(slots[t] >= 0 && slots[t] < pages * page, "slot_T names a token outside the page pool");
}

void append(Rows q, Rows k, Rows v, int size, Tables tables, bool rotate_keys, const std::int64_t* slots,
            std::int64_t rows, const Pool& pool) {
  const int half = tables.rotated / 2;
  const bool parallel = rows * (q.heads + 2 * k.heads) * size > 200000;
#pragma omp parallel for schedule(static) if (parallel)
  for (std::int64_t t = 0; t < rows; ++t) {
    const float *cos = tables.cos + t * tables.rotated, *sin = tables.sin + t * tables.rotated;
    for (int h = 0; h < q.heads; ++h) rotate(q.data + t * q.stride + static_cast<std::int64_t>(h) * size, cos, sin, half);
    if (rotate_keys)
      for (int g = 0; g < k.heads; ++g)
        rotate(k.data + t * k.stride + static_cast<std::int64_t>(g) * size, cos, sin, half);
    if (pool.kind == kPagesInt8) {
      write(k, t, static_cast<std::int8_t*>(pool.k), slots[t], pool.page, size);
      write(v, t, static_cast<std::int8_t*>(pool.v), slots[t], pool.page, size);
    } else if (pool.kind == kPagesBfloat16) {
      write(k, t, static_cast<std::uint16_t*>(pool.k), slots[t], pool.page, size);
      write(v, t, static_cast<std::uint16_t*>(pool.v), slots[t], pool.page, size);
    } else {
      write(k, t, static_cast<float*>(pool.k), slots[t], pool.page, size);
      write(v, t, static_cast<float*>(pool.v), slots[t], pool.page, size);
    }
  }
}

}  // namespace rope

namespace {

void rope_append(std::uintptr_t q, std::int64_t q_stride, int heads, std::uintptr_t k, std::int64_t k_stride,
                 std::uintptr_t v, std::int64_t v_stride, int groups, int size, std::uintptr_t cos, std::uintptr_t sin,
                 int rotated, bool rotate_keys, Array<const std::int64_t, -1> slot, std::uintptr_t k_pages,
                 std::uintptr_t v_pages, std::int64_t pages, int page, int kind) {
  const auto rows = static_cast<std::int64_t>(slot.shape(0));
  const std::int64_t* slots = slot.data();
  rope::check_slots(slots, rows, pages, page);
  nb::gil_scoped_release release;
  rope::append({reinterpret_cast<float*>(q), q_stride, heads}, {reinterpret_cast<float*>(k), k_stride, groups},
               {reinterpret_cast<float*>(v), v_stride, groups}, size,
               {reinterpret_cast<const float*>(cos), reinterpret_cast<const float*>(sin), rotated}, rotate_keys, slots,
               rows, {reinterpret_cast<void*>(k_pages), reinterpret_cast<void*>(v_pages), pages, page, kind});
}

HASTEN_KERNELS(m) { m.def("rope_append", &rope_append); }

}  // namespace
}  // namespace hasten
