// Backward: scores are recomputed from lse, a panel of keys and a block of lanes at a time, one pass for everything.
//
//   P^T = exp(S^T - lse)      dP^T = V dO^T        dS^T = P^T (dP^T - delta + grad_lse),  delta = sum(dO * out)
//   dV[key][:] += P^T dO      dK[key][:] += dS^T Q      dQ^T[:][lane] += K^T dS^T
#pragma once

#include "attention/attention_forward.inl"

namespace fastxattn::FXA_ISA {

template <class T>
struct BackwardScratch {
  using E = Element<T>;
  int64_t depth, value_depth;     // elements of a query/key row, of a value/grad_out row
  int64_t key_ld, value_ld;       // the same, rounded up to W
  int64_t wide_key, wide_value;   // head_dim and value_dim rounded up to W
  E *keys, *key_pairs, *values;   // [key][key_ld]; [key / kPair][wide_key]; [key][value_ld]
  E *queries, *query_rows;        // per block: [depth][width]; [width / kPair][wide_key]
  E *grads, *grad_rows;           // per block: [value_depth][width]; [width / kPair][wide_value]
  float* acc_query;               // per block: [head_dim][width]
  float *acc_key, *acc_value;     // [key][wide_key], [key][wide_value]: of a panel, or of all keys of the item
  float *lse, *rest, *unrounded;  // per lane: lse, what rounding took from it, and e to minus that where it is small
  float *delta, *factor;          // per lane: delta - grad_lse
  float *scores, *dscores, *slope, *extra;  // [kKeyBlock][kLaneBlock]
  E *rows_weights, *rows_dscores;           // the same with pairs along lanes (floats: scores and dscores themselves)
  E* pairs_dscores;                         // the same with pairs along keys
  const T **query_at, **grad_at, **out_at, **key_at, **value_at;
  T** to;
  float** partial_to;
  int64_t *row, *key_row;
  int32_t *head, *begin, *end;

