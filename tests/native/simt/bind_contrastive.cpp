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

template <class T>
static Statistics run_contrastive(const Arguments& a, bool slopes) {
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
  p.dz = a.output<float>(memory, "dz");
  p.dot = a.output<float>(memory, "dot");
  const auto tiles = [](int64_t rows) { return static_cast<int>((rows + gpu::kTileRows - 1) / gpu::kTileRows); };
  Launch launch{.threads = gpu::kTileThreads,
                .shared_bytes = gpu::kTileShared<T>,
                .order = static_cast<uint64_t>(a.integer("order", 0))};
  Runner runner(memory);
  if (slopes) {
    p.stride_dz = a.get("dz").strides[0];
    p.stride_dot = a.get("dot").strides[0];
    launch.grid_x = tiles(p.x.rows - p.first_x), launch.grid_y = tiles(p.y.rows - p.first_y);
    runner.run("slopes", launch, [&] { gpu::contrastive_slopes_kernel<T>(p); });
  } else {
    launch.grid_x = tiles(p.x.rows), launch.grid_y = p.splits;
    runner.run("stats", launch, [&] { gpu::contrastive_stats_kernel<T>(p); });
  }
  return runner.statistics();
}
FXA_SIMT_BIND(contrastive_stats_float32) { return run_contrastive<float>(a, false); }
FXA_SIMT_BIND(contrastive_stats_bfloat16) { return run_contrastive<bf16_t>(a, false); }
FXA_SIMT_BIND(contrastive_stats_float16) { return run_contrastive<f16_t>(a, false); }
FXA_SIMT_BIND(contrastive_slopes_float32) { return run_contrastive<float>(a, true); }
FXA_SIMT_BIND(contrastive_slopes_bfloat16) { return run_contrastive<bf16_t>(a, true); }
FXA_SIMT_BIND(contrastive_slopes_float16) { return run_contrastive<f16_t>(a, true); }

}  // namespace fastxattn::simt
