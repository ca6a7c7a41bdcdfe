// torch operators of the contrastive kernels. Schemas live in fastxattn/ops/contrastive/schema.py.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

#include "bindings/torch_glue.h"
#include "contrastive/contrastive.h"

namespace fastxattn {
namespace {

void check_features(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2, "fastxattn: ", name, " must be 2-D");
  STD_TORCH_CHECK(t.size(1) <= 1 || t.stride(1) == 1, "fastxattn: ", name, " must have stride 1 along features");
}

void check_vector(const OptionalTensor& t, const char* name, int64_t count, ScalarType type) {
  if (!t.has_value()) return;
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == count && t->is_contiguous() && t->scalar_type() == type,
                  "fastxattn: ", name, " must be a contiguous vector of the right length and type");
}

void check_planes(const Tensor& t, const char* name, int64_t planes, int64_t count) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == planes && t.size(1) == count && t.is_contiguous() &&
                      t.scalar_type() == ScalarType::Float,
                  "fastxattn: ", name, " must be contiguous float32 of shape (planes, rows)");
}

float one_float(const OptionalTensor& t, const char* name, float missing) {
  if (!t.has_value()) return missing;
  STD_TORCH_CHECK(t->numel() == 1 && t->scalar_type() == ScalarType::Float, "fastxattn: ", name,
                  " must be one float32 on the cpu");
  return *static_cast<const float*>(t->const_data_ptr());
}

// Small batches get several blocks to share between threads, but not blocks so small that packing them shows.
int64_t block_of(int64_t count) {
  const int64_t quarter = (count + 3) / 4;
  return std::clamp<int64_t>((quarter + 63) / 64 * 64, kMaxBlock / 2, kMaxBlock);
}

Tensor floats(std::initializer_list<int64_t> shape, bool zero) {
  Tensor t = empty_cpu(shape, ScalarType::Float);
  if (zero) std::fill_n(static_cast<float*>(t.mutable_data_ptr()), t.numel(), 0.0f);
  return t;
}

float* data(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// The arguments every operator takes, checked as far as memory safety needs.
struct Problem {
  const Tensor &a, &b;
  const Tensor& scale;
  const OptionalTensor& bias;
  const OptionalTensor &norm_a, &norm_b;
  const OptionalTensor &id_a, &id_b, &skip_a, &skip_b, &exact;
  bool exclude_self;

  ContrastiveParams params() const {
    check_features(a, "a");
    check_features(b, "b");
    STD_TORCH_CHECK(a.size(1) == b.size(1) && a.scalar_type() == b.scalar_type(),
                    "fastxattn: a and b must agree in features and dtype");
    ContrastiveParams p;
    p.dtype = dtype_of(a, "a");
    p.d = a.size(1);
    p.depth = (p.d + 31) / 32 * 32;
    p.scale = one_float(scale, "scale", 1.0f);
    p.bias = one_float(bias, "bias", 0.0f);
    p.exclude_self = exclude_self;
    fill(p.a, a, norm_a, id_a, skip_a);
    fill(p.b, b, norm_b, id_b, skip_b);
    check_vector(exact, "exact", p.a.count, ScalarType::Float);
    p.exact = data_or_null<float>(exact);
    STD_TORCH_CHECK((p.a.skip == nullptr) == (p.b.skip == nullptr), "fastxattn: skip needs both sides");
    return p;
  }

  static void fill(ContrastiveSide& side, const Tensor& x, const OptionalTensor& norm, const OptionalTensor& id,
                   const OptionalTensor& skip) {
    side.data = x.const_data_ptr();
    side.count = x.size(0);
    side.stride = x.size(0) > 1 ? x.stride(0) : x.size(1);
    side.block = block_of(side.count);
    check_vector(norm, "norm", side.count, ScalarType::Float);
    check_vector(id, "id", side.count, ScalarType::Int);
    check_vector(skip, "skip", side.count, ScalarType::Int);
    side.norm = data_or_null<float>(norm);
    side.id = data_or_null<int32_t>(id);
    side.skip = data_or_null<int32_t>(skip);
  }
};

struct Scratch {
  std::vector<char> memory;
  char* aligned;
  Scratch(const ContrastiveParams& p, const Parallel& parallel)
      : memory(static_cast<size_t>(contrastive_scratch(p) * parallel.workers + 64)),
        aligned(reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64)) {}
};

template <class T>
void finish_rows(const ContrastiveSide& side, int64_t d, int64_t depth, T* out, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    float* grad = side.grad_data + i * depth;
    const T* x = static_cast<const T*>(side.data) + i * side.stride;
    if (side.norm) {  // through x / |x|: what lies along x has no effect
      double along = 0;
      for (int64_t k = 0; k < d; ++k) along += static_cast<double>(grad[k]) * to_f32(x[k]);
      const float factor = static_cast<float>(along * side.norm[i] * side.norm[i]);
      for (int64_t k = 0; k < d; ++k) grad[k] -= factor * to_f32(x[k]);
    }
    if (out) {
      for (int64_t k = 0; k < d; ++k) out[i * d + k] = from_f32<T>(grad[k]);
    }
  }
}

