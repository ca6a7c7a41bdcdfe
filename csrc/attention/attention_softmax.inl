// What happens to a tile of scores between the two products: options, masks, online softmax, dropout.
//
// A tile is S[key][lane]: keys down, query rows along the vector lanes, so that every step is vertical.
#pragma once

#include "attention/attention_pack.inl"

namespace fastxattn::FXA_ISA {

inline constexpr double kLn2Double = 0.6931471805599453;

// Half the base-2 logarithm of a number of keys, rounded down: what lse is lowered by, times ln 2, where weights are
// recomputed from it. The rounding of score - lse grows with it, and lse lies above the scores by the logarithm of the
// number of keys that matter; as a power of two it is given back by an exact factor.
FXA_INLINE int half_log2(int64_t keys) {
  return keys > 0 ? (63 - __builtin_clzll(static_cast<uint64_t>(keys))) / 2 : 0;
}

// The lanes of one tile, and what of their rows the options need.
struct Lanes {
  int64_t count;                   // lanes in use
  int64_t width;                   // rounded up to W; the surplus repeats the last lane's entries
  int64_t* row;                    // query row of each lane
  int32_t* head;                   // head within its group
  int32_t *begin, *end;            // visible key slots, clamped to the sequence; null without kv_range
  int32_t first, last;             // union of the ranges
  int32_t inner_begin, inner_end;  // slots that every lane sees

