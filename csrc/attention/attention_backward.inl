// Backward: scores are recomputed from lse, a panel of keys and a block of lanes at a time, for everything at once.
//
//   dV[key][:] += P^T dO      dK[key][:] += dS^T Q      dQ^T[:][lane] += K^T dS^T
//
// Where delta is summed (attention_backward_tile.inl), P and dP of all keys are kept until it is known; of sequences
// too long for that, it is summed beforehand (sum_item).
#pragma once

#include "attention/attention_backward_tile.inl"

namespace fastxattn::FXA_ISA {

// A float tile as the operands of the bf16 products: pairs along lanes, and (unless null) pairs along keys.
template <class T>
static void pair_tile([[maybe_unused]] const float* tile, [[maybe_unused]] int64_t keys, [[maybe_unused]] int64_t width,
                      [[maybe_unused]] Element<T>* rows, [[maybe_unused]] Element<T>* pairs) {
#if defined(FXA_HAS_BF16_DOT)
  if constexpr (Operand<T>::kPair == 2) {
    bf16_t* along_lanes = reinterpret_cast<bf16_t*>(rows);
    float* along_keys = reinterpret_cast<float*>(pairs);
    for (int64_t j = 0; j < keys; j += 2) {
      for (int64_t i = 0; i < width; i += W) {
        const vf a = load(tile + j * width + i);
        const vf b = j + 1 < keys ? load(tile + (j + 1) * width + i) : zero();
        if (rows != nullptr) {
          store_from_f32(along_lanes + j * width + i, a);
          if (j + 1 < keys) store_from_f32(along_lanes + (j + 1) * width + i, b);
        }
        if (pairs != nullptr) store(along_keys + j / 2 * width + i, pair_bf16(a, b));
      }
    }
  }
#endif
}

// acc[key][c] += sum over lanes of tile[key][lane] rows[lane][c], skipping lanes that do not see the key (whose row may
// hold NaN or infinity). The tile is read as the product reads it.
template <class T>
static void accumulate_seen_rows(const float* tile, const Element<T>* rows, int64_t ld, float* acc, int64_t columns,
                                 int64_t keys, int64_t key_begin, const Lanes& lanes) {
  for (int64_t j = 0; j < keys; ++j) {
    for (int64_t i = 0; i < lanes.count; ++i) {
      if (!lanes.sees(i, key_begin + j)) continue;
      for (int64_t c = 0; c < columns; ++c) acc[j * ld + c] += tile[j * lanes.width + i] * value_at(rows, ld, i, c);
    }
  }
}

// acc[c][lane] += sum over keys of pairs[key][c] tile[key][lane], skipping keys that a lane does not see.
template <class T>
static void accumulate_seen_keys(const float* tile, const Element<T>* pairs, int64_t pairs_ld, float* acc,
                                 int64_t columns, int64_t keys, int64_t key_begin, const Lanes& lanes) {
  for (int64_t j = 0; j < keys; ++j) {
    for (int64_t i = 0; i < lanes.count; ++i) {
      if (!lanes.sees(i, key_begin + j)) continue;
      for (int64_t c = 0; c < columns; ++c) {
        acc[c * lanes.width + i] += tile[j * lanes.width + i] * value_at(pairs, pairs_ld, j, c);
      }
    }
  }
}

// sums[h][key] += sum over the lanes of head h (or of all heads) of dS.
static void add_key_bias(const float* dscores, int64_t keys, const Lanes& lanes, bool by_head, float* sums,
                         int64_t stride) {
  for (int64_t j = 0; j < keys; ++j) {
    if (by_head) {
      for (int64_t i = 0; i < lanes.count; ++i) sums[lanes.head[i] * stride + j] += dscores[j * lanes.width + i];
    } else {
      vf sum = zero();
      for (int64_t i = 0; i < lanes.width; i += W) sum = sum + load(dscores + j * lanes.width + i);
      sums[j] += reduce_add(sum);
    }
  }
}

// One tile of weights and their gradients: adds its share to the accumulators of keys, values and queries.
template <class T>
static void backward_tile(const AttentionParams& p, const AttentionGradients& g, const Sequence& sequence,
                          int64_t kv_head, const Lanes& lanes, int64_t at, int64_t key_begin, int64_t keys,
                          float* acc_key, float* acc_value, float* key_bias, const BackwardScratch<T>& s) {
  using E = Element<T>;
  constexpr int64_t P = Operand<T>::kPair;
  const int64_t ld = lanes.width;
  const bool masked = !lanes.sees_all(key_begin, key_begin + keys);
  const bool need_key = g.grad_key != nullptr, need_query = g.grad_query != nullptr;
  const E* query_rows = s.query_rows + at / P * s.wide_key;
  const E* grad_rows = s.grad_rows + at / P * s.wide_value;

  normalise_weights(lanes, at, keys, s);
  if (g.needs_scores()) {
    tile_dscores<T>(lanes, at, key_begin, keys, masked, s);
    if (key_bias != nullptr) {
      const int64_t group = p.group();
      float* sums = key_bias + (g.key_bias_has_heads ? kv_head * group : kv_head) * sequence.keys + key_begin;
      add_key_bias(s.dscores, keys, lanes, g.key_bias_has_heads, sums, sequence.keys);
    }
    uncap_dscores(keys * ld, s);
    pair_tile<T>(s.dscores, keys, ld, need_key ? s.rows_dscores : nullptr, need_query ? s.pairs_dscores : nullptr);
    if (need_key) {
      if (masked && !all_finite(query_rows, ld / P * s.wide_key)) {
        accumulate_seen_rows<T>(s.dscores, query_rows, s.wide_key, acc_key, p.head_dim, keys, key_begin, lanes);
      } else {
        gemm<E, AOrder::rows, Init::add>(keys, s.wide_key, ld / P, s.rows_dscores, ld / P, query_rows, s.wide_key,
                                         acc_key, s.wide_key);
      }
    }
    if (need_query) {
      float* acc = s.acc_query + at * p.head_dim;
      if (masked && !all_finite(s.key_pairs, elements<T>(keys) * s.wide_key)) {
        accumulate_seen_keys<T>(s.dscores, s.key_pairs, s.wide_key, acc, p.head_dim, keys, key_begin, lanes);
      } else {
        gemm<E, AOrder::columns, Init::add>(p.head_dim, ld, elements<T>(keys), s.key_pairs, s.wide_key, s.pairs_dscores,
                                            ld, acc, ld);
      }
    }
  }
  if (g.grad_value != nullptr) {
    if (p.dropout_p > 0.0f) drop_weights<float>(p, kv_head, lanes, key_begin, keys, s.scores, ld);
    pair_tile<T>(s.scores, keys, ld, s.rows_weights, nullptr);
    if (masked && !all_finite(grad_rows, ld / P * s.wide_value)) {
      accumulate_seen_rows<T>(s.scores, grad_rows, s.wide_value, acc_value, p.value_dim, keys, key_begin, lanes);
    } else {
      gemm<E, AOrder::rows, Init::add>(keys, s.wide_value, ld / P, s.rows_weights, ld / P, grad_rows, s.wide_value,
                                       acc_value, s.wide_value);
    }
  }
}

// Writes the gradients of a panel of keys: to the outputs, or as partial sums (unscaled).
template <class T>
static void write_keys(const AttentionParams& p, const AttentionGradients& g, const Sequence& sequence, int64_t kv_head,
                       int64_t key_begin, int64_t keys, const float* acc_key, const float* acc_value, float* partial,
                       const BackwardScratch<T>& s) {
  const float keep = p.dropout_p < 1.0f ? 1.0f / (1.0f - p.dropout_p) : 0.0f;
  for (int64_t j = 0; j < keys; ++j) {
    if (partial != nullptr) {
      float* to = partial + (kv_head * sequence.keys + key_begin + j) * (p.head_dim + p.value_dim);
      write_row(acc_key + j * s.wide_key, p.scale, to, p.head_dim);
      write_row(acc_value + j * s.wide_value, keep, to + p.head_dim, p.value_dim);
      continue;
    }
    const int64_t at = key_row_of(p, sequence.first_k + key_begin + j) * p.kv_heads + kv_head;
    if (g.grad_key)
      write_row(acc_key + j * s.wide_key, p.scale, static_cast<T*>(g.grad_key) + at * p.head_dim, p.head_dim);
    if (g.grad_value) {
      write_row(acc_value + j * s.wide_value, keep, static_cast<T*>(g.grad_value) + at * p.value_dim, p.value_dim);
    }
  }
}

template <class T>
static void write_queries(const AttentionParams& p, const AttentionGradients& g, int64_t kv_head, const Lanes& lanes,
                          int64_t lane_begin, int64_t sequence_lanes, float* partial, const BackwardScratch<T>& s) {
  for (int64_t i = 0; i < kLaneBlock; i += W) store(s.factor + i, splat(p.scale));
  for (int64_t at = 0; at < lanes.count; at += kLaneBlock) {
    const int64_t n = least(kLaneBlock, lanes.count - at), width = round_up(n, W);
    const float* acc = s.acc_query + at * p.head_dim;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t lane = lane_begin + at + i, head = kv_head * p.group() + lanes.head[at + i];
      if (partial != nullptr) {
        s.partial_to[i] = partial + (kv_head * sequence_lanes + lane) * p.head_dim;
      } else {
        s.to[i] = static_cast<T*>(g.grad_query) + (lanes.row[at + i] * p.heads + head) * p.head_dim;
      }
    }
    if (partial != nullptr) {
      unpack_columns<float>(acc, width, s.factor, s.partial_to, n, p.head_dim);
    } else {
      unpack_columns<T>(acc, width, s.factor, s.to, n, p.head_dim);
    }
  }
}

