// The primitives of core/cuda/hopper.h on the CPU, each checked by the runner. Include that header, not this one.
#pragma once

#include "simt/runner.h"

namespace fastxattn::gpu {

inline void mbarrier_init(Shared<uint64_t> b, int arrivals) { Runner::current().mbarrier_init(b.offset, arrivals); }
inline void fence_async() { Runner::current().fence_async(); }
inline void fence_barriers() { fence_async(); }
inline void mbarrier_arrive(Shared<uint64_t> b) { Runner::current().mbarrier_arrive(b.offset, 0); }
inline void mbarrier_arrive_after(Shared<uint64_t> b, float) { mbarrier_arrive(b); }
inline void mbarrier_arrive_expect(Shared<uint64_t> b, int bytes) {
  Runner::current().mbarrier_arrive(b.offset, bytes);
}
inline void mbarrier_wait(Shared<uint64_t> b, int parity) {
  Runner::current().mbarrier_wait(b.offset, static_cast<uint32_t>(parity));
}

using TensorMap = RowsTile;

template <class T>
void tma_load(Shared<T> to, const TensorMap& map, Shared<uint64_t> b, int column, int row, int head) {
  static_assert(sizeof(T) == 2);
  Runner& r = Runner::current();
  std::vector<char> data(static_cast<size_t>(map.tile_rows) * kSwizzledBytes, 0);
  for (int i = 0; i < map.tile_rows; ++i) {
    if (row + i < 0 || row + i >= map.rows || head < 0 || head >= map.heads) continue;
    const T* from = static_cast<const T*>(map.base) + (row + i) * map.row_stride + head * map.head_stride;
    for (int j = 0; j < kSwizzled && column + j < map.width; j += 8) {
      const int elements = static_cast<int>(minimum<int64_t>(8, map.width - column - j));
      r.memory().check_load(from + column + j, static_cast<size_t>(elements) * 2, false);
      std::memcpy(data.data() + i * kSwizzledBytes + (j / 8 ^ i % kSwizzleRows) * 16, from + column + j,
                  static_cast<size_t>(elements) * 2);
    }
  }
  r.copy_bulk(to.offset, b.offset, std::move(data));
}

namespace detail {

// What a lane brings to wgmma; matrix.cpp has the operation.
struct Wgmma {
  int columns;
  simt::AsyncRegisters* d;
  simt::AsyncRegisters* fragments;  // null: A is in shared memory
  int step;
  uint64_t a, b;
  bool add;
};
template <class T, bool Depth>
void wgmma(int warp, void** lanes);

template <int Registers, bool Grow>
void set_registers(int warp, void**) {
  Runner::current().set_registers(warp / 4, Registers, Grow);
}

}  // namespace detail

template <int N>
void registers_shrink() {
  Runner::current().warp_operation("registers_shrink", &detail::set_registers<N, false>, nullptr, true);
}
template <int N>
void registers_grow() {
  Runner::current().warp_operation("registers_grow", &detail::set_registers<N, true>, nullptr, true);
}

template <class V, int N>
class WgmmaRegisters {
 public:
  WgmmaRegisters() {
    std::memset(v_, 0xff, sizeof(v_));
    state.visible = reinterpret_cast<char*>(v_);
    state.results = std::is_same_v<V, float> ? reinterpret_cast<char*>(results_) : nullptr;
    state.bytes = sizeof(v_);
    Runner::current().use_registers(state);
  }
  WgmmaRegisters(const WgmmaRegisters&) = delete;
  WgmmaRegisters& operator=(const WgmmaRegisters&) = delete;
  ~WgmmaRegisters() { Runner::current().drop_registers(state); }

  V (&operator[](int i))[4] {
    Runner::current().use_registers(state);
    return v_[i];
  }
  V(&all())
  [N][4] {
    Runner::current().use_registers(state);
    return v_;
  }

  simt::AsyncRegisters state;

 private:
  V v_[N][4], results_[N][4];
};
template <int Columns>
using Accumulator = WgmmaRegisters<float, Columns / 8>;
template <int Depth>
using Fragments = WgmmaRegisters<uint32_t, Depth / 16>;

template <class... Registers>
void wgmma_fence(Registers&...) {
  Runner::current().warp_operation(
      "wgmma_fence", [](int warp, void**) { Runner::current().wgmma_fence(warp); }, nullptr);
}
inline void wgmma_commit() {
  Runner::current().warp_operation(
      "wgmma_commit", [](int warp, void**) { Runner::current().wgmma_commit(warp); }, nullptr);
}
template <int Newest, class... Registers>
void wgmma_wait(Registers&...) {
  Runner::current().warp_operation(
      "wgmma_wait", [](int warp, void**) { Runner::current().wgmma_wait(warp, Newest); }, nullptr);
}

template <class T, int Blocks>
void wgmma_rows(WgmmaRegisters<float, Blocks>& d, uint64_t a, uint64_t b, bool add) {
  Runner::current().busy_registers(d.state);
  detail::Wgmma operands{Blocks * 8, &d.state, nullptr, 0, a, b, add};
  Runner::current().warp_operation("wgmma_rows", &detail::wgmma<T, false>, &operands, true);
}
template <class T, int Blocks, int Steps>
void wgmma_depth(WgmmaRegisters<float, Blocks>& d, WgmmaRegisters<uint32_t, Steps>& fragments, int step, uint64_t b) {
  Runner::current().busy_registers(d.state);
  Runner::current().busy_registers(fragments.state);
  detail::Wgmma operands{Blocks * 8, &d.state, &fragments.state, step, 0, b, true};
  Runner::current().warp_operation("wgmma_depth", &detail::wgmma<T, true>, &operands, true);
}

}  // namespace fastxattn::gpu
