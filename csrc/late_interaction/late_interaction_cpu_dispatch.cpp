// Schedules groups of sets over threads: every (set, set) score belongs to exactly one task.
#include <algorithm>

#include "core/cpu/isa.h"
#include "core/cpu/parallel.h"
#include "late_interaction/late_interaction.h"

namespace fastxattn {

FXA_CPU_KERNEL(void, late_interaction_block, (const LateInteractionParams&, int64_t, int64_t, char*))
FXA_CPU_KERNEL(void, late_interaction_gradient, (const LateInteractionParams&, bool, int64_t, int64_t))

int64_t late_interaction_scratch(const LateInteractionParams& p) {
  const int64_t depth = (p.d + 31) / 32 * 32;
  const int64_t floats = 3 * kTokenBlock * depth + kTokenBlock * kTokenBlock + 2 * kTokenBlock + 2 * p.b.tokens + 64;
  return (floats * 4 + 4095) / 4096 * 4096;
}

void late_interaction_forward(const LateInteractionParams& p, char* scratch, const Parallel& parallel) {
  const auto block = late_interaction_block_for(active_isa());
  const int64_t bytes = late_interaction_scratch(p);
  for_each_task(parallel, p.a.groups * p.b.groups, [&](int64_t task, int64_t worker) {
    block(p, task / p.b.groups, task % p.b.groups, scratch + worker * bytes);
  });
}

void late_interaction_backward(const LateInteractionParams& p, const Parallel& parallel) {
  const auto gradient = late_interaction_gradient_for(active_isa());
  for (const bool is_a : {true, false}) {
    const TokenSets& side = is_a ? p.a : p.b;
    if (side.grad_data == nullptr) continue;
    // A few sets at a time, so that the other side's rows serve all of them while they are in cache.
    constexpr int64_t kSets = 4;
    for_each_task(parallel, (side.sets + kSets - 1) / kSets, [&](int64_t task, int64_t) {
      gradient(p, is_a, task * kSets, std::min(side.sets, (task + 1) * kSets));
    });
  }
}

}  // namespace fastxattn
