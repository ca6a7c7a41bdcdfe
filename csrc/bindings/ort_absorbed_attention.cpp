// fastxattn::AbsorbedAttention for ONNX Runtime: few queries over raw features, one tensor as key and value.
#include "absorbed_attention/absorbed_attention.h"
#include "bindings/ort_op.h"

namespace fastxattn::ort {
namespace {

void compute(Call& call) {
  const View query = call.input(0), context = call.input(1), cu_q = call.input(2), cu_k = call.input(3);
  query.expect({-1, -1, -1}, "(rows_q, heads, width)");
  context.expect({-1, query.size[2]}, "(rows_k, width), the width of query");
  AbsorbedAttentionParams p{};
  p.dtype = call.node.dtype;
  p.rows_q = query.size[0], p.heads = query.size[1], p.width = query.size[2];
  p.rows_k = context.size[0];
  require(p.heads >= 1 && p.width >= 1, "heads and width must be at least 1; got query ", query);
  p.batch = check_offsets(cu_q, p.rows_q);
  require(check_offsets(cu_k, p.rows_k) == p.batch, "cu_seqlens_q and cu_seqlens_k must have the same length");
  p.cu_seqlens_q = cu_q.as<int32_t>();
  p.cu_seqlens_k = cu_k.as<int32_t>();
  if (const View range = call.input(4)) {
    range.expect({p.rows_q, 2}, "(rows_q, 2)");
    p.kv_range = range.as<int32_t>();
  }
  if (const View key_bias = call.input(5)) {
    key_bias.expect({p.rows_k}, "(rows_k,)");
    p.key_bias = key_bias.as<float>();
  }
  p.scale = call.node.floats[0];
  require(p.scale == p.scale, "the attribute scale is missing or NaN");
  p.query = query.data;
  p.query_stride = p.heads * p.width;
  p.head_stride = p.width;
  p.context = context.data;
  p.out = call.output(0, {p.rows_q, p.heads, p.width});
  p.lse = static_cast<float*>(call.output(1, {p.heads, p.rows_q}));
  const size_t rows = static_cast<size_t>(p.heads * p.rows_q);
  std::vector<float> unread((p.lse == nullptr ? 3 : 2) * rows);  // what only a backward pass needs
  p.softmax = unread.data();
  if (p.lse == nullptr) p.lse = unread.data() + 2 * rows;
  absorbed_attention_forward(p, call.parallel());
}

}  // namespace

const Spec& absorbed_attention_spec() {
  static const Spec spec{"AbsorbedAttention",
                         {{"query", Kind::tensor},
                          {"context", Kind::tensor},
                          {"cu_seqlens_q", Kind::i32},
                          {"cu_seqlens_k", Kind::i32},
                          {"kv_range", Kind::i32, false},
                          {"key_bias", Kind::f32, false}},
                         {{"out", Kind::tensor}, {"lse", Kind::f32, false}},
                         {{"scale", __builtin_nanf("")}},
                         {},
                         compute};
  return spec;
}

}  // namespace fastxattn::ort
