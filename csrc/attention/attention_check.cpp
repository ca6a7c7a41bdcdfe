#include "attention/attention_check.h"

#include <string>
#include <vector>

#include "core/arguments.h"

namespace fastxattn {
namespace {

struct Side {
  const char *cu_name, *used_name, *index_name;
  const int32_t *cu, *used, *index;
  int64_t slots, rows;
};

struct Found {
  bool every_row = false;
  bool repeated = false;
};

Found check_side(const Side& side, int64_t batch) {
  const int32_t* cu = side.cu;
  require(cu[0] == 0, side.cu_name, " must start at 0; got ", cu[0]);
  int64_t in_use = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = int64_t{cu[b + 1]} - cu[b];
    require(length >= 0, side.cu_name, " must not decrease; got ", cu[b], " then ", cu[b + 1], " at sequence ", b);
    const int64_t used = side.used ? side.used[b] : length;
    require(used >= 0 && used <= length, side.used_name, " must lie between 0 and the sequence's length, ", length,
            "; got ", used, " at sequence ", b);
    in_use += used;
  }
  require(cu[batch] <= side.slots, side.cu_name, " must end within the ", side.slots,
          side.index ? " entries of " : " tokens", side.index ? side.index_name : "", "; got ", cu[batch]);
  if (side.index == nullptr) return {in_use == side.rows, false};
  std::vector<bool> seen(static_cast<size_t>(side.rows), false);
  bool repeated = false;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t end = side.used ? cu[b] + side.used[b] : cu[b + 1];
    for (int64_t slot = cu[b]; slot < end; ++slot) {
      const int64_t row = side.index[slot];
      require(row >= 0 && row < side.rows, side.index_name, " must lie between 0 and ", side.rows - 1, "; got ", row);
      repeated |= seen[static_cast<size_t>(row)];
      seen[static_cast<size_t>(row)] = true;
    }
  }
  return {!repeated && in_use == side.rows, repeated};
}

}  // namespace

AttentionContent check_attention_content(const AttentionParams& p) {
  const Found queries = check_side(
      {"cu_seqlens_q", "seqused_q", "query_index", p.cu_q, p.used_q, p.index_q, p.slots_q, p.rows_q}, p.batch);
  require(!queries.repeated, "query_index must name each query token at most once; got one twice");
  const Found keys =
      check_side({"cu_seqlens_k", "seqused_k", "key_index", p.cu_k, p.used_k, p.index_k, p.slots_k, p.rows_k}, p.batch);
  for (int64_t b = 0; p.bias != nullptr && b < p.batch; ++b) {
    // A row's place in its sequence indexes the bias.
    const Sequence s = sequence_of(p, b);
    const auto check_place = [&](int axis, int64_t place) {
      require(place >= 0 && place < p.bias_size[axis], "axis ", axis,
              " of bias must be 1 or hold every token of a sequence, up to ", place + 1, "; got ", p.bias_size[axis]);
    };
    for (int64_t i = 0; p.bias_size[2] > 1 && i < s.queries; ++i)
      check_place(2, query_row_of(p, s.first_q + i) - s.first_q);
    for (int64_t i = 0; p.bias_size[3] > 1 && i < s.keys; ++i) check_place(3, key_row_of(p, s.first_k + i) - s.first_k);
  }
  return {queries.every_row, keys.every_row, keys.repeated};
}

void check_attention_ranges(const AttentionParams& p) {
  if (p.kv_range == nullptr) return;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = sequence_of(p, b);
    for (int64_t i = 0; i < s.queries; ++i) {
      const int64_t row = query_row_of(p, s.first_q + i);
      const int64_t begin = p.kv_range[2 * row], end = p.kv_range[2 * row + 1];
      require(begin >= 0 && begin <= end && end <= s.keys,
              "kv_range must satisfy 0 <= start <= end <= the keys of the sequence, ", s.keys, "; got [", begin, ", ",
              end, ") at query row ", row);
    }
  }
}

}  // namespace fastxattn
