// The load-balanced scheduler of FlashInfer (Ye et al., arXiv 2501.01005, section 3.3.1 and algorithm 1), on pieces.
//
// Query rows of a piece are cut into tiles; a tile's tokens [first seen, last seen) (the causal end of its rows) are cut
// into chunks that cost at most a worker's share L; chunks of all kv heads go, dearest first, to the worker with the
// smallest sum so far (a min-heap). A row with one part is written through to the output; a row with several gets workspace
// slots and is joined in a fixed order. The result depends on nothing but the lists and the number of workers, so any
// number of threads may run it and get the same bits.
//
// Where this differs from the paper: L is counted in cost instead of tokens (which is the same when all tiles have as many
// rows, and keeps prefill tiles from hiding behind cheap decode tiles when both are planned together); kv heads are tasks
// of their own; and when one round of L leaves the workers uneven, smaller limits are tried.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <queue>

#include <nanobind/stl/vector.h>

#include "attend_work.h"

namespace hasten {
namespace attend {

// Measured by `python -m benchmarks.flashinfer --calibrate` on one core of an AMD Zen 3, head size 64, bfloat16 pages.
const Costs kCosts{30.0f, 3.0f, 15.0f, 90.0f, 30.0f, 22.0f};

namespace {

constexpr double kEven = 1.05;                             // largest over mean load that is good enough
constexpr double kRounds[] = {1, 4.0 / 3, 1.5, 2, 3, 4};  // L is divided by these in turn
constexpr int kMostRounds = 4;                             // the last of them: bounds the workspace

struct Tile {
  int piece, begin, end, low, high;
};

// Rows per tile of a piece of `rows`: tiles of the vector path (one or two passes over keys where they lie) or of the packed
// path, whichever reads the piece at less cost. A tile is a bound: rows are cut evenly, and none is padded.
int rows_per_tile(int rows, const Request& request) {
  const int repeat = request.repeat, packed = std::max(1, request.tile / repeat), few = std::max(1, 6 / repeat);
  if (repeat > kFew || rows <= few) return packed;
  auto cost = [&](int most) {
    const int tiles = (rows + most - 1) / most;
    return static_cast<float>(tiles) * request.costs.per_token((rows + tiles - 1) / tiles * repeat);
  };
  return cost(few) < cost(packed) ? few : packed;
}

std::vector<Tile> cut_rows(const Lists& lists, const std::int32_t* first, const std::int32_t* limit,
                           const Request& request) {
  std::vector<Tile> tiles;
  for (int j = 0; j < lists.pieces(); ++j) {
    const int start = lists.row_start[j], rows = lists.row_start[j + 1] - start;
    const int most = rows_per_tile(rows, request), blocks = (rows + most - 1) / most;
    for (int b = 0; b < blocks; ++b) {
      Tile t{j, start + static_cast<int>(static_cast<std::int64_t>(rows) * b / blocks),
             start + static_cast<int>(static_cast<std::int64_t>(rows) * (b + 1) / blocks), INT32_MAX, 0};
      for (int e = t.begin; e < t.end; ++e)
        if (first[e] < limit[e]) t.low = std::min(t.low, first[e]), t.high = std::max(t.high, limit[e]);
      if (t.low >= t.high) t.low = t.high = 0;
      t.low -= t.low % lists.page_size;
      tiles.push_back(t);
    }
  }
  return tiles;
}

// Tokens of a chunk: at most `limit`, whole tiles of the kernel and whole pages where that allows it.
int chunk_of(int tokens, double limit, int min_chunk, int page) {
  if (limit >= tokens || tokens <= min_chunk) return tokens;
  // As in the reference: short limits become the shortest chunk worth joining, long ones are rounded up.
  const double least = std::max<double>(limit, min_chunk);
  const int parts = static_cast<int>(std::ceil(tokens / least));
  int chunk = (tokens + parts - 1) / parts;
  if (chunk > kTile) chunk = (chunk + kTile - 1) / kTile * kTile;
  return (chunk + page - 1) / page * page;
}

void cut_tokens(const std::vector<Tile>& tiles, const Request& request, double share, int page, std::vector<Task>& units) {
  units.clear();
  for (const Tile& t : tiles) {
    const int vectors = (t.end - t.begin) * request.repeat, tokens = t.high - t.low;
    const float per_token = request.costs.per_token(vectors), alpha = request.costs.alpha(vectors);
    const int chunk = share > 0 ? chunk_of(tokens, share / per_token, request.min_chunk, page) : tokens;
    for (int from = t.low; from == t.low || from < t.high; from += chunk) {
      const int to = std::min(from + chunk, t.high);
      // The last chunk is open: a plan that is moved to longer rows reads on.
      units.push_back({t.piece, t.begin, t.end, 0, from, to == t.high ? INT32_MAX : to, -1,
                       alpha + per_token * static_cast<float>(to - from)});
      if (chunk == 0) break;
    }
  }
}

// Gives every (unit, kv head) to a worker; returns the largest over the mean load.
double assign(const std::vector<Task>& units, const Request& request, Plan& plan) {
  const int count = static_cast<int>(units.size()), workers = request.workers;
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (!request.fixed)
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return units[a].cost > units[b].cost; });
  using Load = std::pair<double, int>;
  std::priority_queue<Load, std::vector<Load>, std::greater<Load>> heap;
  for (int w = 0; w < workers; ++w) heap.push({0.0, w});
  std::vector<int> worker(static_cast<std::size_t>(count) * request.groups);
  plan.worker_start.assign(workers + 1, 0);
  plan.load.assign(workers, 0.0);
  for (int i = 0; i < count; ++i)
    for (int g = 0; g < request.groups; ++g) {
      const std::size_t task = static_cast<std::size_t>(i) * request.groups + g;
      const int w = request.fixed ? static_cast<int>(task * workers / worker.size()) : heap.top().second;
      heap.pop();
      worker[task] = w;
      ++plan.worker_start[w + 1];
      plan.load[w] += units[order[i]].cost;
      heap.push({plan.load[w], w});
    }
  std::partial_sum(plan.worker_start.begin(), plan.worker_start.end(), plan.worker_start.begin());
  std::vector<int> next(plan.worker_start.begin(), plan.worker_start.end() - 1);
  plan.tasks.resize(worker.size());
  for (int i = 0; i < count; ++i)
    for (int g = 0; g < request.groups; ++g) {
      Task& t = plan.tasks[next[worker[static_cast<std::size_t>(i) * request.groups + g]]++];
      t = units[order[i]];
      t.head = g;
    }
  const double total = std::accumulate(plan.load.begin(), plan.load.end(), 0.0);
  return total == 0 ? 1.0 : *std::max_element(plan.load.begin(), plan.load.end()) * workers / total;
}

// Rows in one part are written through; the others get slots, in the order of the units.
void place(const Lists& lists, const Request& request, std::vector<Task>& units, Plan& plan) {
  if (request.entries) {
    for (Task& u : units) u.slot = u.begin;
    return;
  }
  std::vector<int> parts(request.rows, 0);
  for (const Task& u : units)
    for (int e = u.begin; e < u.end; ++e) ++parts[lists.row[e]];
  plan.part_start.assign(1, 0);
  std::vector<int> next(request.rows, -1);
  for (int t = 0; t < request.rows; ++t) {
    if (parts[t] == 1) continue;
    plan.part_row.push_back(t);
    next[t] = plan.part_start.back();
    plan.part_start.push_back(next[t] + parts[t]);
  }
  plan.part_slot.assign(plan.part_start.back(), 0);
  std::vector<std::uint8_t> led(request.rows, 0);
  for (Task& u : units) {
    // A tile is written through when all its rows are whole; otherwise all of it goes to the workspace.
    bool through = true;
    for (int e = u.begin; e < u.end; ++e) through = through && parts[lists.row[e]] == 1;
    if (through) continue;
    u.slot = plan.slots;
    for (int e = u.begin; e < u.end; ++e, ++plan.slots) {
      const int row = lists.row[e];
      plan.lead.push_back(!led[row]);
      led[row] = 1;
      if (parts[row] == 1) {  // alone, but in a tile with rows that are not
        plan.part_row.push_back(row);
        plan.part_slot.push_back(plan.slots);
        plan.part_start.push_back(static_cast<std::int32_t>(plan.part_slot.size()));
      } else {
        plan.part_slot[next[row]++] = plan.slots;
      }
    }
  }
}

}  // namespace

