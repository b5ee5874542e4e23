// Reads the description of a FlashAttention call. Shapes and dtypes were checked by hasten/kernels/flash.py.
#include "flash.h"

#include <nanobind/stl/pair.h>

namespace hasten::flash {
namespace {

template <typename T>
T get(const nb::dict& d, const char* name) {
  return nb::cast<T>(d[name]);
}

template <typename T>
T* address(const nb::dict& d, const char* name) {
  return reinterpret_cast<T*>(get<std::uintptr_t>(d, name));
}

Stride stride(const nb::dict& d, const char* name) {
  const auto pair = get<std::pair<std::int64_t, std::int64_t>>(d, name);
  return {pair.first, pair.second};
}

}  // namespace

Problem read_problem(const nb::dict& d) {
  Problem p{};
  p.q = address<const void>(d, "q"), p.k = address<const void>(d, "k"), p.v = address<const void>(d, "v");
  p.q_bf16 = get<bool>(d, "q_bf16"), p.kv_bf16 = get<bool>(d, "kv_bf16");
  p.heads = get<int>(d, "heads"), p.groups = get<int>(d, "groups"), p.size = get<int>(d, "size");
  require(p.groups > 0 && p.heads % p.groups == 0, "query heads do not share the kv heads evenly");
  require(p.size > 0, "head size must be positive");
  p.qs = stride(d, "q_stride"), p.ks = stride(d, "k_stride"), p.vs = stride(d, "v_stride");
  p.os = stride(d, "out_stride"), p.ls = stride(d, "lse_stride");
  const auto sequences = get<Array<const std::int64_t, -1, 7>>(d, "sequences");
  for (std::size_t b = 0; b < sequences.shape(0); ++b) {
    const std::int64_t* s = sequences.data() + b * 7;
    require(s[5] >= 0 && s[6] >= 0 && s[5] < (1 << 24) && s[6] < (1 << 24), "a sequence must be shorter than 2^24 tokens");
    p.sequences.push_back({s[0], s[1], s[2], s[3], s[4], static_cast<int>(s[5]), static_cast<int>(s[6])});
  }
  p.table = address<const std::int32_t>(d, "table");
  p.table_width = get<int>(d, "table_width"), p.page = get<int>(d, "page");
  p.out = address<float>(d, "out"), p.lse = address<float>(d, "lse"), p.sum = address<float>(d, "sum");
  p.out_split = get<std::int64_t>(d, "out_split"), p.lse_split = get<std::int64_t>(d, "lse_split");
  p.scale = get<float>(d, "scale"), p.softcap = get<float>(d, "softcap");
  p.left = get<int>(d, "left"), p.right = get<int>(d, "right");
  p.bias = address<const float>(d, "bias");
  p.bias_batch = get<std::int64_t>(d, "bias_batch"), p.bias_head = get<std::int64_t>(d, "bias_head");
  p.bias_row = get<std::int64_t>(d, "bias_row"), p.bias_key = get<std::int64_t>(d, "bias_key");
  p.slope = address<const float>(d, "slope");
  p.keep = address<const std::uint8_t>(d, "keep");
  p.keep_batch = get<std::int64_t>(d, "keep_batch"), p.keep_head = get<std::int64_t>(d, "keep_head");
  p.keep_width = get<int>(d, "keep_width"), p.block = get<int>(d, "block");
  require(p.keep == nullptr || p.block > 0, "a block must hold at least one token");
  p.threshold = get<std::uint32_t>(d, "threshold"), p.seed = get<std::uint64_t>(d, "seed");
  p.inverse = get<float>(d, "inverse");
  p.schedule = {get<bool>(d, "rows_outer"), get<bool>(d, "deferred"), get<bool>(d, "sequence_parallel"),
                get<bool>(d, "skip"),       get<bool>(d, "deterministic"),
                get<int>(d, "lanes"),       get<int>(d, "tile"), get<int>(d, "splits")};
  require(p.schedule.tile > 0 && p.schedule.tile <= kMostKeys, "a tile holds 1 to 256 keys");
  require(p.schedule.lanes > 0 && p.schedule.splits > 0, "lanes and splits must be positive");
  return p;
}

}  // namespace hasten::flash
