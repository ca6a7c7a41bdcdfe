// What both orders of key importance share: scratch memory, the lanes' normalisers and weights, the weights themselves.
#pragma once

#include "attention/attention_few.inl"
#include "importance/importance.h"

namespace fastxattn::FXA_ISA {

inline constexpr int64_t kImportanceKeys = 48;  // key rows per score tile: a multiple of every tile height in gemm.h

template <class T>
struct ImportanceScratch {
  int64_t key_ld;          // elements of a packed row
  Element<T>* keys;        // [keys of the item][key_ld]
  Element<T>* queries;     // tiled: [elements of a row][kLaneBlock]; few: [lane][key_ld]
  float *scores, *extra;   // [kImportanceKeys][kLaneBlock], and a vector that may be read past its end
  float* sums;             // [keys of the item][W]
  float *lse, *weight;     // per lane: normaliser (infinite: none), weight
  int64_t *row, *key_row;  // row of each lane, of each key of the item
  int64_t* key_from;       // where a lane's head begins in a row
  int32_t *head, *begin, *end;
  const T **query_at, **key_at;
  float** score_at;  // where a lane's scores go

  ImportanceScratch(const AttentionParams& p, int64_t most_keys, Arena& arena) {
    key_ld = round_up(elements<T>(p.head_dim), W);
    keys = arena.take<Element<T>>(most_keys * key_ld);
    queries = arena.take<Element<T>>(kLaneBlock * key_ld);
    scores = arena.take<float>(kImportanceKeys * kLaneBlock + W);
    extra = p.key_bias != nullptr ? arena.take<float>(kImportanceKeys * kLaneBlock) : nullptr;
    sums = arena.take<float>(most_keys * W);
    lse = arena.take<float>(kLaneBlock);
    weight = arena.take<float>(kLaneBlock);
    row = arena.take<int64_t>(kLaneBlock);
    key_row = arena.take<int64_t>(most_keys);
    key_from = arena.take<int64_t>(kLaneBlock);
    head = arena.take<int32_t>(kLaneBlock);
    begin = arena.take<int32_t>(kLaneBlock);
    end = arena.take<int32_t>(kLaneBlock);
    query_at = arena.take<const T*>(kLaneBlock);
    key_at = arena.take<const T*>(most_keys);
    score_at = arena.take<float*>(kLaneBlock);
  }
};

// Completes lanes whose rows and heads are filled in, the latter counted from `head_base`: addresses, ranges,
// normalisers and weights. A row that saw no key, and a lane past the last row, weighs 0.
template <class T>
static void finish_importance_lanes(const ImportanceParams& params, const Sequence& sequence, int64_t head_base,
                                    const ImportanceScratch<T>& s, Lanes& lanes) {
  const AttentionParams& p = params.attention;
  const float infinity = __builtin_inff();
  const int shift = half_log2(sequence.keys);
  finish_lanes(p, sequence, s.begin, s.end, lanes);
  for (int64_t i = 0; i < lanes.width; ++i) {
    const bool there = i < lanes.count;
    const int64_t row = s.row[i], head = head_base + s.head[i];
    const float lse = params.lse[head * p.rows_q + row];
    s.query_at[i] = static_cast<const T*>(p.query) + row * p.query_row + head * p.query_head;
    s.lse[i] = there && lse != -infinity ? lse : infinity;
    // A query that sees nothing adds nothing, whatever its weight.
    s.weight[i] = !there || lse == -infinity ? 0.0f
                  : params.row_weight == nullptr
                      ? 1.0f
                      : params.row_weight[head * params.weight_head + row * params.weight_row];
    if (sizeof(T) == 4 && s.lse[i] > -1000.0f && s.lse[i] < 1000.0f) {
      // What is taken off lse goes into the weight, and so does what rounding takes from it then.
      const double less = lse - shift * kLn2Double;
      s.lse[i] = static_cast<float>(less);
      s.weight[i] *= (1.0f - static_cast<float>(less - s.lse[i])) / static_cast<float>(1 << shift);
    }
  }
}

// sums[j] += weight * exp(c * scores[j] - lse) for N vectors of lanes, J keys at a time; `add` false: sums[j] = it. For
// floats (`exact`) the difference is formed before it is turned into a power of two: rounding a large score times
// log2(e) would cost more than everything else. Weights other than floats' are 1 unless `given`; up to J - 1 rows past
// the last key are worked on too.
template <bool exact, bool given, int J, int N>
static void add_weights(const float* scores, int64_t keys, int64_t ld, float c, const float* lse, const float* weight,
                        bool add, float* sums, int64_t sum_ld) {
  vf base[N], factor[N];
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    base[n] = exact ? -load(lse + n * W) : load(lse + n * W) * splat(-kLog2e);
    factor[n] = load(weight + n * W);
  }
  const vf slope = splat(exact ? c : c * kLog2e), hidden = splat(-__builtin_inff());
  for (int64_t j = 0; j < keys; j += J, scores += J * ld, sums += J * sum_ld) {
    vf x[J * N];
#pragma GCC unroll 4
    for (int i = 0; i < J * N; ++i) x[i] = fma(load(scores + i / N * ld + i % N * W), slope, base[i % N]);
    if constexpr (exact) {
      exp_each(x);
    } else {
      exp2_each(x);
    }
#pragma GCC unroll 4
    for (int i = 0; i < J; ++i) {
      vf sum = add ? load(sums + i * sum_ld) : zero();
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const vf p = x[i * N + n];
        // A hidden key takes nothing even of a weight that is NaN.
        const vf w = given ? (load(scores + i * ld + n * W) == hidden ? zero() : factor[n]) : factor[n];
        sum = exact || given ? fma(p, w, sum) : sum + p;
      }
      store(sums + i * sum_ld, sum);
    }
  }
}

}  // namespace fastxattn::FXA_ISA
