#include "attention/attention_sm80.cuh"

namespace fastxattn {
FXA_ATTENTION_SM80(f32, float)
}  // namespace fastxattn
