// Late interaction under the runner.
#include "late_interaction/late_interaction.cuh"
#include "simt/bind.h"

namespace fastxattn::simt {

template <class T>
static Statistics run_maxsim(const Arguments& a) {
  Memory memory;
  const LateInteractionCuda p{{a.input<T>(memory, "a"), a.input<int32_t>(memory, "cu_a"), a.size("cu_a") - 1,
                               a.output<float>(memory, "sum_a"), a.output<int32_t>(memory, "best_a")},
                              {a.input<T>(memory, "b"), a.input<int32_t>(memory, "cu_b"), a.size("cu_b") - 1,
                               a.output<float>(memory, "sum_b"), a.output<int32_t>(memory, "best_b")},
                              a.size("a", 1),
                              a.integer("aligned", 0) != 0};
  Runner runner(memory);
  runner.run("maxsim",
             {.grid_x = p.a.sets * p.b.sets,
              .threads = gpu::kTileThreads,
              .shared_bytes = gpu::kTileShared<T> + kMaxSimShared,
              .order = static_cast<uint64_t>(a.integer("order", 0))},
             [&] { gpu::maxsim_kernel<T>(p); });
  return runner.statistics();
}
FXA_SIMT_BIND(maxsim_float32) { return run_maxsim<float>(a); }
FXA_SIMT_BIND(maxsim_bfloat16) { return run_maxsim<bf16_t>(a); }
FXA_SIMT_BIND(maxsim_float16) { return run_maxsim<f16_t>(a); }

}  // namespace fastxattn::simt
