// torch ops over the CUDA attention kernels. Results are allocated by the caller
// (fastxattn/ops/attention); contents of offsets, lengths and indices are clamped on the device.
#include <algorithm>

#include "attention/attention_arguments.h"
#include "bindings/torch_cuda_glue.h"

namespace fastxattn {

// Absent from a library that was built without code for compute capability 9.0 (FASTXATTN_CUDA_ARCHS).
#define FXA_DECLARE_SM90(name)                                                                           \
  __attribute__((weak)) bool attention_forward_sm90_##name(const AttentionKernelParams& p, void* stream, \
                                                           const char*& fault);
FXA_DECLARE_SM90(f16)
FXA_DECLARE_SM90(bf16)

// The kernel of attention_wgmma.cuh runs the sequences that it takes where it is at home, that of attention_fwd.cuh all
// others.
const char* attention_forward_cuda(const AttentionKernelParams& p, DType dtype, void* stream) {
  const auto hopper = dtype == DType::f16    ? &attention_forward_sm90_f16
                      : dtype == DType::bf16 ? &attention_forward_sm90_bf16
                                             : nullptr;
  const char* fault = nullptr;
  const bool few = hopper != nullptr && hopper(p, stream, fault);
  if (fault != nullptr) return fault;
  if (dtype == DType::f16) return attention_forward_f16(p, few, stream);
  if (dtype == DType::bf16) return attention_forward_bf16(p, few, stream);
  return attention_forward_f32(p, few, stream);
}
const char* attention_backward_cuda(const AttentionKernelParams& p, const AttentionKernelGradients& g, DType dtype,
                                    void* stream) {
  if (dtype == DType::f16) return attention_backward_f16(p, g, stream);
  if (dtype == DType::bf16) return attention_backward_bf16(p, g, stream);
  return attention_backward_f32(p, g, stream);
}

