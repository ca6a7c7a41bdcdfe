// The vector of W floats that kernel bodies are written in, one definition per instruction set.
//
// GCC and Clang vector types carry + - * / and comparisons; only what they cannot express is an
// intrinsic. Include from .inl files only: the width and the namespace depend on FXA_ISA.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/scalar.h"

#if defined(FXA_ISA_AVX2)
// GCC 12's own headers start some intrinsics from a variable they name undefined (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif
#if defined(FXA_ISA_AVX512)
#define FXA_VEC512 1
#endif

namespace fastxattn::FXA_ISA {

#if defined(FXA_VEC512)
inline constexpr int W = 16;  // floats per vector
#elif defined(FXA_ISA_NEON)
inline constexpr int W = 4;
#else
inline constexpr int W = 8;
#endif

using vf = float __attribute__((vector_size(W * 4)));
using vi = int32_t __attribute__((vector_size(W * 4)));
using vu = uint32_t __attribute__((vector_size(W * 4)));
using vf_unaligned = float __attribute__((vector_size(W * 4), aligned(4), may_alias));
using vf_anywhere = float __attribute__((vector_size(W * 4), aligned(1), may_alias));
using vh = uint16_t __attribute__((vector_size(W * 2)));
using vh_unaligned = uint16_t __attribute__((vector_size(W * 2), aligned(2), may_alias));

#define FXA_INLINE static inline __attribute__((always_inline))

FXA_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
// 32-bit lanes of memory of any type at any address, such as pairs of 16-bit values that start at an odd one.
FXA_INLINE vf load_words(const void* p) { return *static_cast<const vf_anywhere*>(p); }
FXA_INLINE void store_words(void* p, vf x) { *static_cast<vf_anywhere*>(p) = x; }
FXA_INLINE void store(float* p, vf x) { *reinterpret_cast<vf_unaligned*>(p) = x; }
FXA_INLINE vf splat(float x) { return x - vf{}; }  // x - 0 keeps the sign of zero and folds to a broadcast
FXA_INLINE vi splat(int32_t x) { return x - vi{}; }
FXA_INLINE vf zero() { return vf{}; }
FXA_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }  // contracted: files are built with -ffp-contract=fast

// max/min return the second operand when either is NaN, on every instruction set.
#if defined(FXA_VEC512)
FXA_INLINE vf max(vf a, vf b) { return _mm512_max_ps(a, b); }
FXA_INLINE vf min(vf a, vf b) { return _mm512_min_ps(a, b); }
FXA_INLINE vf round_even(vf x) { return _mm512_roundscale_ps(x, 0); }
FXA_INLINE vf scale_by_pow2(vf x, vf n) { return _mm512_scalef_ps(x, n); }
FXA_INLINE float reduce_add(vf x) { return _mm512_reduce_add_ps(x); }
FXA_INLINE float reduce_max(vf x) { return _mm512_reduce_max_ps(x); }
#else
#if defined(FXA_ISA_AVX2)
FXA_INLINE vf max(vf a, vf b) { return _mm256_max_ps(a, b); }
FXA_INLINE vf min(vf a, vf b) { return _mm256_min_ps(a, b); }
FXA_INLINE vf round_even(vf x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#else
FXA_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
FXA_INLINE vf min(vf a, vf b) { return a < b ? a : b; }
// Adding 1.5 * 2^23 leaves no fraction bits: exact for |x| < 2^22, which is all that exp2 asks for.
FXA_INLINE vf round_even(vf x) { return (x + 0x1.8p23f) - 0x1.8p23f; }
#endif
// x * 2^n for whole n >= -150, in two steps so that results below the normal range flush gradually.
FXA_INLINE vf scale_by_pow2(vf x, vf n) {
  const vi whole = __builtin_convertvector(n, vi);
  const vi half = whole >> 1;
  const vf first = reinterpret_cast<vf>((half + 127) << 23);
  const vf second = reinterpret_cast<vf>((whole - half + 127) << 23);
  return x * first * second;
}
FXA_INLINE float reduce_add(vf x) {
  float sum = 0;
  for (int step = W / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) x[i] += x[i + step];
  sum = x[0];
  return sum;
}
FXA_INLINE float reduce_max(vf x) {
  float m = x[0];
  for (int i = 1; i < W; ++i) m = x[i] > m ? x[i] : m;
  return m;
}
#endif

// Lanes [0, n) of memory, the rest `fill`; touches no byte past p[n - 1].
FXA_INLINE vf load_first(const float* p, int n, float fill = 0.0f) {
  if (n >= W) return load(p);
#if defined(FXA_VEC512)
  return _mm512_mask_loadu_ps(splat(fill), static_cast<__mmask16>((1u << (n > 0 ? n : 0)) - 1), p);
#else
  float lanes[W];
  for (int i = 0; i < W; ++i) lanes[i] = i < n ? p[i] : fill;
  return load(lanes);
#endif
}
FXA_INLINE void store_first(float* p, vf x, int n) {
  if (n >= W) return store(p, x);
  float lanes[W];
  store(lanes, x);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}

// Functions of N vectors go through them step by step: a processor does not look far enough ahead to overlap one long
// chain of dependent instructions with the next.

// slope[i] = (2^f - 1) / f for |f| <= 0.5; 1 + f times it has a relative error of 2e-8 before rounding.
template <int N>
FXA_INLINE void exp2_slope_each(const vf (&f)[N], vf (&slope)[N]) {
  static constexpr float kTerms[] = {0x1.5f3e540000000p-10f, 0x1.3b2d4c0000000p-7f, 0x1.c6aee80000000p-5f,
                                     0x1.ebfbdc0000000p-3f, 0x1.62e4300000000p-1f};
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) slope[i] = splat(0x1.41fbba0000000p-13f);
#pragma GCC unroll 5
  for (const float term : kTerms) {
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) slope[i] = fma(slope[i], f[i], splat(term));
  }
}
FXA_INLINE vf exp2_slope(vf x) {
  const vf f[1] = {x};
  vf slope[1];
  exp2_slope_each(f, slope);
  return slope[0];
}

