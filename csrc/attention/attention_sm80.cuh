// Launches the attention kernels on a device; one attention_sm80_<dtype>.cu instantiates them per dtype.
#pragma once

#include "attention/attention_select.cuh"
#include "core/cuda/launch.h"

namespace fastxattn {

template <class T>
const char* launch_forward(const AttentionKernelParams& p, bool few, void* stream) {
  const char* fault = nullptr;
  attention::run_forward<T>(p, few, OnDevice{static_cast<cudaStream_t>(stream), fault});
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
  const char* attention_forward_##name(const AttentionKernelParams& p, bool few, void* stream) {           \
    return launch_forward<T>(p, few, stream);                                                              \
  }                                                                                                        \
  const char* attention_backward_##name(const AttentionKernelParams& p, const AttentionKernelGradients& g, \
                                        void* stream) {                                                    \
    return launch_backward<T>(p, g, stream);                                                               \
  }

}  // namespace fastxattn