// The accumulated gradient in the features' dtype, or as float32 when `keep_float`.
Tensor finish_gradient(const ContrastiveParams& p, const ContrastiveSide& side, const Tensor& like, const Tensor& sums,
                       bool keep_float, const Parallel& parallel) {
  if (side.count == 0) {
    return keep_float ? floats({0, p.d}, false) : empty_cpu({0, p.d}, like.scalar_type());
  }
  if (side.grad_data == nullptr) return floats({0}, false);
  constexpr int64_t kChunk = 64;
  const auto each = [&](auto type, void* out) {
    using T = decltype(type);
    for_each_task(parallel, (side.count + kChunk - 1) / kChunk, [&](int64_t task, int64_t) {
      finish_rows<T>(side, p.d, p.depth, static_cast<T*>(out), task * kChunk,
                     std::min(side.count, (task + 1) * kChunk));
    });
  };
  const bool in_place = p.depth == p.d && (keep_float || p.dtype == DType::f32);
  Tensor out = in_place     ? sums
               : keep_float ? floats({side.count, p.d}, false)
                            : empty_cpu({side.count, p.d}, like.scalar_type());
  void* to = in_place || keep_float ? nullptr : out.mutable_data_ptr();
  switch (p.dtype) {
    case DType::bf16: each(bf16_t{}, to); break;
    case DType::f16: each(f16_t{}, to); break;
    default: each(float{}, to);
  }
  if (keep_float && !in_place) {
    for (int64_t i = 0; i < side.count; ++i) {
      std::memcpy(data(out) + i * p.d, side.grad_data + i * p.depth, static_cast<size_t>(p.d) * sizeof(float));
    }
  }
  return out;
}

#define FXA_PROBLEM                                                                                                \
  const Tensor &a, const Tensor &b, const Tensor &scale, const OptionalTensor &bias, const OptionalTensor &norm_a, \
      const OptionalTensor &norm_b, const OptionalTensor &id_a, const OptionalTensor &id_b,                        \
      const OptionalTensor &skip_a, const OptionalTensor &skip_b, const OptionalTensor &exact, bool exclude_self
#define FXA_FORWARD_PROBLEM a, b, scale, bias, norm_a, norm_b, id_a, id_b, skip_a, skip_b, exact, exclude_self

Tensor positive_logits_cpu(FXA_PROBLEM, bool blocked) {
  const ContrastiveParams p = Problem{FXA_FORWARD_PROBLEM}.params();
  STD_TORCH_CHECK(p.a.id != nullptr, "fastxattn: positive logits need targets in id_a");
  for (int64_t i = 0; i < p.a.count; ++i) {
    STD_TORCH_CHECK(p.a.id[i] < p.b.count, "fastxattn: a target is out of range");
  }
  Tensor out = floats({p.a.count}, false);
  const Parallel parallel = torch_parallel();
  if (!blocked) {
    positive_logits(p, p.a.id, data(out), parallel);
    return out;
  }
  ContrastiveParams q = p;
  if (!q.b.id) q.b.id = q.a.id;  // ids play no part in a plain product; any readable ones do
  Scratch scratch(q, parallel);
  positive_logits_as_blocked(q, p.a.id, data(out), scratch.aligned, parallel);
  return out;
}

void set_limits(ContrastiveParams& p, const OptionalTensor& limit_row, const OptionalTensor& limit_col, bool rows,
                bool columns) {
  STD_TORCH_CHECK((p.a.id || p.a.count == 0) && (p.b.id || p.b.count == 0), "fastxattn: ids are missing");
  check_vector(limit_row, "limit_row", p.a.count, ScalarType::Float);
  check_vector(limit_col, "limit_col", p.b.count, ScalarType::Float);
  p.a.limit = data_or_null<float>(limit_row);
  p.b.limit = data_or_null<float>(limit_col);
  p.a.active = rows;
  p.b.active = columns;
}

std::tuple<Tensor, Tensor> contrastive_stats_cpu(FXA_PROBLEM, const OptionalTensor& limit_row,
                                                 const OptionalTensor& limit_col, const OptionalTensor& rank_row,
                                                 const OptionalTensor& rank_col, bool rows, bool columns, bool means) {
  ContrastiveParams p = Problem{FXA_FORWARD_PROBLEM}.params();
  set_limits(p, limit_row, limit_col, rows, columns);
  check_vector(rank_row, "rank_row", p.a.count, ScalarType::Float);
  check_vector(rank_col, "rank_col", p.b.count, ScalarType::Float);
  p.a.rank_at = data_or_null<float>(rank_row);
  p.b.rank_at = data_or_null<float>(rank_col);
  p.means = means;
  const Parallel parallel = torch_parallel();
  Scratch scratch(p, parallel);
  std::vector<float> state(static_cast<size_t>(kStatePlanes * (p.a.count + p.b.count)));
  p.a.state = state.data();
  p.b.state = state.data() + kStatePlanes * p.a.count;
  Tensor row_stats = floats({kStatPlanes, p.a.count}, false), col_stats = floats({kStatPlanes, p.b.count}, false);
  contrastive_forward(p, data(row_stats), data(col_stats), scratch.aligned, parallel);
  return {row_stats, col_stats};
}

