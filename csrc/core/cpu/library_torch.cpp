// What the Python loader asks the CPU library about itself, over ctypes.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <string>

#include "core/cpu/isa.h"

#define FXA_EXPORT extern "C" __attribute__((visibility("default")))

// The active instruction set's name.
FXA_EXPORT const char* fastxattn_cpu_isa() { return fastxattn::isa_name(fastxattn::active_isa()); }

// Forces an instruction set ("auto" lifts it); 0 when it is unknown, not compiled in, or not supported here.
FXA_EXPORT int fastxattn_force_cpu_isa(const char* name) { return fastxattn::force_isa(name) ? 1 : 0; }

// Those that could be forced, slowest first, separated by spaces.
FXA_EXPORT const char* fastxattn_cpu_isas() {
  static const std::string names = fastxattn::available_isas();
  return names.c_str();
}

namespace fastxattn {
FXA_CPU_KERNEL(double, peak_products, (bool bf16, int64_t repeats, float* scratch))
}  // namespace fastxattn

// Single-thread GFLOP/s of the matrix-product micro-kernel on cached data: the best of some 30 ms of trying.
FXA_EXPORT double fastxattn_peak_gflops(int bf16) {
  alignas(64) static thread_local float scratch[3 * 48 * 64];
  const auto run = fastxattn::peak_products_for(fastxattn::active_isa());
  double best = 0;
  for (int attempt = 0; attempt < 30; ++attempt) {
    const auto start = std::chrono::steady_clock::now();
    const double done = run(bf16 != 0, 200, scratch);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, done / seconds.count() * 1e-9);
  }
  return best;
}
