// Temperature, top-k, top-p and min-p over rows of logits, and a draw from what they leave, without sorting a row.
//
// What they keep of a row is a cut: every token above some logit, and of those equal to it the first ones. Maxima of
// blocks of tokens say which blocks can hold a token above a threshold, so after one pass over the row only a few
// blocks are read again. Top-p sums masses in bins of logits and looks at the tokens of one bin. The draw is the
// Gumbel-max rule: the block's maximum bounds what a token's noise must reach to win, and that is a comparison of hashes;
// logarithms are taken of next to none. Masses are float64, so that order of summation and instruction set do not move
// the cut.
#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <limits>
#include <vector>

#include "hasten.h"

namespace hasten {
namespace {

constexpr std::int64_t kBlock = 64;
constexpr std::int64_t kWorthThreads = 1 << 15;
constexpr int kBins = 256, kCopies = 4;  // bins of logits for top-p; neighbours add to different copies
constexpr float kBinsPerNat = 8.0f;
constexpr float kNothing = -std::numeric_limits<float>::infinity();

// e^x for x in [-700, 0], to about 1e-15. Range reduction by log 2, Taylor polynomial of degree 12.
inline double exp_negative(double x) {
  constexpr double kShift = 0x1.8p52;  // adding it rounds to an integer, which then lies in the low bits
  const double shifted = x * 1.4426950408889634 + kShift;
  const double n = shifted - kShift;
  const double r = (x - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33;
  double p = 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  const std::uint64_t power = (std::bit_cast<std::uint64_t>(shifted) + 1023u) << 52;
  return p * std::bit_cast<double>(power);
}

struct Token {
  float logit;
  std::int32_t id;
  double mass;
};

// The order in which top-p counts: higher logits first, of equal ones the lower id.
inline bool precedes(const Token& a, const Token& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

// Kept are the logits above `least`, and those equal to it up to the id `last`.
struct Cut {
  float least = kNothing;
  std::int64_t last = std::numeric_limits<std::int64_t>::max();
  bool keeps(float logit, std::int64_t id) const { return logit > least || (logit == least && id <= last); }
};

// A row divided by its temperature, the maximum of every block of it, and room to work in.
struct Row {
  std::int64_t count = 0, blocks = 0;
  float top = kNothing;
  std::vector<float> logit, block_top, room;
  std::vector<Token> token;

  // False if the row holds NaN.
  bool read(const float* x, std::int64_t width, float temperature) {
    count = width;
    blocks = (width + kBlock - 1) / kBlock;
    top = kNothing;
    logit.resize(static_cast<std::size_t>(count));
    block_top.resize(static_cast<std::size_t>(blocks));
    float* y = logit.data();
    int bad = 0;
    for (std::int64_t b = 0; b < blocks; ++b) {
      const std::int64_t stop = std::min(count, (b + 1) * kBlock);
      float most = kNothing;
#pragma omp simd reduction(max : most) reduction(| : bad)
      for (std::int64_t i = b * kBlock; i < stop; ++i) {
        const float v = x[i] / temperature;
        bad |= v != v;
        y[i] = v < FLT_MAX ? v : FLT_MAX;  // a quotient that overflows is as large as a number can be
        most = most > y[i] ? most : y[i];
      }
      block_top[static_cast<std::size_t>(b)] = most;
      top = std::max(top, most);
    }
    return bad == 0;
  }

  float gap(float v) const { return std::max(v - top, -700.0f); }
  static int bin(float gap) { return static_cast<int>(std::min(gap * -kBinsPerNat, kBins - 1.0f)); }

  // The mass of each bin of logits; bin 0 holds the highest. (One loop per vectorisable step.)
  void masses(double (&sum)[kBins]) const {
    double copies[kCopies][kBins] = {};
    float gaps[kBlock];
    int bins[kBlock];
    double mass[kBlock];
    for (std::int64_t first = 0; first < count; first += kBlock) {
      const std::int64_t size = std::min(kBlock, count - first);
      const float* y = logit.data() + first;
#pragma omp simd
      for (std::int64_t i = 0; i < size; ++i) {
        const float d = y[i] - top;
        gaps[i] = d > -700.0f ? d : -700.0f;
        const float at = gaps[i] * -kBinsPerNat;
        bins[i] = static_cast<int>(at < kBins - 1.0f ? at : kBins - 1.0f);
      }
#pragma omp simd
      for (std::int64_t i = 0; i < size; ++i) mass[i] = exp_negative(static_cast<double>(gaps[i]));
      for (std::int64_t i = 0; i < size; ++i) copies[i % kCopies][bins[i]] += mass[i];
    }
    for (int i = 0; i < kBins; ++i) sum[i] = (copies[0][i] + copies[1][i]) + (copies[2][i] + copies[3][i]);
  }

  // Calls f(id) for every logit of at least `least`, in order of ids.
  template <typename F>
  void from(float least, F f) const {
    for (std::int64_t b = 0; b < blocks; ++b) {
      if (block_top[static_cast<std::size_t>(b)] < least) continue;
      const std::int64_t stop = std::min(count, (b + 1) * kBlock);
      for (std::int64_t i = b * kBlock; i < stop; ++i)
        if (logit[static_cast<std::size_t>(i)] >= least) f(i);
    }
  }

  void put(std::int64_t i) {
    const float v = logit[static_cast<std::size_t>(i)];
    token.push_back({v, static_cast<std::int32_t>(i), exp_negative(static_cast<double>(gap(v)))});
  }

  // The k-th largest logit, k < count. The k-th largest of the blocks' maxima cannot lie above it.
  float kth_largest(std::int64_t k) {
    if (k < blocks) {
      room.assign(block_top.begin(), block_top.end());
      std::nth_element(room.begin(), room.begin() + (k - 1), room.end(), std::greater<float>());
      const float least = room[static_cast<std::size_t>(k - 1)];
      room.clear();
      from(least, [&](std::int64_t i) { room.push_back(logit[static_cast<std::size_t>(i)]); });
    } else {
      room.assign(logit.begin(), logit.end());
    }
    std::nth_element(room.begin(), room.begin() + (k - 1), room.end(), std::greater<float>());
    return room[static_cast<std::size_t>(k - 1)];
  }

  // Where the mass of `token`, counted in its order, reaches `wanted`: quickselect by mass.
  Cut reach(double wanted) {
    auto low = token.begin(), high = token.end();
    double before = 0.0;
    while (high - low > 32) {
      const auto middle = low + (high - low) / 2, end = high - 1;
      // Median of three to the end, as the pivot.
      if (precedes(*middle, *low)) std::swap(*middle, *low);
      if (precedes(*end, *low)) std::swap(*end, *low);
      if (precedes(*middle, *end)) std::swap(*middle, *end);
      const Token pivot = *end;
      const auto cut = std::partition(low, end, [&](const Token& t) { return precedes(t, pivot); });
      std::swap(*cut, *end);
      double sum = 0.0;
      for (auto t = low; t != cut; ++t) sum += t->mass;
      if (before + sum >= wanted) {
        high = cut;
        continue;
      }
      before += sum;
      if (before + pivot.mass >= wanted) return {pivot.logit, pivot.id};
      before += pivot.mass;
      low = cut + 1;
    }
    std::sort(low, high, precedes);
    for (; low != high; ++low) {
      before += low->mass;
      if (before >= wanted) return {low->logit, low->id};
    }
    const Token& least = *std::max_element(token.begin(), token.end(), precedes);  // short by rounding: keep all
    return {least.logit, least.id};
  }

  // The fewest most probable tokens of all that hold `top_p` of the mass.
  Cut nucleus(double top_p) {
    double sum[kBins], total = 0.0, before = 0.0;
    masses(sum);
    for (double part : sum) total += part;
    const double wanted = top_p * total;
    int last = 0;
    while (last < kBins - 1 && before + sum[last] < wanted) before += sum[last++];
    token.clear();
    for (std::int64_t b = 0; b < blocks; ++b) {
      if (bin(gap(block_top[static_cast<std::size_t>(b)])) > last) continue;
      const std::int64_t stop = std::min(count, (b + 1) * kBlock);
      std::int64_t found[kBlock];
      int size = 0;
      for (std::int64_t i = b * kBlock; i < stop; ++i) {
        found[size] = i;
        size += bin(gap(logit[static_cast<std::size_t>(i)])) == last;
      }
      for (int i = 0; i < size; ++i) put(found[i]);
    }
    return reach(wanted - before);
  }

  // The same of those that top-k kept.
  Cut nucleus_of(const Cut& kept, double top_p) {
    token.clear();
    from(kept.least, [&](std::int64_t i) { put(i); });
    double total = 0.0;
    for (const Token& t : token) total += t.mass;
    return reach(top_p * total);
  }

  Cut cut(std::int64_t top_k, double top_p, float log_min_p) {
    Cut kept;
    const bool few = top_k > 0 && top_k < count;
    if (few) kept.least = kth_largest(top_k);
    if (top_p < 1.0) kept = few ? nucleus_of(kept, top_p) : nucleus(top_p);
    const float least = top + log_min_p;
    if (least > kept.least) kept = Cut{least};
    return kept;
  }
};

// SplitMix64's finaliser (Steele et al. 2014) of stream + id * golden ratio: 53 random bits.
inline std::uint64_t noise_bits(std::uint64_t stream, std::uint64_t id) {
  std::uint64_t z = stream + id * 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return (z ^ (z >> 31)) >> 11;
}

inline double gumbel(std::uint64_t bits) {
  return -std::log(-std::log((static_cast<double>(bits) + 0.5) * 0x1p-53));
}

// The kept token with the highest sum of logit and noise; of equal sums the lowest id.
std::int64_t draw(const Row& row, const Cut& kept, std::uint64_t stream) {
  std::int64_t token = 0;
  double best = -std::numeric_limits<double>::infinity();
  std::uint64_t bits[kBlock];
  for (std::int64_t b = 0; b < row.blocks; ++b) {
    const float most = row.block_top[static_cast<std::size_t>(b)];
    if (most < kept.least || most == kNothing) continue;
    // To win, noise g > best - most is needed; with u = exp(-exp(-g)) that implies 1 - u < exp(most - best).
    const double gap = static_cast<double>(most) - best;
    const double chance = gap < -700.0 ? 0x1p-50 : gap < 0.0 ? exp_negative(gap) * 1.0001 + 0x1p-50 : 1.0;
    const std::uint64_t enough = chance < 1.0 ? static_cast<std::uint64_t>((1.0 - chance) * 0x1p53) : 0;
    const std::int64_t first = b * kBlock, size = std::min(kBlock, row.count - first);
    for (std::int64_t i = 0; i < size; ++i) bits[i] = noise_bits(stream, static_cast<std::uint64_t>(first + i));
    for (std::int64_t i = 0; i < size; ++i) {
      if (bits[i] < enough) continue;
      const float v = row.logit[static_cast<std::size_t>(first + i)];
      if (!kept.keeps(v, first + i)) continue;
      const double score = static_cast<double>(v) + gumbel(bits[i]);
      if (score > best) {
        best = score;
        token = first + i;
      }
    }
  }
  return token;
}

void erase(const Row& row, const Cut& kept, float* x) {
  for (std::int64_t i = 0; i < row.count; ++i)
    x[i] = kept.keeps(row.logit[static_cast<std::size_t>(i)], i) ? x[i] : kNothing;
}

// Runs f(row number, row) over all rows, read and divided; the number of a row with NaN or without tokens, or -1.
template <typename F>
std::int64_t over_rows(const float* x, std::int64_t rows, std::int64_t width, const float* temperature, F f) {
  std::int64_t bad = -1;
#pragma omp parallel for schedule(dynamic) reduction(max : bad) if (rows > 1 && rows * width > kWorthThreads)
  for (std::int64_t r = 0; r < rows; ++r) {
    thread_local Row row;
    if (row.read(x + r * width, width, temperature == nullptr ? 1.0f : temperature[r]) && row.top > kNothing)
      f(r, row);
    else
      bad = r;
  }
  return bad;
}

HASTEN_KERNELS(m) {
  m.def("truncate", [](std::uintptr_t logits, std::int64_t rows, std::int64_t width, std::uintptr_t top_k,
                       std::uintptr_t top_p, std::uintptr_t log_min_p) {
    float* x = reinterpret_cast<float*>(logits);
    const auto* k = reinterpret_cast<const std::int64_t*>(top_k);
    const auto* p = reinterpret_cast<const double*>(top_p);
    const auto* low = reinterpret_cast<const float*>(log_min_p);
    nb::gil_scoped_release release;
    return over_rows(x, rows, width, nullptr,
                     [&](std::int64_t r, Row& row) { erase(row, row.cut(k[r], p[r], low[r]), x + r * width); });
  });
  m.def("sample", [](std::uintptr_t logits, std::int64_t rows, std::int64_t width, std::uintptr_t temperature,
                     std::uintptr_t top_k, std::uintptr_t top_p, std::uintptr_t log_min_p, std::uintptr_t stream,
                     std::uintptr_t token) {
    const auto* k = reinterpret_cast<const std::int64_t*>(top_k);
    const auto* p = reinterpret_cast<const double*>(top_p);
    const auto* low = reinterpret_cast<const float*>(log_min_p);
    const auto* bits = reinterpret_cast<const std::uint64_t*>(stream);
    auto* out = reinterpret_cast<std::int64_t*>(token);
    nb::gil_scoped_release release;
    return over_rows(reinterpret_cast<const float*>(logits), rows, width,
                     reinterpret_cast<const float*>(temperature),
                     [&](std::int64_t r, Row& row) { out[r] = draw(row, row.cut(k[r], p[r], low[r]), bits[r]); });
  });
}

}  // namespace
}  // namespace hasten
