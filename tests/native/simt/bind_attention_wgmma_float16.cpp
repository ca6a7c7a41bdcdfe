#include "simt/attention.h"

namespace fastxattn::simt {
FXA_SIMT_BIND(attention_wgmma_float16) { return attention_forward_wgmma<f16_t>(a); }
}  // namespace fastxattn::simt
