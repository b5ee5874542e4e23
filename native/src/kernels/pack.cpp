// Between codes, one byte each, and the dense words of affine_codes.h. Runs once per layer at load.
#include <atomic>

#include "affine_codes.h"

namespace hasten::affine {
namespace {

// f(column, word, bit, code's lowest bit, bits) for every contiguous piece of every code of a chunk.
template <int B, typename F, int... C>
inline void each_piece(F f, std::integer_sequence<int, C...>) {
  auto column = [&]<int c>() {
    for (int i = 0, low = 0; i < Place<B>::pieces(c); ++i) {
      const Piece p = Place<B>::piece(c, i);
      f(c, p.word, p.bit, low, p.bits);
      low += p.bits;
    }
  };
  (column.template operator()<C>(), ...);
}

constexpr auto kColumns = std::make_integer_sequence<int, kChunk>();

template <int B>
bool pack(const std::uint8_t* codes, int outputs, int columns, std::uint32_t* words) {
  const int chunks = (columns + kChunk - 1) / kChunk, blocks = (outputs + kBlock - 1) / kBlock;
  std::atomic<bool> fits{true};
#pragma omp parallel for schedule(static)
  for (int b = 0; b < blocks; ++b) {
    std::uint32_t all = 0;
    for (int row = 0; row < kBlock; ++row) {
      const int o = b * kBlock + row;
      std::uint32_t* to = words + static_cast<std::size_t>(b) * chunks * B * kBlock + row;
      for (int chunk = 0; chunk < chunks; ++chunk, to += B * kBlock) {
        std::uint32_t code[kChunk] = {}, word[B] = {};
        if (o < outputs) {
          const std::uint8_t* from = codes + static_cast<std::size_t>(o) * columns;
          const int first = chunk * kChunk, count = std::min(kChunk, columns - first);
          for (int i = 0; i < count; ++i) code[i] = from[first + i];
        }
        for (int i = 0; i < kChunk; ++i) all |= code[i];
        each_piece<B>([&](int c, int w, int bit, int low, int bits) {
          word[w] |= ((code[c] >> low) & ((1u << bits) - 1)) << bit;
        }, kColumns);
        for (int w = 0; w < B; ++w) to[w * kBlock] = word[w];
      }
    }
    if (all >> B != 0) fits = false;
  }
  return fits;
}

template <int B>
bool unpack(const std::uint32_t* words, int outputs, int columns, std::uint8_t* codes) {
  const int chunks = (columns + kChunk - 1) / kChunk;
#pragma omp parallel for schedule(static)
  for (int o = 0; o < outputs; ++o) {
    const std::uint32_t* from = words + static_cast<std::size_t>(o / kBlock) * chunks * B * kBlock + o % kBlock;
    for (int chunk = 0; chunk < chunks; ++chunk, from += B * kBlock) {
      std::uint32_t code[kChunk] = {};
      each_piece<B>([&](int c, int w, int bit, int low, int bits) {
        code[c] |= ((from[w * kBlock] >> bit) & ((1u << bits) - 1)) << low;
      }, kColumns);
      const int first = chunk * kChunk, count = std::min(kChunk, columns - first);
      std::uint8_t* to = codes + static_cast<std::size_t>(o) * columns;
      for (int i = 0; i < count; ++i) to[first + i] = static_cast<std::uint8_t>(code[i]);
    }
  }
  return true;
}

template <typename F>
bool with_bits(int bits, F f) {
  switch (bits) {
    case 2: return f.template operator()<2>();
    case 3: return f.template operator()<3>();
    case 4: return f.template operator()<4>();
    case 5: return f.template operator()<5>();
    case 6: return f.template operator()<6>();
    case 8: return f.template operator()<8>();
    default: require(false, "bits must be 2, 3, 4, 5, 6 or 8"); return false;
  }
}

// False if a code does not fit its bits. Addresses and sizes come from the Python face, which has checked them.
bool pack_codes(Address codes, int outputs, int columns, int bits, Address words) {
  nb::gil_scoped_release release;
  return with_bits(bits, [&]<int B>() {
    return pack<B>(reinterpret_cast<const std::uint8_t*>(codes), outputs, columns,
                   reinterpret_cast<std::uint32_t*>(words));
  });
}

void unpack_codes(Address words, int outputs, int columns, int bits, Address codes) {
  nb::gil_scoped_release release;
  with_bits(bits, [&]<int B>() {
    return unpack<B>(reinterpret_cast<const std::uint32_t*>(words), outputs, columns,
                     reinterpret_cast<std::uint8_t*>(codes));
  });
}

HASTEN_KERNELS(m) {
  m.def("pack_codes", &pack_codes);
  m.def("unpack_codes", &unpack_codes);
}

}  // namespace
}  // namespace hasten::affine
