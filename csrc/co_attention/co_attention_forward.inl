// Forward: a panel of keys against a block of lanes at a time; one tile of scores feeds both softmaxes.
//
//   O_l^T[c][lane] = O_l^T alpha + V_k^T P_l        O_k[key][c] = O_k alpha + P_k V_l
#pragma once

#include "co_attention/co_attention_tile.inl"

namespace fastxattn::FXA_ISA {

// Sums by key of an item: running maximum, sum (one per vector lane, added up at the end) and output.
struct KeySums {
  float *top, *sum, *acc;  // [keys], [keys][W], [keys][wide]

  static int64_t floats(int64_t keys, int64_t wide) { return round_up(keys, W) + keys * (W + wide); }
  static KeySums at(float* base, int64_t keys) {
    float* sum = base + round_up(keys, W);
    return {base, sum, sum + keys * W};
  }
};

template <class T>
struct CoAttentionForward {
  using E = Element<T>;
  static constexpr int64_t P = Operand<T>::kPair;
  int64_t depth, key_ld;             // elements of a query row, rounded up to W
  int64_t lane_wide, key_wide;       // value_dim of either side, rounded up to W
  E *keys, *key_values;              // [kKeyBlock][key_ld]; [kKeyBlock / P][key_wide]
  E *lanes, *lane_values;            // per block [depth][width]; [width / P][lane_wide]
  float* acc;                        // per block [key value_dim][width]
  float *m, *l, *lane_bias;          // per lane
  float *alpha, *factor;             // of one block
  float *key_bias, *key_alpha;       // of a panel
  float *scores, *weights, *across;  // [kKeyBlock][kLaneBlock]
  E* across_rows;                    // `across` with pairs along lanes
  float* key_sums;
  const T **at, **values_at;
  T** out_at;