std::shared_ptr<const Plan> make_plan(const Lists& lists, const std::int32_t* first, const std::int32_t* limit,
                                      const Request& request) {
  auto plan = std::make_shared<Plan>();
  plan->rows = request.rows, plan->repeat = request.repeat, plan->groups = request.groups;
  std::vector<Tile> tiles = cut_rows(lists, first, limit, request);
  if (!request.entries)
    tiles.erase(std::remove_if(tiles.begin(), tiles.end(), [](const Tile& t) { return t.low >= t.high; }), tiles.end());
  double total = 0;
  for (const Tile& t : tiles) {
    const int vectors = (t.end - t.begin) * request.repeat;
    total += request.costs.alpha(vectors) + static_cast<double>(request.costs.per_token(vectors)) * (t.high - t.low);
    plan->vectors += static_cast<double>(vectors) * (t.high - t.low);
  }
  total *= request.groups, plan->vectors *= request.groups;
  std::vector<Task> units, kept;
  double best = INFINITY;
  const bool whole = request.entries || request.fixed || request.workers == 1;
  for (double round : kRounds) {
    const double share = whole ? 0 : total / (request.workers * round);
    cut_tokens(tiles, request, share, lists.page_size, units);
    const double uneven = assign(units, request, *plan);
    if (uneven < best) best = uneven, kept = units;
    if (uneven <= kEven || whole) break;
  }
  static_assert(kMostRounds >= kRounds[std::size(kRounds) - 1]);
  place(lists, request, kept, *plan);
  assign(kept, request, *plan);
  return plan;
}

}  // namespace attend

