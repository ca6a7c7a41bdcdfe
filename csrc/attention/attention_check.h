// Content checks: everything about offsets and indices that the kernels rely on for memory safety.
#pragma once

#include "attention/attention.h"

namespace fastxattn {

// Reads offsets, lengths and indices once; throws BadArgument where they are wrong. kv_range needs no check for
// memory's sake: the kernels clamp it to the sequence.
AttentionContent check_attention_content(const AttentionParams& p);

// That the range of every query slot in use lies within its sequence: 0 <= start <= end <= keys, or BadArgument. For
// contents that check_attention_content has accepted.
void check_attention_ranges(const AttentionParams& p);

}  // namespace fastxattn
