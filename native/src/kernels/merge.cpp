// merge: joins the parts (out, lse) of each row, out = sum w_j out_j / sum w_j with w_j = exp(lse_j - max lse).
#include "attend_work.h"

namespace hasten {
namespace attend {

void merge(const float* out, const float* lse, const std::int32_t* s, const std::int32_t* e, int rows, int heads,
           int size, float* to, float* to_lse) {
  const bool parallel = static_cast<std::int64_t>(s[rows]) * heads * size > 100000;
#pragma omp parallel for schedule(static) if (parallel)
  for (int t = 0; t < rows; ++t)
    for (int h = 0; h < heads; ++h) {
      const std::size_t row = static_cast<std::size_t>(t) * heads + h;
      to_lse[row] = join(out, lse, e + s[t], s[t + 1] - s[t], heads, h, size, to + row * size);
    }
}

void join_parts(const Plan& plan, const Call& c) {
  const int rows = static_cast<int>(plan.part_row.size());
  const bool parallel = static_cast<std::int64_t>(plan.slots) * c.heads * c.size > 100000;
#pragma omp parallel for schedule(static) if (parallel)
  for (int i = 0; i < rows; ++i)
    for (int h = 0; h < c.heads; ++h) {
      const std::size_t row = static_cast<std::size_t>(plan.part_row[i]) * c.heads + h;
      const std::int32_t begin = plan.part_start[i];
      c.lse[row] = join(c.part_out, c.part_lse, plan.part_slot.data() + begin, plan.part_start[i + 1] - begin, c.heads, h,
                        c.size, c.out + row * c.size);
    }
}

}  // namespace attend

namespace {

void merge(std::uintptr_t out, std::uintptr_t lse, Array<const std::int32_t, -1> start,
           Array<const std::int32_t, -1> entry, std::uintptr_t to, std::uintptr_t to_lse, int entries, int heads,
           int size) {
  const int rows = static_cast<int>(start.shape(0)) - 1;
  require(rows >= 0, "entry_start_T1 is empty");
  const std::int32_t *s = start.data(), *e = entry.data();
  require(s[0] == 0 && s[rows] <= static_cast<std::int64_t>(entry.shape(0)),
          "entry_start_T1 must rise from 0 to the length of entry_E");
  for (int t = 0; t < rows; ++t) require(s[t] <= s[t + 1], "entry_start_T1 must not fall");
  for (int i = 0; i < s[rows]; ++i) require(e[i] >= 0 && e[i] < entries, "entry_E names a part that is not there");
  nb::gil_scoped_release release;
  attend::merge(reinterpret_cast<const float*>(out), reinterpret_cast<const float*>(lse), s, e, rows, heads, size,
                reinterpret_cast<float*>(to), reinterpret_cast<float*>(to_lse));
}

HASTEN_KERNELS(m) { m.def("merge", &merge); }

}  // namespace
}  // namespace hasten
