// flash_backward: gradients of flash_forward by recomputation, from the outputs and one statistic per row.
//
// A task owns blocks of keys of one kv head: it recomputes their weights against all rows that see them and keeps their dK
// and dV. What it adds to dQ goes to the result, or, when several tasks share a head, to a buffer of its own; the buffers are
// then summed in a fixed order. All tensors are float32 and head sizes whole vectors (hasten/kernels/flash.py sees to it).
#include <omp.h>

#include <nanobind/stl/pair.h>

#include <cstdlib>

#include "flash.h"

namespace hasten {
namespace {

using namespace flash;

constexpr int kTasksPerThread = 2;  // fewest tasks per thread that splitting a head aims for: each costs a buffer of dQ

struct Gradients {
  const float *dout, *out;         // laid out like p.out
  float *dq, *dk, *dv;             // dq: laid out like p.out; dk and dv alike
  std::int64_t dq_size;
  std::vector<std::int64_t> offset;  // of a sequence in dk and dv
  Stride stride;
};

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float, Free>;

// Uninitialised floats, or zeros.
Buffer floats(std::size_t count, bool zero) {
  void* p = zero ? std::calloc(std::max<std::size_t>(count, 1), 4) : std::malloc(std::max<std::size_t>(count, 1) * 4);
  if (p == nullptr) throw std::bad_alloc();
  return Buffer(static_cast<float*>(p));
}

// Everything about the rows that does not depend on the keys, made once: what lanes see, queries and dO packed for the
// score tiles (dO times `scale`, so that dS comes out scaled), statistics.
struct Rows {
  std::vector<Span> spans;
  std::vector<int> strip_start;              // of a span
  std::vector<int> span_start;               // of a stack (sequence, head / stacked)
  std::vector<Strip> strips;
  Buffer query, dout;
  std::size_t size;                          // floats of a packed strip

  Rows(const Problem& p, const Gradients& g) : size(static_cast<std::size_t>(p.size) * kStrip) {
    int count = 0;
    for (int b = 0; b < static_cast<int>(p.sequences.size()); ++b)
      for (int head = 0; head < p.heads; head += p.stacked()) {
        span_start.push_back(static_cast<int>(spans.size()));
        cut(p, b, head, p.schedule.lanes, spans);
      }
    span_start.push_back(static_cast<int>(spans.size()));
    for (const Span& s : spans) strip_start.push_back(count), count += (s.lanes() + kStrip - 1) / kStrip;
    strip_start.push_back(count);
    strips.resize(count);
    query = floats(count * size, false), dout = floats(count * size, false);
#pragma omp parallel for schedule(dynamic, 4) if (static_cast<double>(count) * static_cast<double>(size) > 1e5)
    for (int i = 0; i < static_cast<int>(spans.size()); ++i) prepare(p, g, i);
  }

  void prepare(const Problem& p, const Gradients& g, int index) {
    const Span& span = spans[index];
    const Sequence& seq = p.sequences[span.sequence];
    for (int lane = 0, at = strip_start[index]; lane < span.lanes(); lane += kStrip, ++at) {
      Strip& strip = strips[at];
      strip.set(p, span, lane);
      const float *q[kStrip], *d[kStrip];
      for (int i = 0; i < kStrip; ++i) {
        strip.m[i] = strip.l[i] = strip.f[i] = 0.0f;
        if (i >= strip.lanes) continue;
        const std::int64_t o = seq.o + strip.token[i] * p.os.token + strip.head[i] * p.os.head;
        const std::int64_t l = seq.lse + strip.token[i] * p.ls.token + strip.head[i] * p.ls.head;
        q[i] = p.query<float>(seq, strip.head[i], strip.token[i]);
        d[i] = g.dout + o;
        if (p.schedule.deferred) {
          // A row without keys has no weights: its statistic makes every one of them 0.
          strip.m[i] = p.lse[l] == -INFINITY ? FLT_MAX : p.lse[l] * kLog2e;
          strip.l[i] = dot(d[i], g.out + o, p.size) * p.scale;
        } else {
          strip.m[i] = p.sum[l] == 0.0f ? FLT_MAX : p.lse[l];
          strip.f[i] = p.sum[l] == 0.0f ? 0.0f : 1.0f / p.sum[l];
        }
      }
      pack_strip(q, strip.lanes, p.size, 1.0f, query.get() + at * size);
      pack_strip(d, strip.lanes, p.size, p.scale, dout.get() + at * size);
    }
  }

