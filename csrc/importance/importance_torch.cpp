// torch op over key importance.
#include "bindings/torch_glue.h"
#include "importance/importance_arguments.h"

namespace fastxattn {
namespace {

Tensor importance(Tensor query, Tensor key, Tensor lse FXA_ATTENTION_SLOTS(FXA_PARAMETER),
                  OptionalTensor row_weight FXA_ATTENTION_NUMBERS(FXA_NUMBER_PARAMETER)) {
  return reading("importance", [&] {
    AttentionArguments arguments;
    FXA_READ_VIEW(required, tensor, query)
    FXA_READ_VIEW(required, tensor, key)
    arguments.value = arguments.key;
    FXA_ATTENTION_SLOTS(FXA_READ_VIEW)
    FXA_ATTENTION_NUMBERS(FXA_READ_NUMBER)
    ImportanceParams p =
        read_importance(arguments, view_of(lse, "lse", query), view_of(row_weight, "row_weight", query));
    Tensor score = empty_cpu({p.attention.heads, p.attention.slots_k}, ScalarType::Float);
    p.score = static_cast<float*>(score.mutable_data_ptr());
    key_importance(p, torch_parallel(), active_isa());
    return score;
  });
}

}  // namespace
}  // namespace fastxattn

STABLE_TORCH_LIBRARY_IMPL(fastxattn, CPU, m) { m.impl("importance_cpu", FXA_OPERATOR(&fastxattn::importance)); }
