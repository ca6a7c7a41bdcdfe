// torch ops over co-attention. Python has checked the arguments; what memory safety needs is checked again here.
#include <cstring>
#include <tuple>

#include "bindings/torch_glue.h"
#include "co_attention/co_attention.h"

namespace fastxattn {
namespace {

#define FXA_CHECK(condition, ...) STD_TORCH_CHECK(condition, "fastxattn::co_attention: ", __VA_ARGS__)

void check_rows(const Tensor& t, const char* name, const Tensor& query) {
  FXA_CHECK(t.is_cpu() && t.scalar_type() == query.scalar_type(), name,
            " must be on the CPU with the dtype of query_a");
  FXA_CHECK(t.dim() == 3 && t.size(1) == query.size(1), name, " must have 3 dimensions and the heads of query_a");
  FXA_CHECK(t.size(2) <= 1 || t.stride(2) == 1 || t.numel() == 0, name, " must be contiguous in its last axis");
  FXA_CHECK(t.size(2) >= 1 && t.size(2) <= 256, name, " must have a last axis of 1..256, got ", t.size(2));
}

void fill_side(CoAttentionSide& s, const Tensor& query, const Tensor& value, const Tensor& cu,
               const OptionalTensor& bias, int64_t heads) {
  s.query = query.const_data_ptr(), s.value = value.const_data_ptr();
  s.query_row = query.stride(0), s.query_head = query.stride(1);
  s.value_row = value.stride(0), s.value_head = value.stride(1);
  s.rows = query.size(0), s.value_dim = value.size(2);
  FXA_CHECK(value.size(0) == s.rows, "value must have the tokens of query on the same side");
  FXA_CHECK(
      cu.is_cpu() && cu.scalar_type() == ScalarType::Int && cu.dim() == 1 && cu.is_contiguous() && cu.size(0) >= 1,
      "cu_seqlens must be a contiguous int32 vector on the CPU");
  s.cu = static_cast<const int32_t*>(cu.const_data_ptr());
  if (!bias.has_value()) return;
  FXA_CHECK(bias->is_cpu() && bias->scalar_type() == ScalarType::Float, "a bias must be float32 on the CPU");
  FXA_CHECK((bias->dim() == 1 || (bias->dim() == 2 && bias->size(1) == heads)) && bias->size(0) == s.rows,
            "a bias must be (tokens,) or (tokens, heads)");
  s.bias = static_cast<const float*>(bias->const_data_ptr());
  s.bias_row = bias->stride(0), s.bias_head = bias->dim() == 2 ? bias->stride(1) : 0;
}

CoAttentionParams make_params(const Tensor& query_a, const Tensor& query_b, const Tensor& value_a,
                              const Tensor& value_b, const Tensor& cu_a, const Tensor& cu_b,
                              const OptionalTensor& bias_a, const OptionalTensor& bias_b, double scale, double softcap,
                              double dropout_p, const OptionalTensor& seed) {
  CoAttentionParams p;
  p.dtype = dtype_of(query_a, "query_a");
  FXA_CHECK(query_a.dim() == 3, "query_a must have 3 dimensions");
  check_rows(query_a, "query_a", query_a);
  check_rows(query_b, "query_b", query_a);
  check_rows(value_a, "value_a", query_a);
  check_rows(value_b, "value_b", query_a);
  p.heads = query_a.size(1), p.head_dim = query_a.size(2);
  FXA_CHECK(query_b.size(2) == p.head_dim, "query_b must have the head_dim of query_a");
  fill_side(p.side[0], query_a, value_a, cu_a, bias_a, p.heads);
  fill_side(p.side[1], query_b, value_b, cu_b, bias_b, p.heads);
  FXA_CHECK(cu_a.size(0) == cu_b.size(0), "cu_seqlens_a and cu_seqlens_b must have the same length");
  p.batch = cu_a.size(0) - 1;
  reading("co_attention", [&] {
    p.scale = read_number("scale", scale), p.softcap = read_number("softcap", softcap, 0.0);
    p.dropout_p = read_number("dropout_p", dropout_p, 0.0);
    require(dropout_p < 1.0, "dropout_p must be less than 1; got ", dropout_p);
  });
  if (p.dropout_p > 0.0f) {
    FXA_CHECK(seed.has_value() && seed->is_cpu() && seed->scalar_type() == ScalarType::Long && seed->numel() == 2 &&
                  seed->is_contiguous(),
              "dropout_seed must be a contiguous int64 tensor of two elements on the CPU");
    for (int side = 0; side < 2; ++side) {
      std::memcpy(&p.side[side].seed, static_cast<const int64_t*>(seed->const_data_ptr()) + side, sizeof(int64_t));
    }
  }
  const std::string fault = check_co_attention(p);
  FXA_CHECK(fault.empty(), fault);
  return p;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> co_attention(Tensor query_a, Tensor query_b, Tensor value_a, Tensor value_b,
                                                        Tensor cu_a, Tensor cu_b, OptionalTensor bias_a,
                                                        OptionalTensor bias_b, double scale, double softcap,
                                                        double dropout_p, OptionalTensor seed) {
  CoAttentionParams p =
      make_params(query_a, query_b, value_a, value_b, cu_a, cu_b, bias_a, bias_b, scale, softcap, dropout_p, seed);
  Tensor out[2], lse[2];
  for (int i = 0; i < 2; ++i) {
    CoAttentionSide& s = p.side[i];
    out[i] = empty_cpu({s.rows, p.heads, p.side[1 - i].value_dim}, query_a.scalar_type());
    lse[i] = empty_cpu({p.heads, s.rows}, ScalarType::Float);
    s.out = out[i].mutable_data_ptr();
    s.lse = static_cast<float*>(lse[i].mutable_data_ptr());
  }
  co_attention_forward(p, torch_parallel(), active_isa());
  return {out[0], out[1], lse[0], lse[1]};
}

void fill_results(CoAttentionSide& s, const Tensor& grad_out, const Tensor& out, const Tensor& lse, int64_t heads,
                  int64_t dim) {
  for (const Tensor* t : {&grad_out, &out}) {
    FXA_CHECK(t->size(0) == s.rows && t->size(1) == heads && t->size(2) == dim,
              "out and grad_out must be (tokens, heads, value_dim of the other side)");
  }
  FXA_CHECK(out.is_contiguous() && lse.is_contiguous(), "out and lse must be contiguous");
  FXA_CHECK(lse.is_cpu() && lse.scalar_type() == ScalarType::Float && lse.dim() == 2 && lse.size(0) == heads &&
                lse.size(1) == s.rows,
            "lse must be (heads, tokens) float32");
  s.out = const_cast<void*>(out.const_data_ptr());  // read only from here on
  s.lse = static_cast<float*>(const_cast<void*>(lse.const_data_ptr()));
  s.grad_out = grad_out.const_data_ptr();
  s.grad_out_row = grad_out.stride(0), s.grad_out_head = grad_out.stride(1);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> co_attention_backward_op(
    Tensor grad_out_a, Tensor grad_out_b, Tensor out_a, Tensor out_b, Tensor lse_a, Tensor lse_b, Tensor query_a,
    Tensor query_b, Tensor value_a, Tensor value_b, Tensor cu_a, Tensor cu_b, OptionalTensor bias_a,
    OptionalTensor bias_b, double scale, double softcap, double dropout_p, OptionalTensor seed, int64_t needs) {
  CoAttentionParams p =
      make_params(query_a, query_b, value_a, value_b, cu_a, cu_b, bias_a, bias_b, scale, softcap, dropout_p, seed);
  check_rows(grad_out_a, "grad_out_a", query_a);
  check_rows(grad_out_b, "grad_out_b", query_a);
  check_rows(out_a, "out_a", query_a);
  check_rows(out_b, "out_b", query_a);
  fill_results(p.side[0], grad_out_a, out_a, lse_a, p.heads, p.side[1].value_dim);
  fill_results(p.side[1], grad_out_b, out_b, lse_b, p.heads, p.side[0].value_dim);
  Tensor query[2], value[2], bias[2];
  for (int i = 0; i < 2; ++i) {
    CoAttentionSide& s = p.side[i];
    const auto one = [&](int bit, int64_t dim) {
      return needs >> (bit + i) & 1 ? empty_cpu({s.rows, p.heads, dim}, query_a.scalar_type())
                                    : empty_cpu({0}, query_a.scalar_type());
    };
    query[i] = one(0, p.head_dim);
    value[i] = one(2, s.value_dim);
    const bool with_bias = needs >> (4 + i) & 1;
    FXA_CHECK(!with_bias || s.bias != nullptr, "needs names a bias that is absent");
    bias[i] = with_bias ? empty_cpu({p.heads, s.rows}, ScalarType::Float) : empty_cpu({0}, ScalarType::Float);
    if (needs >> i & 1) s.grad_query = query[i].mutable_data_ptr();
    if (needs >> (2 + i) & 1) s.grad_value = value[i].mutable_data_ptr();
    if (with_bias) s.grad_bias = static_cast<float*>(bias[i].mutable_data_ptr());
  }
  co_attention_backward(p, torch_parallel(), active_isa());
  return {query[0], query[1], value[0], value[1], bias[0], bias[1]};
}

}  // namespace
}  // namespace fastxattn

STABLE_TORCH_LIBRARY_IMPL(fastxattn, CPU, m) {
  m.impl("co_attention_cpu", FXA_OPERATOR(&fastxattn::co_attention));
  m.impl("co_attention_backward_cpu", FXA_OPERATOR(&fastxattn::co_attention_backward_op));
}
