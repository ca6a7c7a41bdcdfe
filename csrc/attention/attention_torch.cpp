// torch ops over the attention core.
#include <tuple>

#include "attention/attention_arguments.h"
#include "attention/attention_check.h"
#include "bindings/torch_glue.h"

namespace fastxattn {
namespace {

#define FXA_PROBLEM                                                          \
  Tensor query, Tensor key, Tensor value FXA_ATTENTION_SLOTS(FXA_PARAMETER), \
      OptionalTensor bias FXA_ATTENTION_NUMBERS(FXA_NUMBER_PARAMETER), double dropout_p, OptionalTensor dropout_seed
#define FXA_READ_PROBLEM                                       \
  AttentionArguments arguments;                                \
  FXA_READ_VIEW(required, tensor, query)                       \
  FXA_READ_VIEW(required, tensor, key)                         \
  FXA_READ_VIEW(required, tensor, value)                       \
  FXA_ATTENTION_SLOTS(FXA_READ_VIEW)                           \
  FXA_READ_VIEW(optional, tensor, bias)                        \
  FXA_ATTENTION_NUMBERS(FXA_READ_NUMBER)                       \
  FXA_READ_NUMBER(dropout_p, 0.0)                              \
  FXA_READ_VIEW(optional, i64, dropout_seed)                   \
  AttentionParams p = read_attention(arguments);               \
  const AttentionContent content = check_attention_content(p); \
  check_attention_ranges(p);

std::tuple<Tensor, Tensor> attention(FXA_PROBLEM) {
  return reading("attention", [&] {
    FXA_READ_PROBLEM
    Tensor out = empty_cpu({p.rows_q, p.heads, p.value_dim}, query.scalar_type());
    Tensor lse = empty_cpu({p.heads, p.rows_q}, ScalarType::Double);
    p.out = out.mutable_data_ptr();
    p.lse_exact = static_cast<double*>(lse.mutable_data_ptr());
    attention_forward(p, content, torch_parallel(), active_isa());
    return std::tuple{out, lse};
  });
}

// The forward's results and their gradients.
AttentionGradients read_gradients(AttentionParams& p, const View& grad_out, const View& grad_lse, const View& out,
                                  const View& lse, ElementType type) {
  for (const View* view : {&grad_out, &out}) {
    require(view->type == type, view->name, " must have the dtype of query, ", type, "; got ", view->type);
    view->expect({p.rows_q, p.heads, p.value_dim}, "(query tokens, heads, value_dim)");
    require(view->stride[2] == 1 || p.value_dim == 1 || view->empty(), view->name,
            " must be contiguous in its last axis");
  }
  lse.expect({p.heads, p.rows_q}, "(heads, query tokens)");
  require(out.contiguous() && lse.contiguous(), "out and lse must be contiguous");
  require(lse.type == ElementType::f64, "lse must be float64; got ", lse.type);
  p.out = const_cast<void*>(out.data);  // read only from here on
  p.lse_exact = static_cast<double*>(const_cast<void*>(lse.data));
  AttentionGradients g;
  g.grad_out = grad_out.data;
  g.grad_out_row = grad_out.stride[0], g.grad_out_head = grad_out.stride[1];
  if (grad_lse) {
    grad_lse.expect({p.heads, p.rows_q}, "(heads, query tokens)");
    require(grad_lse.type == ElementType::f32, "grad_lse must be float32; got ", grad_lse.type);
    g.grad_lse = grad_lse.as<float>();
    g.grad_lse_head = grad_lse.stride[0], g.grad_lse_row = grad_lse.stride[1];
  }
  return g;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward_op(Tensor grad_out, OptionalTensor grad_lse,
                                                                         Tensor out, Tensor lse, FXA_PROBLEM,
                                                                         int64_t needs) {
  return reading("attention", [&] {
    FXA_READ_PROBLEM
    AttentionGradients g = read_gradients(p, view_of(grad_out, "grad_out", query), view_of(grad_lse, "grad_lse", query),
                                          view_of(out, "out", query), view_of(lse, "lse", query), arguments.query.type);
    require(!(needs & 8) || key_bias.has_value(), "needs names key_bias, which is absent");
    require(!(needs & 16) || bias.has_value(), "needs names bias, which is absent");
    auto none = [&] { return empty_cpu({0}, query.scalar_type()); };
    Tensor grad_query = needs & 1 ? empty_cpu({p.rows_q, p.heads, p.head_dim}, query.scalar_type()) : none();
    Tensor grad_key = needs & 2 ? empty_cpu({p.rows_k, p.kv_heads, p.head_dim}, query.scalar_type()) : none();
    Tensor grad_value = needs & 4 ? empty_cpu({p.rows_k, p.kv_heads, p.value_dim}, query.scalar_type()) : none();
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
    return std::tuple{grad_query, grad_key, grad_value, grad_key_bias, grad_bias};
  });
}

}  // namespace
}  // namespace fastxattn

STABLE_TORCH_LIBRARY_IMPL(fastxattn, CPU, m) {
  m.impl("attention_cpu", FXA_OPERATOR(&fastxattn::attention));
  m.impl("attention_backward_cpu", FXA_OPERATOR(&fastxattn::attention_backward_op));
}
