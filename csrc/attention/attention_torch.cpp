// torch ops over the attention core: shapes, dtypes and strides are checked here, contents in attention_check.cpp.
#include <cstring>
#include <tuple>

#include "attention/attention.h"
#include "attention/attention_check.h"
#include "bindings/torch_glue.h"

namespace fastxattn {
namespace {

using torch::stable::Device;

#define FXA_CHECK(condition, ...) STD_TORCH_CHECK(condition, "fastxattn::attention: ", __VA_ARGS__)

// Rows, heads, depth with a contiguous last axis.
void check_rows(const Tensor& t, const char* name, ScalarType dtype) {
  FXA_CHECK(t.is_cpu(), name, " must be on the CPU");
  FXA_CHECK(t.scalar_type() == dtype, name, " must have the dtype of query");
  FXA_CHECK(t.dim() == 3, name, " must have 3 dimensions, got ", t.dim());
  FXA_CHECK(t.size(2) <= 1 || t.stride(2) == 1 || t.numel() == 0, name, " must be contiguous in its last axis");
}

const int32_t* ints(const OptionalTensor& t, const char* name, int64_t least, int64_t dims = 1) {
  if (!t.has_value()) return nullptr;
  FXA_CHECK(t->is_cpu() && t->scalar_type() == ScalarType::Int, name, " must be an int32 tensor on the CPU");
  FXA_CHECK(t->dim() == dims && t->is_contiguous(), name, " must be contiguous with ", dims, " dimension(s)");
  FXA_CHECK(t->size(0) >= least, name, " must have at least ", least, " entries, got ", t->size(0));
  return data_or_null<int32_t>(t);
}

AttentionParams make_params(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_q,
                            const Tensor& cu_k, const OptionalTensor& used_q, const OptionalTensor& used_k,
                            const OptionalTensor& index_q, const OptionalTensor& index_k,
                            const OptionalTensor& kv_range, const OptionalTensor& key_bias, const OptionalTensor& bias,
                            double scale, double softcap, double dropout_p, const OptionalTensor& seed,
                            AttentionContent& content) {
  AttentionParams p;
  const ScalarType dtype = query.scalar_type();
  p.dtype = dtype_of(query, "query");
  check_rows(query, "query", dtype);
  check_rows(key, "key", dtype);
  check_rows(value, "value", dtype);
  p.query = query.const_data_ptr();
  p.key = key.const_data_ptr();
  p.value = value.const_data_ptr();
  p.query_row = query.stride(0), p.query_head = query.stride(1);
  p.key_row = key.stride(0), p.key_head = key.stride(1);
  p.value_row = value.stride(0), p.value_head = value.stride(1);
  p.rows_q = query.size(0), p.heads = query.size(1), p.head_dim = query.size(2);
  p.rows_k = key.size(0), p.kv_heads = key.size(1), p.value_dim = value.size(2);
  FXA_CHECK(p.kv_heads > 0 && p.heads > 0 && p.heads % p.kv_heads == 0, "kv_heads must divide heads, got ", p.kv_heads,
            " and ", p.heads);
  FXA_CHECK(key.size(2) == p.head_dim, "key must have the head_dim of query, ", p.head_dim, ", got ", key.size(2));
  FXA_CHECK(value.size(0) == p.rows_k && value.size(1) == p.kv_heads, "value must have the rows and heads of key");
  FXA_CHECK(p.head_dim >= 1 && p.head_dim <= 256 && p.value_dim >= 1 && p.value_dim <= 256,
            "head_dim and value_dim must be in 1..256, got ", p.head_dim, " and ", p.value_dim);

  p.cu_q = ints(cu_q, "cu_seqlens_q", 1);
  p.batch = cu_q.size(0) - 1;
  p.cu_k = ints(cu_k, "cu_seqlens_k", 1);
  FXA_CHECK(cu_k.size(0) == p.batch + 1, "cu_seqlens_q and cu_seqlens_k must have the same length");
  p.used_q = ints(used_q, "seqused_q", p.batch);
  p.used_k = ints(used_k, "seqused_k", p.batch);
  p.index_q = ints(index_q, "query_index", 0);
  p.index_k = ints(index_k, "key_index", 0);
  p.slots_q = index_q.has_value() ? index_q->size(0) : p.rows_q;
  p.slots_k = index_k.has_value() ? index_k->size(0) : p.rows_k;
  p.kv_range = ints(kv_range, "kv_range", p.rows_q, 2);
  FXA_CHECK(!kv_range.has_value() || kv_range->size(1) == 2, "kv_range must have 2 columns");
  if (key_bias.has_value()) {
    FXA_CHECK(key_bias->is_cpu() && key_bias->scalar_type() == ScalarType::Float,
              "key_bias must be float32 on the CPU");
    FXA_CHECK(key_bias->dim() == 1 || (key_bias->dim() == 2 && key_bias->size(1) == p.heads),
              "key_bias must be (rows_k,) or (rows_k, heads)");
    FXA_CHECK(key_bias->size(0) == p.rows_k, "key_bias must have a row for each key row");
    p.key_bias = static_cast<const float*>(key_bias->const_data_ptr());
    p.key_bias_row = key_bias->stride(0);
    p.key_bias_head = key_bias->dim() == 2 ? key_bias->stride(1) : 0;
  }
  if (bias.has_value()) {
    FXA_CHECK(bias->is_cpu() && bias->dim() == 4, "bias must have 4 dimensions, on the CPU");
    p.bias = bias->const_data_ptr();
    p.bias_dtype = dtype_of(*bias, "bias");
    for (int i = 0; i < 4; ++i) {
      p.bias_size[i] = bias->size(i);
      p.bias_stride[i] = bias->size(i) == 1 ? 0 : bias->stride(i);
    }
    FXA_CHECK((p.bias_size[0] == 1 || p.bias_size[0] == p.batch) && (p.bias_size[1] == 1 || p.bias_size[1] == p.heads),
              "bias must have 1 or batch, and 1 or heads, as its first sizes");
    FXA_CHECK((p.bias_size[2] > 0 || p.rows_q == 0) && (p.bias_size[3] > 0 || p.rows_k == 0), "bias must not be empty");
  }
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  p.dropout_p = static_cast<float>(dropout_p);
  FXA_CHECK(p.dropout_p >= 0.0f && p.dropout_p <= 1.0f, "dropout_p must be in 0..1, got ", dropout_p);
  if (p.dropout_p > 0.0f) {
    FXA_CHECK(seed.has_value() && seed->is_cpu() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
              "dropout_seed must be an int64 tensor of one element on the CPU");
    std::memcpy(&p.seed, seed->const_data_ptr(), sizeof(p.seed));
  }
  std::string fault = check_attention_content(p, content);
  if (fault.empty()) fault = check_attention_ranges(p);
  FXA_CHECK(fault.empty(), fault);
  return p;
}

std::tuple<Tensor, Tensor> attention(Tensor query, Tensor key, Tensor value, Tensor cu_q, Tensor cu_k,
                                     OptionalTensor used_q, OptionalTensor used_k, OptionalTensor index_q,
                                     OptionalTensor index_k, OptionalTensor kv_range, OptionalTensor key_bias,
                                     OptionalTensor bias, double scale, double softcap, double dropout_p,
                                     OptionalTensor seed) {
  AttentionContent content;
  AttentionParams p = make_params(query, key, value, cu_q, cu_k, used_q, used_k, index_q, index_k, kv_range, key_bias,
                                  bias, scale, softcap, dropout_p, seed, content);
  Tensor out = empty_cpu({p.rows_q, p.heads, p.value_dim}, query.scalar_type());
  Tensor lse = empty_cpu({p.heads, p.rows_q}, ScalarType::Double);
  p.out = out.mutable_data_ptr();
  p.lse_exact = static_cast<double*>(lse.mutable_data_ptr());
  attention_forward(p, content, torch_parallel(), active_isa());
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward_op(
    Tensor grad_out, OptionalTensor grad_lse, Tensor out, Tensor lse, Tensor query, Tensor key, Tensor value,
    Tensor cu_q, Tensor cu_k, OptionalTensor used_q, OptionalTensor used_k, OptionalTensor index_q,
    OptionalTensor index_k, OptionalTensor kv_range, OptionalTensor key_bias, OptionalTensor bias, double scale,
    double softcap, double dropout_p, OptionalTensor seed, int64_t needs) {
  AttentionContent content;
  AttentionParams p = make_params(query, key, value, cu_q, cu_k, used_q, used_k, index_q, index_k, kv_range, key_bias,
                                  bias, scale, softcap, dropout_p, seed, content);
  const ScalarType dtype = query.scalar_type();
  check_rows(grad_out, "grad_out", dtype);
  check_rows(out, "out", dtype);
  for (const Tensor* t : {&grad_out, &out}) {
    FXA_CHECK(t->size(0) == p.rows_q && t->size(1) == p.heads && t->size(2) == p.value_dim,
              "out and grad_out must be (rows_q, heads, value_dim)");
  }
  FXA_CHECK(out.is_contiguous(), "out must be contiguous");
  auto is_lse = [&](const Tensor& t, ScalarType type) {
    return t.is_cpu() && t.scalar_type() == type && t.dim() == 2 && t.size(0) == p.heads && t.size(1) == p.rows_q;
  };
  FXA_CHECK(is_lse(lse, ScalarType::Double) && lse.is_contiguous(), "lse must be (heads, rows_q) float64, contiguous");
  FXA_CHECK(!grad_lse.has_value() || is_lse(*grad_lse, ScalarType::Float), "grad_lse must be (heads, rows_q) float32");
  p.out = const_cast<void*>(out.const_data_ptr());  // read only from here on
  p.lse_exact = static_cast<double*>(const_cast<void*>(lse.const_data_ptr()));

  AttentionGradients g;
  g.grad_out = grad_out.const_data_ptr();
  g.grad_out_row = grad_out.stride(0), g.grad_out_head = grad_out.stride(1);
  if (grad_lse.has_value()) {
    g.grad_lse = static_cast<const float*>(grad_lse->const_data_ptr());
    g.grad_lse_head = grad_lse->stride(0), g.grad_lse_row = grad_lse->stride(1);
  }
  FXA_CHECK(!(needs & 8) || key_bias.has_value(), "needs names key_bias, which is absent");
  FXA_CHECK(!(needs & 16) || bias.has_value(), "needs names bias, which is absent");
  auto none = [&] { return empty_cpu({0}, dtype); };
  Tensor grad_query = needs & 1 ? empty_cpu({p.rows_q, p.heads, p.head_dim}, dtype) : none();
  Tensor grad_key = needs & 2 ? empty_cpu({p.rows_k, p.kv_heads, p.head_dim}, dtype) : none();
  Tensor grad_value = needs & 4 ? empty_cpu({p.rows_k, p.kv_heads, p.value_dim}, dtype) : none();
  Tensor grad_key_bias = none(), grad_bias = none();
  if (needs & 1) g.grad_query = grad_query.mutable_data_ptr();
  if (needs & 2) g.grad_key = grad_key.mutable_data_ptr();
  if (needs & 4) g.grad_value = grad_value.mutable_data_ptr();
  if (needs & 8) {
    g.key_bias_has_heads = key_bias->dim() == 2;
    grad_key_bias = g.key_bias_has_heads ? empty_cpu({p.rows_k, p.heads}, ScalarType::Float)
                                         : empty_cpu({p.rows_k}, ScalarType::Float);
    g.grad_key_bias = static_cast<float*>(grad_key_bias.mutable_data_ptr());
  }
  if (needs & 16) {
    const int64_t* n = p.bias_size;
    grad_bias = empty_cpu({n[0], n[1], n[2], n[3]}, bias->scalar_type());
    g.grad_bias = grad_bias.mutable_data_ptr();
  }
  attention_backward(p, g, content, torch_parallel(), active_isa());
  return {grad_query, grad_key, grad_value, grad_key_bias, grad_bias};
}

}  // namespace
}  // namespace fastxattn

STABLE_TORCH_LIBRARY_IMPL(fastxattn, CPU, m) {
  m.impl("attention_cpu", FXA_OPERATOR(&fastxattn::attention));
  m.impl("attention_backward_cpu", FXA_OPERATOR(&fastxattn::attention_backward_op));
}
