// Layers of bit planes: the two-level table dequantisation for many rows, the choice of path, and stacks that share tables.
#include "t_man.h"

#include <nanobind/stl/vector.h>

namespace hasten::tman {
namespace {

// Level 1: a nibble of one plane as the partial codes of its four inputs, four bits apart; two inputs per byte.
constexpr std::uint8_t spread_bits(int nibble, int first) {
  return static_cast<std::uint8_t>((nibble >> first & 1) | (nibble >> (first + 1) & 1) << 4);
}

// Codes of a unit, four bits each: word[v][r] holds inputs 8 v to 8 v + 7 of output r, lowest first.
template <int B>
void repack(const std::uint8_t* planes, std::uint32_t (&word)[2][kBlock]) {
#if defined(__AVX2__)
  const auto table = [](int first) {
    alignas(16) std::uint8_t t[16];
    for (int n = 0; n < 16; ++n) t[n] = spread_bits(n, first);
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(t)));
  };
  const __m256i one = table(0), two = table(2), nibble = _mm256_set1_epi8(15);
  const auto load = [](const std::uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); };
  __m256i code[kQuads];  // of the 16 outputs, 16 bits each
  for (auto& c : code) c = _mm256_setzero_si256();
  for (int p = 0; p < B / 2; ++p) {
    const __m256i weights = _mm256_set1_epi16(static_cast<short>(0x0201 << 2 * p));
    for (int q = 0; q < kQuads; ++q) {
      __m256i index = load(planes + (2 * p + q / 2) * kVector);
      index = _mm256_and_si256(q % 2 == 1 ? _mm256_srli_epi16(index, 4) : index, nibble);
      const __m256i a = _mm256_maddubs_epi16(_mm256_shuffle_epi8(one, index), weights);
      const __m256i b = _mm256_maddubs_epi16(_mm256_shuffle_epi8(two, index), weights);
      code[q] = _mm256_or_si256(code[q], _mm256_or_si256(a, _mm256_slli_epi16(b, 8)));
    }
  }
  if constexpr (B % 2 == 1) {
    const __m256i both = load(planes + (B - 1) * kVector);
    for (int half = 0; half < 2; ++half) {
      const __m256i index = _mm256_and_si256(half == 1 ? _mm256_srli_epi16(both, 4) : both, nibble);
      const __m256i a = _mm256_shuffle_epi8(one, index), b = _mm256_shuffle_epi8(two, index);
      const __m256i lower = _mm256_slli_epi16(_mm256_unpacklo_epi8(a, b), B - 1);
      const __m256i upper = _mm256_slli_epi16(_mm256_unpackhi_epi8(a, b), B - 1);
      code[half] = _mm256_or_si256(code[half], _mm256_permute2x128_si256(lower, upper, 0x20));
      code[2 + half] = _mm256_or_si256(code[2 + half], _mm256_permute2x128_si256(lower, upper, 0x31));
    }
  }
  for (int v = 0; v < 2; ++v) {
    const __m256i lower = _mm256_unpacklo_epi16(code[2 * v], code[2 * v + 1]);
    const __m256i upper = _mm256_unpackhi_epi16(code[2 * v], code[2 * v + 1]);
    auto* to = reinterpret_cast<__m256i*>(word[v]);
    _mm256_storeu_si256(to, _mm256_permute2x128_si256(lower, upper, 0x20));
    _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(lower, upper, 0x31));
  }
#else
  for (int v = 0; v < 2; ++v)
    for (int r = 0; r < kBlock; ++r) {
      std::uint32_t all = 0;
      for (int half = 0; half < 2; ++half)
        for (int i = 0; i < B; ++i) {
          const std::uint8_t byte = i < B / 2 * 2 ? planes[(i / 2 * 2 + v) * kVector + 2 * r + i % 2]
                                                  : planes[i * kVector + v * 16 + r];
          const int n = half == 1 ? byte >> 4 : byte & 15;
          const std::uint32_t part = spread_bits(n, 0) | static_cast<std::uint32_t>(spread_bits(n, 2)) << 8;
          all |= part << i << 16 * half;
        }
      word[v][r] = all;
    }
#endif
}

constexpr int entries_of(int bits) { return bits < 4 ? 8 : 16; }  // of a convert table; those beyond 2^bits are not used

