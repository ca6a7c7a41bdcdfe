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

// scores[j * ld + i] = query i . the part of row j that lane i's head reads, from `at[i]` on. Rows are read from end to
// end, all heads of them, W products at a time; `queries` are packed rows. Not inlined: a caller would leave the inner
// loop without registers for its eight addresses.
template <class E, class T>
__attribute__((noinline)) static void score_rows(const E* queries, int64_t query_ld, const T* const* rows, int64_t n,
                                                 const int64_t* at, int64_t lanes, int64_t depth, float* scores,
                                                 int64_t ld) {
  constexpr int64_t pair = __is_same(E, float) ? 1 : 2, step = W * pair;
  const int64_t whole = depth / step * step;
  for (int64_t t = 0, j = 0, i = 0; t < n * lanes; t += W) {
    const int64_t here = least(W, n * lanes - t);
    const float* query[W];
    const T* row[W];
    float* to[W];
    for (int64_t x = 0; x < W; ++x) {
      query[x] = reinterpret_cast<const float*>(queries + i * query_ld);
      row[x] = rows[j] + at[i];
      to[x] = scores + j * ld + i;
      if (x + 1 < here && ++i == lanes) i = 0, ++j;  // past the last product, the last one again
    }
    if (++i == lanes) i = 0, ++j;
    vf sum[W];
#pragma GCC unroll 4
    for (int64_t x = 0; x < W; x += 4) {
      vf part[4] = {zero(), zero(), zero(), zero()};
      for (int64_t c = 0; c < whole; c += step) {
#pragma GCC unroll 4
        for (int64_t y = 0; y < 4; ++y) {
          part[y] = multiply_elements(queries, load(query[x + y] + c / pair), load_operand_row<E>(row[x + y] + c, step),
                                      part[y]);
        }
      }
#pragma GCC unroll 4
      for (int64_t y = 0; y < 4; ++y) {
        sum[x + y] = part[y];
        if (whole == depth) continue;
        sum[x + y] = multiply_elements(queries, load(query[x + y] + whole / pair),
                                       load_operand_row<E>(row[x + y] + whole, depth - whole), sum[x + y]);
      }
    }
    const vf result = sum_each(sum);
    for (int64_t x = 0; x < here; ++x) *to[x] = result[x];
  }
}

// acc[i][c] = acc[i][c] * alpha[i] + sum_j weights[j * ld + i] * rows[j][at[i] + c] for every lane i, over the keys
// [key, key + n) that it sees: a row that a lane does not see may hold NaN and is skipped, not weighted by zero.
// Without `alpha`, acc is kept as it is. Weights as softmax_step leaves them.
template <class E, class T>
static void add_rows(const float* weights, int64_t ld, const T* const* rows, int64_t n, const int64_t* at,
                     const Lanes& lanes, int64_t key, int64_t columns, const float* alpha, float* acc, int64_t acc_ld) {
  static constexpr T kZeros[256] = {};
  const bool masked = !lanes.sees_all(key, key + n);
  for (int64_t j = 0; j < n; j += 4) {
    for (int64_t i = 0; i < lanes.count; ++i) {
      const T* row[4];
      bool there[4];
      for (int64_t x = 0; x < 4; ++x) {
        there[x] = j + x < n && (!masked || lanes.sees(i, key + j + x));
        row[x] = there[x] ? rows[j + x] + at[i] : kZeros;
      }
      float* out = acc + i * acc_ld;
      const vf old = splat(alpha != nullptr && j == 0 ? alpha[i] : 1.0f);
      if constexpr (__is_same(E, float)) {
        vf w[4];
#pragma GCC unroll 4
        for (int64_t x = 0; x < 4; ++x) w[x] = splat(there[x] ? weights[(j + x) * ld + i] : 0.0f);
        const auto add = [&](int64_t c, int64_t left) __attribute__((always_inline)) {
          vf sum = w[0] * load_first_as_f32(row[0] + c, left);
#pragma GCC unroll 4
          for (int64_t x = 1; x < 4; ++x) sum = fma(w[x], load_first_as_f32(row[x] + c, left), sum);
          store(out + c, fma(load(out + c), old, sum));
        };
        const int64_t whole = columns / W * W;
        for (int64_t c = 0; c < whole; c += W) add(c, W);
        if (whole < columns) add(whole, columns - whole);
      } else {
#if defined(FXA_HAS_BF16_DOT)
        // Weights come in pairs of keys; a key that a lane does not see has weight 0 there.
        const vf first = splat(weights[j / 2 * ld + i]);
        const vf second = j + 2 < n ? splat(weights[(j / 2 + 1) * ld + i]) : zero();
        for (int64_t c = 0; c < columns; c += 2 * W) {
          vf x[4], low[2], high[2];
          for (int64_t y = 0; y < 4; ++y) x[y] = load_elements(row[y] + c, columns - c);
          interleave_bf16(x[0], x[1], low[0], high[0]);
          interleave_bf16(x[2], x[3], low[1], high[1]);
          const E* tag = nullptr;
          const vf left = multiply_elements(tag, second, low[1], multiply_elements(tag, first, low[0], zero()));
          const vf right = multiply_elements(tag, second, high[1], multiply_elements(tag, first, high[0], zero()));
          store(out + c, fma(load(out + c), old, left));
          store(out + c + W, fma(load(out + c + W), old, right));
        }
#endif
      }
    }
  }
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

  int64_t key_from[kLaneBlock], value_from[kLaneBlock];  // where a lane's head begins in a row
  for (int64_t i = 0; i < lanes.count; ++i) {
    key_from[i] = s.head[i] / group * p.key_head;
    value_from[i] = s.head[i] / group * p.value_head;
  }
  const int64_t key_end = lanes.begin == nullptr ? item.key_end : least(item.key_end, lanes.last);
  for (int64_t k = item.key_begin; k < key_end; k += kFewKeys) {
    const int64_t keys = least(kFewKeys, key_end - k);
    if (!lanes.sees_any(k, k + keys)) continue;
    const bool masked = !lanes.sees_all(k, k + keys);
    locate_rows<T>(p, sequence, 0, k, keys, s);
    score_rows<Element<T>>(s.queries, s.key_ld, s.key_at, keys, key_from, lanes.count, p.head_dim, s.scores, ld);
    if (transform || masked) {
      if (s.extra != nullptr) gather_bias(p, item.sequence, sequence, 0, lanes, s.key_row, keys, s.extra, ld);
      adjust_scores(p, s.scores, keys, ld, transform, s.extra, nullptr, masked, lanes, k);
    }
    softmax_tile<T>(s.scores, keys, ld, ld, c, s.m, s.l, s.alpha, s.weights);
    if (p.dropout_p > 0.0f) drop_weights<T>(p, 0, lanes, k, keys, s.weights, ld);
    add_rows<Element<T>>(s.weights, ld, s.value_at, keys, value_from, lanes, k, p.value_dim, s.alpha, s.acc, acc_ld);
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
