// How KV pages store numbers. Free of nanobind: also compiled into attention variants at run time.
#pragma once

#include <cstdint>

#include "simd.h"

namespace hasten {

// int8: each token's codes of a head are followed by their float32 scale.
enum PageKind : int { kPagesFloat32 = 0, kPagesBfloat16 = 1, kPagesInt8 = 2 };

// Elements that a stored key or value has beyond the head size.
template <typename KV>
inline constexpr int kTail = 0;
template <>
inline constexpr int kTail<std::int8_t> = 4;

// The scale of a stored key or value; 1 for kinds that need none.
template <typename KV>
inline float scale_of(const KV* p, int size) {
  float out = 1.0f;
  if constexpr (kTail<KV> > 0) __builtin_memcpy(&out, p + size, sizeof out);
  return out;
}

inline float widen(float x) { return x; }
inline float widen(std::uint16_t x) { return bf16_to_float(x); }
inline float widen(std::int8_t x) { return static_cast<float>(x); }

// A vector of stored numbers, not scaled.
inline vf load_stored(const float* p) { return vf::load(p); }
inline vf load_stored(const std::uint16_t* p) { return vf::load(p); }
#if defined(__AVX512F__)
inline vf load_stored(const std::int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
#elif defined(__AVX2__)
inline vf load_stored(const std::int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
#else
inline vf load_stored(const std::int8_t* p) { return {widen(*p)}; }
#endif

}  // namespace hasten