  static float dot(const float* a, const float* b, int size) {
    vf sum = vf::zero();
    for (int d = 0; d < size; d += W) sum = fma(vf::load(a + d), vf::load(b + d), sum);
    return sum.sum();
  }
};

struct Listed {  // rows anywhere
  float* const* row;
  float* operator()(int i) const { return row[i]; }
};

struct Column {  // keys [from, to), within one column of the block mask
  int from, to, block;
};

struct Scratch {
  Tile tile;
  std::vector<float> p, ds, slopes, dk, dv;
  std::vector<const float*> query, dout;
  std::vector<float*> dq;
};

// Turns logits into weights (times the dropout mask) and gradients of weights into gradients of products, in place.
template <bool Deferred, bool Masked>
void weights(const Problem& p, const Strip& strip, int first, int begin, int end, float* s, float* ds,
             const float* slopes, int ld) {
  alignas(64) float keep[kStrip];
  const vf factor = vf::set(p.exponent());
  for (int j = begin; j < end; ++j) {
    if (p.threshold != 0) dropped(p, strip, first + j, keep);
    for (int v = 0; v < strip.vectors(); ++v) {
      float *ps = s + j * ld + v * W, *pd = ds + j * ld + v * W;
      const vf m = vf::load(strip.m + v * W);
      const vf x = Deferred ? fma(vf::load(ps), factor, vf::zero() - m) : (vf::load(ps) - m) * factor;
      vf e = Masked ? exp2_zero(x) : exp2(x);
      if constexpr (!Deferred) e = e * vf::load(strip.f + v * W);
      vf d = vf::load(pd), kept = e;
      if (p.threshold != 0) {
        const vf z = vf::load(keep + v * W);
        d = d * z, kept = e * z;
      }
      d = e * (d - vf::load(strip.l + v * W));
      if (p.softcap > 0) d = d * vf::load(slopes + j * ld + v * W);
      kept.store(ps);
      d.store(pd);
    }
  }
}

struct Task {
  int sequence, group, part;
};

struct Runner {
  const Problem& p;
  const Gradients& g;
  const Rows& rows;
  const Task& task;
  float* dq;  // laid out like p.out
  Scratch& scratch;
  const Sequence& seq = p.sequences[task.sequence];

  void run(const std::vector<Column>& columns, int parts) {
    for (std::size_t c = task.part; c < columns.size(); c += parts) column(columns[c]);
  }

  void column(const Column& c) {
    const int count = c.to - c.from, stacks = p.heads / p.stacked(), per_group = p.repeat() / p.stacked();
    scratch.tile.load<float>(p, task.sequence, task.group, c.from, c.to);
    scratch.dk.assign(static_cast<std::size_t>(count) * p.size, 0.0f);
    scratch.dv.assign(static_cast<std::size_t>(count) * p.size, 0.0f);
    for (int stack = task.group * per_group; stack < (task.group + 1) * per_group; ++stack) {
      const int at = task.sequence * stacks + stack;
      for (int i = rows.span_start[at]; i < rows.span_start[at + 1]; ++i) {
        const Span& span = rows.spans[i];
        if (c.block < 0 || p.kept(task.sequence, span.head, span.row_block(p), c.block)) meet(c, i);
      }
    }
    for (int j = 0; j < count; ++j) {
      const std::int64_t to = g.offset[task.sequence] + task.group * g.stride.head + (c.from + j) * g.stride.token;
      std::copy_n(scratch.dk.data() + static_cast<std::size_t>(j) * p.size, p.size, g.dk + to);
      std::copy_n(scratch.dv.data() + static_cast<std::size_t>(j) * p.size, p.size, g.dv + to);
    }
  }

