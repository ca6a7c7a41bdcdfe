// Launches kernels on a device, in order on one stream; included by .cu files.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <cstdint>

namespace fastxattn {

// After a failure nothing more is launched, and `fault` says what went wrong.
struct OnDevice {
  cudaStream_t stream;
  const char*& fault;

  template <class Kernel, class... Values>
  void operator()(Kernel kernel, int64_t blocks, int parts, int threads, int shared_bytes, const Values&... values) {
    if (fault != nullptr || blocks == 0 || parts == 0) return;
    if (blocks > INT_MAX) {
      fault = "more tiles than a grid has blocks";
      return;
    }
    cudaError_t error = cudaSuccess;
    if (shared_bytes > 48 * 1024) {
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    }
    if (error == cudaSuccess) {
      const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(parts));
      kernel<<<grid, static_cast<unsigned>(threads), static_cast<size_t>(shared_bytes), stream>>>(values...);
      error = cudaGetLastError();
    }
    if (error != cudaSuccess) fault = cudaGetErrorString(error);
  }
};

}  // namespace fastxattn
