// One body for every instruction set: score tiles S[key][query lane], summed along the lanes.
//
// The queries of a head are packed once per block of lanes, the keys once per item. A key's sum lives in one vector
// until the end, so a lane adds queries i, i + W, ... in order, whatever the number of threads.
#include <type_traits>

#include "attention/attention_softmax.inl"
#include "importance/importance.h"

namespace fastxattn::FXA_ISA {

inline constexpr int64_t kImportanceLanes = 64;  // query rows per score tile
inline constexpr int64_t kImportanceKeys = 48;   // key rows per score tile: a multiple of every tile height in gemm.h

template <class T>
struct ImportanceScratch {
  int64_t key_ld;          // elements of a packed key row
  Element<T>* keys;        // [keys of the item][key_ld]
  Element<T>* queries;     // [elements of a row][kImportanceLanes]
  float *scores, *extra;   // [kImportanceKeys][kImportanceLanes]
  float* sums;             // [keys of the item][W]
  float *lse, *weight;     // per lane: normaliser (infinite: none), weight
  int64_t *row, *key_row;  // row of each lane, of each key of the item
  int32_t *head, *begin, *end;
  const T **query_at, **key_at;
  size_t bytes = 0;

  ImportanceScratch(const AttentionParams& p, int64_t most_keys, char* memory) {
    const auto take = [&](auto*& at, int64_t n) {
      at = memory == nullptr ? nullptr : reinterpret_cast<std::remove_reference_t<decltype(at)>>(memory + bytes);
      bytes += (static_cast<size_t>(n) * sizeof(*at) + 63) / 64 * 64;
    };
    key_ld = round_up(elements<T>(p.head_dim), W);
    take(keys, most_keys * key_ld);
    take(queries, elements<T>(p.head_dim) * kImportanceLanes);
    take(scores, kImportanceKeys * kImportanceLanes);
    take(extra, p.key_bias != nullptr ? kImportanceKeys * kImportanceLanes : 0);
    take(sums, most_keys * W);
    take(lse, kImportanceLanes);
    take(weight, kImportanceLanes);
    take(row, kImportanceLanes);
    take(key_row, most_keys);
    take(head, kImportanceLanes);
    take(begin, kImportanceLanes);
    take(end, kImportanceLanes);
    take(query_at, kImportanceLanes);
    take(key_at, most_keys);
  }
};

// The lanes' rows, ranges, normalisers and weights. A row that saw no key, and a lane that is not there, weighs 0.
template <class T>
static Lanes importance_lanes(const ImportanceParams& params, const Sequence& sequence, int64_t query, int64_t count,
                              int64_t query_head, const ImportanceScratch<T>& s) {
  const AttentionParams& p = params.attention;
  Lanes lanes{count, round_up(count, W), s.row, s.head, nullptr, nullptr, 0, 0, 0, 0};
  const float infinity = __builtin_inff();
  constexpr bool exact = sizeof(T) == 4;
  const int shift = half_log2(sequence.keys);
  for (int64_t i = 0; i < lanes.width; ++i) {
    const bool there = i < count;
    const int64_t row = there ? query_row_of(p, sequence.first_q + query + i) : s.row[i - 1];
    const float lse = params.lse[query_head * p.rows_q + row];
    s.row[i] = row;
    s.head[i] = static_cast<int32_t>(query_head % p.group());
    s.lse[i] = there && lse != -infinity ? lse : infinity;
    // A query that sees nothing adds nothing, whatever its weight.
    s.weight[i] = !there || lse == -infinity ? 0.0f
                  : params.row_weight == nullptr
                      ? 1.0f
                      : params.row_weight[query_head * params.weight_head + row * params.weight_row];
    if (exact && s.lse[i] > -1000.0f && s.lse[i] < 1000.0f) {
      // What is taken off lse goes into the weight, and so does what rounding takes from it then.
      const double less = lse - shift * kLn2Double;
      s.lse[i] = static_cast<float>(less);
      s.weight[i] *= (1.0f - static_cast<float>(less - s.lse[i])) / static_cast<float>(1 << shift);
    }
    if (p.kv_range != nullptr) {
      s.begin[i] = p.kv_range[2 * row] < 0 ? 0 : p.kv_range[2 * row];
      s.end[i] =
          p.kv_range[2 * row + 1] > sequence.keys ? static_cast<int32_t>(sequence.keys) : p.kv_range[2 * row + 1];
    }
  }
  if (p.kv_range != nullptr) {
    lanes.begin = s.begin;
    lanes.end = s.end;
    lanes.summarize();
  }
  return lanes;
}

// sums[j] += weight * exp(c * scores[j] - lse) for N vectors of lanes. For floats (`exact`) the difference is formed
// before it is turned into a power of two: rounding a large score times log2(e) would cost more than everything else.
template <bool exact, bool weighted, int N>
static void add_weights(const float* scores, int64_t keys, float c, const float* lse, const float* weight,
                        float* sums) {
  vf base[N], factor[N];
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    base[n] = exact ? -load(lse + n * W) : load(lse + n * W) * splat(-kLog2e);
    factor[n] = weighted ? load(weight + n * W) : zero();
  }
  const vf slope = splat(exact ? c : c * kLog2e), hidden = splat(-__builtin_inff());
  for (int64_t j = 0; j < keys; ++j) {
    vf sum = load(sums + j * W);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const vf score = load(scores + j * kImportanceLanes + n * W);
      const vf x = fma(score, slope, base[n]);
      const vf p = exact ? exp(x) : exp2(x);
      // A hidden key takes nothing even of a weight that is NaN.
      sum = weighted ? fma(p, score == hidden ? zero() : factor[n], sum) : sum + p;
    }
    store(sums + j * W, sum);
  }
}

