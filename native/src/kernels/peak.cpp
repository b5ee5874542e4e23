// What this machine can do at most: read bandwidth from memory, float32 multiply-adds and 8-bit integer dot products per
// second. Bounds of the other kernels; see hasten/measure/kernels.py.
#include <vector>

#include "hasten.h"
#include "simd.h"

namespace hasten {
namespace {

// Reads `count` floats once, on all threads; the sum keeps the compiler from leaving it out.
double stream_read(std::uintptr_t address, std::int64_t count) {
  const float* x = reinterpret_cast<const float*>(address);
  constexpr std::int64_t kPart = 1 << 14;
  double total = 0;
  nb::gil_scoped_release release;
#pragma omp parallel for schedule(static) reduction(+ : total)
  for (std::int64_t part = 0; part < count / kPart; ++part) {
    const float* p = x + part * kPart;
    vf a = vf::zero(), b = vf::zero(), c = vf::zero(), d = vf::zero();
    for (std::int64_t i = 0; i < kPart; i += 4 * vf::width) {
      a = a + vf::load(p + i), b = b + vf::load(p + i + vf::width);
      c = c + vf::load(p + i + 2 * vf::width), d = d + vf::load(p + i + 3 * vf::width);
    }
    total += ((a + b) + (c + d)).sum();
  }
  return total;
}

constexpr int kChains = 12;  // enough independent multiply-adds to cover their latency on every core of today

// `rounds` times kChains vectors of multiply-adds per task; returns how many float operations that is.
double fma_rate(std::int64_t rounds, int tasks, std::uintptr_t sink) {
  float* out = reinterpret_cast<float*>(sink);
  nb::gil_scoped_release release;
#pragma omp parallel for schedule(static)
  for (int t = 0; t < tasks; ++t) {
    vf acc[kChains];
    for (int i = 0; i < kChains; ++i) acc[i] = vf::set(static_cast<float>(t + i));
    const vf a = vf::set(out[0]), b = vf::set(out[1]);
    for (std::int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 12
      for (int i = 0; i < kChains; ++i) acc[i] = fma(acc[i], a, b);
    for (int i = 1; i < kChains; ++i) acc[0] = acc[0] + acc[i];
    out[2 + t] = acc[0].sum();
  }
  return 2.0 * static_cast<double>(rounds) * tasks * kChains * vf::width;
}

// The same for products of unsigned and signed bytes added up in 32 bits: VNNI where present, multiply-add pairs on AVX2.
double dot8_rate(std::int64_t rounds, int tasks, std::uintptr_t sink) {
  float* out = reinterpret_cast<float*>(sink);
  double per_step = 2;
  nb::gil_scoped_release release;
#if defined(__AVX512F__)
  per_step = 2 * 64;
#elif defined(__AVX2__)
  per_step = 2 * 32;
#endif
#pragma omp parallel for schedule(static)
  for (int t = 0; t < tasks; ++t) {
#if defined(__AVX512F__)
    __m512i acc[kChains];
    const __m512i a = _mm512_set1_epi32(static_cast<int>(out[0])), b = _mm512_set1_epi32(static_cast<int>(out[1]));
    for (int i = 0; i < kChains; ++i) acc[i] = _mm512_set1_epi32(t + i);
    for (std::int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 12
      for (int i = 0; i < kChains; ++i) acc[i] = _mm512_dpbusd_epi32(acc[i], a, b);
    for (int i = 1; i < kChains; ++i) acc[0] = _mm512_add_epi32(acc[0], acc[i]);
    out[2 + t] = static_cast<float>(_mm512_reduce_add_epi32(acc[0]));
#elif defined(__AVX2__)
    // Four products of pairs are added in 16 bits before they are widened, as the 4-bit kernels do.
    __m256i acc[3], x[4];
    const __m256i ones = _mm256_set1_epi16(1);
    for (int i = 0; i < 3; ++i) acc[i] = _mm256_set1_epi32(t + i);
    for (int i = 0; i < 4; ++i) x[i] = _mm256_set1_epi32(static_cast<int>(out[0]) + i);
    __m256i w = _mm256_set1_epi32(static_cast<int>(out[1]));
    for (std::int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) {
        asm("" : "+x"(w));
        __m256i s = _mm256_maddubs_epi16(x[0], w);
        for (int j = 1; j < 4; ++j) s = _mm256_add_epi16(s, _mm256_maddubs_epi16(x[j], w));
        acc[i] = _mm256_add_epi32(acc[i], _mm256_madd_epi16(s, ones));
      }
    const __m256i all = _mm256_add_epi32(acc[0], _mm256_add_epi32(acc[1], acc[2]));
    out[2 + t] = static_cast<float>(_mm256_extract_epi32(all, 0));
#else
    std::int32_t acc = t;
    const auto a = static_cast<std::uint8_t>(out[0]);
    auto b = static_cast<std::int8_t>(out[1]);
    for (std::int64_t r = 0; r < rounds * kChains; ++r) {
      acc += a * b;
      b = static_cast<std::int8_t>(acc);
    }
    out[2 + t] = static_cast<float>(acc);
#endif
  }
  return per_step * static_cast<double>(rounds) * tasks * kChains;
}

HASTEN_KERNELS(m) {
  m.def("stream_read", &stream_read);
  m.def("fma_rate", &fma_rate);
  m.def("dot8_rate", &dot8_rate);
}

}  // namespace
}  // namespace hasten
