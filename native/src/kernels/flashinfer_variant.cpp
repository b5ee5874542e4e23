// schedule_run_variant: runs a schedule with an attention variant that was compiled at run time (attend_variant.h), on the
// OpenMP threads of the engine.
#include "attend_variant.h"
#include "attend_work.h"

namespace hasten {
namespace {

using namespace attend;

using Index = Array<const std::int32_t, -1>;

void schedule_run_variant(const nb::capsule& handle, std::uintptr_t worker_address, std::uintptr_t join_address,
                          std::int64_t call_size, std::uintptr_t q, std::uintptr_t k, std::uintptr_t v,
                          std::uintptr_t out, std::uintptr_t lse, int rows, int heads, int groups, int size, int pages,
                          int page, float scale, Index of_row, Index query_start, Index length, std::uintptr_t params) {
  const Work& w = unwrap_work(handle, kSchedule);
  const Plan& plan = *w.plan;
  check_schedule(w, rows, heads, groups, pages, page);
  require(call_size == static_cast<std::int64_t>(sizeof(VariantCall)),
          "the variant was built for another version of the kernels");
  const int batch = static_cast<int>(length.shape(0));
  require(static_cast<int>(of_row.shape(0)) == rows, "batch_T must have an entry per query row");
  require(static_cast<int>(query_start.shape(0)) == batch + 1, "query_start_B1 must have one entry more than length_B");
  const std::int32_t *b = of_row.data(), *start = query_start.data();
  for (int t = 0; t < rows; ++t)
    require(b[t] >= 0 && b[t] < batch && start[b[t]] <= t && t < start[b[t] + 1],
            "batch_T names a request whose rows in query_start_B1 do not include the row");
  static thread_local std::vector<float> memory;
  const std::size_t slots = static_cast<std::size_t>(plan.slots);
  if (memory.size() < slots * heads * (size + 1)) memory.resize(slots * heads * (size + 1));
  const VariantCall c{w.view(),
                      {reinterpret_cast<const float*>(q), static_cast<std::int64_t>(heads) * size,
                       reinterpret_cast<const void*>(k), reinterpret_cast<const void*>(v), reinterpret_cast<float*>(out),
                       reinterpret_cast<float*>(lse), memory.data(), memory.data() + slots * heads * size, heads, groups,
                       size, page, scale, 0.0f},
                      {b, start, length.data()},
                      plan.tasks.data(),
                      plan.worker_start.data(),
                      plan.lead.data(),
                      plan.part_row.data(),
                      plan.part_start.data(),
                      plan.part_slot.data(),
                      reinterpret_cast<const void*>(params)};
  auto run_worker = reinterpret_cast<void (*)(const VariantCall*, int)>(worker_address);
  auto join_row = reinterpret_cast<void (*)(const VariantCall*, int)>(join_address);
  nb::gil_scoped_release release;
  const int workers = plan.workers(), joins = static_cast<int>(plan.part_row.size());
  const bool parallel = workers > 1 && plan.vectors * size > 2e5;
#pragma omp parallel for schedule(dynamic, 1) if (parallel)
  for (int i = 0; i < workers; ++i) run_worker(&c, i);
  const bool many = static_cast<std::int64_t>(plan.slots) * heads * size > 100000;
#pragma omp parallel for schedule(static) if (many)
  for (int i = 0; i < joins; ++i) join_row(&c, i);
}

HASTEN_KERNELS(m) {
  m.def("schedule_run_variant", &schedule_run_variant);
  m.attr("variant_call_size") = sizeof(VariantCall);
}

}  // namespace
}  // namespace hasten
