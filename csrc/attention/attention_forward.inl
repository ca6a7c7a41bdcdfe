// Forward, tiled: a panel of keys and values at a time, all query blocks of the item against it.
//
//   S^T[key][lane] = K Q^T,  P^T = softmax weights,  O^T[value_dim][lane] = O^T * alpha + V^T P^T
#pragma once

#include "attention/attention_dropout.inl"
#include "attention/attention_plan.h"

namespace fastxattn::FXA_ISA {

// Hands out 64-byte aligned pieces of the thread's scratch memory; with a null base it only measures.
struct Arena {
  char* base;
  size_t used = 0;

  template <class U>
  U* take(int64_t n) {
    U* at = base == nullptr ? nullptr : reinterpret_cast<U*>(base + used);
    used += (static_cast<size_t>(n) * sizeof(U) + 63) / 64 * 64;
    return at;
  }
};

template <class T>
struct ForwardScratch {
  using E = Element<T>;
  int64_t depth, key_ld, value_ld;           // elements of a query or key row; leading dimensions of the panels
  E *keys, *values;                          // [kKeyBlock][key_ld]; [kKeyBlock / kPair][value_ld]
  E* queries;                                // per block of lanes [depth][block width]
  float* acc;                                // per block of lanes [value_dim][block width]
  float *m, *l, *alpha, *factor;             // per lane: running maximum, sum, correction; final factor
  float *scores, *weights, *extra;           // [kKeyBlock][kLaneBlock]
  const T **query_at, **key_at, **value_at;  // row addresses
  T** out_at;
  float** partial_at;
  int64_t *row, *key_row;
  int32_t *head, *begin, *end;

