// Forward for a handful of query rows (decoding, one pooled query): memory bound, so keys and values are read once, in
// the order they lie, with nothing copied. Vector lanes run along head_dim here; scores go to the same tile as
// everywhere, S[key][lane] with one lane per (head, query), so that softmax and options are shared with the tiled path.
#pragma once

#include "attention/attention_forward.inl"

namespace fastxattn::FXA_ISA {

inline constexpr int64_t kFewKeys = 32;  // keys between two softmax steps: a multiple of W and of 4

// The sums of W vectors, as one vector in order.
FXA_INLINE vf sum_each(vf (&x)[W]) {
#pragma GCC unroll 4
  for (int half = W / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) x[i] = interleave_low(x[i], x[i + half]) + interleave_high(x[i], x[i + half]);
  }
  return x[0];
}

FXA_INLINE vf multiply_elements(const float*, vf a, vf b, vf sum) { return fma(a, b, sum); }
#if defined(FXA_HAS_BF16_DOT)
FXA_INLINE vf multiply_elements(const bf16x2*, vf a, vf b, vf sum) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
#endif

// A vector of a row's values as the operand E: pairs as they lie, or floats.
template <class E, class T>
FXA_INLINE vf load_operand_row(const T* p, int64_t left) {
  if constexpr (__is_same(E, float)) {
    return load_first_as_f32(p, left);
  } else {
    return load_elements(p, left);
  }
}

// scores[j * ld] = query . row j, for n rows; the query is a packed row.
template <class E, class T>
static void score_rows(const E* query, const T* const* rows, int64_t n, int64_t depth, float* scores, int64_t ld) {
  constexpr int64_t pair = __is_same(E, float) ? 1 : 2, step = W * pair;
  for (int64_t j = 0; j < n; j += W) {
    vf sum[W];
    for (int i = 0; i < W; ++i) sum[i] = zero();
    const int64_t here = least(W, n - j);
    for (int64_t c = 0; c < depth; c += step) {
      const vf q = load(reinterpret_cast<const float*>(query) + c / pair);
      if (here == W && c + step <= depth) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i)
          sum[i] = multiply_elements(query, q, load_operand_row<E>(rows[j + i] + c, step), sum[i]);
      } else {
        for (int64_t i = 0; i < here; ++i) {
          sum[i] = multiply_elements(query, q, load_operand_row<E>(rows[j + i] + c, depth - c), sum[i]);
        }
      }
    }
    float result[W];
    store(result, sum_each(sum));
    for (int64_t i = 0; i < here; ++i) scores[(j + i) * ld] = result[i];
  }
}

// acc[c] = acc[c] * alpha + sum_j weight(j) * rows[j][c]; a null row is skipped. Weights as softmax_step leaves them.
template <class E, class T>
static void add_rows(const float* weights, int64_t ld, const T* const* rows, int64_t n, int64_t columns, float alpha,
                     float* acc) {
  for (int64_t c = 0; c < columns; c += 2 * W) {
    vf low = load(acc + c) * splat(alpha), high = load(acc + c + W) * splat(alpha);
    vf low2 = zero(), high2 = zero();
    const int64_t left = columns - c;
    for (int64_t j = 0; j < n; j += 2) {
      const T* a = rows[j];
      const T* b = j + 1 < n ? rows[j + 1] : nullptr;
      if constexpr (!__is_same(E, float)) {
#if defined(FXA_HAS_BF16_DOT)
        vf first, second;
        interleave_bf16(a ? load_elements(a + c, left) : zero(), b ? load_elements(b + c, left) : zero(), first,
                        second);
        const vf w = splat(weights[j / 2 * ld]);
        low = multiply_elements(static_cast<const bf16x2*>(nullptr), w, first, low);
        high = multiply_elements(static_cast<const bf16x2*>(nullptr), w, second, high);
#endif
      } else {
        if (a != nullptr) {
          const vf w = splat(weights[j * ld]);
          low = fma(w, load_first_as_f32(a + c, left), low);
          if (left > W) high = fma(w, load_first_as_f32(a + c + W, left - W), high);
        }
        if (b != nullptr) {
          const vf w = splat(weights[(j + 1) * ld]);
          low2 = fma(w, load_first_as_f32(b + c, left), low2);
          if (left > W) high2 = fma(w, load_first_as_f32(b + c + W, left - W), high2);
        }
      }
    }
    store(acc + c, low + low2);
    store(acc + c + W, high + high2);
  }
}

// Asks for the given slots' rows of one head of key or value.
template <class T>
static void prefetch_rows(const AttentionParams& p, const T* base, int64_t stride, int64_t n, int64_t slot,
                          int64_t end) {
  for (; slot < end; ++slot) PanelPrefetch<T>::touch(base + key_row_of(p, slot) * stride, n);
}

