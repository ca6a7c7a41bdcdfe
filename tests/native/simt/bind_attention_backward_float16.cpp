#include "simt/attention.h"

namespace fastxattn::simt {
FXA_SIMT_BIND(attention_backward_float16) { return attention_backward<f16_t>(a); }
}  // namespace fastxattn::simt
