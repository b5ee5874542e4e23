// Bit planes and table look-up (T-MAN, arXiv 2511.11248): one copy of the weights, multiplied by looking sums of activations
// up in tables (few rows) and by looking weights up in tables before a dense product (many rows).
//
// Codes of B bits lie in blocks of 16 outputs and units of 16 inputs, [blocks][units][B][32 bytes]. Four neighbouring inputs
// are a quad; one bit of each of its four codes makes a nibble. Planes go in pairs, and an odd last one alone:
// - a pair is two vectors of 32 bytes; in vector v, byte 2 r + p is plane p of output r, quads 2 v (low nibble) and 2 v + 1;
// - a single plane is one vector; byte 16 v + r is output r, quads 2 v and 2 v + 1.
// So one multiply-add of bytes joins the planes of a pair with weights 1 and 2 and widens them.
#pragma once

#include "affine_codes.h"

namespace hasten::tman {

constexpr int kBlock = dense::kBlock;
constexpr int kUnit = 16;   // inputs
constexpr int kQuads = 4;   // of a unit
constexpr int kVector = 32;  // bytes
// Inputs that share the scale of their tables: sums of so many entries stay within 16 bits.
constexpr int kWideScale = 256, kNarrowScale = 64;

// Tables of some rows of activations. A quad's 16 entries are the sums of its +-x, by the nibble whose bits say plus. A unit has
// its quads in the order 0, 2, 1, 3: `high` bytes, and with 16 bit entries `low` bytes, [rows][units][64] each.
struct Tables {
  const std::uint8_t *low = nullptr, *high = nullptr;
  const float* scale = nullptr;  // [rows][scales]
  const float* sum = nullptr;    // of x, [rows][units]
  int units = 0, scales = 0;
};

// Columns that share group and table scale, in units.
struct Span { int first, last, group, scale; };

struct TMan final : Packed {
  affine::Affine grid;  // its codes are not here but in `planes`
  const std::uint8_t* planes = nullptr;
  bool wide = true;  // 16 bit tables, else 8
  std::vector<Span> spans;

  int units() const { return (grid.width + kUnit - 1) / kUnit; }
  const std::uint8_t* block_planes(int block) const {
    return planes + static_cast<std::size_t>(block) * units() * grid.bits * kVector;
  }
  // Units [first, first + count) of a block as float32 [16 count][16].
  void dequantize(int block, int first, int count, const float* scale, const float* low, float* to) const;
  void forward(const float* x, std::ptrdiff_t ldx, int rows, float* y, std::ptrdiff_t ldy) const override;
  bool row(int output, float* to) const override;
};

// Builds the tables of rows; they live until the calling thread builds others. `order`: whose columns they follow.
Tables build(const TMan& order, const float* x, std::ptrdiff_t ldx, int rows);
// Few rows, from their tables.
void lookup(const TMan& layer, const Tables& tables, int rows, float* y, std::ptrdiff_t ldy);
// Up to so many rows the tables are the faster way. Both ways grow by about as much per row, and dequantising begins with
// the cost of some ten rows; a lone plane costs as much as a pair.
inline int most_lookups(const TMan& layer) { return !layer.wide ? 24 : layer.grid.bits == 3 ? 8 : 12; }

}  // namespace hasten::tman