template <bool exact, bool weighted>
static void add_all_weights(const float* scores, int64_t keys, int64_t width, float c, const float* lse,
                            const float* weight, float* sums) {
  int64_t i = 0;
  for (; i + 4 * W <= width; i += 4 * W) {
    add_weights<exact, weighted, 4>(scores + i, keys, c, lse + i, weight + i, sums);
  }
  for (; i < width; i += W) add_weights<exact, weighted, 1>(scores + i, keys, c, lse + i, weight + i, sums);
}

template <class T>
static void importance_item(const ImportanceParams& params, const ImportanceItem& item, int64_t most_keys,
                            void* memory) {
  using E = Element<T>;
  constexpr bool exact = sizeof(T) == 4;
  const AttentionParams& p = params.attention;
  const ImportanceScratch<T> s(p, most_keys, static_cast<char*>(memory));
  const Sequence sequence = sequence_of(p, item.sequence);
  const int64_t kv_head = item.head / p.group(), keys = item.key_end - item.key_begin, depth = elements<T>(p.head_dim);
  for (int64_t j = 0; j < keys; ++j) {
    s.key_row[j] = key_row_of(p, sequence.first_k + item.key_begin + j);
    s.key_at[j] = static_cast<const T*>(p.key) + s.key_row[j] * p.key_row + kv_head * p.key_head;
    store(s.sums + j * W, zero());
  }
  pack_rows<T>(s.key_at, keys, p.head_dim, s.keys, s.key_ld);
  const bool transform = needs_transform(p);
  const float c = transform ? 1.0f : p.scale;

  for (int64_t query = 0; query < sequence.queries; query += kImportanceLanes) {
    const int64_t count = least(kImportanceLanes, sequence.queries - query);
    const Lanes lanes = importance_lanes(params, sequence, query, count, item.head, s);
    if (!lanes.sees_any(item.key_begin, item.key_end)) continue;
    for (int64_t i = 0; i < count; ++i) {
      s.query_at[i] = static_cast<const T*>(p.query) + s.row[i] * p.query_row + item.head * p.query_head;
    }
    pack_columns<T>(s.query_at, count, p.head_dim, s.queries, kImportanceLanes);
    for (int64_t j = 0; j < keys; j += kImportanceKeys) {
      const int64_t first = item.key_begin + j, n = least(kImportanceKeys, keys - j);
      if (!lanes.sees_any(first, first + n)) continue;
      // As in attention's backward pass: the few products of a row probe are summed in short pieces.
      gemm_deep<E, AOrder::rows>(n, lanes.width, depth, s.keys + j * s.key_ld, s.key_ld, s.queries, kImportanceLanes,
                                 s.scores, kImportanceLanes, NoHook{}, exact && lanes.width <= 32 ? 32 : kDeepest);
      const bool masked = !lanes.sees_all(first, first + n);
      if (transform || masked) {
        const float* extra = p.key_bias != nullptr ? s.extra : nullptr;
        if (extra != nullptr) {
          gather_bias(p, item.sequence, sequence, kv_head, lanes, s.key_row + j, n, s.extra, kImportanceLanes);
        }
        adjust_scores(p, s.scores, n, kImportanceLanes, transform, extra, nullptr, masked, lanes, first);
      }
      const auto add =
          exact || params.row_weight != nullptr ? add_all_weights<exact, true> : add_all_weights<exact, false>;
      add(s.scores, n, lanes.width, c, s.lse, s.weight, s.sums + j * W);
    }
  }
  float* score = params.score + item.head * p.slots_k + sequence.first_k + item.key_begin;
  for (int64_t j = 0; j < keys; ++j) score[j] = reduce_add(load(s.sums + j * W));
}

size_t importance_scratch(const AttentionParams& p, int64_t most_keys) {
  switch (p.dtype) {
    case DType::bf16: return ImportanceScratch<bf16_t>(p, most_keys, nullptr).bytes;
    case DType::f16: return ImportanceScratch<f16_t>(p, most_keys, nullptr).bytes;
    default: return ImportanceScratch<float>(p, most_keys, nullptr).bytes;
  }
}

void importance_of_keys(const ImportanceParams& p, const ImportanceItem& item, int64_t most_keys, void* memory) {
  switch (p.attention.dtype) {
    case DType::bf16: return importance_item<bf16_t>(p, item, most_keys, memory);
    case DType::f16: return importance_item<f16_t>(p, item, most_keys, memory);
    default: return importance_item<float>(p, item, most_keys, memory);
  }
}

}  // namespace fastxattn::FXA_ISA
