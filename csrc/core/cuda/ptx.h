// The primitives of cuda_device.h as instructions. Include that header, not this one.
#pragma once

#include <type_traits>

#define FXA_DEVICE __device__ __forceinline__
#define FXA_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define FXA_PARAMS const __grid_constant__
#define FXA_UNROLL _Pragma("unroll")
#define FXA_NO_UNROLL _Pragma("unroll 1")
#define FXA_PRAGMA(text) _Pragma(#text)
#define FXA_UNROLL_BY(n) FXA_PRAGMA(unroll n)

namespace fastxattn::gpu {

inline constexpr unsigned kFullWarp = 0xffffffffu;

FXA_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
FXA_DEVICE int lane_index() { return static_cast<int>(threadIdx.x & 31u); }
FXA_DEVICE int warp_index() { return static_cast<int>(threadIdx.x >> 5); }
FXA_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
FXA_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
FXA_DEVICE int block_index_y() { return static_cast<int>(blockIdx.y); }
FXA_DEVICE int block_index_z() { return static_cast<int>(blockIdx.z); }
FXA_DEVICE int grid_blocks() { return static_cast<int>(gridDim.x); }
FXA_DEVICE int grid_blocks_y() { return static_cast<int>(gridDim.y); }
FXA_DEVICE int grid_blocks_z() { return static_cast<int>(gridDim.z); }

// Loads are not moved over this: what the compiler would fetch early, it would have to keep.
FXA_DEVICE void keep_order() { asm volatile("" ::: "memory"); }
FXA_DEVICE void sync_threads() { __syncthreads(); }
FXA_DEVICE bool sync_threads_or(bool value) { return __syncthreads_or(value) != 0; }
FXA_DEVICE int sync_threads_count(bool value) { return __syncthreads_count(value); }
FXA_DEVICE void sync_named(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
FXA_DEVICE void sync_warp() { __syncwarp(); }
FXA_DEVICE void thread_fence() { __threadfence(); }

template <class V>
FXA_DEVICE V shuffle(V v, int lane) {
  return __shfl_sync(kFullWarp, v, lane);
}
template <class V>
FXA_DEVICE V shuffle_xor(V v, int mask) {
  return __shfl_xor_sync(kFullWarp, v, mask);
}
template <class V>
FXA_DEVICE V shuffle_up(V v, int n) {
  return __shfl_up_sync(kFullWarp, v, static_cast<unsigned>(n));
}
template <class V>
FXA_DEVICE V shuffle_down(V v, int n) {
  return __shfl_down_sync(kFullWarp, v, static_cast<unsigned>(n));
}
FXA_DEVICE uint32_t ballot(bool v) { return __ballot_sync(kFullWarp, v); }
FXA_DEVICE bool any(bool v) { return __any_sync(kFullWarp, v) != 0; }
FXA_DEVICE bool all(bool v) { return __all_sync(kFullWarp, v) != 0; }
FXA_DEVICE int popcount(uint32_t v) { return __popc(v); }
FXA_DEVICE int count_leading_zeros(uint32_t v) { return __clz(static_cast<int>(v)); }
FXA_DEVICE int find_first(uint32_t v) { return __ffs(static_cast<int>(v)); }
FXA_DEVICE int find_first_64(uint64_t v) { return __ffsll(static_cast<long long>(v)); }

FXA_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
FXA_DEVICE float float_of(uint32_t x) { return __uint_as_float(x); }

// A view of shared memory as elements of V.
template <class V>
struct Shared {
  V* p;

  FXA_DEVICE V load(int i) const { return p[i]; }
  FXA_DEVICE void store(int i, V v) const { p[i] = v; }
  template <class U>
  FXA_DEVICE U load_as(int i) const {
    return *reinterpret_cast<const U*>(p + i);
  }
  template <class U>
  FXA_DEVICE void store_as(int i, U u) const {
    *reinterpret_cast<U*>(p + i) = u;
  }
  FXA_DEVICE Shared at(int i) const { return {p + i}; }
  template <class U>
  FXA_DEVICE Shared<U> as() const {
    return {reinterpret_cast<U*>(p)};
  }
  FXA_DEVICE uint32_t address() const { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
};

template <class V>
FXA_DEVICE Shared<V> shared_memory(int byte_offset) {
  extern __shared__ __align__(1024) unsigned char fxa_shared_memory[];
  return {reinterpret_cast<V*>(fxa_shared_memory + byte_offset)};
}

template <class V>
FXA_DEVICE V load_global(const V* p) {
  return *p;
}
template <class V>
FXA_DEVICE V load_global_fresh(const V* p) {
  return *const_cast<const volatile V*>(p);
}
template <class V>
FXA_DEVICE void store_global(V* p, std::type_identity_t<V> v) {
  *p = v;
}

template <class V>
FXA_DEVICE V atomic_add(V* p, std::type_identity_t<V> v) {
  return atomicAdd(p, v);
}
template <class V>
FXA_DEVICE V atomic_max(V* p, std::type_identity_t<V> v) {
  return atomicMax(p, v);
}
template <class V>
FXA_DEVICE V atomic_min(V* p, std::type_identity_t<V> v) {
  return atomicMin(p, v);
}
template <class V>
FXA_DEVICE V atomic_or(V* p, std::type_identity_t<V> v) {
  return atomicOr(p, v);
}
template <class V>
FXA_DEVICE V atomic_cas(V* p, std::type_identity_t<V> expected, std::type_identity_t<V> v) {
  return atomicCAS(p, expected, v);
}
template <class V>
FXA_DEVICE V atomic_add(Shared<V> s, int i, std::type_identity_t<V> v) {
  return atomicAdd(s.p + i, v);
}
template <class V>
FXA_DEVICE V atomic_max(Shared<V> s, int i, std::type_identity_t<V> v) {
  return atomicMax(s.p + i, v);
}
template <class V>
FXA_DEVICE V atomic_min(Shared<V> s, int i, std::type_identity_t<V> v) {
  return atomicMin(s.p + i, v);
}
template <class V>
FXA_DEVICE V atomic_or(Shared<V> s, int i, std::type_identity_t<V> v) {
  return atomicOr(s.p + i, v);
}
template <class V>
FXA_DEVICE V atomic_cas(Shared<V> s, int i, std::type_identity_t<V> expected, std::type_identity_t<V> v) {
  return atomicCAS(s.p + i, expected, v);
}

// Copies `Bytes` to shared memory; bytes from valid_bytes on become zero and are not read.
template <int Bytes, class V>
FXA_DEVICE void cp_async(Shared<V> to, const void* from, int valid_bytes = Bytes) {
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to.address()), "l"(from), "r"(valid_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to.address()), "l"(from), "n"(Bytes),
                 "r"(valid_bytes)
                 : "memory");
  }
}
FXA_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Newest>
FXA_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Newest) : "memory");
}