  // A block of keys meets a block of rows.
  void meet(const Column& c, int index) {
    int first = rows.strip_start[index], last = rows.strip_start[index + 1];
    auto sees = [&](const Strip& s) { return s.from < c.to && s.to > c.from; };
    while (first < last && !sees(rows.strips[first])) ++first;
    while (first < last && !sees(rows.strips[last - 1])) --last;
    if (first == last) return;
    const int count = c.to - c.from, ld = (last - first) * kStrip;
    const std::size_t size = static_cast<std::size_t>(count + kKeys) * ld;
    auto grow = [](auto& x, std::size_t n) { if (x.size() < n) x.resize(n); };
    grow(scratch.p, size), grow(scratch.ds, size);
    if (p.softcap > 0) grow(scratch.slopes, size);
    grow(scratch.query, ld), grow(scratch.dout, ld), grow(scratch.dq, ld);
    int lanes = 0;
    for (int i = first; i < last; ++i) {
      strip(c, i, count, (i - first) * kStrip, ld);
      const Strip& s = rows.strips[i];
      for (int lane = 0; lane < s.lanes; ++lane, ++lanes) {
        const std::int64_t o = seq.o + s.token[lane] * p.os.token + s.head[lane] * p.os.head;
        scratch.query[lanes] = p.query<float>(seq, s.head[lane], s.token[lane]);
        scratch.dout[lanes] = g.dout + o;
        scratch.dq[lanes] = dq + o;
      }
    }
    const int vectors = p.size / W;
    product<false, Into::Add>(scratch.p.data(), ld, count, scratch.dout.data(), lanes, vectors,
                              Flat{scratch.dv.data(), p.size});
    product<false, Into::Add>(scratch.ds.data(), ld, count, scratch.query.data(), lanes, vectors,
                              Flat{scratch.dk.data(), p.size});
    product<true, Into::Add>(scratch.ds.data(), ld, lanes, scratch.tile.k, count, vectors, Listed{scratch.dq.data()});
  }

