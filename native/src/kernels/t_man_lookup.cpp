// Tables of activations, and the product of few rows with bit planes by looking them up.
#include <atomic>
#include <cfloat>
#include <cmath>

#include "t_man.h"

namespace hasten::tman {
namespace {

std::atomic<std::int64_t> built{0};  // tables made so far: one per row that meets a layer or a stack of them

constexpr int kSlot[kQuads] = {0, 2, 1, 3};  // where a unit keeps the table of each quad

// The 16 entries of a quad, rounded. Eight are computed; entry 15 - p is minus entry p.
void entries(const float* x, float inverse, bool wide, std::uint8_t* low, std::uint8_t* high) {
#if defined(__AVX2__)
  const __m256 minus = _mm256_set1_ps(-0.0f);
  const auto sign = [&](int a, int b, int c, int d, int e, int f, int g, int h) {
    return _mm256_and_ps(minus, _mm256_castsi256_ps(_mm256_setr_epi32(a, b, c, d, e, f, g, h)));
  };
  const __m256 first = sign(-1, 0, -1, 0, -1, 0, -1, 0), second = sign(-1, -1, 0, 0, -1, -1, 0, 0),
               third = sign(-1, -1, -1, -1, 0, 0, 0, 0);
  __m256 sum = _mm256_add_ps(_mm256_xor_ps(_mm256_set1_ps(x[0]), first), _mm256_xor_ps(_mm256_set1_ps(x[1]), second));
  sum = _mm256_add_ps(sum, _mm256_sub_ps(_mm256_xor_ps(_mm256_set1_ps(x[2]), third), _mm256_set1_ps(x[3])));
  const __m256i half = _mm256_cvtps_epi32(_mm256_mul_ps(sum, _mm256_set1_ps(inverse)));
  const __m256i mirror = _mm256_permutevar8x32_epi32(_mm256_sub_epi32(_mm256_setzero_si256(), half),
                                                     _mm256_setr_epi32(7, 6, 5, 4, 3, 2, 1, 0));
  const __m256i all = _mm256_permute4x64_epi64(_mm256_packs_epi32(half, mirror), 0xd8);
  const __m128i a = _mm256_castsi256_si128(all), b = _mm256_extracti128_si256(all, 1);
  if (wide) {
    const __m128i byte = _mm_set1_epi16(255);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(low), _mm_packus_epi16(_mm_and_si128(a, byte), _mm_and_si128(b, byte)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(high), _mm_packs_epi16(_mm_srai_epi16(a, 8), _mm_srai_epi16(b, 8)));
  } else {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(high), _mm_packs_epi16(a, b));
  }
#else
  for (int p = 0; p < 8; ++p) {
    const float sum = ((p & 1 ? x[0] : -x[0]) + (p & 2 ? x[1] : -x[1])) + ((p & 4 ? x[2] : -x[2]) - x[3]);
    const float scaled = std::nearbyint(sum * inverse);
    const int value = scaled >= -32768.0f && scaled <= 32767.0f ? static_cast<int>(scaled) : 0;
    for (const auto& [at, entry] : {std::pair{p, value}, std::pair{15 - p, -value}}) {
      if (wide) low[at] = static_cast<std::uint8_t>(entry & 255);
      high[at] = static_cast<std::uint8_t>(wide ? entry >> 8 : entry);
    }
  }
#endif
}

// One row, filled up to whole units: its tables, their scales and the sums of units.
void build_row(const float* x, int units, bool wide, std::uint8_t* low, std::uint8_t* high, float* scale, float* sum) {
  const int per_scale = (wide ? kWideScale : kNarrowScale) / kUnit;
  const float most = wide ? 32767.0f : 127.0f;
  for (int first = 0; first < units; first += per_scale) {
    const int last = std::min(units, first + per_scale);
    float top = 0.0f;
    bool finite = true;
    for (int u = first; u < last; ++u) {
      const float* v = x + u * kUnit;
      float total = 0.0f;
      for (int q = 0; q < kQuads; ++q, v += 4) {
        const float size = std::fabs(v[0]) + std::fabs(v[1]) + std::fabs(v[2]) + std::fabs(v[3]);
        finite = finite && size <= FLT_MAX;
        top = std::max(top, size);
        total += (v[0] + v[1]) + (v[2] + v[3]);
      }
      sum[u] = total;
    }
    // Below 1e-30 the reciprocal would leave float32's range; what is not finite makes every output NaN.
    const float inverse = finite && top > 1e-30f ? most / top : 0.0f;
    *scale++ = finite ? top / most : NAN;
    for (int u = first; u < last; ++u)
      for (int q = 0; q < kQuads; ++q) {
        const std::size_t at = static_cast<std::size_t>(u) * 64 + kSlot[q] * 16;
        entries(x + u * kUnit + 4 * q, inverse, wide, wide ? low + at : nullptr, high + at);
      }
  }
}

// sum over planes i of 2^i c_i for the 16 outputs of a block and the units of a span, as float32.
#if defined(__AVX2__)
inline __m256i load(const std::uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline __m256i spread(const std::uint8_t* p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// 256 high + low, 16 bits each, of one half of the vectors.
template <bool Wide, int Half>
inline __m256i joined(__m256i high, __m256i low) {
  const __m256i h = _mm256_cvtepi16_epi32(_mm256_extracti128_si256(high, Half));
  if constexpr (!Wide) return h;
  else return _mm256_add_epi32(_mm256_slli_epi32(h, 8), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(low, Half)));
}

template <int B, bool Wide>
inline void span_sums(const std::uint8_t* planes, const std::uint8_t* low, const std::uint8_t* high, int units,
                      __m256& first, __m256& second) {
  constexpr int pairs = B / 2;
  constexpr bool single = B % 2 == 1;
  const __m256i nibble = _mm256_set1_epi8(15), weights = _mm256_set1_epi16(0x0201);
  const __m256i even_rows = _mm256_set1_epi16(0x0001), odd_rows = _mm256_set1_epi16(0x0100);
  __m256i h[pairs + 2], l[pairs + 2];
  for (auto& acc : h) acc = _mm256_setzero_si256();
  for (auto& acc : l) acc = _mm256_setzero_si256();
  for (int u = 0; u < units; ++u, high += 64, low += Wide ? 64 : 0) {
    for (int v = 0; v < 2; ++v)
      for (int half = 0; half < 2; ++half) {
        const __m256i th = pairs > 0 ? spread(high + (2 * half + v) * 16) : nibble;
        const __m256i tl = pairs > 0 && Wide ? spread(low + (2 * half + v) * 16) : nibble;
        for (int p = 0; p < pairs; ++p) {
          __m256i index = load(planes + (2 * p + v) * kVector);
          index = _mm256_and_si256(half == 1 ? _mm256_srli_epi16(index, 4) : index, nibble);
          h[p] = _mm256_add_epi16(h[p], _mm256_maddubs_epi16(weights, _mm256_shuffle_epi8(th, index)));
          if constexpr (Wide)
            l[p] = _mm256_add_epi16(l[p], _mm256_maddubs_epi16(_mm256_shuffle_epi8(tl, index), weights));
        }
      }
    if constexpr (single) {
      const __m256i both = load(planes + 2 * pairs * kVector);
      for (int half = 0; half < 2; ++half) {
        const __m256i index = _mm256_and_si256(half == 1 ? _mm256_srli_epi16(both, 4) : both, nibble);
        const __m256i found = _mm256_shuffle_epi8(load(high + 32 * half), index);
        h[pairs] = _mm256_add_epi16(h[pairs], _mm256_maddubs_epi16(even_rows, found));
        h[pairs + 1] = _mm256_add_epi16(h[pairs + 1], _mm256_maddubs_epi16(odd_rows, found));
        if constexpr (Wide) {
          const __m256i less = _mm256_shuffle_epi8(load(low + 32 * half), index);
          l[pairs] = _mm256_add_epi16(l[pairs], _mm256_maddubs_epi16(less, even_rows));
          l[pairs + 1] = _mm256_add_epi16(l[pairs + 1], _mm256_maddubs_epi16(less, odd_rows));
        }
      }
    }
    planes += B * kVector;
  }
  __m256i a = _mm256_setzero_si256(), b = a;
  if constexpr (single) {
    const __m256i even = _mm256_add_epi32(joined<Wide, 0>(h[pairs], l[pairs]), joined<Wide, 1>(h[pairs], l[pairs]));
    const __m256i odd = _mm256_add_epi32(joined<Wide, 0>(h[pairs + 1], l[pairs + 1]),
                                         joined<Wide, 1>(h[pairs + 1], l[pairs + 1]));
    const __m256i lower = _mm256_unpacklo_epi32(even, odd), upper = _mm256_unpackhi_epi32(even, odd);
    a = _mm256_slli_epi32(_mm256_permute2x128_si256(lower, upper, 0x20), B - 1);
    b = _mm256_slli_epi32(_mm256_permute2x128_si256(lower, upper, 0x31), B - 1);
  }
  for (int p = 0; p < pairs; ++p) {
    a = _mm256_add_epi32(a, _mm256_slli_epi32(joined<Wide, 0>(h[p], l[p]), 2 * p));
    b = _mm256_add_epi32(b, _mm256_slli_epi32(joined<Wide, 1>(h[p], l[p]), 2 * p));
  }
  first = _mm256_cvtepi32_ps(a), second = _mm256_cvtepi32_ps(b);
}

template <int B, bool Wide>
inline void span_total(const std::uint8_t* planes, const std::uint8_t* low, const std::uint8_t* high, int units,
                       float factor, float sum, const float* scale, const float* offset, float* total) {
  __m256 part[2];
  span_sums<B, Wide>(planes, low, high, units, part[0], part[1]);
  for (int i = 0; i < 2; ++i) {
    __m256 t = _mm256_loadu_ps(total + 8 * i);
    t = _mm256_fmadd_ps(_mm256_loadu_ps(offset + 8 * i), _mm256_set1_ps(sum), t);
    part[i] = _mm256_mul_ps(part[i], _mm256_set1_ps(factor));
    _mm256_storeu_ps(total + 8 * i, _mm256_fmadd_ps(_mm256_loadu_ps(scale + 8 * i), part[i], t));
  }
}
#else
template <int B, bool Wide>
inline void span_total(const std::uint8_t* planes, const std::uint8_t* low, const std::uint8_t* high, int units,
                       float factor, float sum, const float* scale, const float* offset, float* total) {
  std::int32_t acc[kBlock] = {};
  for (int u = 0; u < units; ++u, planes += B * kVector, high += 64, low += Wide ? 64 : 0)
    for (int q = 0; q < kQuads; ++q)
      for (int r = 0; r < kBlock; ++r)
        for (int i = 0; i < B; ++i) {
          const bool paired = i < B / 2 * 2;
          const std::uint8_t byte = paired ? planes[(i / 2 * 2 + q / 2) * kVector + 2 * r + i % 2]
                                           : planes[i * kVector + q / 2 * 16 + r];
          const int at = kSlot[q] * 16 + (q % 2 == 1 ? byte >> 4 : byte & 15);
          const std::int32_t entry = static_cast<std::int8_t>(high[at]);
          acc[r] += (Wide ? entry * 256 + low[at] : entry) * (1 << i);
        }
  for (int r = 0; r < kBlock; ++r)
    total[r] = std::fma(scale[r], static_cast<float>(acc[r]) * factor, std::fma(offset[r], sum, total[r]));
}
#endif

template <int B, bool Wide>
void run(const TMan& layer, const Tables& tables, int rows, float* y, std::ptrdiff_t ldy) {
  const affine::Affine& grid = layer.grid;
  const int blocks = grid.blocks(), count = static_cast<int>(layer.spans.size());
  const bool parallel = worth_threads(rows, layer.inputs, layer.outputs);
  const std::size_t side = static_cast<std::size_t>(grid.groups) * kBlock;
  // Half the scale of a span's tables, for planes weigh 0.5, 1, 2, 4; and its sum of activations.
  float* of_span = affine::scratch<3>(2 * static_cast<std::size_t>(rows) * count);
  for (int r = 0; r < rows; ++r)
    for (int s = 0; s < count; ++s) {
      const Span& span = layer.spans[s];
      float sum = 0.0f;
      for (int u = span.first; u < span.last; ++u) sum += tables.sum[static_cast<std::size_t>(r) * tables.units + u];
      float* to = of_span + 2 * (static_cast<std::size_t>(r) * count + s);
      to[0] = 0.5f * tables.scale[static_cast<std::size_t>(r) * tables.scales + span.scale], to[1] = sum;
    }
#pragma omp parallel for schedule(static) if (parallel)
  for (int b = 0; b < blocks; ++b) {
    float *scale = affine::scratch<1>(2 * side), *offset = scale + side;
    grid.expand(b, 0, grid.groups, scale, offset);
    const vf middle = vf::set(0.5f * ((1 << B) - 1));
    for (std::size_t i = 0; i < side; i += vf::width)
      fma(vf::load(scale + i), middle, vf::load(offset + i)).store(offset + i);
    const std::uint8_t* planes = layer.block_planes(b);
    const int valid = std::min(kBlock, layer.outputs - b * kBlock);
    for (int r = 0; r < rows; ++r) {
      alignas(32) float total[kBlock];
      std::memcpy(total, grid.bias != nullptr ? grid.bias + b * kBlock : dense::zeros(), sizeof total);
      const std::size_t at = static_cast<std::size_t>(r) * tables.units * 64;
      for (int s = 0; s < count; ++s) {
        const Span& span = layer.spans[s];
        const float* factor = of_span + 2 * (static_cast<std::size_t>(r) * count + s);
        const std::size_t from = at + static_cast<std::size_t>(span.first) * 64;
        const int g = span.group * kBlock;
        span_total<B, Wide>(planes + static_cast<std::size_t>(span.first) * B * kVector,
                            Wide ? tables.low + from : nullptr, tables.high + from, span.last - span.first, factor[0],
                            factor[1], scale + g, offset + g, total);
      }
      std::memcpy(y + r * ldy + b * kBlock, total, valid * sizeof(float));
    }
  }
}

std::int64_t tables_built() { return built.load(); }

HASTEN_KERNELS(m) { m.def("tman_tables_built", &tables_built); }

}  // namespace

Tables build(const TMan& order, const float* x, std::ptrdiff_t ldx, int rows) {
  static thread_local std::vector<std::uint8_t> memory;
  const int units = order.units(), per_scale = order.wide ? kWideScale : kNarrowScale;
  const int scales = (units * kUnit + per_scale - 1) / per_scale;
  const std::size_t table = static_cast<std::size_t>(rows) * units * 64;
  if (memory.size() < 2 * table) memory.resize(2 * table);
  const std::size_t padded = static_cast<std::size_t>(units) * kUnit;
  float* row = affine::scratch<2>(padded + static_cast<std::size_t>(rows) * (scales + units));
  float *scale = row + padded, *sum = scale + static_cast<std::size_t>(rows) * scales;
  for (int r = 0; r < rows; ++r) {
    affine::gather(order.grid, x + r * ldx, row);
    std::fill(row + order.grid.width, row + padded, 0.0f);
    const std::size_t at = static_cast<std::size_t>(r) * units * 64;
    build_row(row, units, order.wide, memory.data() + table + at, memory.data() + at,
              scale + static_cast<std::size_t>(r) * scales, sum + static_cast<std::size_t>(r) * units);
  }
  built += rows;
  return {memory.data() + table, memory.data(), scale, sum, units, scales};
}

void lookup(const TMan& layer, const Tables& tables, int rows, float* y, std::ptrdiff_t ldy) {
  const auto with = [&]<int B>() {
    if (layer.wide) run<B, true>(layer, tables, rows, y, ldy);
    else run<B, false>(layer, tables, rows, y, ldy);
  };
  switch (layer.grid.bits) {
    case 1: return with.template operator()<1>();
    case 2: return with.template operator()<2>();
    case 3: return with.template operator()<3>();
    default: return with.template operator()<4>();
  }
}

}  // namespace hasten::tman
