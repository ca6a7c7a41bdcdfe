// Token pruning under the runner.
#include "pruning/match.cuh"
#include "pruning/select.cuh"
#include "simt/bind.h"

namespace fastxattn::simt {

FXA_SIMT_BIND(select) {
  Memory memory;
  pruning::SelectCuda p{};
  p.select = {a.input<float>(memory, "scores"),        a.input<int32_t>(memory, "cu"),
              a.input<int32_t>(memory, "cu_keep"),     a.input<uint8_t>(memory, "protected"),
              a.output<int32_t>(memory, "keep_index"), a.output<int32_t>(memory, "assignment")};
  p.x = a.input<void>(memory, "x");
  p.gathered = a.output<void>(memory, "gathered");
  p.batch = a.size("cu") - 1;
  p.total = a.size("scores");
  p.capacity = a.size("keep_index");
  p.row_bytes = p.x == nullptr ? 0 : a.get("x").itemsize * a.size("x", 1);
  p.aligned = a.integer("aligned", 0) != 0;
  Runner runner(memory);
  runner.run("select",
             {.grid_x = p.batch + 1,
              .grid_y = a.integer("shares", 1),
              .threads = pruning::kSelectThreads,
              .shared_bytes = pruning::kSelectShared,
              .order = static_cast<uint64_t>(a.integer("order", 0))},
             [&] { gpu::select_kernel(p); });
  return runner.statistics();
}

template <class T>
static Statistics run_match(const Arguments& a) {
  Memory memory;
  pruning::MatchCuda p{};
  p.match.x = a.input<T>(memory, "x");
  p.match.a_index = a.input<int32_t>(memory, "a_index");
  p.match.cu_a = a.input<int32_t>(memory, "cu_a");
  p.match.b_index = a.input<int32_t>(memory, "b_index");
  p.match.cu_b = a.input<int32_t>(memory, "cu_b");
  p.match.batch = a.size("cu_a") - 1;
  p.match.channels = a.size("x", 1);
  p.match.best = a.output<int32_t>(memory, "best");
  p.match.similarity = a.output<float>(memory, "similarity");
  p.inverse_norm = a.input<float>(memory, "inverse_norm");
  p.rows = a.size("x");
  p.rows_a = a.size("a_index");
  p.rows_b = a.size("b_index");
  p.aligned = a.integer("aligned", 0) != 0;
  Runner runner(memory);
  runner.run("match",
             {.grid_x = static_cast<int>(p.match.batch),
              .grid_y = a.integer("shares", 1),
              .threads = gpu::kTileThreads,
              .shared_bytes = gpu::kTileShared<T> + 4 * gpu::kTileRows * 4,
              .order = static_cast<uint64_t>(a.integer("order", 0))},
             [&] { gpu::match_kernel<T>(p); });
  return runner.statistics();
}
FXA_SIMT_BIND(match_float32) { return run_match<float>(a); }
FXA_SIMT_BIND(match_bfloat16) { return run_match<bf16_t>(a); }
FXA_SIMT_BIND(match_float16) { return run_match<f16_t>(a); }

template <class T>
static Statistics run_merge(const Arguments& a) {
  Memory memory;
  const pruning::MergeCuda p{a.input<T>(memory, "x"),
                             a.input<int64_t>(memory, "members"),
                             a.input<int64_t>(memory, "first"),
                             a.input<float>(memory, "coefficient"),
                             a.output<T>(memory, "out"),
                             a.size("x", 1),
                             a.size("x")};
  Runner runner(memory);
  const auto columns = static_cast<int>((p.channels + pruning::kMergeColumns - 1) / pruning::kMergeColumns);
  runner.run("merge", {.grid_x = a.size("out"), .grid_y = columns, .threads = pruning::kMergeThreads},
             [&] { gpu::merge_kernel<T>(p); });
  return runner.statistics();
}
FXA_SIMT_BIND(merge_float32) { return run_merge<float>(a); }
FXA_SIMT_BIND(merge_bfloat16) { return run_merge<bf16_t>(a); }

}  // namespace fastxattn::simt
