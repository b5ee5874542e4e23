// flash_forward: exact tiled attention, in the order of FlashAttention (keys outside, output normalised at every tile and
// rewritten once per tile) or FlashAttention-2 (rows outside, output kept until it is done). See flash.h.
#include "flash.h"

namespace hasten {
namespace {

using namespace flash;

struct Task {
  Span span;
  int split;
  double cost;
};

struct Scratch {
  std::vector<Strip> strips;
  std::vector<float> query, out;
  std::vector<std::uint8_t> wanted;
  Tile tile;
  alignas(64) float score[(kMostKeys + kKeys) * kStrip];
};

// Weights of keys [begin, end) of a tile from their logits, and the new maximum, sum and output factors of every lane.
// Deferred (version 2): weights and output are relative to the running maximum, O <- f O + P V.
// `exponent`: see Problem.
// Otherwise (version 1): weights are relative to the tile's maximum and the output stays normalised, O <- f O + g P V.
template <bool Deferred, bool Masked>
void softmax(Strip& strip, int begin, int end, float exponent, float* s) {
  const vf least = vf::set(-FLT_MAX), factor = vf::set(exponent);
  auto power = [&](vf x) { return exp2_zero(Deferred ? x : x * factor); };
  for (int v = 0; v < strip.vectors(); ++v) {
    float* at = s + v * W;
    vf top = vf::set(-INFINITY);
    for (int j = begin; j < end; ++j) top = max(top, vf::load(at + j * kStrip));
    if constexpr (Deferred) top = top * factor;  // rounded once, so that all factors of a lane agree
    const vf old = vf::load(strip.m + v * W), now = max(old, top);
    // A lane that has seen nothing has maximum -inf; a finite reference keeps its weights at 0 instead of NaN.
    const vf peak = max(least, Deferred ? now : top);
    vf sum = vf::zero();
    for (int j = begin; j < end; ++j) {
      const vf y = vf::load(at + j * kStrip);
      const vf x = Deferred ? fma(y, factor, vf::zero() - peak) : (y - peak) * factor;
      const vf e = Masked ? exp2_zero(x) : exp2(x);
      e.store(at + j * kStrip);
      sum = sum + e;
    }
    const vf safe = max(least, now), before = vf::load(strip.l + v * W), kept = power(old - safe);
    now.store(strip.m + v * W);
    if constexpr (Deferred) {
      fma(before, kept, sum).store(strip.l + v * W);
      kept.store(strip.f + v * W);
    } else {
      const vf added = power(peak - safe), total = fma(before, kept, sum * added);
      const vf inverse = vf::set(1.0f) / max(vf::set(FLT_MIN), total);
      total.store(strip.l + v * W);
      (before * kept * inverse).store(strip.f + v * W);
      (added * inverse).store(strip.g + v * W);
    }
  }
}

// One strip meets one tile: keys [from, from + count).
template <bool Deferred>
void step(const Problem& p, Strip& strip, int sequence, const float* query, const Tile& tile, int from, int count,
          float* s, float* out) {
  const int begin = std::max(0, strip.from - from), end = std::min(count, strip.to - from);
  if (begin >= end) return;
  scores(tile.k, begin, end, query, p.size, strip.vectors(), s, kStrip);
  const bool masked = strip.masked(p, from + begin, from + end);
  if (masked || p.scaled()) adjust(p, strip, sequence, from, begin, end, s, kStrip);
  if (masked) softmax<Deferred, true>(strip, begin, end, p.exponent(), s);
  else softmax<Deferred, false>(strip, begin, end, p.exponent(), s);
  if (p.threshold != 0) {
    alignas(64) float keep[kStrip];
    for (int j = begin; j < end; ++j) {
      dropped(p, strip, from + j, keep);
      for (int v = 0; v < strip.vectors(); ++v)
        (vf::load(s + j * kStrip + v * W) * vf::load(keep + v * W)).store(s + j * kStrip + v * W);
    }
  }
  const Flat rows{out, p.padded()};
  product<true, Deferred ? Into::Scale : Into::Mix>(s + begin * kStrip, kStrip, strip.lanes, tile.v + begin, end - begin,
                                                    p.padded() / W, rows, {strip.f, strip.g});
}

// Writes the results of a strip; without keys a row gives 0 and -inf.
void finish(const Problem& p, const Strip& strip, int sequence, int split, const float* from) {
  const Sequence& seq = p.sequences[sequence];
  for (int i = 0; i < strip.lanes; ++i, from += p.padded()) {
    float* out = p.out + split * p.out_split + seq.o + strip.token[i] * p.os.token + strip.head[i] * p.os.head;
    const std::int64_t at = split * p.lse_split + seq.lse + strip.token[i] * p.ls.token + strip.head[i] * p.ls.head;
    const float m = strip.m[i], l = strip.l[i];
    if (!p.schedule.deferred) {
      std::copy(from, from + p.size, out);
      p.lse[at] = m, p.sum[at] = l;
    } else if (l == 0.0f) {
      std::fill(out, out + p.size, 0.0f);
      p.lse[at] = -INFINITY;
    } else {
      const float inverse = 1.0f / l;
      for (int d = 0; d < p.size; ++d) out[d] = from[d] * inverse;
      p.lse[at] = (m + std::log2(l)) * kLn2;
    }
  }
}

template <typename Q, typename KV, bool Deferred>
struct Runner {
  const Problem& p;
  const Task& task;
  Scratch& scratch;
  const int sequence = task.span.sequence;
  const int group = task.span.head / p.repeat();
  const std::size_t query_size = static_cast<std::size_t>(p.size) * kStrip;
  const std::size_t out_size = static_cast<std::size_t>(p.padded()) * kStrip;
  std::vector<int> row_blocks = {};  // of the block mask, per strip

