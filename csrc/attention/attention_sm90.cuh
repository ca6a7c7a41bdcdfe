// Launches the attention kernel for compute capability 9.0; one attention_sm90_<dtype>.cu instantiates it per dtype.
#pragma once

#include "attention/attention_wgmma.cuh"
#include "core/cuda/tensor_map.h"

namespace fastxattn {

inline bool is_hopper() {
  int device = 0, major = 0, minor = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess && major == 9 &&
         minor == 0;
}

// In the file of each dtype. False, and nothing is launched, where the device or the problem is for another kernel.
#define FXA_ATTENTION_SM90(name, T)                                                                      \
  bool attention_forward_sm90_##name(const AttentionKernelParams& p, void* stream, const char*& fault) { \
    if (!attention::fits_wgmma<T>(p) || !is_hopper()) return false;                                      \
    attention::run_forward_wgmma<T>(p, OnHopper{{static_cast<cudaStream_t>(stream), fault}});            \
    return true;                                                                                         \
  }

}  // namespace fastxattn
