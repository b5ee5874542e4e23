// Group-quantised layers: scales, the path for many rows (dequantise a block, then the dense tile), and the choice of path.
#include <type_traits>

#include "affine_codes.h"

namespace hasten::affine {
namespace {

#if !defined(__F16C__)
float half_to_float(std::uint16_t h) {
  const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16, exponent = (h >> 10) & 31, rest = h & 1023u;
  if (exponent == 0) {
    const float value = static_cast<float>(rest) * 0x1p-24f;
    return sign != 0 ? -value : value;
  }
  const std::uint32_t top = exponent == 31 ? 255u : exponent + 112u;
  return std::bit_cast<float>(sign | top << 23 | rest << 13);
}
#endif

void widen_half(const std::uint16_t* from, float* to) {
#if defined(__AVX512F__)
  _mm512_storeu_ps(to, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__F16C__)
  for (int i = 0; i < kBlock; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#else
  for (int i = 0; i < kBlock; ++i) to[i] = half_to_float(from[i]);
#endif
}

// to[16] = bytes * factor[16]; not left to the compiler, which widens bytes by detours.
template <typename Byte>
void widen_bytes(const Byte* from, const float* factor, float* to) {
#if defined(__AVX2__)
  constexpr bool is_signed = std::is_signed_v<Byte>;
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  for (int i = 0; i < kBlock; i += 8) {
    const __m128i part = i == 0 ? bytes : _mm_unpackhi_epi64(bytes, bytes);
    const __m256i wide = is_signed ? _mm256_cvtepi8_epi32(part) : _mm256_cvtepu8_epi32(part);
    _mm256_storeu_ps(to + i, _mm256_mul_ps(_mm256_cvtepi32_ps(wide), _mm256_loadu_ps(factor + i)));
  }
#else
  for (int i = 0; i < kBlock; ++i) to[i] = static_cast<float>(from[i]) * factor[i];
#endif
}

// Numbers of groups [first, first + count) of a block as float32 [count][16]. unit: their scales, for multiples of them.
void widen(const Affine& a, Kind kind, const void* values, const std::uint16_t* outer, int block, int first, int count,
           const float* unit, float* to) {
  const std::size_t start = (static_cast<std::size_t>(block) * a.groups + first) * kBlock;
  const int total = count * kBlock;
  if (kind == Kind::offset) {
    const vf factor = vf::set(-a.offset);
    for (int i = 0; i < total; i += vf::width) (factor * vf::load(unit + i)).store(to + i);
  } else if (kind == Kind::zero) {
    const std::uint8_t* from = static_cast<const std::uint8_t*>(values) + start;
    for (int i = 0; i < total; i += kBlock) {
      widen_bytes(from + i, unit + i, to + i);
      for (int j = i; j < i + kBlock; ++j) to[j] = -to[j];
    }
  } else if (kind == Kind::single) {
    std::memcpy(to, static_cast<const float*>(values) + start, sizeof(float) * total);
  } else if (kind == Kind::half) {
    const std::uint16_t* from = static_cast<const std::uint16_t*>(values) + start;
    for (int i = 0; i < total; i += kBlock) widen_half(from + i, to + i);
  } else {
    const std::int8_t* from = static_cast<const std::int8_t*>(values) + start;
    outer += static_cast<std::size_t>(block) * ((a.groups + a.nest - 1) / a.nest) * kBlock;
    float wide[kBlock];
    for (int g = 0; g < count; ++g) {
      if (g == 0 || (first + g) % a.nest == 0) widen_half(outer + (first + g) / a.nest * kBlock, wide);
      widen_bytes(from + g * kBlock, wide, to + g * kBlock);
    }
  }
}

// Columns [16 H, 16 H + 16) of a chunk as float32 [16][16].
template <int B, int H, int... C>
inline void half_weights(const std::uint32_t* words, const float* scale, const float* low, float* to,
                         std::integer_sequence<int, C...>) {
  for (int v = 0; v < kBlock; v += vf::width) {
    const vf s = vf::load(scale + v), m = vf::load(low + v);
    (fma(s, plain_code<B, H * kHalf + C>(words + v).to_float(), m).store(to + C * kBlock + v), ...);
  }
}

template <int B>
void weights(const Affine& a, int block, int first, int count, const float* scale, const float* low, float* to) {
  constexpr auto columns = std::make_integer_sequence<int, kHalf>();
  const std::uint32_t* words = a.block_words(block) + static_cast<std::size_t>(first) * B * kBlock;
  for (int chunk = first; chunk < first + count; ++chunk, words += B * kBlock, to += kChunk * kBlock) {
    const int g = 2 * chunk / a.halves * kBlock, h = (2 * chunk + 1) / a.halves * kBlock;
    half_weights<B, 0>(words, scale + g, low + g, to, columns);
    half_weights<B, 1>(words, scale + h, low + h, to + kHalf * kBlock, columns);
  }
}

using Weights = void (*)(const Affine&, int, int, int, const float*, const float*, float*);
Weights weights_of(int bits) {
  switch (bits) {
    case 2: return &weights<2>;
    case 3: return &weights<3>;
    case 4: return &weights<4>;
    case 5: return &weights<5>;
    case 6: return &weights<6>;
    default: return &weights<8>;
  }
}

// Columns dequantised at a time: 16 KiB, so that they are still in L1 when they are multiplied.
constexpr int kDepth = 256;
static_assert(kDepth % kChunk == 0);

void many(const Affine& a, const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy) {
  if (a.column != nullptr) {
    float* ordered = scratch<0>(static_cast<std::size_t>(rows) * a.width);
    for (int r = 0; r < rows; ++r) gather(a, x + r * ldx, ordered + static_cast<std::size_t>(r) * a.width);
    x = ordered, ldx = a.width;
  }
  const Weights fill = weights_of(a.bits);
  const std::size_t side = static_cast<std::size_t>(a.groups) * kBlock;
  const auto panel = [&](int block, int start, int count) -> const float* {
    float* scale = scratch<1>(2 * side + kDepth * kBlock);
    if (start == 0) a.expand(block, 0, a.groups, scale, scale + side);
    float* to = scale + 2 * side;
    fill(a, block, start / kChunk, (count + kChunk - 1) / kChunk, scale, scale + side, to);
    return to;
  };
  const bool parallel = worth_threads(rows, a.inputs, a.outputs);
  dense::product<kDepth>(x, ldx, rows, a.width, a.outputs, a.bias, y, ldy, parallel, panel);
}

}  // namespace

void Affine::expand(int block, int first, int count, float* scale_out, float* low_out) const {
  widen(*this, scale_kind, scale, outer_scale, block, first, count, nullptr, scale_out);
  widen(*this, low_kind, low, outer_low, block, first, count, scale_out, low_out);
}

void gather(const Affine& a, const float* from, float* to) {
  if (a.column == nullptr) std::memcpy(to, from, sizeof(float) * a.width);
  else
    for (int i = 0; i < a.width; ++i) to[i] = a.column[i] < 0 ? 0.0f : from[a.column[i]];
}

bool Affine::row(int output, float* to) const {
  // Whole blocks are cut out, sixteen outputs for one: still a few microseconds for a row.
  const std::size_t side = static_cast<std::size_t>(groups) * kBlock;
  float* scale_of = scratch<1>(2 * side + static_cast<std::size_t>(chunks) * kChunk * kBlock);
  float* all = scale_of + 2 * side;
  expand(output / kBlock, 0, groups, scale_of, scale_of + side);
  weights_of(bits)(*this, output / kBlock, 0, chunks, scale_of, scale_of + side, all);
  for (int i = 0; i < width; ++i) {
    const int to_column = column == nullptr ? i : column[i];
    if (to_column >= 0) to[to_column] = all[static_cast<std::size_t>(i) * kBlock + output % kBlock];
  }
  return true;
}

void Affine::forward(const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy) const {
  if (rows <= 0) return;
  if (rounding == Rounding::int16) rounded_int16(*this, x, ldx, rows, y, ldy);
  else if (rounding == Rounding::int8) rounded_int8(*this, x, ldx, rows, y, ldy);
  else if (rows <= kDirect) direct(*this, x, ldx, rows, y, ldy);
  else many(*this, x, ldx, rows, y, ldy);
}

namespace {

// Addresses and sizes come from the Python face, which has checked them.
nb::capsule packed_affine(int inputs, int outputs, int bits, int width, int halves, int groups, int nest, Address words,
                          int scale_kind, Address scale, Address outer_scale, int low_kind, Address low,
                          Address outer_low, float offset, Address bias, Address column, int rounding) {
  const auto to = static_cast<Rounding>(rounding);
  require(to != Rounding::int8 || (bits == 4 && halves % 2 == 0),
          "no kernel for 8 bit activations and these codes");
  require(to != Rounding::int16 || bits >= 4, "no kernel for 16 bit activations and these codes");
  auto a = std::make_unique<Affine>();
  a->inputs = inputs, a->outputs = outputs, a->bits = bits, a->width = width, a->halves = halves, a->groups = groups;
  a->chunks = (width + kChunk - 1) / kChunk, a->nest = nest, a->offset = offset, a->rounding = to;
  a->words = reinterpret_cast<const std::uint32_t*>(words);
  a->scale_kind = static_cast<Kind>(scale_kind), a->low_kind = static_cast<Kind>(low_kind);
  a->scale = reinterpret_cast<const void*>(scale), a->low = reinterpret_cast<const void*>(low);
  a->outer_scale = reinterpret_cast<const std::uint16_t*>(outer_scale);
  a->outer_low = reinterpret_cast<const std::uint16_t*>(outer_low);
  a->bias = reinterpret_cast<const float*>(bias), a->column = reinterpret_cast<const std::int32_t*>(column);
  return wrap(std::move(a));
}

HASTEN_KERNELS(m) { m.def("packed_affine", &packed_affine); }

}  // namespace
}  // namespace hasten::affine
