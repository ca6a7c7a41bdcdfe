#include "attention/attention_sm90.cuh"

namespace fastxattn {
FXA_ATTENTION_SM90(f16, f16_t)
}  // namespace fastxattn
