// Sums of the partial gradients that several items leave in the workspace, in a fixed order.
#pragma once

#include "attention/attention_plan.h"

namespace fastxattn {

// Sums every sequence's delta and total over its key chunks, in the first chunk's place: delta / total and 1 / total.
void merge_deltas(const BackwardPlan& plan, float* workspace);

void merge_backward(const AttentionParams& p, const AttentionGradients& g, const AttentionContent& content,
                    const BackwardPlan& plan, const float* workspace, const Parallel& parallel);

// n floats rounded to a narrower type.
void narrow(const float* from, void* to, DType dtype, int64_t n);

}  // namespace fastxattn
