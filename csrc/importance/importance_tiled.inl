// Score tiles S[key][query lane], summed along the lanes.
//
// A key's sum lives in one vector until the end, so a lane adds queries i, i + W, ... in order, whatever the number of
// threads.
#pragma once

#include "importance/importance_lanes.inl"

namespace fastxattn::FXA_ISA {

template <bool exact, bool given>
static void add_all_weights(const float* scores, int64_t keys, int64_t width, float c, const float* lse,
                            const float* weight, float* sums) {
  int64_t i = 0;
  for (; i + 4 * W <= width; i += 4 * W) {
    add_weights<exact, given, 1, 4>(scores + i, keys, kLaneBlock, c, lse + i, weight + i, true, sums, W);
  }
  for (; i < width; i += W) {
    add_weights<exact, given, 4, 1>(scores + i, keys, kLaneBlock, c, lse + i, weight + i, true, sums, W);
  }
}

// A tile of products. Apart from its caller, which would leave the inner loop short of registers.
template <class E>
__attribute__((noinline)) static void score_tile(int64_t keys, int64_t width, int64_t depth, const E* key,
                                                 int64_t key_ld, const E* queries, float* scores, int64_t deepest,
                                                 RowPrefetch<false>& next) {
  gemm_deep<E, AOrder::rows>(
      keys, width, depth, key, key_ld, queries, kLaneBlock, scores, kLaneBlock, [&] { next(); }, deepest);
}

// One query head against the keys that lie at `keys`.
template <class T>
static void sum_head(const ImportanceParams& params, const ImportanceItem& item, const Sequence& sequence, int64_t head,
                     const Element<T>* key, int64_t key_ld, RowPrefetch<false>& next, const ImportanceScratch<T>& s) {
  using E = Element<T>;
  constexpr bool exact = sizeof(T) == 4;
  const AttentionParams& p = params.attention;
  const int64_t keys = item.key_end - item.key_begin, depth = elements<T>(p.head_dim);
  const int64_t kv_head = head / p.group(), member = head % p.group();
  const bool transform = needs_transform(p);
  const float c = transform ? 1.0f : p.scale;
  const auto add = params.row_weight != nullptr ? add_all_weights<exact, true> : add_all_weights<exact, false>;
  clear(s.sums, keys * W);
  for (int64_t query = 0; query < sequence.queries; query += kLaneBlock) {
    Lanes lanes{least(kLaneBlock, sequence.queries - query), 0, s.row, s.head, nullptr, nullptr, 0, 0, 0, 0};
    for (int64_t i = 0; i < lanes.count; ++i) {
      s.row[i] = query_row_of(p, sequence.first_q + query + i);
      s.head[i] = static_cast<int32_t>(member);
    }
    finish_importance_lanes<T>(params, sequence, head - member, s, lanes);
    if (!lanes.sees_any(item.key_begin, item.key_end)) continue;
    pack_columns<T>(s.query_at, lanes.count, p.head_dim, s.queries, kLaneBlock);
    for (int64_t j = 0; j < keys; j += kImportanceKeys) {
      const int64_t first = item.key_begin + j, n = least(kImportanceKeys, keys - j);
      if (!lanes.sees_any(first, first + n)) continue;
      // As in attention's backward pass: the few products of a row probe are summed in short pieces.
      score_tile<E>(n, lanes.width, depth, key + j * key_ld, key_ld, s.queries, s.scores,
                    exact && lanes.width <= 32 ? 32 : kDeepest, next);
      const bool masked = !lanes.sees_all(first, first + n);
      if (transform || masked) {
        if (s.extra != nullptr) {
          gather_bias(p, item.sequence, sequence, kv_head, lanes, s.key_row + j, n, s.extra, kLaneBlock);
        }
        adjust_scores(p, s.scores, n, kLaneBlock, transform, s.extra, nullptr, masked, lanes, first);
      }
      add(s.scores, n, lanes.width, c, s.lse, s.weight, s.sums + j * W);
    }
  }
  float* score = params.score + head * p.slots_k + sequence.first_k + item.key_begin;
  for (int64_t j = 0; j < keys; j += W) {
    vf sum[W];
    for (int64_t i = 0; i < W; ++i) sum[i] = load(s.sums + least(j + i, keys - 1) * W);
    store_first(score + j, sum_each(sum), static_cast<int>(least(W, keys - j)));
  }
}

template <class T>
static void importance_tiled(const ImportanceParams& params, const ImportanceItem& item,
                             const ImportanceScratch<T>& s) {
  const AttentionParams& p = params.attention;
  const Sequence sequence = sequence_of(p, item.sequence);
  const int64_t keys = item.key_end - item.key_begin, group = p.group();
  const int64_t size = static_cast<int64_t>(sizeof(T));
  // Evenly over the first block of queries: a call for every tile of rows and columns.
  const int64_t strips = (least(sequence.queries, kLaneBlock) + kMaxN * W - 1) / (kMaxN * W);
  const int64_t rows_per_call = most(1, kTileRows[kMaxN] / strips);
  for (int64_t kv_head = item.head_begin; kv_head < item.head_end; ++kv_head) {
    locate_keys<T>(p, sequence, kv_head, item.key_begin, keys, s);
    const Element<T>* key = s.keys;
    int64_t key_ld = s.key_ld;
    bool copied = true;
    if constexpr (__is_same(T, float)) {
      // A single block of queries does not pay for a copy.
      if (p.index_k == nullptr && sequence.queries <= kLaneBlock) {
        key = s.key_at[0];
        key_ld = p.key_row;
        copied = false;
      }
    }
    if (copied) pack_rows<T>(s.key_at, keys, p.head_dim, s.keys, s.key_ld);
    // The next head's rows: lying far apart, they are nothing that the processor's own prefetchers follow.
    RowPrefetch<false> next{reinterpret_cast<const void* const*>(s.key_at), kv_head + 1 < item.head_end ? keys : 0,
                            p.head_dim * size, p.key_head * size, rows_per_call};
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      sum_head<T>(params, item, sequence, head, key, key_ld, next, s);
    }
  }
}

}  // namespace fastxattn::FXA_ISA
