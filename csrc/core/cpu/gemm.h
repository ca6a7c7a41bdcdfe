// Register-tiled matrix products on small panels: the one inner loop that every CPU kernel shares.
//
//   C[m][n] = (init) + sum_k A(m, k) * B[k][n]
//
// The lanes of a vector run along n; an element of A is broadcast from memory. An element `E` is one
// float, or a bf16x2 that holds two consecutive k (then the depth K counts pairs, and the product
// accumulates in float32 as the hardware dot product does).
//   a_rows:    A(m, k) = a[m * lda + k]   (A lies as rows of m)
//   a_columns: A(m, k) = a[k * lda + m]   (A lies as rows of k)
// B has `columns` floats/pairs per row k at stride ldb, C at stride ldc; columns is a multiple of W.
#pragma once

#include "core/cpu/vec.h"

namespace fastxattn::FXA_ISA {

enum class AOrder { rows, columns };
enum class Init {
  zero,   // C = product
  add,    // C += product
  scale,  // C = C * alpha[n] + product; alpha has one float per column
};

FXA_INLINE vf broadcast_fma(const float* a, vf b, vf c) { return fma(splat(*a), b, c); }
FXA_INLINE vf load_operand(const float* p) { return load(p); }

#if defined(FXA_ISA_AVX512BF16)
#define FXA_HAS_BF16_DOT 1
FXA_INLINE vf broadcast_fma(const bf16x2* a, vf b, vf c) {
  const __m512i pair = _mm512_set1_epi32(static_cast<int>(a->bits));
  return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(pair), reinterpret_cast<__m512bh>(b));
}
FXA_INLINE vf load_operand(const bf16x2* p) { return load_words(p); }
#endif

template <class E, AOrder order, Init init, int M, int N>
FXA_INLINE void gemm_tile(int64_t K, const E* a, int64_t lda, const E* b, int64_t ldb, float* c, int64_t ldc,
                          const float* alpha) {
  vf acc[M][N];
#pragma GCC unroll 32
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) acc[m][n] = zero();
#pragma GCC unroll 2
  for (int64_t k = 0; k < K; ++k) {
    vf row[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) row[n] = load_operand(b + k * ldb + n * W);
#pragma GCC unroll 32
    for (int m = 0; m < M; ++m) {
      const E* element = order == AOrder::rows ? a + m * lda + k : a + k * lda + m;
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[m][n] = broadcast_fma(element, row[n], acc[m][n]);
    }
  }
#pragma GCC unroll 32
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      float* out = c + m * ldc + n * W;
      if constexpr (init == Init::zero) {
        store(out, acc[m][n]);
      } else if constexpr (init == Init::add) {
        store(out, load(out) + acc[m][n]);
      } else {
        store(out, fma(load(out), load(alpha + n * W), acc[m][n]));
      }
    }
}

// Rows of A per tile for N vectors of columns, chosen so that accumulators, one row of B and a broadcast
// fit in the register file.
#if defined(FXA_VEC512)
inline constexpr int kMaxN = 4;
inline constexpr int kTileRows[5] = {0, 16, 12, 8, 6};
#elif defined(FXA_ISA_NEON)
inline constexpr int kMaxN = 4;
inline constexpr int kTileRows[5] = {0, 16, 12, 8, 6};
#elif defined(FXA_ISA_AVX2)
inline constexpr int kMaxN = 2;
inline constexpr int kTileRows[3] = {0, 8, 6};
#else
inline constexpr int kMaxN = 1;
inline constexpr int kTileRows[2] = {0, 4};
#endif

// Called after every tile of rows: a place to prefetch what comes next while the multipliers are busy.
struct NoHook {
  void operator()() const {}
};

template <class E, AOrder order, Init init, int N, int M>
static void gemm_last_rows(int64_t rows, int64_t K, const E* a, int64_t lda, const E* b, int64_t ldb, float* c,
                           int64_t ldc, const float* alpha) {
  if constexpr (M > 0) {
    if (rows == M) return gemm_tile<E, order, init, M, N>(K, a, lda, b, ldb, c, ldc, alpha);
    gemm_last_rows<E, order, init, N, M - 1>(rows, K, a, lda, b, ldb, c, ldc, alpha);
  }
}

template <class E, AOrder order, Init init, int N, class Hook>
static void gemm_columns(int64_t rows, int64_t K, const E* a, int64_t lda, const E* b, int64_t ldb, float* c,
                         int64_t ldc, const float* alpha, Hook& hook) {
  constexpr int M = kTileRows[N];
  int64_t m = 0;
  for (; m + M <= rows; m += M) {
    gemm_tile<E, order, init, M, N>(K, order == AOrder::rows ? a + m * lda : a + m, lda, b, ldb, c + m * ldc, ldc,
                                    alpha);
    hook();
  }
  gemm_last_rows<E, order, init, N, M - 1>(rows - m, K, order == AOrder::rows ? a + m * lda : a + m, lda, b, ldb,
                                           c + m * ldc, ldc, alpha);
}

// The whole product; `alpha` is read only for Init::scale.
template <class E, AOrder order, Init init, class Hook = NoHook>
static void gemm(int64_t rows, int64_t columns, int64_t K, const E* a, int64_t lda, const E* b, int64_t ldb, float* c,
                 int64_t ldc, const float* alpha = nullptr, Hook hook = {}) {
  int64_t n = 0;
  for (; n + kMaxN * W <= columns; n += kMaxN * W) {
    gemm_columns<E, order, init, kMaxN>(rows, K, a, lda, b + n, ldb, c + n, ldc,
                                        init == Init::scale ? alpha + n : nullptr, hook);
  }
  if constexpr (kMaxN > 1) {
    const int64_t left = (columns - n) / W;
    b += n, c += n, alpha = init == Init::scale ? alpha + n : nullptr;
    if constexpr (kMaxN > 3) {
      if (left == 3) return gemm_columns<E, order, init, 3>(rows, K, a, lda, b, ldb, c, ldc, alpha, hook);
    }
    if constexpr (kMaxN > 2) {
      if (left == 2) return gemm_columns<E, order, init, 2>(rows, K, a, lda, b, ldb, c, ldc, alpha, hook);
    }
    if (left == 1) gemm_columns<E, order, init, 1>(rows, K, a, lda, b, ldb, c, ldc, alpha, hook);
  }
}

// C = product over a long depth, in pieces: one chain of K additions loses more digits than a sum of shorter ones.
inline constexpr int64_t kDeepest = 128;
template <class E, AOrder order, class Hook = NoHook>
static void gemm_deep(int64_t rows, int64_t columns, int64_t K, const E* a, int64_t lda, const E* b, int64_t ldb,
                      float* c, int64_t ldc, Hook hook = {}, int64_t deepest = kDeepest) {
  const int64_t first = K < deepest ? K : deepest;
  gemm<E, order, Init::zero>(rows, columns, first, a, lda, b, ldb, c, ldc, nullptr, hook);
  for (int64_t k = first; k < K; k += deepest) {
    const int64_t depth = K - k < deepest ? K - k : deepest;
    gemm<E, order, Init::add>(rows, columns, depth, order == AOrder::rows ? a + k : a + k * lda, lda, b + k * ldb, ldb,
                              c, ldc);
  }
}

}  // namespace fastxattn::FXA_ISA
