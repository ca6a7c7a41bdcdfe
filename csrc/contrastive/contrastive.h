// Parameters of the contrastive kernels: statistics over an N x M similarity matrix that is never stored.
//
// The matrix is cut into square blocks. One call of a block function handles one block and writes only what
// belongs to its block of rows and its block of columns; the dispatcher runs blocks that share neither at the
// same time, phase by phase, so results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "core/scalar.h"

namespace fastxattn {

// Planes of running statistics, one float per row (or column) each.
enum StatePlane : int {
  kMaxNeg,
  kExpNeg,
  kMaxPos,
  kExpPos,
  kSumNeg,
  kSumPos,
  kCountNeg,
  kCountPos,
  kRank,
  kStatePlanes
};
// Planes of finished statistics: lse and mean of the negatives' logits, mean of the positives' and how far their
// lse lies above it, the counts, and how many negatives reach the positive.
enum StatPlane : int { kLseNeg, kMeanNeg, kMeanPos, kExcessPos, kNumNeg, kNumPos, kAhead, kStatPlanes };
inline constexpr int kGradPlanes = 4;  // the first four statistics carry a gradient

// One side of the matrix: rows are side a, columns are side b.
struct ContrastiveSide {
  const void* data = nullptr;       // (count, d) features, last stride 1
  int64_t count = 0;                // N or M
  int64_t stride = 0;               // elements from one feature row to the next
  int64_t block = 0;                // rows (columns) of a block
  bool active = false;              // whether statistics in this direction are requested
  const float* norm = nullptr;      // (count) factor of each logit, 1 / |x|; null: 1
  const int32_t* id = nullptr;      // (count) a pair is positive where both ids are equal; < 0: none
  const int32_t* skip = nullptr;    // (count) a pair that is not positive is ignored where both are equal; null: none
  const float* limit = nullptr;     // (count) negatives with a logit above it are ignored in this direction; null: none
  const float* rank_at = nullptr;   // (count) logit of the positive, to count the negatives that reach it; null: none
  float* state = nullptr;           // [kStatePlanes][count] running statistics (forward)
  const float* stats = nullptr;     // [kStatPlanes][count] finished statistics (backward)
  const float* grad = nullptr;      // [kGradPlanes][count] gradients of the first four statistics (backward)
  const float* weight = nullptr;    // (count) sigmoid loss: weight of each row's terms; null: 1
  const float* scale_of = nullptr;  // (count) coefficient beside which a gradient's rounding counts; null: 0
  float* grad_data = nullptr;       // [count][depth] gradient, float32, zeroed by the caller; null: not requested
  float* dot = nullptr;             // (count) sum of dz * logit / scale; rows only
};

struct ContrastiveParams {
  ContrastiveSide a, b;
  DType dtype = DType::f32;
  int64_t d = 0;      // features
  int64_t depth = 0;  // stride of grad_data: d rounded up to whole vectors of the widest set
  float scale = 1;    // logit = scale * norm_a * norm_b * <a, b> + bias
  float bias = 0;
  bool exclude_self = false;     // ignore pairs (i, i)
  bool means = false;            // also sums and counts of negatives, and ranks
  const float* exact = nullptr;  // (N) precise logit of each row's only positive; null: taken from the product
  float* loss = nullptr;         // (N) sigmoid loss: sum of the row's terms
  float* row_dz = nullptr;       // (N) sigmoid loss: sum of the row's dz, the gradient of the bias
};

inline constexpr int64_t kMaxBlock = 256;

// Bytes of scratch that one worker needs.
int64_t contrastive_scratch(const ContrastiveParams& p);

struct Parallel;
// Fills state of both sides (initialised here), then stats_out[kStatPlanes][count] of the active sides.
void contrastive_forward(const ContrastiveParams& p, float* row_stats, float* col_stats, char* scratch,
                         const Parallel&);
// Fills grad_data and dot.
void contrastive_backward(const ContrastiveParams& p, char* scratch, const Parallel&);
// Fills loss, and with gradients requested grad_data, dot and row_dz, in one pass.
void sigmoid_forward(const ContrastiveParams& p, char* scratch, const Parallel&);
// exact[i] = scale * norms * <a_i, b_target[i]> + bias summed in float64; 0 where target[i] < 0.
void positive_logits(const ContrastiveParams& p, const int32_t* target, float* exact, const Parallel&);
// The same logits as the block products round them, so that a rank can see exact ties.
void positive_logits_as_blocked(const ContrastiveParams& p, const int32_t* target, float* out, char* scratch,
                                const Parallel&);

}  // namespace fastxattn