  Lanes slice(int64_t from, int64_t n) const {
    Lanes s = *this;
    s.count = least(n, count - from);
    s.width = round_up(s.count, W);
    s.row += from;
    s.head += from;
    if (begin != nullptr) {
      s.begin += from;
      s.end += from;
      s.summarize();
    }
    return s;
  }
  void summarize() {
    first = INT32_MAX, last = 0, inner_begin = 0, inner_end = INT32_MAX;
    for (int64_t i = 0; i < count; ++i) {
      if (begin[i] < end[i]) {
        first = begin[i] < first ? begin[i] : first;
        last = end[i] > last ? end[i] : last;
      }
      inner_begin = begin[i] > inner_begin ? begin[i] : inner_begin;
      inner_end = end[i] < inner_end ? end[i] : inner_end;
    }
  }
  bool sees_any(int64_t key_begin, int64_t key_end) const {
    return begin == nullptr || (first < key_end && last > key_begin);
  }
  bool sees_all(int64_t key_begin, int64_t key_end) const {
    return begin == nullptr || (inner_begin <= key_begin && inner_end >= key_end);
  }
  // Lanes [lane, lane + W) that see a key, as a mask; only with ranges.
  vi seen(int64_t lane, int64_t key) const {
    const vi first_key = reinterpret_cast<vi>(load(reinterpret_cast<const float*>(begin + lane)));
    const vi end_key = reinterpret_cast<vi>(load(reinterpret_cast<const float*>(end + lane)));
    const vi here = splat(static_cast<int32_t>(key));
    return (here >= first_key) & (here < end_key);
  }
  bool sees(int64_t lane, int64_t key) const { return begin == nullptr || (begin[lane] <= key && key < end[lane]); }
};

// Completes lanes whose rows and heads are filled in: their ranges, and the surplus up to the vector width.
static void finish_lanes(const AttentionParams& p, const Sequence& s, int32_t* begin, int32_t* end, Lanes& lanes) {
  lanes.width = round_up(lanes.count, W);
  for (int64_t i = lanes.count; i > 0 && i < lanes.width; ++i) {
    lanes.row[i] = lanes.row[i - 1];
    lanes.head[i] = lanes.head[i - 1];
  }
  if (p.kv_range == nullptr) return;
  const int32_t keys = static_cast<int32_t>(s.keys);
  for (int64_t i = 0; i < lanes.width; ++i) {
    const int32_t b = p.kv_range[2 * lanes.row[i]], e = p.kv_range[2 * lanes.row[i] + 1];
    begin[i] = b < 0 ? 0 : b;
    end[i] = e > keys ? keys : e;
  }
  lanes.begin = begin;
  lanes.end = end;
  lanes.summarize();
}

// Lanes [lane_begin, lane_end) of a sequence.
static Lanes make_lanes(const AttentionParams& p, const Sequence& s, int64_t lane_begin, int64_t lane_end, int64_t* row,
                        int32_t* head, int32_t* begin, int32_t* end) {
  Lanes lanes{lane_end - lane_begin, 0, row, head, nullptr, nullptr, 0, 0, 0, 0};
  const int64_t group = p.group();
  int64_t query = lane_begin / group, member = lane_begin % group;
  for (int64_t i = 0; i < lanes.count; ++i) {
    row[i] = query_row_of(p, s.first_q + query);
    head[i] = static_cast<int32_t>(member);
    if (++member == group) member = 0, ++query;
  }
  finish_lanes(p, s, begin, end, lanes);
  return lanes;
}

static inline bool is_capped(const AttentionParams& p) { return p.softcap > 0.0f; }

// Whether scores go through adjust_scores whole, or stay raw with the scale folded into the exponent.
static inline bool needs_transform(const AttentionParams& p) {
  return is_capped(p) || p.key_bias != nullptr || p.bias != nullptr || !(p.scale > 0.0f);
}

FXA_INLINE float bias_value(const AttentionParams& p, int64_t offset) {
  switch (p.bias_dtype) {
    case DType::bf16: return to_f32(static_cast<const bf16_t*>(p.bias)[offset]);
    case DType::f16: return to_f32(static_cast<const f16_t*>(p.bias)[offset]);
    default: return static_cast<const float*>(p.bias)[offset];
  }
}

// extra[key][lane] = key_bias + bias for a tile of keys with the given rows.
static void gather_bias(const AttentionParams& p, int64_t b, const Sequence& s, int64_t kv_head, const Lanes& lanes,
                        const int64_t* key_rows, int64_t keys, float* extra, int64_t ld) {
  const int64_t head0 = kv_head * p.group();
  for (int64_t i = 0; i < lanes.width; ++i) {
    const int64_t head = head0 + lanes.head[i];
    const int64_t base = b * p.bias_stride[0] + head * p.bias_stride[1] + (lanes.row[i] - s.first_q) * p.bias_stride[2];
    for (int64_t j = 0; j < keys; ++j) {
      float x = 0.0f;
      if (p.key_bias != nullptr) x = p.key_bias[key_rows[j] * p.key_bias_row + head * p.key_bias_head];
      if (p.bias != nullptr) x += bias_value(p, base + (key_rows[j] - s.first_k) * p.bias_stride[3]);
      extra[j * ld + i] = x;
    }
  }
}

// Turns raw products into scores: scale, cap and bias when `transform`, and -inf where a lane does not see a key when
// `masked`. `slope` (or null) receives d capped / d uncapped.
static void adjust_scores(const AttentionParams& p, float* scores, int64_t keys, int64_t ld, bool transform,
                          const float* extra, float* slope, bool masked, const Lanes& lanes, int64_t key_begin) {
  const vf hidden = splat(-__builtin_inff());
  const vf scale = splat(p.scale), cap = splat(p.softcap), uncap = splat(p.scale / p.softcap);
  for (int64_t j = 0; j < keys; ++j) {
    for (int64_t i = 0; i < lanes.width; i += W) {
      vf x = load(scores + j * ld + i);
      if (transform) {
        if (is_capped(p)) {
          const vf t = tanh(x * uncap);
          if (slope != nullptr) store(slope + j * ld + i, splat(1.0f) - t * t);
          x = cap * t;
        } else {
          x = x * scale;
        }
        if (extra != nullptr) x = x + load(extra + j * ld + i);
      }
      if (masked) x = lanes.seen(i, key_begin + j) ? x : hidden;
      store(scores + j * ld + i, x);
    }
  }
}

// One step of the online softmax in base 2 on N vectors of lanes: updates the running maximum `m` (of raw scores) and
// sum `l`, leaves the factor for earlier results in `alpha`, and the weights 2^(c (s - m)) as the second product's
// operand in `weights` (for floats in place: weights == scores). Depth pairs past the last key are zero.
template <class T, int N>
static void softmax_step(float* scores, int64_t keys, int64_t ld, float c, float* m, float* l, float* alpha,
                         float* weights) {
  vf top[N], anchor[N], sum0[N], sum1[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) top[n] = load(m + n * W);
  int64_t j = 0;
  if constexpr (N < 3) {  // few chains: a second one hides the latency
    vf other[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) other[n] = top[n];
    for (; j + 2 <= keys; j += 2) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        top[n] = max(load(scores + j * ld + n * W), top[n]);
        other[n] = max(load(scores + (j + 1) * ld + n * W), other[n]);
      }
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) top[n] = max(other[n], top[n]);
  }
  for (; j < keys; ++j) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) top[n] = max(load(scores + j * ld + n * W), top[n]);
  }
  const vf vc = splat(c), lowest = splat(-__builtin_inff());
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    // A lane that has seen nothing yet has maximum -inf: any finite stand-in keeps its weights at 2^-inf = 0.
    // The difference comes before the factor: scores of -1e10, as additive masks make them, would not survive after it.
    anchor[n] = top[n] == lowest ? zero() : top[n];
    store(alpha + n * W, exp2((load(m + n * W) - anchor[n]) * vc));
    store(m + n * W, top[n]);
    sum0[n] = sum1[n] = zero();
  }
  for (j = 0; j + 2 <= keys; j += 2) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const vf w0 = exp2((load(scores + j * ld + n * W) - anchor[n]) * vc);
      const vf w1 = exp2((load(scores + (j + 1) * ld + n * W) - anchor[n]) * vc);
      sum0[n] = sum0[n] + w0;
      sum1[n] = sum1[n] + w1;
      if constexpr (Operand<T>::kPair == 2) {
#if defined(FXA_HAS_BF16_DOT)
        store(weights + j / 2 * ld + n * W, pair_bf16(w0, w1));
#endif
      } else {
        store(weights + j * ld + n * W, w0);
        store(weights + (j + 1) * ld + n * W, w1);
      }
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    if (j < keys) {
      const vf w = exp2((load(scores + j * ld + n * W) - anchor[n]) * vc);
      sum0[n] = sum0[n] + w;
#if defined(FXA_HAS_BF16_DOT)
      if constexpr (Operand<T>::kPair == 2) {
        store(weights + j / 2 * ld + n * W, pair_bf16(w, zero()));
      } else
#endif
        store(weights + j * ld + n * W, w);
    }
    store(l + n * W, fma(load(l + n * W), load(alpha + n * W), sum0[n] + sum1[n]));
  }
}

template <class T>
static void softmax_tile(float* scores, int64_t keys, int64_t width, int64_t ld, float c, float* m, float* l,
                         float* alpha, float* weights) {
  int64_t i = 0;
  for (; i + 4 * W <= width; i += 4 * W) {
    softmax_step<T, 4>(scores + i, keys, ld, c, m + i, l + i, alpha + i, weights + i);
  }
  switch ((width - i) / W) {
    case 3: return softmax_step<T, 3>(scores + i, keys, ld, c, m + i, l + i, alpha + i, weights + i);
    case 2: return softmax_step<T, 2>(scores + i, keys, ld, c, m + i, l + i, alpha + i, weights + i);
    case 1: return softmax_step<T, 1>(scores + i, keys, ld, c, m + i, l + i, alpha + i, weights + i);
    default: return;
  }
}

}  // namespace fastxattn::FXA_ISA
