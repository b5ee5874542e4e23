// Attention mass by page, and the pages that hold most of it: a few dense layers choose for the layers after them.
//
// Source: DELTA, arXiv 2510.09883, section 3. Of a row's softmax over all its tokens, p[h][t] for every query head h, a
// token counts a[t] = max_h p[h][t] and a page the sum of its tokens. max_h exp(s - z_h) is one exponential per token, z_h
// being the head's log-sum-exp; another one per token and head makes z_h. Scores are in base 2 throughout (attend.h).
//
// A page here is `page` consecutive tokens of a sequence, whatever the pool's pages hold.
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "attend.h"
#include "hasten.h"
#include "select.h"
#include "stack.h"

namespace hasten {
namespace {

using namespace attend;

struct Rule {
  int page = 16;        // tokens of a page
  int pages = 64;       // how many a row reads
  int recent = 8;       // of which so many are the last ones
  bool first = false;   // and one the first

  int most() const { return pages * page; }
  int count(int length) const { return (length + page - 1) / page; }
};

constexpr int kSegment = 8 * kTile;  // tokens that a thread takes at a time

// score[rows][heads][padded] of the rows' tokens; what lies beyond a row's length is kHidden. Call in a parallel region.
template <typename KV>
void scores(const Watched& in, int heads, int kv_heads, int size, int padded, float* score) {
  static thread_local State state;
  static thread_local Padded copy;
  const int repeat = heads / kv_heads, segments = (padded + kSegment - 1) / kSegment;
  const Logits logits(in.scale, in.softcap);
  const KV* keys = static_cast<const KV*>(in.k);
#pragma omp for schedule(dynamic, 1)
  for (int task = 0; task < in.rows * kv_heads * segments; ++task) {
    const int row = task / (kv_heads * segments), group = task / segments % kv_heads, segment = task % segments;
    const int length = in.length[row], begin = segment * kSegment, end = std::min(length, begin + kSegment);
    const std::int32_t* table = in.table + static_cast<std::size_t>(row) * in.width;
    state.begin(repeat, size);
    for (int i = 0; i < repeat; ++i)
      state.load(i, in.q + row * in.stride + static_cast<std::int64_t>(group * repeat + i) * size, size, logits.query);
    float* to = score + (static_cast<std::size_t>(row) * heads + static_cast<std::size_t>(group) * repeat) * padded;
    for (int i = 0; i < repeat; ++i)
      std::fill(to + static_cast<std::size_t>(i) * padded + std::max(begin, end),
                to + static_cast<std::size_t>(i) * padded + std::min(padded, begin + kSegment), kHidden);
    for (int t = begin; t < end; t += kTile) {
      const int filled = std::min(kTile, end - t);
      Tokens<KV> tile;
      for (int i = 0; i < filled; ++i) {
        const std::size_t slot = static_cast<std::size_t>((t + i) / in.page_size);
        tile.k[i] = tile.v[i] =
            keys + ((static_cast<std::size_t>(table[slot]) * kv_heads + group) * in.page_size + (t + i) % in.page_size) *
                       (size + kTail<KV>);
      }
      auto some = [&]<int Q, typename T>(const Tokens<T>& tokens, int first) {
        alignas(64) float part[Q * kTile];
        few_scores<Q, false>(state.q.data() + static_cast<std::size_t>(first) * state.stride, state.stride, tokens, 0, filled,
                             state.stride / vf::width, part, tokens);
        fold<Q>(tokens.k, 0, filled, size, part);
        for (int i = 0; i < Q; ++i) {
          float* at = to + static_cast<std::size_t>(first + i) * padded + t;
          std::copy_n(part + i * kTile, filled, at);
          if (logits.cap > 0)
            for (int j = 0; j < filled; ++j) at[j] = logits.cap * std::tanh(at[j]);
        }
      };
      auto all = [&]<typename T>(const Tokens<T>& tokens) {
        int i = 0;
        for (; i + 3 <= repeat; i += 3) some.template operator()<3, T>(tokens, i);
        for (; i < repeat; ++i) some.template operator()<1, T>(tokens, i);
      };
      if (size % vf::width == 0) {
        all.template operator()<KV>(tile);
      } else {  // rows of whole vectors, scaled: `fold` finds nothing left to do
        copy.copy(tile, filled, size, state.stride);
        all.template operator()<float>(copy.tokens);
      }
    }
  }
}

// mass[rows][most pages]: of every page, for rows whose scores are `score`, which it overwrites. Call in a parallel region.
void masses(const Rule& rule, const Watched& in, int heads, int padded, float* score, float* z, int most, float* mass) {
#pragma omp for schedule(dynamic, 1)
  for (int task = 0; task < in.rows * heads; ++task) {
    const float* s = score + static_cast<std::size_t>(task) * padded;
    vf top = vf::set(kHidden), sum = vf::zero();
    const int end = (in.length[task / heads] + vf::width - 1) / vf::width * vf::width;
    for (int t = 0; t < end; t += vf::width) top = max(top, vf::load(s + t));
    const float peak = top.max();
    for (int t = 0; t < end; t += vf::width) sum = sum + exp2(vf::load(s + t) - vf::set(peak));
    z[task] = peak + std::log2(sum.sum());
  }
  const int segments = (padded + kSegment - 1) / kSegment;
#pragma omp for schedule(dynamic, 1)
  for (int task = 0; task < in.rows * segments; ++task) {
    const int row = task / segments, begin = task % segments * kSegment, end = std::min(padded, begin + kSegment);
    float* first = score + static_cast<std::size_t>(row) * heads * padded;
    for (int t = begin; t < end; t += vf::width) {
      vf best = vf::set(kHidden);
      for (int h = 0; h < heads; ++h)
        best = max(best, vf::load(first + static_cast<std::size_t>(h) * padded + t) - vf::set(z[row * heads + h]));
      exp2(best).store(first + t);
    }
  }
#pragma omp for schedule(dynamic, 1)
  for (int row = 0; row < in.rows; ++row) {
    const float* a = score + static_cast<std::size_t>(row) * heads * padded;
    for (int g = 0; g < rule.count(in.length[row]); ++g) {
      float sum = 0;
      for (int t = g * rule.page, stop = std::min(in.length[row], t + rule.page); t < stop; ++t) sum += a[t];
      mass[static_cast<std::size_t>(row) * most + g] = sum;
    }
  }
}

// The tokens of the pages that a row of `length` tokens reads, ascending; returns how many. Of equal masses: the earlier.
int pick(const Rule& rule, int length, float* mass, std::vector<std::int32_t>& order, std::int32_t* index) {
  const int pages = rule.count(length), kept = std::min(pages, rule.pages);
  for (int g = 0; g < pages; ++g) {
    mass[g] = mass[g] == mass[g] ? mass[g] - 1e-7f * static_cast<float>(g) : kHidden;  // NaN has no place in an order
    if (g >= pages - rule.recent || (rule.first && g == 0)) mass[g] = INFINITY;
  }
  order.resize(std::max(order.size(), static_cast<std::size_t>(pages)));
  std::int32_t* first = order.data();
  for (int g = 0; g < pages; ++g) first[g] = g;
  if (kept < pages)
    std::nth_element(first, first + kept, first + pages, [&](std::int32_t a, std::int32_t b) {
      return mass[a] > mass[b] || (mass[a] == mass[b] && a < b);
    });
  std::sort(first, first + kept);
  int n = 0;
  for (int i = 0; i < kept; ++i)
    for (int t = first[i] * rule.page, stop = std::min(length, t + rule.page); t < stop; ++t) index[n++] = t;
  return n;
}

// mass[rows][pages of the longest row]; where `index` is given also index[rows][rule.most()] and count[rows].
void weigh(const Rule& rule, const Watched& in, int heads, int kv_heads, int size, float* mass, std::int32_t* index,
           std::int32_t* count) {
  if (in.rows == 0) return;
  const int longest = *std::max_element(in.length, in.length + in.rows), most = rule.count(longest);
  const int padded = (longest + kTile - 1) / kTile * kTile;
  static thread_local std::vector<float> memory;
  const std::size_t cells = static_cast<std::size_t>(in.rows) * heads;
  float* score = grown(memory, cells * padded + cells + static_cast<std::size_t>(in.rows) * most);
  float* z = score + cells * padded;
  if (mass == nullptr) mass = z + cells;
#pragma omp parallel if (cells * padded > 4096)
  {
    static thread_local std::vector<std::int32_t> order;
    if (in.kind == kPagesBfloat16) scores<std::uint16_t>(in, heads, kv_heads, size, padded, score);
    else if (in.kind == kPagesInt8) scores<std::int8_t>(in, heads, kv_heads, size, padded, score);
    else scores<float>(in, heads, kv_heads, size, padded, score);
    masses(rule, in, heads, padded, score, z, most, mass);
    if (index != nullptr) {
#pragma omp for schedule(dynamic, 1)
      for (int row = 0; row < in.rows; ++row)
        count[row] = pick(rule, in.length[row], mass + static_cast<std::size_t>(row) * most, order,
                          index + static_cast<std::size_t>(row) * rule.most());
    }
  }
}

// What the last watching layer of the step has chosen.
struct Choice {
  Rule rule;
  std::vector<std::int32_t> index, count;
};

struct PageSelector : Selector {
  std::shared_ptr<Choice> choice;

