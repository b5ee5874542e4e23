// Stages (b) to (d): the integer product between two passes over a tile of the output, and the choice of path.
#include "quik.h"

namespace hasten::quik {
namespace {

using affine::kV;
using affine::unroll;
using affine::vi;

#if defined(__AVX512F__)
vi plus(vi a, vi b) { return {_mm512_add_epi32(a.v, b.v)}; }
#elif defined(__AVX2__)
vi plus(vi a, vi b) { return {_mm256_add_epi32(a.v, b.v)}; }
#else
vi plus(vi a, vi b) { return {a.v + b.v}; }
#endif

template <int Bits>
struct Form {
  static constexpr int kWords = words_of(Bits);
  // Chunks whose codes are spread together. 4 bits: 17 chunks are 136 steps of at most 15 * 8 * 2, below 2^15.
  static constexpr int kSegment = Bits == 4 ? 17 : 12;
  static_assert(kSegment * 8 * 15 * 8 * 2 < 1 << 15 || Bits == 8);

  template <int B, int I>
  HASTEN_INLINE static vi cut(const std::uint32_t* words) {
    static_assert(B == Bits);
    if constexpr (Bits == 4) {
      return vi::load(words + I / 2 * kBlock).template shift<I % 2 * 4>().template mask<0x0f0f0f0f>();
    } else if constexpr (kWords == 8) {
      return vi::load(words + I * kBlock);
    } else {
      const vi word = vi::load(words + I / 2 * kBlock);
      if constexpr (I % 2 == 0) return word.mask<0xff00ff>();
      else return word.shift_halves<8>();
    }
  }

#if defined(__AVX512F__)
  HASTEN_INLINE static vi add(vi sum, vi codes, vi x) { return {_mm512_dpbusd_epi32(sum.v, codes.v, x.v)}; }
  HASTEN_INLINE static vi whole(vi sum) { return sum; }
#elif defined(__AVX2__)
  // 4 bits: sums of 16 bits, halves of an output. 8 bits: sums of 32 bits.
  HASTEN_INLINE static vi add(vi sum, vi codes, vi x) {
    if constexpr (Bits == 4) return {_mm256_add_epi16(sum.v, _mm256_maddubs_epi16(codes.v, x.v))};
    else return affine::dot_pairs(sum, codes, x);
  }
  HASTEN_INLINE static vi whole(vi sum) {
    if constexpr (Bits == 4) return {_mm256_madd_epi16(sum.v, _mm256_set1_epi16(1))};
    else return sum;
  }
#else
  static vi add(vi sum, vi codes, vi x) {
    for (int i = 0; i < 32; i += 8)
      sum.v += (codes.v >> i & 0xffu) * static_cast<std::uint32_t>(static_cast<std::int8_t>(x.v >> i & 0xffu));
    return sum;
  }
  static vi whole(vi sum) { return sum; }
#endif
};

// total[R][16] += the products of `chunks` chunks.
template <int Bits, int R>
void tile(const std::uint32_t* codes, const std::int32_t* x, int chunks, std::uint32_t* total) {
  using F = Form<Bits>;
  for (int at = 0; at < kBlock; at += kV * vf::width) {
    const std::uint32_t* w = codes + at;
    const std::int32_t* row = x;
    vi acc[R][kV];
    unroll<R>([&]<int r>() HASTEN_INLINE { unroll<kV>([&]<int v>() HASTEN_INLINE { acc[r][v] = vi::zero(); }); });
    for (int c = 0; c < chunks; ++c, w += F::kWords * kBlock, row += kTall * F::kWords)
      unroll<F::kWords>([&]<int n>() HASTEN_INLINE {
        vi code[kV];
        unroll<kV>([&]<int v>() HASTEN_INLINE { code[v] = vi::load(w + n * kBlock + v * vf::width); });
        unroll<R>([&]<int r>() HASTEN_INLINE {
          const vi value = vi::set(row[r * F::kWords + n]);
          unroll<kV>([&]<int v>() HASTEN_INLINE {
            acc[r][v] = F::add(acc[r][v], code[v], value);
            affine::settle(acc[r][v]);
          });
        });
      });
    unroll<R>([&]<int r>() HASTEN_INLINE {
      unroll<kV>([&]<int v>() HASTEN_INLINE {
        std::uint32_t* to = total + r * kBlock + at + v * vf::width;
        plus(vi::load(to), F::whole(acc[r][v])).store(to);
      });
    });
  }
}

template <int Bits>
auto tile_of(int rows) {
  switch (rows) {
    case 1: return &tile<Bits, 1>;
    case 2: return &tile<Bits, 2>;
    case 3: return &tile<Bits, 3>;
    default: return &tile<Bits, 4>;
  }
}

template <int Bits>
void accumulate_bits(const Quik& q, const Rows& all, int block, int begin, int end, std::uint32_t* total) {
  using F = Form<Bits>;
  auto* codes = reinterpret_cast<std::uint32_t*>(scratch<2>(F::kSegment * F::kWords * kBlock));
  const std::uint32_t* words = q.base.block_words(block);
  const int segments = (all.chunks + F::kSegment - 1) / F::kSegment;
  for (int c = 0, i = 0, chunks; c < all.chunks; c += chunks, ++i, words += chunks * Bits * kBlock) {
    chunks = (all.chunks - c + segments - i - 1) / (segments - i);  // of about equal length
    affine::spread<F, Bits>(words, chunks, codes);
    for (int r = begin; r < end; r += kTall)
      tile_of<Bits>(std::min(kTall, end - r))(codes, all.word(r, c), chunks, total + (r - begin) * kBlock);
  }
}

// y += x_O W_O^T on top of what a weight-only product left there.
void add_outliers(const Quik& q, const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy) {
  float* outlier = scratch<3>(static_cast<std::size_t>(rows) * q.outliers);
  for (int r = 0; r < rows; ++r)
    for (int f = 0; f < q.outliers; ++f) outlier[static_cast<std::size_t>(r) * q.outliers + f] = x[r * ldx + q.outlier[f]];
  const int blocks = (q.outputs + kBlock - 1) / kBlock;
#pragma omp parallel for schedule(static) if (worth_threads(rows, q.outliers, q.outputs))
  for (int b = 0; b < blocks; ++b) {
    const int valid = std::min(kBlock, q.outputs - b * kBlock);
    float* out = y + b * kBlock;
    if (valid == kBlock) {
      dense::block(outlier, q.outliers, rows, q.outlier_block(b), q.outliers, out, ldy, out, ldy);
      continue;
    }
    float edge[kBlock] = {};
    for (int r = 0; r < rows; ++r, out += ldy) {
      std::memcpy(edge, out, valid * sizeof(float));
      dense::block(outlier + static_cast<std::size_t>(r) * q.outliers, q.outliers, 1, q.outlier_block(b), q.outliers, edge,
                   0, edge, kBlock);
      std::memcpy(out, edge, valid * sizeof(float));
    }
  }
}

}  // namespace

void accumulate(const Quik& q, const Rows& all, int block, int begin, int end, std::uint32_t* total) {
  for (int r = begin; r < end; ++r)
    std::fill_n(total + (r - begin) * kBlock, kBlock, static_cast<std::uint32_t>(-q.half() * all.sum[r]));
  if (q.bits == 4) accumulate_bits<4>(q, all, block, begin, end, total);
  else accumulate_bits<8>(q, all, block, begin, end, total);
}

void rescale(const Quik& q, const Rows& all, int block, int begin, int end, const std::uint32_t* total,
             const float* init, std::ptrdiff_t ldinit, float* y, std::ptrdiff_t ldy) {
  const float *scale = q.scale + block * kBlock, *wred = q.wred + block * kBlock, half = static_cast<float>(q.half());
  for (int r = begin; r < end; ++r, total += kBlock, init += ldinit, y += ldy) {
    const vf s = vf::set(all.scale[r]), shift = vf::set(all.zero[r] + half * all.scale[r]);
    for (int i = 0; i < kBlock; i += vf::width) {
      const vf start = fma(shift, vf::load(wred + i), vf::load(init + i));
      fma(vi::load(total + i).to_float(), s * vf::load(scale + i), start).store(y + i);
    }
  }
}

void multiply(const Quik& q, const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy) {
  const bool parallel = worth_threads(rows, q.inputs, q.outputs);
  const Rows all = quantize(q, x, ldx, rows, parallel);
  const int blocks = (q.outputs + kBlock - 1) / kBlock, tasks = blocks * ((rows + kRows - 1) / kRows);
#pragma omp parallel for schedule(static) if (parallel)
  for (int task = 0; task < tasks; ++task) {
    const int b = task % blocks, begin = task / blocks * kRows, count = std::min(kRows, rows - begin);
    const int valid = std::min(kBlock, q.outputs - b * kBlock);
    auto* total = reinterpret_cast<std::uint32_t*>(scratch<4>(2 * kRows * kBlock));
    float* edge = reinterpret_cast<float*>(total) + kRows * kBlock;
    float* out = y + begin * ldy + b * kBlock;
    const bool whole = valid == kBlock;
    float* to = whole ? out : edge;
    const std::ptrdiff_t ldto = whole ? ldy : kBlock;
    const float* bias = q.bias_block(b);
    if (q.outliers > 0)
      dense::block(all.outlier + static_cast<std::size_t>(begin) * q.outliers, q.outliers, count, q.outlier_block(b),
                   q.outliers, bias, 0, to, ldto);
    accumulate(q, all, b, begin, begin + count, total);
    rescale(q, all, b, begin, begin + count, total, q.outliers > 0 ? to : bias, q.outliers > 0 ? ldto : 0, to, ldto);
    if (!whole)
      for (int r = 0; r < count; ++r) std::memcpy(out + r * ldy, edge + r * kBlock, valid * sizeof(float));
  }
}

void Quik::forward(const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy) const {
  if (rows <= 0) return;
  if (base.width > 0 && rows >= min_rows) return multiply(*this, x, ldx, rows, y, ldy);
  if (base.width > 0) {
    base.forward(x, ldx, rows, y, ldy);
  } else {  // nothing is rounded
    for (int r = 0; r < rows; ++r)
      if (base.bias != nullptr) std::memcpy(y + r * ldy, base.bias, sizeof(float) * outputs);
      else std::fill_n(y + r * ldy, outputs, 0.0f);
  }
  if (outliers > 0) add_outliers(*this, x, ldx, rows, y, ldy);
}

const Quik& unwrap_quik(const nb::capsule& handle) {
  const auto* found = dynamic_cast<const Quik*>(&unwrap(handle));
  require(found != nullptr, "not a layer of this kind");
  return *found;
}

namespace {

// Addresses and sizes come from the Python face, which has checked them.
nb::capsule packed_quik(int inputs, int outputs, int bits, int width, int outliers, int min_rows, Address words,
                        Address scale, Address wred, Address base, Address outlier, Address outlier_weight, Address bias) {
  require(bits == 4 || bits == 8, "bits must be 4 or 8");
  auto q = std::make_unique<Quik>();
  q->inputs = inputs, q->outputs = outputs, q->bits = bits, q->outliers = outliers, q->min_rows = min_rows;
  q->scale = reinterpret_cast<const float*>(scale), q->wred = reinterpret_cast<const float*>(wred);
  q->outlier = reinterpret_cast<const std::int32_t*>(outlier);
  q->outlier_weight = reinterpret_cast<const std::uint16_t*>(outlier_weight);
  affine::Affine& a = q->base;
  a.inputs = inputs, a.outputs = outputs, a.bits = bits, a.width = width, a.groups = 1;
  a.chunks = (width + kChunk - 1) / kChunk, a.halves = 2 * a.chunks;
  a.words = reinterpret_cast<const std::uint32_t*>(words);
  a.scale_kind = affine::Kind::single, a.scale = q->scale;
  a.low_kind = affine::Kind::offset, a.offset = static_cast<float>(q->half());
  a.bias = reinterpret_cast<const float*>(bias);
  const auto* column = reinterpret_cast<const std::int32_t*>(base);
  if (outliers > 0) a.column = column;
  for (int i = 0; i < width; ++i)
    if (i > 0 && column[i] == column[i - 1] + 1) ++q->spans.back().count;
    else q->spans.push_back({column[i], i, 1});
  return wrap(std::move(q));
}

HASTEN_KERNELS(m) {
  m.def("packed_quik", &packed_quik);
  m.def("quik_quantizations", &quantizations);
}

}  // namespace
}  // namespace hasten::quik
