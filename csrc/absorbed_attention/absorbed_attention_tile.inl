// What both passes share: packing of panels and key blocks, scores, and rows that hold NaN or infinity.
//
// Lanes of the score products are the panel's rows; the context is broadcast from where it lies. The products with
// the weights run with lanes along the features, so that neither they nor the results are ever transposed.
#pragma once

#include "absorbed_attention/absorbed_attention.h"
#include "core/cpu/gemm.h"

namespace fastxattn::FXA_ISA {

template <class T>
struct ComputeOf {
  using E = float;
};
#if defined(FXA_HAS_BF16_DOT)
template <>
struct ComputeOf<bf16_t> {
  using E = bf16x2;
};
#endif
template <class E>
inline constexpr int kPer = __is_same(E, float) ? 1 : 2;  // elements per E along depth

FXA_INLINE int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// rows[i][k] as columns: dst[k][i], `lanes` wide, lanes past n zero.
template <class T>
static void pack_lanes(const T* const* rows, int64_t n, int64_t lanes, int64_t width, float* dst) {
  for (int64_t k0 = 0; k0 < width; k0 += 16) {
    const int64_t k1 = k0 + 16 < width ? k0 + 16 : width;
    for (int64_t i = 0; i < lanes; ++i)
      for (int64_t k = k0; k < k1; ++k) dst[k * lanes + i] = i < n ? to_f32(rows[i][k]) : 0.0f;
  }
}
template <class T>
static void pack_lanes(const T* const* rows, int64_t n, int64_t lanes, int64_t width, bf16x2* dst) {
  for (int64_t k0 = 0; k0 < width; k0 += 32) {
    const int64_t k1 = k0 + 32 < width ? k0 + 32 : width;
    for (int64_t i = 0; i < lanes; ++i)
      for (int64_t k = k0; k < k1; k += 2) {
        uint32_t pair = 0;
        if (i < n) pair = rows[i][k].bits | (k + 1 < width ? static_cast<uint32_t>(rows[i][k + 1].bits) << 16 : 0u);
        dst[k / 2 * lanes + i].bits = pair;
      }
  }
}

// Rows side by side for products along the features: dst[n][padded], zero past the width; a skipped row is zero.
template <class T>
static void pack_rows(const T* const* rows, int64_t n, int64_t width, int64_t padded, const bool* skip, float* dst) {
  for (int64_t i = 0; i < n; ++i, dst += padded) {
    int64_t c = 0;
    if (skip == nullptr || !skip[i]) {
      for (; c + W <= width; c += W) store(dst + c, load_as_f32(rows[i] + c));
      for (; c < width; ++c) dst[c] = to_f32(rows[i][c]);
    }
    for (; c < padded; ++c) dst[c] = 0.0f;
  }
}
// The same with two rows in each pair: dst[(n + 1) / 2][padded].
template <class T>
static void pack_rows(const T* const* rows, int64_t n, int64_t width, int64_t padded, const bool* skip, bf16x2* dst) {
  for (int64_t i = 0; i < n; i += 2, dst += padded) {
    const T* low = skip != nullptr && skip[i] ? nullptr : rows[i];
    const T* high = i + 1 >= n || (skip != nullptr && skip[i + 1]) ? nullptr : rows[i + 1];
    int64_t c = 0;
    if (low != nullptr && high != nullptr) {
      for (; c + W <= width; c += W) {
        const vu a = __builtin_convertvector(*reinterpret_cast<const vh_unaligned*>(low + c), vu);
        const vu b = __builtin_convertvector(*reinterpret_cast<const vh_unaligned*>(high + c), vu);
        store_words(dst + c, reinterpret_cast<vf>(a | b << 16));
      }
    }
    for (; c < width; ++c) {
      dst[c].bits =
          (low == nullptr ? 0u : low[c].bits) | (high == nullptr ? 0u : static_cast<uint32_t>(high[c].bits) << 16);
    }
    for (; c < padded; ++c) dst[c].bits = 0;
  }
}

// Rows that hold NaN or infinity. Where a row of weights is 0 because the pair is masked, 0 * NaN must not appear.
template <class T>
static bool find_nonfinite(const T* const* rows, int64_t n, int64_t width, bool* bad) {
  bool any = false;
  for (int64_t i = 0; i < n; ++i) {
    vf sum = zero();
    int64_t c = 0;
    for (; c + W <= width; c += W) sum += load_as_f32(rows[i] + c) * splat(0.0f);
    float rest = reduce_add(sum);
    for (; c < width; ++c) rest += to_f32(rows[i][c]) * 0.0f;
    bad[i] = rest != 0.0f;  // NaN, too, is not equal to 0
    any |= bad[i];
  }
  return any;
}

template <class T>
static void add_row(float* dst, float weight, const T* row, int64_t width) {
  for (int64_t c = 0; c < width; ++c) dst[c] += weight * to_f32(row[c]);
}

// A panel's rows: where they lie, how many lanes they take, and which places of the sequence each sees.
template <class T>
struct Rows {
  const T* at[kContextLanes];
  int64_t n, lanes;
  alignas(64) int32_t low[kContextLanes], high[kContextLanes];
  int64_t begin, end;  // places that at least one row sees