namespace {

using namespace attend;

using Longs = Array<const std::int64_t, -1>;

std::vector<std::int32_t> narrow(const Longs& x, const char* message) {
  std::vector<std::int32_t> out(x.shape(0));
  for (std::size_t i = 0; i < out.size(); ++i) {
    require(x.data()[i] >= INT32_MIN && x.data()[i] <= INT32_MAX, message);
    out[i] = static_cast<std::int32_t>(x.data()[i]);
  }
  return out;
}

nb::capsule attend_schedule(Longs page, Longs page_start, Longs base, Longs row_start, Longs row, Longs first,
                            Longs limit, int page_size, int rows, int heads, int groups, int workers, int min_chunk,
                            int tile, bool balanced, const std::vector<float>& costs) {
  auto lists = std::make_shared<Lists>();
  auto w = std::make_unique<Work>();
  lists->page = narrow(page, "page_C is too large"), lists->page_start = narrow(page_start, "page_start_J1 is too large");
  lists->base = narrow(base, "base_J is too large"), lists->row_start = narrow(row_start, "row_start_J1 is too large");
  lists->row = narrow(row, "row_E is too large"), w->first = narrow(first, "first_E is too large");
  w->limit = narrow(limit, "limit_E is too large");
  lists->page_size = page_size;
  require(heads > 0 && groups > 0 && heads % groups == 0, "query heads must be a multiple of kv heads");
  require(workers > 0, "a schedule needs workers");
  require(min_chunk > 0 && tile > 0 && tile <= kBlock, "min_chunk and tile must be positive, and tile at most 96");
  require(costs.empty() || costs.size() == 6, "costs are six numbers");
  for (float c : costs) require(c >= 0 && std::isfinite(c), "costs must be finite and not negative");
  check_lists(*lists, w->first, w->limit);
  require(lists->base.size() + 1 == lists->page_start.size(), "base_J and page_start_J1 differ in length");
  require(lists->top_row < rows, "row_E names a row past the last");
  const Costs c = costs.empty() ? kCosts : Costs{costs[0], costs[1], costs[2], costs[3], costs[4], costs[5]};
  w->plan = make_plan(*lists, w->first.data(), w->limit.data(),
                      {rows, heads / groups, groups, workers, min_chunk, tile, false, !balanced, c});
  w->lists = std::move(lists);
  return wrap(std::move(w), kSchedule);
}

}  // namespace

