// torch.ops.fastxattn.absorbed_attention_cpu and its backward: checks what memory safety needs, then calls the core.
#include "absorbed_attention/absorbed_attention.h"
#include "bindings/torch_glue.h"

namespace fastxattn {
namespace {

void check_dims(const Tensor& query, const Tensor& context) {
  STD_TORCH_CHECK(query.dim() == 3 && context.dim() == 2 && query.size(2) == context.size(1),
                  "fastxattn: query must be (rows, heads, width) and context (rows, width)");
}

void check_offsets(const Tensor& offsets, int64_t rows, const char* name) {
  STD_TORCH_CHECK(
      offsets.scalar_type() == ScalarType::Int && offsets.dim() == 1 && offsets.size(0) >= 1 && offsets.is_contiguous(),
      "fastxattn: ", name, " must be a contiguous int32 tensor of shape (batch + 1,)");
  const auto* at = static_cast<const int32_t*>(offsets.const_data_ptr());
  bool sound = at[0] == 0 && at[offsets.size(0) - 1] <= rows;
  for (int64_t b = 1; b < offsets.size(0); ++b) sound &= at[b - 1] <= at[b];
  STD_TORCH_CHECK(sound, "fastxattn: ", name, " must start at 0, never decrease and end within the rows");
}

AbsorbedAttentionParams problem(const Tensor& query, const Tensor& context, const Tensor& cu_q, const Tensor& cu_k,
                                const OptionalTensor& kv_range, const OptionalTensor& key_bias, double scale,
                                const Tensor& out, const Tensor& lse, const Tensor& softmax) {
  check_dims(query, context);
  STD_TORCH_CHECK(query.scalar_type() == context.scalar_type(), "fastxattn: query and context must have one dtype");
  STD_TORCH_CHECK(context.is_contiguous() && (query.size(2) <= 1 || query.stride(2) == 1),
                  "fastxattn: context and the last axis of query must be contiguous");
  check_offsets(cu_q, query.size(0), "cu_seqlens_q");
  check_offsets(cu_k, context.size(0), "cu_seqlens_k");
  STD_TORCH_CHECK(cu_q.size(0) == cu_k.size(0), "fastxattn: cu_seqlens_q and cu_seqlens_k must have one length");
  if (kv_range.has_value()) {
    STD_TORCH_CHECK(kv_range->scalar_type() == ScalarType::Int && kv_range->dim() == 2 && kv_range->is_contiguous() &&
                        kv_range->size(0) == query.size(0) && kv_range->size(1) == 2,
                    "fastxattn: kv_range must be a contiguous int32 tensor of shape (rows of query, 2)");
  }
  if (key_bias.has_value()) {
    STD_TORCH_CHECK(key_bias->scalar_type() == ScalarType::Float && key_bias->dim() == 1 && key_bias->is_contiguous() &&
                        key_bias->size(0) == context.size(0),
                    "fastxattn: key_bias must be a contiguous float32 tensor of shape (rows of context,)");
  }
  STD_TORCH_CHECK(out.scalar_type() == query.scalar_type() && out.is_contiguous() && out.numel() == query.numel(),
                  "fastxattn: out must be contiguous, of query's shape and dtype");
  STD_TORCH_CHECK(
      lse.scalar_type() == ScalarType::Float && lse.is_contiguous() && lse.numel() == query.size(0) * query.size(1),
      "fastxattn: lse must be contiguous float32 (heads, rows of query)");
  STD_TORCH_CHECK(
      softmax.scalar_type() == ScalarType::Float && softmax.is_contiguous() && softmax.numel() == 2 * lse.numel(),
      "fastxattn: softmax must be contiguous float32 (2, heads, rows of query)");
  AbsorbedAttentionParams p{};
  p.dtype = dtype_of(query, "query");
  p.batch = cu_q.size(0) - 1;
  p.rows_q = query.size(0);
  p.rows_k = context.size(0);
  p.heads = query.size(1);
  p.width = query.size(2);
  p.scale = static_cast<float>(scale);
  p.query = query.const_data_ptr();
  p.query_stride = query.stride(0);
  p.head_stride = query.stride(1);
  p.context = context.const_data_ptr();
  p.cu_seqlens_q = static_cast<const int32_t*>(cu_q.const_data_ptr());
  p.cu_seqlens_k = static_cast<const int32_t*>(cu_k.const_data_ptr());
  p.kv_range = data_or_null<int32_t>(kv_range);
  p.key_bias = data_or_null<float>(key_bias);
  p.out = out.data_ptr();
  p.lse = static_cast<float*>(lse.data_ptr());
  p.softmax = static_cast<float*>(softmax.data_ptr());
  return p;
}

std::tuple<Tensor, Tensor, Tensor> op_forward(Tensor query, Tensor context, Tensor cu_q, Tensor cu_k,
                                              OptionalTensor kv_range, OptionalTensor key_bias, double scale) {
  check_dims(query, context);
  Tensor out = empty_cpu({query.size(0), query.size(1), query.size(2)}, query.scalar_type());
  Tensor lse = empty_cpu({query.size(1), query.size(0)}, ScalarType::Float);
  Tensor softmax = empty_cpu({2, query.size(1), query.size(0)}, ScalarType::Float);
  absorbed_attention_forward(problem(query, context, cu_q, cu_k, kv_range, key_bias, scale, out, lse, softmax),
                             torch_parallel());
  return {out, lse, softmax};
}

std::tuple<Tensor, Tensor, Tensor> op_backward(Tensor grad_out, OptionalTensor grad_lse, Tensor out, Tensor lse,
                                               Tensor softmax, Tensor query, Tensor context, Tensor cu_q, Tensor cu_k,
                                               OptionalTensor kv_range, OptionalTensor key_bias, double scale,
                                               int64_t needs) {
  const auto p = problem(query, context, cu_q, cu_k, kv_range, key_bias, scale, out, lse, softmax);
  STD_TORCH_CHECK(
      grad_out.scalar_type() == query.scalar_type() && grad_out.is_contiguous() && grad_out.numel() == query.numel(),
      "fastxattn: grad_out must be contiguous, of query's shape and dtype");
  STD_TORCH_CHECK(!grad_lse.has_value() || (grad_lse->scalar_type() == ScalarType::Float && grad_lse->is_contiguous() &&
                                            grad_lse->numel() == lse.numel()),
                  "fastxattn: grad_lse must be contiguous float32, of lse's shape");
  const bool bias = (needs & 4) != 0 && key_bias.has_value();
  const bool by_key = (needs & 2) != 0 || bias;
  Tensor grad_query = (needs & 1) != 0 ? empty_cpu({query.size(0), query.size(1), query.size(2)}, query.scalar_type())
                                       : empty_cpu({0}, query.scalar_type());
  Tensor grad_context =
      by_key ? empty_cpu({context.size(0), context.size(1)}, query.scalar_type()) : empty_cpu({0}, query.scalar_type());
  Tensor grad_bias = bias ? empty_cpu({key_bias->size(0)}, ScalarType::Float) : empty_cpu({0}, ScalarType::Float);
  AbsorbedAttentionGrads g{};
  g.grad_out = grad_out.const_data_ptr();
  g.grad_lse = data_or_null<float>(grad_lse);
  g.grad_query = (needs & 1) != 0 ? grad_query.data_ptr() : nullptr;
  g.grad_context = by_key ? grad_context.data_ptr() : nullptr;
  g.grad_key_bias = bias ? static_cast<float*>(grad_bias.data_ptr()) : nullptr;
  absorbed_attention_backward(p, g, torch_parallel());
  return {grad_query, grad_context, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastxattn, CPU, m) {
  m.impl("absorbed_attention_cpu", FXA_OPERATOR(&op_forward));
  m.impl("absorbed_attention_backward_cpu", FXA_OPERATOR(&op_backward));
}

}  // namespace fastxattn
