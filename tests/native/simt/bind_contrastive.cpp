// Contrastive losses under the runner.
#include "contrastive/contrastive.cuh"
#include "simt/bind.h"

namespace fastxattn::simt {

template <class T>
static ContrastiveCudaSide side(const Arguments& a, Memory& memory, const std::string& name) {
  const auto floats = [&](const char* what) { return a.input<float>(memory, (what + name).c_str()); };
  const auto integers = [&](const char* what) { return a.input<int32_t>(memory, (what + name).c_str()); };
  return {a.input<T>(memory, name.c_str()),
          a.get(name.c_str()).strides[0],
          a.size(name.c_str()),
          floats("norm_"),
          integers("id_"),
          integers("skip_"),
          floats("limit_"),
          floats("slopes_")};
}

using Kernel = void (*)(ContrastiveCuda);

template <class T>
static Statistics run_contrastive(const Arguments& a, Kernel kernel, bool window) {
  Memory memory;
  ContrastiveCuda p{};
  p.x = side<T>(a, memory, "x");
  p.y = side<T>(a, memory, "y");
  p.d = a.size("x", 1);
  p.scale = a.input<float>(memory, "scale");
  p.bias = a.input<float>(memory, "bias");
  p.exact = a.input<float>(memory, "exact");
  p.exact_by_row = a.integer("exact_by_row", 1) != 0;
  p.exclude_self = a.integer("exclude_self", 0) != 0;
  p.means = a.integer("means", 0) != 0;
  p.aligned = a.integer("aligned", 0) != 0;
  p.rank = a.input<float>(memory, "rank");
  p.splits = a.integer("splits", 1);
  p.state = a.output<float>(memory, "state");
  p.first_x = a.integer("first_x", 0);
  p.first_y = a.integer("first_y", 0);
  p.target = a.input<int32_t>(memory, "target");
  p.logits = a.output<float>(memory, "logits");
  p.weight = a.input<float>(memory, "weight");
  p.dz = a.output<float>(memory, "dz");
  p.sums = a.output<float>(memory, "sums");
  const auto tiles = [](int64_t rows) { return static_cast<int>((rows + gpu::kTileRows - 1) / gpu::kTileRows); };
  Launch launch{.grid_x = tiles(p.x.rows),
                .grid_y = p.splits,
                .threads = gpu::kTileThreads,
                .shared_bytes = gpu::kTileShared<T>,
                .order = static_cast<uint64_t>(a.integer("order", 0))};
  if (window) {
    if (p.dz != nullptr) p.stride_dz = a.get("dz").strides[0];
    p.stride_sums = a.get("sums").strides[1];
    launch.grid_x = tiles(a.integer("rows", p.x.rows - p.first_x));
    launch.grid_y = tiles(a.integer("columns", p.y.rows - p.first_y));
  }
  Runner runner(memory);
  runner.run("contrastive", launch, [&] { kernel(p); });
  return runner.statistics();
}
#define FXA_CONTRASTIVE(name, kernel, window)                                                        \
  FXA_SIMT_BIND(name##_float32) { return run_contrastive<float>(a, gpu::kernel<float>, window); }    \
  FXA_SIMT_BIND(name##_bfloat16) { return run_contrastive<bf16_t>(a, gpu::kernel<bf16_t>, window); } \
  FXA_SIMT_BIND(name##_float16) { return run_contrastive<f16_t>(a, gpu::kernel<f16_t>, window); }
FXA_CONTRASTIVE(contrastive_stats, contrastive_stats_kernel, false)
FXA_CONTRASTIVE(contrastive_positives, contrastive_positives_kernel, false)
FXA_CONTRASTIVE(contrastive_slopes, contrastive_slopes_kernel, true)
FXA_CONTRASTIVE(sigmoid, sigmoid_kernel, true)
#undef FXA_CONTRASTIVE

}  // namespace fastxattn::simt
