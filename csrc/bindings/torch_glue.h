// What every <op>_torch.cpp needs from libtorch's stable ABI: the thread pool, dtypes, and checked views.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <new>
#include <optional>
#include <type_traits>

#include "core/cpu/parallel.h"
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

// An uninitialised contiguous CPU tensor, without the dispatcher: half a microsecond less than new_empty, whose failure
// does not say that memory ran out.
inline Tensor empty_cpu(std::initializer_list<int64_t> shape, ScalarType dtype) {
  constexpr size_t kMostAxes = 8;
  int64_t strides[kMostAxes];
  STD_TORCH_CHECK(shape.size() <= kMostAxes, "fastxattn: too many axes");
  int64_t stride = 1;
  bool fits = true;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    fits = fits && !__builtin_mul_overflow(stride, shape.begin()[i] > 1 ? shape.begin()[i] : 1, &stride);
  }
  AtenTensorHandle handle = nullptr;
  fits = fits && aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.begin(), strides,
                                          torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                                          aoti_torch_device_type_cpu(), 0, &handle) == AOTI_TORCH_SUCCESS;
  STD_TORCH_CHECK(fits, "fastxattn: out of memory for a result of ", stride, " elements");
  return Tensor(handle);
}

// A typed pointer to a contiguous 32-bit integer or float tensor, or null when absent.
template <class T>
inline const T* data_or_null(const OptionalTensor& t) {
  return t.has_value() ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

// What every CPU operator does around its function: memory that its typed pointers may read (a tensor over a buffer of
// bytes can start anywhere), and a message where memory runs out.
template <auto function>
struct Operator;
template <class Result, class... Arguments, Result (*function)(Arguments...)>
struct Operator<function> {
  static Result call(Arguments... arguments) {
    int64_t position = 0;
    (check_aligned(arguments, position++), ...);
    try {
      return function(static_cast<Arguments&&>(arguments)...);
    } catch (const std::bad_alloc&) {
      STD_TORCH_CHECK(false, "fastxattn: out of memory for the operator's temporary results");
    }
  }

 private:
  template <class T>
  static void check_aligned(const T& argument, int64_t position) {
    if constexpr (std::is_same_v<T, Tensor>) {
      const auto size = static_cast<uintptr_t>(argument.element_size());
      STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(argument.const_data_ptr()) % size == 0, "fastxattn: argument ",
                      position, " of the operator lies at an address that is no multiple of its element size, ", size,
                      "; clone it");
    } else if constexpr (std::is_same_v<T, OptionalTensor>) {
      if (argument.has_value()) check_aligned(*argument, position);
    }
  }
};

}  // namespace fastxattn

// The implementation of an operator for torch's CPU dispatch key.
#define FXA_OPERATOR(function) TORCH_BOX((&::fastxattn::Operator<function>::call))
