// torch ops over the CUDA attention kernels. Results are allocated by the caller
// (fastxattn/ops/attention/cuda_launch.py); shapes, dtypes and strides are checked here, contents are clamped on the
// device.
#include <algorithm>

#include "attention/attention_cuda.h"
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

#define FXA_CHECK(condition, ...) STD_TORCH_CHECK(condition, "fastxattn::attention: ", __VA_ARGS__)

void check(const Tensor& t, const char* name, ScalarType dtype, const Tensor& query) {
  FXA_CHECK(t.is_cuda() && t.get_device() == query.get_device(), name, " must be on the device of query");
  FXA_CHECK(t.scalar_type() == dtype, name, " has the wrong dtype");
}
void check_rows(const Tensor& t, const char* name, const Tensor& query, int64_t rows, int64_t heads, int64_t width) {
  check(t, name, query.scalar_type(), query);
  FXA_CHECK(t.dim() == 3 && t.size(0) == rows && t.size(1) == heads && t.size(2) == width, name,
            " must have the shape (", rows, ", ", heads, ", ", width, ")");
  FXA_CHECK(t.size(2) <= 1 || t.stride(2) == 1 || t.numel() == 0, name, " must be contiguous in its last axis");
}
// A contiguous tensor of a plain type, or null when absent.
template <class V>
V* plain(const OptionalTensor& t, const char* name, ScalarType dtype, const Tensor& query, int64_t least) {
  if (!t.has_value()) return nullptr;
  check(*t, name, dtype, query);
  FXA_CHECK(t->is_contiguous() && t->numel() >= least, name, " must be contiguous with at least ", least, " elements");
  return static_cast<V*>(const_cast<void*>(t->const_data_ptr()));
}
AttentionKernelParams make_params(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_q,
                                  const Tensor& cu_k, const OptionalTensor& used_q, const OptionalTensor& used_k,
                                  const OptionalTensor& index_q, const OptionalTensor& index_k,
                                  const OptionalTensor& kv_range, const OptionalTensor& key_bias, double scale,
                                  double softcap, bool aligned) {
  AttentionKernelParams p;
  FXA_CHECK(query.dim() == 3 && key.dim() == 3 && value.dim() == 3, "query, key and value must have 3 dimensions");
  const int64_t rows_q = query.size(0), rows_k = key.size(0), heads = query.size(1), kv_heads = key.size(1);
  const int64_t head_dim = query.size(2), value_dim = value.size(2);
  FXA_CHECK(kv_heads > 0 && heads > 0 && heads % kv_heads == 0, "kv_heads must divide heads");
  const int64_t most = query.scalar_type() == ScalarType::Float ? 128 : 256;
  FXA_CHECK(head_dim >= 1 && head_dim <= most && value_dim >= 1 && value_dim <= most,
            "head_dim and value_dim must be in 1..", most, ", got ", head_dim, " and ", value_dim);
  check_rows(query, "query", query, rows_q, heads, head_dim);
  check_rows(key, "key", query, rows_k, kv_heads, head_dim);
  check_rows(value, "value", query, rows_k, kv_heads, value_dim);
  p.query = query.const_data_ptr(), p.key = key.const_data_ptr(), p.value = value.const_data_ptr();
  p.query_row = query.stride(0), p.query_head = query.stride(1);
  p.key_row = key.stride(0), p.key_head = key.stride(1);
  p.value_row = value.stride(0), p.value_head = value.stride(1);
  p.rows_q = narrow(rows_q, "rows of query"), p.rows_k = narrow(rows_k, "rows of key");
  p.kv_heads = narrow(kv_heads, "kv_heads"), p.group = narrow(heads / kv_heads, "group");
  p.head_dim = static_cast<int32_t>(head_dim), p.value_dim = static_cast<int32_t>(value_dim);
  p.aligned = aligned;
  p.batch = narrow(cu_q.numel() - 1, "batch");
  FXA_CHECK(p.batch >= 1 && rows_q > 0 && rows_k > 0, "nothing to compute");
  p.cu_q = plain<int32_t>(cu_q, "cu_seqlens_q", ScalarType::Int, query, p.batch + 1);
  p.cu_k = plain<int32_t>(cu_k, "cu_seqlens_k", ScalarType::Int, query, p.batch + 1);
  p.used_q = plain<int32_t>(used_q, "seqused_q", ScalarType::Int, query, p.batch);
  p.used_k = plain<int32_t>(used_k, "seqused_k", ScalarType::Int, query, p.batch);
  p.index_q = plain<int32_t>(index_q, "query_index", ScalarType::Int, query, 0);
  p.index_k = plain<int32_t>(index_k, "key_index", ScalarType::Int, query, 0);
  p.slots_q = index_q.has_value() ? narrow(index_q->numel(), "query_index") : p.rows_q;
  p.slots_k = index_k.has_value() ? narrow(index_k->numel(), "key_index") : p.rows_k;
  p.kv_range = plain<int32_t>(kv_range, "kv_range", ScalarType::Int, query, 2 * rows_q);
  if (key_bias.has_value()) {
    check(*key_bias, "key_bias", ScalarType::Float, query);
    FXA_CHECK(
        (key_bias->dim() == 1 || (key_bias->dim() == 2 && key_bias->size(1) == heads)) && key_bias->size(0) == rows_k,
        "key_bias must be (rows_k,) or (rows_k, heads)");
    p.key_bias = static_cast<const float*>(key_bias->const_data_ptr());
    p.key_bias_row = key_bias->stride(0);
    p.key_bias_head = key_bias->dim() == 2 ? key_bias->stride(1) : 0;
  }
  p.scale = static_cast<float>(scale), p.softcap = static_cast<float>(softcap);
  return p;
}

