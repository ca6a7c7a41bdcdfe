// Parameters of late interaction: best matches between every token of one packed set and every other set.
#pragma once

#include <cstdint>

#include "core/scalar.h"

namespace fastxattn {

struct TokenSets {
  const void* data = nullptr;   // (tokens, d) features, contiguous
  const int32_t* cu = nullptr;  // (sets + 1) where each set's tokens start
  int64_t sets = 0;
  int64_t tokens = 0;
  const int32_t* group = nullptr;  // (groups + 1) first set of each group: sets that share a block of the product
  int64_t groups = 0;
  float* best_sum = nullptr;    // (N, M) sum over this side's tokens of their best match in each set of the other
  int32_t* best = nullptr;      // (tokens, other sets) place of the best match in its set; -1: an empty set
  const float* grad = nullptr;  // (N, M) gradient of best_sum (backward)
  float* grad_data = nullptr;   // (tokens, d) float32 gradient, zeroed by the caller; null: not requested
};

struct LateInteractionParams {
  TokenSets a, b;
  DType dtype = DType::f32;
  int64_t d = 0;
  bool from_a = false;  // best matches of a's tokens among b's (rows)
  bool from_b = false;  // best matches of b's tokens among a's (columns)
};

// Tokens of one block of the product; a set with more is a group of its own, walked block by block.
inline constexpr int64_t kTokenBlock = 256;

int64_t late_interaction_scratch(const LateInteractionParams& p);

struct Parallel;
// Fills best_sum (zeroed by the caller) and best of the requested directions.
void late_interaction_forward(const LateInteractionParams& p, char* scratch, const Parallel&);
// Fills grad_data of both sides from grad and best.
void late_interaction_backward(const LateInteractionParams& p, const Parallel&);

}  // namespace fastxattn