// 2^x: |relative error| <= 1e-7 where the result is normal; 0 below -150; NaN stays NaN; -inf gives 0.
template <int N>
FXA_INLINE void exp2_each(vf (&x)[N]) {
  vf n[N], slope[N];
#if defined(FXA_VEC512)
  // The fraction of an infinity is 0 here, and scalef saturates both ways: no clamping needed.
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) n[i] = round_even(x[i]), x[i] = _mm512_reduce_ps(x[i], 0);
#else
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) x[i] = min(splat(128.0f), max(splat(-150.0f), x[i]));  // operand order keeps NaN
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) n[i] = round_even(x[i]);
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) x[i] = x[i] - n[i];
#endif
  exp2_slope_each(x, slope);
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) x[i] = fma(slope[i], x[i], splat(1.0f));
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) x[i] = scale_by_pow2(x[i], n[i]);
}
FXA_INLINE vf exp2(vf x) {
  vf each[1] = {x};
  exp2_each(each);
  return each[0];
}

inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

// e^x: |relative error| <= 8e-8 (x is reduced by ln 2 in two parts, not multiplied by a rounded log2 e); the same
// edges as exp2: NaN stays NaN, -inf gives 0.
template <int N>
FXA_INLINE void exp_each(vf (&x)[N]) {
  static constexpr float kSlopes[] = {0x1.121072p-7f, 0x1.5554e4p-5f, 0x1.5554d8p-3f, 0.5f};
  vf n[N], y[N];
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) x[i] = min(splat(89.0f), max(splat(-105.0f), x[i]));
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) n[i] = round_even(x[i] * splat(kLog2e));
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) x[i] = fma(n[i], splat(-0x1.62e4p-1f), x[i]);
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) x[i] = fma(n[i], splat(-0x1.7f7d1c0p-20f), x[i]), y[i] = splat(0x1.6d4926p-10f);
#pragma GCC unroll 4
  for (const float slope : kSlopes) {
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) y[i] = fma(y[i], x[i], splat(slope));
  }
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) y[i] = fma(x[i] * x[i], y[i], x[i]) + splat(1.0f);
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) x[i] = scale_by_pow2(y[i], n[i]);
}
FXA_INLINE vf exp(vf x) {
  vf each[1] = {x};
  exp_each(each);
  return each[0];
}

// tanh(x) = e / (e + 2) with e = exp(2x) - 1, formed without cancellation: relative error <= 5e-7.
FXA_INLINE vf tanh(vf x) {
  // Beyond 30 the result is 1 in float; the clamps' operand order keeps NaN.
  const vf y = max(splat(-30.0f), min(splat(30.0f), x * splat(2.0f * kLog2e)));
  const vf n = round_even(y);
  const vf f = y - n;
  const vf power = scale_by_pow2(splat(1.0f), n);
  const vf e = fma(power, exp2_slope(f) * f, power - splat(1.0f));
  return e / (e + splat(2.0f));
}

