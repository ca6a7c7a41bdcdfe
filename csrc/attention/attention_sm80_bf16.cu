#include "attention/attention_sm80.cuh"

namespace fastxattn {
FXA_ATTENTION_SM80(bf16, bf16_t)
}  // namespace fastxattn
