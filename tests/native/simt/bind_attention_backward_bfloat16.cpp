#include "simt/attention.h"

namespace fastxattn::simt {
FXA_SIMT_BIND(attention_backward_bfloat16) { return attention_backward<bf16_t>(a); }
}  // namespace fastxattn::simt
