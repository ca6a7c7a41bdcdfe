// How fast this machine multiplies when nothing but the multiplier is in the way: the roofline that benchmarks quote.
#include <cstdint>

#include "core/cpu/gemm.h"

namespace fastxattn::FXA_ISA {

// Runs `repeats` products on panels that fit in the first-level cache; returns the floating-point operations done.
// `bf16` asks for the bf16 dot product; 0 where this instruction set has none.
double peak_products(bool bf16, int64_t repeats, float* scratch) {
  constexpr int64_t rows = 48, columns = 48, depth = 64;
  float* a = scratch;
  float* b = a + rows * depth;
  float* c = b + columns * depth;
  for (int64_t i = 0; i < (rows + columns) * depth; ++i) scratch[i] = 1.0f;
  for (int64_t r = 0; r < repeats; ++r) {
    if (bf16) {
#if defined(FXA_HAS_BF16_DOT)
      gemm<bf16x2, AOrder::rows, Init::zero>(rows, columns, depth, reinterpret_cast<const bf16x2*>(a), depth,
                                             reinterpret_cast<const bf16x2*>(b), columns, c, columns);
#else
      return 0;
#endif
    } else {
      gemm<float, AOrder::rows, Init::zero>(rows, columns, depth, a, depth, b, columns, c, columns);
    }
  }
  return 2.0 * rows * columns * depth * (bf16 ? 2 : 1) * static_cast<double>(repeats);
}

}  // namespace fastxattn::FXA_ISA
