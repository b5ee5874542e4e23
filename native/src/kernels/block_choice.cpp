// What block-sparse attention chooses blocks by: pooled blocks and their self-similarity, keys' importance and the order
// that follows from it, rounded keys.
//
// Sources: PBS-Attn (arXiv 2510.21270) for `probe` and `order`, SpargeAttn (arXiv 2502.18137) for `pool` and `quantise`.
//
// Legend: T rows, L tokens, H query heads, G kv heads, X heads of an order or pool, D head size, B block.
#include <omp.h>

#include <numeric>

#include "block_list.h"

namespace hasten {

using namespace attend;

namespace {

constexpr int kBatch = 8 * kGroup;  // rows whose scores are kept at a time

// score[t] = mean over the rows of their softmax over the tokens [0, tokens), not causal, for one head.
template <typename KV>
void probe_head(const blocks::Cached& kv, const float* q, std::size_t stride, int rows, int tokens, int group, float scale,
                float cap, float* score) {
  static thread_local Packed packed;
  static thread_local State st;
  static thread_local std::vector<float> query, kept;
  const int size = kv.size, tiles = (tokens + kTile - 1) / kTile;
  const Logits logits(scale, cap);
  std::fill(score, score + tokens, 0.0f);
  kept.resize(static_cast<std::size_t>(tiles) * kBatch * kTile);
  Tokens<KV> tile;
  for (int row = 0; row < rows; row += kBatch) {
    const int count = std::min(kBatch, rows - row);
    st.begin(count, size);
    for (int i = 0; i < count; ++i) st.load(i, q + (row + i) * stride, size, logits.query);
    // Queries are read without the padding of their rows.
    query.resize(st.m.size() * size);
    for (std::size_t r = 0; r < st.m.size(); ++r)
      for (int d = 0; d < size; ++d)
        query[(r / kGroup * size + d) * kGroup + r % kGroup] = st.q[r * st.stride + d];
    for (int j = 0; j < tiles; ++j) {
      const int t = j * kTile, n = std::min(kTile, tokens - t);
      for (int i = 0; i < n; ++i) tile.k[i] = kv.key<KV>(t + i, group);
      packed.pack_keys(tile, n, size);
      for (int r = 0; r < count; r += kGroup)
        for (int s = 0; s < n; s += kStrip)
          many_scores(query.data() + static_cast<std::size_t>(r) * size, packed.k.data() + static_cast<std::size_t>(s) * size,
                      size, kept.data() + (static_cast<std::size_t>(j) * kBatch + r) * kTile + s);
    }
    for (int r = 0; r < count; ++r) {
      float m = -INFINITY, l = 0;
      auto at = [&](int j) { return kept.data() + (static_cast<std::size_t>(j) * kBatch + r) * kTile; };
      vf top = vf::set(-INFINITY);
      for (int j = 0; j < tiles; ++j) {
        float* s = at(j);
        const int n = std::min(kTile, tokens - j * kTile);
        if (cap > 0)
          for (int t = 0; t < kTile; t += vf::width) (vf::set(logits.cap) * tanh(vf::load(s + t))).store(s + t);
        std::fill(s + n, s + kTile, kHidden);
        for (int t = 0; t < kTile; t += vf::width) top = max(top, vf::load(s + t));
      }
      m = top.max();
      vf sum = vf::zero();
      for (int j = 0; j < tiles; ++j) {
        float* s = at(j);
        for (int t = 0; t < kTile; t += vf::width) {
          const vf e = exp2(vf::load(s + t) - vf::set(m));
          e.store(s + t);
          sum = sum + e;
        }
      }
      l = sum.sum();
      const vf weight = vf::set(1.0f / (l * static_cast<float>(rows)));
      for (int j = 0; j < tiles; ++j) {
        const float* s = at(j);
        const int from = j * kTile, n = std::min(kTile, tokens - from);
        int t = 0;
        for (; t + vf::width <= n; t += vf::width)
          fma(weight, vf::load(s + t), vf::load(score + from + t)).store(score + from + t);
        for (; t < n; ++t) score[from + t] += s[t] / (l * static_cast<float>(rows));
      }
    }
  }
}

void probe_keys(std::uintptr_t q, std::uintptr_t k, blocks::Table table, std::uintptr_t out, int rows, int length,
                int tokens, int heads, int groups, int size, int pages, int page, int kind, float scale, float softcap) {
  require(rows > 0 && tokens > 0 && tokens <= length, "there is nothing to probe");
  blocks::check_table(table, length, pages, page);
  const blocks::Cached kv{reinterpret_cast<const void*>(k), nullptr, table.data(), length, groups, size, page};
  nb::gil_scoped_release release;
#pragma omp parallel for schedule(dynamic, 1) if (heads > 1)
  for (int h = 0; h < heads; ++h)
    blocks::with_kind(kind, [&](auto* p) {
      probe_head<blocks::Stored<decltype(p)>>(kv, reinterpret_cast<const float*>(q) + static_cast<std::size_t>(h) * size,
                                              static_cast<std::size_t>(heads) * size, rows, tokens, h / (heads / groups),
                                              scale, softcap,
                                              reinterpret_cast<float*>(out) + static_cast<std::size_t>(h) * tokens);
    });
}

// Orders the tokens of each whole segment by score, highest first (equal scores, and NaN last: by position), cuts them into
// blocks, and lists each block by rising position. The tokens after the last whole segment keep their places.
void order_blocks(Array<const float, -1, -1> score, Array<std::int32_t, -1, -1> order, int block, int segment) {
  const int heads = static_cast<int>(score.shape(0)), tokens = static_cast<int>(score.shape(1));
  const int length = static_cast<int>(order.shape(1));
  require(block > 0 && segment > 0 && segment % block == 0, "a segment must be whole blocks");
  require(static_cast<int>(order.shape(0)) == heads && tokens <= length && tokens % segment == 0,
          "score_XL must have order_XL's heads, and cover whole segments of its tokens");
  nb::gil_scoped_release release;
#pragma omp parallel for schedule(static) if (heads > 1)
  for (int x = 0; x < heads; ++x) {
    const float* s = score.data() + static_cast<std::size_t>(x) * tokens;
    std::int32_t* to = order.data() + static_cast<std::size_t>(x) * length;
    std::iota(to, to + length, 0);
    auto before = [&](std::int32_t a, std::int32_t b) {
      const bool nan_a = s[a] != s[a], nan_b = s[b] != s[b];
      if (nan_a || nan_b) return nan_a == nan_b ? a < b : nan_b;
      return s[a] != s[b] ? s[a] > s[b] : a < b;
    };
    for (int from = 0; from < tokens; from += segment)
      for (int b = 0; b < segment; b += block) {
        std::int32_t* begin = to + from + b;
        if (b + block < segment) std::nth_element(begin, begin + block, to + from + segment, before);
        std::sort(begin, begin + block);
      }
  }
}

// Mean of each block of tokens (less `center`, if given) and self-similarity: the mean of the cosines between all pairs of a
// block's vectors, which is the squared length of the mean of the normalised vectors. A vector of length 0 counts as 0.
template <typename Vector>
void pool_block(const Vector& vector, int count, int size, const float* center, float* mean, float* similarity) {
  static thread_local std::vector<float> x, direction;
  x.resize(static_cast<std::size_t>(size)), direction.assign(static_cast<std::size_t>(size), 0.0f);
  std::fill(mean, mean + size, 0.0f);
  for (int i = 0; i < count; ++i) {
    vector(i, x.data());
    float square = 0;
    for (int d = 0; d < size; ++d) {
      if (center) x[d] -= center[d];
      mean[d] += x[d];
      square += x[d] * x[d];
    }
    const float inverse = square > 0 ? 1.0f / std::sqrt(square) : square;  // NaN stays NaN
    if (similarity)
      for (int d = 0; d < size; ++d) direction[d] += x[d] * inverse;
  }
  const float share = 1.0f / static_cast<float>(count);
  float square = 0;
  for (int d = 0; d < size; ++d) mean[d] *= share, square += direction[d] * direction[d] * share * share;
  if (similarity) *similarity = square;
}

// mean [X][blocks][D] and similarity [X][blocks] (or null); X a multiple of G; order [X][L] or null; center [G][D] or null.
void pool_keys(std::uintptr_t k, blocks::Table table, std::uintptr_t order, std::uintptr_t center, std::uintptr_t mean,
               std::uintptr_t similarity, int length, int choices, int block, int groups, int size, int pages, int page,
               int kind) {
  require(block > 0 && choices > 0 && choices % groups == 0, "block must be positive, choices a multiple of the kv heads");
  blocks::check_table(table, length, pages, page);
  const blocks::Cached kv{reinterpret_cast<const void*>(k), nullptr, table.data(), length, groups, size, page};
  const int count = (length + block - 1) / block;
  const auto* orders = reinterpret_cast<const std::int32_t*>(order);
  const auto* centers = reinterpret_cast<const float*>(center);
  auto* means = reinterpret_cast<float*>(mean);
  auto* similarities = reinterpret_cast<float*>(similarity);
  nb::gil_scoped_release release;
#pragma omp parallel for schedule(static) if (static_cast<std::int64_t>(choices) * length > 2000)
  for (int i = 0; i < choices * count; ++i) {
    const int x = i / count, from = i % count * block, group = x / (choices / groups);
    blocks::with_kind(kind, [&](auto* p) {
      using KV = blocks::Stored<decltype(p)>;
      auto vector = [&](int t, float* to) {
        const int token = orders ? orders[static_cast<std::size_t>(x) * length + from + t] : from + t;
        copy_token(kv.key<KV>(token, group), size, to);
      };
      pool_block(vector, std::min(block, length - from), size, centers ? centers + static_cast<std::size_t>(group) * size : nullptr,
                 means + static_cast<std::size_t>(i) * size, similarities ? similarities + i : nullptr);
    });
  }
}

// Query blocks of rows [T][H][D] at positions first .. first + T: mean [H][blocks][D], similarity [H][blocks] (or null).
void pool_rows(std::uintptr_t q, std::uintptr_t mean, std::uintptr_t similarity, int rows, int first, int heads, int size,
               int block) {
  require(rows > 0 && first >= 0 && block > 0, "there are no rows to pool");
  const int low = first / block, count = (first + rows - 1) / block - low + 1;
  nb::gil_scoped_release release;
#pragma omp parallel for schedule(static) if (static_cast<std::int64_t>(heads) * rows > 2000)
  for (int i = 0; i < heads * count; ++i) {
    const int h = i / count, from = std::max(first, (low + i % count) * block);
    const int to = std::min<std::int64_t>(first + rows, (static_cast<std::int64_t>(low) + i % count + 1) * block);
    auto vector = [&](int t, float* x) {
      std::memcpy(x, reinterpret_cast<const float*>(q) + (static_cast<std::size_t>(from - first + t) * heads + h) * size,
                  static_cast<std::size_t>(size) * sizeof(float));
    };
    pool_block(vector, to - from, size, nullptr, reinterpret_cast<float*>(mean) + static_cast<std::size_t>(i) * size,
               similarity ? reinterpret_cast<float*>(similarity) + i : nullptr);
  }
}

// Keys less `center` [G][D] as codes of up to `limit` with a scale per tile of kTile tokens: codes [G][tiles][D / 2][kTile][2] (16 bits,
// as their products are made), zero past the end; scale [G][tiles] = largest magnitude / limit + 1e-7, round half away from 0.
void quantise_keys(std::uintptr_t k, blocks::Table table, std::uintptr_t center, std::uintptr_t codes, std::uintptr_t scale,
                   int length, int groups, int size, int pages, int page, int kind, int limit) {
  require(limit > 0 && limit < 32768, "codes are 16 bits");
  require(size % 2 == 0, "codes need an even head size");
  blocks::check_table(table, length, pages, page);
  const blocks::Cached kv{reinterpret_cast<const void*>(k), nullptr, table.data(), length, groups, size, page};
  const int tiles = (length + kTile - 1) / kTile;
  nb::gil_scoped_release release;
#pragma omp parallel for schedule(static) if (static_cast<std::int64_t>(groups) * length > 2000)
  for (int i = 0; i < groups * tiles; ++i) {
    static thread_local std::vector<float> x;
    x.resize(static_cast<std::size_t>(kTile) * size);
    const int group = i / tiles, from = i % tiles * kTile, count = std::min(kTile, length - from);
    const float* middle = reinterpret_cast<const float*>(center) + static_cast<std::size_t>(group) * size;
    float most = 0;
    blocks::with_kind(kind, [&](auto* p) {
      for (int t = 0; t < count; ++t) {
        float* to = x.data() + static_cast<std::size_t>(t) * size;
        copy_token(kv.key<blocks::Stored<decltype(p)>>(from + t, group), size, to);
        for (int d = 0; d < size; ++d) to[d] -= middle[d], most = std::max(most, std::fabs(to[d]));
      }
    });
    const float step = most / static_cast<float>(limit) + 1e-7f, steps = 1.0f / step;
    reinterpret_cast<float*>(scale)[i] = step;
    std::int16_t* code = reinterpret_cast<std::int16_t*>(codes) + static_cast<std::size_t>(i) * size * kTile;
    for (int t = 0; t < kTile; ++t)
      for (int d = 0; d < size; ++d)
        code[(d / 2 * kTile + t) * 2 + d % 2] =
            t < count ? blocks::code_of(x[static_cast<std::size_t>(t) * size + d] * steps) : std::int16_t{0};
  }
}

HASTEN_KERNELS(m) {
  m.def("probe_keys", &probe_keys);
  m.def("order_blocks", &order_blocks);
  m.def("pool_keys", &pool_keys);
  m.def("pool_rows", &pool_rows);
  m.def("quantise_keys", &quantise_keys);
}

}  // namespace
}  // namespace hasten
