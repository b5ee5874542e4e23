// Attention variants compiled at run time: the customisation template of FlashInfer (Ye et al., arXiv 2501.01005, section
// 3.2.3) over the engine's tile loops. hasten/kernels/variants.py generates a struct of functors derived from VariantBase;
// HASTEN_VARIANT exports it through a C interface. The threads stay with the caller: a variant is plain single-threaded code.
//
// Logits reach the functors in natural units, scaled; positions are absolute: `qo` counts the request's query rows of the
// step, `kv` its cached tokens. `lse` is a natural logarithm, as everywhere. Without softmax there is no lse: parts add up.
#pragma once

#include "attend_run.h"

namespace hasten::attend {

struct Batch {  // which request each query row belongs to; where a request's rows start; its cached tokens
  const std::int32_t *of_row, *query_start, *length;
};

// Everything a variant needs for a layer; crosses the C interface, so plain data only.
struct VariantCall {
  View view;
  Call call;
  Batch batch;
  const Task* tasks;
  const std::int32_t* worker_start;
  const std::uint8_t* lead;
  const std::int32_t *part_row, *part_start, *part_slot;
  const void* params;
};

struct VariantBase {
  Batch batch_;
  int kv_len(int batch) const { return batch_.length[batch]; }
  int qo_len(int batch) const { return batch_.query_start[batch + 1] - batch_.query_start[batch]; }
  // Absolute position of a query row: the rows of a step are the request's last tokens.
  int position(int batch, int qo) const { return kv_len(batch) - qo_len(batch) + qo; }

  // Straight-line code, so that a loop over logits is vectorised. Same polynomials as simd.h and attend.h.
  static float exp(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float n = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
    float r = x - n * 0.693359375f;
    r += n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const std::int32_t bits = (static_cast<std::int32_t>(n) + 127) << 23;
    float power;
    __builtin_memcpy(&power, &bits, sizeof power);
    return (p * r * r + r + 1.0f) * power;
  }
  static float sigmoid(float x) { return 1.0f / (1.0f + exp(-x)); }
  static float tanh(float x) { return 1.0f - 2.0f / (1.0f + exp(2.0f * x)); }

  // The functors and their defaults. A variant hides those it defines and says so in its flags.
  static constexpr bool use_softmax = true, on_query = false, on_key = false, on_value = false, on_logits = false,
                        on_mask = false, on_update = false, on_output = false;
  void query_transform(float*, int, int, int, int) const {}
  void key_transform(float*, int, int, int) const {}
  void value_transform(float*, int, int, int) const {}
  float logits_transform(float logit, int, int, int, int, int) const { return logit; }
  bool logits_mask(int, int, int, int, int) const { return true; }
  void update(float&, float&, int, int, int) const {}
  void output_transform(float*, int, int, int, int) const {}
};

// A variant F as the policy of run_task.
template <typename F>
struct Custom {
  static constexpr bool copies = F::on_key || F::on_value;
  struct At {
    int batch, qo, head;
    bool lead;
  };

  const VariantCall& c;
  F f;
  float query;
  std::vector<At> at;  // by query vector
  int base = 0, token = 0, head = 0;

  explicit Custom(const VariantCall& call) : c(call), query(F::on_query ? 1.0f : call.call.scale) {
    f.batch_ = call.batch;
    f.take(call.params);
  }

  void begin(const View& w, const Call& call, const Task& task) {
    const int repeat = call.heads / call.groups;
    base = w.base[task.piece], head = task.head;
    at.resize(static_cast<std::size_t>((task.end - task.begin) * repeat));
    for (int e = task.begin; e < task.end; ++e) {
      const int row = w.row[e], b = c.batch.of_row[row];
      const bool lead = task.slot < 0 || c.lead[task.slot + e - task.begin];
      for (int i = 0; i < repeat; ++i)
        at[static_cast<std::size_t>((e - task.begin) * repeat + i)] = {b, row - c.batch.query_start[b],
                                                                       task.head * repeat + i, lead};
    }
  }
  void tile(int from) { token = base + from; }

  void load(int row, float* q) const {
    if constexpr (F::on_query) {
      const At& a = at[row];
      f.query_transform(q, c.call.size, a.batch, a.qo, a.head);
      for (int d = 0; d < c.call.size; ++d) q[d] *= c.call.scale;
    }
  }

  void transform(float* k, float* v, int count, int stride) const {
    for (int t = 0; t < count; ++t) {
      if constexpr (F::on_key) f.key_transform(k + static_cast<std::size_t>(t) * stride, c.call.size, token + t, head);
      if constexpr (F::on_value) f.value_transform(v + static_cast<std::size_t>(t) * stride, c.call.size, token + t, head);
    }
  }

