// Few queries over raw features: every (query, head) pair is a row as wide as the features, and one tensor
// serves as key and as value of all heads.
//
//   s[r][k] = scale * query[r] . context[k] + key_bias[k]      for the keys k that row r sees
//   lse[r]  = log sum_k exp(s[r][k])
//   out[r]  = sum_k exp(s[r][k] - lse[r]) * context[k]
#pragma once

#include <cstdint>

#include "core/cpu/parallel.h"
#include "core/scalar.h"

namespace fastxattn {

inline constexpr int64_t kContextLanes = 64;  // rows of a panel: four vectors of 16
inline constexpr int64_t kContextKeys = 96;   // keys of a block: whole register tiles for 1 to 4 vectors of lanes
inline constexpr int64_t kContextSpan = 4 * kContextKeys;  // keys whose weights the backward pass keeps at a time

struct AbsorbedAttentionParams {
  DType dtype;                  // of query, context, out, grad_out, grad_query, grad_context
  int64_t batch;                // sequences
  int64_t rows_q;               // queries
  int64_t rows_k;               // context rows
  int64_t heads;                // heads per query
  int64_t width;                // features: the width of query and context rows
  float scale;                  // multiplies the products before the bias
  const void* query;            // (rows_q, heads, width); width is contiguous
  int64_t query_stride;         // elements from one query to the next
  int64_t head_stride;          // elements from one head to the next
  const void* context;          // (rows_k, width), contiguous
  const int32_t* cu_seqlens_q;  // (batch + 1): sequence b has queries [cu_q[b], cu_q[b + 1])
  const int32_t* cu_seqlens_k;  // (batch + 1): and context rows [cu_k[b], cu_k[b + 1])
  const int32_t* kv_range;      // (rows_q, 2) or null: the places [start, end) a query sees in its sequence
  const float* key_bias;        // (rows_k) or null
  void* out;                    // (rows_q, heads, width), contiguous
  float* lse;                   // (heads, rows_q); -inf where a query sees nothing
  float* softmax;               // (2, heads, rows_q): the largest score, and the sum of exp(score - largest); 0, 0
                                // where a query sees nothing. exp(s - lse) from a rounded lse would cost two bits.
};

struct AbsorbedAttentionGrads {
  const void* grad_out;   // (rows_q, heads, width), contiguous
  const float* grad_lse;  // (heads, rows_q) or null
  void* grad_query;       // (rows_q, heads, width), contiguous; null when not needed
  void* grad_context;     // (rows_k, width), contiguous; null when not needed
  float* grad_key_bias;   // (rows_k) or null
};

// Up to 64 (query, head) rows of one sequence, and the part of its keys that one task takes.
struct ContextPanel {
  int64_t row;         // first row, counted query * heads + head
  int64_t rows;        // 1 .. kContextLanes
  int64_t first_key;   // context row at which the sequence starts
  int64_t keys;        // its length
  int64_t begin, end;  // keys [begin, end) of the sequence, counted from its start, are this task's
  int64_t parts;       // tasks that share these rows; 1: this one writes the result
};

inline int64_t context_padded(int64_t width) { return (width + 15) / 16 * 16; }

// 4-byte words of scratch memory per worker.
inline int64_t context_forward_words(int64_t width) {
  const int64_t padded = context_padded(width);
  return padded * (kContextLanes * 2 + kContextKeys * 2) + 2 * kContextKeys * kContextLanes + 8 * kContextLanes;
}
inline int64_t context_backward_words(int64_t width) {
  const int64_t padded = context_padded(width);
  return padded * (kContextLanes * 2 + kContextKeys * 2) + 4 * kContextKeys * kContextLanes + 8 * kContextLanes;
}
// 4-byte words of a split panel's unfinished result: the sums, their maxima and their totals.
inline int64_t context_part_words(int64_t width) { return kContextLanes * (context_padded(width) + 2); }

// What the backward pass keeps of one panel for a span of keys: both weight matrices as [key][lane], of the
// compute type's elements, which of the span's key blocks hold anything, and the bias gradient by key.
struct ContextSpan {
  uint32_t* weights;  // [kContextSpan][lanes]: exp(s - lse)
  uint32_t* grad;     // [kContextSpan][lanes]: gradient of the products (scale included)
  float* bias;        // [kContextSpan] gradient of the key bias from this panel
  uint8_t* live;      // [kContextSpan / kContextKeys]
};

void absorbed_attention_forward(const AbsorbedAttentionParams& params, const Parallel& parallel);
void absorbed_attention_backward(const AbsorbedAttentionParams& params, const AbsorbedAttentionGrads& grads,
                                 const Parallel& parallel);

}  // namespace fastxattn
