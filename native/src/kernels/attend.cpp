// attend_pieces: exact online-softmax attention of query rows over pieces (runs of KV pages). See attend.h for the tile
// loops and hasten/kernels/attention.py for the meaning of the index arrays.
//
// The index arrays are checked and copied once per step into a work object; a layer's call passes it with plain addresses
// of its tensors (converting a dozen tensors per layer would cost more than a short decode step's attention).
#include "attend_work.h"

#include <memory>
#include <numeric>

#include "attend_many.h"

namespace hasten {

using namespace attend;

const std::vector<Task>& Work::plan(int repeat, int groups) {
  std::vector<Task>& list = tasks[{repeat, groups}];
  if (!list.empty()) return list;
  const int most = std::max(1, kBlock / repeat);
  for (int j = 0; j < pieces(); ++j) {
    const int rows = row_start[j + 1] - row_start[j];
    if (rows == 0) continue;
    const int blocks = (rows + most - 1) / most;
    for (int b = 0; b < blocks; ++b) {
      const int begin = row_start[j] + static_cast<int>(static_cast<std::int64_t>(rows) * b / blocks);
      const int end = row_start[j] + static_cast<int>(static_cast<std::int64_t>(rows) * (b + 1) / blocks);
      double seen = 0;
      for (int e = begin; e < end; ++e) seen += std::max(0, limit[e] - first[e]);
      for (int g = 0; g < groups; ++g) list.push_back({j, begin, end, g, seen * repeat});
    }
  }
  // Longest first, so that the last tasks to be handed out are short.
  std::stable_sort(list.begin(), list.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
  return list;
}

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
  auto w = std::make_unique<Work>();
  w->page = copy(page), w->page_start = copy(page_start), w->row_start = copy(row_start);
  w->row = copy(row), w->first = copy(first), w->limit = copy(limit);
  w->page_size = page_size;
  require(page_size > 0, "page size must be positive");
  require(w->page_start.size() == w->row_start.size(), "page_start_J1 and row_start_J1 differ in length");
  require(w->row.size() == w->first.size() && w->row.size() == w->limit.size(),
          "row_E, first_E and limit_E differ in length");
  check_starts(w->page_start, w->page.size(), "page_start_J1 must rise from 0 to the length of page_C");
  check_starts(w->row_start, w->row.size(), "row_start_J1 must rise from 0 to the length of row_E");
  for (std::int32_t p : w->page) {
    require(p >= 0, "page_C holds a negative page id");
    w->top_page = std::max(w->top_page, p);
  }
  for (int j = 0; j < w->pieces(); ++j) {
    const std::int64_t tokens = static_cast<std::int64_t>(w->page_start[j + 1] - w->page_start[j]) * page_size;
    for (int e = w->row_start[j]; e < w->row_start[j + 1]; ++e) {
      require(w->row[e] >= 0, "row_E holds a negative row");
      require(w->first[e] >= 0, "first_E holds a negative token");
      require(w->limit[e] <= tokens, "limit_E reaches past the pages of its piece");
      w->top_row = std::max(w->top_row, w->row[e]);
    }
  }
  return nb::capsule(w.release(), "hasten.attend_work", [](void* p) noexcept { delete static_cast<Work*>(p); });
}

// Addresses of the tokens [from, to) of a piece for one kv head.
template <typename KV>
void locate(const Work& w, const Call& c, const Task& task, int from, int to, Tokens<KV>& tile) {
  const std::int32_t* pages = w.page.data() + w.page_start[task.piece];
  const std::size_t size = static_cast<std::size_t>(c.size);
  for (int t = from; t < to;) {
    const int offset = t % c.page;
    const int run = std::min(c.page - offset, to - t);
    const std::size_t at =
        ((static_cast<std::size_t>(pages[t / c.page]) * c.groups + task.head) * c.page + offset) * size;
    const KV* k = static_cast<const KV*>(c.k) + at;
    const KV* v = static_cast<const KV*>(c.v) + at;
    for (int i = 0; i < run; ++i) tile.k[t - from + i] = k + i * size, tile.v[t - from + i] = v + i * size;
    t += run;
  }
}

template <typename KV>
void run_task(const Work& w, const Call& c, const Task& task) {
  static thread_local Scratch scratch;
  State& st = scratch.state;
  const int repeat = c.heads / c.groups;
  const int rows = (task.end - task.begin) * repeat;
  const Logits logits(c.scale, c.softcap);
  st.begin(rows, c.size);
  int low = INT32_MAX, high = 0;
  for (int e = task.begin; e < task.end; ++e) {
    const float* q = c.q + w.row[e] * c.q_stride + static_cast<std::int64_t>(task.head) * repeat * c.size;
    for (int i = 0; i < repeat; ++i)
      st.load((e - task.begin) * repeat + i, q + static_cast<std::size_t>(i) * c.size, c.size, logits.query);
    if (w.first[e] >= w.limit[e]) continue;
    low = std::min(low, w.first[e]);
    high = std::max(high, w.limit[e]);
  }
  scratch.ready(c.size);
  // Start on a page boundary, so that a tile is whole pages.
  low -= low < high ? low % c.page : 0;

  Tokens<KV> tiles[2];
  int now = 0;
  if (low < high) locate(w, c, task, low, std::min(low + kTile, high), tiles[now]);
  for (int t = low; t < high; t += kTile) {
    const int count = std::min(kTile, high - t);
    const int ahead = std::min(kTile, std::max(0, high - t - kTile));
    if (ahead > 0) {
      locate(w, c, task, t + kTile, t + kTile + ahead, tiles[1 - now]);
      tiles[1 - now].fill(ahead);
    }
    for (int e = task.begin; e < task.end; ++e) {
      const Span s{std::max(0, w.first[e] - t), std::min(count, w.limit[e] - t)};
      std::fill_n(scratch.span.begin() + (e - task.begin) * repeat, repeat, s);
    }
    scratch.add(tiles[now], count, c.size, logits.cap, ahead > 0 ? &tiles[1 - now] : nullptr);
    now = 1 - now;
  }
  for (int e = task.begin; e < task.end; ++e)
    for (int i = 0; i < repeat; ++i) {
      const std::size_t at = static_cast<std::size_t>(e) * c.heads + task.head * repeat + i;
      c.lse[at] = st.finish((e - task.begin) * repeat + i, c.out + at * c.size, c.size);
    }
}

void attend_pieces(nb::capsule handle, std::uintptr_t q, std::uintptr_t k, std::uintptr_t v, std::uintptr_t out,
                   std::uintptr_t lse, int rows, int heads, int groups, int size, int pages, int page, bool bf16,
                   float scale, float softcap) {
  Work& w = unwrap_work(handle);
  check_work(w, rows, pages, page);
  const Call c{reinterpret_cast<const float*>(q), static_cast<std::int64_t>(heads) * size,
               reinterpret_cast<const void*>(k), reinterpret_cast<const void*>(v), reinterpret_cast<float*>(out),
               reinterpret_cast<float*>(lse), heads, groups, size, page, scale, softcap};
  const std::vector<Task>& tasks = w.plan(heads / groups, groups);
  nb::gil_scoped_release release;
  run(w, tasks, c, bf16);
}

HASTEN_KERNELS(m) {
  m.def("attend_work", &attend_work);
  m.def("attend_pieces", &attend_pieces);
}

}  // namespace

namespace attend {

Work& unwrap_work(const nb::capsule& handle) {
  require(std::strcmp(handle.name(), "hasten.attend_work") == 0, "not a work object of attend_pieces");
  return *static_cast<Work*>(handle.data());
}

void check_work(const Work& work, int rows, int pages, int page) {
  require(page == work.page_size, "the work was planned for another page size");
  require(work.top_page < pages, "page_C names a page past the end of the pool");
  require(work.top_row < rows, "row_E names a row past the end of q");
}

void run(const Work& work, const std::vector<Task>& tasks, const Call& call, bool bf16) {
  double total = 0;
  for (const Task& t : tasks) total += t.cost;
  const int count = static_cast<int>(tasks.size());
  // Below about 10 microseconds of work, waking the other threads costs more than it saves.
  const bool parallel = count > 1 && total * call.size > 2e5;
#pragma omp parallel for schedule(dynamic, 1) if (parallel)
  for (int i = 0; i < count; ++i) {
    if (bf16) run_task<std::uint16_t>(work, call, tasks[i]);
    else run_task<float>(work, call, tasks[i]);
  }
}

}  // namespace attend
}  // namespace hasten
