// Register-tiled product of rows with one packed block of 16 outputs, for weights stored [depth][16] in float32 or
// bfloat16 (widened on load). Shared by dense layers and by quantised ones, which dequantise a block into this layout.
#pragma once

#include <algorithm>
#include <cstddef>
#include <utility>
#include <vector>

#include "simd.h"

namespace hasten::dense {

constexpr int kBlock = 16;     // outputs that lie side by side in a packed block: one cache line of float32
constexpr int kDepth = 1024;   // inputs multiplied before moving on: a float32 block of them (64 KiB) stays in L2
constexpr int kRows = 192;     // rows of a task; a multiple of every tile height
#if defined(__AVX512F__)
constexpr int kTall = 12, kWide = 1;
#elif defined(__AVX2__)
constexpr int kTall = 6, kWide = 2;  // 12 accumulators, 2 weights, 1 broadcast of 16 registers
#else
constexpr int kTall = 4, kWide = 8;
#endif

// y[R][V vectors] = init + x[R][depth] w[depth][V vectors]. Few rows of few vectors keep U partial sums, so that the
// multiply-adds do not wait for each other.
template <int R, int V, typename W>
inline void tile(const float* x, std::ptrdiff_t ldx, const W* w, int depth, const float* init, std::ptrdiff_t ldinit,
                 float* y, std::ptrdiff_t ldy) {
  constexpr int U = R * V >= 8 || vf::width == 1 ? 1 : (R * V >= 4 ? 2 : 4);
  vf acc[U][R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      acc[0][r][v] = vf::load(init + r * ldinit + v * vf::width);
      for (int u = 1; u < U; ++u) acc[u][r][v] = vf::zero();
    }
  auto step = [&](int k, int u) {
    vf row[V];
    for (int v = 0; v < V; ++v) row[v] = vf::load(w + static_cast<std::ptrdiff_t>(k) * kBlock + v * vf::width);
    for (int r = 0; r < R; ++r) {
      const vf value = vf::set(x[r * ldx + k]);
      for (int v = 0; v < V; ++v) acc[u][r][v] = fma(value, row[v], acc[u][r][v]);
    }
  };
  int k = 0;
  for (; k + U <= depth; k += U)
    for (int u = 0; u < U; ++u) step(k + u, u);
  for (; k < depth; ++k) step(k, 0);
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      for (int u = 1; u < U; ++u) acc[0][r][v] = acc[0][r][v] + acc[u][r][v];
      acc[0][r][v].store(y + r * ldy + v * vf::width);
    }
}

// R rows x the whole block.
template <int R, typename W>
void block_rows(const float* x, std::ptrdiff_t ldx, const W* w, int depth, const float* init, std::ptrdiff_t ldinit,
                float* y, std::ptrdiff_t ldy) {
  for (int v = 0; v < kBlock; v += kWide * vf::width)
    tile<R, kWide>(x, ldx, w + v, depth, init + v, ldinit, y + v, ldy);
}

template <typename W, int... R>
constexpr auto row_table(std::integer_sequence<int, R...>) {
  using Function = void (*)(const float*, std::ptrdiff_t, const W*, int, const float*, std::ptrdiff_t, float*,
                            std::ptrdiff_t);
  struct Table { Function at[sizeof...(R)]; };
  return Table{{&block_rows<R + 1, W>...}};
}

// Any number of rows x one block.
template <typename W>
void block(const float* x, std::ptrdiff_t ldx, int rows, const W* w, int depth, const float* init,
           std::ptrdiff_t ldinit, float* y, std::ptrdiff_t ldy) {
  static constexpr auto table = row_table<W>(std::make_integer_sequence<int, kTall>());
  const int tiles = (rows + kTall - 1) / kTall;  // of equal height, rather than full ones and a short last one
  for (int i = 0, r = 0; i < tiles; ++i) {
    const int count = (rows - r + tiles - i - 1) / (tiles - i);
    table.at[count - 1](x + r * ldx, ldx, w, depth, init + r * ldinit, ldinit, y + r * ldy, ldy);
    r += count;
  }
}

inline const float* zeros() {
  static const float value[kBlock] = {};
  return value;
}

// The product of all rows with all blocks of a layer of `outputs` outputs, in tasks of up to kRows rows x one block.
// panel(block, start, count) gives the weights [count][16] of inputs [start, start + count) of a block, count <= Depth.
// bias: padded to whole blocks, or null.
template <int Depth = kDepth, typename Panel>
void product(const float* x, std::ptrdiff_t ldx, int rows, int inputs, int outputs, const float* bias, float* y,
             std::ptrdiff_t ldy, bool parallel, Panel panel) {
  const int blocks = (outputs + kBlock - 1) / kBlock;
  const int tasks = blocks * ((rows + kRows - 1) / kRows);
#pragma omp parallel for schedule(static) if (parallel)
  for (int task = 0; task < tasks; ++task) {
    const int b = task % blocks, first = task / blocks * kRows, count = std::min(kRows, rows - first);
    const int valid = std::min(kBlock, outputs - b * kBlock);
    float* out = y + first * ldy + b * kBlock;
    const std::ptrdiff_t ldout = ldy;
    alignas(64) static thread_local float edge[kRows * kBlock];
    const bool whole = valid == kBlock;
    float* to = whole ? out : edge;
    const std::ptrdiff_t ldto = whole ? ldout : kBlock;
    for (int k = 0; k == 0 || k < inputs; k += Depth) {
      const int depth = std::min(Depth, inputs - k);
      const float* init = k > 0 ? to : bias != nullptr ? bias + b * kBlock : zeros();
      block(x + first * ldx + k, ldx, count, panel(b, k, depth), depth, init, k > 0 ? ldto : 0, to, ldto);
    }
    if (!whole)
      for (int r = 0; r < count; ++r) std::memcpy(out + r * ldout, edge + r * kBlock, valid * sizeof(float));
  }
}

}  // namespace hasten::dense
