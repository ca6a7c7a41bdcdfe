#include "simt/attention.h"

namespace fastxattn::simt {
FXA_SIMT_BIND(attention_float16) { return attention_forward<f16_t>(a); }
}  // namespace fastxattn::simt