// Level 2 of a group: the weight that each code stands for, [16 outputs][entries].
template <int B>
void convert_table(const float* scale, const float* low, float* to) {
  constexpr int count = entries_of(B);
  alignas(64) static constexpr float codes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int r = 0; r < kBlock; ++r, to += count) {
    const vf s = vf::set(scale[r]), m = vf::set(low[r]);
    for (int i = 0; i < count; i += vf::width)
      if constexpr (vf::width <= count) fma(s, vf::load(codes + i), m).store(to + i);
      else for (int j = 0; j < count; ++j) to[j] = std::fma(scale[r], codes[j], low[r]);
  }
}

// to[16 inputs][16 outputs] of words of codes.
template <int B>
void convert(const std::uint32_t (&word)[2][kBlock], const float* table, float* to) {
  constexpr int count = entries_of(B);
#if defined(__AVX2__)
  const __m256i shift = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
  for (int v = 0; v < 2; ++v)
    for (int eight = 0; eight < kBlock; eight += 8) {
      __m256 w[8];
      for (int i = 0; i < 8; ++i) {
        const float* row = table + (eight + i) * count;
        const __m256i code = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(word[v][eight + i])), shift);
        w[i] = _mm256_permutevar8x32_ps(_mm256_loadu_ps(row), code);  // by the lowest three bits
        if constexpr (B == 4) {
          const __m256 upper = _mm256_permutevar8x32_ps(_mm256_loadu_ps(row + 8), code);
          w[i] = _mm256_blendv_ps(w[i], upper, _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
        }
      }
      // [8 outputs][8 inputs] -> [8 inputs][8 outputs]
      __m256 a[8], b[8];
      for (int i = 0; i < 8; i += 2) a[i] = _mm256_unpacklo_ps(w[i], w[i + 1]), a[i + 1] = _mm256_unpackhi_ps(w[i], w[i + 1]);
      for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
          b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
          b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
        }
      for (int i = 0; i < 4; ++i) {
        float* at = to + (8 * v + i) * kBlock + eight;
        _mm256_storeu_ps(at, _mm256_permute2f128_ps(b[i], b[i + 4], 0x20));
        _mm256_storeu_ps(at + 4 * kBlock, _mm256_permute2f128_ps(b[i], b[i + 4], 0x31));
      }
    }
#else
  for (int k = 0; k < kUnit; ++k)
    for (int r = 0; r < kBlock; ++r) to[k * kBlock + r] = table[r * count + (word[k / 8][r] >> 4 * (k % 8) & 15u)];
#endif
}

template <int B>
void dequantize_bits(const TMan& layer, int block, int first, int count, const float* scale, const float* low,
                     float* to) {
  alignas(64) float table[kBlock * entries_of(B)];
  std::uint32_t word[2][kBlock];
  const std::uint8_t* planes = layer.block_planes(block) + static_cast<std::size_t>(first) * B * kVector;
  for (int u = first, group = -1; u < first + count; ++u, planes += B * kVector, to += kUnit * kBlock) {
    if (u / layer.grid.halves != group) {
      group = u / layer.grid.halves;
      convert_table<B>(scale + group * kBlock, low + group * kBlock, table);
    }
    repack<B>(planes, word);
    convert<B>(word, table, to);
  }
}

// Columns dequantised at a time: 16 KiB, so that they are still in L1 when they are multiplied.
constexpr int kDepth = 256;

void many(const TMan& layer, const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy) {
  const affine::Affine& grid = layer.grid;
  if (grid.column != nullptr) {
    float* ordered = affine::scratch<0>(static_cast<std::size_t>(rows) * grid.width);
    for (int r = 0; r < rows; ++r) affine::gather(grid, x + r * ldx, ordered + static_cast<std::size_t>(r) * grid.width);
    x = ordered, ldx = grid.width;
  }
  const std::size_t side = static_cast<std::size_t>(grid.groups) * kBlock;
  const auto panel = [&](int block, int start, int count) -> const float* {
    float* scale = affine::scratch<1>(2 * side + kDepth * kBlock);
    if (start == 0) grid.expand(block, 0, grid.groups, scale, scale + side);
    layer.dequantize(block, start / kUnit, (count + kUnit - 1) / kUnit, scale, scale + side, scale + 2 * side);
    return scale + 2 * side;
  };
  const bool parallel = worth_threads(rows, layer.inputs, layer.outputs);
  dense::product<kDepth>(x, ldx, rows, grid.width, layer.outputs, grid.bias, y, ldy, parallel, panel);
}

