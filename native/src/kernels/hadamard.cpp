// Two-bit Hadamard codes: encoding heads and appending keys to the sidecar of their pages. See adamas.cpp for what they are for.
//
// Legend: R rows, H heads, D head size, B = D / 4 bytes of a code.
#include "hadamard.h"

#include "hasten.h"
#include "simd.h"

namespace hasten {
namespace {

// In-place fast Walsh-Hadamard transform without the 1 / sqrt(n) factor (callers scale their cut points instead).
void walsh_hadamard(float* x, int n) {
  for (int half = 1; half < n; half *= 2) {
    for (int base = 0; base < n; base += 2 * half) {
      float* a = x + base;
      float* b = a + half;
      int i = 0;
      for (; i + vf::width <= half; i += vf::width) {
        vf u = vf::load(a + i), w = vf::load(b + i);
        (u + w).store(a + i);
        (u - w).store(b + i);
      }
      for (; i < half; ++i) {
        float u = a[i], w = b[i];
        a[i] = u + w;
        b[i] = u - w;
      }
    }
  }
}

// Bits of `x` spread to the even places.
inline std::uint32_t spread_bits(std::uint32_t x) {
  x = (x | x << 4) & 0x0f0fu;
  x = (x | x << 2) & 0x3333u;
  return (x | x << 1) & 0x5555u;
}

}  // namespace

// Codes of one head; byte j (coordinates 4j..4j+3, two bits each) goes to code[j * stride].
void hadamard::encode_head(const float* x, int size, float cut, std::uint8_t* code, std::int64_t stride) {
  float y[kMaxSize];
  std::memcpy(y, x, static_cast<std::size_t>(size) * sizeof(float));
  walsh_hadamard(y, size);
  const float outer = cut * std::sqrt(static_cast<float>(size));
  for (int i = 0; i < size / 8; ++i) {
#if defined(__AVX2__)
    __m256 v = _mm256_loadu_ps(y + 8 * i);
    auto over = [v](float limit) {
      return static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_set1_ps(limit), _CMP_GT_OQ)));
    };
    const std::uint32_t positive = over(0.0f), above = over(outer), over_low = over(-outer);
#else
    std::uint32_t positive = 0, above = 0, over_low = 0;
    for (int c = 0; c < 8; ++c) {
      const float v = y[8 * i + c];
      positive |= static_cast<std::uint32_t>(v > 0.0f) << c;
      above |= static_cast<std::uint32_t>(v > outer) << c;
      over_low |= static_cast<std::uint32_t>(v > -outer) << c;
    }
#endif
    const std::uint32_t eight = spread_bits(above | (over_low & ~positive)) | spread_bits(positive) << 1;
    code[(2 * i) * stride] = static_cast<std::uint8_t>(eight);
    code[(2 * i + 1) * stride] = static_cast<std::uint8_t>(eight >> 8);
  }
}

int hadamard::block_width(int page_size) { return page_size % 32 == 0 ? 32 : page_size % 16 == 0 ? 16 : 1; }

void hadamard::append(const float* k, std::int64_t stride, float cut, std::uint8_t* codes, const std::int64_t* slot, int rows,
                      int kv_heads, int size, int page_size) {
  const int bytes = size / 4, width = block_width(page_size);
#pragma omp parallel for schedule(static) if (rows * kv_heads > 256)
  for (int t = 0; t < rows; ++t) {
    const std::int64_t page = slot[t] / page_size, offset = slot[t] % page_size;
    for (int g = 0; g < kv_heads; ++g) {
      std::uint8_t* to = codes + (page * kv_heads + g) * page_size * bytes + offset / width * width * bytes + offset % width;
      encode_head(k + t * stride + static_cast<std::int64_t>(g) * size, size, cut, to, width);
    }
  }
}

namespace {

using namespace hadamard;

HASTEN_KERNELS(m) {
  m.def("hadamard_encode", [](Array<const float, -1, -1, -1> x_RHD, float cut, Array<std::uint8_t, -1, -1, -1> out_RHB) {
    const auto size = static_cast<int>(x_RHD.shape(2)), bytes = static_cast<int>(out_RHB.shape(2));
    require(size == 4 * bytes && size % 8 == 0 && size <= kMaxSize, "codes must hold head size / 4 bytes");
    const std::int64_t heads = static_cast<std::int64_t>(x_RHD.shape(0) * x_RHD.shape(1));
    require(out_RHB.shape(0) == x_RHD.shape(0) && out_RHB.shape(1) == x_RHD.shape(1), "codes must match x");
    nb::gil_scoped_release release;
#pragma omp parallel for schedule(static) if (heads > 256)
    for (std::int64_t i = 0; i < heads; ++i)
      encode_head(x_RHD.data() + i * size, size, cut, out_RHB.data() + i * bytes, 1);
  });

  // Addresses where tensors would cost more than the work: float32 keys [rows, kv heads, size], codes [pages, kv heads,
  // page size, size / 4], int64 slots [rows].
  m.def("hadamard_append", [](std::uintptr_t k_TGD, float cut, std::uintptr_t codes_NGPB,
                              std::uintptr_t slot_T, int rows, int kv_heads, int size, int pages, int page_size) {
    const auto* slot = reinterpret_cast<const std::int64_t*>(slot_T);
    require(size > 0 && size % 8 == 0 && size <= kMaxSize, "head size must be a multiple of 8, at most 1024");
    const std::int64_t slots = static_cast<std::int64_t>(pages) * page_size;
    for (int t = 0; t < rows; ++t)
      require(slot[t] >= 0 && slot[t] < slots, "a slot lies outside the pool");
    nb::gil_scoped_release release;
    append(reinterpret_cast<const float*>(k_TGD), static_cast<std::int64_t>(kv_heads) * size, cut,
           reinterpret_cast<std::uint8_t*>(codes_NGPB), slot, rows, kv_heads, size, page_size);
  });
}

}  // namespace
}  // namespace hasten
