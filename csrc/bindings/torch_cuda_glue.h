// What every <op>_cuda_torch.cpp needs beside torch_glue.h: the current stream, and checked pointers on one device.
#pragma once

#include <climits>

#include "bindings/torch_glue.h"

// Lives in libtorch_cuda; absent where torch was built without CUDA, which can load this library all the same.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace fastxattn {

inline int32_t narrow(int64_t n, const char* name) {
  STD_TORCH_CHECK(n <= INT_MAX, "fastxattn: ", name, " must be below 2^31, got ", n);
  return static_cast<int32_t>(n);
}

inline void* stream_of(const Tensor& t) {
  STD_TORCH_CHECK(&aoti_torch_get_current_cuda_stream != nullptr, "fastxattn: this torch has no CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(t.get_device(), &stream) == 0,
                  "fastxattn: no current CUDA stream");
  return stream;
}

// The address of a contiguous tensor of `dtype` with at least `least` elements on the device of `beside`; null when
// absent.
template <class V>
inline V* plain_pointer(const OptionalTensor& t, const char* name, ScalarType dtype, const Tensor& beside,
                        int64_t least) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(t->is_cuda() && t->get_device() == beside.get_device(), "fastxattn: ", name,
                  " must be on the device of the other tensors");
  STD_TORCH_CHECK(t->scalar_type() == dtype, "fastxattn: ", name, " has the wrong dtype");
  STD_TORCH_CHECK(t->is_contiguous() && t->numel() >= least, "fastxattn: ", name, " must be contiguous with at least ",
                  least, " elements");
  return static_cast<V*>(const_cast<void*>(t->const_data_ptr()));
}

inline void check_launch(const char* fault) {
  STD_TORCH_CHECK(fault == nullptr, "fastxattn: a CUDA kernel could not be launched: ", fault);
}

}  // namespace fastxattn
