// fastxattn::Attention for ONNX Runtime's CUDA provider, on the stream of the run. It compiles; it has not run.
#include <cuda_runtime_api.h>

#include "bindings/ort_attention.h"

namespace fastxattn::ort {
namespace {

constexpr int kThreads = 256;

__global__ void fill(float* data, int64_t n, float value) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < n) data[i] = value;
}

void check_cuda(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// Device memory for the length of a run, freed in stream order.
class Scratch {
 public:
  Scratch(size_t bytes, cudaStream_t stream) : stream_(stream) {
    if (bytes > 0) check_cuda(cudaMallocAsync(&data_, bytes, stream));
  }
  ~Scratch() {
    if (data_ != nullptr) cudaFreeAsync(data_, stream_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return data_; }

 private:
  cudaStream_t stream_;
  void* data_ = nullptr;
};

bool is_aligned(const void* data, int64_t width) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && width % 16 == 0;
}

bool rows_are_aligned(const AttentionParams& a) {
  const int64_t size = dtype_size(a.dtype);
  return is_aligned(a.query, a.head_dim * size) && is_aligned(a.key, a.head_dim * size) &&
         is_aligned(a.value, a.value_dim * size);
}

void compute(Call& call) {
  // The device's offsets and indices are not read here, which would wait for it: the kernels clamp them to the data.
  const AttentionParams a = attention_problem(call);
  AttentionKernelParams p = kernel_params(a, rows_are_aligned(a));
  void* handle = nullptr;
  check(call.node.api, call.node.api->gpu_stream(call.context, &handle));
  const auto stream = static_cast<cudaStream_t>(handle);
  p.out = call.output(0, {a.rows_q, a.heads, a.value_dim});
  const int64_t rows = a.rows_q * a.heads;
  void* lse = call.output(1, {a.heads, a.rows_q});
  const Scratch unread(lse == nullptr ? static_cast<size_t>(rows) * sizeof(float) : 0, stream);
  p.lse = static_cast<float*>(lse != nullptr ? lse : unread.data());
  if (rows == 0) return;
  // Rows that no slot stands for are left by the kernel.
  check_cuda(cudaMemsetAsync(p.out, 0, static_cast<size_t>(rows * a.value_dim * dtype_size(a.dtype)), stream));
  fill<<<static_cast<unsigned>((rows + kThreads - 1) / kThreads), kThreads, 0, stream>>>(p.lse, rows,
                                                                                         -__builtin_inff());
  check_cuda(cudaGetLastError());
  if (a.batch == 0 || a.rows_k == 0) return;
  const auto launch = a.dtype == DType::f32   ? attention_forward_f32
                      : a.dtype == DType::f16 ? attention_forward_f16
                                              : attention_forward_bf16;
  if (const char* fault = launch(p, false, stream)) throw std::runtime_error(fault);
}

}  // namespace

const Spec& attention_cuda_spec() {
  static const Spec spec = [] {
    Spec s = attention_spec();
    s.compute = compute;
    s.provider = "CUDAExecutionProvider";
    return s;
  }();
  return spec;
}

}  // namespace fastxattn::ort