  ForwardScratch(const AttentionParams& p, Arena& arena) {
    depth = elements<T>(p.head_dim);
    key_ld = round_up(depth, W);
    value_ld = round_up(p.value_dim, W);
    keys = arena.take<E>(kKeyBlock * key_ld);
    values = arena.take<E>(kKeyBlock * value_ld);
    queries = arena.take<E>(kLaneChunk * key_ld);
    acc = arena.take<float>(kLaneChunk * value_ld);
    m = arena.take<float>(kLaneChunk);
    l = arena.take<float>(kLaneChunk);
    alpha = arena.take<float>(kLaneBlock);
    factor = arena.take<float>(kLaneBlock);
    scores = arena.take<float>(kKeyBlock * kLaneBlock);
    weights = Operand<T>::kPair == 2 ? arena.take<float>(kKeyBlock * kLaneBlock / 2) : scores;
    extra = p.key_bias || p.bias ? arena.take<float>(kKeyBlock * kLaneBlock) : nullptr;
    query_at = arena.take<const T*>(kLaneChunk);
    key_at = arena.take<const T*>(kKeyBlock);
    value_at = arena.take<const T*>(kKeyBlock);
    out_at = arena.take<T*>(kLaneChunk);
    partial_at = arena.take<float*>(kLaneChunk);
    row = arena.take<int64_t>(kLaneChunk);
    key_row = arena.take<int64_t>(kKeyBlock);
    head = arena.take<int32_t>(kLaneChunk);
    begin = arena.take<int32_t>(kLaneChunk);
    end = arena.take<int32_t>(kLaneChunk);
  }
};

// O^T += V^T P^T where a row of V holds NaN or infinity and some lanes do not see it: those skip it.
template <class T>
static void accumulate_seen(const Element<T>* values, int64_t value_ld, const float* weights, float* acc, int64_t ld,
                            int64_t value_dim, const Lanes& lanes, int64_t key_begin, int64_t keys,
                            const float* alpha) {
  const Element<T>* p = reinterpret_cast<const Element<T>*>(weights);
  for (int64_t c = 0; c < value_dim; ++c) {
    for (int64_t i = 0; i < lanes.count; ++i) {
      float sum = alpha == nullptr ? 0.0f : acc[c * ld + i] * alpha[i];
      for (int64_t j = 0; j < keys; ++j) {
        if (lanes.sees(i, key_begin + j)) sum += value_at(p, ld, j, i) * value_at(values, value_ld, j, c);
      }
      acc[c * ld + i] = sum;
    }
  }
}

// Keeps a split's lse in its workspace as two floats, `apart` elements from one another.
FXA_INLINE void store_partial_lse(float* at, int64_t apart, double lse) {
  at[0] = static_cast<float>(lse);
  at[apart] = lse - lse == 0.0 ? static_cast<float>(lse - at[0]) : 0.0f;
}

// Ends the online softmax of some lanes: the factor that normalises their sums, and their log-sum-exp.
static void close_softmax(const AttentionParams& p, int64_t width, const float* m, const float* l, bool touched,
                          bool transformed, float* factor, double* lse) {
  const vf keep = splat(p.dropout_p < 1.0f ? 1.0f / (1.0f - p.dropout_p) : 0.0f);
  const vf none = splat(-__builtin_inff());
  const vf scale = splat(transformed ? 1.0f : p.scale);
  for (int64_t i = 0; i < width; i += W) {
    const vf sum = load(l + i), top = load(m + i);
    const vi blank = touched ? sum == zero() : vi{} - 1;
    store(factor + i, blank ? zero() : keep / sum);
    const vf rough = blank ? none : fma(top, scale, log2(sum) * splat(kLn2));
    // The same in double, the sum's exponent kept apart from the logarithm of its mantissa.
    const vi bits = reinterpret_cast<vi>(sum);
    const vi exponent = (bits >> 23) - 127;
    const vf fraction = log2(reinterpret_cast<vf>((bits & 0x7fffff) | 0x3f800000));
    for (int k = 0; k < W; ++k) {
      const double fine =
          static_cast<double>(top[k]) * scale[k] + (exponent[k] + static_cast<double>(fraction[k])) * kLn2Double;
      lse[i + k] = rough[k] - rough[k] == 0.0f ? fine : rough[k];  // NaN and infinity as they are
    }
  }
}

// Writes one block's results: output rows in T, or float partial rows when the keys are split.
template <class T>
static void finish_block(const AttentionParams& p, int64_t kv_head, const Lanes& lanes, int64_t lane_begin,
                         bool touched, bool transformed, const ForwardScratch<T>& s, int64_t offset, float* partial,
                         int64_t sequence_lanes) {
  double lse[kLaneBlock];
  float* acc = s.acc + offset * p.value_dim;
  close_softmax(p, lanes.width, s.m + offset, s.l + offset, touched, transformed, s.factor, lse);
  if (!touched) {
    for (int64_t i = 0; i < p.value_dim * lanes.width; i += W) store(acc + i, zero());
  }
  const int64_t group = p.group();
  for (int64_t i = 0; i < lanes.count; ++i) {
    const int64_t head = kv_head * group + lanes.head[i];
    if (partial != nullptr) {
      const int64_t at = kv_head * sequence_lanes + lane_begin + i;
      s.partial_at[i] = partial + at * p.value_dim;
      const int64_t total = p.kv_heads * sequence_lanes;
      store_partial_lse(partial + total * p.value_dim + at, total, lse[i]);
    } else {
      s.out_at[i] = static_cast<T*>(p.out) + (lanes.row[i] * p.heads + head) * p.value_dim;
      write_lse(p, head, lanes.row[i], lse[i]);
    }
  }
  if (partial != nullptr) {
    unpack_columns<float>(acc, lanes.width, s.factor, s.partial_at, lanes.count, p.value_dim);
  } else {
    unpack_columns<T>(acc, lanes.width, s.factor, s.out_at, lanes.count, p.value_dim);
  }
}

// Asks for the next panel's rows a few at a time, from between the tiles of a product: rows of one head lie far apart,
// which the processor's own prefetchers do not follow.
template <class T>
struct PanelPrefetch {
  const AttentionParams* p;
  int64_t slot, end;  // key slots still to ask for
  int64_t head;
  int64_t rows_per_call;

