// A small vector of floats: AVX-512 (16), AVX2 (8) or scalar (1), chosen by the compiler flags of the module.
//
// Kernels are written once on `hasten::vf`; a file that needs more than this (integer dot products, shuffles)
// tests __AVX512F__ / __AVX2__ itself and keeps a scalar branch.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "bf16.h"

namespace hasten {

#if defined(__AVX512F__)
struct vf {
  static constexpr int width = 16;
  __m512 v;
  static vf zero() { return {_mm512_setzero_ps()}; }
  static vf set(float x) { return {_mm512_set1_ps(x)}; }
  static vf load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static vf load(const std::uint16_t* p) {  // bfloat16
    __m512i w = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(w, 16))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  float sum() const { return _mm512_reduce_add_ps(v); }
  float max() const { return _mm512_reduce_max_ps(v); }
};
inline vf operator+(vf a, vf b) { return {_mm512_add_ps(a.v, b.v)}; }
inline vf operator-(vf a, vf b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline vf operator*(vf a, vf b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline vf fma(vf a, vf b, vf c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline vf max(vf a, vf b) { return {_mm512_max_ps(a.v, b.v)}; }
inline vf min(vf a, vf b) { return {_mm512_min_ps(a.v, b.v)}; }
inline vf round(vf a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline vf pow2i(vf n) {  // 2^n for integral n in [-126, 127]
  __m512i e = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23);
  return {_mm512_castsi512_ps(e)};
}
#elif defined(__AVX2__)
struct vf {
  static constexpr int width = 8;
  __m256 v;
  static vf zero() { return {_mm256_setzero_ps()}; }
  static vf set(float x) { return {_mm256_set1_ps(x)}; }
  static vf load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static vf load(const std::uint16_t* p) {  // bfloat16
    __m256i w = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(w, 16))};
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  float sum() const {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  float max() const {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
  }
};
inline vf operator+(vf a, vf b) { return {_mm256_add_ps(a.v, b.v)}; }
inline vf operator-(vf a, vf b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline vf operator*(vf a, vf b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline vf fma(vf a, vf b, vf c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline vf max(vf a, vf b) { return {_mm256_max_ps(a.v, b.v)}; }
inline vf min(vf a, vf b) { return {_mm256_min_ps(a.v, b.v)}; }
inline vf round(vf a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline vf pow2i(vf n) {
  __m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
  return {_mm256_castsi256_ps(e)};
}
#else
struct vf {
  static constexpr int width = 1;
  float v;
  static vf zero() { return {0.0f}; }
  static vf set(float x) { return {x}; }
  static vf load(const float* p) { return {*p}; }
  static vf load(const std::uint16_t* p) { return {bf16_to_float(*p)}; }
  void store(float* p) const { *p = v; }
  float sum() const { return v; }
  float max() const { return v; }
};
inline vf operator+(vf a, vf b) { return {a.v + b.v}; }
inline vf operator-(vf a, vf b) { return {a.v - b.v}; }
inline vf operator*(vf a, vf b) { return {a.v * b.v}; }
inline vf fma(vf a, vf b, vf c) { return {a.v * b.v + c.v}; }
inline vf max(vf a, vf b) { return {a.v > b.v ? a.v : b.v}; }
inline vf min(vf a, vf b) { return {a.v < b.v ? a.v : b.v}; }
inline vf round(vf a) { return {std::nearbyint(a.v)}; }
inline vf pow2i(vf n) { return {std::ldexp(1.0f, static_cast<int>(n.v))}; }
#endif

// e^x to about 2 ulp; arguments are clamped to [-87, 88], so e^-inf is 1.6e-38: mask by limits, not by -inf. Range reduction by log 2, degree-6 polynomial (Cephes expf).
inline vf exp(vf x) {
  const vf low = vf::set(-87.0f);
  x = min(max(x, low), vf::set(88.0f));
  vf n = round(x * vf::set(1.44269504088896341f));
  vf r = fma(n, vf::set(-0.693359375f), x);
  r = fma(n, vf::set(2.12194440e-4f), r);
  vf p = vf::set(1.9875691500e-4f);
  p = fma(p, r, vf::set(1.3981999507e-3f));
  p = fma(p, r, vf::set(8.3334519073e-3f));
  p = fma(p, r, vf::set(4.1665795894e-2f));
  p = fma(p, r, vf::set(1.6666665459e-1f));
  p = fma(p, r, vf::set(5.0000001201e-1f));
  vf y = fma(p * r, r, r + vf::set(1.0f));
  return y * pow2i(n);
}

}  // namespace hasten
