#include <memory>

#include "attention/attention.h"
#include "attention/attention_merge.h"
#include "attention/attention_plan.h"

FXA_DECLARE(size_t, attention_forward_scratch, (const fastxattn::AttentionParams&))
FXA_DECLARE(void, attention_forward_item,
            (const fastxattn::AttentionParams&, const fastxattn::ForwardItem&, float* workspace, void* scratch))
FXA_DECLARE(void, attention_merge,
            (const fastxattn::AttentionParams&, const fastxattn::ForwardMerge&, const float* workspace))
FXA_DECLARE(size_t, attention_backward_scratch, (const fastxattn::AttentionParams&, const fastxattn::BackwardItem*))
FXA_DECLARE(void, attention_sum_item,
            (const fastxattn::AttentionParams&, const fastxattn::AttentionGradients&, const fastxattn::BackwardItem&,
             float* workspace, void* scratch))
FXA_DECLARE(void, attention_backward_item,
            (const fastxattn::AttentionParams&, const fastxattn::AttentionGradients&, const fastxattn::BackwardItem&,
             float* workspace, void* scratch))
FXA_DECLARE(void, attention_bias_item,
            (const fastxattn::AttentionParams&, const fastxattn::AttentionGradients&, const fastxattn::BiasItem&,
             const int64_t* delta, const float* workspace, float* sums, void* scratch))

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

using ScratchSize = size_t (*)(const AttentionParams&, const BackwardItem*);
using ItemKernel = void (*)(const AttentionParams&, const AttentionGradients&, const BackwardItem&, float*, void*);
using BiasKernel = void (*)(const AttentionParams&, const AttentionGradients&, const BiasItem&, const int64_t*,
                            const float*, float*, void*);

auto select_backward_scratch(Isa isa) -> ScratchSize { FXA_SELECT(isa, attention_backward_scratch) }
auto select_sum_item(Isa isa) -> ItemKernel { FXA_SELECT(isa, attention_sum_item) }
auto select_backward_item(Isa isa) -> ItemKernel { FXA_SELECT(isa, attention_backward_item) }
auto select_bias_item(Isa isa) -> BiasKernel{FXA_SELECT(isa, attention_bias_item)}

// Uninitialised floats: every one is written before it is read.
std::unique_ptr<float[]> floats(int64_t n) {
  return std::unique_ptr<float[]>(n > 0 ? new float[n] : nullptr);
}

}  // namespace

void attention_forward(const AttentionParams& p, const AttentionContent& content, const Parallel& parallel, Isa isa) {
  if (!content.every_query_row) {
    zero_bytes(p.out, p.rows_q * p.heads * p.value_dim * dtype_size(p.dtype));
    for (int64_t i = 0; i < p.rows_q * p.heads; ++i) write_lse(p, 0, i, -__builtin_inf());
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

void attention_backward(const AttentionParams& p, const AttentionGradients& g, const AttentionContent& content,
                        const Parallel& parallel, Isa isa) {
  const BackwardPlan plan = plan_backward(p, g, content);
  const int64_t size = dtype_size(p.dtype);
  auto clear = [&](void* data, int64_t n, bool wanted) {
    if (wanted) zero_bytes(data, n * size);
  };
  clear(g.grad_query, p.rows_q * p.heads * p.head_dim, !content.every_query_row || plan.queries_left_out);
  clear(g.grad_key, p.rows_k * p.kv_heads * p.head_dim, !content.every_key_row || plan.keys_left_out);
  clear(g.grad_value, p.rows_k * p.kv_heads * p.value_dim, !content.every_key_row || plan.keys_left_out);

  const auto workspace = floats(plan.workspace);
  const auto bytes = select_backward_scratch(isa);
  const auto run_items = [&](ItemKernel run_item, bool all) {
    for_each_task(parallel, static_cast<int64_t>(plan.tasks.size()), [&](int64_t task, int64_t) {
      for (int64_t i = plan.tasks[task].begin; i < plan.tasks[task].end; ++i) {
        const BackwardItem& item = plan.items[i];
        if (all || item.delta >= 0) run_item(p, g, item, workspace.get(), thread_scratch(bytes(p, &item)));
      }
    });
  };
  if (!plan.deltas.empty()) {
    run_items(select_sum_item(isa), false);
    merge_deltas(plan, workspace.get());
  }
  if (g.grad_query || g.grad_key || g.grad_value || g.grad_key_bias) {
    run_items(select_backward_item(isa), true);
    merge_backward(p, g, content, plan, workspace.get(), parallel);
  }
  if (g.grad_bias != nullptr) {
    const int64_t n = p.bias_size[0] * p.bias_size[1] * p.bias_size[2] * p.bias_size[3];
    // Sums are kept in float32; a narrower bias gets them rounded once at the end.
    const auto wide = floats(p.bias_dtype == DType::f32 ? 0 : n);
    float* sums = wide ? wide.get() : static_cast<float*>(g.grad_bias);
    zero_bytes(sums, n * 4);
    const std::vector<BiasItem> items = plan_bias(p);
    const auto run_item = select_bias_item(isa);
    const size_t most = bytes(p, nullptr);
    for_each_task(parallel, static_cast<int64_t>(items.size()), [&](int64_t i, int64_t) {
      run_item(p, g, items[i], plan.delta.data(), workspace.get(), sums, thread_scratch(most));
    });
    if (wide) narrow(sums, g.grad_bias, p.bias_dtype, n);
  }
}

}  // namespace fastxattn