template <class T>
static void forward_few(const AttentionParams& p, const ForwardItem& item, float* workspace, Arena arena) {
  const ForwardScratch<T> s(p, arena);
  const Sequence sequence = sequence_of(p, item.sequence);
  const int64_t group = p.group(), per_head = sequence.queries * group;
  // One lane per (key/value head, query, member); `head` holds absolute heads, so below the head base is 0.
  Lanes lanes{0, 0, s.row, s.head, nullptr, nullptr, 0, 0, 0, 0};
  for (int64_t head = item.head_begin; head < item.head_end; ++head) {
    for (int64_t i = 0; i < per_head; ++i, ++lanes.count) {
      s.row[lanes.count] = query_row_of(p, sequence.first_q + i / group);
      s.head[lanes.count] = static_cast<int32_t>(head * group + i % group);
    }
  }
  finish_lanes(p, sequence, s.begin, s.end, lanes);
  const int64_t ld = lanes.width, acc_ld = round_up(p.value_dim, 2 * W);
  const bool transform = needs_transform(p);
  const float c = transform ? kLog2e : p.scale * kLog2e;
  for (int64_t i = 0; i < lanes.count; ++i) {
    s.query_at[i] = static_cast<const T*>(p.query) + s.row[i] * p.query_row + s.head[i] * p.query_head;
  }
  pack_rows<T>(s.query_at, lanes.count, p.head_dim, s.queries, s.key_ld);
  for (int64_t i = 0; i < ld; i += W) {
    store(s.m + i, splat(-__builtin_inff()));
    store(s.l + i, zero());
  }
  clear(s.acc, lanes.count * acc_ld);
  clear(s.scores, kFewKeys * ld);

  const int64_t key_end = lanes.begin == nullptr ? item.key_end : least(item.key_end, lanes.last);
  for (int64_t k = item.key_begin; k < key_end; k += kFewKeys) {
    const int64_t keys = least(kFewKeys, key_end - k);
    if (!lanes.sees_any(k, k + keys)) continue;
    const bool masked = !lanes.sees_all(k, k + keys);
    for (int64_t j = 0; j < keys; ++j) s.key_row[j] = key_row_of(p, sequence.first_k + k + j);
    const int64_t next = sequence.first_k + least(k + kFewKeys, key_end);
    const int64_t next_end = sequence.first_k + least(k + 2 * kFewKeys, key_end);
    for (int64_t head = item.head_begin; head < item.head_end; ++head) {
      for (int64_t j = 0; j < keys; ++j) {
        s.key_at[j] = static_cast<const T*>(p.key) + s.key_row[j] * p.key_row + head * p.key_head;
      }
      const int64_t first = (head - item.head_begin) * per_head;
      prefetch_rows(p, static_cast<const T*>(p.key) + head * p.key_head, p.key_row, p.head_dim, next, next_end);
      for (int64_t i = first; i < first + per_head; ++i) {
        score_rows<Element<T>>(s.queries + i * s.key_ld, s.key_at, keys, p.head_dim, s.scores + i, ld);
      }
    }
    if (transform || masked) {
      if (s.extra != nullptr) gather_bias(p, item.sequence, sequence, 0, lanes, s.key_row, keys, s.extra, ld);
      adjust_scores(p, s.scores, keys, ld, transform, s.extra, nullptr, masked, lanes, k);
    }
    softmax_tile<T>(s.scores, keys, ld, ld, c, s.m, s.l, s.alpha, s.weights);
    if (p.dropout_p > 0.0f) drop_weights<T>(p, 0, lanes, k, keys, s.weights, ld);
    for (int64_t i = 0; i < lanes.count; ++i) {
      const int64_t head = s.head[i] / group;
      if (i % per_head == 0) {
        prefetch_rows(p, static_cast<const T*>(p.value) + head * p.value_head, p.value_row, p.value_dim, next,
                      next_end);
      }
      for (int64_t j = 0; j < keys; ++j) {
        // A row that a lane does not see may hold NaN: it is skipped, not weighted by zero.
        s.value_at[j] = masked && !lanes.sees(i, k + j)
                            ? nullptr
                            : static_cast<const T*>(p.value) + s.key_row[j] * p.value_row + head * p.value_head;
      }
      add_rows<Element<T>>(s.weights + i, ld, s.value_at, keys, p.value_dim, s.alpha[i], s.acc + i * acc_ld);
    }
  }

  double lse[kLaneBlock];
  close_softmax(p, ld, s.m, s.l, true, transform, s.factor, lse);
  for (int64_t i = 0; i < lanes.count; ++i) {
    const int64_t head = s.head[i];
    const float* acc = s.acc + i * acc_ld;
    if (item.partial >= 0) {
      const int64_t at = item.head_begin * per_head + i;
      float* partial = workspace + item.partial;
      const int64_t total = p.kv_heads * per_head;
      store_partial_lse(partial + total * p.value_dim + at, total, lse[i]);
      write_row(acc, s.factor[i], partial + at * p.value_dim, p.value_dim);
    } else {
      write_lse(p, head, s.row[i], lse[i]);
      write_row(acc, s.factor[i], static_cast<T*>(p.out) + (s.row[i] * p.heads + head) * p.value_dim, p.value_dim);
    }
  }
}

}  // namespace fastxattn::FXA_ISA
