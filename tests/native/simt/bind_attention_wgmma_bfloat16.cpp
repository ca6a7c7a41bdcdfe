#include "simt/attention.h"

namespace fastxattn::simt {
FXA_SIMT_BIND(attention_wgmma_bfloat16) { return attention_forward_wgmma<bf16_t>(a); }
}  // namespace fastxattn::simt