  Rows(const AbsorbedAttentionParams& p, const ContextPanel& panel) : n(panel.rows), lanes(up(panel.rows, 16)) {
    begin = p.kv_range == nullptr ? 0 : panel.keys;
    end = p.kv_range == nullptr ? panel.keys : 0;
    for (int64_t i = 0; i < lanes; ++i) {
      low[i] = high[i] = 0;
      if (i >= n) continue;
      const int64_t query = (panel.row + i) / p.heads, head = (panel.row + i) % p.heads;
      at[i] = static_cast<const T*>(p.query) + query * p.query_stride + head * p.head_stride;
      high[i] = static_cast<int32_t>(panel.keys);
      if (p.kv_range == nullptr) continue;
      const int32_t a = p.kv_range[2 * query], b = p.kv_range[2 * query + 1];
      low[i] = a < 0 ? 0 : a;
      high[i] = b < high[i] ? b : high[i];
      if (low[i] >= high[i]) low[i] = high[i] = 0;
      if (low[i] < high[i]) {
        begin = low[i] < begin ? low[i] : begin;
        end = high[i] > end ? high[i] : end;
      }
    }
  }
  // Whether every row sees all of [first, first + count).
  bool all_see(int64_t first, int64_t count) const {
    for (int64_t i = 0; i < n; ++i)
      if (low[i] > first || high[i] < first + count) return false;
    return true;
  }
  bool sees(int64_t i, int64_t place) const { return low[i] <= place && place < high[i]; }
};

// A block of context rows as the left operand of the scores and the right operand of the weighted sums.
template <class T, class E = typename ComputeOf<T>::E>
struct KeyBlock {
  const T* rows[kContextKeys];
  bool bad[kContextKeys];
  bool any_bad = false;
  const E* left;
  int64_t left_stride;
  const E* right;
  int64_t right_stride;

  // `masked`: some row does not see some key of the block. scratch: padded * kContextKeys * 2 words.
  KeyBlock(const AbsorbedAttentionParams& p, int64_t first, int64_t count, bool masked, uint32_t* scratch) {
    const int64_t padded = context_padded(p.width);
    const T* base = static_cast<const T*>(p.context) + first * p.width;
    for (int64_t j = 0; j < count; ++j) rows[j] = base + j * p.width;
    if (masked) any_bad = find_nonfinite(rows, count, p.width, bad);
    E* packed = reinterpret_cast<E*>(scratch);
    E* other = packed + padded * kContextKeys;
    if constexpr (kPer<E> == 2) {
      pack_rows(rows, count, p.width, padded, any_bad ? bad : nullptr, packed);
      right = packed;
      right_stride = padded;
      if (p.width % 2 == 0) {
        left = reinterpret_cast<const E*>(base);
        left_stride = p.width / 2;
      } else {
        left_stride = (p.width + 1) / 2;
        for (int64_t j = 0; j < count; ++j) pack_lanes(rows + j, 1, 1, p.width, other + j * left_stride);
        left = other;
      }
    } else {
      if constexpr (__is_same(T, float)) {
        left = base;
        left_stride = p.width;
      } else {
        pack_rows(rows, count, p.width, padded, nullptr, other);
        left = other;
        left_stride = padded;
      }
      if (any_bad || (__is_same(T, float) && p.width % 16 != 0)) {
        pack_rows(rows, count, p.width, padded, any_bad ? bad : nullptr, packed);
        right = packed;
        right_stride = padded;
      } else {
        right = left;
        right_stride = left_stride;
      }
    }
  }
};

// out[key][lane] = context[key] . row[lane]. The depth is cut so that a piece of the rows stays in the first caches,
// and so that the rounding of a sum over thousands of features grows with the pieces, not with the features.
template <class T, class E>
static void products_with_rows(const KeyBlock<T, E>& keys, int64_t count, int64_t lanes, int64_t depth, const E* rows,
                               float* out) {
  constexpr int64_t kPiece = kPer<E> == 2 ? 256 : 32;
  gemm<E, AOrder::rows, Init::zero>(count, lanes, depth < kPiece ? depth : kPiece, keys.left, keys.left_stride, rows,
                                    lanes, out, lanes);
  for (int64_t k = kPiece; k < depth; k += kPiece) {
    gemm<E, AOrder::rows, Init::add>(count, lanes, depth - k < kPiece ? depth - k : kPiece, keys.left + k,
                                     keys.left_stride, rows + k * lanes, lanes, out, lanes);
  }
}

// scores[key][lane] with scale and bias, -inf where the row does not see the key.
template <class T>
static void finish_scores(const AbsorbedAttentionParams& p, const Rows<T>& rows, int64_t key_row, int64_t place,
                          int64_t count, bool masked, float* scores) {
  const vf factor = splat(p.scale);
  for (int64_t j = 0; j < count; ++j) {
    const vf bias = splat(p.key_bias == nullptr ? 0.0f : p.key_bias[key_row + j]);
    float* row = scores + j * rows.lanes;
    for (int64_t i = 0; i < rows.lanes; i += W) {
      vf s = fma(load(row + i), factor, bias);
      if (masked) {
        vi low, high;
        __builtin_memcpy(&low, rows.low + i, sizeof(low));
        __builtin_memcpy(&high, rows.high + i, sizeof(high));
        const vi at = splat(static_cast<int32_t>(place + j));
        s = ((at >= low) & (at < high)) ? s : splat(-__builtin_inff());
      }
      store(row + i, s);
    }
  }
}

// Weights of two keys, or of one, in the compute type and key-major pairs: dst[count / kPer][lanes].
FXA_INLINE void put_weights(float* dst, int64_t lanes, int64_t j, int64_t i, vf w) { store(dst + j * lanes + i, w); }
FXA_INLINE void put_weights(bf16x2* dst, int64_t lanes, int64_t j, int64_t i, vf w) {
  uint16_t half[W];
  store_from_f32(reinterpret_cast<bf16_t*>(half), w);
  uint16_t* at = reinterpret_cast<uint16_t*>(dst + j / 2 * lanes + i) + j % 2;
  for (int l = 0; l < W; ++l) at[2 * l] = half[l];
}

}  // namespace fastxattn::FXA_ISA
