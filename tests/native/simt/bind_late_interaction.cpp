// Late interaction under the runner.
#include "late_interaction/late_interaction.cuh"
#include "late_interaction/late_interaction_bwd.cuh"
#include "simt/bind.h"

namespace fastxattn::simt {

static uint64_t order(const Arguments& a) { return static_cast<uint64_t>(a.integer("order", 0)); }

template <class T>
static Statistics run_maxsim(const Arguments& a) {
  Memory memory;
  LateInteractionCuda p{};
  p.smooth = static_cast<float>(a.number("smooth", 0));
  const auto side = [&](const char* name, const char* cu, const char* sum, const char* best) {
    void* kept = p.smooth > 0 ? static_cast<void*>(a.output<float>(memory, best)) : a.output<int32_t>(memory, best);
    return TokenSide{a.input<T>(memory, name),
                     a.input<int32_t>(memory, cu),
                     a.size(cu) - 1,
                     a.size(name),
                     a.output<float>(memory, sum),
                     kept};
  };
  p.a = side("a", "cu_a", "sum_a", "best_a");
  p.b = side("b", "cu_b", "sum_b", "best_b");
  p.d = a.size("a", 1);
  p.aligned = a.integer("aligned", 0) != 0;
  Runner runner(memory);
  runner.run("maxsim",
             {.grid_x = p.a.sets * p.b.sets,
              .threads = gpu::kTileThreads,
              .shared_bytes = gpu::kTileShared<T> + kMaxSimShared,
              .order = order(a)},
             [&] { p.smooth > 0 ? gpu::smooth_maxsim_kernel<T>(p) : gpu::maxsim_kernel<T>(p); });
  return runner.statistics();
}

template <class T, class Kept>
static LateInteractionGradientCuda gradient_params(const Arguments& a, Memory& memory) {
  const auto side = [&](const char* name, const char* cu, const char* set, const char* best, const char* grad,
                        const char* stride) {
    return TokenGradientSide{
        a.input<T>(memory, name), a.input<int32_t>(memory, cu), a.input<int32_t>(memory, set), a.size(name),
        a.size(cu) - 1,           a.input<Kept>(memory, best),  a.input<float>(memory, grad),  a.integer(stride)};
  };
  LateInteractionGradientCuda p{};
  p.x = side("x", "cu_x", "set_x", "best_x", "grad_x", "stride_x");
  p.y = side("y", "cu_y", "set_y", "best_y", "grad_y", "stride_y");
  p.d = a.size("x", 1);
  p.aligned = a.integer("aligned", 0) != 0;
  return p;
}

template <class T>
static Statistics run_gradient(const Arguments& a) {
  Memory memory;
  LateInteractionGradientCuda p = gradient_params<T, int32_t>(a, memory);
  p.shares = a.size("out");
  p.out = a.output<float>(memory, "out");
  const int tiles = (p.x.tokens + kGradientTile - 1) / kGradientTile;
  const int chunks = (static_cast<int>(p.d) + kGradientFeatures - 1) / kGradientFeatures;
  Runner runner(memory);
  runner.run("maxsim_gradient",
             {.grid_x = tiles * chunks,
              .grid_y = p.shares,
              .threads = kGradientThreads,
              .shared_bytes = kGradientShared,
              .order = order(a)},
             [&] { gpu::maxsim_gradient_kernel<T>(p); });
  return runner.statistics();
}

template <class T>
static Statistics run_weights(const Arguments& a) {
  Memory memory;
  LateInteractionGradientCuda p = gradient_params<T, float>(a, memory);
  p.smooth = static_cast<float>(a.number("smooth"));
  p.first_x = a.integer("first_x", 0);
  p.first_y = a.integer("first_y", 0);
  p.weights = a.output<float>(memory, "weights");
  p.stride_weights = a.get("weights").strides[0];
  const auto tiles = [](int rows) { return (rows + gpu::kTileRows - 1) / gpu::kTileRows; };
  Runner runner(memory);
  runner.run("smooth_weights",
             {.grid_x = tiles(a.integer("rows", p.x.tokens - p.first_x)),
              .grid_y = tiles(a.integer("columns", p.y.tokens - p.first_y)),
              .threads = gpu::kTileThreads,
              .shared_bytes = gpu::kTileShared<T>,
              .order = order(a)},
             [&] { gpu::smooth_weights_kernel<T>(p); });
  return runner.statistics();
}

#define FXA_LATE_INTERACTION(dtype, T)                                  \
  FXA_SIMT_BIND(maxsim_##dtype) { return run_maxsim<T>(a); }            \
  FXA_SIMT_BIND(maxsim_gradient_##dtype) { return run_gradient<T>(a); } \
  FXA_SIMT_BIND(smooth_weights_##dtype) { return run_weights<T>(a); }
FXA_LATE_INTERACTION(float32, float)
FXA_LATE_INTERACTION(bfloat16, bf16_t)
FXA_LATE_INTERACTION(float16, f16_t)
#undef FXA_LATE_INTERACTION

}  // namespace fastxattn::simt
