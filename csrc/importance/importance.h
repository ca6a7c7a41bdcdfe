// Key importance on the CPU: how much attention every key slot receives, by head, without the attention map.
//
//   score[h][j] = sum_i weight[h][i] * exp(s_hij - lse[h][i])        over the queries i that see slot j
#pragma once

#include "attention/attention.h"

namespace fastxattn {

struct ImportanceParams {
  AttentionParams attention;                // the problem; value, out, bias and dropout are not used, `lse` stays null
  const float* lse = nullptr;               // (heads, rows_q) contiguous: the normaliser of each query row
  const float* row_weight = nullptr;        // weight of each query row, null: 1
  int64_t weight_head = 0, weight_row = 0;  // its strides; head stride 0 when heads share it
  float* score = nullptr;                   // (heads, slots_k) contiguous; slots out of use get 0
};

// Some heads' share of one run of keys; everything it adds to is its own.
struct ImportanceItem {
  int64_t sequence;
  int64_t head_begin, head_end;  // key/value heads
  int64_t key_begin, key_end;    // key slots of the sequence
  bool few;                      // few query rows: stream the keys instead of tiling
};

void key_importance(const ImportanceParams& p, const Parallel& parallel, Isa isa);

}  // namespace fastxattn