  // Packs the queries of the spans and clears their state.
  void begin(const std::vector<Span>& spans) {
    int count = 0;
    for (const Span& s : spans) count += (s.lanes() + kStrip - 1) / kStrip;
    scratch.strips.resize(count);
    scratch.query.resize(count * query_size);
    scratch.out.assign(count * out_size, 0.0f);
    row_blocks.clear();
    const Sequence& seq = p.sequences[sequence];
    for (const Span& s : spans)
      for (int lane = 0; lane < s.lanes(); lane += kStrip) {
        const std::size_t at = row_blocks.size();
        Strip& strip = scratch.strips[at];
        strip.set(p, s, lane);
        const Q* row[kStrip];
        for (int i = 0; i < strip.lanes; ++i) row[i] = p.query<Q>(seq, strip.head[i], strip.token[i]);
        pack_strip(row, strip.lanes, p.size, 1.0f, scratch.query.data() + at * query_size);
        row_blocks.push_back(s.row_block(p));
      }
  }

  void end() {
    for (std::size_t i = 0; i < scratch.strips.size(); ++i)
      finish(p, scratch.strips[i], sequence, task.split, scratch.out.data() + i * out_size);
  }

  // Keys [from, to) for all strips that keep the key block (-1: any).
  void meet(int from, int to, int key_block) {
    bool loaded = false;
    for (std::size_t i = 0; i < scratch.strips.size(); ++i) {
      Strip& strip = scratch.strips[i];
      if (strip.from >= to || strip.to <= from) continue;
      if (key_block >= 0 && !p.kept(sequence, task.span.head, row_blocks[i], key_block)) continue;
      if (!loaded) scratch.tile.load<KV>(p, sequence, group, from, to), loaded = true;
      step<Deferred>(p, strip, sequence, scratch.query.data() + i * query_size, scratch.tile, from, to - from,
                     scratch.score, scratch.out.data() + i * out_size);
    }
  }

  void meet_run(int from, int to, int key_block) {
    for (int t = from; t < to; t += p.schedule.tile) meet(t, std::min(t + p.schedule.tile, to), key_block);
  }

