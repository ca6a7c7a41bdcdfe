#include "attention/attention_merge.h"

#include <cstring>
#include <memory>

namespace fastxattn {
namespace {

void store_row(const float* row, void* to, int64_t at, int64_t n, DType dtype) {
  switch (dtype) {
    case DType::bf16:
      for (int64_t c = 0; c < n; ++c) static_cast<bf16_t*>(to)[at + c] = from_f32<bf16_t>(row[c]);
      break;
    case DType::f16:
      for (int64_t c = 0; c < n; ++c) static_cast<f16_t*>(to)[at + c] = from_f32<f16_t>(row[c]);
      break;
    default: std::memcpy(static_cast<float*>(to) + at, row, static_cast<size_t>(n) * sizeof(float));
  }
}

void sum_parts(const float* part, int64_t stride, int64_t parts, int64_t n, float* sum) {
  for (int64_t c = 0; c < n; ++c) {
    float x = part[c];
    for (int64_t i = 1; i < parts; ++i) x += part[i * stride + c];
    sum[c] = x;
  }
}

void merge_queries(const AttentionParams& p, const AttentionGradients& g, const BackwardMerge& m, int64_t kv_head,
                   const float* workspace) {
  const Sequence s = sequence_of(p, m.sequence);
  const int64_t group = p.group(), lanes = s.queries * group;
  float row[256];
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const float* part = workspace + m.query_partial + (kv_head * lanes + lane) * p.head_dim;
    sum_parts(part, m.query_stride, m.key_chunks, p.head_dim, row);
    const int64_t r = query_row_of(p, s.first_q + lane / group) * p.heads + kv_head * group + lane % group;
    store_row(row, g.grad_query, r * p.head_dim, p.head_dim, p.dtype);
  }
}

void merge_keys(const AttentionParams& p, const AttentionGradients& g, const BackwardMerge& m, int64_t kv_head,
                const float* workspace) {
  const Sequence s = sequence_of(p, m.sequence);
  const int64_t width = p.head_dim + p.value_dim;
  float row[512];
  for (int64_t j = 0; j < s.keys; ++j) {
    const float* part = workspace + m.key_partial + (kv_head * s.keys + j) * width;
    sum_parts(part, m.key_stride, m.query_chunks, width, row);
    const int64_t r = key_row_of(p, s.first_k + j) * p.kv_heads + kv_head;
    if (g.grad_key) store_row(row, g.grad_key, r * p.head_dim, p.head_dim, p.dtype);
    if (g.grad_value) store_row(row + p.head_dim, g.grad_value, r * p.value_dim, p.value_dim, p.dtype);
  }
}

// Several slots stand for one key row: rows gather their slots' gradients in slot order, in float32.
void merge_repeated_keys(const AttentionParams& p, const AttentionGradients& g, const BackwardPlan& plan,
                         int64_t kv_head, const float* workspace) {
  const int64_t width = p.head_dim + p.value_dim;
  const std::unique_ptr<float[]> sums(new float[static_cast<size_t>(p.rows_k * width)]());
  float row[512];
  for (const BackwardMerge& m : plan.merges) {
    const Sequence s = sequence_of(p, m.sequence);
    for (int64_t j = 0; j < s.keys; ++j) {
      const float* part = workspace + m.key_partial + (kv_head * s.keys + j) * width;
      sum_parts(part, m.key_stride, m.query_chunks, width, row);
      float* sum = sums.get() + key_row_of(p, s.first_k + j) * width;
      for (int64_t c = 0; c < width; ++c) sum[c] += row[c];
    }
  }
  for (int64_t r = 0; r < p.rows_k; ++r) {
    const int64_t at = r * p.kv_heads + kv_head;
    const float* sum = sums.get() + r * width;
    if (g.grad_key) store_row(sum, g.grad_key, at * p.head_dim, p.head_dim, p.dtype);
    if (g.grad_value) store_row(sum + p.head_dim, g.grad_value, at * p.value_dim, p.value_dim, p.dtype);
  }
}

void merge_key_bias(const AttentionParams& p, const AttentionGradients& g, const BackwardPlan& plan,
                    const float* workspace) {
  const int64_t parts_per_slot = g.key_bias_has_heads ? p.heads : p.kv_heads;
  const int64_t heads = g.key_bias_has_heads ? p.heads : 1;
  zero_bytes(g.grad_key_bias, p.rows_k * heads * 4);
  for (const BackwardMerge& m : plan.merges) {
    const Sequence s = sequence_of(p, m.sequence);
    for (int64_t j = 0; j < s.keys; ++j) {
      float* to = g.grad_key_bias + key_row_of(p, s.first_k + j) * heads;
      for (int64_t i = 0; i < m.query_chunks; ++i) {
        const float* part = workspace + m.key_bias_partial + i * m.key_bias_stride + j;
        for (int64_t h = 0; h < parts_per_slot; ++h) to[heads > 1 ? h : 0] += part[h * s.keys];
      }
    }
  }
}

}  // namespace

void narrow(const float* from, void* to, DType dtype, int64_t n) { store_row(from, to, 0, n, dtype); }

void merge_deltas(const BackwardPlan& plan, float* workspace) {
  for (const DeltaMerge& m : plan.deltas) {
    float* delta = workspace + m.at;
    float* total = delta + m.lanes;
    sum_parts(delta, m.stride, m.chunks, 2 * m.lanes, delta);
    for (int64_t i = 0; i < m.lanes; ++i) {
      total[i] = inverse_total(total[i]);
      delta[i] *= total[i];
    }
  }
}

void merge_backward(const AttentionParams& p, const AttentionGradients& g, const AttentionContent& content,
                    const BackwardPlan& plan, const float* workspace, const Parallel& parallel) {
  const int64_t sequences = static_cast<int64_t>(plan.merges.size());
  if (sequences == 0) {
    if (g.grad_key_bias) merge_key_bias(p, g, plan, workspace);
    return;
  }
  const bool repeated = content.repeated_keys && (g.grad_key || g.grad_value);
  if (repeated) {
    for_each_task(parallel, p.kv_heads,
                  [&](int64_t head, int64_t) { merge_repeated_keys(p, g, plan, head, workspace); });
  }
  for_each_task(parallel, sequences * p.kv_heads, [&](int64_t task, int64_t) {
    const BackwardMerge& m = plan.merges[task / p.kv_heads];
    if (m.query_partial >= 0) merge_queries(p, g, m, task % p.kv_heads, workspace);
    if (m.key_partial >= 0 && !repeated) merge_keys(p, g, m, task % p.kv_heads, workspace);
  });
  if (g.grad_key_bias) merge_key_bias(p, g, plan, workspace);
}

}  // namespace fastxattn
