#include "simt/attention.h"

namespace fastxattn::simt {
FXA_SIMT_BIND(attention_backward_float32) { return attention_backward<float>(a); }
}  // namespace fastxattn::simt
