#include "simt/attention.h"

namespace fastxattn::simt {
FXA_SIMT_BIND(attention_float32) { return attention_forward<float>(a); }
}  // namespace fastxattn::simt
