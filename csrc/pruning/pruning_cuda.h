// Token pruning on a GPU: parameters of the launches. Torch-free; the parameters of pruning.h, plus what a grid needs.
#pragma once

#include "pruning/pruning.h"

namespace fastxattn::pruning {

// Segmented top-k, compaction and gather in one launch: block (b, s) selects among sequence b's tokens, and gathers the
// s-th share of the rows that it keeps; blocks (batch, s) fill what belongs to no sequence.
struct SelectCuda {
  SelectParams select;
  const void* x;      // (total, row_bytes) rows to gather; null: none
  void* gathered;     // (capacity, row_bytes) out, zero beyond the kept rows; null: none
  int32_t batch;      // sequences
  int32_t total;      // tokens that have a score
  int32_t capacity;   // places in keep_index
  int64_t row_bytes;  // of x and gathered, a multiple of 2
  bool aligned;       // rows are whole, aligned pieces of 16 bytes
};

// Bipartite match: block (b, i) handles 64-row tiles i, i + grid.y, ... of A of sequence b.
struct MatchCuda {
  MatchParams match;
  const float* inverse_norm;  // (rows of x) 1 / length; 0 of a zero row, NaN of one that is not finite
  int32_t rows;               // of x, which indices are clamped to
  int32_t rows_a;             // elements of a_index, which cu_a is clamped to
  int32_t rows_b;             // elements of b_index, which cu_b is clamped to
  bool aligned;               // rows of x start at multiples of 16 bytes
};

// out[a] = sum of coefficient[i] * x[i] over the members i of row a, in order: block (a, c) sums 256 * 4 columns.
struct MergeCuda {
  const void* x;             // (total, channels)
  const int64_t* members;    // (total) rows of x, ordered by the row they go to; those that go nowhere first
  const int64_t* first;      // (rows + 1) where each row's members begin
  const float* coefficient;  // (total) or null for 1
  void* out;                 // (rows, channels)
  int64_t channels;          // elements of a row
  int64_t total;             // rows of x, which members and first are clamped to
};

inline constexpr int kSelectThreads = 256;
inline constexpr int kCachedKeys = 8192;  // tokens of a sequence whose keys stay in shared memory
inline constexpr int kSelectShared = kCachedKeys * 4 + 256 * 4 + 64 * 4 + kSelectThreads * 4;
inline constexpr int kMergeThreads = 256;
inline constexpr int kMergeColumns = kMergeThreads * 4;

// Launch on a stream; null, or what went wrong. `shares`: blocks that divide a sequence's gather, or its tiles.
const char* select_cuda(const SelectCuda& p, int shares, void* stream);
const char* match_cuda(const MatchCuda& p, int shares, void* stream);
const char* merge_cuda(const MergeCuda& p, int64_t rows, DType dtype, void* stream);

}  // namespace fastxattn::pruning