  static PanelPrefetch next(const AttentionParams& p, const Sequence& s, int64_t head, int64_t key_begin,
                            int64_t key_end, int64_t k, int64_t tile_rows) {
    k += kKeyBlock;
    if (k >= key_end) k = key_begin, ++head;
    const int64_t keys = head < p.kv_heads ? least(kKeyBlock, key_end - k) : 0;
    return {&p, s.first_k + k, s.first_k + k + keys, head, tile_rows};
  }
  void operator()() {
    const int64_t stop = least(slot + rows_per_call, end);
    for (; slot < stop; ++slot) {
      const int64_t row = key_row_of(*p, slot);
      touch(static_cast<const T*>(p->key) + row * p->key_row + head * p->key_head, p->head_dim);
      touch(static_cast<const T*>(p->value) + row * p->value_row + head * p->value_head, p->value_dim);
    }
  }
  static void touch(const T* row, int64_t n) {
    const char* at = reinterpret_cast<const char*>(row);
    for (int64_t i = 0; i < n * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(at + i, 0, 2);
  }
};

// The same for rows whose addresses are known: the next block's queries, or output rows about to be written.
template <bool write>
struct RowPrefetch {
  const void* const* rows;
  int64_t left, bytes;
  int64_t offset;  // bytes added to every address
  int64_t rows_per_call = 8;

