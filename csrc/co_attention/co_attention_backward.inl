// Backward: scores are recomputed once, and both directions' gradients come out of the same tiles.
//
//   P_l = exp(S - lse_l)   dP_l = V_k dO_l^T   dV_k += P_l dO_l       (lanes read keys)
//   P_k = exp(S - lse_k)   dP_k = dO_k V_l^T   dV_l += P_k^T dO_k     (keys read lanes)
//   dS = P_l (dP_l - delta_l) + P_k (dP_k - delta_k)   dQ_l += dS^T Q_k   dQ_k += dS Q_l
//
// delta = out . dO up to rounding. In float32, where nothing else is rounded, a first pass over the tiles finds how far
// it is from sum P dP, which cancels against dP in rows that see few, and what P adds up to.
#pragma once

#include "co_attention/co_attention_tile.inl"

namespace fastxattn::FXA_ISA {

// Sums by key of an item: dQ, dV and dbias; or, in the first pass, sum P and sum P (dP - delta).
struct KeyGradients {
  float *first, *second;  // [keys][W] each: of the first pass, or dbias in `first`
  float *query, *value;   // [keys][wide]

  static int64_t floats(int64_t keys, int64_t wide, int64_t wide_value) { return keys * (2 * W + wide + wide_value); }
  static KeyGradients at(float* base, int64_t keys, int64_t wide) {
    float* query = base + 2 * keys * W;
    return {base, base + keys * W, query, query + keys * wide};
  }
};

template <class T>
struct CoAttentionBackward {
  using E = Element<T>;
  static constexpr int64_t P = Operand<T>::kPair;
  int64_t depth, key_ld, wide;                // of a query row: elements; rounded up to W; values rounded
  int64_t lane_depth, lane_ld, lane_wide;     // of a lane's value row (and a key's grad_out)
  int64_t key_depth, key_value_ld, key_wide;  // of a key's value row (and a lane's grad_out)
  E *keys, *key_pairs, *key_values;           // [key][key_ld]; [key / P][wide]; [key][key_value_ld]
  E *key_grads, *key_grad_pairs;              // [key][lane_ld]; [key / P][lane_wide]
  E *lanes, *lane_rows, *lane_values;         // per block [depth][width]; [width / P][wide]; [lane_depth][width]
  E *lane_grads, *lane_grad_rows;             // per block [key_depth][width]; [width / P][key_wide]
  float *acc_query, *acc_value;               // per block [head_dim][width]; [lane value_dim][width]
  float *lane_bias, *lane_lse, *lane_delta, *lane_norm;  // per lane
  float *lane_first, *lane_second;                       // per lane: sums as in KeyGradients
  float *key_bias, *key_lse, *key_delta, *key_norm;      // of a panel
  float* factor;
  float *scores, *slope, *down, *across, *down_grads, *across_grads;  // [kKeyBlock][kLaneBlock]
  E *rows_a, *rows_b, *pairs_a, *pairs_b;                             // tiles with pairs along lanes, along keys
  float* key_sums;
  const T **at, **values_at, **grads_at, **outs_at;
  T** to;

