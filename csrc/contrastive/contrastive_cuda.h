// Contrastive losses on a GPU: parameters of the launches. Torch-free.
//
// A kernel sees side x along the rows of the similarity matrix and side y along its columns; statistics of the other
// direction are the same launch with the sides exchanged.
#pragma once

#include <cstdint>

#include "core/scalar.h"

namespace fastxattn {

// Running statistics of a share of the columns: maximum and sum of exponentials of the negatives' logits, their sum,
// their number, how many reach the positive; the same four of the positives.
enum ContrastiveStatePlane : int {
  kStateTop,
  kStateExp,
  kStateSum,
  kStateCount,
  kStateAhead,
  kStateTopPos,
  kStateExpPos,
  kStateSumPos,
  kStateCountPos,
  kContrastiveStatePlanes
};

// What a direction's statistics say of the slope of its logits: lse, d lse, d mean / number of the negatives; lse,
// 1 / number, d mean, d excess of the positives.
enum ContrastiveSlopePlane : int {
  kSlopeLse,
  kSlopeGrad,
  kSlopeMean,
  kSlopeLsePos,
  kSlopeSharePos,
  kSlopeMeanPos,
  kSlopeExcessPos,
  kContrastiveSlopePlanes
};

struct ContrastiveCudaSide {
  const void* data;     // (rows, d) features
  int64_t stride;       // elements from one row to the next
  int32_t rows;         // how many
  const float* norm;    // (rows) factor of each logit; null: 1
  const int32_t* id;    // (rows) a pair is positive where both ids are equal
  const int32_t* skip;  // (rows) a pair that is not positive is ignored where both are equal; null: none is
  const float* limit;   // (rows) negatives with a logit above it are ignored in this direction; null: none are
  const float* slopes;  // [kContrastiveSlopePlanes][rows]; null: this direction has no gradient
};

struct ContrastiveCuda {
  ContrastiveCudaSide x, y;
  int64_t d;           // features
  const float* scale;  // (1) logit = scale * norm_x * norm_y * <x, y> + bias
  const float* bias;   // (1) or null for 0
  const float* exact;  // precise logit of each row's (exact_by_row) or column's only positive; null: the product's
  bool exact_by_row;   // whether `exact` belongs to side x
  bool exclude_self;   // ignore pairs (i, i)
  bool means;          // also sums, numbers and ranks of the negatives
  bool aligned;        // rows start at multiples of 16 bytes
  // Statistics: block (tile of x, split) walks its share of y.
  const float* rank;  // (rows of x) count negatives that reach this logit; null: none
  int32_t splits;     // shares of y
  float* state;       // [splits][kContrastiveStatePlanes][rows of x] out
  // Positives: block (tile of x).
  const int32_t* target;  // (rows of x) the row of y whose logit is computed
  float* logits;          // (rows of x) out: these logits, rounded as the statistics round them
  // Slopes and the sigmoid loss: block (tile of x, tile of y) of a window of the matrix.
  int32_t first_x, first_y;  // where the window starts, multiples of 64
  const float* weight;       // (rows of x) factor of each row's slopes in the sigmoid loss; null: 1
  float* dz;                 // [rows of the window][stride_dz] out: slope of each product; null: not requested
  int64_t stride_dz;         // elements from one row of dz to the next
  float* sums;               // [1 or 3][column tiles][stride_sums] out, of each row: slope * logit / scale; in the
                             // sigmoid loss the losses, the same, and the slopes
  int64_t stride_sums;       // elements from one column tile of sums to the next
};

// Launch on a stream; null, or what went wrong. Slopes cover a window of rows x columns.
const char* contrastive_stats_cuda(const ContrastiveCuda& p, DType dtype, void* stream);
const char* contrastive_positives_cuda(const ContrastiveCuda& p, DType dtype, void* stream);
const char* contrastive_slopes_cuda(const ContrastiveCuda& p, int64_t rows, int64_t columns, DType dtype, void* stream);
const char* sigmoid_cuda(const ContrastiveCuda& p, int64_t rows, int64_t columns, DType dtype, void* stream);

}  // namespace fastxattn