  void operator()() {
    for (int64_t i = 0; i < rows_per_call && left > 0; ++i, --left, ++rows) {
      const char* at = static_cast<const char*>(*rows) + offset;
      for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(at + b, write, 2);
    }
  }
};

template <class T>
static void forward_tiled(const AttentionParams& p, const ForwardItem& item, float* workspace, Arena arena) {
  using E = Element<T>;
  const ForwardScratch<T> s(p, arena);
  const Sequence sequence = sequence_of(p, item.sequence);
  const Lanes all = make_lanes(p, sequence, item.lane_begin, item.lane_end, s.row, s.head, s.begin, s.end);
  const int64_t group = p.group(), sequence_lanes = sequence.queries * group;
  const int64_t blocks = (all.count + kLaneBlock - 1) / kLaneBlock;
  Lanes block[kLaneChunk / kLaneBlock];
  for (int64_t b = 0; b < blocks; ++b) block[b] = all.slice(b * kLaneBlock, kLaneBlock);

  const bool transform = needs_transform(p);
  const float c = transform ? kLog2e : p.scale * kLog2e;
  const T* query = static_cast<const T*>(p.query);
  const int64_t row_bytes = p.head_dim * static_cast<int64_t>(sizeof(T));
  int64_t key_begin = item.key_begin, key_end = item.key_end;
  if (all.begin != nullptr) {  // whole panels outside every lane's range are never read
    if (all.first > key_begin) key_begin += (all.first - key_begin) / kKeyBlock * kKeyBlock;
    key_end = least(key_end, all.last);
  }

  for (int64_t head = item.head_begin; head < item.head_end; ++head) {
    for (int64_t i = 0; i < all.count; ++i) {
      s.query_at[i] = query + all.row[i] * p.query_row + (head * group + all.head[i]) * p.query_head;
    }
    bool touched[kLaneChunk / kLaneBlock] = {};
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t offset = b * kLaneBlock;
      for (int64_t i = 0; i < block[b].width; i += W) {
        store(s.m + offset + i, splat(-__builtin_inff()));
        store(s.l + offset + i, zero());
      }
    }
    for (int64_t k = key_begin; k < key_end; k += kKeyBlock) {
      const int64_t keys = least(kKeyBlock, key_end - k);
      locate_rows<T>(p, sequence, head, k, keys, s);
      pack_rows<T>(s.key_at, keys, p.head_dim, s.keys, s.key_ld);
      pack_depth_rows<T>(s.value_at, keys, p.value_dim, s.values, s.value_ld);
      const int64_t pairs = elements<T>(keys);
      auto prefetch = PanelPrefetch<T>::next(p, sequence, head, key_begin, key_end, k, 16);
      int finite = -1;  // of the value panel; looked at only when some lane must not see it
      for (int64_t b = 0; b < blocks; ++b) {
        const Lanes& lanes = block[b];
        if (!lanes.sees_any(k, k + keys)) continue;
        const int64_t offset = b * kLaneBlock, ld = lanes.width;
        const bool masked = !lanes.sees_all(k, k + keys);
        if (!touched[b])
          pack_columns<T>(s.query_at + offset, lanes.count, p.head_dim, s.queries + offset * s.depth, ld);
        gemm_deep<E, AOrder::rows>(keys, ld, s.depth, s.keys, s.key_ld, s.queries + offset * s.depth, ld, s.scores, ld,
                                   prefetch);
        prefetch.slot = prefetch.end;
        if (transform || masked) {
          if (s.extra != nullptr) gather_bias(p, item.sequence, sequence, head, lanes, s.key_row, keys, s.extra, ld);
          adjust_scores(p, s.scores, keys, ld, transform, s.extra, nullptr, masked, lanes, k);
        }
        softmax_tile<T>(s.scores, keys, ld, ld, c, s.m + offset, s.l + offset, s.alpha, s.weights);
        if (p.dropout_p > 0.0f) drop_weights<T>(p, head, lanes, k, keys, s.weights, ld);

        float* acc = s.acc + offset * p.value_dim;
        const E* weights = reinterpret_cast<const E*>(s.weights);
        RowPrefetch<false> queries{reinterpret_cast<const void* const*>(s.query_at), 0, row_bytes, 0};
        if (k == key_begin && b + 1 < blocks) {
          queries.rows += offset + kLaneBlock, queries.left = block[b + 1].count;
        } else if (k + keys == key_end && b + 1 == blocks && head + 1 < item.head_end) {
          queries.left = block[0].count, queries.offset = group * p.query_head * static_cast<int64_t>(sizeof(T));
        }
        if (masked && finite < 0) finite = all_finite(s.values, pairs * s.value_ld);
        if (masked && finite == 0) {
          accumulate_seen<T>(s.values, s.value_ld, s.weights, acc, ld, p.value_dim, lanes, k, keys,
                             touched[b] ? s.alpha : nullptr);
        } else if (touched[b]) {
          gemm<E, AOrder::columns, Init::scale>(p.value_dim, ld, pairs, s.values, s.value_ld, weights, ld, acc, ld,
                                                s.alpha, queries);
        } else {
          gemm<E, AOrder::columns, Init::zero>(p.value_dim, ld, pairs, s.values, s.value_ld, weights, ld, acc, ld,
                                               nullptr, queries);
        }
        touched[b] = true;
      }
    }
    float* partial = item.partial < 0 ? nullptr : workspace + item.partial;
    for (int64_t b = 0; b < blocks; ++b) {
      finish_block<T>(p, head, block[b], item.lane_begin + b * kLaneBlock, touched[b], transform, s, b * kLaneBlock,
                      partial, sequence_lanes);
    }
  }
}

// out = sum_i exp(lse_i - lse) out_i over the pieces of a sequence's keys, in their order.
template <class T>
static void merge_rows(const AttentionParams& p, const ForwardMerge& merge, const float* workspace) {
  const Sequence sequence = sequence_of(p, merge.sequence);
  const int64_t group = p.group(), lanes = sequence.queries * group;
  const float* base = workspace + merge.partial;
  for (int64_t head = 0; head < p.kv_heads; ++head) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t at = head * lanes + lane;
      const float* lses = base + p.kv_heads * lanes * p.value_dim + at;
      float top = -__builtin_inff();
      for (int64_t i = 0; i < merge.splits; ++i) top = lses[i * merge.stride] > top ? lses[i * merge.stride] : top;
      const float anchor = top == -__builtin_inff() ? 0.0f : top;
      float weight[kMaxSplits], sum = 0.0f;
      for (int64_t i = 0; i < merge.splits; ++i) {
        const float rest = lses[i * merge.stride + p.kv_heads * lanes];
        weight[i] = exp(splat(lses[i * merge.stride] - anchor))[0] * (1.0f + rest);
        sum += weight[i];
      }
      const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
      const int64_t row = query_row_of(p, sequence.first_q + lane / group), h = head * group + lane % group;
      T* out = static_cast<T*>(p.out) + (row * p.heads + h) * p.value_dim;
      for (int64_t c = 0; c < p.value_dim; c += W) {
        const int64_t here = least(W, p.value_dim - c);
        vf x = zero();
        for (int64_t i = 0; i < merge.splits; ++i) {
          const vf part = load_first(base + i * merge.stride + at * p.value_dim + c, static_cast<int>(here));
          x = fma(splat(weight[i]), part, x);
        }
        store_first_from_f32(out + c, x * splat(inverse), here);
      }
      write_lse(p, h, row, sum == 0.0f ? -__builtin_inf() : anchor + __builtin_log(static_cast<double>(sum)));
    }
  }
}

}  // namespace fastxattn::FXA_ISA
