// Launches the late-interaction kernel on a device.
#include "core/cuda_launch.h"
#include "late_interaction/late_interaction.cuh"

namespace fastxattn {

template <class T>
static const char* maxsim_as(const LateInteractionCuda& p, void* stream) {
  const char* fault = nullptr;
  OnDevice{static_cast<cudaStream_t>(stream), fault}(gpu::maxsim_kernel<T>, int64_t{p.a.sets} * p.b.sets, 1,
                                                     gpu::kTileThreads, gpu::kTileShared<T> + kMaxSimShared, p);
  return fault;
}
const char* maxsim_cuda(const LateInteractionCuda& p, DType dtype, void* stream) {
  if (dtype == DType::f32) return maxsim_as<float>(p, stream);
  if (dtype == DType::bf16) return maxsim_as<bf16_t>(p, stream);
  return maxsim_as<f16_t>(p, stream);
}

}  // namespace fastxattn
