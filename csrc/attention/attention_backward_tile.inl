// Backward, one tile: weights and score gradients of a panel of keys and a block of lanes.
//
//   P^T = exp(S^T - lse)      dP^T = V dO^T        dS^T = P^T (dP^T - delta + grad_lse)
//
// delta = sum_j P_j dP_j is the same as sum(dO * out). The 16-bit types take it from out. In float32 out's rounding
// would be the largest error of all where few keys carry the weight, since dP - delta cancels there: delta is summed
// from the very weights and dP that it is used with, and divided by the sum of those weights.
#pragma once

#include "attention/attention_forward.inl"

namespace fastxattn::FXA_ISA {

template <class T>
inline constexpr bool kSumsDelta = sizeof(T) == sizeof(float);

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
  float *lse, *rest, *factor_of;  // per lane: P = exp(s - lse - rest) * factor_of, see load_lane
  // per lane: delta; the gradient of lse, apart, since dP - delta cancels first; sum of the weights, then its inverse
  float *delta, *grad_lse, *total, *factor;
  // Tiles [kKeyBlock][kLaneBlock]: P, dP and then dS, d capped / d uncapped; as many as the item holds.
  float *scores, *dscores, *slope;
  float* extra;                    // one tile
  E *rows_weights, *rows_dscores;  // the same with pairs along lanes (floats: scores and dscores themselves)
  E* pairs_dscores;                // the same with pairs along keys
  const T **query_at, **grad_at, **out_at, **key_at, **value_at;
  T** to;
  float** partial_to;
  int64_t *row, *key_row;
  int64_t* lane;  // number of each lane within its sequence
  int32_t *head, *begin, *end;

  // The most query rows held at once, keys accumulated at once, and tiles held at once.
  BackwardScratch(const AttentionParams& p, Arena& arena, int64_t lanes, int64_t keys_held, int64_t tiles) {
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
    factor_of = arena.take<float>(lanes);
    delta = arena.take<float>(lanes);
    grad_lse = arena.take<float>(lanes);
    total = arena.take<float>(lanes);
    factor = arena.take<float>(kLaneBlock);
    scores = arena.take<float>(tiles * kTile);
    dscores = arena.take<float>(tiles * kTile);
    slope = is_capped(p) ? arena.take<float>(tiles * kTile) : nullptr;
    extra = p.key_bias || p.bias ? arena.take<float>(kTile) : nullptr;
    rows_weights = P == 1 ? reinterpret_cast<E*>(scores) : arena.take<E>(kTile / P);
    rows_dscores = P == 1 ? reinterpret_cast<E*>(dscores) : arena.take<E>(kTile / P);
    pairs_dscores = P == 1 ? reinterpret_cast<E*>(dscores) : arena.take<E>(kTile / P);
    query_at = arena.take<const T*>(lanes);
    grad_at = arena.take<const T*>(lanes);
    out_at = arena.take<const T*>(lanes);
    key_at = arena.take<const T*>(kKeyBlock);
    value_at = arena.take<const T*>(kKeyBlock);
    to = arena.take<T*>(lanes);
    partial_to = arena.take<float*>(lanes);
    row = arena.take<int64_t>(lanes);
    key_row = arena.take<int64_t>(kKeyBlock);
    lane = arena.take<int64_t>(lanes);
    head = arena.take<int32_t>(lanes);
    begin = arena.take<int32_t>(lanes);
    end = arena.take<int32_t>(lanes);
  }

  // The same scratch, looking at held tile `i`.
  BackwardScratch tile(int64_t i) const {
    BackwardScratch s = *this;
    s.scores += i * kTile;
    s.dscores += i * kTile;
    if (s.slope != nullptr) s.slope += i * kTile;
    if constexpr (Operand<T>::kPair == 1) {
      s.rows_weights = s.scores;
      s.rows_dscores = s.pairs_dscores = s.dscores;
    }
    return s;
  }
};

