// A whole decoding step in one call, from token ids to logits: one row per sequence, the same sequences as in the step
// before. What a step with Python's help has planned is moved on by the tokens, and the pages, that came since.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "elementwise.h"
#include "stack.h"
#include "vocabulary.h"

namespace hasten {
namespace {

// What lies before the first layer and after the last. Kept alive by the Python side.
struct Ends {
  const Packed *table = nullptr, *head = nullptr;  // embedding rows are those of a packed layer, or of `plain`
  const void* plain = nullptr;                     // [vocabulary][hidden]
  bool bf16 = false;
  const float* norm = nullptr;
  float scale = 1, eps = 0;
  std::int64_t vocabulary = 0;
  int hidden = 0;

  void embed(std::int64_t token, float* x) const {
    if (table != nullptr) {
      table->row(static_cast<int>(token), x);
    } else if (bf16) {
      const std::uint16_t* from = static_cast<const std::uint16_t*>(plain) + token * hidden;
      for (int i = 0; i < hidden; ++i) x[i] = std::bit_cast<float>(static_cast<std::uint32_t>(from[i]) << 16);
    } else {
      std::memcpy(x, static_cast<const float*>(plain) + token * hidden, sizeof(float) * static_cast<std::size_t>(hidden));
    }
    if (scale != 1)
      for (int i = 0; i < hidden; ++i) x[i] *= scale;
  }
};

// The embedding table: a packed layer's rows (table), or [vocabulary][hidden] at `plain`.
nb::capsule decode_ends(nb::object table, Address plain, bool bf16, std::int64_t vocabulary, float scale, Address norm,
                        float eps, nb::capsule head) {
  auto e = std::make_unique<Ends>();
  e->head = &unwrap(head), e->hidden = e->head->inputs, e->vocabulary = vocabulary;
  e->plain = reinterpret_cast<const void*>(plain), e->bf16 = bf16, e->scale = scale, e->eps = eps;
  e->norm = reinterpret_cast<const float*>(norm);
  if (!table.is_none()) {
    e->table = &unwrap(nb::cast<nb::capsule>(table));
    require(e->table->inputs == e->hidden && e->table->outputs == vocabulary, "the embedding table does not fit the head");
    std::vector<float> row(static_cast<std::size_t>(e->hidden));
    require(e->table->row(0, row.data()), "this packed layer cannot be read row by row");
  } else {
    require(e->plain != nullptr, "an embedding table is needed");
  }
  require(e->norm != nullptr && vocabulary > 0, "a final norm and a vocabulary are needed");
  return nb::capsule(e.release(), "hasten.decode_ends", [](void* p) noexcept { delete static_cast<Ends*>(p); });
}

// The sequences of a round and where their tokens lie, as planned for its first step.
struct Round {
  const Stack* stack;
  const Ends* ends;
  int rows;
  std::vector<attend::Work> works;
  std::vector<std::shared_ptr<attend::Lists>> lists;  // of the works, owned
  std::vector<std::int64_t> windows;
  std::vector<Read> reads;
  std::vector<std::int32_t> table, length;  // [rows][width], [rows]
  std::vector<const Selector*> selectors;   // by layer, or empty
  int width = 0;
};

// Pages that a round may grow by; then it is planned anew, since its balance is that of its first step.
constexpr int kMorePages = 16;

// Schedule, window (-1: none), softmax scale, soft cap (0: none).
using Reading = std::tuple<nb::capsule, std::int64_t, float, float>;

nb::capsule decode_round(const nb::capsule& stack, const nb::capsule& ends, const std::vector<Reading>& readings,
                         Array<const std::int32_t, -1, -1> table, const std::vector<nb::object>& selectors) {
  require(std::strcmp(ends.name(), "hasten.decode_ends") == 0, "not the ends of a decoder");
  auto r = std::make_unique<Round>();
  r->stack = &unwrap_stack(stack), r->ends = static_cast<const Ends*>(ends.data());
  r->rows = static_cast<int>(table.shape(0)), r->width = static_cast<int>(table.shape(1));
  require(r->ends->hidden == r->stack->hidden(), "the head does not fit the layers");
  r->works.reserve(readings.size());
  for (const auto& [schedule, window, scale, softcap] : readings) {
    const attend::Work& work = attend::unwrap_work(schedule, attend::kSchedule);
    r->lists.push_back(std::make_shared<attend::Lists>(*work.lists));
    r->works.push_back({r->lists.back(), work.first, work.limit, work.plan, {}});
    r->windows.push_back(window);
    r->reads.push_back({&r->works.back(), scale, softcap});
  }
  check_reads(*r->stack, r->reads, r->rows);
  r->table.assign(static_cast<std::size_t>(r->rows) * (r->width + kMorePages), -1);
  for (int i = 0; i < r->rows; ++i)
    std::copy_n(table.data() + static_cast<std::ptrdiff_t>(i) * r->width, r->width,
                r->table.data() + static_cast<std::ptrdiff_t>(i) * (r->width + kMorePages));
  r->width += kMorePages;
  r->length.resize(static_cast<std::size_t>(r->rows));
  if (!selectors.empty()) {
    require(selectors.size() == r->stack->layers.size(), "one selector, or none, for each layer");
    for (std::size_t i = 0; i < selectors.size(); ++i) {
      const Selector* s = selectors[i].is_none() ? nullptr : &unwrap_selector(nb::cast<nb::capsule>(selectors[i]));
      const Block& b = *r->stack->layers[i].block;
      require(s == nullptr || (s->heads == b.heads && s->kv_heads == b.kv_heads && s->size == b.size &&
                               (s->pages == 0 || (s->pages == r->stack->pages && s->page_size == r->stack->page))),
              "a selector does not fit its layer");
      r->selectors.push_back(s);
    }
  }
  return nb::capsule(r.release(), "hasten.decode_round", [](void* p) noexcept { delete static_cast<Round*>(p); });
}

// The piece that only `row` reads and that holds its last tokens, or -1.
int own_piece(const attend::Lists& lists, int row) {
  int best = -1;
  for (int j = 0; j < lists.pieces(); ++j)
    for (int e = lists.row_start[j]; e < lists.row_start[j + 1]; ++e)
      if (lists.row[e] == row && (best < 0 || lists.base[j] > lists.base[best])) best = j;
  return best >= 0 && lists.row_start[best + 1] - lists.row_start[best] == 1 ? best : -1;
}

// `row` goes on in a new page, the `at`-th of its sequence; false if the round cannot grow there.
bool decode_extend(const nb::capsule& handle, int row, int at, std::int32_t page) {
  require(std::strcmp(handle.name(), "hasten.decode_round") == 0, "not a decoding round");
  Round& r = *static_cast<Round*>(handle.data());
  require(row >= 0 && row < r.rows && at >= 0 && page >= 0 && page < r.stack->pages, "no such row or page");
  if (at >= r.width) return false;
  std::vector<int> pieces;
  for (const auto& lists : r.lists) {
    const int j = own_piece(*lists, row);
    if (j < 0 || lists->base[j] + lists->tokens(j) != at * lists->page_size) return false;
    pieces.push_back(j);
  }
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    attend::Lists& lists = *r.lists[i];
    lists.page.insert(lists.page.begin() + lists.page_start[pieces[i] + 1], page);
    for (int j = pieces[i] + 1; j <= lists.pieces(); ++j) ++lists.page_start[j];
    lists.top_page = std::max(lists.top_page, page);
  }
  r.table[static_cast<std::size_t>(row) * r.width + at] = page;
  return true;
}

// Cos and sin [length][rotated] of all positions.
using Rotary = std::tuple<Address, Address, int, std::int64_t>;

// Runs a step: ids, rotary positions, slots and lengths (this token included) by row. Logits float32 [rows][vocabulary].
// The highest logit's token of each row, -1 if a logit is not finite.
std::vector<std::int64_t> decode_step(const nb::capsule& handle, const std::vector<std::int64_t>& id,
                                      const std::vector<std::int64_t>& position, const std::vector<std::int64_t>& slot,
                                      const std::vector<std::int64_t>& length, const std::vector<Rotary>& ropes,
                                      Address logits_address) {
  require(std::strcmp(handle.name(), "hasten.decode_round") == 0, "not a decoding round");
  Round& r = *static_cast<Round*>(handle.data());
  const Stack& stack = *r.stack;
  const Ends& ends = *r.ends;
  const auto rows = static_cast<std::size_t>(r.rows);
  require(id.size() == rows && position.size() == rows && slot.size() == rows && length.size() == rows,
          "one id, position, slot and length for each row of the round");
  require(static_cast<int>(ropes.size()) == stack.ropes, "one pair of rotary tables per rope of the stack");
  rope::check_slots(slot.data(), r.rows, stack.pages, stack.page);
  std::vector<rope::Tables> tables;
  static thread_local std::vector<float> rotary, x_memory;
  std::size_t total = 0;
  for (const auto& [cos, sin, rotated, count] : ropes) {
    require(rotated >= 0 && rotated % 2 == 0, "rotary tables need an even width");
    for (std::int64_t p : position) require(p >= 0 && p < count, "a position lies beyond the rotary tables");
    total += 2 * rows * static_cast<std::size_t>(rotated);
  }
  for (const Stack::Layer& layer : stack.layers)
    require(std::get<2>(ropes[layer.rope]) <= layer.block->size, "rotary tables are wider than a head");
  int longest = 0;
  for (std::size_t i = 0; i < rows; ++i) {
    require(id[i] >= 0 && id[i] < ends.vocabulary, "a token id lies outside the vocabulary");
    require(length[i] >= 1 && length[i] <= static_cast<std::int64_t>(r.width) * stack.page, "a length exceeds its row's pages");
    for (std::int64_t m = 0; m * stack.page < length[i]; ++m) {
      const std::int32_t page = r.table[i * static_cast<std::size_t>(r.width) + static_cast<std::size_t>(m)];
      require(page >= 0 && page < stack.pages, "a page id lies outside the pool");
    }
    r.length[i] = static_cast<std::int32_t>(length[i]);
    longest = std::max(longest, r.length[i]);
  }
  const std::int32_t shortest = rows == 0 ? 0 : *std::min_element(r.length.begin(), r.length.end());
  for (const Selector* s : r.selectors)
    require(s == nullptr || shortest > s->budget || longest <= s->budget, "rows on both sides of a selector's budget");
  std::vector<std::int64_t> best(rows);
  bool found;
  {
    nb::gil_scoped_release release;
    float* at = grown(rotary, total);
    for (const auto& [cos, sin, rotated, count] : ropes) {
      const auto width = static_cast<std::size_t>(rotated);
      for (std::size_t i = 0; i < rows; ++i) {
        const auto from = static_cast<std::size_t>(position[i]) * width;
        std::memcpy(at + i * width, reinterpret_cast<const float*>(cos) + from, sizeof(float) * width);
        std::memcpy(at + (rows + i) * width, reinterpret_cast<const float*>(sin) + from, sizeof(float) * width);
      }
      tables.push_back({at, at + rows * width, rotated});
      at += 2 * rows * width;
    }
    for (std::size_t i = 0; i < r.works.size(); ++i) attend::move(r.works[i], length.data(), r.windows[i]);
    const auto hidden = static_cast<std::size_t>(ends.hidden);
    float* x = grown(x_memory, rows * hidden);
    for (std::size_t i = 0; i < rows; ++i) ends.embed(id[i], x + i * hidden);
    const Choosing choosing{r.selectors, r.table.data(), r.length.data(), r.width, longest, shortest};
    found = run_stack(stack, x, r.rows, slot.data(), tables, r.reads, r.selectors.empty() ? nullptr : &choosing);
    rms_norm(x, ends.hidden, r.rows, ends.hidden, ends.norm, ends.eps, x, ends.hidden);
    float* logits = reinterpret_cast<float*>(logits_address);
    const int outputs = ends.head->outputs;
    ends.head->forward(x, ends.hidden, r.rows, logits, outputs);
#pragma omp parallel for schedule(static) if (rows > 4)
    for (std::size_t i = 0; i < rows; ++i) best[i] = best_token(logits + i * static_cast<std::size_t>(outputs), outputs);
  }
  require(found, "a selection names a token without a page");
  return best;
}

HASTEN_KERNELS(m) {
  m.def("decode_ends", &decode_ends, nb::arg("table").none(), nb::arg("plain"), nb::arg("bf16"), nb::arg("vocabulary"),
        nb::arg("scale"), nb::arg("norm"), nb::arg("eps"), nb::arg("head"));
  m.def("decode_round", &decode_round);
  m.def("decode_extend", &decode_extend);
  m.def("decode_step", &decode_step);
}

}  // namespace
}  // namespace hasten
