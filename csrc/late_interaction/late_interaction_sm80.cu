// Launches the late-interaction kernels on a device.
#include "core/cuda/launch.h"
#include "late_interaction/late_interaction.cuh"
#include "late_interaction/late_interaction_bwd.cuh"

namespace fastxattn {

template <class T>
static const char* maxsim_as(const LateInteractionCuda& p, void* stream) {
  const char* fault = nullptr;
  OnDevice{static_cast<cudaStream_t>(stream), fault}(
      p.smooth > 0.0f ? gpu::smooth_maxsim_kernel<T> : gpu::maxsim_kernel<T>, int64_t{p.a.sets} * p.b.sets, 1,
      gpu::kTileThreads, gpu::kTileShared<T> + kMaxSimShared, p);
  return fault;
}
const char* maxsim_cuda(const LateInteractionCuda& p, DType dtype, void* stream) {
  if (dtype == DType::f32) return maxsim_as<float>(p, stream);
  if (dtype == DType::bf16) return maxsim_as<bf16_t>(p, stream);
  return maxsim_as<f16_t>(p, stream);
}

template <class T>
static const char* gradient_as(const LateInteractionGradientCuda& p, void* stream) {
  const char* fault = nullptr;
  const int64_t tiles = (int64_t{p.x.tokens} + kGradientTile - 1) / kGradientTile;
  const int64_t chunks = (p.d + kGradientFeatures - 1) / kGradientFeatures;
  OnDevice{static_cast<cudaStream_t>(stream), fault}(gpu::maxsim_gradient_kernel<T>, tiles * chunks, p.shares,
                                                     kGradientThreads, kGradientShared, p);
  return fault;
}
const char* maxsim_gradient_cuda(const LateInteractionGradientCuda& p, DType dtype, void* stream) {
  if (dtype == DType::f32) return gradient_as<float>(p, stream);
  if (dtype == DType::bf16) return gradient_as<bf16_t>(p, stream);
  return gradient_as<f16_t>(p, stream);
}

template <class T>
static const char* weights_as(const LateInteractionGradientCuda& p, int64_t rows, int64_t columns, void* stream) {
  const char* fault = nullptr;
  const auto tiles = [](int64_t n) { return static_cast<int>((n + gpu::kTileRows - 1) / gpu::kTileRows); };
  OnDevice{static_cast<cudaStream_t>(stream), fault}(gpu::smooth_weights_kernel<T>, tiles(rows), tiles(columns),
                                                     gpu::kTileThreads, gpu::kTileShared<T>, p);
  return fault;
}
const char* smooth_weights_cuda(const LateInteractionGradientCuda& p, int64_t rows, int64_t columns, DType dtype,
                                void* stream) {
  if (dtype == DType::f32) return weights_as<float>(p, rows, columns, stream);
  if (dtype == DType::bf16) return weights_as<bf16_t>(p, rows, columns, stream);
  return weights_as<f16_t>(p, rows, columns, stream);
}

}  // namespace fastxattn
