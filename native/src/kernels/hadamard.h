// Encoding heads as two-bit Hadamard codes; see hadamard.cpp, and adamas.cpp for their layout.
#pragma once

#include <cstdint>

namespace hasten::hadamard {

constexpr int kMaxSize = 1024;

// Tokens whose codes lie transposed: the largest of 32, 16 and 1 that divides the page size.
int block_width(int page_size);
// Codes of one head; byte j (coordinates 4j..4j+3, two bits each) goes to code[j * stride].
void encode_head(const float* x, int size, float cut, std::uint8_t* code, std::int64_t stride);
// Keys [kv_heads][size] of rows `stride` floats apart into the sidecar [pages][kv_heads][page_size][size / 4].
void append(const float* k, std::int64_t stride, float cut, std::uint8_t* codes, const std::int64_t* slot, int rows,
            int kv_heads, int size, int page_size);

}  // namespace hasten::hadamard
