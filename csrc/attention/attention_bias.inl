// Gradient of the 4-D bias: a second pass that recomputes the score gradients and sums them over the axes along
// which the bias broadcasts. One thread owns a region of the result and walks the summed axes in order.
#pragma once

#include "attention/attention_backward_tile.inl"

namespace fastxattn::FXA_ISA {

// The next lanes of a sequence whose place lies in the item's range, from slot `slot` on; at most kBackwardLanes.
static Lanes collect_lanes(const AttentionParams& p, const Sequence& sequence, const BiasItem& item, int64_t& slot,
                           int64_t* row, int64_t* number, int32_t* head, int32_t* begin, int32_t* end) {
  const int64_t group = p.group();
  Lanes lanes{0, 0, row, head, nullptr, nullptr, 0, 0, 0, 0};
  for (; slot < sequence.queries && lanes.count + group <= kBackwardLanes; ++slot) {
    const int64_t r = query_row_of(p, sequence.first_q + slot), place = r - sequence.first_q;
    if (p.bias_size[2] > 1 && (place < item.place_begin || place >= item.place_end)) continue;
    for (int64_t member = 0; member < group; ++member, ++lanes.count) {
      row[lanes.count] = r;
      number[lanes.count] = slot * group + member;
      head[lanes.count] = static_cast<int32_t>(member);
    }
  }
  finish_lanes(p, sequence, begin, end, lanes);
  return lanes;
}

// sums += dS, at the bias's own indices.
static void add_bias(const AttentionParams& p, int64_t b, const Sequence& sequence, int64_t kv_head, const Lanes& lanes,
                     const int64_t* key_rows, int64_t keys, const float* dscores, float* sums) {
  const int64_t* n = p.bias_size;
  for (int64_t i = 0; i < lanes.count; ++i) {
    const int64_t head = kv_head * p.group() + lanes.head[i];
    const int64_t ib = n[0] > 1 ? b : 0, ih = n[1] > 1 ? head : 0;
    const int64_t iq = n[2] > 1 ? lanes.row[i] - sequence.first_q : 0;
    float* at = sums + ((ib * n[1] + ih) * n[2] + iq) * n[3];
    for (int64_t j = 0; j < keys; ++j) {
      at[n[3] > 1 ? key_rows[j] - sequence.first_k : 0] += dscores[j * lanes.width + i];
    }
  }
}

template <class T>
static void bias_item(const AttentionParams& p, const AttentionGradients& g, const BiasItem& item, const int64_t* delta,
                      const float* workspace, float* sums, Arena arena) {
  const BackwardScratch<T> s(p, arena, kBackwardLanes, kKeyBlock, 1);
  for (int64_t b = item.batch_begin; b < item.batch_end; ++b) {
    const Sequence sequence = sequence_of(p, b);
    if (sequence.keys == 0) continue;
    for (int64_t head = item.head_begin; head < item.head_end; ++head) {
      for (int64_t slot = 0; slot < sequence.queries;) {
        const Lanes all = collect_lanes(p, sequence, item, slot, s.row, s.lane, s.head, s.begin, s.end);
        if (all.count == 0) break;
        load_lanes<T>(p, g, head, sequence.keys, all, s);
        if (kSumsDelta<T> && delta[b] >= 0) {
          finish_delta<T>(p, head, all, workspace + delta[b], sequence.queries * p.group(), s);
        }
        for (int64_t k = 0; k < sequence.keys; k += kKeyBlock) {
          const int64_t keys = least(kKeyBlock, sequence.keys - k);
          if (!all.sees_any(k, k + keys)) continue;
          load_keys<T>(p, sequence, head, k, keys, s);
          for (int64_t at = 0; at < all.count; at += kLaneBlock) {
            const Lanes lanes = all.slice(at, kLaneBlock);
            if (!lanes.sees_any(k, k + keys)) continue;
            const bool masked = !lanes.sees_all(k, k + keys);
            tile_of_weights<T>(p, g, b, sequence, head, lanes, at, k, keys, s);
            normalise_weights(lanes, at, keys, s);
            tile_dscores<T>(lanes, at, k, keys, masked, s);
            add_bias(p, b, sequence, head, lanes, s.key_row, keys, s.dscores, sums);
          }
        }
      }
    }
  }
}

}  // namespace fastxattn::FXA_ISA
