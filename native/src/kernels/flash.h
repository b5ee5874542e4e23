// What FlashAttention computes (Problem) and in which order (Schedule), and the part of it that forward and backward
// share: rows, tiles, and how scores become logits. See hasten/kernels/flash.py for the meaning of every field.
//
// A row is one query head of one token. Rows of the query heads that share a kv head are stacked, token by token, so
// that a tile of keys serves all of them and their gradients meet in its dK and dV without a copy.
#pragma once

#include <memory>

#include "flash_tile.h"
#include "hasten.h"

namespace hasten::flash {

struct Sequence {
  std::int64_t q, k, v, o, lse;  // offsets of the first token, in elements
  int rows, keys;                // query tokens, key tokens
};

struct Stride {
  std::int64_t token, head;
};

struct Schedule {
  bool rows_outer;         // loop over blocks of rows outside, keys inside (version 2); else keys outside (version 1)
  bool deferred;           // output unnormalised, base 2, one log-sum-exp (version 2); else normalised at every tile
  bool sequence_parallel;  // a task is a block of rows (backward: of keys); else all rows of a head
  bool skip;               // leave out tiles that no row sees, mask only where needed, hand out long tasks first
  bool deterministic;      // backward: the same bits for any number of threads
  int lanes, tile, splits;
};

struct Problem {
  const void *q, *k, *v;
  bool q_bf16, kv_bf16;
  int heads, groups, size;
  Stride qs, ks, vs, os, ls;
  std::vector<Sequence> sequences;
  const std::int32_t* table;  // pages of each sequence [sequences][table_width], or null: keys lie at `k`, `v`
  int table_width, page;
  float *out, *lse, *sum;  // sum: of exp(s - max), with `lse` the maximum (version 1), else null
  std::int64_t out_split, lse_split;
  float scale, softcap;
  int left, right;  // row at position p sees the keys [p - left, p + right]; negative: no bound
  const float* bias;
  std::int64_t bias_batch, bias_head, bias_row, bias_key;
  const float* slope;  // per query head, or null
  const std::uint8_t* keep;  // [batch][head][blocks of rows][blocks of keys], or null
  std::int64_t keep_batch, keep_head;
  int keep_width, block;
  std::uint32_t threshold;  // dropout: an element stays if its 32 random bits reach this
  std::uint64_t seed;
  float inverse;
  Schedule schedule;