  // Weights and their gradients of one strip, in columns [at, at + kStrip) of the block.
  void strip(const Column& c, int index, int count, int at, int ld) {
    const Strip& known = rows.strips[index];
    float *s = scratch.p.data() + at, *ds = scratch.ds.data() + at;
    float* slopes = p.softcap > 0 ? scratch.slopes.data() + at : nullptr;
    const int begin = std::max(0, known.from - c.from), end = std::max(begin, std::min(count, known.to - c.from));
    scores(scratch.tile.k, begin, end, rows.query.get() + index * rows.size, p.size, known.vectors(), s, ld);
    scores(scratch.tile.v, begin, end, rows.dout.get() + index * rows.size, p.size, known.vectors(), ds, ld);
    for (int j = 0; j < count; ++j)
      if (j < begin || j >= end) std::fill_n(s + j * ld, kStrip, 0.0f), std::fill_n(ds + j * ld, kStrip, 0.0f);
    if (begin == end) return;
    const bool masked = known.masked(p, c.from + begin, c.from + end);
    if (masked || p.scaled()) adjust(p, known, task.sequence, c.from, begin, end, s, ld, slopes);
    if (p.schedule.deferred) {
      if (masked) weights<true, true>(p, known, c.from, begin, end, s, ds, slopes, ld);
      else weights<true, false>(p, known, c.from, begin, end, s, ds, slopes, ld);
      return;
    }
    // Version 1 finds rowsum(dO * O) again for every tile.
    Strip strip = known;
    for (int i = 0; i < strip.lanes; ++i) {
      const std::int64_t o = seq.o + strip.token[i] * p.os.token + strip.head[i] * p.os.head;
      strip.l[i] = Rows::dot(g.dout + o, g.out + o, p.size) * p.scale;
    }
    if (masked) weights<false, true>(p, strip, c.from, begin, end, s, ds, slopes, ld);
    else weights<false, false>(p, strip, c.from, begin, end, s, ds, slopes, ld);
  }
};

std::vector<Column> columns_of(const Problem& p, int keys) {
  std::vector<Column> out;
  const int block = p.keep == nullptr ? std::max(keys, 1) : p.block;
  for (int b = 0; b < keys; b += block)
    for (int t = b; t < std::min(keys, b + block); t += p.schedule.tile)
      out.push_back({t, std::min({keys, b + block, t + p.schedule.tile}), p.keep == nullptr ? -1 : b / block});
  return out;
}

// Into how many tasks a head is cut: the fewest that give every thread something to do and all nearly the same (tasks of a
// head cost alike, as they take its columns in turn).
int parts_of(int groups, int columns, int threads) {
  if (threads == 1) return 1;
  for (int parts = 1; parts < columns; ++parts) {
    const int tasks = groups * parts, rounds = (tasks + threads - 1) / threads;
    if (tasks >= kTasksPerThread * threads && 20 * rounds * threads <= 21 * tasks) return parts;
  }
  return std::max(columns, 1);
}

// dq must be zero.
void flash_backward(nb::dict description) {
  const Problem p = read_problem(description);
  require(!p.q_bf16 && !p.kv_bf16 && p.table == nullptr && p.size % W == 0 && p.schedule.splits == 1,
          "gradients need float32 tensors, unpaged, with head sizes of whole vectors");
  auto at = [&](const char* name) { return reinterpret_cast<float*>(nb::cast<std::uintptr_t>(description[name])); };
  const auto offsets = nb::cast<Array<const std::int64_t, -1>>(description["kv_gradient_offset"]);
  const auto stride = nb::cast<std::pair<std::int64_t, std::int64_t>>(description["kv_gradient_stride"]);
  const Gradients g{at("dout"), at("out"), at("dq"), at("dk"), at("dv"), nb::cast<std::int64_t>(description["dq_size"]),
                    {offsets.data(), offsets.data() + offsets.shape(0)}, {stride.first, stride.second}};
  require(g.offset.size() == p.sequences.size(), "kv_gradient_offset needs one entry per sequence");
  const int groups = static_cast<int>(p.sequences.size()) * p.groups;
  int longest = 0;
  double total = 0;
  std::vector<std::vector<Column>> columns;
  for (const Sequence& s : p.sequences) {
    columns.push_back(columns_of(p, s.keys));
    longest = std::max(longest, static_cast<int>(columns.back().size()));
    total += static_cast<double>(s.rows) * s.keys * p.heads;
  }
  if (groups == 0) return;
  const bool shared = p.schedule.sequence_parallel && !p.schedule.deterministic;
  const int parts = shared ? parts_of(groups, longest, omp_get_max_threads()) : 1;
  std::vector<Task> tasks;
  for (int b = 0; b < static_cast<int>(p.sequences.size()); ++b)
    for (int group = 0; group < p.groups; ++group)
      for (int part = 0; part < parts; ++part) tasks.push_back({b, group, part});

  require(p.schedule.deferred || total == 0 || p.sum != nullptr, "version 1 keeps maximum and sum");
  nb::gil_scoped_release release;
  const Rows rows(p, g);
  const Buffer others = floats(static_cast<std::size_t>(parts - 1) * g.dq_size, true);
  const int count = static_cast<int>(tasks.size());
#pragma omp parallel for schedule(dynamic, 1) if (count > 1 && total * p.size > 1e5)
  for (int i = 0; i < count; ++i) {
    static thread_local Scratch scratch;
    const Task& task = tasks[i];
    float* dq = task.part == 0 ? g.dq : others.get() + (task.part - 1) * g.dq_size;
    Runner{p, g, rows, task, dq, scratch}.run(columns[task.sequence], parts);
  }
  if (parts == 1) return;
  const std::int64_t chunk = 1 << 14;
#pragma omp parallel for schedule(static)
  for (std::int64_t from = 0; from < g.dq_size; from += chunk)
    for (int part = 1; part < parts; ++part) {
      const float* other = others.get() + (part - 1) * g.dq_size;
      for (std::int64_t i = from; i < std::min(g.dq_size, from + chunk); ++i) g.dq[i] += other[i];
    }
}

HASTEN_KERNELS(m) { m.def("flash_backward", &flash_backward); }

}  // namespace
}  // namespace hasten
