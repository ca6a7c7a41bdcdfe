// Launches the attention kernels on a device; one attention_sm80_<dtype>.cu instantiates them per dtype.
#pragma once

#include <cuda_runtime.h>

#include <climits>

#include "attention/attention_select.cuh"

namespace fastxattn {

// Launches in order on one stream; after a failure nothing more is launched.
struct OnDevice {
  cudaStream_t stream;
  const char*& fault;

  template <class Kernel, class... Values>
  void operator()(Kernel kernel, int64_t blocks, int parts, int threads, int shared_bytes, const Values&... values) {
    if (fault != nullptr || blocks == 0) return;
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

template <class T>
const char* launch_forward(const AttentionKernelParams& p, void* stream) {
  const char* fault = nullptr;
  attention::run_forward<T>(p, OnDevice{static_cast<cudaStream_t>(stream), fault});
  return fault;
}
template <class T>
const char* launch_backward(const AttentionKernelParams& p, const AttentionKernelGradients& g, void* stream) {
  const char* fault = nullptr;
  attention::run_backward<T>(p, g, OnDevice{static_cast<cudaStream_t>(stream), fault});
  return fault;
}

// In the file of each dtype.
#define FXA_ATTENTION_SM80(name, T)                                                                        \
  const char* attention_forward_##name(const AttentionKernelParams& p, void* stream) {                     \
    return launch_forward<T>(p, stream);                                                                   \
  }                                                                                                        \
  const char* attention_backward_##name(const AttentionKernelParams& p, const AttentionKernelGradients& g, \
                                        void* stream) {                                                    \
    return launch_backward<T>(p, g, stream);                                                               \
  }

}  // namespace fastxattn
