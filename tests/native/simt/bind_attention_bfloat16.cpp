#include "simt/attention.h"

namespace fastxattn::simt {
FXA_SIMT_BIND(attention_bfloat16) { return attention_forward<bf16_t>(a); }
}  // namespace fastxattn::simt
