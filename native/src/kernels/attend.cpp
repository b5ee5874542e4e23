// attend_pieces: exact online-softmax attention of query rows over pieces (runs of KV pages). See attend.h for the tile
// loops and hasten/kernels/attention.py for the meaning of the index arrays.
//
// The index arrays are checked and copied once per step into a work object; a layer's call passes it with plain addresses
// of its tensors (converting a dozen tensors per layer would cost more than a short decode step's attention).
#include <omp.h>

#include "attend_work.h"

namespace hasten {

using namespace attend;

namespace {

using Index = Array<const std::int32_t, -1>;

void check_starts(const std::vector<std::int32_t>& start, std::size_t last, const char* message) {
  require(!start.empty() && start.front() == 0 && start.back() == static_cast<std::int64_t>(last) &&
              std::is_sorted(start.begin(), start.end()),
          message);
}

std::vector<std::int32_t> copy(const Index& x) { return {x.data(), x.data() + x.shape(0)}; }

nb::capsule attend_work(Index page, Index page_start, Index row_start, Index row, Index first, Index limit,
                        int page_size) {
  auto lists = std::make_shared<Lists>();
  auto w = std::make_unique<Work>();
  lists->page = copy(page), lists->page_start = copy(page_start), lists->row_start = copy(row_start);
  lists->row = copy(row), w->first = copy(first), w->limit = copy(limit);
  lists->page_size = page_size;
  lists->base.resize(lists->page_start.size());
  check_lists(*lists, w->first, w->limit);
  w->lists = std::move(lists);
  return wrap(std::move(w), kWork);
}

void attend_pieces(nb::capsule handle, std::uintptr_t q, std::uintptr_t k, std::uintptr_t v, std::uintptr_t out,
                   std::uintptr_t lse, int rows, int heads, int groups, int size, int pages, int page, int kind,
                   float scale, float softcap) {
  Work& w = unwrap_work(handle, kWork);
  check_work(w, rows, pages, page);
  const Call c{reinterpret_cast<const float*>(q), static_cast<std::int64_t>(heads) * size,
               reinterpret_cast<const void*>(k), reinterpret_cast<const void*>(v), nullptr, nullptr,
               reinterpret_cast<float*>(out), reinterpret_cast<float*>(lse), heads, groups, size, page, scale, softcap};
  const int threads = omp_get_max_threads(), workers = threads == 1 ? 1 : threads * kWorkersPerThread;
  auto& plan = w.plans[{heads / groups, groups, workers}];
  if (!plan)
    plan = make_plan(*w.lists, w.first.data(), w.limit.data(),
                     {w.entries(), heads / groups, groups, workers, INT32_MAX, kBlock, true, false, kCosts});
  nb::gil_scoped_release release;
  run(w.view(), *plan, c, kind);
}

HASTEN_KERNELS(m) {
  m.def("attend_work", &attend_work);
  m.def("attend_pieces", &attend_pieces);
}

}  // namespace

namespace attend {

nb::capsule wrap(std::unique_ptr<Work> work, const char* name) {
  return nb::capsule(work.release(), name, [](void* p) noexcept { delete static_cast<Work*>(p); });
}

Work& unwrap_work(const nb::capsule& handle, const char* name) {
  require(std::strcmp(handle.name(), name) == 0, "not the kind of work object that this call takes");
  return *static_cast<Work*>(handle.data());
}

void check_lists(Lists& lists, const std::vector<std::int32_t>& first, const std::vector<std::int32_t>& limit) {
  require(lists.page_size > 0, "page size must be positive");
  require(lists.page_start.size() == lists.row_start.size(), "page_start_J1 and row_start_J1 differ in length");
  require(lists.row.size() == first.size() && lists.row.size() == limit.size(),
          "row_E, first_E and limit_E differ in length");
  check_starts(lists.page_start, lists.page.size(), "page_start_J1 must rise from 0 to the length of page_C");
  check_starts(lists.row_start, lists.row.size(), "row_start_J1 must rise from 0 to the length of row_E");
  for (std::int32_t p : lists.page) {
    require(p >= 0, "page_C holds a negative page id");
    lists.top_page = std::max(lists.top_page, p);
  }
  for (int j = 0; j < lists.pieces(); ++j) {
    require(lists.page_start[j + 1] - lists.page_start[j] <= INT32_MAX / lists.page_size, "a piece has too many tokens");
    const int tokens = lists.tokens(j);
    for (int e = lists.row_start[j]; e < lists.row_start[j + 1]; ++e) {
      require(lists.row[e] >= 0, "row_E holds a negative row");
      require(first[e] >= 0, "first_E holds a negative token");
      require(limit[e] <= tokens, "limit_E reaches past the pages of its piece");
      lists.top_row = std::max(lists.top_row, lists.row[e]);
    }
  }
}

void check_work(const Work& work, int rows, int pages, int page) {
  require(page == work.lists->page_size, "the work was planned for another page size");
  require(work.lists->top_page < pages, "page_C names a page past the end of the pool");
  require(work.lists->top_row < rows, "row_E names a row past the end of q");
}

void check_schedule(const Work& work, int rows, int heads, int groups, int pages, int page) {
  check_work(work, rows, pages, page);
  require(work.plan->rows == rows, "the schedule was made for another number of query rows");
  require(work.plan->groups == groups && work.plan->repeat * groups == heads,
          "the schedule was made for another number of heads");
}

void run(const View& view, const Plan& plan, const Call& call, int kind) {
  const int workers = plan.workers();
  // Below about 10 microseconds of work, waking the other threads costs more than it saves.
  const bool parallel = workers > 1 && plan.vectors * call.size > 2e5;
#pragma omp parallel for schedule(dynamic, 1) if (parallel)
  for (int w = 0; w < workers; ++w) {
    Plain policy(call);
    for (int i = plan.worker_start[w]; i < plan.worker_start[w + 1]; ++i) {
      if (kind == kPagesBfloat16) run_task<std::uint16_t>(view, call, plan.tasks[i], policy);
      else if (kind == kPagesInt8) run_task<std::int8_t>(view, call, plan.tasks[i], policy);
      else run_task<float>(view, call, plan.tasks[i], policy);
    }
  }
}

}  // namespace attend
}  // namespace hasten
