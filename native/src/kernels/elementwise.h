// What lies between the products of a decoder layer: norms, gated activations, residual sums. Rows of float32.
#pragma once

#include <cstdint>

namespace hasten {

// y[r] = x[r] / sqrt(mean(x[r]^2) + eps) * weight; y may be x. ldx, ldy: floats from row to row.
void rms_norm(const float* x, std::int64_t ldx, std::int64_t rows, int size, const float* weight, float eps, float* y,
              std::int64_t ldy);
// gate[r][i] = activation(gate[r][i]) * gate[r][inner + i]; rows of 2 * inner floats.
void gated(float* gate_up, std::int64_t rows, int inner, bool gelu);
// y = a + b, `count` floats.
void add(const float* a, const float* b, std::int64_t count, float* y);

}  // namespace hasten
