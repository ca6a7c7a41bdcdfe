// fastxattn::Attention and fastxattn::KeyImportance for ONNX Runtime: the torch operators' arguments, without dropout.
#include "bindings/ort_attention.h"

#include "attention/attention_check.h"
#include "importance/importance.h"

namespace fastxattn::ort {
namespace {

// A (size,) int32 input; null when absent.
const int32_t* ints(const Tensor& t, int64_t size, const char* meaning) {
  if (!t) return nullptr;
  t.expect({size}, meaning);
  return t.as<int32_t>();
}

void set_rows(AttentionParams& p, const Tensor& q, const Tensor& k, const Tensor& v) {
  q.expect({-1, -1, -1}, "(rows_q, heads, head_dim)");
  k.expect({-1, -1, q.size[2]}, "(rows_k, kv_heads, head_dim)");
  v.expect({k.size[0], k.size[1], -1}, "(rows_k, kv_heads, value_dim)");
  p.rows_q = q.size[0], p.heads = q.size[1], p.head_dim = q.size[2];
  p.rows_k = k.size[0], p.kv_heads = k.size[1], p.value_dim = v.size[2];
  require(p.kv_heads > 0 && p.heads > 0 && p.heads % p.kv_heads == 0, "kv_heads must divide heads; got ", p.kv_heads,
          " and ", p.heads);
  require(p.head_dim >= 1 && p.head_dim <= 256 && p.value_dim >= 1 && p.value_dim <= 256,
          "head_dim and value_dim must be in 1..256; got ", p.head_dim, " and ", p.value_dim);
  require(p.rows_q <= INT32_MAX && p.rows_k <= INT32_MAX, "more rows than int32 offsets can name");
  p.query = q.data, p.key = k.data, p.value = v.data;
  p.query_head = p.head_dim, p.query_row = p.heads * p.head_dim;
  p.key_head = p.head_dim, p.key_row = p.kv_heads * p.head_dim;
  p.value_head = p.value_dim, p.value_row = p.kv_heads * p.value_dim;
}

void set_key_bias(AttentionParams& p, const Tensor& key_bias) {
  if (!key_bias) return;
  if (key_bias.rank == 1) {
    key_bias.expect({p.rows_k}, "(rows_k,) or (rows_k, heads)");
  } else {
    key_bias.expect({p.rows_k, p.heads}, "(rows_k,) or (rows_k, heads)");
  }
  p.key_bias = key_bias.as<float>();
  p.key_bias_row = key_bias.rank == 2 ? p.heads : 1;
  p.key_bias_head = key_bias.rank == 2 ? 1 : 0;
}

void set_bias(AttentionParams& p, const Tensor& bias) {
  if (!bias) return;
  bias.expect({-1, -1, -1, -1}, "(batch|1, heads|1, query rows|1, key rows|1)");
  p.bias = bias.data;
  p.bias_dtype = DType::f32;
  int64_t stride = 1;
  for (int i = 3; i >= 0; --i) {
    p.bias_size[i] = bias.size[i];
    p.bias_stride[i] = bias.size[i] == 1 ? 0 : stride;
    stride *= bias.size[i];
  }
  require((p.bias_size[0] == 1 || p.bias_size[0] == p.batch) && (p.bias_size[1] == 1 || p.bias_size[1] == p.heads),
          "bias must have 1 or batch, and 1 or heads, as its first sizes; got ", bias);
}

// Offsets, lengths, indices and ranges: seven inputs from `first` on, in the order of the torch operators.
void set_slots(AttentionParams& p, const Call& call, int first) {
  const Tensor cu_q = call.input(first), cu_k = call.input(first + 1);
  cu_q.expect({-1}, "(batch + 1,)");
  require(cu_q.size[0] >= 1, "cu_seqlens_q must have at least 1 entry");
  p.batch = cu_q.size[0] - 1;
  p.cu_q = cu_q.as<int32_t>();
  p.cu_k = ints(cu_k, p.batch + 1, "(batch + 1,), as cu_seqlens_q");
  p.used_q = ints(call.input(first + 2), p.batch, "(batch,)");
  p.used_k = ints(call.input(first + 3), p.batch, "(batch,)");
  const Tensor index_q = call.input(first + 4), index_k = call.input(first + 5), range = call.input(first + 6);
  p.index_q = ints(index_q, -1, "(slots,)");
  p.index_k = ints(index_k, -1, "(slots,)");
  p.slots_q = index_q ? index_q.size[0] : p.rows_q;
  p.slots_k = index_k ? index_k.size[0] : p.rows_k;
  if (range) {
    range.expect({p.rows_q, 2}, "(rows_q, 2)");
    p.kv_range = range.as<int32_t>();
  }
}

void set_numbers(AttentionParams& p, const Call& call) {
  p.scale = call.node.floats[0];
  require(p.scale == p.scale, "the attribute scale is missing or NaN");
  p.softcap = call.node.floats[1];
  require(p.softcap >= 0.0f, "softcap must not be negative; got ", p.softcap);
}

AttentionContent check_content(const AttentionParams& p) {
  AttentionContent content;
  const std::string fault = check_attention_content(p, content);
  require(fault.empty(), fault);
  return content;
}

void compute(Call& call) {
  AttentionParams p = attention_problem(call);
  const AttentionContent content = check_content(p);
  p.out = call.output(0, {p.rows_q, p.heads, p.value_dim});
  p.lse = static_cast<float*>(call.output(1, {p.heads, p.rows_q}));
  attention_forward(p, content, call.parallel(), active_isa());
}

void compute_importance(Call& call) {
  ImportanceParams params;
  AttentionParams& p = params.attention;
  p.dtype = call.node.dtype;
  const Tensor key = call.input(1);
  set_rows(p, call.input(0), key, key);
  const Tensor lse = call.input(2);
  lse.expect({p.heads, p.rows_q}, "(heads, rows_q)");
  params.lse = lse.as<float>();
  set_slots(p, call, 3);
  set_key_bias(p, call.input(10));
  const Tensor weight = call.input(11);
  if (weight) {
    if (weight.rank == 1) {
      weight.expect({p.rows_q}, "(rows_q,) or (heads, rows_q)");
    } else {
      weight.expect({p.heads, p.rows_q}, "(rows_q,) or (heads, rows_q)");
    }
    params.row_weight = weight.as<float>();
    params.weight_row = 1;
    params.weight_head = weight.rank == 2 ? p.rows_q : 0;
  }
  set_numbers(p, call);
  check_content(p);
  params.score = static_cast<float*>(call.output(0, {p.heads, p.slots_k}));
  key_importance(params, call.parallel(), active_isa());
}

}  // namespace

AttentionParams attention_problem(const Call& call) {
  AttentionParams p;
  p.dtype = call.node.dtype;
  set_rows(p, call.input(0), call.input(1), call.input(2));
  set_slots(p, call, 3);
  set_key_bias(p, call.input(10));
  set_bias(p, call.input(11));
  set_numbers(p, call);
  return p;
}

// The inputs that attention and importance share after their first three.
static std::vector<Argument> with_slots(std::vector<Argument> first, std::vector<Argument> last) {
  for (const char* name : {"cu_seqlens_q", "cu_seqlens_k"}) first.push_back({name, Kind::i32});
  for (const char* name : {"seqused_q", "seqused_k", "query_index", "key_index", "kv_range"}) {
    first.push_back({name, Kind::i32, false});
  }
  first.insert(first.end(), last.begin(), last.end());
  return first;
}

const Spec& attention_spec() {
  static const Spec spec{"Attention",
                         with_slots({{"query", Kind::tensor}, {"key", Kind::tensor}, {"value", Kind::tensor}},
                                    {{"key_bias", Kind::f32, false}, {"bias", Kind::f32, false}}),
                         {{"out", Kind::tensor}, {"lse", Kind::f32, false}},
                         {{"scale", __builtin_nanf("")}, {"softcap", 0.0f}},
                         {},
                         compute};
  return spec;
}

const Spec& importance_spec() {
  static const Spec spec{"KeyImportance",
                         with_slots({{"query", Kind::tensor}, {"key", Kind::tensor}, {"lse", Kind::f32}},
                                    {{"key_bias", Kind::f32, false}, {"row_weight", Kind::f32, false}}),
                         {{"score", Kind::f32}},
                         {{"scale", __builtin_nanf("")}, {"softcap", 0.0f}},
                         {},
                         compute_importance};
  return spec;
}

}  // namespace fastxattn::ort