  CoAttentionBackward(const CoAttentionParams& p, const CoAttentionItem& item, Arena& arena) {
    const CoAttentionSide &lane = p.side[item.lane_side], &key = p.side[1 - item.lane_side];
    const int64_t held = round_up(item.lane_end - item.lane_begin, kLaneBlock), tile = kKeyBlock * kLaneBlock;
    depth = elements<T>(p.head_dim), key_ld = round_up(depth, W), wide = round_up(p.head_dim, W);
    lane_depth = elements<T>(lane.value_dim), lane_ld = round_up(lane_depth, W),
    lane_wide = round_up(lane.value_dim, W);
    key_depth = elements<T>(key.value_dim), key_value_ld = round_up(key_depth, W);
    key_wide = round_up(key.value_dim, W);
    keys = arena.take<E>(kKeyBlock * key_ld);
    key_pairs = P == 1 ? keys : arena.take<E>(kKeyBlock / P * wide);
    key_values = arena.take<E>(kKeyBlock * key_value_ld);
    key_grads = arena.take<E>(kKeyBlock * lane_ld);
    key_grad_pairs = P == 1 ? key_grads : arena.take<E>(kKeyBlock / P * lane_wide);
    lanes = arena.take<E>(held * depth);
    lane_rows = arena.take<E>(held / P * wide);
    lane_values = arena.take<E>(held * lane_depth);
    lane_grads = arena.take<E>(held * key_depth);
    lane_grad_rows = arena.take<E>(held / P * key_wide);
    acc_query = arena.take<float>(held * p.head_dim);
    acc_value = arena.take<float>(held * lane.value_dim);
    for (float** x : {&lane_bias, &lane_lse, &lane_delta, &lane_norm, &lane_first, &lane_second}) {
      *x = arena.take<float>(held);
    }
    for (float** x : {&key_bias, &key_lse, &key_delta, &key_norm, &factor}) *x = arena.take<float>(kKeyBlock);
    for (float** x : {&scores, &down, &across, &down_grads, &across_grads}) *x = arena.take<float>(tile);
    slope = ScoreUnits(p).capped ? arena.take<float>(tile) : nullptr;
    rows_a = P == 1 ? reinterpret_cast<E*>(down) : arena.take<E>(tile / P);
    rows_b = P == 1 ? reinterpret_cast<E*>(down_grads) : arena.take<E>(tile / P);
    pairs_a = P == 1 ? reinterpret_cast<E*>(across) : arena.take<E>(tile / P);
    pairs_b = P == 1 ? reinterpret_cast<E*>(down_grads) : arena.take<E>(tile / P);
    key_sums = item.partial < 0 ? arena.take<float>(KeyGradients::floats(item.keys, wide, key_wide)) : nullptr;
    for (const T*** x : {&at, &values_at, &grads_at, &outs_at}) *x = arena.take<const T*>(most(held, kKeyBlock));
    to = arena.take<T*>(kLaneBlock);
  }
};

// lse, delta and norm of rows; a row that saw nothing, and the surplus, gets weights exp(-inf) = 0. In float32 `lse` is
// about the mean of the `seen` scores instead: the difference to it is smaller, and norm makes up for it.
template <class T>
static void statistics_of(const CoAttentionSide& side, int64_t first, int64_t n, int64_t width, int64_t head,
                          int64_t seen, float* lse, float* delta, float* norm) {
  const int64_t base = head * side.rows + first;
  const float shift = sizeof(T) == 4 ? static_cast<float>(__builtin_log(static_cast<double>(seen))) : 0.0f;
  for (int64_t i = 0; i < width; ++i) {
    const float x = i < n ? side.lse[base + i] : -kInfinity;
    lse[i] = x == -kInfinity ? kInfinity : x - shift;
    delta[i] = i < n ? side.delta[base + i] : 0.0f;
    norm[i] = i < n ? side.norm[base + i] : 0.0f;
  }
}

// Packs a block of lanes and clears their sums.
template <class T>
static void load_lane_block(const CoAttentionParams& p, const CoAttentionItem& item, int64_t at, int64_t n,
                            const CoAttentionBackward<T>& s) {
  constexpr int64_t P = Operand<T>::kPair;
  const CoAttentionSide &lane = p.side[item.lane_side], &key = p.side[1 - item.lane_side];
  const int64_t row = lane.cu[item.sequence] + item.lane_begin + at, width = round_up(n, W);
  rows_at<T>(lane.query, lane.query_row, lane.query_head, row, n, item.head, s.at);
  rows_at<T>(lane.value, lane.value_row, lane.value_head, row, n, item.head, s.values_at);
  rows_at<T>(lane.grad_out, lane.grad_out_row, lane.grad_out_head, row, n, item.head, s.grads_at);
  for (int64_t i = n; i < width; ++i) s.at[i] = s.grads_at[i] = nullptr;
  pack_columns<T>(s.at, n, p.head_dim, s.lanes + at * s.depth, width);
  pack_depth_rows<T>(s.at, width, p.head_dim, s.lane_rows + at / P * s.wide, s.wide);
  pack_columns<T>(s.values_at, n, lane.value_dim, s.lane_values + at * s.lane_depth, width);
  pack_columns<T>(s.grads_at, n, key.value_dim, s.lane_grads + at * s.key_depth, width);
  pack_depth_rows<T>(s.grads_at, width, key.value_dim, s.lane_grad_rows + at / P * s.key_wide, s.key_wide);
  bias_of(lane, row, n, width, item.head, 1.0f, s.lane_bias + at);
  statistics_of<T>(lane, row, n, width, item.head, item.keys, s.lane_lse + at, s.lane_delta + at, s.lane_norm + at);
  clear(s.lane_first + at, width);
  clear(s.lane_second + at, width);
  clear(s.acc_query + at * p.head_dim, width * p.head_dim);
  clear(s.acc_value + at * lane.value_dim, width * lane.value_dim);
}

template <class T>
static void load_key_panel(const CoAttentionParams& p, const CoAttentionItem& item, int64_t k, int64_t keys,
                           const CoAttentionBackward<T>& s) {
  const CoAttentionSide &lane = p.side[item.lane_side], &key = p.side[1 - item.lane_side];
  const int64_t row = key.cu[item.sequence] + k;
  rows_at<T>(key.query, key.query_row, key.query_head, row, keys, item.head, s.at);
  rows_at<T>(key.value, key.value_row, key.value_head, row, keys, item.head, s.values_at);
  rows_at<T>(key.grad_out, key.grad_out_row, key.grad_out_head, row, keys, item.head, s.grads_at);
  pack_rows<T>(s.at, keys, p.head_dim, s.keys, s.key_ld);
  pack_rows<T>(s.values_at, keys, key.value_dim, s.key_values, s.key_value_ld);
  pack_rows<T>(s.grads_at, keys, lane.value_dim, s.key_grads, s.lane_ld);
  if (s.key_pairs != s.keys) pack_depth_rows<T>(s.at, keys, p.head_dim, s.key_pairs, s.wide);
  if (s.key_grad_pairs != s.key_grads)
    pack_depth_rows<T>(s.grads_at, keys, lane.value_dim, s.key_grad_pairs, s.lane_wide);
  bias_of(key, row, keys, keys, item.head, 1.0f, s.key_bias);
  const int64_t seen = lane.cu[item.sequence + 1] - lane.cu[item.sequence];
  statistics_of<T>(key, row, keys, keys, item.head, seen, s.key_lse, s.key_delta, s.key_norm);
}

// The four tiles P_l, P_k, dP_l and dP_k, in `down`, `across`, `down_grads` and `across_grads`.
template <class T>
static void weight_tiles(const CoAttentionParams& p, int64_t at, int64_t ld, int64_t keys,
                         const CoAttentionBackward<T>& s) {
  using E = Element<T>;
  const ScoreUnits units(p);
  tile_product<E>(keys, ld, s.depth, s.keys, s.key_ld, s.lanes + at * s.depth, s.scores);
  units.apply(s.scores, keys * ld, s.slope);
  const vf unit = splat(units.unit);
  for (int64_t j = 0; j < keys; ++j) {
    const vf key_bias = splat(s.key_bias[j]), key_lse = splat(s.key_lse[j]), key_norm = splat(s.key_norm[j]);
    for (int64_t i = 0; i < ld; i += W) {
      // The difference is formed before the change of base, so that large scores cost no accuracy.
      const vf x = load(s.scores + j * ld + i);
      const vf read = fma(x, unit, key_bias - load(s.lane_lse + at + i));
      const vf reading = fma(x, unit, load(s.lane_bias + at + i) - key_lse);
      store(s.down + j * ld + i, exp(read) * load(s.lane_norm + at + i));
      store(s.across + j * ld + i, exp(reading) * key_norm);
    }
  }
  tile_product<E>(keys, ld, s.key_depth, s.key_values, s.key_value_ld, s.lane_grads + at * s.key_depth, s.down_grads);
  tile_product<E>(keys, ld, s.lane_depth, s.key_grads, s.lane_ld, s.lane_values + at * s.lane_depth, s.across_grads);
}

// Drops the same entries of one tile of each direction as the forward pass did.
static void drop_tiles(const CoAttentionParams& p, const CoAttentionItem& item, int64_t at, int64_t ld, int64_t k,
                       int64_t keys, float* down, float* across) {
  const CoAttentionSide &lane = p.side[item.lane_side], &key = p.side[1 - item.lane_side];
  const int64_t first = item.lane_begin + at;
  for_lanes_kept(p, lane.seed, item.head, lane.cu[item.sequence] + first, ld, k, keys,
                 KeepScaled{down, ld, keep_factor(p)});
  for_keys_kept(p, key.seed, item.head, key.cu[item.sequence] + k, keys, first, ld,
                KeepScaled{across, ld, keep_factor(p)});
}

// First pass: adds a tile to sum P and sum P (dP - delta) of its lanes and of its keys.
template <class T>
static void add_sums(int64_t at, int64_t ld, int64_t k, int64_t keys, const KeyGradients& sums,
                     const CoAttentionBackward<T>& s) {
  for (int64_t j = 0; j < keys; ++j) {
    vf total = zero(), rest = zero();  // of the tile: shorter chains of additions lose less
    for (int64_t i = 0; i < ld; i += W) {
      const vf down = load(s.down + j * ld + i), across = load(s.across + j * ld + i);
      store(s.lane_first + at + i, load(s.lane_first + at + i) + down);
      store(s.lane_second + at + i,
            fma(down, load(s.down_grads + j * ld + i) - load(s.lane_delta + at + i), load(s.lane_second + at + i)));
      total = total + across;
      rest = fma(across, load(s.across_grads + j * ld + i) - splat(s.key_delta[j]), rest);
    }
    store(sums.first + (k + j) * W, load(sums.first + (k + j) * W) + total);
    store(sums.second + (k + j) * W, load(sums.second + (k + j) * W) + rest);
  }
}

// Second pass: a tile's share of every gradient.
template <class T>
static void add_gradients(const CoAttentionParams& p, const CoAttentionItem& item, int64_t at, int64_t ld, int64_t k,
                          int64_t keys, const KeyGradients& sums, const CoAttentionBackward<T>& s) {
  using E = Element<T>;
  constexpr int64_t P = Operand<T>::kPair;
  const int64_t lane_dim = p.side[item.lane_side].value_dim;
  for (int64_t j = 0; j < keys; ++j) {
    vf key_sum = zero();
    const vf key_delta = splat(s.key_delta[j]);
    for (int64_t i = 0; i < ld; i += W) {
      const int64_t e = j * ld + i;
      const vf read = load(s.down + e) * (load(s.down_grads + e) - load(s.lane_delta + at + i));
      const vf reading = load(s.across + e) * (load(s.across_grads + e) - key_delta);
      key_sum = key_sum + read;
      store(s.lane_first + at + i, load(s.lane_first + at + i) + reading);
      vf d = read + reading;
      if (s.slope != nullptr) d = d * load(s.slope + e);
      store(s.down_grads + e, d);
    }
    store(sums.first + (k + j) * W, load(sums.first + (k + j) * W) + key_sum);
  }
  if (p.dropout_p > 0.0f) drop_tiles(p, item, at, ld, k, keys, s.down, s.across);
  pair_tile<T>(s.down_grads, keys, ld, s.rows_b, s.pairs_b);
  const int64_t pairs = elements<T>(keys);
  gemm<E, AOrder::columns, Init::add>(p.head_dim, ld, pairs, s.key_pairs, P == 1 ? s.key_ld : s.wide, s.pairs_b, ld,
                                      s.acc_query + at * p.head_dim, ld);
  gemm<E, AOrder::rows, Init::add>(keys, s.wide, ld / P, s.rows_b, ld / P, s.lane_rows + at / P * s.wide, s.wide,
                                   sums.query + k * s.wide, s.wide);
  pair_tile<T>(s.down, keys, ld, s.rows_a, nullptr);
  gemm<E, AOrder::rows, Init::add>(keys, s.key_wide, ld / P, s.rows_a, ld / P, s.lane_grad_rows + at / P * s.key_wide,
                                   s.key_wide, sums.value + k * s.key_wide, s.key_wide);
  if constexpr (P == 2) pair_tile<T>(s.across, keys, ld, s.rows_a, s.pairs_a);
  gemm<E, AOrder::columns, Init::add>(lane_dim, ld, pairs, s.key_grad_pairs, P == 1 ? s.lane_ld : s.lane_wide,
                                      s.pairs_a, ld, s.acc_value + at * lane_dim, ld);
}

template <class T>
static void write_columns(const float* acc, int64_t width, void* to, int64_t heads, int64_t head, int64_t row,
                          int64_t n, int64_t dim, float factor, const CoAttentionBackward<T>& s) {
  if (to == nullptr) return;
  for (int64_t i = 0; i < width; i += W) store(s.factor + i, splat(factor));
  for (int64_t i = 0; i < n; ++i) s.to[i] = static_cast<T*>(to) + ((row + i) * heads + head) * dim;
  unpack_columns<T>(acc, width, s.factor, s.to, n, dim);
}

// What a pass leaves of its lanes.
template <class T>
static void finish_lane_block(const CoAttentionParams& p, const CoAttentionItem& item, int64_t at, int64_t n,
                              bool sums_only, const CoAttentionBackward<T>& s) {
  const CoAttentionSide& lane = p.side[item.lane_side];
  const int64_t row = lane.cu[item.sequence] + item.lane_begin + at, width = round_up(n, W);
  const int64_t base = item.head * lane.rows + row;
  for (int64_t i = 0; i < n; ++i) {
    if (sums_only) {
      const float total = s.lane_first[at + i];
      lane.norm[base + i] = total == 0.0f ? 1.0f : 1.0f / total;
      if (total != 0.0f) lane.delta[base + i] += s.lane_second[at + i] / total;
    } else if (lane.grad_bias != nullptr) {
      lane.grad_bias[base + i] = s.lane_first[at + i];
    }
  }
  if (sums_only) return;
  write_columns<T>(s.acc_query + at * p.head_dim, width, lane.grad_query, p.heads, item.head, row, n, p.head_dim,
                   p.scale, s);
  write_columns<T>(s.acc_value + at * lane.value_dim, width, lane.grad_value, p.heads, item.head, row, n,
                   lane.value_dim, 1.0f, s);
}

// The same of the keys: pieces are added in order.
template <class T>
static void finish_key_gradients(const CoAttentionParams& p, const CoAttentionMerge& merge, float* base,
                                 bool sums_only) {
  const CoAttentionItem& item = merge.first;
  const CoAttentionSide& key = p.side[1 - item.lane_side];
  const int64_t wide = round_up(p.head_dim, W), wide_value = round_up(key.value_dim, W), keys = item.keys;
  const int64_t row0 = key.cu[item.sequence];
  if (merge.pieces > 1) {
    const int64_t n = sums_only ? 2 * keys * W : KeyGradients::floats(keys, wide, wide_value);
    for (int64_t piece = 1; piece < merge.pieces; ++piece) {
      for (int64_t i = 0; i < n; i += W) store(base + i, load(base + i) + load(base + piece * merge.stride + i));
    }
  }
  const KeyGradients sums = KeyGradients::at(base, keys, wide);
  for (int64_t j = 0; j < keys; ++j) {
    const int64_t at = item.head * key.rows + row0 + j, row = (row0 + j) * p.heads + item.head;
    const float first = reduce_add(load(sums.first + j * W));
    if (sums_only) {
      key.norm[at] = first == 0.0f ? 1.0f : 1.0f / first;
      if (first != 0.0f) key.delta[at] += reduce_add(load(sums.second + j * W)) / first;
      continue;
    }
    if (key.grad_bias != nullptr) key.grad_bias[at] = first;
    if (key.grad_query != nullptr) {
      write_row(sums.query + j * wide, p.scale, static_cast<T*>(key.grad_query) + row * p.head_dim, p.head_dim);
    }
    if (key.grad_value != nullptr) {
      write_row(sums.value + j * wide_value, 1.0f, static_cast<T*>(key.grad_value) + row * key.value_dim,
                key.value_dim);
    }
  }
}

template <class T>
static void co_attention_backward_item(const CoAttentionParams& p, const CoAttentionItem& item, bool sums_only,
                                       float* workspace, Arena arena) {
  const CoAttentionBackward<T> s(p, item, arena);
  const int64_t count = item.lane_end - item.lane_begin;
  float* sums_at = item.partial < 0 ? s.key_sums : workspace + item.partial;
  const KeyGradients sums = KeyGradients::at(sums_at, item.keys, s.wide);
  clear(sums_at, KeyGradients::floats(item.keys, s.wide, s.key_wide));
  for (int64_t at = 0; at < count; at += kLaneBlock) load_lane_block<T>(p, item, at, least(kLaneBlock, count - at), s);
  for (int64_t k = 0; k < item.keys; k += kKeyBlock) {
    const int64_t keys = least(kKeyBlock, item.keys - k);
    load_key_panel<T>(p, item, k, keys, s);
    for (int64_t at = 0; at < count; at += kLaneBlock) {
      const int64_t ld = round_up(least(kLaneBlock, count - at), W);
      weight_tiles<T>(p, at, ld, keys, s);
      if (p.dropout_p > 0.0f) drop_tiles(p, item, at, ld, k, keys, s.down_grads, s.across_grads);
      if (sums_only) {
        add_sums<T>(at, ld, k, keys, sums, s);
      } else {
        add_gradients<T>(p, item, at, ld, k, keys, sums, s);
      }
    }
  }
  for (int64_t at = 0; at < count; at += kLaneBlock) {
    finish_lane_block<T>(p, item, at, least(kLaneBlock, count - at), sums_only, s);
  }
  if (item.partial < 0) finish_key_gradients<T>(p, {item, 1, 0}, sums_at, sums_only);
}

// delta of rows [begin, end) of one side: out . grad_out, norm 1.
template <class T>
static void center_rows(const CoAttentionParams& p, int side, int64_t begin, int64_t end) {
  const CoAttentionSide& mine = p.side[side];
  const int64_t dim = p.side[1 - side].value_dim;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t head = 0; head < p.heads; ++head) {
      const T* out = static_cast<const T*>(mine.out) + (row * p.heads + head) * dim;
      const T* grad = static_cast<const T*>(mine.grad_out) + row * mine.grad_out_row + head * mine.grad_out_head;
      vf sum = zero();
      for (int64_t c = 0; c < dim; c += W) {
        sum = fma(load_first_as_f32(out + c, dim - c), load_first_as_f32(grad + c, dim - c), sum);
      }
      mine.delta[head * mine.rows + row] = reduce_add(sum);
      mine.norm[head * mine.rows + row] = 1.0f;
    }
  }
}

}  // namespace fastxattn::FXA_ISA