// What an item keeps at once.
struct Holding {
  bool tiles_held;  // P and dP of all its keys
  int64_t step;     // lanes taken at a time
  int64_t lanes, keys, tiles;

  Holding(bool sums_delta, const BackwardItem& item) {
    const int64_t count = item.lane_end - item.lane_begin, all_keys = item.key_end - item.key_begin;
    const int64_t panels = (all_keys + kKeyBlock - 1) / kKeyBlock;
    tiles_held = sums_delta && item.delta < 0;
    step = kBackwardLanes;
    if (tiles_held) step = least(most(kHeldTiles / panels, 1) * kLaneBlock, kBackwardLanes);
    // Beside a single panel of keys, which stays packed, a block at a time keeps its tile in the nearest cache.
    if (tiles_held && panels == 1) step = kLaneBlock;
    lanes = round_up(least(count, step), kLaneBlock);
    // With more lanes than are held at once, the keys' sums wait in memory from one batch of lanes to the next.
    keys = count > step ? all_keys : kKeyBlock;
    tiles = tiles_held ? panels * (lanes / kLaneBlock) : 1;
  }
};

// A batch of lanes of one head, loaded and cut into blocks.
struct LaneBatch {
  Lanes all;
  Lanes block[kBackwardLanes / kLaneBlock];