void forward(Tensor out, Tensor lse, OptionalTensor part_out, OptionalTensor part_lse, Tensor query, Tensor key,
             Tensor value, Tensor cu_q, Tensor cu_k, OptionalTensor used_q, OptionalTensor used_k,
             OptionalTensor index_q, OptionalTensor index_k, OptionalTensor kv_range, OptionalTensor key_bias,
             double scale, double softcap, bool aligned) {
  AttentionKernelParams p = make_params(query, key, value, cu_q, cu_k, used_q, used_k, index_q, index_k, kv_range,
                                        key_bias, scale, softcap, aligned);
  const int64_t heads = int64_t{p.kv_heads} * p.group, all = heads * p.rows_q;
  p.out = plain<void>(out, "out", query.scalar_type(), query, all * p.value_dim);
  p.lse = plain<float>(lse, "lse", ScalarType::Float, query, all);
  if (p.slots_k >= kCutLength) {
    p.chunks = p.slots_k / kChunkKeys;
    p.part_rows = static_cast<int32_t>(std::min(int64_t{kCutRows}, int64_t{p.slots_q} * p.group));
    const int64_t parts = int64_t{p.chunks} * p.kv_heads * p.part_rows;
    p.part_out = plain<float>(part_out, "part_out", ScalarType::Float, query, parts * p.value_dim);
    p.part_lse = plain<float>(part_lse, "part_lse", ScalarType::Float, query, parts);
    FXA_CHECK(p.part_out != nullptr && p.part_lse != nullptr, "chunks need room for their results");
  }
  const char* fault = attention_forward_cuda(p, dtype_of(query, "query"), stream_of(query));
  FXA_CHECK(fault == nullptr, fault);
}

void backward(OptionalTensor grad_query, OptionalTensor grad_key, OptionalTensor grad_value,
              OptionalTensor grad_key_bias, Tensor delta, OptionalTensor norm, Tensor grad_out, OptionalTensor grad_lse,
              Tensor out, Tensor lse, Tensor query, Tensor key, Tensor value, Tensor cu_q, Tensor cu_k,
              OptionalTensor used_q, OptionalTensor used_k, OptionalTensor index_q, OptionalTensor index_k,
              OptionalTensor kv_range, OptionalTensor key_bias, double scale, double softcap, bool aligned) {
  AttentionKernelParams p = make_params(query, key, value, cu_q, cu_k, used_q, used_k, index_q, index_k, kv_range,
                                        key_bias, scale, softcap, aligned);
  const int64_t heads = int64_t{p.kv_heads} * p.group, all = heads * p.rows_q;
  const int64_t keys = int64_t{p.slots_k} * p.kv_heads;
  const ScalarType dtype = query.scalar_type();
  check_rows(grad_out, "grad_out", query, p.rows_q, heads, p.value_dim);
  p.out = plain<void>(out, "out", dtype, query, all * p.value_dim);
  p.lse = plain<float>(lse, "lse", ScalarType::Float, query, all);
  AttentionKernelGradients g;
  g.grad_out = grad_out.const_data_ptr();
  g.grad_out_row = grad_out.stride(0), g.grad_out_head = grad_out.stride(1);
  g.grad_lse = plain<float>(grad_lse, "grad_lse", ScalarType::Float, query, all);
  g.delta = plain<float>(delta, "delta", ScalarType::Float, query, all);
  g.norm = plain<float>(norm, "norm", ScalarType::Float, query, all);
  FXA_CHECK(dtype != ScalarType::Float || g.norm != nullptr, "float32 needs norm");
  g.grad_query = plain<void>(grad_query, "grad_query", dtype, query, all * p.head_dim);
  g.grad_key = plain<void>(grad_key, "grad_key", dtype, query, keys * p.head_dim);
  g.grad_value = plain<void>(grad_value, "grad_value", dtype, query, keys * p.value_dim);
  g.key_bias_has_heads = key_bias.has_value() && key_bias->dim() == 2;
  FXA_CHECK(!grad_key_bias.has_value() || key_bias.has_value(), "grad_key_bias is asked for without key_bias");
  g.grad_key_bias = plain<float>(grad_key_bias, "grad_key_bias", ScalarType::Float, query,
                                 p.slots_k * (g.key_bias_has_heads ? heads : int64_t{p.kv_heads}));
  const char* fault = attention_backward_cuda(p, g, dtype_of(query, "query"), stream_of(query));
  FXA_CHECK(fault == nullptr, fault);
}

}  // namespace
}  // namespace fastxattn

#define FXA_PROBLEM                                                                                              \
  "Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? seqused_q, "        \
  "Tensor? seqused_k, Tensor? query_index, Tensor? key_index, Tensor? kv_range, Tensor? key_bias, float scale, " \
  "float softcap, bool aligned"

// Below the operators that users and compilers see: these write into what they are given.
STABLE_TORCH_LIBRARY_FRAGMENT(fastxattn, m) {
  m.def("attention_cuda_launch(Tensor(a!) out, Tensor(b!) lse, Tensor(c!)? part_out, Tensor(d!)? part_lse, " FXA_PROBLEM
        ") -> ()");
  m.def(
      "attention_backward_cuda_launch(Tensor(a!)? grad_query, Tensor(b!)? grad_key, Tensor(c!)? grad_value, "
      "Tensor(d!)? grad_key_bias, Tensor(e!) delta, Tensor(f!)? norm, Tensor grad_out, Tensor? grad_lse, Tensor out, "
      "Tensor lse, " FXA_PROBLEM ") -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastxattn, CUDA, m) {
  m.impl("attention_cuda_launch", TORCH_BOX(&fastxattn::forward));
  m.impl("attention_backward_cuda_launch", TORCH_BOX(&fastxattn::backward));
}