// needs: 1 gradient of a, 2 gradient of b, 4 that of scale, 8 gradients in float32 whatever the features are.
std::tuple<Tensor, Tensor, Tensor> contrastive_backward_cpu(const Tensor& grad_row, const Tensor& grad_col,
                                                            const Tensor& row_stats, const Tensor& col_stats,
                                                            FXA_PROBLEM, const OptionalTensor& limit_row,
                                                            const OptionalTensor& limit_col, bool rows, bool columns,
                                                            int64_t needs) {
  ContrastiveParams p = Problem{FXA_FORWARD_PROBLEM}.params();
  set_limits(p, limit_row, limit_col, rows, columns);
  check_planes(grad_row, "grad_row", kGradPlanes, p.a.count);
  check_planes(grad_col, "grad_col", kGradPlanes, p.b.count);
  check_planes(row_stats, "row_stats", kStatPlanes, p.a.count);
  check_planes(col_stats, "col_stats", kStatPlanes, p.b.count);
  p.a.grad = data(grad_row), p.a.stats = data(row_stats);
  p.b.grad = data(grad_col), p.b.stats = data(col_stats);
  Tensor grad_a = floats({needs & 1 ? p.a.count : 0, p.depth}, true);
  Tensor grad_b = floats({needs & 2 ? p.b.count : 0, p.depth}, true);
  Tensor dots = floats({p.a.count}, true);
  if (needs & 1) p.a.grad_data = data(grad_a);
  if (needs & 2) p.b.grad_data = data(grad_b);
  p.a.dot = data(dots);
  const Parallel parallel = torch_parallel();
  {
    Scratch scratch(p, parallel);
    contrastive_backward(p, scratch.aligned, parallel);
  }
  const bool keep_float = (needs & 8) != 0;
  grad_a = finish_gradient(p, p.a, a, grad_a, keep_float, parallel);
  grad_b = finish_gradient(p, p.b, b, grad_b, keep_float, parallel);
  return {grad_a, grad_b, dots};
}

// needs: 1 gradient of a, 2 gradient of b, 4 those of scale and bias.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sigmoid_cpu(FXA_PROBLEM, const OptionalTensor& weight,
                                                               int64_t needs) {
  ContrastiveParams p = Problem{FXA_FORWARD_PROBLEM}.params();
  set_limits(p, std::nullopt, std::nullopt, true, false);
  check_vector(weight, "weight", p.a.count, ScalarType::Float);
  p.a.weight = data_or_null<float>(weight);
  Tensor loss = floats({p.a.count}, true), dots = floats({needs ? p.a.count : 0}, true);
  Tensor row_dz = floats({needs ? p.a.count : 0}, true);
  Tensor grad_a = floats({needs & 1 ? p.a.count : 0, p.depth}, true);
  Tensor grad_b = floats({needs & 2 ? p.b.count : 0, p.depth}, true);
  p.loss = data(loss);
  std::vector<float> rows, columns;
  if (needs) {
    p.a.dot = data(dots), p.row_dz = data(row_dz);
    if (needs & 1) p.a.grad_data = data(grad_a);
    if (needs & 2) p.b.grad_data = data(grad_b);
    if (p.exact) {  // beside the positive's own coefficient the rounding of small ones does not show
      rows.resize(static_cast<size_t>(p.a.count)), columns.resize(static_cast<size_t>(p.b.count));
      for (int64_t i = 0; i < p.a.count; ++i) {
        const int32_t j = p.a.id[i];
        if (j < 0 || j >= p.b.count) continue;
        rows[i] = std::fabs(p.a.weight ? p.a.weight[i] : 1.0f) / (1.0f + std::exp(p.exact[i]));
        columns[j] += rows[i];
      }
      p.a.scale_of = rows.data(), p.b.scale_of = columns.data();
    }
  }
  const Parallel parallel = torch_parallel();
  {
    Scratch scratch(p, parallel);
    sigmoid_forward(p, scratch.aligned, parallel);
  }
  grad_a = finish_gradient(p, p.a, a, grad_a, true, parallel);
  grad_b = finish_gradient(p, p.b, b, grad_b, true, parallel);
  return {loss, grad_a, grad_b, dots, row_dz};
}

}  // namespace
}  // namespace fastxattn

STABLE_TORCH_LIBRARY_IMPL(fastxattn, CPU, m) {
  m.impl("positive_logits_cpu", FXA_OPERATOR(&fastxattn::positive_logits_cpu));
  m.impl("contrastive_stats_cpu", FXA_OPERATOR(&fastxattn::contrastive_stats_cpu));
  m.impl("contrastive_backward_cpu", FXA_OPERATOR(&fastxattn::contrastive_backward_cpu));
  m.impl("sigmoid_cpu", FXA_OPERATOR(&fastxattn::sigmoid_cpu));
}
