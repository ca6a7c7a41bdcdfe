// Variable-length cross-attention on the CPU: the problem as plain pointers, and the two entry points.
//
// A sequence's tokens are *slots*, numbered from 0 within the sequence; slot s of sequence b stands for row
// index[cu[b] + s], or for row cu[b] + s without an index. Strides count elements; the last axis is contiguous.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/cpu/parallel.h"
#include "core/scalar.h"

namespace fastxattn {

struct AttentionParams {
  DType dtype = DType::f32;               // of query, key, value, out and their gradients
  const void* query = nullptr;            // (rows_q, heads, head_dim)
  const void* key = nullptr;              // (rows_k, kv_heads, head_dim)
  const void* value = nullptr;            // (rows_k, kv_heads, value_dim)
  int64_t query_row = 0, query_head = 0;  // strides of query
  int64_t key_row = 0, key_head = 0;      // strides of key
  int64_t value_row = 0, value_head = 0;  // strides of value
  int64_t rows_q = 0, rows_k = 0;         // rows of query; rows of key and value
  int64_t batch = 0;                      // sequences
  int64_t heads = 0, kv_heads = 0;        // kv_heads divides heads
  int64_t head_dim = 0, value_dim = 0;    // each in 1..256

  const int32_t* cu_q = nullptr;     // (batch + 1,) first query slot of each sequence
  const int32_t* cu_k = nullptr;     // (batch + 1,) first key slot of each sequence
  const int32_t* used_q = nullptr;   // (batch,) query slots in use, null: all
  const int32_t* used_k = nullptr;   // (batch,) key slots in use, null: all
  const int32_t* index_q = nullptr;  // (slots,) row of each query slot, null: the slot itself
  const int32_t* index_k = nullptr;  // (slots,) row of each key slot, null: the slot itself
  int64_t slots_q = 0, slots_k = 0;  // length of the index, or rows without one

  const int32_t* kv_range = nullptr;            // (rows_q, 2) visible key slots [start, end) by query row, null: all
  const float* key_bias = nullptr;              // added to the scaled, capped score by key row, null: none
  int64_t key_bias_row = 0, key_bias_head = 0;  // its strides; head stride 0 when it has no head axis
  const void* bias = nullptr;                   // added to the score of (sequence, head, query, key), null: none
  DType bias_dtype = DType::f32;                // element type of bias and of its gradient
  int64_t bias_stride[4] = {0, 0, 0, 0};        // 0 along axes that broadcast
  int64_t bias_size[4] = {1, 1, 1, 1};          // its shape

  float scale = 1.0f;      // multiplies query . key
  float softcap = 0.0f;    // score becomes softcap * tanh(score / softcap); 0: off
  float dropout_p = 0.0f;  // probability of dropping a weight; 0: off
  uint64_t seed = 0;       // key of the dropout generator

  void* out = nullptr;  // (rows_q, heads, value_dim) contiguous
  // Log-sum-exp, (heads, rows_q) contiguous; either may be null. Backward reads the exact one: weights recomputed from
  // an lse rounded to float32 would all be off by the rounding, a relative 2e-7 at an lse of 4 to 8.
  float* lse = nullptr;
  double* lse_exact = nullptr;

  int64_t group() const { return heads / kv_heads; }
};

struct AttentionGradients {
  const void* grad_out = nullptr;               // (rows_q, heads, value_dim)
  int64_t grad_out_row = 0, grad_out_head = 0;  // its strides
  const float* grad_lse = nullptr;              // (heads, rows_q), null: zero
  int64_t grad_lse_head = 0, grad_lse_row = 0;  // its strides
  // Results, contiguous; null: not asked for.
  void* grad_query = nullptr;      // (rows_q, heads, head_dim)
  void* grad_key = nullptr;        // (rows_k, kv_heads, head_dim)
  void* grad_value = nullptr;      // (rows_k, kv_heads, value_dim)
  float* grad_key_bias = nullptr;  // (rows_k,) or (rows_k, heads)
  bool key_bias_has_heads = false;
  void* grad_bias = nullptr;  // the shape of bias

  // Whether some result hangs on the gradient of the scores.
  bool needs_scores() const { return grad_query || grad_key || grad_key_bias || grad_bias; }
};

// What a walk over offsets and indices found.
struct AttentionContent {
  bool every_query_row = false;  // each query row belongs to exactly one slot in use
  bool every_key_row = false;    // the same for key rows
  bool repeated_keys = false;    // several slots stand for one key row
};

// One sequence's slots.
struct Sequence {
  int64_t first_q, queries;  // first query slot and how many are in use
  int64_t first_k, keys;
};

inline Sequence sequence_of(const AttentionParams& p, int64_t b) {
  Sequence s;
  s.first_q = p.cu_q[b];
  s.first_k = p.cu_k[b];
  s.queries = p.used_q ? p.used_q[b] : p.cu_q[b + 1] - s.first_q;
  s.keys = p.used_k ? p.used_k[b] : p.cu_k[b + 1] - s.first_k;
  return s;
}
inline int64_t query_row_of(const AttentionParams& p, int64_t slot) { return p.index_q ? p.index_q[slot] : slot; }
inline int64_t key_row_of(const AttentionParams& p, int64_t slot) { return p.index_k ? p.index_k[slot] : slot; }

inline void write_lse(const AttentionParams& p, int64_t head, int64_t row, double lse) {
  if (p.lse != nullptr) p.lse[head * p.rows_q + row] = static_cast<float>(lse);
  if (p.lse_exact != nullptr) p.lse_exact[head * p.rows_q + row] = lse;
}

// Computes out and lse. `content` comes from check_attention_content, which must have accepted `p`.
void attention_forward(const AttentionParams& p, const AttentionContent& content, const Parallel& parallel, Isa isa);

// Computes the gradients asked for; p.out and p.lse_exact hold the forward's results.
void attention_backward(const AttentionParams& p, const AttentionGradients& g, const AttentionContent& content,
                        const Parallel& parallel, Isa isa);

}  // namespace fastxattn