// One lane's row addresses, lse, and delta: from out, or 0 where it is yet to be summed. `keys`: of its sequence, at
// least
// 1. Lanes beyond the last are unused.
template <class T>
static void load_lane(const AttentionParams& p, const AttentionGradients& g, int64_t head, int64_t row, int64_t keys,
                      int64_t i, bool used, const BackwardScratch<T>& s) {
  s.query_at[i] = used ? static_cast<const T*>(p.query) + row * p.query_row + head * p.query_head : nullptr;
  s.grad_at[i] = used ? static_cast<const T*>(g.grad_out) + row * g.grad_out_row + head * g.grad_out_head : nullptr;
  const int shift = half_log2(keys);
  const double exact = p.lse_exact[head * p.rows_q + row] - shift * kLn2Double;
  const float lse = static_cast<float>(exact);
  // Lanes that saw nothing, and unused ones, get weights exp(-inf) = 0.
  s.lse[i] = !used || lse == -__builtin_inff() ? __builtin_inff() : lse;
  // A rest of 1e-7 would vanish in a sum but not as a factor; that of an lse of 1e10 (additive masks) is hundreds.
  const float rest = exact - exact == 0.0 ? static_cast<float>(exact - lse) : 0.0f;
  const bool small = rest < 1e-4f && rest > -1e-4f;
  s.rest[i] = small ? 0.0f : rest;
  s.factor_of[i] = (small ? 1.0f - rest : 1.0f) / static_cast<float>(1 << shift);
  s.delta[i] = s.total[i] = 0.0f;
  s.grad_lse[i] = used && g.grad_lse != nullptr ? g.grad_lse[head * g.grad_lse_head + row * g.grad_lse_row] : 0.0f;
  if (kSumsDelta<T> || !used) return;
  const T* out = static_cast<const T*>(p.out) + (row * p.heads + head) * p.value_dim;
  vf sum = zero();
  for (int64_t c = 0; c < p.value_dim; c += W) {
    sum = fma(load_first_as_f32(out + c, p.value_dim - c), load_first_as_f32(s.grad_at[i] + c, p.value_dim - c), sum);
  }
  s.delta[i] = reduce_add(sum);
}

// Loads one head's lanes: query and grad_out panels, and what load_lane says.
template <class T>
static void load_lanes(const AttentionParams& p, const AttentionGradients& g, int64_t kv_head, int64_t keys,
                       const Lanes& lanes, const BackwardScratch<T>& s) {
  constexpr int64_t P = Operand<T>::kPair;
  const int64_t head0 = kv_head * p.group();
  for (int64_t i = 0; i < lanes.width; ++i) {
    load_lane<T>(p, g, head0 + lanes.head[i], lanes.row[i], keys, i, i < lanes.count, s);
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
  locate_rows<T>(p, sequence, kv_head, key_begin, keys, s);
  pack_rows<T>(s.key_at, keys, p.head_dim, s.keys, s.key_ld);
  if (s.key_pairs != s.keys) pack_depth_rows<T>(s.key_at, keys, p.head_dim, s.key_pairs, s.wide_key);
  pack_rows<T>(s.value_at, keys, p.value_dim, s.values, s.value_ld);
}

// scores, raw products of a tile, becomes P^T = exp(s - lse), exactly zero where unseen.
template <class T>
static void tile_weights(const AttentionParams& p, int64_t b, const Sequence& sequence, int64_t kv_head,
                         const Lanes& lanes, int64_t at, int64_t key_begin, int64_t keys, bool masked,
                         const BackwardScratch<T>& s) {
  const bool transform = needs_transform(p);
  // The difference is formed before the change of base, so that large scores cost no accuracy.
  const vf scale = splat(transform ? 1.0f : p.scale);
  const int64_t ld = lanes.width;
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
      vf w = exp(difference) * load(s.factor_of + at + i);
      // An unseen key has weight 0 even where the lane's lse is NaN.
      if (masked) w = x == hidden ? zero() : w;
      store(row + i, w);
    }
  }
}

// dscores, the products of value and grad_out, becomes dP^T: dropped weights have no gradient.
template <class T>
static void drop_dweights(const AttentionParams& p, int64_t kv_head, const Lanes& lanes, int64_t key_begin,
                          int64_t keys, const BackwardScratch<T>& s) {
  if (!(p.dropout_p > 0.0f)) return;
  const vf keep_scale = splat(p.dropout_p < 1.0f ? 1.0f / (1.0f - p.dropout_p) : 0.0f);
  for_each_kept(p, kv_head, lanes, key_begin, keys, [&](int64_t key, int64_t lane, vi keep) {
    float* d = s.dscores + key * lanes.width + lane;
    store(d, keep ? load(d) * keep_scale : zero());
  });
}

