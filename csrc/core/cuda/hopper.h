// What compute capability 9.0 adds to cuda_device.h: transaction barriers, tile copies by the TMA unit and products by
// warp groups. As there, nvcc gets the instructions (cuda_hopper_ptx.h) and any other compiler the runner, which checks
// them (tests/native/simt/hopper.h). Kernels that include this are compiled for sm_90a alone (*_sm90_*.cu).
//
// In namespace fastxattn::gpu, beside what this file itself has:
//   mbarrier_init(b, arrivals)  fence_barriers(): before anybody else uses a new barrier, with a barrier after it
//   mbarrier_arrive(b)  mbarrier_arrive_after(b, x): not before x is computed, which the compiler may put off otherwise
//   mbarrier_arrive_expect(b, bytes)  mbarrier_wait(b, parity): until the phase of that parity is
//   over; before the first one, the phase of parity 1 counts as over                  b: Shared<uint64_t>, 8 bytes
//   TensorMap: rows in memory as the TMA unit sees them, made on the host from a RowsTile
//   tma_load(Shared, map, b, column, row, head): one thread copies a tile and counts its bytes at the barrier
//   fence_async(): what this thread wrote to shared memory may be read or overwritten by the TMA unit and by wgmma,
//   once a barrier has told them
//   Accumulator<N>, Fragments<K>: registers of a warp group that wgmma works on, as [block][element]
//   wgmma_fence(registers...): before products, when registers were touched since; wgmma_commit()
//   wgmma_wait<Newest>(registers...): all but so many groups are done, and those registers may be used
//   wgmma_rows<T>(d, a, b, add): d (64, N) (+)= A B^T, A and B descriptors of rows with the depth contiguous
//   wgmma_depth<T>(d, fragments, step, b): d (64, N) += A B, A in registers, B a descriptor of rows along the depth
//   registers_shrink<N>()  registers_grow<N>(): registers per thread of this warp group
#pragma once

#include "core/cuda/device.h"

namespace fastxattn::gpu {

// A (rows, heads, width) array of 16-bit elements, and the rows and columns that one copy brings. Columns and rows
// beyond the array become zeros. Rows start at multiples of 16 bytes.
struct RowsTile {
  const void* base;
  int64_t width, rows, heads;
  int64_t row_stride, head_stride;  // in elements; that of an axis of one element does not matter
  int tile_rows;                    // at most 256, and always kSwizzled columns
};

// Columns of a tile in shared memory: a row takes 128 bytes, in which pieces of 16 bytes change places by the row's
// number as tile_place<T, 64> of cuda_matrix.cuh has it. Wider operands are several such panels.
inline constexpr int kSwizzled = 64, kSwizzledBytes = 128;
// After so many rows the places repeat; tiles start at multiples of it.
inline constexpr int kSwizzleRows = 8, kSwizzleBytes = kSwizzleRows * kSwizzledBytes;

// How wgmma finds an operand: its address, the distance of panels, and that of groups of 8 rows.
FXA_DEVICE uint64_t matrix_descriptor(uint32_t address, int panel_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | static_cast<uint64_t>(kSwizzleBytes >> 4) << 32 | static_cast<uint64_t>(panel_bytes >> 4) << 16 |
         address >> 4;
}
FXA_DEVICE uint64_t moved(uint64_t descriptor, int bytes) { return descriptor + static_cast<uint64_t>(bytes >> 4); }

}  // namespace fastxattn::gpu

#ifdef __CUDACC__
#include "core/cuda/hopper_ptx.h"
#else
#include "simt/hopper.h"
#endif
