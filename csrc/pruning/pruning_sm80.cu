// Launches the pruning kernels on a device.
#include "core/cuda/launch.h"
#include "pruning/match.cuh"
#include "pruning/select.cuh"

namespace fastxattn::pruning {

const char* select_cuda(const SelectCuda& p, int shares, void* stream) {
  const char* fault = nullptr;
  OnDevice{static_cast<cudaStream_t>(stream), fault}(gpu::select_kernel, int64_t{p.batch} + 1, shares, kSelectThreads,
                                                     kSelectShared, p);
  return fault;
}

template <class T>
static const char* match_as(const MatchCuda& p, int shares, void* stream) {
  const char* fault = nullptr;
  OnDevice{static_cast<cudaStream_t>(stream), fault}(gpu::match_kernel<T>, p.match.batch, shares, gpu::kTileThreads,
                                                     gpu::kTileShared<T> + 4 * gpu::kTileRows * 4, p);
  return fault;
}
const char* match_cuda(const MatchCuda& p, int shares, void* stream) {
  if (p.match.dtype == DType::f32) return match_as<float>(p, shares, stream);
  if (p.match.dtype == DType::bf16) return match_as<bf16_t>(p, shares, stream);
  return match_as<f16_t>(p, shares, stream);
}

template <class T>
static const char* merge_as(const MergeCuda& p, int64_t rows, void* stream) {
  const char* fault = nullptr;
  const auto parts = static_cast<int>((p.channels + kMergeColumns - 1) / kMergeColumns);
  OnDevice{static_cast<cudaStream_t>(stream), fault}(gpu::merge_kernel<T>, rows, parts, kMergeThreads, 0, p);
  return fault;
}
const char* merge_cuda(const MergeCuda& p, int64_t rows, DType dtype, void* stream) {
  if (dtype == DType::f32) return merge_as<float>(p, rows, stream);
  if (dtype == DType::bf16) return merge_as<bf16_t>(p, rows, stream);
  return merge_as<f16_t>(p, rows, stream);
}

}  // namespace fastxattn::pruning
