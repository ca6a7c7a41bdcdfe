// fastxattn::Attention and fastxattn::KeyImportance for ONNX Runtime: the torch operators' arguments, without dropout.
#include "bindings/ort_attention.h"

#include "attention/attention_check.h"
#include "importance/importance_arguments.h"

namespace fastxattn::ort {
namespace {

// Inputs of both operators: three tensors, the arguments they share, and one more.
constexpr int kShared = 3;

AttentionArguments read_shared(const Call& call) {
  AttentionArguments a;
  a.query = call.input(0), a.key = call.input(1);
  int input = kShared, number = 0;
#define FXA_READ(presence, kind, name) a.name = call.input(input++);
  FXA_ATTENTION_SLOTS(FXA_READ)
#undef FXA_READ
#define FXA_READ(name, otherwise) a.name = call.node.floats[number++];
  FXA_ATTENTION_NUMBERS(FXA_READ)
#undef FXA_READ
  return a;
}

std::vector<Argument> with_shared(std::vector<Argument> inputs, const Argument& last) {
  constexpr bool required = true, optional = false;
#define FXA_ARGUMENT(presence, kind, name) inputs.push_back({#name, Kind::kind, presence});
  FXA_ATTENTION_SLOTS(FXA_ARGUMENT)
#undef FXA_ARGUMENT
  inputs.push_back(last);
  return inputs;
}

std::vector<std::pair<const char*, float>> numbers() {
#define FXA_NUMBER(name, otherwise) {#name, static_cast<float>(otherwise)},
  return {FXA_ATTENTION_NUMBERS(FXA_NUMBER)};
#undef FXA_NUMBER
}

void compute(Call& call) {
  AttentionParams p = attention_problem(call);
  const AttentionContent content = check_attention_content(p);
  check_attention_ranges(p);
  p.out = call.output(0, {p.rows_q, p.heads, p.value_dim});
  p.lse = static_cast<float*>(call.output(1, {p.heads, p.rows_q}));
  attention_forward(p, content, call.parallel(), active_isa());
}

void compute_importance(Call& call) {
  AttentionArguments a = read_shared(call);
  a.value = a.key;
  ImportanceParams p =
      read_importance(a, call.input(2), call.input(static_cast<int>(call.node.spec->inputs.size()) - 1));
  p.score = static_cast<float*>(call.output(0, {p.attention.heads, p.attention.slots_k}));
  key_importance(p, call.parallel(), active_isa());
}

}  // namespace

AttentionParams attention_problem(const Call& call) {
  AttentionArguments a = read_shared(call);
  a.value = call.input(2);
  a.bias = call.input(static_cast<int>(call.node.spec->inputs.size()) - 1);
  return read_attention(a);
}

const Spec& attention_spec() {
  static const Spec spec{"Attention",
                         with_shared({{"query", Kind::tensor}, {"key", Kind::tensor}, {"value", Kind::tensor}},
                                     {"bias", Kind::f32, false}),
                         {{"out", Kind::tensor}, {"lse", Kind::f32, false}},
                         numbers(),
                         {},
                         compute};
  return spec;
}

const Spec& importance_spec() {
  static const Spec spec{"KeyImportance",
                         with_shared({{"query", Kind::tensor}, {"key", Kind::tensor}, {"lse", Kind::f32}},
                                     {"row_weight", Kind::f32, false}),
                         {{"score", Kind::f32}},
                         numbers(),
                         {},
                         compute_importance};
  return spec;
}

}  // namespace fastxattn::ort