// Layers that meet the same input with the same tables: those are built once.
struct Shared final : Packed {
  std::vector<const TMan*> parts;
  void forward(const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy) const override {
    if (rows <= 0) return;
    int most = most_lookups(*parts[0]);
    for (const TMan* part : parts) most = std::min(most, most_lookups(*part));
    const Tables tables = rows <= most ? build(*parts[0], x, ldx, rows) : Tables{};
    for (const TMan* part : parts) {
      if (rows <= most) lookup(*part, tables, rows, y, ldy);
      else many(*part, x, ldx, rows, y, ldy);
      y += part->outputs;
    }
  }
  bool row(int output, float* to) const override {
    for (const TMan* part : parts) {
      if (output < part->outputs) return part->row(output, to);
      output -= part->outputs;
    }
    return false;
  }
};

// Addresses and sizes come from the Python face, which has checked them.
nb::capsule packed_tman(int inputs, int outputs, int bits, int width, int halves, int groups, int nest, Address planes,
                        int scale_kind, Address scale, Address outer_scale, int low_kind, Address low,
                        Address outer_low, float offset, Address bias, Address column, bool wide) {
  require(bits >= 1 && bits <= 4, "bit planes hold 1 to 4 bits");
  auto layer = std::make_unique<TMan>();
  layer->inputs = inputs, layer->outputs = outputs, layer->wide = wide;
  layer->planes = reinterpret_cast<const std::uint8_t*>(planes);
  affine::Affine& a = layer->grid;
  a.inputs = inputs, a.outputs = outputs, a.bits = bits, a.width = width, a.halves = halves, a.groups = groups;
  a.nest = nest, a.offset = offset;
  a.scale_kind = static_cast<affine::Kind>(scale_kind), a.low_kind = static_cast<affine::Kind>(low_kind);
  a.scale = reinterpret_cast<const void*>(scale), a.low = reinterpret_cast<const void*>(low);
  a.outer_scale = reinterpret_cast<const std::uint16_t*>(outer_scale);
  a.outer_low = reinterpret_cast<const std::uint16_t*>(outer_low);
  a.bias = reinterpret_cast<const float*>(bias), a.column = reinterpret_cast<const std::int32_t*>(column);
  const int per_scale = (wide ? kWideScale : kNarrowScale) / kUnit;
  for (int u = 0, units = layer->units(); u < units;) {
    const int group = u / halves, block = u / per_scale;
    const int last = std::min({units, (group + 1) * halves, (block + 1) * per_scale});
    layer->spans.push_back({u, last, group, block});
    u = last;
  }
  return wrap(std::move(layer));
}

const TMan& unwrap_layer(const nb::capsule& handle) {
  const auto* layer = dynamic_cast<const TMan*>(&unwrap(handle));
  require(layer != nullptr, "not a layer of bit planes");
  return *layer;
}

nb::capsule packed_tman_shared(const std::vector<nb::capsule>& handles) {
  require(!handles.empty(), "a stack needs at least one part");
  auto shared = std::make_unique<Shared>();
  for (const nb::capsule& handle : handles) {
    const TMan& part = unwrap_layer(handle);
    const TMan& first = shared->parts.empty() ? part : *shared->parts[0];
    require(part.inputs == first.inputs && part.wide == first.wide, "parts that share tables differ in inputs or tables");
    require(part.grid.column == nullptr, "parts that share tables take their inputs in order");
    shared->outputs += part.outputs;
    shared->parts.push_back(&part);
  }
  shared->inputs = shared->parts[0]->inputs;
  return wrap(std::move(shared));
}

// All weights in stored order by the two tables, to[outputs][width].
void tman_dequantize(const nb::capsule& handle, Address to) {
  const TMan& layer = unwrap_layer(handle);
  nb::gil_scoped_release release;
  auto* out = reinterpret_cast<float*>(to);
  const std::size_t side = static_cast<std::size_t>(layer.grid.groups) * kBlock;
  std::vector<float> memory(2 * side + static_cast<std::size_t>(layer.units()) * kUnit * kBlock);
  for (int b = 0; b < layer.grid.blocks(); ++b) {
    float *scale = memory.data(), *all = scale + 2 * side;
    layer.grid.expand(b, 0, layer.grid.groups, scale, scale + side);
    layer.dequantize(b, 0, layer.units(), scale, scale + side, all);
    for (int r = 0; r < kBlock && b * kBlock + r < layer.outputs; ++r)
      for (int k = 0; k < layer.grid.width; ++k)
        out[static_cast<std::size_t>(b * kBlock + r) * layer.grid.width + k] = all[static_cast<std::size_t>(k) * kBlock + r];
  }
}

