// Co-attention on the CPU: two token sets read each other from one matrix of scores, which is computed once.
//
//   S = scale A B^T (capped)     out_a = softmax over b (S + bias_b) V_b     out_b = softmax over a (S^T + bias_a) V_a
#pragma once

#include <string>
#include <vector>

#include "core/cpu/isa.h"
#include "core/cpu/parallel.h"
#include "core/scalar.h"

namespace fastxattn {

// One of the two token sets.
struct CoAttentionSide {
  const void* query = nullptr;            // (rows, heads, head_dim), last axis contiguous
  const void* value = nullptr;            // (rows, heads, value_dim)
  int64_t query_row = 0, query_head = 0;  // strides of query
  int64_t value_row = 0, value_head = 0;  // strides of value
  int64_t rows = 0, value_dim = 0;        // value_dim in 1..256
  const int32_t* cu = nullptr;            // (batch + 1,) first row of each sequence
  const float* bias = nullptr;            // added where this side is read, by row; null: none
  int64_t bias_row = 0, bias_head = 0;    // its strides; head stride 0 when it has no head axis
  uint64_t seed = 0;                      // key of the dropout generator where this side reads

  void* out = nullptr;   // (rows, heads, value_dim of the other side) contiguous
  float* lse = nullptr;  // (heads, rows) log-sum-exp of what this side reads

  // Backward. `grad_out` and below are only looked at there; results are contiguous, null: not asked for.
  const void* grad_out = nullptr;               // the shape of out
  int64_t grad_out_row = 0, grad_out_head = 0;  // its strides
  void* grad_query = nullptr;                   // (rows, heads, head_dim)
  void* grad_value = nullptr;                   // (rows, heads, value_dim)
  float* grad_bias = nullptr;                   // (heads, rows): by head even when the bias is not
  // (heads, rows) each: delta = sum over what is read of P dP, and one over what the weights P = exp(S - lse) add up to
  // (1 but for the rounding of lse).
  float *delta = nullptr, *norm = nullptr;
};

struct CoAttentionParams {
  DType dtype = DType::f32;
  CoAttentionSide side[2];
  int64_t batch = 0, heads = 0, head_dim = 0;  // head_dim in 1..256
  float scale = 1.0f, softcap = 0.0f;          // softcap 0: off
  float dropout_p = 0.0f;                      // 0: off
};

// Rows of one side against all rows of the other, for one head. The longer side's rows are the vector lanes.
struct CoAttentionItem {
  int64_t sequence, head;
  int lane_side;                 // the other side is called the keys
  int64_t lane_begin, lane_end;  // within the sequence
  int64_t keys;                  // rows of the other side
  int64_t partial;               // where its sums by key lie in the workspace (floats), -1: it is alone and ends them
};

// The items of one sequence and head whose sums by key are to be added, in order.
struct CoAttentionMerge {
  CoAttentionItem first;
  int64_t pieces;
  int64_t stride;  // floats of workspace from one to the next
};

inline constexpr int64_t kCoAttentionLanes = 512;  // lanes of an item, whatever the number of threads

// What is wrong with the offsets, or an empty string.
std::string check_co_attention(const CoAttentionParams& p);

void co_attention_forward(const CoAttentionParams& p, const Parallel& parallel, Isa isa);
void co_attention_backward(const CoAttentionParams& p, const Parallel& parallel, Isa isa);

}  // namespace fastxattn
