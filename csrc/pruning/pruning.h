// Token pruning on packed rows: parameters of every kernel. Torch-free.
//
// `cu_*` are (batch + 1) offsets that start at 0 and never decrease; callers check them. Rows are dense: row r of a
// matrix with `channels` columns starts at element r * channels.
#pragma once

#include <cstdint>

#include "core/cpu/parallel.h"
#include "core/scalar.h"

namespace fastxattn::pruning {

// The best tokens of each sequence: protected first, then numbers before NaN, higher score, lower index.
struct SelectParams {
  const float* scores;              // (cu[batch])
  const int32_t* cu;                // (batch + 1) offsets of the tokens
  const int32_t* cu_keep;           // (batch + 1) offsets of the kept tokens; never more of a sequence than it has
  const uint8_t* protected_tokens;  // (cu[batch]) nonzero: outranks every other token; null: none are
  int32_t* keep_index;              // (cu_keep[batch]) out: kept rows, ascending in each sequence
  int32_t* assignment;              // (cu[batch]) out: the kept row's place in keep_index, else -1
};

// out[j] = coefficient[j] * x[index[j]], zero where index[j] is -1.
struct GatherParams {
  const void* x;             // rows of the source
  const int32_t* index;      // (rows) in [-1, rows of x)
  const float* coefficient;  // (rows) or null for 1
  void* out;                 // (rows, channels)
  int64_t rows;              // of the result
  int64_t channels;          // elements of a row
  DType dtype;               // of x and out
};

// out[a] = sum of coefficient[i] * x[i] over the i with assignment[i] == a, in ascending i.
struct MergeParams {
  const void* x;              // (total, channels)
  const int32_t* assignment;  // (total) in [-1, rows)
  const float* coefficient;   // (total) or null for 1
  void* out;                  // (rows, channels)
  int64_t total;              // rows of x
  int64_t rows;               // rows of out
  int64_t channels;           // elements of a row
  DType dtype;                // of x and out
};

// For each row of A the most similar (cosine) row of B of the same sequence; ties go to the first in B.
struct MatchParams {
  const void* x;           // (rows of x, channels)
  const int32_t* a_index;  // (cu_a[batch]) rows of x
  const int32_t* cu_a;     // (batch + 1)
  const int32_t* b_index;  // (cu_b[batch]) rows of x
  const int32_t* cu_b;     // (batch + 1)
  int64_t batch;           // sequences
  int64_t channels;        // elements of a row
  DType dtype;             // of x
  int32_t* best;           // (cu_a[batch]) out: a row of x, -1 when the sequence has no B
  float* similarity;       // (cu_a[batch]) out
};

enum class GreedyMode : int32_t { max_min = 0, determinant = 1 };

// The order in which a greedy search picks rows: score -t for the pick of step t, -inf for the rest.
struct GreedyParams {
  const void* x;                    // (cu[batch], channels)
  const float* quality;             // (cu[batch]) or null for 1; only the determinant reads it
  const int32_t* cu;                // (batch + 1)
  const int32_t* counts;            // (batch) picks of each sequence; clipped to [0, length]
  const uint8_t* protected_tokens;  // (cu[batch]) picked first, in order; null: none are
  int64_t batch;                    // sequences
  int64_t channels;                 // elements of a row
  DType dtype;                      // of x
  int64_t max_count;                // no sequence gets more picks
  GreedyMode mode;                  // what a pick maximises
  float* scores;                    // (cu[batch]) out
};

// Linearly interpolated quantiles of each sequence's scores, NaN left out; NaN for a sequence without numbers.
struct QuantileParams {
  const float* scores;  // (cu[batch])
  const int32_t* cu;    // (batch + 1)
  const double* q;      // (quantiles) in [0, 1]
  int64_t batch;        // sequences
  int64_t quantiles;    // how many
  float* out;           // (batch, quantiles)
};

// Columns of a packed panel of rows: a multiple of every instruction set's column tile.
inline constexpr int64_t kPanel = 64;
inline constexpr int64_t panels(int64_t rows) { return (rows + kPanel - 1) / kPanel; }

// Up to this many tokens a sequence's whole similarity matrix is kept (64 MiB); beyond, rows are recomputed.
inline constexpr int64_t kStoredGram = 4096;

// Scratch of one greedy search over n tokens, `padded` = panels(n) * 64.
struct GreedyScratch {
  float* panel_memory;  // (padded / 64, channels, 64)
  float* gram;          // (padded, padded) when n <= kStoredGram, else one strip (64, padded)
  float* value;         // (padded) what the next pick maximises; NaN once picked, -inf when not finite
  float* row;           // (padded) similarities or kernel entries of the latest pick
  float* factors;       // (picks, padded) rows of the Cholesky factor; the determinant only
  uint8_t* finite;      // (padded)
};

// How many tokens a greedy search takes of sequence b.
inline int64_t picks_of(const GreedyParams& p, int64_t b) {
  const int64_t n = p.cu[b + 1] - p.cu[b];
  const int64_t most = n < p.max_count ? n : p.max_count;
  return p.counts[b] < 0 ? 0 : (p.counts[b] < most ? p.counts[b] : most);
}

void select(const SelectParams& p, int64_t batch, const Parallel& parallel);
void gather(const GatherParams& p, const Parallel& parallel);
void merge(const MergeParams& p, const Parallel& parallel);
void match(const MatchParams& p, const Parallel& parallel);
void greedy(const GreedyParams& p, const Parallel& parallel);
void quantile(const QuantileParams& p, const Parallel& parallel);

}  // namespace fastxattn::pruning
