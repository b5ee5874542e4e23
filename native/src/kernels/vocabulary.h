// Passes over a row of logits, for other kernels; see vocabulary.cpp.
#pragma once

#include <cstdint>

namespace hasten {

// The lowest index of the highest logit; -1 if one of them is NaN or infinite.
std::int64_t best_token(const float* logits, std::int64_t count);

}  // namespace hasten