namespace {

#define FXA_PROBLEM         \
  Tensor query, Tensor key, \
      Tensor value FXA_ATTENTION_SLOTS(FXA_PARAMETER) FXA_ATTENTION_NUMBERS(FXA_NUMBER_PARAMETER), bool aligned
#define FXA_READ_PROBLEM                                     \
  AttentionArguments arguments;                              \
  FXA_READ_VIEW(required, tensor, query)                     \
  FXA_READ_VIEW(required, tensor, key)                       \
  FXA_READ_VIEW(required, tensor, value)                     \
  FXA_ATTENTION_SLOTS(FXA_READ_VIEW)                         \
  FXA_ATTENTION_NUMBERS(FXA_READ_NUMBER)                     \
  const AttentionParams problem = read_attention(arguments); \
  AttentionKernelParams p = kernel_params(problem, aligned); \
  require(p.batch >= 1 && p.rows_q > 0 && p.rows_k > 0, "nothing to compute");

void check_rows(const View& view, const AttentionParams& p, ElementType type) {
  require(view.type == type, view.name, " must have the dtype of query, ", type, "; got ", view.type);
  view.expect({p.rows_q, p.heads, p.value_dim}, "(query tokens, heads, value_dim)");
  require(view.stride[2] == 1 || p.value_dim == 1, view.name, " must be contiguous in its last axis");
}

void forward(Tensor out, Tensor lse, OptionalTensor part_out, OptionalTensor part_lse, FXA_PROBLEM) {
  reading("attention", [&] {
    FXA_READ_PROBLEM
    const int64_t heads = int64_t{p.kv_heads} * p.group, all = heads * p.rows_q;
    p.out = plain_pointer<void>(out, "out", query.scalar_type(), query, all * p.value_dim);
    p.lse = plain_pointer<float>(lse, "lse", ScalarType::Float, query, all);
    if (p.slots_k >= kCutLength) {
      p.chunks = p.slots_k / kChunkKeys;
      p.part_rows = static_cast<int32_t>(std::min(int64_t{kCutRows}, int64_t{p.slots_q} * p.group));
      const int64_t parts = int64_t{p.chunks} * p.kv_heads * p.part_rows;
      p.part_out = plain_pointer<float>(part_out, "part_out", ScalarType::Float, query, parts * p.value_dim);
      p.part_lse = plain_pointer<float>(part_lse, "part_lse", ScalarType::Float, query, parts);
      require(p.part_out != nullptr && p.part_lse != nullptr, "chunks need memory for their results");
    }
    const char* fault = attention_forward_cuda(p, problem.dtype, stream_of(query));
    check_launch(fault);
  });
}

void backward(OptionalTensor grad_query, OptionalTensor grad_key, OptionalTensor grad_value,
              OptionalTensor grad_key_bias, Tensor delta, OptionalTensor norm, Tensor grad_out, OptionalTensor grad_lse,
              Tensor out, Tensor lse, FXA_PROBLEM) {
  reading("attention", [&] {
    FXA_READ_PROBLEM
    const int64_t heads = int64_t{p.kv_heads} * p.group, all = heads * p.rows_q;
    const int64_t keys = int64_t{p.slots_k} * p.kv_heads;
    const ScalarType dtype = query.scalar_type();
    check_rows(view_of(grad_out, "grad_out", query), problem, arguments.query.type);
    p.out = plain_pointer<void>(out, "out", dtype, query, all * p.value_dim);
    p.lse = plain_pointer<float>(lse, "lse", ScalarType::Float, query, all);
    AttentionKernelGradients g;
    g.grad_out = grad_out.const_data_ptr();
    g.grad_out_row = grad_out.stride(0), g.grad_out_head = grad_out.stride(1);
    g.grad_lse = plain_pointer<float>(grad_lse, "grad_lse", ScalarType::Float, query, all);
    g.delta = plain_pointer<float>(delta, "delta", ScalarType::Float, query, all);
    g.norm = plain_pointer<float>(norm, "norm", ScalarType::Float, query, all);
    require(dtype != ScalarType::Float || g.norm != nullptr, "float32 needs norm");
    g.grad_query = plain_pointer<void>(grad_query, "grad_query", dtype, query, all * p.head_dim);
    g.grad_key = plain_pointer<void>(grad_key, "grad_key", dtype, query, keys * p.head_dim);
    g.grad_value = plain_pointer<void>(grad_value, "grad_value", dtype, query, keys * p.value_dim);
    g.key_bias_has_heads = key_bias.has_value() && key_bias->dim() == 2;
    require(!grad_key_bias.has_value() || key_bias.has_value(), "grad_key_bias is asked for without key_bias");
    g.grad_key_bias = plain_pointer<float>(grad_key_bias, "grad_key_bias", ScalarType::Float, query,
                                           p.slots_k * (g.key_bias_has_heads ? heads : int64_t{p.kv_heads}));
    const char* fault = attention_backward_cuda(p, g, problem.dtype, stream_of(query));
    check_launch(fault);
  });
}

}  // namespace
}  // namespace fastxattn

#define FXA_PROBLEM_SCHEMA                                                 \
  "Tensor query, Tensor key, Tensor value" FXA_ATTENTION_SLOTS(FXA_SCHEMA) \
      FXA_ATTENTION_NUMBERS(FXA_NUMBER_SCHEMA) ", bool aligned"

// Below the operators that users and compilers see: these write into what they are given.
STABLE_TORCH_LIBRARY_FRAGMENT(fastxattn, m) {
  m.def(
      "attention_cuda_launch(Tensor(a!) out, Tensor(b!) lse, Tensor(c!)? part_out, Tensor(d!)? "
      "part_lse, " FXA_PROBLEM_SCHEMA ") -> ()");
  m.def(
      "attention_backward_cuda_launch(Tensor(a!)? grad_query, Tensor(b!)? grad_key, Tensor(c!)? grad_value, "
      "Tensor(d!)? grad_key_bias, Tensor(e!) delta, Tensor(f!)? norm, Tensor grad_out, Tensor? grad_lse, Tensor out, "
      "Tensor lse, " FXA_PROBLEM_SCHEMA ") -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastxattn, CUDA, m) {
  m.impl("attention_cuda_launch", TORCH_BOX(&fastxattn::forward));
  m.impl("attention_backward_cuda_launch", TORCH_BOX(&fastxattn::backward));
}
