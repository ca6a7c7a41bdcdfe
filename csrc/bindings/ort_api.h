// The part of ONNX Runtime's C ABI that the operator library uses, declared here: nothing is vendored or linked.
//
// The ABI is a table of function pointers that only ever grows at its end, so a function is known by its place in
// the table. Places are those of API version 17 (ONNX Runtime 1.17); the runtime is asked for that version when the
// library is registered and answers null when it is older. Calls return null on success, else a status to release.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastxattn::ort {

inline constexpr uint32_t kApiVersion = 17;
inline constexpr uint32_t kShapeReferenceVersion = 24;  // from here on a shape can be read without an allocation

// Opaque objects of the runtime.
struct Status;
struct Value;
struct ShapeInfo;
struct KernelInfo;
struct KernelContext;
struct SessionOptions;
struct OpDomain;
struct ShapeInferContext;

enum class ErrorCode : int { fail = 1, invalid_argument = 2, runtime_exception = 6, not_implemented = 9 };
enum class RuntimeType : int { undefined = 0, f32 = 1, u8 = 2, i32 = 6, i64 = 7, boolean = 9, f16 = 10, bf16 = 16 };
enum class Presence : int { required = 0, optional = 1, variadic = 2 };

// The table. Every member is one entry of it, called by its place.
struct Api {
  Status* create_status(ErrorCode code, const char* message) const {
    return entry<Status*(ErrorCode, const char*)>(0)(code, message);
  }
  Status* add_custom_op_domain(SessionOptions* options, OpDomain* domain) const {
    return entry<Status*(SessionOptions*, OpDomain*)>(28)(options, domain);
  }
  Status* create_custom_op_domain(const char* name, OpDomain** out) const {
    return entry<Status*(const char*, OpDomain**)>(26)(name, out);
  }
  Status* custom_op_domain_add(OpDomain* domain, const void* op) const {
    return entry<Status*(OpDomain*, const void*)>(27)(domain, op);
  }
  Status* is_tensor(const Value* value, int* out) const { return entry<Status*(const Value*, int*)>(50)(value, out); }
  Status* tensor_data(Value* value, void** out) const { return entry<Status*(Value*, void**)>(51)(value, out); }
  Status* shape_element_type(const ShapeInfo* info, RuntimeType* out) const {
    return entry<Status*(const ShapeInfo*, RuntimeType*)>(60)(info, out);
  }
  Status* shape_rank(const ShapeInfo* info, size_t* out) const {
    return entry<Status*(const ShapeInfo*, size_t*)>(61)(info, out);
  }
  Status* shape_sizes(const ShapeInfo* info, int64_t* out, size_t rank) const {
    return entry<Status*(const ShapeInfo*, int64_t*, size_t)>(62)(info, out, rank);
  }
  Status* tensor_shape(const Value* value, ShapeInfo** out) const {
    return entry<Status*(const Value*, ShapeInfo**)>(65)(value, out);
  }
  Status* attribute(const KernelInfo* info, const char* name, float* out) const {
    return entry<Status*(const KernelInfo*, const char*, float*)>(85)(info, name, out);
  }
  Status* attribute(const KernelInfo* info, const char* name, int64_t* out) const {
    return entry<Status*(const KernelInfo*, const char*, int64_t*)>(86)(info, name, out);
  }
  Status* input(const KernelContext* context, size_t index, const Value** out) const {
    return entry<Status*(const KernelContext*, size_t, const Value**)>(90)(context, index, out);
  }
  Status* output(KernelContext* context, size_t index, const int64_t* sizes, size_t rank, Value** out) const {
    return entry<Status*(KernelContext*, size_t, const int64_t*, size_t, Value**)>(91)(context, index, sizes, rank,
                                                                                       out);
  }
  void release_status(Status* status) const { entry<void(Status*)>(93)(status); }
  void release_shape(ShapeInfo* info) const { entry<void(ShapeInfo*)>(99)(info); }
  Status* gpu_stream(const KernelContext* context, void** out) const {
    return entry<Status*(const KernelContext*, void**)>(193)(context, out);
  }
  Status* input_count(const KernelInfo* info, size_t* out) const {
    return entry<Status*(const KernelInfo*, size_t*)>(230)(info, out);
  }
  Status* output_count(const KernelInfo* info, size_t* out) const {
    return entry<Status*(const KernelInfo*, size_t*)>(231)(info, out);
  }
  // The value of an input that is a constant of the graph; null where it is not.
  Status* constant_input(const KernelInfo* info, size_t index, int* constant, const Value** out) const {
    return entry<Status*(const KernelInfo*, size_t, int*, const Value**)>(249)(info, index, constant, out);
  }
  // Runs call(data, i) for i in [0, total) on the session's intra-op pool.
  Status* parallel_for(const KernelContext* context, void (*call)(void*, size_t), size_t total, size_t batches,
                       void* data) const {
    return entry<Status*(const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>(274)(
        context, call, total, batches, data);
  }
  // Version 24: borrows the shape instead of copying it.
  Status* shape_reference(const Value* value, RuntimeType* type, const int64_t** sizes, size_t* rank) const {
    return entry<Status*(const Value*, RuntimeType*, const int64_t**, size_t*)>(414)(value, type, sizes, rank);
  }

 private:
  template <class F>
  F* entry(int place) const {
    return reinterpret_cast<F*>(reinterpret_cast<void* const*>(this)[place]);
  }
};

struct ApiBase {
  const Api* (*get_api)(uint32_t version);
  const char* (*version_string)();
};

// An operator as the runtime sees it: its description and callbacks. Members up to `end_version` exist in version 17.
struct CustomOp {
  uint32_t version;
  void* (*create_kernel)(const CustomOp*, const Api*, const KernelInfo*);
  const char* (*name)(const CustomOp*);
  const char* (*execution_provider)(const CustomOp*);  // null: CPU
  RuntimeType (*input_type)(const CustomOp*, size_t);
  size_t (*input_count)(const CustomOp*);
  RuntimeType (*output_type)(const CustomOp*, size_t);
  size_t (*output_count)(const CustomOp*);
  void (*compute)(void*, KernelContext*);
  void (*destroy)(void*);
  Presence (*input_presence)(const CustomOp*, size_t);
  Presence (*output_presence)(const CustomOp*, size_t);
  int (*input_memory)(const CustomOp*, size_t);  // 0: the provider's own, -2: host
  int (*variadic_input_minimum)(const CustomOp*);
  int (*variadic_input_homogeneous)(const CustomOp*);
  int (*variadic_output_minimum)(const CustomOp*);
  int (*variadic_output_homogeneous)(const CustomOp*);
  Status* (*create_kernel_checked)(const CustomOp*, const Api*, const KernelInfo*, void** kernel);
  Status* (*compute_checked)(void* kernel, KernelContext*);
  Status* (*infer_shape)(const CustomOp*, ShapeInferContext*);
  int (*start_version)(const CustomOp*);
  int (*end_version)(const CustomOp*);
  // Later members (in-place maps) are read by newer runtimes only from operators that declare a newer version; they
  // are here, null, so that reading them is safe all the same.
  void* unused[4];
};

}  // namespace fastxattn::ort