void attend::move(Work& work, const std::int64_t* limit, std::int64_t window) {
  const Lists& lists = *work.lists;
  for (int j = 0; j < lists.pieces(); ++j) {
    const std::int64_t tokens = lists.tokens(j), base = lists.base[j];
    for (int e = lists.row_start[j]; e < lists.row_start[j + 1]; ++e) {
      const std::int64_t last = limit[lists.row[e]] - base;
      if (window >= 0)
        work.first[e] = static_cast<std::int32_t>(std::min(std::max<std::int64_t>(last - window, 0), tokens));
      work.limit[e] = static_cast<std::int32_t>(std::max<std::int64_t>(std::min(last, tokens), 0));
    }
  }
}

namespace {

// The same plan for rows that now see [limit - window, limit) of the tokens; window < 0: all before the limit.
nb::capsule schedule_moved(const nb::capsule& handle, Longs limit_T, std::int64_t window) {
  const Work& old = unwrap_work(handle, kSchedule);
  require(static_cast<std::int64_t>(limit_T.shape(0)) == old.plan->rows, "limit_T must have an entry per row");
  auto w = std::make_unique<Work>();
  w->lists = old.lists, w->plan = old.plan, w->first = old.first, w->limit = old.limit;
  move(*w, limit_T.data(), window);
  return wrap(std::move(w), kSchedule);
}

template <typename T>
nb::list list_of(const std::vector<T>& values) {
  nb::list out;
  for (const T& v : values) out.append(v);
  return out;
}

nb::dict schedule_facts(const nb::capsule& handle) {
  const Work& w = unwrap_work(handle, kSchedule);
  const Plan& p = *w.plan;
  nb::list tasks;
  for (const Task& t : p.tasks) {
    const std::int32_t end = std::min(t.to, w.lists->tokens(t.piece));
    tasks.append(nb::make_tuple(t.piece, t.begin, t.end, t.head, t.from, end, t.slot, t.cost));
  }
  nb::dict out;
  out["tasks"] = tasks;
  out["worker_start"] = list_of(p.worker_start), out["load"] = list_of(p.load);
  out["part_row"] = list_of(p.part_row), out["part_start"] = list_of(p.part_start);
  out["part_slot"] = list_of(p.part_slot), out["slots"] = p.slots;
  out["first"] = list_of(w.first), out["limit"] = list_of(w.limit);
  return out;
}

float* workspace(std::size_t count) {
  static thread_local std::vector<float> memory;
  if (memory.size() < count) memory.resize(count);
  return memory.data();
}

void schedule_run(const nb::capsule& handle, std::uintptr_t q, std::uintptr_t k, std::uintptr_t v, std::uintptr_t out,
                  std::uintptr_t lse, int rows, int heads, int groups, int size, int pages, int page, int kind,
                  float scale, float softcap) {
  const Work& w = unwrap_work(handle, kSchedule);
  check_schedule(w, rows, heads, groups, pages, page);
  float* part = workspace(static_cast<std::size_t>(w.plan->slots) * heads * (size + 1));
  const Call c{reinterpret_cast<const float*>(q), static_cast<std::int64_t>(heads) * size,
               reinterpret_cast<const void*>(k), reinterpret_cast<const void*>(v), reinterpret_cast<float*>(out),
               reinterpret_cast<float*>(lse), part, part + static_cast<std::size_t>(w.plan->slots) * heads * size, heads,
               groups, size, page, scale, softcap};
  nb::gil_scoped_release release;
  run(w.view(), *w.plan, c, kind);
  join_parts(*w.plan, c);
}

HASTEN_KERNELS(m) {
  m.def("attend_schedule", &attend_schedule);
  m.def("schedule_moved", &schedule_moved);
  m.def("schedule_facts", &schedule_facts);
  m.def("schedule_run", &schedule_run);
}

}  // namespace
}  // namespace hasten
