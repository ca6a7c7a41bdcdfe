// Backward, a span of keys at a time, in two sweeps that each own what they write: panels of rows compute the
// weights, their gradients and grad_query; key blocks then turn what the panels left into grad_context.
//
//   P = softmax(s)   dS = P * (grad_out . context - delta) * scale   delta = grad_out . out - grad_lse
//   grad_query += dS context      grad_context += dS^T query + P^T grad_out      grad_key_bias += sum dS / scale
#pragma once

#include "absorbed_attention/absorbed_attention_tile.inl"

namespace fastxattn::FXA_ISA {

FXA_INLINE void put_span(float* dst, vf w) { store(dst, w); }
FXA_INLINE void put_span(bf16x2* dst, vf w) { store_from_f32(reinterpret_cast<bf16_t*>(dst), w); }

template <class T>
static void row_deltas(const AbsorbedAttentionParams& p, const AbsorbedAttentionGrads& g, int64_t first, int64_t count,
                       float* delta) {
  for (int64_t row = first; row < first + count; ++row) {
    const T* a = static_cast<const T*>(g.grad_out) + row * p.width;
    const T* b = static_cast<const T*>(p.out) + row * p.width;
    double total = 0.0;  // its rounding would shift all gradients of the row the same way
    int64_t c = 0;
    while (c + W <= p.width) {
      vf sum = zero();
      for (int piece = 0; piece < 4 && c + W <= p.width; ++piece, c += W)
        sum = fma(load_as_f32(a + c), load_as_f32(b + c), sum);
      total += static_cast<double>(reduce_add(sum));
    }
    for (; c < p.width; ++c) total += static_cast<double>(to_f32(a[c])) * static_cast<double>(to_f32(b[c]));
    const int64_t at = row % p.heads * p.rows_q + row / p.heads;
    delta[row] = static_cast<float>(total - (g.grad_lse == nullptr ? 0.0 : static_cast<double>(g.grad_lse[at])));
  }
}

// One panel, keys [first, first + kContextSpan) of its sequence. grad_query: float sums [rows][padded].
template <class T>
static void backward_panel(const AbsorbedAttentionParams& p, const AbsorbedAttentionGrads& g, const ContextPanel& panel,
                           int64_t first, const float* delta, const ContextSpan& span, float* grad_query,
                           uint32_t* scratch) {
  using E = typename ComputeOf<T>::E;
  const int64_t padded = context_padded(p.width), depth = (p.width + kPer<E> - 1) / kPer<E>;
  const Rows<T> rows(p, panel);
  E* query = reinterpret_cast<E*>(scratch);
  E* grad_out = query + padded * kContextLanes;
  uint32_t* block = scratch + 2 * padded * kContextLanes;
  float* scores = reinterpret_cast<float*>(block + 2 * padded * kContextKeys);
  float* products = scores + kContextKeys * kContextLanes;
  E* pairs = reinterpret_cast<E*>(products + kContextKeys * kContextLanes);
  float* top = products + 3 * kContextKeys * kContextLanes;
  float* total = top + kContextLanes;
  float* deltas = total + kContextLanes;

  const T* outs[kContextLanes];
  for (int64_t i = 0; i < rows.lanes; ++i) {
    top[i] = __builtin_inff();  // weights exp(-inf) = 0
    total[i] = 1.0f;
    deltas[i] = 0.0f;
    if (i >= rows.n) continue;
    const int64_t row = panel.row + i;
    outs[i] = static_cast<const T*>(g.grad_out) + row * p.width;
    const int64_t at = row % p.heads * p.rows_q + row / p.heads;
    const float sum = p.softmax[p.heads * p.rows_q + at];
    if (sum != 0.0f) top[i] = p.softmax[at], total[i] = sum, deltas[i] = delta[row];
  }
  bool packed = false, zeroed = first != 0;
  const int64_t last = first + kContextSpan < panel.keys ? first + kContextSpan : panel.keys;
  for (int64_t place = first; place < last; place += kContextKeys) {
    const int64_t count = last - place < kContextKeys ? last - place : kContextKeys;
    const int64_t offset = place - first, key_row = panel.first_key + place;
    uint8_t& live = span.live[offset / kContextKeys];
    live = place < rows.end && place + count > rows.begin;
    if (!live) continue;
    if (!packed) {
      pack_lanes(rows.at, rows.n, rows.lanes, p.width, query);
      pack_lanes(outs, rows.n, rows.lanes, p.width, grad_out);
      packed = true;
    }
    const bool masked = !rows.all_see(place, count);
    const KeyBlock<T> keys(p, key_row, count, masked, block);
    products_with_rows(keys, count, rows.lanes, depth, query, scores);
    finish_scores(p, rows, key_row, place, count, masked, scores);
    products_with_rows(keys, count, rows.lanes, depth, grad_out, products);
    E* kept_weights = reinterpret_cast<E*>(span.weights) + offset * rows.lanes / kPer<E>;
    E* kept_grad = reinterpret_cast<E*>(span.grad) + offset * rows.lanes / kPer<E>;
    for (int64_t j = 0; j < count; ++j) {
      vf sum = zero();
      for (int64_t i = 0; i < rows.lanes; i += W) {
        const int64_t at = j * rows.lanes + i;
        const vf s = load(scores + at);
        vf weight = exp(s - load(top + i)) / load(total + i);
        vf grad = weight * (load(products + at) - load(deltas + i));
        if (masked) {
          const vi hidden = s == splat(-__builtin_inff());
          weight = hidden ? zero() : weight;  // a row that saw NaN has NaN for its total
          grad = hidden ? zero() : grad;
        }
        sum += grad;
        grad *= splat(p.scale);
        put_span(kept_weights + at / kPer<E>, weight);
        put_span(kept_grad + at / kPer<E>, grad);
        if constexpr (kPer<E> == 2) put_weights(pairs, rows.lanes, j, i, grad);
        store(products + at, grad);
      }
      if (span.bias != nullptr) span.bias[offset + j] = reduce_add(sum);
    }
    if (grad_query == nullptr) continue;
    const E* left = kept_grad;
    if constexpr (kPer<E> == 2) {
      for (int64_t i = 0; count % 2 != 0 && i < rows.lanes; i += W) put_weights(pairs, rows.lanes, count, i, zero());
      left = pairs;
    }
    const int64_t steps = (count + kPer<E> - 1) / kPer<E>;
    if (zeroed) {
      gemm<E, AOrder::columns, Init::add>(rows.n, padded, steps, left, rows.lanes, keys.right, keys.right_stride,
                                          grad_query, padded);
    } else {
      gemm<E, AOrder::columns, Init::zero>(rows.n, padded, steps, left, rows.lanes, keys.right, keys.right_stride,
                                           grad_query, padded);
      zeroed = true;
    }
    for (int64_t j = 0; keys.any_bad && j < count; ++j)
      for (int64_t i = 0; keys.bad[j] && i < rows.n; ++i)
        if (rows.sees(i, place + j))
          add_row(grad_query + i * padded, products[j * rows.lanes + i], keys.rows[j], p.width);
  }
  if (!zeroed && grad_query != nullptr)
    for (int64_t i = 0; i < rows.n * padded; ++i) grad_query[i] = 0.0f;
}

// acc[key][feature] += weights[key][lane] * rows[lane][feature], rows of NaN left to those keys that are seen.
template <class T>
static void add_outer(const AbsorbedAttentionParams& p, const Rows<T>& rows, const T* const* at, bool contiguous,
                      bool masked, int64_t place, int64_t count, const uint32_t* kept, uint32_t* scratch, float* acc) {
  using E = typename ComputeOf<T>::E;
  const int64_t padded = context_padded(p.width);
  const E* weights = reinterpret_cast<const E*>(kept);
  bool bad[kContextLanes];
  const bool any_bad = masked && find_nonfinite(at, rows.n, p.width, bad);
  const E* right = reinterpret_cast<const E*>(scratch);
  if (__is_same(T, float) && contiguous && !any_bad && p.width % 16 == 0) {
    right = reinterpret_cast<const E*>(at[0]);
  } else {
    pack_rows(at, rows.n, p.width, padded, any_bad ? bad : nullptr, reinterpret_cast<E*>(scratch));
  }
  gemm<E, AOrder::rows, Init::add>(count, padded, (rows.n + kPer<E> - 1) / kPer<E>, weights, rows.lanes / kPer<E>,
                                   right, padded, acc, padded);
  if (!any_bad) return;
  for (int64_t i = 0; i < rows.n; ++i)
    for (int64_t j = 0; bad[i] && j < count; ++j) {
      if (!rows.sees(i, place + j)) continue;
      const float weight = kPer<E> == 2 ? to_f32(reinterpret_cast<const bf16_t*>(kept)[j * rows.lanes + i])
                                        : reinterpret_cast<const float*>(kept)[j * rows.lanes + i];
      add_row(acc + j * padded, weight, at[i], p.width);
    }
}

// grad_context of one key block from all panels of its sequence; spans[n] belongs to panels[n].
template <class T>
static void backward_keys(const AbsorbedAttentionParams& p, const AbsorbedAttentionGrads& g, const ContextPanel* panels,
                          const ContextSpan* spans, int64_t panel_count, int64_t key_row, int64_t place, int64_t count,
                          int64_t offset, uint32_t* scratch) {
  using E = typename ComputeOf<T>::E;
  const int64_t padded = context_padded(p.width);
  float* acc = reinterpret_cast<float*>(scratch);
  uint32_t* right = scratch + kContextKeys * padded;
  float bias[kContextKeys];
  for (int64_t i = 0; i < kContextKeys * padded; ++i) acc[i] = 0.0f;
  for (int64_t j = 0; j < count; ++j) bias[j] = 0.0f;
  const bool contiguous = p.head_stride == p.width && p.query_stride == p.width * p.heads;
  for (int64_t n = 0; n < panel_count; ++n) {
    if (!spans[n].live[offset / kContextKeys]) continue;
    const Rows<T> rows(p, panels[n]);
    const bool masked = !rows.all_see(place, count);
    const T* outs[kContextLanes];
    for (int64_t i = 0; i < rows.n; ++i) outs[i] = static_cast<const T*>(g.grad_out) + (panels[n].row + i) * p.width;
    const int64_t at = offset * rows.lanes / kPer<E>;
    add_outer(p, rows, rows.at, contiguous, masked, place, count, spans[n].grad + at, right, acc);
    add_outer(p, rows, outs, true, masked, place, count, spans[n].weights + at, right, acc);
    if (g.grad_key_bias != nullptr)
      for (int64_t j = 0; j < count; ++j) bias[j] += spans[n].bias[offset + j];
  }
  for (int64_t j = 0; j < count; ++j) {
    T* out = static_cast<T*>(g.grad_context) + (key_row + j) * p.width;
    const float* from = acc + j * padded;
    int64_t c = 0;
    for (; c + W <= p.width; c += W) store_from_f32(out + c, load(from + c));
    for (; c < p.width; ++c) out[c] = from_f32<T>(from[c]);
    if (g.grad_key_bias != nullptr) g.grad_key_bias[key_row + j] = bias[j];
  }
}

template <class T>
static void store_grad_query(const AbsorbedAttentionParams& p, const AbsorbedAttentionGrads& g, int64_t row,
                             int64_t count, const float* sums) {
  for (int64_t i = 0; i < count; ++i, sums += context_padded(p.width)) {
    T* out = static_cast<T*>(g.grad_query) + (row + i) * p.width;
    int64_t c = 0;
    for (; c + W <= p.width; c += W) store_from_f32(out + c, load(sums + c));
    for (; c < p.width; ++c) out[c] = from_f32<T>(sums[c]);
  }
}

void context_row_deltas(const AbsorbedAttentionParams& p, const AbsorbedAttentionGrads& g, int64_t first, int64_t count,
                        float* delta) {
  switch (p.dtype) {
    case DType::f32: return row_deltas<float>(p, g, first, count, delta);
    case DType::bf16: return row_deltas<bf16_t>(p, g, first, count, delta);
    case DType::f16: return row_deltas<f16_t>(p, g, first, count, delta);
  }
}
void context_backward_panel(const AbsorbedAttentionParams& p, const AbsorbedAttentionGrads& g,
                            const ContextPanel& panel, int64_t first, const float* delta, const ContextSpan& span,
                            float* sums, uint32_t* scratch) {
  switch (p.dtype) {
    case DType::f32: return backward_panel<float>(p, g, panel, first, delta, span, sums, scratch);
    case DType::bf16: return backward_panel<bf16_t>(p, g, panel, first, delta, span, sums, scratch);
    case DType::f16: return backward_panel<f16_t>(p, g, panel, first, delta, span, sums, scratch);
  }
}
void context_backward_keys(const AbsorbedAttentionParams& p, const AbsorbedAttentionGrads& g,
                           const ContextPanel* panels, const ContextSpan* spans, int64_t panel_count, int64_t key_row,
                           int64_t place, int64_t count, int64_t offset, uint32_t* scratch) {
  switch (p.dtype) {
    case DType::f32:
      return backward_keys<float>(p, g, panels, spans, panel_count, key_row, place, count, offset, scratch);
    case DType::bf16:
      return backward_keys<bf16_t>(p, g, panels, spans, panel_count, key_row, place, count, offset, scratch);
    case DType::f16:
      return backward_keys<f16_t>(p, g, panels, spans, panel_count, key_row, place, count, offset, scratch);
  }
}
void context_store_grad_query(const AbsorbedAttentionParams& p, const AbsorbedAttentionGrads& g, int64_t row,
                              int64_t count, const float* sums) {
  switch (p.dtype) {
    case DType::f32: return store_grad_query<float>(p, g, row, count, sums);
    case DType::bf16: return store_grad_query<bf16_t>(p, g, row, count, sums);
    case DType::f16: return store_grad_query<f16_t>(p, g, row, count, sums);
  }
}

}  // namespace fastxattn::FXA_ISA
