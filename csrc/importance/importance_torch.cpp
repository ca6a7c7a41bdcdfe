// torch op over key importance. Python has checked the arguments; what memory safety needs is checked again here.
#include "bindings/torch_glue.h"
#include "importance/importance.h"

namespace fastxattn {
namespace {

#define FXA_CHECK(condition, ...) STD_TORCH_CHECK(condition, "fastxattn::importance: ", __VA_ARGS__)

const int32_t* ints(const OptionalTensor& t, const char* name, int64_t least, int64_t dims = 1) {
  if (!t.has_value()) return nullptr;
  FXA_CHECK(t->is_cpu() && t->scalar_type() == ScalarType::Int, name, " must be an int32 tensor on the CPU");
  FXA_CHECK(t->dim() == dims && t->is_contiguous(), name, " must be contiguous with ", dims, " dimension(s)");
  FXA_CHECK(t->size(0) >= least, name, " must have at least ", least, " entries, got ", t->size(0));
  return data_or_null<int32_t>(t);
}

void check_floats(const Tensor& t, const char* name) {
  FXA_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float, name, " must be float32 on the CPU");
}

Tensor importance(Tensor query, Tensor key, Tensor lse, Tensor cu_q, Tensor cu_k, OptionalTensor used_q,
                  OptionalTensor used_k, OptionalTensor index_q, OptionalTensor index_k, OptionalTensor kv_range,
                  OptionalTensor key_bias, OptionalTensor row_weight, double scale, double softcap) {
  ImportanceParams params;
  AttentionParams& p = params.attention;
  p.dtype = dtype_of(query, "query");
  FXA_CHECK(query.is_cpu() && key.is_cpu() && key.scalar_type() == query.scalar_type(),
            "query and key must be on the CPU with one dtype");
  FXA_CHECK(query.dim() == 3 && key.dim() == 3, "query and key must have 3 dimensions");
  p.query = query.const_data_ptr();
  p.key = p.value = key.const_data_ptr();
  p.rows_q = query.size(0), p.heads = query.size(1), p.head_dim = p.value_dim = query.size(2);
  p.rows_k = key.size(0), p.kv_heads = key.size(1);
  p.query_row = query.stride(0), p.query_head = query.stride(1);
  p.key_row = key.stride(0), p.key_head = key.stride(1);
  FXA_CHECK(p.kv_heads > 0 && p.heads > 0 && p.heads % p.kv_heads == 0, "kv_heads must divide heads");
  FXA_CHECK(key.size(2) == p.head_dim && p.head_dim >= 1 && p.head_dim <= 256,
            "query and key must share a head_dim in 1..256");
  FXA_CHECK((p.head_dim == 1 || query.stride(2) == 1 || query.numel() == 0) &&
                (p.head_dim == 1 || key.stride(2) == 1 || key.numel() == 0),
            "query and key must be contiguous in their last axis");
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
    check_floats(*key_bias, "key_bias");
    FXA_CHECK((key_bias->dim() == 1 || (key_bias->dim() == 2 && key_bias->size(1) == p.heads)) &&
                  key_bias->size(0) == p.rows_k,
              "key_bias must be (rows_k,) or (rows_k, heads)");
    p.key_bias = static_cast<const float*>(key_bias->const_data_ptr());
    p.key_bias_row = key_bias->stride(0);
    p.key_bias_head = key_bias->dim() == 2 ? key_bias->stride(1) : 0;
  }
  check_floats(lse, "lse");
  FXA_CHECK(lse.dim() == 2 && lse.size(0) == p.heads && lse.size(1) == p.rows_q && lse.is_contiguous(),
            "lse must be (heads, rows_q) and contiguous");
  params.lse = static_cast<const float*>(lse.const_data_ptr());
  if (row_weight.has_value()) {
    check_floats(*row_weight, "row_weight");
    const int64_t dims = row_weight->dim();
    FXA_CHECK((dims == 1 || (dims == 2 && row_weight->size(0) == p.heads)) && row_weight->size(dims - 1) == p.rows_q,
              "row_weight must be (rows_q,) or (heads, rows_q)");
    params.row_weight = static_cast<const float*>(row_weight->const_data_ptr());
    params.weight_row = row_weight->stride(dims - 1);
    params.weight_head = dims == 2 ? row_weight->stride(0) : 0;
  }
  FXA_CHECK(softcap >= 0.0, "softcap must be at least 0");
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  AttentionContent content;
  std::string fault = check_attention_content(p, content);
  if (fault.empty()) fault = check_attention_ranges(p);
  FXA_CHECK(fault.empty(), fault);
  Tensor score = empty_cpu({p.heads, p.slots_k}, ScalarType::Float);
  params.score = static_cast<float*>(score.mutable_data_ptr());
  key_importance(params, torch_parallel(), active_isa());
  return score;
}

}  // namespace
}  // namespace fastxattn

STABLE_TORCH_LIBRARY_IMPL(fastxattn, CPU, m) { m.impl("importance_cpu", FXA_OPERATOR(&fastxattn::importance)); }
