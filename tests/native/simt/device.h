// The primitives of core/cuda/device.h on the CPU, each checked by the runner. Include that header, not this one.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "core/scalar.h"
#include "simt/runner.h"

#define FXA_DEVICE inline
#define FXA_KERNEL(threads, blocks) inline void
#define FXA_PARAMS const
#define FXA_UNROLL
#define FXA_NO_UNROLL
#define FXA_UNROLL_BY(n)

namespace fastxattn::gpu {

using simt::Runner;

inline int thread_index() { return Runner::current().thread(); }
inline int lane_index() { return thread_index() & 31; }
inline int warp_index() { return thread_index() >> 5; }
inline int block_threads() { return Runner::current().launch().threads; }
inline int block_index() { return Runner::current().block(0); }
inline int block_index_y() { return Runner::current().block(1); }
inline int block_index_z() { return Runner::current().block(2); }
inline int grid_blocks() { return Runner::current().launch().grid_x; }
inline int grid_blocks_y() { return Runner::current().launch().grid_y; }
inline int grid_blocks_z() { return Runner::current().launch().grid_z; }

inline void keep_order() {}
inline void sync_threads() { Runner::current().barrier("sync_threads", 0, block_threads(), false); }
inline bool sync_threads_or(bool value) {
  return Runner::current().barrier("sync_threads_or", 0, block_threads(), value) != 0;
}
inline int sync_threads_count(bool value) {
  return Runner::current().barrier("sync_threads_count", 0, block_threads(), value);
}
inline void sync_named(int id, int threads) { Runner::current().barrier("sync_named", id, threads, false); }
inline void sync_warp() {
  Runner::current().warp_operation("sync_warp", [](int, void**) { Runner::current().order_warp(); }, nullptr);
}
inline void thread_fence() {}

namespace detail {

template <class V>
struct Shuffle {
  V in, out;
  int from;
};

template <class V>
V shuffle_from(const char* name, V v, int from) {
  static_assert(sizeof(V) == 4, "shuffles move 32 bits");
  Shuffle<V> s{v, v, from};
  Runner::current().warp_operation(
      name,
      [](int, void** lanes) {
        for (int i = 0; i < 32; ++i) {
          auto* mine = static_cast<Shuffle<V>*>(lanes[i]);
          mine->out = static_cast<Shuffle<V>*>(lanes[mine->from])->in;
        }
      },
      &s);
  return s.out;
}

struct Vote {
  bool in;
  uint32_t out;
};

// One operation for all votes would let `any` meet `all` unnoticed: each has its own.
template <int Kind>
uint32_t vote(const char* name, bool v) {
  Vote b{v, 0};
  Runner::current().warp_operation(
      name,
      [](int, void** lanes) {
        uint32_t bits = 0;
        for (int i = 0; i < 32; ++i) bits |= static_cast<Vote*>(lanes[i])->in ? 1u << i : 0u;
        for (int i = 0; i < 32; ++i) static_cast<Vote*>(lanes[i])->out = bits;
      },
      &b);
  return b.out;
}

}  // namespace detail

template <class V>
V shuffle(V v, int lane) {
  return detail::shuffle_from("shuffle", v, lane & 31);
}
template <class V>
V shuffle_xor(V v, int mask) {
  return detail::shuffle_from("shuffle_xor", v, (lane_index() ^ mask) & 31);
}
template <class V>
V shuffle_up(V v, int n) {
  const int from = lane_index() - n;
  return detail::shuffle_from("shuffle_up", v, from < 0 ? lane_index() : from);
}
template <class V>
V shuffle_down(V v, int n) {
  const int from = lane_index() + n;
  return detail::shuffle_from("shuffle_down", v, from > 31 ? lane_index() : from);
}
inline uint32_t ballot(bool v) { return detail::vote<0>("ballot", v); }
inline bool any(bool v) { return detail::vote<1>("any", v) != 0; }
inline bool all(bool v) { return detail::vote<2>("all", v) == 0xffffffffu; }
inline int popcount(uint32_t v) { return std::popcount(v); }
inline int count_leading_zeros(uint32_t v) { return std::countl_zero(v); }
inline int find_first(uint32_t v) { return v == 0 ? 0 : std::countr_zero(v) + 1; }
inline int find_first_64(uint64_t v) { return v == 0 ? 0 : std::countr_zero(v) + 1; }

inline uint32_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }
inline float float_of(uint32_t x) { return std::bit_cast<float>(x); }

template <class V>
struct Shared {
  uint32_t offset;  // bytes from the start of the block's shared memory

  V load(int i) const { return load_as<V>(i); }
  void store(int i, V v) const { store_as<V>(i, v); }
  template <class U>
  U load_as(int i) const {
    U u;
    Runner& r = Runner::current();
    std::memcpy(&u, r.shared_load(place(i), sizeof(U), r.thread(), &r.counts().load), sizeof(U));
    return u;
  }
  template <class U>
  void store_as(int i, U u) const {
    Runner& r = Runner::current();
    std::memcpy(r.shared_store(place(i), sizeof(U), &r.counts().store), &u, sizeof(U));
  }
  uint32_t address() const { return offset; }
  Shared at(int i) const { return {place(i)}; }
  template <class U>
  Shared<U> as() const {
    return {offset};
  }
  // A negative place wraps around and is out of bounds.
  uint32_t place(int i) const { return offset + static_cast<uint32_t>(i) * static_cast<uint32_t>(sizeof(V)); }
};

template <class V>
Shared<V> shared_memory(int byte_offset) {
  return {static_cast<uint32_t>(byte_offset)};
}

