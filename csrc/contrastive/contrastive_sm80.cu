// Launches the contrastive kernels on a device.
#include "contrastive/contrastive.cuh"
#include "core/cuda/launch.h"

namespace fastxattn {

static int tiles(int64_t rows) { return static_cast<int>((rows + gpu::kTileRows - 1) / gpu::kTileRows); }

// One block per (tile of rows, part of the columns).
template <class T>
static const char* launch(void (*kernel)(ContrastiveCuda), const ContrastiveCuda& p, int64_t rows, int parts,
                          void* stream) {
  const char* fault = nullptr;
  OnDevice{static_cast<cudaStream_t>(stream), fault}(kernel, tiles(rows), parts, gpu::kTileThreads, gpu::kTileShared<T>,
                                                     p);
  return fault;
}

#define FXA_LAUNCH(kernel, rows, parts)                                                         \
  if (dtype == DType::f32) return launch<float>(gpu::kernel<float>, p, rows, parts, stream);    \
  if (dtype == DType::bf16) return launch<bf16_t>(gpu::kernel<bf16_t>, p, rows, parts, stream); \
  return launch<f16_t>(gpu::kernel<f16_t>, p, rows, parts, stream);

const char* contrastive_stats_cuda(const ContrastiveCuda& p, DType dtype, void* stream) {
  FXA_LAUNCH(contrastive_stats_kernel, p.x.rows, p.splits)
}
const char* contrastive_positives_cuda(const ContrastiveCuda& p, DType dtype, void* stream) {
  FXA_LAUNCH(contrastive_positives_kernel, p.x.rows, 1)
}
const char* contrastive_slopes_cuda(const ContrastiveCuda& p, int64_t rows, int64_t columns, DType dtype,
                                    void* stream) {
  FXA_LAUNCH(contrastive_slopes_kernel, rows, tiles(columns))
}
const char* sigmoid_cuda(const ContrastiveCuda& p, int64_t rows, int64_t columns, DType dtype, void* stream) {
  FXA_LAUNCH(sigmoid_kernel, rows, tiles(columns))
}

}  // namespace fastxattn