// log2(x): absolute error <= 2e-7 plus rounding for normal x > 0; 0 gives -inf, infinity and NaN stay.
FXA_INLINE vf log2(vf x) {
  const vi bits = reinterpret_cast<vi>(x);
  const vi exponent = (bits - 0x3f3504f3) >> 23;  // mantissa lands in [sqrt(1/2), sqrt(2))
  const vf m = reinterpret_cast<vf>(bits - (exponent << 23));
  const vf t = (m - splat(1.0f)) / (m + splat(1.0f));
  const vf t2 = t * t;
  vf y = splat(2.0f / 9.0f * 1.4426950408889634f);
  y = fma(y, t2, splat(2.0f / 7.0f * 1.4426950408889634f));
  y = fma(y, t2, splat(2.0f / 5.0f * 1.4426950408889634f));
  y = fma(y, t2, splat(2.0f / 3.0f * 1.4426950408889634f));
  y = fma(y, t2, splat(2.0f * 1.4426950408889634f));
  const vf result = fma(y, t, __builtin_convertvector(exponent, vf));
  const vf infinity = splat(__builtin_inff());
  return x == zero() ? -infinity : x < infinity ? result : x;
}

// W elements of memory of any type as floats.
FXA_INLINE vf load_as_f32(const float* p) { return load(p); }
FXA_INLINE vf load_as_f32(const bf16_t* p) {
  const vh bits = *reinterpret_cast<const vh_unaligned*>(p);
  return reinterpret_cast<vf>(__builtin_convertvector(bits, vu) << 16);
}
FXA_INLINE vf load_as_f32(const f16_t* p) {
#if defined(FXA_VEC512)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(FXA_ISA_AVX2)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vf r;
  for (int i = 0; i < W; ++i) r[i] = to_f32(p[i]);
  return r;
#endif
}
FXA_INLINE void store_from_f32(float* p, vf x) { store(p, x); }
FXA_INLINE void store_from_f32(bf16_t* p, vf x) {
#if defined(FXA_ISA_AVX512BF16)
  const __m256bh narrow = _mm512_cvtneps_pbh(x);
  std::memcpy(p, &narrow, sizeof(narrow));
#else
  const vu u = reinterpret_cast<vu>(x);
  const vu rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
  const vu quiet = u >> 16 | 0x40u;
  const vu bits = (u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
  *reinterpret_cast<vh_unaligned*>(p) = __builtin_convertvector(bits, vh);
#endif
}
FXA_INLINE void store_from_f32(f16_t* p, vf x) {
#if defined(FXA_VEC512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(FXA_ISA_AVX2)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < W; ++i) p[i] = from_f32<f16_t>(x[i]);
#endif
}

// The first n of W elements of any type, the rest zero; touches nothing past them.
template <class T>
FXA_INLINE vf load_first_as_f32(const T* p, int64_t n) {
  if (n >= W) return load_as_f32(p);
  T lanes[W] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load_as_f32(lanes);
}
template <class T>
FXA_INLINE void store_first_from_f32(T* p, vf x, int64_t n) {
  if (n >= W) return store_from_f32(p, x);
  T lanes[W];
  store_from_f32(lanes, x);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

// a0 b0 a1 b1 ... from the lower, or the upper, halves of two vectors.
#if defined(FXA_VEC512)
FXA_INLINE vf interleave_low(vf a, vf b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
FXA_INLINE vf interleave_high(vf a, vf b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#elif defined(FXA_ISA_NEON)
FXA_INLINE vf interleave_low(vf a, vf b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
FXA_INLINE vf interleave_high(vf a, vf b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
#else
FXA_INLINE vf interleave_low(vf a, vf b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
FXA_INLINE vf interleave_high(vf a, vf b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
#endif

// Transposes a W x W tile held in registers: interleaving halves log2(W) times moves every element home.
FXA_INLINE void transpose(vf (&x)[W]) {
#pragma GCC unroll 4
  for (int step = 1; step < W; step *= 2) {
    vf y[W];
#pragma GCC unroll 16
    for (int i = 0; i < W / 2; ++i) {
      y[2 * i] = interleave_low(x[i], x[i + W / 2]);
      y[2 * i + 1] = interleave_high(x[i], x[i + W / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) x[i] = y[i];
  }
}

// Two bf16 in one 32-bit lane: the operand of the bf16 dot product, which sums the products of both. Rows of bf16 are
// read as pairs where they lie, which may be at an odd element.
using unaligned_pair = uint32_t __attribute__((aligned(2)));
struct bf16x2 {
  unaligned_pair bits;
};
static_assert(sizeof(bf16x2) == 4 && alignof(bf16x2) == 2);

}  // namespace fastxattn::FXA_ISA
