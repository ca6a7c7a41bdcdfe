#include "attention/attention_check.h"

#include <vector>

namespace fastxattn {
namespace {

std::string at(const char* name, int64_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; }

struct Side {
  const char *cu_name, *used_name, *index_name;
  const int32_t *cu, *used, *index;
  int64_t slots, rows;
};

struct Walk {
  bool every_row = false;
  bool repeated = false;
};

std::string check_side(const Side& side, int64_t batch, Walk& walk) {
  const int32_t* cu = side.cu;
  if (cu[0] != 0) return std::string(side.cu_name) + " must start at 0, got " + std::to_string(cu[0]);
  int64_t in_use = 0;
  for (int64_t b = 0; b < batch; ++b) {
    if (cu[b + 1] < cu[b]) {
      return std::string(side.cu_name) + " must not decrease: " + at(side.cu_name, b + 1) + " = " +
             std::to_string(cu[b + 1]) + " after " + std::to_string(cu[b]);
    }
    const int64_t length = cu[b + 1] - cu[b];
    if (side.used && (side.used[b] < 0 || side.used[b] > length)) {
      return at(side.used_name, b) + " = " + std::to_string(side.used[b]) + " is outside 0.." + std::to_string(length);
    }
    in_use += side.used ? side.used[b] : length;
  }
  if (cu[batch] > side.slots) {
    return std::string(side.cu_name) + " ends at " + std::to_string(cu[batch]) + ", past the data's " +
           std::to_string(side.slots);
  }
  if (side.index == nullptr) {
    walk.every_row = in_use == side.rows;
    return {};
  }
  std::vector<bool> seen(static_cast<size_t>(side.rows), false);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t end = side.used ? cu[b] + side.used[b] : cu[b + 1];
    for (int64_t slot = cu[b]; slot < end; ++slot) {
      const int64_t row = side.index[slot];
      if (row < 0 || row >= side.rows) {
        return at(side.index_name, slot) + " = " + std::to_string(row) + " is outside 0.." +
               std::to_string(side.rows - 1);
      }
      walk.repeated |= seen[static_cast<size_t>(row)];
      seen[static_cast<size_t>(row)] = true;
    }
  }
  walk.every_row = !walk.repeated && in_use == side.rows;
  return {};
}

}  // namespace

std::string check_attention_content(const AttentionParams& p, AttentionContent& content) {
  Walk queries, keys;
  std::string fault = check_side(
      {"cu_seqlens_q", "seqused_q", "query_index", p.cu_q, p.used_q, p.index_q, p.slots_q, p.rows_q}, p.batch, queries);
  if (!fault.empty()) return fault;
  if (queries.repeated) return "query_index must not name a row twice";
  fault = check_side({"cu_seqlens_k", "seqused_k", "key_index", p.cu_k, p.used_k, p.index_k, p.slots_k, p.rows_k},
                     p.batch, keys);
  if (!fault.empty()) return fault;
  if (p.bias != nullptr) {
    for (int64_t b = 0; b < p.batch; ++b) {
      // A row's place in its sequence indexes the bias.
      const Sequence s = sequence_of(p, b);
      for (int64_t i = 0; p.bias_size[2] > 1 && i < s.queries; ++i) {
        const int64_t place = query_row_of(p, s.first_q + i) - s.first_q;
        if (place < 0 || place >= p.bias_size[2]) return "bias has too few query rows for the sequences";
      }
      for (int64_t i = 0; p.bias_size[3] > 1 && i < s.keys; ++i) {
        const int64_t place = key_row_of(p, s.first_k + i) - s.first_k;
        if (place < 0 || place >= p.bias_size[3]) return "bias has too few key rows for the sequences";
      }
    }
  }
  content.every_query_row = queries.every_row;
  content.every_key_row = keys.every_row;
  content.repeated_keys = keys.repeated;
  return {};
}

std::string check_attention_ranges(const AttentionParams& p) {
  if (p.kv_range == nullptr) return {};
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = sequence_of(p, b);
    for (int64_t i = 0; i < s.queries; ++i) {
      const int64_t row = query_row_of(p, s.first_q + i);
      const int64_t begin = p.kv_range[2 * row], end = p.kv_range[2 * row + 1];
      if (begin >= 0 && begin <= end && end <= s.keys) continue;
      return "kv_range must satisfy 0 <= start <= end <= the keys of the sequence, " + std::to_string(s.keys) +
             "; got [" + std::to_string(begin) + ", " + std::to_string(end) + ") at query row " + std::to_string(row);
    }
  }
  return {};
}

}  // namespace fastxattn