  int repeat() const { return heads / groups; }
  int padded() const { return (size + W - 1) / W * W; }
  // Query heads whose rows are stacked: those of a kv head, unless they read different blocks or run as in version 1.
  int stacked() const { return (keep != nullptr && keep_head != 0) || !schedule.rows_outer ? 1 : repeat(); }
  // Version 2 folds scale and log2(e) into the one multiply-add before the exponential, 2^(exponent() (s - m)), and leaves
  // scores as they are; where something is added to scaled scores, and in version 1, a pass over them scales them first.
  bool scaled() const {
    return !schedule.deferred || softcap > 0 || bias != nullptr || slope != nullptr || !(scale > 0);
  }
  float exponent() const { return scaled() ? kLog2e : scale * kLog2e; }
  bool kept(int sequence, int head, int row_block, int key_block) const {
    if (keep == nullptr) return true;
    const std::uint8_t* at = keep + sequence * keep_batch + head * keep_head;
    return at[static_cast<std::int64_t>(row_block) * keep_width + key_block] != 0;
  }
  template <typename T>
  const T* query(const Sequence& s, int head, int token) const {
    return static_cast<const T*>(q) + s.q + head * qs.head + token * qs.token;
  }
};

// A block of consecutive query tokens of `stacked` heads, in one row of the block mask.
struct Span {
  int sequence, head, stacked, begin, end;
  int row_block(const Problem& p) const { return p.keep == nullptr ? 0 : begin / p.block; }
  int lanes() const { return (end - begin) * stacked; }
};

// Cuts the tokens of one sequence and one stack of heads into spans of up to `lanes` lanes that do not cross a row of the
// block mask.
inline void cut(const Problem& p, int sequence, int head, int lanes, std::vector<Span>& out) {
  const int stacked = p.stacked(), rows = p.sequences[sequence].rows;
  const int most = std::max(1, lanes / stacked);
  const int block = p.keep == nullptr ? std::max(rows, 1) : p.block;
  for (int b = 0; b < rows; b += block)
    for (int t = b; t < std::min(rows, b + block); t += most)
      out.push_back({sequence, head, stacked, t, std::min({rows, b + block, t + most})});
}

inline std::uint32_t mix(std::uint32_t x) {  // an avalanching bijection of 32 bits
  x ^= x >> 16, x *= 0x7feb352du;
  x ^= x >> 15, x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

// What the lanes of a strip are, and what they see.
struct alignas(64) Strip {
  float low[kStrip], high[kStrip];   // keys [low, high)
  float position[kStrip], slope[kStrip];
  float m[kStrip], l[kStrip];        // forward: running maximum and sum
  float f[kStrip], g[kStrip];        // forward: factors of the tile
  std::uint32_t first[kStrip], second[kStrip];  // dropout: key of the row
  int token[kStrip], head[kStrip];
  int lanes, from, to;               // some lane sees [from, to)
  int all_from, all_to;              // every lane sees [all_from, all_to)

  int vectors() const { return (lanes + W - 1) / W; }

  // Lanes [lane, lane + kStrip) of a span.
  void set(const Problem& p, const Span& span, int lane) {
    const Sequence& s = p.sequences[span.sequence];
    lanes = std::min(kStrip, span.lanes() - lane);
    from = s.keys, to = 0, all_from = 0, all_to = s.keys;
    for (int i = 0; i < kStrip; ++i) {
      const int row = lane + std::min(i, lanes - 1);
      token[i] = span.begin + row / span.stacked;
      head[i] = span.head + row % span.stacked;
      const int at = token[i] + s.keys - s.rows;
      const int begin = p.left < 0 ? 0 : std::max(0, at - p.left);
      const int end = p.right < 0 ? s.keys : std::min(s.keys, at + p.right + 1);
      low[i] = static_cast<float>(begin), high[i] = static_cast<float>(end);
      position[i] = static_cast<float>(at);
      slope[i] = p.slope == nullptr ? 0.0f : -p.slope[head[i]];
      m[i] = -INFINITY, l[i] = 0.0f;
      all_from = std::max(all_from, begin), all_to = std::min(all_to, end);
      if (begin < end) from = std::min(from, begin), to = std::max(to, end);
      if (p.threshold != 0) {
        std::uint32_t x = mix(static_cast<std::uint32_t>(p.seed) ^ (static_cast<std::uint32_t>(span.sequence) * 0x9e3779b9u));
        x = mix(x ^ (static_cast<std::uint32_t>(head[i]) * 0x85ebca6bu));
        first[i] = mix(x ^ static_cast<std::uint32_t>(token[i]));
        second[i] = mix(first[i] ^ static_cast<std::uint32_t>(p.seed >> 32));
      }
    }
    if (!p.schedule.skip) from = 0, to = s.keys;
  }

  // Whether keys [begin, end) need a mask.
  bool masked(const Problem& p, int begin, int end) const {
    return !p.schedule.skip || begin < all_from || end > all_to || p.bias != nullptr;
  }
};

// Products of keys [begin, end) of a tile that starts at `first` become logits, in place: scaled (if p.scaled()),
// soft-capped, biased, -inf where hidden. With `slopes` the derivative of the soft-cap is written there.
inline void adjust(const Problem& p, const Strip& strip, int sequence, int first, int begin, int end, float* s, int ld,
                   float* slopes = nullptr) {
  const int vectors = strip.vectors();
  const float factor = p.softcap > 0 ? p.scale / p.softcap : p.scale;
  const vf hidden = vf::set(-INFINITY), factors = vf::set(factor), cap = vf::set(p.softcap);
  const bool scaled = p.scaled();
  const bool limits = !p.schedule.skip || first + begin < strip.all_from || first + end > strip.all_to;
  if (p.bias != nullptr) {
    // Where lanes broadcast one row of the bias this reads it again; a bias costs a pass over the scores anyway.
    for (int i = 0; i < strip.lanes; ++i) {
      const float* bias = p.bias + sequence * p.bias_batch + strip.head[i] * p.bias_head + strip.token[i] * p.bias_row;
      for (int j = begin; j < end; ++j) {
        float& x = s[j * ld + i];
        x *= factor;
        if (p.softcap > 0) {
          const float t = std::tanh(x);
          if (slopes != nullptr) slopes[j * ld + i] = 1.0f - t * t;
          x = p.softcap * t;
        }
        x += bias[(first + j) * p.bias_key];
      }
    }
  }
  for (int v = 0; v < vectors; ++v) {
    const vf low = vf::load(strip.low + v * W), high = vf::load(strip.high + v * W);
    const vf position = vf::load(strip.position + v * W), slope = vf::load(strip.slope + v * W);
    for (int j = begin; j < end; ++j) {
      float* at = s + j * ld + v * W;
      vf x = vf::load(at);
      const vf key = vf::set(static_cast<float>(first + j));
      if (p.bias == nullptr) {
        if (scaled) x = x * factors;
        if (p.softcap > 0) {
          const vf t = tanh(x);
          if (slopes != nullptr) (vf::set(1.0f) - t * t).store(slopes + j * ld + v * W);
          x = cap * t;
        }
      }
      if (p.slope != nullptr) x = fma(slope, max(key - position, position - key), x);
      if (limits) x = seen(key, low, high, x, hidden);
      x.store(at);
    }
  }
}

// keep[lane]: 0 or 1 / (1 - p) for one key, from the counter (seed, sequence, head, token, key).
inline void dropped(const Problem& p, const Strip& strip, int key, float* keep) {
  const std::uint32_t counter = static_cast<std::uint32_t>(key) * 0x9e3779b9u;
  for (int i = 0; i < kStrip; ++i) {
    std::uint32_t x = counter ^ strip.first[i];
    x ^= x >> 16, x *= 0x7feb352du;
    x ^= x >> 15, x += strip.second[i];
    x *= 0x846ca68bu, x ^= x >> 16;
    keep[i] = x >= p.threshold ? p.inverse : 0.0f;
  }
}

// Addresses of the keys and values of a tile: where they lie, or copied when they are bfloat16 or not whole vectors.
struct Tile {
  const float* k[kMostKeys + kKeys];
  const float* v[kMostKeys + kKeys];
  std::vector<float> copy;

  template <typename KV>
  void load(const Problem& p, int sequence, int group, int from, int to) {
    const Sequence& s = p.sequences[sequence];
    const int count = to - from, stride = p.padded();
    const bool direct = sizeof(KV) == sizeof(float) && stride == p.size;
    if (!direct) copy.resize(static_cast<std::size_t>(2) * kMostKeys * stride);
    auto place = [&](int j, const KV* key, const KV* value) {
      if (direct) {
        k[j] = reinterpret_cast<const float*>(key), v[j] = reinterpret_cast<const float*>(value);
        return;
      }
      float* to_k = copy.data() + static_cast<std::size_t>(j) * stride;
      float* to_v = to_k + static_cast<std::size_t>(kMostKeys) * stride;
      widen_row(key, p.size, stride, to_k);
      widen_row(value, p.size, stride, to_v);
      k[j] = to_k, v[j] = to_v;
    };
    const KV *keys = static_cast<const KV*>(p.k), *values = static_cast<const KV*>(p.v);
    for (int j = 0; j < count; ++j) {
      const std::int64_t t = from + j;
      if (p.table != nullptr) {
        const std::int64_t page = p.table[static_cast<std::int64_t>(sequence) * p.table_width + t / p.page];
        const std::int64_t at = ((page * p.groups + group) * p.page + t % p.page) * p.size;
        place(j, keys + at, values + at);
      } else {
        place(j, keys + s.k + group * p.ks.head + t * p.ks.token, values + s.v + group * p.vs.head + t * p.vs.token);
      }
    }
    std::fill(k + count, k + count + kKeys, k[count - 1]);
    std::fill(v + count, v + count + kKeys, v[count - 1]);
  }
};

// Reads the dictionary that hasten/kernels/flash.py makes, and checks what memory safety needs.
Problem read_problem(const nb::dict& d);

}  // namespace hasten::flash
