// Every hardware primitive that a CUDA kernel of this project uses, as small inline functions in namespace gpu.
//
// There are two implementations. nvcc gets the instructions themselves (cuda_ptx.h); any other compiler gets a runner
// that executes the same kernels on the CPU and checks them (tests/native/simt). This is the one place that knows:
// kernels contain no #ifdef and no inline assembly.
//
// How to write a kernel (<op>.cuh):
//   template <class T>
//   FXA_KERNEL(128, 2) scale_kernel(FXA_PARAMS ScaleParams p) {       // threads per block, least blocks per SM
//     gpu::Shared<float> tile = gpu::shared_memory<float>(0);         // at a byte offset of dynamic shared memory
//     const int i = gpu::block_index() * 128 + gpu::thread_index();
//     tile.store(gpu::thread_index(), i < p.n ? gpu::load_global(p.x + i) : 0.0f);
//     gpu::sync_threads();
//     ...
//   }
// Rules: memory is reached through load_global/store_global/atomics and Shared<T>, never by dereferencing; blocks are
// a multiple of 32 threads; warp functions (shuffles, votes, ldmatrix, mma) are called by all 32 lanes together.
// How to launch it: <op>_sm80.cu does so on a device, tests/native/simt/bind_<op>.cpp under the runner;
// tests/native/simt/README.md says how to write such a file and a test.
//
// Both implementations provide, in namespace fastxattn::gpu (T: float, f16_t or bf16_t where it says T):
//   thread_index() lane_index() warp_index() block_threads()
//   block_index() block_index_y() block_index_z() grid_blocks() grid_blocks_y() grid_blocks_z()
//   sync_threads()  sync_threads_or(bool)  sync_threads_count(bool)  sync_named(id, threads)  sync_warp()
//   thread_fence() shuffle(v, lane)  shuffle_xor(v, mask)  shuffle_up(v, n)  shuffle_down(v, n)        v: 32-bit int,
//   unsigned, float ballot(bool) any(bool) all(bool)    popcount(u32) count_leading_zeros(u32) find_first(u32)
//   (1-based, 0: none) Shared<V>: load(i) store(i, v) load_as<U>(i) store_as<U>(i, u) at(i) as<U>()
//   shared_memory<V>(byte_offset) load_global(p) load_global_fresh(p) store_global(p, v)    fresh: sees what other
//   blocks wrote (with thread_fence) atomic_add/atomic_max/atomic_min/atomic_or/atomic_cas on (Shared<V>, i, ...) and
//   on (V*, ...): return the old value cp_async<4|8|16>(Shared, const void*, valid_bytes)  cp_async_commit()
//   cp_async_wait<N>(): all but N newest groups ldmatrix_x1/x2/x4(regs, Shared row)  ldmatrix_x1/x2/x4_trans
//   mma_m16n8k16<T>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2])      d += a b; T: f16_t or bf16_t
//   mma_m16n8k8_tf32(d, a, b)   to_tf32(float) -> bits rounded to tf32
//   fast_exp2(x) fast_log2(x) fast_reciprocal(x): approximate instructions; accurate_log(x); fused(a, b, c) = a b + c,
//   rounded once; maximum(a, b) minimum(a, b) to_float(T) from_float<T>(float) pack<T>(lo, hi) -> u32,
//   unpack_low<T>(u32) unpack_high<T>(u32) bits_of(float) float_of(u32)
#pragma once

#include <cstdint>

#include "core/scalar.h"

namespace fastxattn::gpu {

// What one vector load or store moves.
struct alignas(16) U4 {
  uint32_t x, y, z, w;
};
struct alignas(8) U2 {
  uint32_t x, y;
};

}  // namespace fastxattn::gpu

#ifdef __CUDACC__
#include "core/cuda/ptx.h"
#else
#include "simt/device.h"
#endif
