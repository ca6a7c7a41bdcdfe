#include <memory>

#include "attention/attention.h"
#include "attention/attention_merge.h"
#include "attention/attention_plan.h"

namespace fastxattn {

FXA_CPU_KERNEL(size_t, attention_forward_scratch, (const AttentionParams&))
FXA_CPU_KERNEL(void, attention_forward_item,
               (const AttentionParams&, const ForwardItem&, float* workspace, void* scratch))
FXA_CPU_KERNEL(void, attention_merge, (const AttentionParams&, const ForwardMerge&, const float* workspace))
FXA_CPU_KERNEL(size_t, attention_backward_scratch, (const AttentionParams&, const BackwardItem*))
FXA_CPU_KERNEL(void, attention_sum_item,
               (const AttentionParams&, const AttentionGradients&, const BackwardItem&, float* workspace,
                void* scratch))
FXA_CPU_KERNEL(void, attention_backward_item,
               (const AttentionParams&, const AttentionGradients&, const BackwardItem&, float* workspace,
                void* scratch))
FXA_CPU_KERNEL(void, attention_bias_item,
               (const AttentionParams&, const AttentionGradients&, const BiasItem&, const int64_t* delta,
                const float* workspace, float* sums, void* scratch))

namespace {

// Uninitialised floats: every one is written before it is read.
std::unique_ptr<float[]> floats(int64_t n) { return std::unique_ptr<float[]>(n > 0 ? new float[n] : nullptr); }

}  // namespace

void attention_forward(const AttentionParams& p, const AttentionContent& content, const Parallel& parallel, Isa isa) {
  if (!content.every_query_row) {
    zero_bytes(p.out, p.rows_q * p.heads * p.value_dim * dtype_size(p.dtype));
    for (int64_t i = 0; i < p.rows_q * p.heads; ++i) write_lse(p, 0, i, -__builtin_inf());
  }
  const ForwardPlan plan = plan_forward(p);
  const auto run_item = attention_forward_item_for(isa);
  const size_t bytes = attention_forward_scratch_for(isa)(p);
  const auto workspace = floats(plan.workspace);
  for_each_task(parallel, static_cast<int64_t>(plan.tasks.size()), [&](int64_t task, int64_t) {
    void* scratch = thread_scratch(bytes);
    for (int64_t i = plan.tasks[task].begin; i < plan.tasks[task].end; ++i) {
      run_item(p, plan.items[i], workspace.get(), scratch);
    }
  });
  const auto merge = attention_merge_for(isa);
  for_each_task(parallel, static_cast<int64_t>(plan.merges.size()),
                [&](int64_t i, int64_t) { merge(p, plan.merges[i], workspace.get()); });
}

void attention_backward(const AttentionParams& p, const AttentionGradients& g, const AttentionContent& content,
                        const Parallel& parallel, Isa isa) {
  const BackwardPlan plan = plan_backward(p, g, content);
  const int64_t size = dtype_size(p.dtype);
  auto clear = [&](void* data, int64_t n, bool needed) {
    if (needed) zero_bytes(data, n * size);
  };
  clear(g.grad_query, p.rows_q * p.heads * p.head_dim, !content.every_query_row || plan.queries_left_out);
  clear(g.grad_key, p.rows_k * p.kv_heads * p.head_dim, !content.every_key_row || plan.keys_left_out);
  clear(g.grad_value, p.rows_k * p.kv_heads * p.value_dim, !content.every_key_row || plan.keys_left_out);

  const auto workspace = floats(plan.workspace);
  const auto bytes = attention_backward_scratch_for(isa);
  const auto run_items = [&](auto run_item, bool all) {
    for_each_task(parallel, static_cast<int64_t>(plan.tasks.size()), [&](int64_t task, int64_t) {
      for (int64_t i = plan.tasks[task].begin; i < plan.tasks[task].end; ++i) {
        const BackwardItem& item = plan.items[i];
        if (all || item.delta >= 0) run_item(p, g, item, workspace.get(), thread_scratch(bytes(p, &item)));
      }
    });
  };
  if (!plan.deltas.empty()) {
    run_items(attention_sum_item_for(isa), false);
    merge_deltas(plan, workspace.get());
  }
  if (g.grad_query || g.grad_key || g.grad_value || g.grad_key_bias) {
    run_items(attention_backward_item_for(isa), true);
    merge_backward(p, g, content, plan, workspace.get(), parallel);
  }
  if (g.grad_bias != nullptr) {
    const int64_t n = p.bias_size[0] * p.bias_size[1] * p.bias_size[2] * p.bias_size[3];
    // Sums are kept in float32; a narrower bias gets them rounded once at the end.
    const auto wide = floats(p.bias_dtype == DType::f32 ? 0 : n);
    float* sums = wide ? wide.get() : static_cast<float*>(g.grad_bias);
    zero_bytes(sums, n * 4);
    const std::vector<BiasItem> items = plan_bias(p);
    const auto run_item = attention_bias_item_for(isa);
    const size_t most = bytes(p, nullptr);
    for_each_task(parallel, static_cast<int64_t>(items.size()), [&](int64_t i, int64_t) {
      run_item(p, g, items[i], plan.delta.data(), workspace.get(), sums, thread_scratch(most));
    });
    if (wide) narrow(sums, g.grad_bias, p.bias_dtype, n);
  }
}

}  // namespace fastxattn
