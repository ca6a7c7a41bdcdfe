// Operand panels for similarity products A * B^T: rows in the kernel's element type, and columns packed for the lanes.
//
// A block of rows is used where it lies when its depth is whole vectors, else copied with zero padding.
// The other side is transposed into strips of kStrip columns, [strip][depth][kStrip], which is how
// core/cpu/gemm.h wants its B operand. An element is one float, or a bf16x2 of two consecutive features.
#pragma once

#include "core/cpu/gemm.h"

namespace fastxattn::FXA_ISA {

inline constexpr int64_t kStrip = 64;
// Depth after which a partial sum is stored: keeps a strip in L1 and the rounding error of long dots low.
inline constexpr int64_t kDepthChunk = 128;

FXA_INLINE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

template <class E>
inline constexpr bool is_pair = false;
template <>
inline constexpr bool is_pair<bf16x2> = true;

// Depth of a panel row in elements of E: whole vectors.
template <class E>
FXA_INLINE int64_t panel_depth(int64_t d) {
  return is_pair<E> ? round_up(d, 2 * W) / 2 : round_up(d, W);
}

// Rows of T as float32 rows of `depth` elements at stride `ld`; `copy` is used when they cannot be used in place.
template <class T>
static const float* f32_panel(const T* src, int64_t stride, int64_t rows, int64_t d, float* copy, int64_t* ld) {
  const int64_t depth = panel_depth<float>(d);
  if constexpr (sizeof(T) == sizeof(float)) {
    if (depth == d) {
      *ld = stride;
      return src;
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const T* in = src + r * stride;
    float* out = copy + r * depth;
    int64_t k = 0;
    for (; k + W <= d; k += W) store(out + k, load_as_f32(in + k));
    for (; k < depth; ++k) out[k] = k < d ? to_f32(in[k]) : 0.0f;
  }
  *ld = depth;
  return copy;
}

// Rows of bf16 as rows of pairs.
static const bf16x2* pair_panel(const bf16_t* src, int64_t stride, int64_t rows, int64_t d, bf16x2* copy, int64_t* ld) {
  const int64_t depth = panel_depth<bf16x2>(d);
  if (2 * depth == d && stride % 2 == 0) {
    *ld = stride / 2;
    return reinterpret_cast<const bf16x2*>(src);
  }
  for (int64_t r = 0; r < rows; ++r) {
    std::memcpy(copy + r * depth, src + r * stride, static_cast<size_t>(d) * 2);
    std::memset(reinterpret_cast<bf16_t*>(copy + r * depth) + d, 0, static_cast<size_t>(2 * depth - d) * 2);
  }
  *ld = depth;
  return copy;
}

template <int step>
FXA_INLINE void transpose_step(vf* r) {
  vi low, high;
  for (int l = 0; l < W; ++l) {
    low[l] = l & step ? W + (l ^ step) : l;
    high[l] = l & step ? W + l : (l ^ step);
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if (i & step) continue;
    const vf x = r[i], y = r[i | step];
    r[i] = __builtin_shuffle(x, y, low);
    r[i | step] = __builtin_shuffle(x, y, high);
  }
}

// Transposes `rows` rows (depth whole vectors, 32-bit elements) into strips; the lanes past the last row
// are zero up to a whole vector and unset beyond it.
template <class E>
static void pack_strips(const E* panel, int64_t ld, int64_t rows, int64_t depth, E* out) {
  for (int64_t base = 0; base < rows; base += kStrip) {
    float* strip = reinterpret_cast<float*>(out) + base * depth;
    for (int64_t lane = 0; lane < kStrip && base + lane < rows; lane += W) {
      for (int64_t k = 0; k < depth; k += W) {
        vf r[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i)
          r[i] = base + lane + i < rows ? load_words(panel + (base + lane + i) * ld + k) : zero();
        transpose_step<1>(r);
        transpose_step<2>(r);
        if constexpr (W > 4) transpose_step<4>(r);
        if constexpr (W > 8) transpose_step<8>(r);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) store(strip + (k + i) * kStrip + lane, r[i]);
      }
    }
  }
}

// out[r][c] = <a_r, b_c> for `rows` rows and every packed strip that `columns` reaches; out's stride is `ldo`.
template <class E>
static void similarity(const E* a, int64_t lda, int64_t rows, const E* strips, int64_t columns, int64_t depth,
                       float* out, int64_t ldo) {
  for (int64_t c = 0; c < columns; c += kStrip) {
    const E* strip = strips + c * depth;
    const int64_t lanes = columns - c < kStrip ? round_up(columns - c, W) : kStrip;
    for (int64_t k = 0; k < depth; k += kDepthChunk) {
      const int64_t chunk = depth - k < kDepthChunk ? depth - k : kDepthChunk;
      if (k == 0) {
        gemm<E, AOrder::rows, Init::zero>(rows, lanes, chunk, a, lda, strip, kStrip, out + c, ldo);
      } else {
        gemm<E, AOrder::rows, Init::add>(rows, lanes, chunk, a + k, lda, strip + k * kStrip, kStrip, out + c, ldo);
      }
    }
  }
}

}  // namespace fastxattn::FXA_ISA
