// What every <op>_cuda_torch.cpp needs beside torch_glue.h: the current stream, and checked pointers on one device.
#pragma once

#include <dlfcn.h>

#include <climits>

#include "bindings/torch_glue.h"

namespace fastxattn {

inline int32_t narrow(int64_t n, const char* name) {
  STD_TORCH_CHECK(n <= INT_MAX, "fastxattn: ", name, " must be below 2^31, got ", n);
  return static_cast<int32_t>(n);
}

// Asks libtorch_cuda, which is looked up by name: linked to it, this library could not be built or loaded where torch
// has no CUDA, and torch does not load it into the global scope that a weak symbol is looked for in.
inline void* stream_of(const Tensor& t) {
  using Current = int32_t(int32_t device, void** stream);
  static Current* const current = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr ? nullptr
                              : reinterpret_cast<Current*>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(current != nullptr, "fastxattn: this torch has no CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(current(t.get_device(), &stream) == 0, "fastxattn: no current CUDA stream");
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
