// One task of exact attention: a kv head of a tile of query rows over a chunk of a piece. Shared by the engine's own kernel
// (attend.cpp) and by variants compiled at run time (attend_variant.h), so nothing here needs Python.
#pragma once

#include "attend_many.h"

namespace hasten::attend {

// Entries [begin, end) of a piece and their kv head, over the piece's tokens [from, to). Results go to the entries' own rows
// (slot < 0: written through) or to the workspace from `slot` on.
struct Task {
  std::int32_t piece, begin, end, head, from, to, slot;
  float cost;
};

// Which query rows read which runs of pages; see PieceWork in hasten/kernels/attention.py. base: absolute index of a
// piece's first token.
struct View {
  const std::int32_t *page, *page_start, *base, *row, *first, *limit;
};

struct Call {
  const float* q;
  std::int64_t q_stride;  // floats from row to row
  const void *k, *v;
  float *out, *lse;            // by query row
  float *part_out, *part_lse;  // workspace, by slot
  std::int32_t heads, groups, size, page;
  float scale, softcap;
};

// Addresses of the tokens [from, to) of a piece for one kv head.
template <typename KV>
void locate(const View& w, const Call& c, const Task& task, int from, int to, Tokens<KV>& tile) {
  const std::int32_t* pages = w.page + w.page_start[task.piece];
  const std::size_t size = static_cast<std::size_t>(c.size) + kTail<KV>;
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

// The policy says how scores become weights (see Logits in attend.h); `begin` and `tile` tell it where it is.
template <typename KV, typename Policy>
void run_task(const View& w, const Call& c, const Task& task, Policy& policy) {
  static thread_local Scratch scratch;
  State& st = scratch.state;
  const int repeat = c.heads / c.groups;
  policy.begin(w, c, task);
  st.begin((task.end - task.begin) * repeat, c.size);
  auto seen = [&](int e) { return Span{std::max(w.first[e], task.from), std::min(w.limit[e], task.to)}; };
  int low = INT32_MAX, high = 0;
  for (int e = task.begin; e < task.end; ++e) {
    const float* q = c.q + w.row[e] * c.q_stride + static_cast<std::int64_t>(task.head) * repeat * c.size;
    for (int i = 0; i < repeat; ++i) {
      const int row = (e - task.begin) * repeat + i;
      st.load(row, q + static_cast<std::size_t>(i) * c.size, c.size, policy.query);
      policy.load(row, st.q.data() + static_cast<std::size_t>(row) * st.stride);
    }
    const Span s = seen(e);
    if (s.low >= s.high) continue;
    low = std::min(low, s.low);
    high = std::max(high, s.high);
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
      const Span s = seen(e);
      std::fill_n(scratch.span.begin() + (e - task.begin) * repeat, repeat,
                  Span{std::max(0, s.low - t), std::min(count, s.high - t)});
    }
    policy.tile(t);
    scratch.add(tiles[now], count, c.size, policy, ahead > 0 ? &tiles[1 - now] : nullptr);
    now = 1 - now;
  }
  for (int e = task.begin; e < task.end; ++e)
    for (int i = 0; i < repeat; ++i) {
      const bool through = task.slot < 0;
      const std::size_t at = static_cast<std::size_t>(through ? w.row[e] : task.slot + e - task.begin) * c.heads +
                             static_cast<std::size_t>(task.head) * repeat + i;
      float* out = (through ? c.out : c.part_out) + at * c.size;
      (through ? c.lse : c.part_lse)[at] = policy.finish(st, (e - task.begin) * repeat + i, out, through);
    }
}

// Plain softmax attention as a policy of run_task.
struct Plain : Logits {
  int size;
  explicit Plain(const Call& c) : Logits(c.scale, c.softcap), size(c.size) {}
  void begin(const View&, const Call&, const Task&) {}
  void load(int, float*) {}
  void tile(int) {}
  float finish(const State& st, int row, float* out, bool) const { return st.finish(row, out, size); }
};

// Joins the parts slot[0 .. count) of one row and head: out = sum w_j out_j / sum w_j, w_j = exp(lse_j - max lse). Returns
// the joined lse; without parts, or with empty ones only, out is 0 and lse -inf. `part` holds [slot][heads][size].
inline float join(const float* part, const float* lse, const std::int32_t* slot, int count, int heads, int head, int size,
                  float* o) {
  float top = -INFINITY;
  auto at = [&](int i) { return static_cast<std::size_t>(slot[i]) * heads + head; };
  for (int i = 0; i < count; ++i) {
    const float x = lse[at(i)];
    top = x > top || std::isnan(x) ? x : top;
  }
  if (top == -INFINITY) {
    std::memset(o, 0, static_cast<std::size_t>(size) * sizeof(float));
    return top;
  }
  float total = 0;
  for (int i = 0; i < count; ++i) total += std::exp(lse[at(i)] - top);
  const float inverse = 1.0f / total;
  bool fresh = true;
  for (int i = 0; i < count; ++i) {
    if (lse[at(i)] == -INFINITY) continue;
    const float weight = std::exp(lse[at(i)] - top) * inverse;
    const float* from = part + at(i) * size;
    const vf w = vf::set(weight);
    int d = 0;
    if (fresh) {
      for (; d + vf::width <= size; d += vf::width) (w * vf::load(from + d)).store(o + d);
      for (; d < size; ++d) o[d] = weight * from[d];
    } else {
      for (; d + vf::width <= size; d += vf::width) fma(w, vf::load(from + d), vf::load(o + d)).store(o + d);
      for (; d < size; ++d) o[d] += weight * from[d];
    }
    fresh = false;
  }
  return top + std::log(total);
}

}  // namespace hasten::attend
