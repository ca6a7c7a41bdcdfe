// Late interaction on a GPU: parameters of the launch. Torch-free.
#pragma once

#include <cstdint>

#include "core/scalar.h"

namespace fastxattn {

// One side: its tokens and what is wanted of them.
struct TokenSide {
  const void* data;   // (tokens, d)
  const int32_t* cu;  // (sets + 1) where each set's tokens start
  int32_t sets;       // how many
  float* best_sum;    // (sets of a, sets of b) out: sum of the best matches of this side's tokens; null: not wanted
  int32_t* best;      // (tokens, sets of the other side) out: place of the best match in its set, -1: none; or null
};

// Block n * (sets of b) + m handles one pair of sets.
struct LateInteractionCuda {
  TokenSide a, b;
  int64_t d;     // elements of a row
  bool aligned;  // rows start at multiples of 16 bytes
};

// Up to this many tokens of a set of b, both directions come from one pass over the similarities.
inline constexpr int kMaxSimColumns = 1024;
inline constexpr int kMaxSimShared = 4 * 64 * 4 + 2 * kMaxSimColumns * 4;  // beside the stages of the product

// Launches on a stream; null, or what went wrong.
const char* maxsim_cuda(const LateInteractionCuda& p, DType dtype, void* stream);

}  // namespace fastxattn