  template <class T>
  LaneBatch(const AttentionParams& p, const AttentionGradients& g, const Sequence& sequence, int64_t head,
            int64_t first, int64_t last, const BackwardScratch<T>& s)
      : all(make_lanes(p, sequence, first, last, s.row, s.head, s.begin, s.end)) {
    load_lanes<T>(p, g, head, sequence.keys, all, s);
    for (int64_t i = 0; i < all.count; ++i) s.lane[i] = first + i;
    for (int64_t at = 0; at < all.count; at += kLaneBlock) block[at / kLaneBlock] = all.slice(at, kLaneBlock);
  }
};

// Asks for the rows of lanes that come next: rows of one head lie far apart, which the processor does not foresee.
template <class T>
static void prefetch_lanes(const AttentionParams& p, const AttentionGradients& g, const Sequence& sequence,
                           int64_t kv_head, int64_t first, int64_t last) {
  const int64_t group = p.group();
  int64_t query = first / group, member = first % group;
  for (int64_t lane = first; lane < last; ++lane) {
    const int64_t row = query_row_of(p, sequence.first_q + query), head = kv_head * group + member;
    PanelPrefetch<T>::touch(static_cast<const T*>(p.query) + row * p.query_row + head * p.query_head, p.head_dim);
    PanelPrefetch<T>::touch(static_cast<const T*>(g.grad_out) + row * g.grad_out_row + head * g.grad_out_head,
                            p.value_dim);
    if (++member == group) member = 0, ++query;
  }
}

// P and dP of a batch against an item's keys, summed to delta and total; tiles are kept when `held`, and panels of keys
// are packed when `reload`.
template <class T>
static void sum_batch(const AttentionParams& p, const AttentionGradients& g, const BackwardItem& item,
                      const Sequence& sequence, int64_t head, const LaneBatch& batch, bool held, bool reload,
                      const BackwardScratch<T>& s) {
  int64_t tile = 0;
  for (int64_t k = item.key_begin; k < item.key_end; k += kKeyBlock) {
    const int64_t keys = least(kKeyBlock, item.key_end - k);
    const bool any = batch.all.sees_any(k, k + keys);
    if (any && reload) load_keys<T>(p, sequence, head, k, keys, s);
    for (int64_t at = 0; at < batch.all.count; at += kLaneBlock, ++tile) {
      const Lanes& lanes = batch.block[at / kLaneBlock];
      if (!any || !lanes.sees_any(k, k + keys)) continue;
      const BackwardScratch<T> t = s.tile(held ? tile : 0);
      tile_of_weights<T>(p, g, item.sequence, sequence, head, lanes, at, k, keys, t);
      sum_delta(t.scores, g.needs_scores() ? t.dscores : nullptr, lanes, k, keys, !lanes.sees_all(k, k + keys),
                s.delta + at, s.total + at);
    }
  }
}

