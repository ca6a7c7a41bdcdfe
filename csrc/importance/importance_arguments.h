// Reads the arguments of key importance for every framework, by the rules of attention.
#pragma once

#include "attention/attention_arguments.h"
#include "attention/attention_check.h"
#include "importance/importance.h"

namespace fastxattn {

// Checks everything, contents included; throws BadArgument. `a.value` is the key; `row_weight` may be absent.
inline ImportanceParams read_importance(const AttentionArguments& a, const View& lse, const View& row_weight) {
  ImportanceParams p;
  p.attention = read_attention(a);
  const int64_t heads = p.attention.heads, rows = p.attention.rows_q;
  require(lse.type == ElementType::f32, "lse must be float32; got ", lse.type);
  lse.expect({heads, rows}, "(heads, query tokens)");
  require(lse.contiguous(), "lse must be contiguous");
  p.lse = lse.as<float>();
  if (row_weight) {
    require(row_weight.type == ElementType::f32, "row_weight must be float32; got ", row_weight.type);
    const int last = row_weight.rank - 1;
    require((last == 0 || (last == 1 && row_weight.size[0] == heads)) && row_weight.size[last] == rows,
            "row_weight must have shape (query tokens,) or (heads, query tokens); got ", row_weight);
    p.row_weight = row_weight.as<float>();
    p.weight_row = row_weight.stride[last];
    p.weight_head = last == 1 ? row_weight.stride[0] : 0;
  }
  check_attention_content(p.attention);
  check_attention_ranges(p.attention);
  return p;
}

}  // namespace fastxattn
