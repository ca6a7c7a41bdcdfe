// Late interaction on a GPU: parameters of the launches. Torch-free.
#pragma once

#include <cstdint>

#include "core/scalar.h"

namespace fastxattn {

// One side: its tokens and what is computed of them.
struct TokenSide {
  const void* data;   // (tokens, d)
  const int32_t* cu;  // (sets + 1) where each set's tokens start
  int32_t sets;       // how many
  int32_t tokens;     // rows of data; a set that claims more ends there
  float* best_sum;    // (sets of a, sets of b) out: sum of the best matches of this side's tokens; null: not requested
  void* best;         // (tokens, sets of the other side) out: int32 place of the best match in its set, -1: none; of a
                      // smooth maximum this itself in float32, -inf: none; null: not requested
};

// Block n * (sets of b) + m handles one pair of sets.
struct LateInteractionCuda {
  TokenSide a, b;
  int64_t d;     // elements of a row
  float smooth;  // temperature of the smooth maximum; 0: the maximum itself
  bool aligned;  // rows start at multiples of 16 bytes
};

// Up to this many tokens of a set of b, both directions come from one pass over the similarities.
inline constexpr int kMaxSimColumns = 1024;
inline constexpr int kMaxSimShared = 4 * 64 * 4 + 2 * kMaxSimColumns * 4;  // beside the stages of the product

// One side of the gradient.
struct TokenGradientSide {
  const void* data;    // (tokens, d)
  const int32_t* cu;   // (sets + 1) where each set's tokens start
  const int32_t* set;  // (tokens) the set of each token; `sets` or more: nobody's
  int32_t tokens;      // rows of data
  int32_t sets;        // how many
  const void* best;  // what forward kept of this side's tokens; of y's the transpose, (sets of x, tokens). Null: scores
                     // of this side's tokens have no gradient
  const float* grad;  // gradient of the scores of this side's tokens
  int64_t stride;     // elements from one of this side's sets to the next, in both sides' `grad`
};

struct LateInteractionGradientCuda {
  TokenGradientSide x, y;
  int64_t d;     // elements of a row
  bool aligned;  // rows start at multiples of 16 bytes
  // Maxima: block (tile of x's tokens and chunk of features, share of y).
  int32_t shares;  // of y's sets and tokens
  float* out;      // [shares][tokens of x][d] out: each share's part of the gradient of x
  // Smooth maxima: block (tile of x, tile of y) of a window of the matrix of pairs.
  float smooth;            // temperature
  int32_t first_x;         // where the window starts
  int32_t first_y;         // the same along y
  float* weights;          // [rows of the window][stride_weights] out: slope of each similarity
  int64_t stride_weights;  // elements from one row of weights to the next
};

// A warp of the gradient of maxima owns so many tokens and features.
inline constexpr int kGradientRows = 8, kGradientFeatures = 128, kGradientThreads = 256;
inline constexpr int kGradientTile = kGradientThreads / 32 * kGradientRows;  // tokens of a block
inline constexpr int kGradientShared = kGradientTile * kGradientFeatures * 4;

// Launches on a stream; null, or what went wrong. The weights cover a window of rows x columns.
const char* maxsim_cuda(const LateInteractionCuda& p, DType dtype, void* stream);
const char* maxsim_gradient_cuda(const LateInteractionGradientCuda& p, DType dtype, void* stream);
const char* smooth_weights_cuda(const LateInteractionGradientCuda& p, int64_t rows, int64_t columns, DType dtype,
                                void* stream);

}  // namespace fastxattn
