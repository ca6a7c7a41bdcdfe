#include <cstring>
#include <memory>

#include "attention/attention.h"
#include "attention/attention_plan.h"

FXA_DECLARE(size_t, attention_forward_scratch, (const fastxattn::AttentionParams&))
FXA_DECLARE(void, attention_forward_item,
            (const fastxattn::AttentionParams&, const fastxattn::ForwardItem&, float* workspace, void* scratch))
FXA_DECLARE(void, attention_merge,
            (const fastxattn::AttentionParams&, const fastxattn::ForwardMerge&, const float* workspace))

namespace fastxattn {
namespace {

auto select_forward_scratch(Isa isa) -> size_t (*)(const AttentionParams&) {
  FXA_SELECT(isa, attention_forward_scratch)
}
auto select_forward_item(Isa isa) -> void (*)(const AttentionParams&, const ForwardItem&, float*, void*) {
  FXA_SELECT(isa, attention_forward_item)
}
auto select_merge(Isa isa) -> void (*)(const AttentionParams&, const ForwardMerge&, const float*) {
  FXA_SELECT(isa, attention_merge)
}

// Uninitialised floats: every one is written before it is read.
std::unique_ptr<float[]> floats(int64_t n) { return std::unique_ptr<float[]>(n > 0 ? new float[n] : nullptr); }

}  // namespace

void attention_forward(const AttentionParams& p, const AttentionContent& content, const Parallel& parallel, Isa isa) {
  if (!content.every_query_row) {
    std::memset(p.out, 0, static_cast<size_t>(p.rows_q * p.heads * p.value_dim * dtype_size(p.dtype)));
    for (int64_t i = 0; i < p.rows_q * p.heads; ++i) p.lse[i] = -__builtin_inff();
  }
  const ForwardPlan plan = plan_forward(p);
  const auto run_item = select_forward_item(isa);
  const size_t bytes = select_forward_scratch(isa)(p);
  const auto workspace = floats(plan.workspace);
  for_each_task(parallel, static_cast<int64_t>(plan.tasks.size()), [&](int64_t task, int64_t) {
    void* scratch = thread_scratch(bytes);
    for (int64_t i = plan.tasks[task].begin; i < plan.tasks[task].end; ++i) {
      run_item(p, plan.items[i], workspace.get(), scratch);
    }
  });
  const auto merge = select_merge(isa);
  for_each_task(parallel, static_cast<int64_t>(plan.merges.size()),
                [&](int64_t i, int64_t) { merge(p, plan.merges[i], workspace.get()); });
}

}  // namespace fastxattn