// P of one tile and, where scores have a gradient, dP.
template <class T>
static void tile_of_weights(const AttentionParams& p, const AttentionGradients& g, int64_t b, const Sequence& sequence,
                            int64_t kv_head, const Lanes& lanes, int64_t at, int64_t key_begin, int64_t keys,
                            const BackwardScratch<T>& s) {
  using E = Element<T>;
  const int64_t ld = lanes.width;
  const bool masked = !lanes.sees_all(key_begin, key_begin + keys);
  // Beside a handful of rows eager sums in many short chains; here short pieces keep up, and cost little.
  const int64_t deepest = ld <= 32 ? 32 : kDeepest;
  gemm_deep<E, AOrder::rows>(keys, ld, s.depth, s.keys, s.key_ld, s.queries + at * s.depth, ld, s.scores, ld, NoHook{},
                             deepest);
  tile_weights<T>(p, b, sequence, kv_head, lanes, at, key_begin, keys, masked, s);
  if (!g.needs_scores()) return;
  gemm_deep<E, AOrder::rows>(keys, ld, s.value_depth, s.values, s.value_ld, s.grads + at * s.value_depth, ld, s.dscores,
                             ld, NoHook{}, deepest);
  drop_dweights<T>(p, kv_head, lanes, key_begin, keys, s);
}

// Adds a tile's share to delta and total; an unseen dP may be NaN and counts for nothing. Null dweights: total alone.
static void sum_delta(const float* weights, const float* dweights, const Lanes& lanes, int64_t key_begin, int64_t keys,
                      bool masked, float* delta, float* total) {
  const int64_t ld = lanes.width;
  for (int64_t i = 0; i < ld; i += W) {
    vf sum = zero(), all = zero();
    for (int64_t j = 0; j < keys; ++j) {
      const vf w = load(weights + j * ld + i);
      all = all + w;
      if (dweights == nullptr) continue;
      vf x = w * load(dweights + j * ld + i);
      if (masked) x = lanes.seen(i, key_begin + j) ? x : zero();
      sum = sum + x;
    }
    store(delta + i, load(delta + i) + sum);
    store(total + i, load(total + i) + all);
  }
}

// Completes delta: the sums over all keys, or what was summed beforehand.
template <class T>
static void finish_delta(const AttentionParams& p, int64_t kv_head, const Lanes& lanes, const float* beforehand,
                         int64_t sequence_lanes, const BackwardScratch<T>& s) {
  for (int64_t i = 0; i < lanes.count; ++i) {
    if (beforehand != nullptr) {
      const float* at = beforehand + kv_head * sequence_lanes + s.lane[i];
      s.delta[i] = at[0];
      s.total[i] = at[p.kv_heads * sequence_lanes];
    } else {
      s.total[i] = inverse_total(s.total[i]);
      s.delta[i] *= s.total[i];
    }
  }
}

// Makes the weights of a row sum to 1, as eager's do: a single key's weight is exactly 1 then.
template <class T>
static void normalise_weights(const Lanes& lanes, int64_t at, int64_t keys, const BackwardScratch<T>& s) {
  if constexpr (kSumsDelta<T>) {
    for (int64_t j = 0; j < keys; ++j) {
      for (int64_t i = 0; i < lanes.width; i += W) {
        float* w = s.scores + j * lanes.width + i;
        store(w, load(w) * load(s.total + at + i));
      }
    }
  }
}

// dscores, holding dP^T, becomes the gradient of the capped scores: unseen entries exactly zero.
template <class T>
static void tile_dscores(const Lanes& lanes, int64_t at, int64_t key_begin, int64_t keys, bool masked,
                         const BackwardScratch<T>& s) {
  const int64_t ld = lanes.width;
  for (int64_t j = 0; j < keys; ++j) {
    for (int64_t i = 0; i < ld; i += W) {
      float* d = s.dscores + j * ld + i;
      vf x = load(s.scores + j * ld + i) * (load(d) - load(s.delta + at + i) + load(s.grad_lse + at + i));
      if (masked) x = lanes.seen(i, key_begin + j) ? x : zero();
      store(d, x);
    }
  }
}

// dscores goes on to the gradient of the raw scores, through the soft cap.
template <class T>
static void uncap_dscores(int64_t count, const BackwardScratch<T>& s) {
  if (s.slope == nullptr) return;
  for (int64_t i = 0; i < count; i += W) {
    // Zero stays zero: an unseen score's slope may be NaN.
    const vf d = load(s.dscores + i);
    store(s.dscores + i, d == zero() ? zero() : d * load(s.slope + i));
  }
}

}  // namespace fastxattn::FXA_ISA