  // `lanes` and `keys`: the most query rows held at once, and keys accumulated at once.
  BackwardScratch(const AttentionParams& p, Arena& arena, int64_t lanes, int64_t keys_held) {
    constexpr int64_t P = Operand<T>::kPair;
    depth = elements<T>(p.head_dim), value_depth = elements<T>(p.value_dim);
    key_ld = round_up(depth, W), value_ld = round_up(value_depth, W);
    wide_key = round_up(p.head_dim, W), wide_value = round_up(p.value_dim, W);
    keys = arena.take<E>(kKeyBlock * key_ld);
    key_pairs = P == 1 ? keys : arena.take<E>(kKeyBlock / P * wide_key);
    values = arena.take<E>(kKeyBlock * value_ld);
    queries = arena.take<E>(lanes * depth);
    query_rows = arena.take<E>(lanes / P * wide_key);
    grads = arena.take<E>(lanes * value_depth);
    grad_rows = arena.take<E>(lanes / P * wide_value);
    acc_query = arena.take<float>(lanes * p.head_dim);
    acc_key = arena.take<float>(keys_held * wide_key);
    acc_value = arena.take<float>(keys_held * wide_value);
    lse = arena.take<float>(lanes);
    rest = arena.take<float>(lanes);
    unrounded = arena.take<float>(lanes);
    delta = arena.take<float>(lanes);
    factor = arena.take<float>(kLaneBlock);
    scores = arena.take<float>(kKeyBlock * kLaneBlock);
    dscores = arena.take<float>(kKeyBlock * kLaneBlock);
    slope = p.softcap > 0.0f ? arena.take<float>(kKeyBlock * kLaneBlock) : nullptr;
    extra = p.key_bias || p.bias ? arena.take<float>(kKeyBlock * kLaneBlock) : nullptr;
    rows_weights = P == 1 ? reinterpret_cast<E*>(scores) : arena.take<E>(kKeyBlock * kLaneBlock / P);
    rows_dscores = P == 1 ? reinterpret_cast<E*>(dscores) : arena.take<E>(kKeyBlock * kLaneBlock / P);
    pairs_dscores = P == 1 ? reinterpret_cast<E*>(dscores) : arena.take<E>(kKeyBlock * kLaneBlock / P);
    query_at = arena.take<const T*>(lanes);
    grad_at = arena.take<const T*>(lanes);
    out_at = arena.take<const T*>(lanes);
    key_at = arena.take<const T*>(kKeyBlock);
    value_at = arena.take<const T*>(kKeyBlock);
    to = arena.take<T*>(lanes);
    partial_to = arena.take<float*>(lanes);
    row = arena.take<int64_t>(lanes);
    key_row = arena.take<int64_t>(kKeyBlock);
    head = arena.take<int32_t>(lanes);
    begin = arena.take<int32_t>(lanes);
    end = arena.take<int32_t>(lanes);
  }
};

// Loads one head's lanes: query and grad_out panels, lse and delta.
template <class T>
static void load_lanes(const AttentionParams& p, const AttentionGradients& g, int64_t kv_head, const Lanes& lanes,
                       const BackwardScratch<T>& s) {
  constexpr int64_t P = Operand<T>::kPair;
  const int64_t head0 = kv_head * p.group();
  for (int64_t i = 0; i < lanes.width; ++i) {
    const int64_t row = lanes.row[i], head = head0 + lanes.head[i];
    const bool used = i < lanes.count;
    s.query_at[i] = used ? static_cast<const T*>(p.query) + row * p.query_row + head * p.query_head : nullptr;
    s.grad_at[i] = used ? static_cast<const T*>(g.grad_out) + row * g.grad_out_row + head * g.grad_out_head : nullptr;
    const T* out = static_cast<const T*>(p.out) + (row * p.heads + head) * p.value_dim;
    const double exact = p.lse_exact[head * p.rows_q + row];
    const float lse = static_cast<float>(exact);
    // Lanes that saw nothing, and lanes beyond the last, get weights exp(-inf) = 0.
    s.lse[i] = !used || lse == -__builtin_inff() ? __builtin_inff() : lse;
    // A rest of 1e-7 would vanish in a sum but not as a factor; that of an lse of 1e10 (additive masks) is hundreds.
    const float rest = exact - exact == 0.0 ? static_cast<float>(exact - lse) : 0.0f;
    const bool small = rest < 1e-4f && rest > -1e-4f;
    s.rest[i] = small ? 0.0f : rest;
    s.unrounded[i] = small ? 1.0f - rest : 1.0f;
    s.delta[i] = 0.0f;
    if (!used) continue;
    vf sum = zero();
    for (int64_t c = 0; c < p.value_dim; c += W) {
      sum = fma(load_first_as_f32(out + c, p.value_dim - c), load_first_as_f32(s.grad_at[i] + c, p.value_dim - c), sum);
    }
    s.delta[i] = reduce_add(sum);
    if (g.grad_lse != nullptr) s.delta[i] -= g.grad_lse[head * g.grad_lse_head + row * g.grad_lse_row];
  }
  for (int64_t at = 0; at < lanes.count; at += kLaneBlock) {
    const int64_t n = least(kLaneBlock, lanes.count - at), width = round_up(n, W);
    pack_columns<T>(s.query_at + at, n, p.head_dim, s.queries + at * s.depth, width);
    pack_columns<T>(s.grad_at + at, n, p.value_dim, s.grads + at * s.value_depth, width);
    pack_depth_rows<T>(s.query_at + at, width, p.head_dim, s.query_rows + at / P * s.wide_key, s.wide_key);
    pack_depth_rows<T>(s.grad_at + at, width, p.value_dim, s.grad_rows + at / P * s.wide_value, s.wide_value);
  }
}

template <class T>
static void load_keys(const AttentionParams& p, const Sequence& sequence, int64_t kv_head, int64_t key_begin,
                      int64_t keys, const BackwardScratch<T>& s) {
  for (int64_t j = 0; j < keys; ++j) {
    const int64_t row = key_row_of(p, sequence.first_k + key_begin + j);
    s.key_row[j] = row;
    s.key_at[j] = static_cast<const T*>(p.key) + row * p.key_row + kv_head * p.key_head;
    s.value_at[j] = static_cast<const T*>(p.value) + row * p.value_row + kv_head * p.value_head;
  }
  pack_rows<T>(s.key_at, keys, p.head_dim, s.keys, s.key_ld);
  if (s.key_pairs != s.keys) pack_depth_rows<T>(s.key_at, keys, p.head_dim, s.key_pairs, s.wide_key);
  pack_rows<T>(s.value_at, keys, p.value_dim, s.values, s.value_ld);
}

// Weights of one tile: scores becomes P^T = exp(s - lse), exactly zero where unseen.
template <class T>
static void tile_weights(const AttentionParams& p, int64_t b, const Sequence& sequence, int64_t kv_head,
                         const Lanes& lanes, int64_t at, int64_t key_begin, int64_t keys, bool masked,
                         const BackwardScratch<T>& s) {
  const bool transform = needs_transform(p);
  // The difference is formed before the change of base, so that large scores cost no accuracy.
  const vf scale = splat(transform ? 1.0f : p.scale);
  const int64_t ld = lanes.width;
  gemm<Element<T>, AOrder::rows, Init::zero>(keys, ld, s.depth, s.keys, s.key_ld, s.queries + at * s.depth, ld,
                                             s.scores, ld);
  if (transform || masked) {
    if (s.extra != nullptr) gather_bias(p, b, sequence, kv_head, lanes, s.key_row, keys, s.extra, ld);
    adjust_scores(p, s.scores, keys, ld, transform, s.extra, s.slope, masked, lanes, key_begin);
  }
  const vf hidden = splat(-__builtin_inff());
  for (int64_t j = 0; j < keys; ++j) {
    float* row = s.scores + j * ld;
    for (int64_t i = 0; i < ld; i += W) {
      const vf x = load(row + i);
      const vf difference = fma(x, scale, zero() - load(s.lse + at + i)) - load(s.rest + at + i);
      vf w = exp(difference) * load(s.unrounded + at + i);
      // An unseen key has weight 0 even where the lane's lse is NaN.
      if (masked) w = x == hidden ? zero() : w;
      store(row + i, w);
    }
  }
}

// dscores, holding dP^T, becomes dS^T: unseen entries exactly zero.
template <class T>
static void tile_dscores(const AttentionParams& p, int64_t kv_head, const Lanes& lanes, int64_t at, int64_t key_begin,
                         int64_t keys, bool masked, const BackwardScratch<T>& s) {
  const int64_t ld = lanes.width;
  if (p.dropout_p > 0.0f) {
    const vf keep_scale = splat(p.dropout_p < 1.0f ? 1.0f / (1.0f - p.dropout_p) : 0.0f);
    for_each_kept(p, kv_head, lanes, key_begin, keys, [&](int64_t key, int64_t lane, vi keep) {
      float* d = s.dscores + key * ld + lane;
      store(d, keep ? load(d) * keep_scale : zero());
    });
  }
  for (int64_t j = 0; j < keys; ++j) {
    const vi key = splat(static_cast<int32_t>(key_begin + j));
    for (int64_t i = 0; i < ld; i += W) {
      float* d = s.dscores + j * ld + i;
      vf x = load(s.scores + j * ld + i) * (load(d) - load(s.delta + at + i));
      if (masked) {
        const vi begin = reinterpret_cast<vi>(load(reinterpret_cast<const float*>(lanes.begin + i)));
        const vi end = reinterpret_cast<vi>(load(reinterpret_cast<const float*>(lanes.end + i)));
        x = (key >= begin) & (key < end) ? x : zero();
      }
      store(d, x);
    }
  }
}

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

// One tile: adds its share to the accumulators of keys, values and queries.
template <class T>
static void backward_tile(const AttentionParams& p, const AttentionGradients& g, int64_t b, const Sequence& sequence,
                          int64_t kv_head, const Lanes& lanes, int64_t at, int64_t key_begin, int64_t keys,
                          float* acc_key, float* acc_value, float* key_bias, const BackwardScratch<T>& s) {
  using E = Element<T>;
  constexpr int64_t P = Operand<T>::kPair;
  const int64_t ld = lanes.width;
  const bool masked = !lanes.sees_all(key_begin, key_begin + keys);
  const bool need_key = g.grad_key != nullptr, need_query = g.grad_query != nullptr;
  const E* query_rows = s.query_rows + at / P * s.wide_key;
  const E* grad_rows = s.grad_rows + at / P * s.wide_value;

  tile_weights<T>(p, b, sequence, kv_head, lanes, at, key_begin, keys, masked, s);
  if (need_key || need_query || key_bias != nullptr) {
    gemm<E, AOrder::rows, Init::zero>(keys, ld, s.value_depth, s.values, s.value_ld, s.grads + at * s.value_depth, ld,
                                      s.dscores, ld);
    tile_dscores<T>(p, kv_head, lanes, at, key_begin, keys, masked, s);
    if (key_bias != nullptr) {
      const int64_t group = p.group();
      float* sums = key_bias + (g.key_bias_has_heads ? kv_head * group : kv_head) * sequence.keys + key_begin;
      add_key_bias(s.dscores, keys, lanes, g.key_bias_has_heads, sums, sequence.keys);
    }
    if (s.slope != nullptr) {
      for (int64_t i = 0; i < keys * ld; i += W) {
        // Zero stays zero: an unseen score's slope may be NaN.
        const vf d = load(s.dscores + i);
        store(s.dscores + i, d == zero() ? zero() : d * load(s.slope + i));
      }
    }
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

FXA_INLINE int64_t lanes_held(int64_t lanes) { return round_up(least(lanes, kBackwardLanes), kLaneBlock); }
// With more lanes than are held at once, the keys' sums wait in memory from one batch of lanes to the next.
FXA_INLINE int64_t keys_held(int64_t lanes, int64_t keys) { return lanes > kBackwardLanes ? keys : kKeyBlock; }

template <class T>
static void backward_item(const AttentionParams& p, const AttentionGradients& g, const BackwardItem& item,
                          float* workspace, Arena arena) {
  const Sequence sequence = sequence_of(p, item.sequence);
  const int64_t lane_count = item.lane_end - item.lane_begin, sequence_lanes = sequence.queries * p.group();
  const bool all_at_once = lane_count <= kBackwardLanes;
  const BackwardScratch<T> s(p, arena, lanes_held(lane_count), keys_held(lane_count, item.key_end - item.key_begin));
  float* query_partial = item.query_partial < 0 ? nullptr : workspace + item.query_partial;
  float* key_partial = item.key_partial < 0 ? nullptr : workspace + item.key_partial;
  float* key_bias = item.key_bias_partial < 0 ? nullptr : workspace + item.key_bias_partial;
  const bool need_keys = g.grad_key || g.grad_value;
  const int64_t bias_rows = g.key_bias_has_heads ? p.group() : 1;

  for (int64_t head = item.head_begin; head < item.head_end; ++head) {
    for (int64_t r = 0; key_bias != nullptr && r < bias_rows; ++r) {
      clear(key_bias + (head * bias_rows + r) * sequence.keys + item.key_begin, item.key_end - item.key_begin);
    }
    for (int64_t first = item.lane_begin; first < item.lane_end; first += kBackwardLanes) {
      const int64_t last = least(first + kBackwardLanes, item.lane_end);
      const Lanes all = make_lanes(p, sequence, first, last, s.row, s.head, s.begin, s.end);
      load_lanes<T>(p, g, head, all, s);
      if (g.grad_query) clear(s.acc_query, all.width * p.head_dim);
      Lanes block[kBackwardLanes / kLaneBlock];
      for (int64_t at = 0; at < all.count; at += kLaneBlock) block[at / kLaneBlock] = all.slice(at, kLaneBlock);

      for (int64_t k = item.key_begin; k < item.key_end; k += kKeyBlock) {
        const int64_t keys = least(kKeyBlock, item.key_end - k);
        float* acc_key = s.acc_key + (all_at_once ? 0 : (k - item.key_begin) * s.wide_key);
        float* acc_value = s.acc_value + (all_at_once ? 0 : (k - item.key_begin) * s.wide_value);
        if (first == item.lane_begin) {
          clear(acc_key, keys * s.wide_key);
          clear(acc_value, keys * s.wide_value);
        }
        if (all.sees_any(k, k + keys)) {
          load_keys<T>(p, sequence, head, k, keys, s);
          for (int64_t at = 0; at < all.count; at += kLaneBlock) {
            const Lanes& lanes = block[at / kLaneBlock];
            if (!lanes.sees_any(k, k + keys)) continue;
            backward_tile<T>(p, g, item.sequence, sequence, head, lanes, at, k, keys, acc_key, acc_value, key_bias, s);
          }
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
