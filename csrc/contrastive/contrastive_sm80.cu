// Launches the contrastive kernels on a device.
#include "contrastive/contrastive.cuh"
#include "core/cuda_launch.h"

namespace fastxattn {

static int tiles(int64_t rows) { return static_cast<int>((rows + gpu::kTileRows - 1) / gpu::kTileRows); }

template <class T>
static const char* stats_as(const ContrastiveCuda& p, void* stream) {
  const char* fault = nullptr;
  OnDevice{static_cast<cudaStream_t>(stream), fault}(gpu::contrastive_stats_kernel<T>, tiles(p.x.rows), p.splits,
                                                     gpu::kTileThreads, gpu::kTileShared<T>, p);
  return fault;
}
const char* contrastive_stats_cuda(const ContrastiveCuda& p, DType dtype, void* stream) {
  if (dtype == DType::f32) return stats_as<float>(p, stream);
  if (dtype == DType::bf16) return stats_as<bf16_t>(p, stream);
  return stats_as<f16_t>(p, stream);
}

template <class T>
static const char* slopes_as(const ContrastiveCuda& p, int64_t rows, int64_t columns, void* stream) {
  const char* fault = nullptr;
  OnDevice{static_cast<cudaStream_t>(stream), fault}(gpu::contrastive_slopes_kernel<T>, tiles(rows), tiles(columns),
                                                     gpu::kTileThreads, gpu::kTileShared<T>, p);
  return fault;
}
const char* contrastive_slopes_cuda(const ContrastiveCuda& p, int64_t rows, int64_t columns, DType dtype,
                                    void* stream) {
  if (dtype == DType::f32) return slopes_as<float>(p, rows, columns, stream);
  if (dtype == DType::bf16) return slopes_as<bf16_t>(p, rows, columns, stream);
  return slopes_as<f16_t>(p, rows, columns, stream);
}

}  // namespace fastxattn
