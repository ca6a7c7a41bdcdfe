// Forward: one task walks its keys in blocks with the online softmax; split panels are merged in a fixed order.
#pragma once

#include "absorbed_attention/absorbed_attention_tile.inl"

namespace fastxattn::FXA_ISA {

// Turns scores into weights exp(s - top), raising `top` first; alpha is what earlier sums must be multiplied by.
template <class E>
static bool online_softmax(int64_t lanes, int64_t count, float* scores, E* weights, float* top, float* total,
                           float* alpha) {
  bool rescale = false;
  for (int64_t i = 0; i < lanes; i += W) {
    const vf before = load(top + i);
    vf after = before;
    for (int64_t j = 0; j < count; ++j) after = max(load(scores + j * lanes + i), after);  // NaN leaves it alone
    const vf base = after == splat(-__builtin_inff()) ? zero() : after;
    const vf factor = exp(before - base);
    vf sums[4] = {zero(), zero(), zero(), zero()};  // short sums round less
    for (int64_t j = 0; j < count; ++j) {
      const vf w = exp(load(scores + j * lanes + i) - base);
      sums[j % 4] += w;
      put_weights(weights, lanes, j, i, w);
      if constexpr (kPer<E> == 2) store(scores + j * lanes + i, w);  // in float32, for rows of NaN
    }
    if (kPer<E> == 2 && count % 2 != 0) put_weights(weights, lanes, count, i, zero());
    store(top + i, after);
    store(total + i, fma(load(total + i), factor, (sums[0] + sums[1]) + (sums[2] + sums[3])));
    store(alpha + i, factor);
    const vi changed = factor != splat(1.0f);
    for (int l = 0; l < W; ++l) rescale |= changed[l] != 0;
  }
  return rescale;
}

template <class T>
static void write_result(const AbsorbedAttentionParams& p, const ContextPanel& panel, const float* sums,
                         const float* top, const float* total) {
  const int64_t padded = context_padded(p.width);
  for (int64_t i = 0; i < panel.rows; ++i) {
    const int64_t row = panel.row + i;
    T* out = static_cast<T*>(p.out) + row * p.width;
    const bool empty = total[i] == 0.0f;
    const float divisor = empty ? 1.0f : total[i];
    const float* from = sums + i * padded;
    int64_t c = 0;
    for (; c + W <= p.width; c += W) store_from_f32(out + c, load(from + c) / splat(divisor));
    for (; c < p.width; ++c) out[c] = from_f32<T>(from[c] / divisor);
    const int64_t at = row % p.heads * p.rows_q + row / p.heads;
    p.lse[at] = empty ? -__builtin_inff() : static_cast<float>(top[i] + __builtin_log(static_cast<double>(total[i])));
    p.softmax[at] = empty ? 0.0f : top[i];
    p.softmax[p.heads * p.rows_q + at] = total[i];
  }
}

// part: where a split panel's unfinished result goes, or null.
template <class T>
static void forward_panel(const AbsorbedAttentionParams& p, const ContextPanel& panel, uint32_t* scratch, float* part) {
  using E = typename ComputeOf<T>::E;
  const int64_t padded = context_padded(p.width), depth = (p.width + kPer<E> - 1) / kPer<E>;
  const Rows<T> rows(p, panel);
  E* query = reinterpret_cast<E*>(scratch);
  float* sums = reinterpret_cast<float*>(scratch) + padded * kContextLanes;
  uint32_t* block = scratch + 2 * padded * kContextLanes;
  float* scores = reinterpret_cast<float*>(block + 2 * padded * kContextKeys);
  E* weights = reinterpret_cast<E*>(scores + kContextKeys * kContextLanes);
  float* alpha = scores + 2 * kContextKeys * kContextLanes;
  float* top = part == nullptr ? alpha + kContextLanes : part + kContextLanes * padded;
  float* total = top + kContextLanes;
  if (part != nullptr) sums = part;
  for (int64_t i = 0; i < kContextLanes; ++i) top[i] = -__builtin_inff(), total[i] = 0.0f;

  const int64_t begin = rows.begin > panel.begin ? rows.begin : panel.begin;
  const int64_t end = rows.end < panel.end ? rows.end : panel.end;
  bool first = true;
  if (begin < end) pack_lanes(rows.at, rows.n, rows.lanes, p.width, query);
  for (int64_t place = begin; place < end; place += kContextKeys) {
    const int64_t count = end - place < kContextKeys ? end - place : kContextKeys;
    const bool masked = !rows.all_see(place, count);
    const int64_t key_row = panel.first_key + place;
    const KeyBlock<T> keys(p, key_row, count, masked, block);
    products_with_rows(keys, count, rows.lanes, depth, query, scores);
    finish_scores(p, rows, key_row, place, count, masked, scores);
    const bool rescale = online_softmax(rows.lanes, count, scores, weights, top, total, alpha);
    if (rescale && !first) {
      for (int64_t i = 0; i < rows.n; ++i)
        for (int64_t c = 0; c < padded; c += W)
          store(sums + i * padded + c, load(sums + i * padded + c) * splat(alpha[i]));
    }
    const int64_t pairs = (count + kPer<E> - 1) / kPer<E>;
    const float* exact = kPer<E> == 2 ? scores : reinterpret_cast<const float*>(weights);
    if (first) {
      gemm<E, AOrder::columns, Init::zero>(rows.n, padded, pairs, weights, rows.lanes, keys.right, keys.right_stride,
                                           sums, padded);
    } else {
      gemm<E, AOrder::columns, Init::add>(rows.n, padded, pairs, weights, rows.lanes, keys.right, keys.right_stride,
                                          sums, padded);
    }
    first = false;
    if (keys.any_bad) {
      for (int64_t j = 0; j < count; ++j)
        for (int64_t i = 0; keys.bad[j] && i < rows.n; ++i)
          if (rows.sees(i, place + j)) add_row(sums + i * padded, exact[j * rows.lanes + i], keys.rows[j], p.width);
    }
  }
  if (first)
    for (int64_t i = 0; i < rows.n * padded; ++i) sums[i] = 0.0f;
  if (part == nullptr) write_result<T>(p, panel, sums, top, total);
}

// Adds the parts of a split panel into the first one, then writes. parts lie `stride` floats apart.
template <class T>
static void merge_parts(const AbsorbedAttentionParams& p, const ContextPanel& panel, float* parts, int64_t stride) {
  const int64_t padded = context_padded(p.width), statistics = kContextLanes * padded;
  for (int64_t i = 0; i < panel.rows; ++i) {
    float top = -__builtin_inff();
    for (int64_t n = 0; n < panel.parts; ++n) {
      const float other = parts[n * stride + statistics + i];
      top = other > top ? other : top;
    }
    float total = 0.0f;
    for (int64_t n = 0; n < panel.parts; ++n) {
      float* statistic = parts + n * stride + statistics + i;
      const float weight = *statistic == -__builtin_inff() ? 0.0f : __builtin_expf(*statistic - top);
      total += weight * statistic[kContextLanes];
      float* sums = parts + i * padded;
      const float* from = parts + n * stride + i * padded;
      for (int64_t c = 0; c < padded; c += W) {
        const vf x = load(from + c) * splat(weight);
        store(sums + c, n == 0 ? x : load(sums + c) + x);
      }
    }
    parts[statistics + i] = top;
    parts[statistics + kContextLanes + i] = total;
  }
  write_result<T>(p, panel, parts, parts + statistics, parts + statistics + kContextLanes);
}

void context_forward_panel(const AbsorbedAttentionParams& p, const ContextPanel& panel, uint32_t* scratch,
                           float* part) {
  switch (p.dtype) {
    case DType::f32: return forward_panel<float>(p, panel, scratch, part);
    case DType::bf16: return forward_panel<bf16_t>(p, panel, scratch, part);
    case DType::f16: return forward_panel<f16_t>(p, panel, scratch, part);
  }
}

void context_merge_parts(const AbsorbedAttentionParams& p, const ContextPanel& panel, float* parts, int64_t stride) {
  switch (p.dtype) {
    case DType::f32: return merge_parts<float>(p, panel, parts, stride);
    case DType::bf16: return merge_parts<bf16_t>(p, panel, parts, stride);
    case DType::f16: return merge_parts<f16_t>(p, panel, parts, stride);
  }
}

}  // namespace fastxattn::FXA_ISA