#define FXA_LDMATRIX(suffix, modifier)                                                          \
  template <class V>                                                                            \
  FXA_DEVICE void ldmatrix_x1##suffix(uint32_t (&r)[1], Shared<V> row) {                        \
    asm volatile("ldmatrix.sync.aligned.m8n8.x1" modifier ".shared.b16 {%0}, [%1];"             \
                 : "=r"(r[0])                                                                   \
                 : "r"(row.address())                                                           \
                 : "memory");                                                                   \
  }                                                                                             \
  template <class V>                                                                            \
  FXA_DEVICE void ldmatrix_x2##suffix(uint32_t (&r)[2], Shared<V> row) {                        \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2" modifier ".shared.b16 {%0, %1}, [%2];"         \
                 : "=r"(r[0]), "=r"(r[1])                                                       \
                 : "r"(row.address())                                                           \
                 : "memory");                                                                   \
  }                                                                                             \
  template <class V>                                                                            \
  FXA_DEVICE void ldmatrix_x4##suffix(uint32_t (&r)[4], Shared<V> row) {                        \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" modifier ".shared.b16 {%0, %1, %2, %3}, [%4];" \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                               \
                 : "r"(row.address())                                                           \
                 : "memory");                                                                   \
  }
FXA_LDMATRIX(, "")
FXA_LDMATRIX(_trans, ".trans")
#undef FXA_LDMATRIX

#define FXA_MMA(shape, types)                                                                                        \
  asm("mma.sync.aligned." shape ".row.col." types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                               \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

template <class T>
FXA_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
FXA_DEVICE void mma_m16n8k16<f16_t>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  FXA_MMA("m16n8k16", "f32.f16.f16.f32");
}
template <>
FXA_DEVICE void mma_m16n8k16<bf16_t>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  FXA_MMA("m16n8k16", "f32.bf16.bf16.f32");
}
FXA_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  FXA_MMA("m16n8k8", "f32.tf32.tf32.f32");
}
#undef FXA_MMA

FXA_DEVICE uint32_t to_tf32(float x) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
}

FXA_DEVICE float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FXA_DEVICE float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FXA_DEVICE float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FXA_DEVICE float accurate_log(float x) { return logf(x); }
FXA_DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
template <class V>
FXA_DEVICE V maximum(V a, V b) {
  return a > b ? a : b;
}
template <class V>
FXA_DEVICE V minimum(V a, V b) {
  return a < b ? a : b;
}
// A NaN operand loses.
FXA_DEVICE float maximum(float a, float b) { return fmaxf(a, b); }
FXA_DEVICE float minimum(float a, float b) { return fminf(a, b); }

FXA_DEVICE float to_float(float x) { return x; }
FXA_DEVICE float to_float(bf16_t x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
FXA_DEVICE float to_float(f16_t x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
template <class T>
FXA_DEVICE T from_float(float x);
template <>
FXA_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
FXA_DEVICE f16_t from_float<f16_t>(float x) {
  f16_t r;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r.bits) : "f"(x));
  return r;
}
template <>
FXA_DEVICE bf16_t from_float<bf16_t>(float x) {
  bf16_t r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(x));
  return r;
}
template <class T>
FXA_DEVICE uint32_t pack(float low, float high);
template <>
FXA_DEVICE uint32_t pack<f16_t>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <>
FXA_DEVICE uint32_t pack<bf16_t>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <class T>
FXA_DEVICE float unpack_low(uint32_t v) {
  return to_float(T{static_cast<uint16_t>(v & 0xffffu)});
}
template <class T>
FXA_DEVICE float unpack_high(uint32_t v) {
  return to_float(T{static_cast<uint16_t>(v >> 16)});
}

}  // namespace fastxattn::gpu