  int most(int) const override { return choice->rule.most(); }
  void append(const float*, std::int64_t, const std::int64_t*, int) const override {}
  // A watching layer chooses for those after it.
  void watch(const Watched& in) const override {
    const auto rows = static_cast<std::size_t>(in.rows);
    weigh(choice->rule, in, heads, kv_heads, size, nullptr, grown(choice->index, rows * choice->rule.most()),
          grown(choice->count, rows));
  }
  // The others take its choice, the same for all heads.
  void choose(const float*, std::int64_t, int rows, const std::int32_t*, int, const std::int32_t*, int most,
              std::int32_t* index, std::int32_t* count) const override {
    for (int i = 0; i < rows * choices; ++i) {
      const int row = i / choices;
      count[i] = choice->count[row];
      std::copy_n(choice->index.data() + static_cast<std::size_t>(row) * most, count[i],
                  index + static_cast<std::size_t>(i) * most);
    }
  }
};

Rule rule_of(int page, int pages, int recent, bool first) {
  require(page >= 1 && pages >= 1 && recent >= 1 && recent + (first ? 1 : 0) <= pages, "no such choice of pages");
  return {page, pages, recent, first};
}

HASTEN_KERNELS(m) {
  using Address = std::uintptr_t;

  // Addresses come from the Python face, which has checked what they lead to. index_RK may be 0: then only masses.
  m.def("page_mass", [](Address q_RHD, int rows, int heads, Address table_RM, int width, Address length_R, Address keys,
                        int kind, int pool, int kv_heads, int page_size, int size, float scale, float softcap, int page,
                        int pages, int recent, bool first, Address mass_RC, Address index_RK, Address count_R) {
    const Rule rule = rule_of(page, pages, recent, first);
    const auto* table = reinterpret_cast<const std::int32_t*>(table_RM);
    const auto* length = reinterpret_cast<const std::int32_t*>(length_R);
    require(kv_heads > 0 && heads > 0 && heads % kv_heads == 0, "query heads must be a multiple of kv heads");
    for (int r = 0; r < rows; ++r) {
      require(length[r] >= 1 && (length[r] - 1) / page_size < width, "a length needs at least one token and its pages");
      for (int i = 0; i <= (length[r] - 1) / page_size; ++i) {
        const std::int32_t at = table[static_cast<std::int64_t>(r) * width + i];
        require(at >= 0 && at < pool, "a page id lies outside the pool");
      }
    }
    const Watched in{reinterpret_cast<const float*>(q_RHD), static_cast<std::int64_t>(heads) * size, rows, table, width, length,
                     reinterpret_cast<const void*>(keys), kind, page_size, scale, softcap};
    nb::gil_scoped_release release;
    weigh(rule, in, heads, kv_heads, size, reinterpret_cast<float*>(mass_RC), reinterpret_cast<std::int32_t*>(index_RK),
          reinterpret_cast<std::int32_t*>(count_R));
  });

  // Selectors that share a choice: `watching` says which of them make it.
  m.def("page_selectors", [](const std::vector<bool>& watching, int heads, int kv_heads, int size, int budget, int page,
                             int pages, int recent, bool first) {
    require(kv_heads > 0 && heads > 0 && heads % kv_heads == 0, "query heads must be a multiple of kv heads");
    auto choice = std::make_shared<Choice>();
    choice->rule = rule_of(page, pages, recent, first);
    require(budget >= choice->rule.most(), "rows that have no more pages than are chosen read densely");
    std::vector<nb::capsule> out;
    for (const bool watches : watching) {
      auto s = std::make_unique<PageSelector>();
      s->choice = choice, s->heads = heads, s->kv_heads = kv_heads, s->size = size, s->budget = budget;
      s->choices = kv_heads, s->watches = watches;
      out.push_back(wrap_selector(std::move(s)));
    }
    return out;
  });
}

}  // namespace
}  // namespace hasten
