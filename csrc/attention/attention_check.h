// Content checks: everything about offsets and indices that the kernels rely on for memory safety.
#pragma once

#include <string>

#include "attention/attention.h"

namespace fastxattn {

// Walks offsets, lengths and indices once. An empty string when they are sound (then `content` is filled in),
// else what is wrong. kv_range needs no check for memory's sake: the kernels clamp it to the sequence.
std::string check_attention_content(const AttentionParams& p, AttentionContent& content);

// That the range of every query slot in use lies within its sequence: 0 <= start <= end <= keys. For contents that
// check_attention_content has accepted.
std::string check_attention_ranges(const AttentionParams& p);

}  // namespace fastxattn