  CoAttentionForward(const CoAttentionParams& p, const CoAttentionItem& item, Arena& arena) {
    const CoAttentionSide &lane = p.side[item.lane_side], &key = p.side[1 - item.lane_side];
    const int64_t held = round_up(item.lane_end - item.lane_begin, kLaneBlock);
    depth = elements<T>(p.head_dim), key_ld = round_up(depth, W);
    lane_wide = round_up(lane.value_dim, W), key_wide = round_up(key.value_dim, W);
    keys = arena.take<E>(kKeyBlock * key_ld);
    key_values = arena.take<E>(kKeyBlock * key_wide);
    lanes = arena.take<E>(held * depth);
    lane_values = arena.take<E>(held / P * lane_wide);
    acc = arena.take<float>(held * key.value_dim);
    m = arena.take<float>(held);
    l = arena.take<float>(held);
    lane_bias = arena.take<float>(held);
    alpha = arena.take<float>(kLaneBlock);
    factor = arena.take<float>(kLaneBlock);
    key_bias = arena.take<float>(kKeyBlock);
    key_alpha = arena.take<float>(kKeyBlock);
    scores = arena.take<float>(kKeyBlock * kLaneBlock);
    weights = P == 1 ? scores : arena.take<float>(kKeyBlock * kLaneBlock);
    across = arena.take<float>(kKeyBlock * kLaneBlock);
    across_rows = P == 1 ? reinterpret_cast<E*>(across) : arena.take<E>(kKeyBlock * kLaneBlock);
    key_sums = item.partial < 0 ? arena.take<float>(KeySums::floats(item.keys, lane_wide)) : nullptr;
    at = arena.take<const T*>(most(held, kKeyBlock));
    values_at = arena.take<const T*>(most(held, kKeyBlock));
    out_at = arena.take<T*>(kLaneBlock);
  }
};

// One step of the online softmax across the tile: `across` becomes the weights 2^(c (x + bias - top)) of every key.
static void softmax_across(const float* scores, int64_t n, int64_t ld, const float* bias, float c, const KeySums& sums,
                           int64_t first, float* key_alpha, float* across) {
  const vf vc = splat(c), lowest = splat(-kInfinity);
  float tops[kKeyBlock + W];
  for (int64_t j = 0; j < n; ++j) {
    vf top = lowest;
    for (int64_t i = 0; i < ld; i += W) {
      const vf x = load(scores + j * ld + i) + load(bias + i);
      store(across + j * ld + i, x);
      top = max(x, top);
    }
    tops[j] = reduce_max(top);
  }
  for (int64_t j = n; j % W != 0; ++j) tops[j] = -kInfinity;
  for (int64_t j = 0; j < n; j += W) {
    const vf before = load_first(sums.top + first + j, static_cast<int>(least(W, n - j)), -kInfinity);
    const vf top = max(load(tops + j), before);
    const vf anchor = top == lowest ? zero() : top;
    store(key_alpha + j, exp2((before - anchor) * vc));
    store_first(sums.top + first + j, top, static_cast<int>(least(W, n - j)));
    store(tops + j, anchor);
  }
  for (int64_t j = 0; j < n; ++j) {
    const vf anchor = splat(tops[j]);
    vf sum = load(sums.sum + (first + j) * W) * splat(key_alpha[j]);
    for (int64_t i = 0; i < ld; i += W) {
      const vf w = exp2((load(across + j * ld + i) - anchor) * vc);
      store(across + j * ld + i, w);
      sum = sum + w;
    }
    store(sums.sum + (first + j) * W, sum);
  }
}

// Ends the keys' softmax: pieces are brought to one maximum and added in order.
template <class T>
static void finish_keys(const CoAttentionParams& p, const CoAttentionMerge& merge, const float* base) {
  const CoAttentionItem& item = merge.first;
  const CoAttentionSide &lane = p.side[item.lane_side], &key = p.side[1 - item.lane_side];
  const float c = ScoreUnits(p).unit, keep = keep_factor(p);
  const int64_t wide = round_up(lane.value_dim, W), row0 = key.cu[item.sequence];
  float* pieces = const_cast<float*>(base);
  for (int64_t j = 0; j < item.keys; ++j) {
    float top = -kInfinity;
    for (int64_t i = 0; i < merge.pieces; ++i) {
      const float here = KeySums::at(pieces + i * merge.stride, item.keys).top[j];
      top = here > top || here != here ? here : top;
    }
    const float anchor = top == -kInfinity ? 0.0f : top;
    T* out = static_cast<T*>(key.out) + ((row0 + j) * p.heads + item.head) * lane.value_dim;
    float sum = 0.0f;
    for (int64_t i = 0; i < merge.pieces; ++i) {
      const KeySums s = KeySums::at(pieces + i * merge.stride, item.keys);
      const float weight = merge.pieces == 1 ? 1.0f : exp2(splat((s.top[j] - anchor) * (c * kLog2e)))[0];
      sum += reduce_add(load(s.sum + j * W)) * weight;
      float* first = KeySums::at(pieces, item.keys).acc + j * wide;
      const float* acc = s.acc + j * wide;
      for (int64_t e = 0; merge.pieces > 1 && e < wide; e += W) {
        store(first + e, i == 0 ? load(acc + e) * splat(weight) : fma(load(acc + e), splat(weight), load(first + e)));
      }
    }
    write_row(KeySums::at(pieces, item.keys).acc + j * wide, sum == 0.0f ? 0.0f : keep / sum, out, lane.value_dim);
    key.lse[item.head * key.rows + row0 + j] =
        sum == 0.0f ? -kInfinity : static_cast<float>(top * static_cast<double>(c) + __builtin_log(sum));
  }
}

template <class T>
static void finish_lanes(const CoAttentionParams& p, const CoAttentionItem& item, int64_t at, int64_t n,
                         const CoAttentionForward<T>& s) {
  const CoAttentionSide &lane = p.side[item.lane_side], &key = p.side[1 - item.lane_side];
  const int64_t row0 = lane.cu[item.sequence] + item.lane_begin + at, width = round_up(n, W);
  const vf keep = splat(keep_factor(p)), unit = splat(ScoreUnits(p).unit);
  for (int64_t i = 0; i < width; i += W) {
    const vf sum = load(s.l + at + i);
    store(s.factor + i, sum == zero() ? zero() : keep / sum);
    const vf lse = fma(load(s.m + at + i), unit, log2(sum) * splat(kLn2));
    store_first(lane.lse + item.head * lane.rows + row0 + i, sum == zero() ? splat(-kInfinity) : lse,
                static_cast<int>(least(W, n - i)));
  }
  for (int64_t i = 0; i < n; ++i) {
    s.out_at[i] = static_cast<T*>(lane.out) + ((row0 + i) * p.heads + item.head) * key.value_dim;
  }
  unpack_columns<T>(s.acc + at * key.value_dim, width, s.factor, s.out_at, n, key.value_dim);
}

template <class T>
static void co_attention_forward_item(const CoAttentionParams& p, const CoAttentionItem& item, float* workspace,
                                      Arena arena) {
  using E = Element<T>;
  constexpr int64_t P = Operand<T>::kPair;
  const CoAttentionForward<T> s(p, item, arena);
  const CoAttentionSide &lane = p.side[item.lane_side], &key = p.side[1 - item.lane_side];
  const ScoreUnits units(p);
  const float c = units.unit * kLog2e;
  const int64_t lane_row = lane.cu[item.sequence] + item.lane_begin, key_row = key.cu[item.sequence];
  const int64_t count = item.lane_end - item.lane_begin;
  float* sums_at = item.partial < 0 ? s.key_sums : workspace + item.partial;
  const KeySums sums = KeySums::at(sums_at, item.keys);
  for (int64_t j = 0; j < item.keys; ++j) sums.top[j] = -kInfinity;
  clear(sums.sum, item.keys * (W + s.lane_wide));

  rows_at<T>(lane.query, lane.query_row, lane.query_head, lane_row, count, item.head, s.at);
  rows_at<T>(lane.value, lane.value_row, lane.value_head, lane_row, count, item.head, s.values_at);
  for (int64_t at = 0; at < count; at += kLaneBlock) {
    const int64_t n = least(kLaneBlock, count - at), width = round_up(n, W);
    const T* padded[kLaneBlock];
    for (int64_t i = 0; i < width; ++i) padded[i] = i < n ? s.values_at[at + i] : nullptr;
    pack_columns<T>(s.at + at, n, p.head_dim, s.lanes + at * s.depth, width);
    pack_depth_rows<T>(padded, width, lane.value_dim, s.lane_values + at / P * s.lane_wide, s.lane_wide);
    bias_of(lane, lane_row + at, n, width, item.head, units.unit, s.lane_bias + at);
    for (int64_t i = 0; i < width; i += W) {
      store(s.m + at + i, splat(-kInfinity));
      store(s.l + at + i, zero());
    }
  }
  for (int64_t k = 0; k < item.keys; k += kKeyBlock) {
    const int64_t keys = least(kKeyBlock, item.keys - k), pairs = elements<T>(keys);
    rows_at<T>(key.query, key.query_row, key.query_head, key_row + k, keys, item.head, s.at);
    rows_at<T>(key.value, key.value_row, key.value_head, key_row + k, keys, item.head, s.values_at);
    pack_rows<T>(s.at, keys, p.head_dim, s.keys, s.key_ld);
    pack_depth_rows<T>(s.values_at, keys, key.value_dim, s.key_values, s.key_wide);
    if (key.bias != nullptr) bias_of(key, key_row + k, keys, keys, item.head, units.unit, s.key_bias);
    for (int64_t at = 0; at < count; at += kLaneBlock) {
      const int64_t n = least(kLaneBlock, count - at), ld = round_up(n, W);
      tile_product<E>(keys, ld, s.depth, s.keys, s.key_ld, s.lanes + at * s.depth, s.scores);
      units.apply(s.scores, keys * ld, nullptr);
      softmax_across(s.scores, keys, ld, s.lane_bias + at, c, sums, k, s.key_alpha, s.across);
      for (int64_t j = 0; key.bias != nullptr && j < keys; ++j) {
        for (int64_t i = 0; i < ld; i += W)
          store(s.scores + j * ld + i, load(s.scores + j * ld + i) + splat(s.key_bias[j]));
      }
      softmax_tile<T>(s.scores, keys, ld, ld, c, s.m + at, s.l + at, s.alpha, s.weights);
      if (p.dropout_p > 0.0f) {
        for_lanes_kept(p, lane.seed, item.head, lane_row + at, ld, k, keys, [&](int64_t j, int64_t i, vi keep) {
          float* w = s.weights + j / P * ld + i;
          if constexpr (P == 2) keep |= j % 2 ? vi{} + 0x0000ffff : vi{} + static_cast<int32_t>(0xffff0000u);
          store(w, reinterpret_cast<vf>(reinterpret_cast<vi>(load(w)) & keep));
        });
        for_keys_kept(p, key.seed, item.head, key_row + k, keys, item.lane_begin + at, ld,
                      KeepScaled{s.across, ld, 1.0f});
      }
      const E* weights = reinterpret_cast<const E*>(s.weights);
      float* acc = s.acc + at * key.value_dim;
      if (k > 0) {
        gemm<E, AOrder::columns, Init::scale>(key.value_dim, ld, pairs, s.key_values, s.key_wide, weights, ld, acc, ld,
                                              s.alpha);
      } else {
        gemm<E, AOrder::columns, Init::zero>(key.value_dim, ld, pairs, s.key_values, s.key_wide, weights, ld, acc, ld);
      }
      float* across_acc = sums.acc + k * s.lane_wide;
      for (int64_t j = 0; j < keys; ++j) {
        if (s.key_alpha[j] == 1.0f) continue;
        for (int64_t e = 0; e < s.lane_wide; e += W) {
          store(across_acc + j * s.lane_wide + e, load(across_acc + j * s.lane_wide + e) * splat(s.key_alpha[j]));
        }
      }
      pair_tile<T>(s.across, keys, ld, s.across_rows, nullptr);
      gemm<E, AOrder::rows, Init::add>(keys, s.lane_wide, ld / P, s.across_rows, ld / P,
                                       s.lane_values + at / P * s.lane_wide, s.lane_wide, across_acc, s.lane_wide);
    }
  }
  for (int64_t at = 0; at < count; at += kLaneBlock) finish_lanes<T>(p, item, at, least(kLaneBlock, count - at), s);
  if (item.partial < 0) finish_keys<T>(p, {item, 1, 0}, sums_at);
}

}  // namespace fastxattn::FXA_ISA
