// A handful of query rows (the row probe): reading the keys is what takes the time, so whole rows of them, all heads,
// are read once, in the order they lie, as attention_few.inl does. A tile is S[key][lane], lane = query * heads + head,
// so that adding up the queries of a head is vertical.
#pragma once

#include "importance/importance_lanes.inl"

namespace fastxattn::FXA_ISA {

inline constexpr int64_t kFewBytes = 96 << 10;  // of keys in a tile: this and the next stay in the second-level cache

// sums[j][h] = the sum over queries, in place of the first query's lanes: vectors go from left to right and overwrite
// only what has been read.
static void add_queries(float* weights, int64_t keys, int64_t ld, int64_t heads, int64_t queries) {
  for (int64_t j = 0; j < keys; ++j, weights += ld) {
    for (int64_t h = 0; h < heads; h += W) {
      vf sum = load(weights + h);
      for (int64_t q = 1; q < queries; ++q) sum = sum + load(weights + q * heads + h);
      store(weights + h, sum);
    }
  }
}

// Asks for the next tile's rows, all heads of the item: asked for at once, they come at the memory's full rate, while
// the products alone leave it idle between one row and the next.
template <class T>
static void touch_rows(const AttentionParams& p, const ImportanceItem& item, const T* const* rows, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t head = item.head_begin; head < item.head_end; ++head) {
      const char* at = reinterpret_cast<const char*>(rows[j] + head * p.key_head);
      for (int64_t b = 0; b < p.head_dim * static_cast<int64_t>(sizeof(T)); b += 64) __builtin_prefetch(at + b, 0, 2);
    }
  }
}

template <class T>
static void importance_few(const ImportanceParams& params, const ImportanceItem& item, const ImportanceScratch<T>& s) {
  constexpr bool exact = sizeof(T) == 4;
  const AttentionParams& p = params.attention;
  const Sequence sequence = sequence_of(p, item.sequence);
  const int64_t group = p.group(), first_head = item.head_begin * group;
  const int64_t heads = (item.head_end - item.head_begin) * group;
  // `head` holds absolute heads, so below the head base is 0.
  Lanes lanes{sequence.queries * heads, 0, s.row, s.head, nullptr, nullptr, 0, 0, 0, 0};
  for (int64_t i = 0; i < lanes.count; ++i) {
    s.row[i] = query_row_of(p, sequence.first_q + i / heads);
    s.head[i] = static_cast<int32_t>(first_head + i % heads);
    s.key_from[i] = s.head[i] / group * p.key_head;
  }
  finish_importance_lanes<T>(params, sequence, 0, s, lanes);
  const int64_t ld = lanes.width;
  pack_rows<T>(s.query_at, lanes.count, p.head_dim, s.queries, s.key_ld);
  clear(s.scores, kFewKeys * ld + W);
  alignas(64) float ones[kLaneBlock];
  for (int64_t i = 0; i < kLaneBlock; i += W) store(ones + i, splat(1.0f));
  const bool transform = needs_transform(p);
  const float c = transform ? 1.0f : p.scale;
  const auto weigh = params.row_weight != nullptr ? add_weights<exact, true, 4, 1> : add_weights<exact, false, 4, 1>;

  const int64_t key_end = lanes.begin == nullptr ? item.key_end : least(item.key_end, lanes.last);
  const int64_t whole = key_end - item.key_begin, row_bytes = p.head_dim * static_cast<int64_t>(sizeof(T));
  locate_keys<T>(p, sequence, 0, item.key_begin, whole, s);
  const int64_t tile = most(W, least(kFewKeys, kFewBytes / ((item.head_end - item.head_begin) * row_bytes) / W * W));
  for (int64_t at = 0; at < whole; at += tile) {
    const int64_t k = item.key_begin + at, keys = least(tile, whole - at);
    if (lanes.sees_any(k + keys, k + keys + tile))
      touch_rows(p, item, s.key_at + at + keys, least(tile, whole - at - keys));
    if (!lanes.sees_any(k, k + keys)) continue;
    const bool masked = !lanes.sees_all(k, k + keys);
    score_rows<Element<T>>(s.queries, s.key_ld, s.key_at + at, keys, s.key_from, lanes.count, p.head_dim, s.scores, ld);
    if (transform || masked) {
      if (s.extra != nullptr) gather_bias(p, item.sequence, sequence, 0, lanes, s.key_row + at, keys, s.extra, ld);
      adjust_scores(p, s.scores, keys, ld, transform, s.extra, nullptr, masked, lanes, k);
    }
    for (int64_t i = 0; i < ld; i += W) {
      weigh(s.scores + i, keys, ld, c, s.lse + i, s.weight + i, false, s.scores + i, ld);
    }
    if (sequence.queries > 1) add_queries(s.scores, keys, ld, heads, sequence.queries);
    for (int64_t h = 0; h < heads; ++h) {
      s.score_at[h] = params.score + (first_head + h) * p.slots_k + sequence.first_k + k;
    }
    unpack_columns<float>(s.scores, ld, ones, s.score_at, heads, keys);
  }
}

}  // namespace fastxattn::FXA_ISA
