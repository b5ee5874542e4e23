// merge: joins the parts (out, lse) of each row, out = sum w_j out_j / sum w_j with w_j = exp(lse_j - max lse).
#include "attend_work.h"
#include "simd.h"

namespace hasten {
namespace attend {

void check_parts(const std::int32_t* start, int rows, const std::int32_t* entry, std::int64_t count, int entries) {
  require(start[0] == 0 && start[rows] <= count, "entry_start_T1 must rise from 0 to the length of entry_E");
  for (int t = 0; t < rows; ++t) require(start[t] <= start[t + 1], "entry_start_T1 must not fall");
  for (int i = 0; i < start[rows]; ++i)
    require(entry[i] >= 0 && entry[i] < entries, "entry_E names a part that is not there");
}

void merge(const float* out, const float* lse, const std::int32_t* s, const std::int32_t* e, int rows, int heads,
           int size, float* to, float* to_lse) {
  const bool parallel = static_cast<std::int64_t>(s[rows]) * heads * size > 100000;
#pragma omp parallel for schedule(static) if (parallel)
  for (int t = 0; t < rows; ++t) {
    for (int h = 0; h < heads; ++h) {
      const std::size_t row = static_cast<std::size_t>(t) * heads + h;
      float* o = to + row * size;
      float top = -INFINITY;
      for (int i = s[t]; i < s[t + 1]; ++i) {
        const float x = lse[static_cast<std::size_t>(e[i]) * heads + h];
        top = x > top || std::isnan(x) ? x : top;
      }
      if (top == -INFINITY) {
        std::memset(o, 0, static_cast<std::size_t>(size) * sizeof(float));
        to_lse[row] = top;
        continue;
      }
      float total = 0;
      for (int i = s[t]; i < s[t + 1]; ++i) total += std::exp(lse[static_cast<std::size_t>(e[i]) * heads + h] - top);
      const float inverse = 1.0f / total;
      to_lse[row] = top + std::log(total);
      bool fresh = true;
      for (int i = s[t]; i < s[t + 1]; ++i) {
        const std::size_t at = static_cast<std::size_t>(e[i]) * heads + h;
        if (lse[at] == -INFINITY) continue;
        const float weight = std::exp(lse[at] - top) * inverse;
        const float* part = out + at * size;
        const vf w = vf::set(weight);
        int d = 0;
        if (fresh) {
          for (; d + vf::width <= size; d += vf::width) (w * vf::load(part + d)).store(o + d);
          for (; d < size; ++d) o[d] = weight * part[d];
        } else {
          for (; d + vf::width <= size; d += vf::width) fma(w, vf::load(part + d), vf::load(o + d)).store(o + d);
          for (; d < size; ++d) o[d] += weight * part[d];
        }
        fresh = false;
      }
    }
  }
}

}  // namespace attend

namespace {

void merge(std::uintptr_t out, std::uintptr_t lse, Array<const std::int32_t, -1> start,
           Array<const std::int32_t, -1> entry, std::uintptr_t to, std::uintptr_t to_lse, int entries, int heads,
           int size) {
  const int rows = static_cast<int>(start.shape(0)) - 1;
  require(rows >= 0, "entry_start_T1 is empty");
  attend::check_parts(start.data(), rows, entry.data(), static_cast<std::int64_t>(entry.shape(0)), entries);
  nb::gil_scoped_release release;
  attend::merge(reinterpret_cast<const float*>(out), reinterpret_cast<const float*>(lse), start.data(), entry.data(),
                rows, heads, size, reinterpret_cast<float*>(to), reinterpret_cast<float*>(to_lse));
}

HASTEN_KERNELS(m) { m.def("merge", &merge); }

}  // namespace
}  // namespace hasten
