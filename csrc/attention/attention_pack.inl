// Panels: rows of query, key, value and grad_out copied (and converted) into small contiguous buffers.
//
// A panel element E holds kPair consecutive values along the product's depth: one float, or two bf16 where
// the processor multiplies those. E is always four bytes, so a panel is also an array of floats to move.
#pragma once

#include "attention/attention.h"
#include "core/cpu/gemm.h"

namespace fastxattn::FXA_ISA {

template <class T>
struct Operand {
  using E = float;
  static constexpr int kPair = 1;
};
#if defined(FXA_HAS_BF16_DOT)
template <>
struct Operand<bf16_t> {
  using E = bf16x2;
  static constexpr int kPair = 2;
};
#endif
template <class T>
using Element = typename Operand<T>::E;

FXA_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
FXA_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FXA_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

template <class T>
FXA_INLINE int64_t elements(int64_t depth) {
  return (depth + Operand<T>::kPair - 1) / Operand<T>::kPair;
}

// Rows of `keys` keys from key k of the sequence on, and the addresses of one head's part of them; head 0: of whole
// rows.
template <class T, class Scratch>
static void locate_keys(const AttentionParams& p, const Sequence& sequence, int64_t kv_head, int64_t k, int64_t keys,
                        const Scratch& s) {
  const T* key = static_cast<const T*>(p.key) + kv_head * p.key_head;
  for (int64_t j = 0; j < keys; ++j) {
    s.key_row[j] = key_row_of(p, sequence.first_k + k + j);
    s.key_at[j] = key + s.key_row[j] * p.key_row;
  }
}

// The same of their values too.
template <class T, class Scratch>
static void locate_rows(const AttentionParams& p, const Sequence& sequence, int64_t kv_head, int64_t k, int64_t keys,
                        const Scratch& s) {
  locate_keys<T>(p, sequence, kv_head, k, keys, s);
  const T* value = static_cast<const T*>(p.value) + kv_head * p.value_head;
  for (int64_t j = 0; j < keys; ++j) s.value_at[j] = value + s.key_row[j] * p.value_row;
}

// The first W elements of a row of which `left` values remain; zeros beyond.
template <class T>
FXA_INLINE vf load_elements(const T* p, int64_t left) {
  if constexpr (Operand<T>::kPair == 1) {
    return load_first_as_f32(p, left);
  } else {
    if (left >= 2 * W) return load_words(p);
#if defined(FXA_HAS_BF16_DOT)
    const uint32_t mask = left > 0 ? (1u << left) - 1 : 0;
    return reinterpret_cast<vf>(_mm512_maskz_loadu_epi16(mask, p));
#endif
  }
}

// panel[r][e] for e < ld: the row as it lies, zeros past its end; a null row is all zeros. ld is a multiple of W.
template <class T>
static void pack_rows(const T* const* rows, int64_t n, int64_t depth, Element<T>* panel, int64_t ld) {
  float* out = reinterpret_cast<float*>(panel);
  for (int64_t r = 0; r < n; ++r, out += ld) {
    const T* row = rows[r];
    for (int64_t e = 0; e < ld; e += W) {
      const int64_t left = depth - e * Operand<T>::kPair;
      store(out + e, row == nullptr || left <= 0 ? zero() : load_elements(row + e * Operand<T>::kPair, left));
    }
  }
}

// panel[e][r], r < n rounded up to W: the rows become columns. Every row is there up to n; zeros beyond.
template <class T>
static void pack_columns(const T* const* rows, int64_t n, int64_t depth, Element<T>* panel, int64_t ld) {
  constexpr int P = Operand<T>::kPair;
  float* out = reinterpret_cast<float*>(panel);
  const int64_t count = elements<T>(depth);
  for (int64_t r = 0; r < n; r += W) {
    for (int64_t e = 0; e < count; e += W) {
      vf tile[W];
      for (int i = 0; i < W; ++i) {
        tile[i] = r + i < n ? load_elements(rows[r + i] + e * P, depth - e * P) : zero();
      }
      transpose(tile);
      const int64_t here = least(W, count - e);
      for (int64_t i = 0; i < here; ++i) store(out + (e + i) * ld + r, tile[i]);
    }
  }
}

#if defined(FXA_HAS_BF16_DOT)
// Pairs (a[i], b[i]) of 2 W bf16 values each, as two vectors of pairs.
FXA_INLINE void interleave_bf16(vf a, vf b, vf& low, vf& high) {
  alignas(64) static constexpr uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                    8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i index = _mm512_load_si512(kLow);
  const __m512i x = reinterpret_cast<__m512i>(a), y = reinterpret_cast<__m512i>(b);
  low = reinterpret_cast<vf>(_mm512_permutex2var_epi16(x, index, y));
  high = reinterpret_cast<vf>(_mm512_permutex2var_epi16(x, _mm512_add_epi16(index, _mm512_set1_epi16(16)), y));
}

// Two vectors of floats as W pairs (a[i], b[i]) of bf16.
FXA_INLINE vf pair_bf16(vf a, vf b) {
  alignas(64) static constexpr uint16_t kIndex[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a));
  return reinterpret_cast<vf>(_mm512_permutexvar_epi16(_mm512_load_si512(kIndex), both));
}
#endif