  float weights(float* s, int low, int high, Span span, int row, float& m, float& l) const {
    constexpr int W = vf::width;
    span.low = std::max(span.low, low);
    span.high = std::min(span.high, high);
    if (span.low >= span.high) {
      std::fill(s + low, s + high, 0.0f);
      return 1.0f;
    }
    const At a = at[row];
    const F g = f;  // a copy that the compiler knows nobody writes to
    const int first = token, kv_head = head;
    if constexpr (F::on_logits)
      for (int t = span.low; t < span.high; ++t) s[t] = g.logits_transform(s[t], a.batch, a.qo, first + t, a.head, kv_head);
    if constexpr (F::use_softmax)
      for (int t = span.low; t < span.high; ++t) s[t] *= kLog2e;
    if constexpr (F::on_mask)
      for (int t = span.low; t < span.high; ++t)
        s[t] = g.logits_mask(a.batch, a.qo, first + t, a.head, kv_head) ? s[t] : F::use_softmax ? kHidden : 0.0f;
    if constexpr (!F::use_softmax) {
      std::fill(s + low, s + span.low, 0.0f);
      std::fill(s + span.high, s + high, 0.0f);
      return 1.0f;
    }
    const int from = low - low % W, to = (high + W - 1) / W * W;
    std::fill(s + from, s + span.low, kHidden);
    std::fill(s + span.high, s + to, kHidden);
    vf top = vf::set(m);
    for (int t = from; t < to; t += W) top = max(top, vf::load(s + t));
    const float peak = top.max();
    if (peak <= kHidden) {  // all of it masked
      std::fill(s + low, s + high, 0.0f);
      return 1.0f;
    }
    const vf peaks = vf::set(peak);
    for (int t = from; t < to; t += W) exp2(vf::load(s + t) - peaks).store(s + t);
    std::fill(s + from, s + span.low, 0.0f);
    std::fill(s + span.high, s + to, 0.0f);
    if constexpr (F::on_mask || F::on_logits)  // exp2 of a hidden logit is its smallest result
      for (int t = span.low; t < span.high; ++t) s[t] = s[t] <= FLT_MIN ? 0.0f : s[t];
    vf total = vf::zero();
    for (int t = from; t < to; t += W) total = total + vf::load(s + t);
    const float factor = l == 0.0f ? 0.0f : std::exp2(m - peak);
    l = l * factor + total.sum();
    m = peak;
    return factor;
  }

  float finish(State& st, int row, float* out, bool through) const {
    const At& a = at[row];
    const int size = c.call.size;
    float lse = 0.0f;
    if constexpr (F::use_softmax) {
      float m = st.m[row] * kLn2, d = st.l[row], keep = 1.0f;
      if (F::on_update && a.lead) {
        const float before = m;
        f.update(m, d, a.batch, a.qo, a.head);
        keep = st.l[row] == 0.0f ? 0.0f : std::exp(before - m);
      }
      const float* o = st.o.data() + static_cast<std::size_t>(row) * st.stride;
      const float factor = d == 0.0f ? 0.0f : keep / d;
      for (int i = 0; i < size; ++i) out[i] = factor == 0.0f ? 0.0f : o[i] * factor;
      lse = d == 0.0f ? -INFINITY : m + std::log(d);
    } else {
      std::memcpy(out, st.o.data() + static_cast<std::size_t>(row) * st.stride, sizeof(float) * static_cast<std::size_t>(size));
    }
    if (F::on_output && through) f.output_transform(out, size, a.batch, a.qo, a.head);
    return lse;
  }
};

template <typename F, typename KV>
void variant_worker(const VariantCall& c, int worker) {
  Custom<F> policy(c);
  for (int i = c.worker_start[worker]; i < c.worker_start[worker + 1]; ++i)
    run_task<KV>(c.view, c.call, c.tasks[i], policy);
}

// Joins the parts of the i-th row that has several (or none).
template <typename F>
void variant_join(const VariantCall& c, int i) {
  const Call& call = c.call;
  const int row = c.part_row[i], count = c.part_start[i + 1] - c.part_start[i];
  const std::int32_t* slot = c.part_slot + c.part_start[i];
  F f;
  f.batch_ = c.batch;
  f.take(c.params);
  for (int h = 0; h < call.heads; ++h) {
    const std::size_t at = static_cast<std::size_t>(row) * call.heads + h;
    float* out = call.out + at * call.size;
    if constexpr (F::use_softmax) {
      call.lse[at] = join(call.part_out, call.part_lse, slot, count, call.heads, h, call.size, out);
    } else {
      call.lse[at] = 0.0f;
      std::fill(out, out + call.size, 0.0f);
      for (int p = 0; p < count; ++p) {
        const float* from = call.part_out + (static_cast<std::size_t>(slot[p]) * call.heads + h) * call.size;
        for (int d = 0; d < call.size; ++d) out[d] += from[d];
      }
    }
    const int b = c.batch.of_row[row];
    if (F::on_output) f.output_transform(out, call.size, b, row - c.batch.query_start[b], h);
  }
}

}  // namespace hasten::attend

#define HASTEN_EXPORT extern "C" __attribute__((visibility("default")))
#define HASTEN_VARIANT(F, KV)                                                                            \
  HASTEN_EXPORT std::int64_t hasten_variant_size() { return sizeof(::hasten::attend::VariantCall); }       \
  HASTEN_EXPORT void hasten_variant_worker(const ::hasten::attend::VariantCall* c, int worker) {           \
    ::hasten::attend::variant_worker<F, KV>(*c, worker);                                                   \
  }                                                                                                        \
  HASTEN_EXPORT void hasten_variant_join(const ::hasten::attend::VariantCall* c, int row) {                \
    ::hasten::attend::variant_join<F>(*c, row);                                                            \
  }
