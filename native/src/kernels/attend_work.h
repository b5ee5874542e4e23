// The work list of one step's attention (which query rows read which runs of pages), its plan (which worker does what),
// and the calls that run it: behind the Python faces attend_pieces and Schedule, and inside a decoder step (step.cpp).
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <tuple>
#include <vector>

#include "attend_run.h"
#include "hasten.h"

namespace hasten::attend {

// What a plan is made of: costs of a task, in nanoseconds of the machine that calibrated them (only ratios matter). A task of
// r query vectors over n tokens costs alpha * r + n * (token + pass * passes): up to kFew vectors take one pass per three, more
// take one pass per register tile of kGroup vectors.
struct Costs {
  float few_alpha, few_token, few_pass, many_alpha, many_token, many_pass;

  float per_token(int vectors) const {
    return vectors <= kFew ? few_token + few_pass * static_cast<float>((vectors + 2) / 3)
                           : many_token + many_pass * static_cast<float>((vectors + kGroup - 1) / kGroup);
  }
  float alpha(int vectors) const { return (vectors <= kFew ? few_alpha : many_alpha) * static_cast<float>(vectors); }
};

// Who does what: tasks[worker_start[w] .. worker_start[w + 1]) is worker w's list, in order. Rows in several parts are
// joined at the end: part_row[i] has the slots part_slot[part_start[i] .. part_start[i + 1]), in a fixed order.
struct Plan {
  int rows = 0, repeat = 1, groups = 1, slots = 0;
  double vectors = 0;  // query vectors x tokens
  std::vector<Task> tasks;
  std::vector<std::int32_t> worker_start, part_row, part_start, part_slot;
  std::vector<std::uint8_t> lead;  // by slot: whether it is its row's first part
  std::vector<double> load;        // by worker

  int workers() const { return static_cast<int>(worker_start.size()) - 1; }
};

struct Lists {
  std::vector<std::int32_t> page, page_start, base, row_start, row;
  int page_size = 0;
  std::int32_t top_page = -1, top_row = -1;

  int pieces() const { return static_cast<int>(page_start.size()) - 1; }
  int tokens(int piece) const { return (page_start[piece + 1] - page_start[piece]) * page_size; }
};

struct Work {
  std::shared_ptr<const Lists> lists;
  std::vector<std::int32_t> first, limit;
  std::shared_ptr<const Plan> plan;  // of a schedule
  // Of attend_pieces, where every entry is a part: by (query heads per kv head, kv heads, workers); made under the GIL.
  std::map<std::tuple<int, int, int>, std::shared_ptr<const Plan>> plans;

  int entries() const { return static_cast<int>(first.size()); }
  View view() const {
    return {lists->page.data(), lists->page_start.data(), lists->base.data(), lists->row.data(), first.data(),
            limit.data()};
  }
};

// The scheduler; see flashinfer_plan.cpp. entries: every entry is a part of its own and nothing is cut. fixed: the static
// schedule that others are compared with, tasks in the order of the lists, as many for each worker, nothing cut.
struct Request {
  int rows, repeat, groups, workers, min_chunk, tile;
  bool entries, fixed;
  Costs costs;
};
std::shared_ptr<const Plan> make_plan(const Lists& lists, const std::int32_t* first, const std::int32_t* limit,
                                      const Request& request);
extern const Costs kCosts;
constexpr int kWorkersPerThread = 4;

inline constexpr const char* kWork = "hasten.attend_work";
inline constexpr const char* kSchedule = "hasten.attend_schedule";
nb::capsule wrap(std::unique_ptr<Work> work, const char* name);
Work& unwrap_work(const nb::capsule& handle, const char* name);

// Entries see [limit - window, limit) of the absolute tokens from now on, limit by query row; window < 0: all before it.
void move(Work& work, const std::int64_t* limit, std::int64_t window);

// Raises ValueError for lists that do not fit each other; sets their top page and row.
void check_lists(Lists& lists, const std::vector<std::int32_t>& first, const std::vector<std::int32_t>& limit);

// Raises ValueError unless the work fits `rows` query rows and a pool of `pages` pages of `page` tokens.
void check_work(const Work& work, int rows, int pages, int page);
// Raises ValueError unless the work is a schedule of exactly `rows` rows and these heads that fits the pool.
void check_schedule(const Work& work, int rows, int heads, int groups, int pages, int page);

// All tasks, worker by worker. kind: a PageKind.
void run(const View& view, const Plan& plan, const Call& call, int kind);
// Joins the rows that are in several parts.
void join_parts(const Plan& plan, const Call& call);

// Joins the parts entry[start[t] .. start[t + 1]) of each row t; see merge.cpp.
void merge(const float* out, const float* lse, const std::int32_t* start, const std::int32_t* entry, int rows, int heads,
           int size, float* to, float* to_lse);

}  // namespace hasten::attend