// One path whatever the number of rows: by tables of sums, or by dequantising.
void tman_by(const nb::capsule& handle, bool by_lookup, Address x, int rows, Address y) {
  const TMan& layer = unwrap_layer(handle);
  nb::gil_scoped_release release;
  const auto* from = reinterpret_cast<const float*>(x);
  auto* to = reinterpret_cast<float*>(y);
  if (by_lookup) lookup(layer, build(layer, from, layer.inputs, rows), rows, to, layer.outputs);
  else many(layer, from, layer.inputs, rows, to, layer.outputs);
}

// Codes [outputs][columns] as planes; false if one does not fit the bits. Runs once per layer at load.
bool tman_pack(Address from, int outputs, int columns, int bits, Address to) {
  nb::gil_scoped_release release;
  const auto* codes = reinterpret_cast<const std::uint8_t*>(from);
  auto* planes = reinterpret_cast<std::uint8_t*>(to);
  const int blocks = (outputs + kBlock - 1) / kBlock, units = (columns + kUnit - 1) / kUnit;
  unsigned all = 0;
#pragma omp parallel for schedule(static) reduction(| : all)
  for (int b = 0; b < blocks; ++b) {
    std::uint8_t* unit = planes + static_cast<std::size_t>(b) * units * bits * kVector;
    std::memset(unit, 0, static_cast<std::size_t>(units) * bits * kVector);
    for (int u = 0; u < units; ++u, unit += bits * kVector)
      for (int r = 0; r < std::min(kBlock, outputs - b * kBlock); ++r) {
        const std::uint8_t* row = codes + static_cast<std::size_t>(b * kBlock + r) * columns + u * kUnit;
        for (int k = 0; k < std::min(kUnit, columns - u * kUnit); ++k) {
          const int v = k / 8;
          all |= row[k];
          for (int i = 0; i < bits; ++i) {
            const int at = i < bits / 2 * 2 ? (i / 2 * 2 + v) * kVector + 2 * r + i % 2 : i * kVector + v * 16 + r;
            unit[at] = static_cast<std::uint8_t>(unit[at] | (row[k] >> i & 1) << k % 8);
          }
        }
      }
  }
  return all >> bits == 0;
}

HASTEN_KERNELS(m) {
  m.def("tman_pack", &tman_pack);
  m.def("packed_tman", &packed_tman);
  m.def("packed_tman_shared", &packed_tman_shared);
  m.def("tman_dequantize", &tman_dequantize);
  m.def("tman_by", &tman_by);
}

}  // namespace

void TMan::dequantize(int block, int first, int count, const float* scale, const float* low, float* to) const {
  switch (grid.bits) {
    case 1: return dequantize_bits<1>(*this, block, first, count, scale, low, to);
    case 2: return dequantize_bits<2>(*this, block, first, count, scale, low, to);
    case 3: return dequantize_bits<3>(*this, block, first, count, scale, low, to);
    default: return dequantize_bits<4>(*this, block, first, count, scale, low, to);
  }
}

bool TMan::row(int output, float* to) const {
  const std::size_t side = static_cast<std::size_t>(grid.groups) * kBlock;
  float* scale = affine::scratch<1>(2 * side + static_cast<std::size_t>(units()) * kUnit * kBlock);
  float* all = scale + 2 * side;
  grid.expand(output / kBlock, 0, grid.groups, scale, scale + side);
  dequantize(output / kBlock, 0, units(), scale, scale + side, all);
  for (int i = 0; i < grid.width; ++i) {
    const int column = grid.column == nullptr ? i : grid.column[i];
    if (column >= 0) to[column] = all[static_cast<std::size_t>(i) * kBlock + output % kBlock];
  }
  return true;
}

void TMan::forward(const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy) const {
  if (rows <= 0) return;
  if (rows <= most_lookups(*this)) lookup(*this, build(*this, x, ldx, rows), rows, y, ldy);
  else many(*this, x, ldx, rows, y, ldy);
}

}  // namespace hasten::tman