template <class V>
V load_global(const V* p) {
  Runner::current().memory().check_load(p, sizeof(V), false);
  return *p;
}
template <class V>
V load_global_fresh(const V* p) {
  Runner::current().memory().check_load(p, sizeof(V), true);
  return *p;
}
template <class V>
void store_global(V* p, std::type_identity_t<V> v) {
  Runner::current().memory().check_store(p, sizeof(V));
  *p = v;
}

namespace detail {

template <class V>
V* atomic_place(V* p) {
  Runner::current().memory().check_atomic(p, sizeof(V));
  return p;
}
template <class V>
V* atomic_place(Shared<V> s, int i) {
  return reinterpret_cast<V*>(Runner::current().shared_atomic(s.place(i), sizeof(V)));
}
template <class V, class F>
V exchange(V* p, F next) {
  const V old = *p;
  *p = next(old);
  return old;
}

}  // namespace detail

#define FXA_ATOMIC(name, expression)                                                        \
  template <class V>                                                                        \
  V name(V* p, std::type_identity_t<V> v) {                                                 \
    return detail::exchange(detail::atomic_place(p), [&](V old) { return expression; });    \
  }                                                                                         \
  template <class V>                                                                        \
  V name(Shared<V> s, int i, std::type_identity_t<V> v) {                                   \
    return detail::exchange(detail::atomic_place(s, i), [&](V old) { return expression; }); \
  }
FXA_ATOMIC(atomic_add, static_cast<V>(old + v))
FXA_ATOMIC(atomic_max, old > v ? old : v)
FXA_ATOMIC(atomic_min, old < v ? old : v)
FXA_ATOMIC(atomic_or, old | v)
#undef FXA_ATOMIC
template <class V>
V atomic_cas(V* p, std::type_identity_t<V> expected, std::type_identity_t<V> v) {
  return detail::exchange(detail::atomic_place(p), [&](V old) { return old == expected ? v : old; });
}
template <class V>
V atomic_cas(Shared<V> s, int i, std::type_identity_t<V> expected, std::type_identity_t<V> v) {
  return detail::exchange(detail::atomic_place(s, i), [&](V old) { return old == expected ? v : old; });
}

template <int Bytes, class V>
void cp_async(Shared<V> to, const void* from, int valid_bytes = Bytes) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  Runner::current().copy_async(to.offset, from, Bytes, static_cast<uint32_t>(valid_bytes));
}
inline void cp_async_commit() { Runner::current().commit_copies(); }
template <int Newest>
void cp_async_wait() {
  Runner::current().wait_copies(Newest);
}

namespace detail {

// What a lane brings to ldmatrix and mma; matrix.cpp has the operations.
struct MatrixLoad {
  uint32_t row;
  uint32_t* out;
};
struct Mma {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};
template <int Count, bool Transposed>
void ldmatrix(int warp, void** lanes);
template <class T>
void mma_m16n8k16(int warp, void** lanes);
void mma_m16n8k8_tf32(int warp, void** lanes);

}  // namespace detail

#define FXA_LDMATRIX(count)                                                                                \
  template <class V>                                                                                       \
  void ldmatrix_x##count(uint32_t (&r)[count], Shared<V> row) {                                            \
    detail::MatrixLoad load{row.offset, r};                                                                \
    Runner::current().warp_operation("ldmatrix_x" #count, &detail::ldmatrix<count, false>, &load);         \
  }                                                                                                        \
  template <class V>                                                                                       \
  void ldmatrix_x##count##_trans(uint32_t (&r)[count], Shared<V> row) {                                    \
    detail::MatrixLoad load{row.offset, r};                                                                \
    Runner::current().warp_operation("ldmatrix_x" #count "_trans", &detail::ldmatrix<count, true>, &load); \
  }
FXA_LDMATRIX(1)
FXA_LDMATRIX(2)
FXA_LDMATRIX(4)
#undef FXA_LDMATRIX

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  detail::Mma operands{d, a, b};
  Runner::current().warp_operation("mma_m16n8k16", &detail::mma_m16n8k16<T>, &operands);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  detail::Mma operands{d, a, b};
  Runner::current().warp_operation("mma_m16n8k8_tf32", &detail::mma_m16n8k8_tf32, &operands);
}

// Rounds to nearest, ties away from zero, as cvt.rna does.
inline uint32_t to_tf32(float x) {
  const uint32_t u = bits_of(x);
  if ((u & 0x7f800000u) == 0x7f800000u) return u & 0x7fffffu ? 0x7fffe000u : u;
  return (u + 0x1000u) & 0xffffe000u;
}

namespace detail {
// The approximate instructions flush subnormals.
inline float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
}  // namespace detail

inline float fast_exp2(float x) { return detail::flush(std::exp2(detail::flush(x))); }
inline float fast_log2(float x) { return std::log2(detail::flush(x)); }
inline float fast_reciprocal(float x) { return detail::flush(1.0f / detail::flush(x)); }
inline float accurate_log(float x) { return std::log(x); }
inline float fused(float a, float b, float c) { return std::fma(a, b, c); }
template <class V>
V maximum(V a, V b) {
  return a > b ? a : b;
}
template <class V>
V minimum(V a, V b) {
  return a < b ? a : b;
}
inline float maximum(float a, float b) { return std::fmax(a, b); }
inline float minimum(float a, float b) { return std::fmin(a, b); }

template <class T>
float to_float(T x) {
  return fastxattn::to_f32(x);
}
template <class T>
T from_float(float x) {
  return fastxattn::from_f32<T>(x);
}
template <class T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}
template <class T>
float unpack_low(uint32_t v) {
  return to_float(T{static_cast<uint16_t>(v & 0xffffu)});
}
template <class T>
float unpack_high(uint32_t v) {
  return to_float(T{static_cast<uint16_t>(v >> 16)});
}

}  // namespace fastxattn::gpu
