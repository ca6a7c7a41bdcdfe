// Launches kernels that use the TMA unit: what cuda_launch.h does, and the maps they take; included by .cu files.
#pragma once

#include "core/cuda/hopper.h"
#include "core/cuda/launch.h"

namespace fastxattn {

// The driver's function is asked for at run time, so that the library loads where there is no driver.
inline auto find_tensor_map_encoder() -> decltype(&cuTensorMapEncodeTiled) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
  cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
  return result == cudaDriverEntryPointSuccess ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found) : nullptr;
}

struct OnHopper : OnDevice {
  gpu::TensorMap tensor_map(const gpu::RowsTile& tile) const {
    gpu::TensorMap map{};
    if (fault != nullptr) return map;
    static const auto encode = find_tensor_map_encoder();
    if (encode == nullptr) {
      fault = "the driver has no cuTensorMapEncodeTiled";
      return map;
    }
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(tile.width), static_cast<cuuint64_t>(tile.rows),
                                static_cast<cuuint64_t>(tile.heads)};
    // The driver checks the stride of an axis of one element too.
    const auto bytes = [](int64_t n, int64_t stride) { return n == 1 ? cuuint64_t{16} : cuuint64_t(2 * stride); };
    const cuuint64_t strides[] = {bytes(tile.rows, tile.row_stride), bytes(tile.heads, tile.head_stride)};
    const cuuint32_t box[] = {gpu::kSwizzled, static_cast<cuuint32_t>(tile.tile_rows), 1}, steps[] = {1, 1, 1};
    const CUresult error = encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, const_cast<void*>(tile.base), sizes, strides,
                                  box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (error != CUDA_SUCCESS) fault = "the driver refuses the layout of key or value (cuTensorMapEncodeTiled)";
    return map;
  }
};

}  // namespace fastxattn
