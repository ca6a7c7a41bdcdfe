// What every <op>_torch.cpp needs from libtorch's stable ABI: the thread pool, dtypes, and checked views.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>

#include "core/parallel.h"
#include "core/scalar.h"

namespace fastxattn {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

// torch's intra-op pool. Its parallel_for hands a range to each thread; a grain of 1 gives one worker each.
inline Parallel torch_parallel() {
  Parallel parallel;
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  parallel.workers = threads;
  parallel.run = [](void*, int64_t workers, Parallel::Body body, void* context) {
    torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) body(worker, context);
    });
  };
  return parallel;
}

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: break;
  }
  STD_TORCH_CHECK(false, "fastxattn: ", name, " must be float32, bfloat16 or float16 for the cpu backend");
  return DType::f32;
}

// An uninitialised contiguous CPU tensor, without the dispatcher: half a microsecond less than new_empty.
inline Tensor empty_cpu(std::initializer_list<int64_t> shape, ScalarType dtype) {
  constexpr size_t kMostAxes = 8;
  int64_t strides[kMostAxes];
  STD_TORCH_CHECK(shape.size() <= kMostAxes, "fastxattn: too many axes");
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= shape.begin()[i] > 1 ? shape.begin()[i] : 1;
  }
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.begin(), strides,
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                               aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// A typed pointer to a contiguous 32-bit integer or float tensor, or null when absent.
template <class T>
inline const T* data_or_null(const OptionalTensor& t) {
  return t.has_value() ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

}  // namespace fastxattn