  // All keys that the strips see.
  void keys() {
    const int count = p.sequences[sequence].keys, tile = p.schedule.tile;
    int low = count, high = 0;
    for (const Strip& s : scratch.strips) low = std::min(low, s.from), high = std::max(high, s.to);
    if (p.schedule.splits > 1) {
      const int part = ((count + p.schedule.splits - 1) / p.schedule.splits + tile - 1) / tile * tile;
      low = std::max(low, task.split * part), high = std::min(high, (task.split + 1) * part);
    }
    if (low >= high) return;
    if (p.keep == nullptr) return meet_run(low - low % tile, high, -1);
    const int last = (high - 1) / p.block;
    if (!p.schedule.rows_outer) {
      for (int b = low / p.block; b <= last; ++b)
        meet_run(std::max(b * p.block, low), std::min((b + 1) * p.block, high), b);
      return;
    }
    // All strips lie in one row of the mask: neighbouring blocks are read as one run.
    for (int b = low / p.block; b <= last; ++b) {
      if (!p.kept(sequence, task.span.head, row_blocks.front(), b)) continue;
      const int start = b;
      while (b < last && p.kept(sequence, task.span.head, row_blocks.front(), b + 1)) ++b;
      meet_run(std::max(start * p.block, low), std::min((b + 1) * p.block, high), -1);
    }
  }

  void run() {
    std::vector<Span> spans;
    const Span& all = task.span;
    if (p.schedule.sequence_parallel && p.schedule.rows_outer) {
      spans.push_back(all);
    } else {
      cut(p, sequence, all.head, p.schedule.lanes, spans);
      std::erase_if(spans, [&](const Span& s) { return s.begin < all.begin || s.begin >= all.end; });
    }
    if (p.schedule.rows_outer) {
      for (const Span& s : spans) begin({s}), keys(), end();
    } else {
      begin(spans), keys(), end();
    }
  }
};

template <typename Q, typename KV>
void run_task(const Problem& p, const Task& task) {
  static thread_local Scratch scratch;
  if (p.schedule.deferred) Runner<Q, KV, true>{p, task, scratch}.run();
  else Runner<Q, KV, false>{p, task, scratch}.run();
}

// Tasks: blocks of rows of a stack of heads, or all its rows. Stacks follow each other, so that neighbours share keys; within
// a stack long tasks come first, so that the last ones handed out are short.
std::vector<Task> tasks_of(const Problem& p) {
  std::vector<Task> out;
  std::vector<int> order(p.sequences.size());
  for (std::size_t b = 0; b < order.size(); ++b) order[b] = static_cast<int>(b);
  if (p.schedule.skip)
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return p.sequences[a].keys > p.sequences[b].keys; });
  for (int b : order)
    for (int head = 0; head < p.heads; head += p.stacked()) {
      std::vector<Span> spans;
      if (p.schedule.sequence_parallel) cut(p, b, head, p.schedule.lanes, spans);
      else if (p.sequences[b].rows > 0) spans.push_back({b, head, p.stacked(), 0, p.sequences[b].rows});
      if (p.schedule.skip && p.right >= 0) std::reverse(spans.begin(), spans.end());
      for (const Span& s : spans)
        for (int split = 0; split < p.schedule.splits; ++split)
          out.push_back({s, split, static_cast<double>(s.lanes()) * p.sequences[b].keys});
    }
  return out;
}

void flash_forward(nb::dict description) {
  const Problem p = read_problem(description);
  const std::vector<Task> tasks = tasks_of(p);
  require(p.schedule.deferred || tasks.empty() || (p.sum != nullptr && p.schedule.splits == 1),
          "version 1 keeps maximum and sum, unsplit");
  nb::gil_scoped_release release;
  double total = 0;
  for (const Task& t : tasks) total += t.cost;
  const int count = static_cast<int>(tasks.size());
  // Below about 10 microseconds of work, waking the other threads costs more than it saves.
  const bool parallel = count > 1 && total * p.size > 2e5;
#pragma omp parallel for schedule(dynamic, 1) if (parallel)
  for (int i = 0; i < count; ++i) {
    if (p.q_bf16) p.kv_bf16 ? run_task<std::uint16_t, std::uint16_t>(p, tasks[i]) : run_task<std::uint16_t, float>(p, tasks[i]);
    else p.kv_bf16 ? run_task<float, std::uint16_t>(p, tasks[i]) : run_task<float, float>(p, tasks[i]);
  }
}

HASTEN_KERNELS(m) {
  m.def("flash_forward", &flash_forward);
  m.attr("flash_vector") = W;  // head sizes of flash_backward are multiples of this
}

}  // namespace
}  // namespace hasten