// Delta of sequences too long to hold their tiles: each item's share, to be merged over the key chunks.
template <class T>
static void sum_item(const AttentionParams& p, const AttentionGradients& g, const BackwardItem& item, float* workspace,
                     Arena arena) {
  const Sequence sequence = sequence_of(p, item.sequence);
  const Holding hold(kSumsDelta<T>, item);
  const BackwardScratch<T> s(p, arena, hold.lanes, hold.keys, hold.tiles);
  const int64_t sequence_lanes = sequence.queries * p.group();
  for (int64_t head = item.head_begin; head < item.head_end; ++head) {
    float* delta = workspace + item.delta_partial + head * sequence_lanes;
    float* total = delta + p.kv_heads * sequence_lanes;
    for (int64_t first = item.lane_begin; first < item.lane_end; first += hold.step) {
      const LaneBatch batch(p, g, sequence, head, first, least(first + hold.step, item.lane_end), s);
      sum_batch<T>(p, g, item, sequence, head, batch, false, true, s);
      for (int64_t i = 0; i < batch.all.count; ++i) delta[first + i] = s.delta[i], total[first + i] = s.total[i];
    }
  }
}

template <class T>
static void backward_item(const AttentionParams& p, const AttentionGradients& g, const BackwardItem& item,
                          float* workspace, Arena arena) {
  const Sequence sequence = sequence_of(p, item.sequence);
  const Holding hold(kSumsDelta<T>, item);
  const BackwardScratch<T> s(p, arena, hold.lanes, hold.keys, hold.tiles);
  const int64_t sequence_lanes = sequence.queries * p.group();
  const bool all_at_once = item.lane_end - item.lane_begin <= hold.step;
  const bool one_panel = item.key_end - item.key_begin <= kKeyBlock;
  float* query_partial = item.query_partial < 0 ? nullptr : workspace + item.query_partial;
  float* key_partial = item.key_partial < 0 ? nullptr : workspace + item.key_partial;
  float* key_bias = item.key_bias_partial < 0 ? nullptr : workspace + item.key_bias_partial;
  const float* beforehand = item.delta < 0 ? nullptr : workspace + item.delta;
  const bool need_keys = g.grad_key || g.grad_value;
  const int64_t bias_rows = g.key_bias_has_heads ? p.group() : 1;

  for (int64_t head = item.head_begin; head < item.head_end; ++head) {
    for (int64_t r = 0; key_bias != nullptr && r < bias_rows; ++r) {
      clear(key_bias + (head * bias_rows + r) * sequence.keys + item.key_begin, item.key_end - item.key_begin);
    }
    bool loaded = false;  // the only panel
    for (int64_t first = item.lane_begin; first < item.lane_end; first += hold.step) {
      const int64_t last = least(first + hold.step, item.lane_end);
      const LaneBatch batch(p, g, sequence, head, first, last, s);
      const Lanes& all = batch.all;
      if (g.grad_query) clear(s.acc_query, all.width * p.head_dim);
      prefetch_lanes<T>(p, g, sequence, head, last, least(last + kLaneBlock, item.lane_end));
      // A panel that no lane of the first batch sees is packed when one does.
      const bool packed = one_panel && loaded;
      if (hold.tiles_held) sum_batch<T>(p, g, item, sequence, head, batch, true, !packed, s);
      if (kSumsDelta<T>) finish_delta<T>(p, head, all, beforehand, sequence_lanes, s);

      int64_t tile = 0;
      for (int64_t k = item.key_begin; k < item.key_end; k += kKeyBlock) {
        const int64_t keys = least(kKeyBlock, item.key_end - k);
        float* acc_key = s.acc_key + (all_at_once ? 0 : (k - item.key_begin) * s.wide_key);
        float* acc_value = s.acc_value + (all_at_once ? 0 : (k - item.key_begin) * s.wide_value);
        if (first == item.lane_begin) {
          clear(acc_key, keys * s.wide_key);
          clear(acc_value, keys * s.wide_value);
        }
        const bool any = all.sees_any(k, k + keys);
        if (any && !packed && !(hold.tiles_held && one_panel)) load_keys<T>(p, sequence, head, k, keys, s);
        loaded |= any;
        for (int64_t at = 0; at < all.count; at += kLaneBlock, ++tile) {
          const Lanes& lanes = batch.block[at / kLaneBlock];
          if (!any || !lanes.sees_any(k, k + keys)) continue;
          const BackwardScratch<T> t = s.tile(hold.tiles_held ? tile : 0);
          if (!hold.tiles_held) tile_of_weights<T>(p, g, item.sequence, sequence, head, lanes, at, k, keys, t);
          backward_tile<T>(p, g, sequence, head, lanes, at, k, keys, acc_key, acc_value, key_bias, t);
        }
        if (need_keys && last == item.lane_end) {
          write_keys<T>(p, g, sequence, head, k, keys, acc_key, acc_value, key_partial, s);
        }
      }
      if (g.grad_query) write_queries<T>(p, g, head, all, first, sequence_lanes, query_partial, s);
    }
  }
}

}  // namespace fastxattn::FXA_ISA