// The operand whose depth runs over rows. Floats: the same as pack_rows. bf16: panel[r / 2][c] pairs rows r, r + 1
// (the row after the last is zero).
template <class T>
static void pack_depth_rows(const T* const* rows, int64_t n, int64_t columns, Element<T>* panel, int64_t ld) {
  if constexpr (Operand<T>::kPair == 1) {
    pack_rows<T>(rows, n, columns, panel, ld);
  } else {
#if defined(FXA_HAS_BF16_DOT)
    float* out = reinterpret_cast<float*>(panel);
    for (int64_t r = 0; r < n; r += 2, out += ld) {
      const T* a = rows[r];
      const T* b = r + 1 < n ? rows[r + 1] : nullptr;
      for (int64_t c = 0; c < ld; c += 2 * W) {
        const int64_t left = columns - c;
        vf low, high;
        interleave_bf16(a == nullptr ? zero() : load_elements(a + c, left),
                        b == nullptr ? zero() : load_elements(b + c, left), low, high);
        store(out + c, low);
        if (c + W < ld) store(out + c + W, high);
      }
    }
#endif
  }
}

// Whether every value of a panel of `count` elements (a multiple of W) is finite.
template <class E>
static bool all_finite(const E* panel, int64_t count) {
  const float* p = reinterpret_cast<const float*>(panel);
  if constexpr (sizeof(E) == sizeof(float) && __is_same(E, float)) {
    vf poison = zero();
    for (int64_t i = 0; i < count; i += W) poison = fma(load(p + i), zero(), poison);
    return reduce_add(poison) == 0.0f;
  } else {
    vi found = {};
    for (int64_t i = 0; i < count; i += W) {
      const vu bits = reinterpret_cast<vu>(load(p + i));
      found |= ((bits & 0x7f80u) == 0x7f80u) | ((bits & 0x7f800000u) == 0x7f800000u);
    }
    for (int i = 0; i < W; ++i)
      if (found[i] != 0) return false;
    return true;
  }
}

// One value of a panel: `depth` counts values along the paired axis.
FXA_INLINE float value_at(const float* panel, int64_t ld, int64_t depth, int64_t other) {
  return panel[depth * ld + other];
}
FXA_INLINE float value_at(const bf16x2* panel, int64_t ld, int64_t depth, int64_t other) {
  const uint32_t bits = panel[depth / 2 * ld + other].bits;
  return to_f32(bf16_t{static_cast<uint16_t>(depth % 2 ? bits >> 16 : bits)});
}

// out rows = transposed panel[c][lane] * factor[lane], for n lanes; rows[lane] may be null (nothing is written).
template <class T>
static void unpack_columns(const float* panel, int64_t ld, const float* factor, T* const* rows, int64_t n,
                           int64_t columns) {
  for (int64_t r = 0; r < n; r += W) {
    const vf f = load(factor + r);
    for (int64_t c = 0; c < columns; c += W) {
      const int64_t here = least(W, columns - c);
      vf tile[W];
      for (int i = 0; i < W; ++i) tile[i] = i < here ? load(panel + (c + i) * ld + r) * f : zero();
      transpose(tile);
      const int64_t lanes = least(W, n - r);
      for (int64_t i = 0; i < lanes; ++i) {
        if (rows[r + i] != nullptr) store_first_from_f32(rows[r + i] + c, tile[i], here);
      }
    }
  }
}

static void clear(float* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = 0.0f;
}

// to[c] = acc[c] * factor for one row of n values.
template <class U>
static void write_row(const float* acc, float factor, U* to, int64_t n) {
  for (int64_t c = 0; c < n; c += W) store_first_from_f32(to + c, load(acc + c) * splat(factor), n - c);
}

}  // namespace fastxattn::FXA_ISA
