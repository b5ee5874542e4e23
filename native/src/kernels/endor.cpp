// Bitmap-compressed sparse values (Endor, arXiv 2406.11674): one bit per element, the others' bits packed behind one another,
// and where every block of elements begins, so that blocks are decompressed independently. Any values, by their bits: what is
// all zero bits is left out, everything else (-0.0, NaN payloads) is kept.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "hasten.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace hasten {
namespace {

using Address = std::uintptr_t;

constexpr std::int64_t kElements = 8192;  // of a block

std::uint64_t word_at(const std::uint8_t* bitmap, std::int64_t element, std::int64_t count) {
  std::uint64_t word = 0;
  std::memcpy(&word, bitmap + element / 8, static_cast<std::size_t>(std::min<std::int64_t>(8, (count - element + 7) / 8)));
  return word;
}

template <typename T>
void compress(const T* from, std::int64_t count, std::uint8_t* bitmap, T* values, std::int32_t* start) {
  std::int64_t kept = 0;
  std::memset(bitmap, 0, static_cast<std::size_t>((count + 7) / 8));
  for (std::int64_t i = 0; i < count; ++i) {
    if (i % kElements == 0) start[i / kElements] = static_cast<std::int32_t>(kept);
    if (from[i] == 0) continue;
    bitmap[i / 8] = static_cast<std::uint8_t>(bitmap[i / 8] | 1u << i % 8);
    values[kept++] = from[i];
  }
  start[(count + kElements - 1) / kElements] = static_cast<std::int32_t>(kept);
}

#if defined(__AVX2__)
// For every byte of the bitmap, which value (16 bits each) goes to which of its eight elements; 0x80 makes a zero.
const auto& places() {
  static const auto table = [] {
    std::array<std::array<std::uint8_t, 16>, 256> t{};
    for (int byte = 0; byte < 256; ++byte)
      for (int i = 0, next = 0; i < 8; ++i) {
        const bool kept = (byte >> i & 1) != 0;
        t[byte][2 * i] = static_cast<std::uint8_t>(kept ? 2 * next : 0x80);
        t[byte][2 * i + 1] = static_cast<std::uint8_t>(kept ? 2 * next + 1 : 0x80);
        next += kept;
      }
    return t;
  }();
  return table;
}
#endif

// Elements [first, last) to `to`, from the values that begin with the first of them. `end`: of all values.
template <typename T>
void expand_block(const std::uint8_t* bitmap, const T* values, const T* end, std::int64_t first, std::int64_t last,
                  std::int64_t count, T* to) {
  std::int64_t i = first;
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 2) {
    const auto& place = places();
    // Eight values are read whatever the bitmap says: the last few of the array are left to the loop below.
    for (; i + 64 <= last && values + 72 <= end; i += 64, to += 64) {
      const std::uint64_t word = word_at(bitmap, i, count);
      for (int byte = 0; byte < 8; ++byte) {
        const std::size_t bits = word >> 8 * byte & 255;
        const __m128i some = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
        const __m128i shuffle = _mm_loadu_si128(reinterpret_cast<const __m128i*>(place[bits].data()));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8 * byte), _mm_shuffle_epi8(some, shuffle));
        values += std::popcount(bits);
      }
    }
  }
#endif
  for (; i < last; i += 64) {
    std::uint64_t word = word_at(bitmap, i, count);
    const std::int64_t here = std::min<std::int64_t>(64, last - i);
    for (std::int64_t j = 0; j < here; ++j, word >>= 1) *to++ = (word & 1) != 0 && values < end ? *values++ : T{0};
  }
}

template <typename T>
void expand(const std::uint8_t* bitmap, const T* values, const std::int32_t* start, std::int64_t count,
            std::int64_t first, std::int64_t blocks, T* to, bool parallel) {
  const std::int64_t all = (count + kElements - 1) / kElements;
  const T* end = values + start[all];
#pragma omp parallel for schedule(static) if (parallel)
  for (std::int64_t b = first; b < first + blocks; ++b) {
    const std::int64_t from = b * kElements, last = std::min(count, from + kElements);
    expand_block(bitmap, values + start[b], end, from, last, count, to + (from - first * kElements));
  }
}

template <typename F>
void with_size(int size, F f) {
  switch (size) {
    case 1: return f.template operator()<std::uint8_t>();
    case 2: return f.template operator()<std::uint16_t>();
    case 4: return f.template operator()<std::uint32_t>();
    default: require(false, "elements of 1, 2 or 4 bytes");
  }
}

// Addresses and sizes come from the Python face, which has checked them.
void bitmap_compress(Address from, std::int64_t count, int size, Address bitmap, Address values, Address start) {
  nb::gil_scoped_release release;
  with_size(size, [&]<typename T>() {
    compress(reinterpret_cast<const T*>(from), count, reinterpret_cast<std::uint8_t*>(bitmap),
             reinterpret_cast<T*>(values), reinterpret_cast<std::int32_t*>(start));
  });
}

void bitmap_expand(Address bitmap, Address values, Address start, std::int64_t count, int size, std::int64_t first,
                   std::int64_t blocks, Address to, bool parallel) {
  nb::gil_scoped_release release;
  with_size(size, [&]<typename T>() {
    expand(reinterpret_cast<const std::uint8_t*>(bitmap), reinterpret_cast<const T*>(values),
           reinterpret_cast<const std::int32_t*>(start), count, first, blocks, reinterpret_cast<T*>(to), parallel);
  });
}

HASTEN_KERNELS(m) {
  m.attr("bitmap_elements") = kElements;
  m.def("bitmap_compress", &bitmap_compress);
  m.def("bitmap_expand", &bitmap_expand);
}

}  // namespace
}  // namespace hasten
