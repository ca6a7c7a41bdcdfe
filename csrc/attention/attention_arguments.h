// Reads the arguments of attention, and of key importance, for every framework: one wording per rule.
//
// A binding makes a View of each tensor (bindings/torch_glue.h, bindings/ort_op.h) and calls read_attention. An option
// of attention is added to the lists here, to AttentionParams and AttentionKernelParams, and to the kernels.
#pragma once

#include <cmath>

#include "attention/attention.h"
#include "attention/attention_cuda.h"
#include "core/arguments.h"

namespace fastxattn {

// The arguments that attention and importance share, in the order of their operators: X(presence, kind, name).
// clang-format off
#define FXA_ATTENTION_SLOTS(X)      \
  X(required, i32, cu_seqlens_q)    \
  X(required, i32, cu_seqlens_k)    \
  X(optional, i32, seqused_q)       \
  X(optional, i32, seqused_k)       \
  X(optional, i32, query_index)     \
  X(optional, i32, key_index)       \
  X(optional, i32, kv_range)        \
  X(optional, f32, key_bias)
// clang-format on
// Their numbers, with the value of an absent one: X(name, default).
#define FXA_ATTENTION_NUMBERS(X) X(scale, NAN) X(softcap, 0.0)

struct AttentionArguments {
  View query, key, value;  // importance has no value and passes the key
#define FXA_FIELD(presence, kind, name) View name;
  FXA_ATTENTION_SLOTS(FXA_FIELD)
#undef FXA_FIELD
  View bias;
#define FXA_FIELD(name, otherwise) double name = otherwise;
  FXA_ATTENTION_NUMBERS(FXA_FIELD)
#undef FXA_FIELD
  double dropout_p = 0.0;
  View dropout_seed;
};

namespace attention_arguments {

inline void read_rows(const View& view, const View& query, const char* width) {
  require(view.type == query.type, view.name, " must have the dtype of query, ", query.type, "; got ", view.type);
  require(view.rank == 3, view.name, " must have shape (tokens, heads, ", width, "); got ", view);
  require(view.size[1] >= 1 && view.size[2] >= 1, view.name, " must have at least 1 head and 1 channel; got ", view);
  require(view.stride[2] == 1 || view.size[2] == 1 || view.empty(), view.name, " must be contiguous in its last axis");
  require(view.size[0] <= INT32_MAX, view.name, " must have fewer than 2^31 tokens; got ", view.size[0]);
}

inline const int32_t* read_ints(const View& view, int rank = 1) {
  if (!view) return nullptr;
  require(view.type == ElementType::i32, view.name, " must be int32; got ", view.type);
  require(view.rank == rank, view.name, " must have ", rank, rank == 1 ? " axis" : " axes", "; got shape ", view);
  require(view.contiguous(), view.name, " must be contiguous");
  return view.as<int32_t>();
}

inline void read_slots(const AttentionArguments& a, AttentionParams& p) {
  p.cu_q = read_ints(a.cu_seqlens_q), p.cu_k = read_ints(a.cu_seqlens_k);
  p.batch = a.cu_seqlens_q.size[0] - 1;
  require(p.batch >= 0, "cu_seqlens_q must have shape (batch + 1,), at least one offset; got none");
  require(a.cu_seqlens_k.size[0] == p.batch + 1, "cu_seqlens_k must have as many offsets as cu_seqlens_q, ",
          p.batch + 1, "; got ", a.cu_seqlens_k.size[0]);
  p.used_q = read_ints(a.seqused_q), p.used_k = read_ints(a.seqused_k);
  for (const View* used : {&a.seqused_q, &a.seqused_k}) {
    require(!*used || used->size[0] == p.batch, used->name, " must have shape (batch,), (", p.batch, "); got ", *used);
  }
  p.index_q = read_ints(a.query_index), p.index_k = read_ints(a.key_index);
  p.slots_q = a.query_index ? a.query_index.size[0] : p.rows_q;
  p.slots_k = a.key_index ? a.key_index.size[0] : p.rows_k;
  p.kv_range = read_ints(a.kv_range, 2);
  require(!a.kv_range || (a.kv_range.size[0] == p.rows_q && a.kv_range.size[1] == 2),
          "kv_range must have shape (query tokens, 2), (", p.rows_q, ", 2); got ", a.kv_range);
}

inline void read_biases(const AttentionArguments& a, AttentionParams& p) {
  if (const View& bias = a.key_bias) {
    require(bias.type == ElementType::f32, "key_bias must be float32; got ", bias.type);
    require(bias.rank == 1 || bias.rank == 2, "key_bias must have shape (key tokens,) or (key tokens, heads); got ",
            bias);
    require(bias.size[0] == p.rows_k, "key_bias must have one row per key token, ", p.rows_k, "; got ", bias);
    require(bias.rank == 1 || bias.size[1] == p.heads, "key_bias must have one column per query head, ", p.heads,
            "; got ", bias);
    p.key_bias = bias.as<float>();
    p.key_bias_row = bias.stride[0], p.key_bias_head = bias.rank == 2 ? bias.stride[1] : 0;
  }
  if (const View& bias = a.bias) {
    p.bias = bias.data, p.bias_dtype = dtype_of(bias);
    require(bias.rank == 4, "bias must broadcast to (batch, heads, queries, keys); got shape ", bias);
    require(bias.size[0] == 1 || bias.size[0] == p.batch, "axis 0 of bias must be 1 or the batch, ", p.batch,
            "; got shape ", bias);
    require(bias.size[1] == 1 || bias.size[1] == p.heads, "axis 1 of bias must be 1 or the heads, ", p.heads,
            "; got shape ", bias);
    require((bias.size[2] > 0 || p.rows_q == 0) && (bias.size[3] > 0 || p.rows_k == 0),
            "bias must not be empty; got shape ", bias);
    for (int i = 0; i < 4; ++i) {
      p.bias_size[i] = bias.size[i];
      p.bias_stride[i] = bias.size[i] == 1 ? 0 : bias.stride[i];
    }
  }
}

}  // namespace attention_arguments

// The problem, without its outputs. Everything is checked but the contents of offsets, lengths, indices and ranges,
// which may be on a device: check_attention_content and check_attention_ranges read those.
inline AttentionParams read_attention(const AttentionArguments& a) {
  using namespace attention_arguments;
  AttentionParams p;
  p.dtype = dtype_of(a.query);
  read_rows(a.query, a.query, "head_dim");
  read_rows(a.key, a.query, "head_dim");
  read_rows(a.value, a.query, "value_dim");
  p.query = a.query.data, p.key = a.key.data, p.value = a.value.data;
  p.query_row = a.query.stride[0], p.query_head = a.query.stride[1];
  p.key_row = a.key.stride[0], p.key_head = a.key.stride[1];
  p.value_row = a.value.stride[0], p.value_head = a.value.stride[1];
  p.rows_q = a.query.size[0], p.heads = a.query.size[1], p.head_dim = a.query.size[2];
  p.rows_k = a.key.size[0], p.kv_heads = a.key.size[1], p.value_dim = a.value.size[2];
  require(a.key.size[2] == p.head_dim, "key must have the head_dim of query, ", p.head_dim, "; got ", a.key.size[2]);
  require(a.value.size[0] == p.rows_k, "value must have as many tokens as key, ", p.rows_k, "; got ", a.value.size[0]);
  require(a.value.size[1] == p.kv_heads, "value must have as many heads as key, ", p.kv_heads, "; got ",
          a.value.size[1]);
  require(p.heads % p.kv_heads == 0, "the heads of key must divide the heads of query, ", p.heads, "; got ",
          p.kv_heads);
  require(p.head_dim <= 256 && p.value_dim <= 256, "head_dim and value_dim must be in 1..256; got ", p.head_dim,
          " and ", p.value_dim);
  read_slots(a, p);
  read_biases(a, p);
  p.scale = read_number("scale", a.scale);
  p.softcap = read_number("softcap", a.softcap, 0.0);
  p.dropout_p = read_number("dropout_p", a.dropout_p, 0.0);
  require(a.dropout_p < 1.0, "dropout_p must be less than 1; got ", a.dropout_p);
  if (p.dropout_p > 0.0f) {
    const View& seed = a.dropout_seed;
    require(seed && seed.type == ElementType::i64, "dropout_seed must be an int64 tensor");
    int64_t numbers = 1;
    for (int i = 0; i < seed.rank; ++i) numbers *= seed.size[i];
    require(numbers == 1, "dropout_seed must hold one number; got shape ", seed);
    p.seed = *seed.as<uint64_t>();
  }
  return p;
}

// The problem as the CUDA kernels take it. `aligned`: see AttentionKernelParams.
inline AttentionKernelParams kernel_params(const AttentionParams& a, bool aligned) {
  require(a.bias == nullptr, "bias has no CUDA kernel");
  const int64_t most = a.dtype == DType::f32 ? 128 : 256;
  require(a.head_dim <= most && a.value_dim <= most, "head_dim and value_dim must be in 1..", most, "; got ",
          a.head_dim, " and ", a.value_dim);
  require(a.slots_q <= INT32_MAX && a.slots_k <= INT32_MAX && a.batch <= INT32_MAX, "more slots than int32 can name");
  AttentionKernelParams p;
  p.query = a.query, p.key = a.key, p.value = a.value;
  p.query_row = a.query_row, p.query_head = a.query_head;
  p.key_row = a.key_row, p.key_head = a.key_head;
  p.value_row = a.value_row, p.value_head = a.value_head;
  p.rows_q = static_cast<int32_t>(a.rows_q), p.rows_k = static_cast<int32_t>(a.rows_k);
  p.slots_q = static_cast<int32_t>(a.slots_q), p.slots_k = static_cast<int32_t>(a.slots_k);
  p.batch = static_cast<int32_t>(a.batch);
  p.kv_heads = static_cast<int32_t>(a.kv_heads), p.group = static_cast<int32_t>(a.group());
  p.head_dim = static_cast<int32_t>(a.head_dim), p.value_dim = static_cast<int32_t>(a.value_dim);
  p.aligned = aligned;
  p.cu_q = a.cu_q, p.cu_k = a.cu_k, p.used_q = a.used_q, p.used_k = a.used_k;
  p.index_q = a.index_q, p.index_k = a.index_k, p.kv_range = a.kv_range;
  p.key_bias = a.key_bias, p.key_bias_row = a.key_bias_row, p.key_bias_head = a.key_bias_head;
  p.scale = a.scale, p.softcap = a.softcap;
  return p;
}

}  // namespace fastxattn
