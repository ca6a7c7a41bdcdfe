// Backward for a handful of query rows: keys and values are read in the order they lie, and their gradients are written
// the same way, each once and complete. Vector lanes run along head_dim; weights and their gradients are tiles
// [key][lane] with one lane per (head, query), as in attention_few.inl, shared with the tiled path.
#pragma once

#include "attention/attention_backward.inl"
#include "attention/attention_few.inl"

namespace fastxattn::FXA_ISA {

template <class T>
struct FewBackwardScratch : BackwardScratch<T> {
  int64_t query_ld, grad_ld;
  float *queries, *grads, *acc;    // [lane][query_ld], [lane][grad_ld], [lane][query_ld]
  int64_t *key_from, *value_from;  // where a lane's head begins in a row

  FewBackwardScratch(const AttentionParams& p, Arena& arena, int64_t tiles)
      : BackwardScratch<T>(p, arena, kLaneBlock, 0, tiles) {
    query_ld = round_up(p.head_dim, 2 * W), grad_ld = round_up(p.value_dim, 2 * W);
    queries = arena.take<float>(kLaneBlock * query_ld);
    grads = arena.take<float>(kLaneBlock * grad_ld);
    acc = arena.take<float>(kLaneBlock * query_ld);
    key_from = arena.take<int64_t>(kLaneBlock);
    value_from = arena.take<int64_t>(kLaneBlock);
  }
};

// One item's lanes: every (key/value head, query, member); `head` holds absolute heads, so the head base is 0.
template <class T>
static Lanes few_lanes(const AttentionParams& p, const AttentionGradients& g, const Sequence& sequence,
                       const BackwardItem& item, const FewBackwardScratch<T>& s) {
  const int64_t group = p.group(), per_head = sequence.queries * group;
  Lanes lanes{(item.head_end - item.head_begin) * per_head, 0, s.row, s.head, nullptr, nullptr, 0, 0, 0, 0};
  for (int64_t i = 0; i < lanes.count; ++i) {
    s.row[i] = query_row_of(p, sequence.first_q + i % per_head / group);
    s.head[i] = static_cast<int32_t>((item.head_begin + i / per_head) * group + i % group);
    s.lane[i] = item.head_begin * per_head + i;
    s.key_from[i] = s.head[i] / group * p.key_head;
    s.value_from[i] = s.head[i] / group * p.value_head;
  }
  finish_lanes(p, sequence, s.begin, s.end, lanes);
  for (int64_t i = 0; i < lanes.width; ++i) {
    load_lane<T>(p, g, s.head[i], s.row[i], sequence.keys, i, i < lanes.count, s);
    if (i >= lanes.count) continue;
    for (int64_t c = 0; c < s.query_ld; c += W) {
      store(s.queries + i * s.query_ld + c, load_first_as_f32(s.query_at[i] + c, p.head_dim - c));
    }
    for (int64_t c = 0; c < s.grad_ld; c += W) {
      store(s.grads + i * s.grad_ld + c, load_first_as_f32(s.grad_at[i] + c, p.value_dim - c));
    }
  }
  return lanes;
}

// P and dP of one panel of keys for all lanes.
template <class T>
static void few_weights(const AttentionParams& p, const AttentionGradients& g, const BackwardItem& item,
                        const Sequence& sequence, const Lanes& lanes, int64_t k, int64_t keys,
                        const FewBackwardScratch<T>& s, const BackwardScratch<T>& t) {
  const int64_t ld = lanes.width;
  clear(t.scores, keys * ld);
  clear(t.dscores, keys * ld);
  locate_rows<T>(p, sequence, 0, k, keys, s);
  score_rows<float>(s.queries, s.query_ld, s.key_at, keys, s.key_from, lanes.count, p.head_dim, t.scores, ld);
  if (g.needs_scores()) {
    score_rows<float>(s.grads, s.grad_ld, s.value_at, keys, s.value_from, lanes.count, p.value_dim, t.dscores, ld);
  }
  const bool masked = !lanes.sees_all(k, k + keys);
  tile_weights<T>(p, item.sequence, sequence, 0, lanes, 0, k, keys, masked, t);
  if (g.needs_scores()) drop_dweights<T>(p, 0, lanes, k, keys, t);
}

// to[c] = factor * sum of weights[lane] rows[lane][c] over the lanes [first, last) that see the key.
template <class U>
static void combine_lanes(const float* weights, const float* rows, int64_t ld, const Lanes& lanes, int64_t first,
                          int64_t last, int64_t key, float factor, U* to, int64_t n) {
  for (int64_t c = 0; c < n; c += W) {
    vf sum = zero();
    for (int64_t i = first; i < last; ++i) {
      if (lanes.sees(i, key)) sum = fma(splat(weights[i]), load(rows + i * ld + c), sum);
    }
    store_first_from_f32(to + c, sum * splat(factor), n - c);
  }
}

// The gradients of one panel of keys, and its share of the queries'.
template <class T>
static void few_panel(const AttentionParams& p, const AttentionGradients& g, const BackwardItem& item,
                      const Sequence& sequence, const Lanes& lanes, int64_t k, int64_t keys, float* key_partial,
                      float* key_bias, const FewBackwardScratch<T>& s, const BackwardScratch<T>& t) {
  const int64_t ld = lanes.width, per_head = sequence.queries * p.group();
  const float keep = p.dropout_p < 1.0f ? 1.0f / (1.0f - p.dropout_p) : 0.0f;
  normalise_weights(lanes, 0, keys, t);
  if (g.needs_scores()) {
    tile_dscores<T>(lanes, 0, k, keys, !lanes.sees_all(k, k + keys), t);
    if (key_bias != nullptr) {
      const int64_t row = g.key_bias_has_heads ? 0 : item.head_begin;
      add_key_bias(t.dscores, keys, lanes, g.key_bias_has_heads, key_bias + row * sequence.keys + k, sequence.keys);
    }
    uncap_dscores(keys * ld, t);
  }
  if (p.dropout_p > 0.0f) drop_weights<float>(p, 0, lanes, k, keys, t.scores, ld);
  locate_rows<T>(p, sequence, 0, k, keys, s);
  if (g.grad_query) {
    add_rows<float>(t.dscores, ld, s.key_at, keys, s.key_from, lanes, k, p.head_dim, nullptr, s.acc, s.query_ld);
  }
  for (int64_t j = 0; j < keys; ++j) {
    const float *weights = t.scores + j * ld, *dscores = t.dscores + j * ld;
    for (int64_t head = item.head_begin; head < item.head_end; ++head) {
      const int64_t first = (head - item.head_begin) * per_head, last = first + per_head;
      if (key_partial != nullptr) {
        float* to = key_partial + (head * sequence.keys + k + j) * (p.head_dim + p.value_dim);
        combine_lanes(dscores, s.queries, s.query_ld, lanes, first, last, k + j, p.scale, to, p.head_dim);
        combine_lanes(weights, s.grads, s.grad_ld, lanes, first, last, k + j, keep, to + p.head_dim, p.value_dim);
        continue;
      }
      const int64_t at = s.key_row[j] * p.kv_heads + head;
      if (g.grad_key) {
        combine_lanes(dscores, s.queries, s.query_ld, lanes, first, last, k + j, p.scale,
                      static_cast<T*>(g.grad_key) + at * p.head_dim, p.head_dim);
      }
      if (g.grad_value) {
        combine_lanes(weights, s.grads, s.grad_ld, lanes, first, last, k + j, keep,
                      static_cast<T*>(g.grad_value) + at * p.value_dim, p.value_dim);
      }
    }
  }
}

// Delta beforehand, as sum_item.
template <class T>
static void sum_few(const AttentionParams& p, const AttentionGradients& g, const BackwardItem& item, float* workspace,
                    Arena arena) {
  const Sequence sequence = sequence_of(p, item.sequence);
  const FewBackwardScratch<T> s(p, arena, 1);
  const Lanes lanes = few_lanes<T>(p, g, sequence, item, s);
  for (int64_t k = item.key_begin; k < item.key_end; k += kKeyBlock) {
    const int64_t keys = least(kKeyBlock, item.key_end - k);
    if (!lanes.sees_any(k, k + keys)) continue;
    few_weights<T>(p, g, item, sequence, lanes, k, keys, s, s);
    sum_delta(s.scores, g.needs_scores() ? s.dscores : nullptr, lanes, k, keys, !lanes.sees_all(k, k + keys), s.delta,
              s.total);
  }
  float* delta = workspace + item.delta_partial;
  float* total = delta + p.kv_heads * sequence.queries * p.group();
  for (int64_t i = 0; i < lanes.count; ++i) delta[s.lane[i]] = s.delta[i], total[s.lane[i]] = s.total[i];
}

template <class T>
static void backward_few(const AttentionParams& p, const AttentionGradients& g, const BackwardItem& item,
                         float* workspace, Arena arena) {
  const Sequence sequence = sequence_of(p, item.sequence);
  const Holding hold(kSumsDelta<T>, item);
  const FewBackwardScratch<T> s(p, arena, hold.tiles);
  const Lanes lanes = few_lanes<T>(p, g, sequence, item, s);
  const int64_t ld = lanes.width, sequence_lanes = sequence.queries * p.group();
  float* key_partial = item.key_partial < 0 ? nullptr : workspace + item.key_partial;
  float* key_bias = item.key_bias_partial < 0 ? nullptr : workspace + item.key_bias_partial;
  const int64_t bias_rows = g.key_bias_has_heads ? p.group() : 1;
  for (int64_t r = item.head_begin * bias_rows; key_bias != nullptr && r < item.head_end * bias_rows; ++r) {
    clear(key_bias + r * sequence.keys + item.key_begin, item.key_end - item.key_begin);
  }
  clear(s.acc, lanes.count * s.query_ld);

  const auto weigh = [&](int64_t k, int64_t keys, const BackwardScratch<T>& t) {
    if (lanes.sees_any(k, k + keys)) return few_weights<T>(p, g, item, sequence, lanes, k, keys, s, t);
    clear(t.scores, keys * ld);
    clear(t.dscores, keys * ld);
  };
  int64_t tile = 0;
  for (int64_t k = item.key_begin; hold.tiles_held && k < item.key_end; k += kKeyBlock) {
    const int64_t keys = least(kKeyBlock, item.key_end - k);
    const BackwardScratch<T> t = s.tile(tile++);
    weigh(k, keys, t);
    sum_delta(t.scores, g.needs_scores() ? t.dscores : nullptr, lanes, k, keys, !lanes.sees_all(k, k + keys), s.delta,
              s.total);
  }
  if (kSumsDelta<T>) {
    const float* beforehand = item.delta < 0 ? nullptr : workspace + item.delta;
    // The lanes' numbers count over all heads already.
    finish_delta<T>(p, 0, lanes, beforehand, sequence_lanes, s);
  }
  tile = 0;
  for (int64_t k = item.key_begin; k < item.key_end; k += kKeyBlock) {
    const int64_t keys = least(kKeyBlock, item.key_end - k);
    const BackwardScratch<T> t = s.tile(hold.tiles_held ? tile++ : 0);
    if (!hold.tiles_held) weigh(k, keys, t);
    few_panel<T>(p, g, item, sequence, lanes, k, keys, key_partial, key_bias, s, t);
  }
  for (int64_t i = 0; g.grad_query && i < lanes.count; ++i) {
    if (item.query_partial >= 0) {
      write_row(s.acc + i * s.query_ld, p.scale, workspace + item.query_partial + s.lane[i] * p.head_dim, p.head_dim);
    } else {
      T* to = static_cast<T*>(g.grad_query) + (s.row[i] * p.heads + s.head[i]) * p.head_dim;
      write_row(s.acc + i * s.query_ld, p.scale, to, p.head_dim);
    }
  }
}

}  // namespace fastxattn::FXA_ISA
