// What every <op>_torch.cpp needs from libtorch's stable ABI: the thread pool, dtypes, and checked views.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <new>
#include <optional>
#include <type_traits>

#include "core/arguments.h"
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

inline ElementType element_type(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return ElementType::f32;
    case ScalarType::BFloat16: return ElementType::bf16;
    case ScalarType::Half: return ElementType::f16;
    case ScalarType::Double: return ElementType::f64;
    case ScalarType::Int: return ElementType::i32;
    case ScalarType::Long: return ElementType::i64;
    case ScalarType::Bool: return ElementType::boolean;
    default: return ElementType::other;
  }
}

// Fills in the view of a tensor, which must be on the device of `query`.
inline void read_view(View& view, const Tensor& t, const char* name, const Tensor& query) {
  view.name = name;
  view.present = true;
  const bool cpu = t.is_cpu();
  require(cpu == query.is_cpu() && (cpu || t.get_device() == query.get_device()), name,
          " must be on the device of query");
  const auto sizes = t.sizes(), strides = t.strides();
  view.rank = static_cast<int>(sizes.size());
  require(view.rank <= View::kMaxRank, name, " has too many axes: ", view.rank);
  for (int i = 0; i < view.rank; ++i) view.size[i] = sizes[i], view.stride[i] = strides[i];
  view.type = element_type(t.scalar_type());
  view.data = t.const_data_ptr();
}
inline void read_view(View& view, const OptionalTensor& t, const char* name, const Tensor& query) {
  view.name = name;
  if (t.has_value()) read_view(view, *t, name, query);
}
template <class T>
View view_of(const T& t, const char* name, const Tensor& query) {
  View view;
  read_view(view, t, name, query);
  return view;
}

// Runs `read`; an argument that it refuses becomes torch's error, in the name of the operation.
template <class F>
auto reading(const char* operation, F&& read) {
  try {
    return read();
  } catch (const BadArgument& error) {
    STD_TORCH_CHECK(false, "fastxattn::", operation, ": ", error.what());
  }
}

// Parameters of torch's functions, schemas and views from a list of arguments X(presence, kind, name) or, of numbers,
// X(name, default): see attention/attention_arguments.h.
#define FXA_TORCH_required Tensor
#define FXA_TORCH_optional OptionalTensor
#define FXA_PARAMETER(presence, kind, name) , FXA_TORCH_##presence name
#define FXA_NUMBER_PARAMETER(name, otherwise) , double name
#define FXA_SCHEMA_required ", Tensor "
#define FXA_SCHEMA_optional ", Tensor? "
#define FXA_SCHEMA(presence, kind, name) FXA_SCHEMA_##presence #name
#define FXA_NUMBER_SCHEMA(name, otherwise) ", float " #name
#define FXA_READ_VIEW(presence, kind, name) read_view(arguments.name, name, #name, query);
#define FXA_READ_NUMBER(name, otherwise) arguments.name = name;

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
