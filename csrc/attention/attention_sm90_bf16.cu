#include "attention/attention_sm90.cuh"

namespace fastxattn {
FXA_ATTENTION_SM90(bf16, bf16_t)
}  // namespace fastxattn
