// Sums of the partial gradients that several items leave in the workspace, in a fixed order.
#pragma once

#include "attention/attention_plan.h"

namespace fastxattn {

// Sums every sequence's delta over its key chunks and divides it by the weights' sum, in the first chunk's place.
void merge_deltas(const BackwardPlan& plan, float* workspace);

void merge_backward(const AttentionParams& p, const AttentionGradients& g, const AttentionContent& content,
                    const BackwardPlan& plan, const float* workspace, const Parallel& parallel);

// n floats rounded to a narrower type.
void narrow(const float* from, void* to, DType dtype, int64_t n);

}  // namespace fastxattn
