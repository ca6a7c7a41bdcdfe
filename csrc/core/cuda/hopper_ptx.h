// The primitives of cuda_hopper.h as instructions. Include that header, not this one.
#pragma once

#include <cuda.h>

namespace fastxattn::gpu {

FXA_DEVICE void mbarrier_init(Shared<uint64_t> b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(b.address()), "r"(arrivals) : "memory");
}
FXA_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
FXA_DEVICE void fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  fence_async();
}
FXA_DEVICE void mbarrier_arrive(Shared<uint64_t> b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(b.address()) : "memory");
}
FXA_DEVICE void mbarrier_arrive_after(Shared<uint64_t> b, float x) {
  asm volatile(
      "{\n.reg .pred done;\nsetp.ne.u32 done, %1, 0x7fbadbad;\n@done mbarrier.arrive.shared::cta.b64 _, [%0];\n}" ::"r"(
          b.address()),
      "r"(bits_of(x))
      : "memory");
}
FXA_DEVICE void mbarrier_arrive_expect(Shared<uint64_t> b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(b.address()), "r"(bytes) : "memory");
}
FXA_DEVICE void mbarrier_wait(Shared<uint64_t> b, int parity) {
  uint32_t over;
  do {
    asm volatile(
        "{\n.reg .pred over;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
        "selp.u32 %0, 1, 0, over;\n}"
        : "=r"(over)
        : "r"(b.address()), "r"(parity)
        : "memory");
  } while (over == 0);
}

using TensorMap = CUtensorMap;

template <class T>
FXA_DEVICE void tma_load(Shared<T> to, const TensorMap& map, Shared<uint64_t> b, int column, int row, int head) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(to.address()),
      "l"(&map), "r"(b.address()), "r"(column), "r"(row), "r"(head)
      : "memory");
}

template <int N>
FXA_DEVICE void registers_shrink() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
FXA_DEVICE void registers_grow() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// The compiler takes the results of an asynchronous product for there at once: hold() keeps it from moving uses of the
// registers over a fence or a wait.
template <class V, int N>
struct WgmmaRegisters {
  V v[N][4];

  FXA_DEVICE V (&operator[](int i))[4] { return v[i]; }
  FXA_DEVICE V (&all()) [N][4] { return v; } FXA_DEVICE void hold() {
    FXA_UNROLL
    for (int i = 0; i < N * 4; ++i) {
      if constexpr (std::is_same_v<V, float>) {
        asm volatile("" : "+f"(v[i / 4][i % 4])::"memory");
      } else {
        asm volatile("" : "+r"(v[i / 4][i % 4])::"memory");
      }
    }
  }
};
template <int Columns>
using Accumulator = WgmmaRegisters<float, Columns / 8>;
template <int Depth>
using Fragments = WgmmaRegisters<uint32_t, Depth / 16>;

template <class... Registers>
FXA_DEVICE void wgmma_fence(Registers&... registers) {
  (registers.hold(), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
FXA_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Newest, class... Registers>
FXA_DEVICE void wgmma_wait(Registers&... registers) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Newest) : "memory");
  (registers.hold(), ...);
}

#define FXA_BLOCK(i) "+f"(d.v[i][0]), "+f"(d.v[i][1]), "+f"(d.v[i][2]), "+f"(d.v[i][3])
#define FXA_BLOCKS_8(i)                                                                                   \
  FXA_BLOCK(i), FXA_BLOCK(i + 1), FXA_BLOCK(i + 2), FXA_BLOCK(i + 3), FXA_BLOCK(i + 4), FXA_BLOCK(i + 5), \
      FXA_BLOCK(i + 6), FXA_BLOCK(i + 7)
#define FXA_RESULTS_64 FXA_BLOCKS_8(0)
#define FXA_RESULTS_128 FXA_BLOCKS_8(0), FXA_BLOCKS_8(8)
#define FXA_NAMES_64                                                       \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FXA_NAMES_128                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// Of m64 x columns x k16: `operands` names A, B and the predicate's number, `inputs` are their values.
#define FXA_WGMMA(columns, types, operands, predicate, majors, ...)                                                 \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " predicate ", 0;\nwgmma.mma_async.sync.aligned.m64n" #columns \
               "k16.f32." types " {" FXA_NAMES_##columns "}, " operands ", add, 1, 1, " majors ";\n}"               \
               : FXA_RESULTS_##columns                                                                              \
               : __VA_ARGS__)
#define FXA_WGMMA_ROWS(columns, types, a, b, p) \
  FXA_WGMMA(columns, types, a ", " b, p, "0, 0", "l"(desc_a), "l"(desc_b), "r"(static_cast<int>(add)))
#define FXA_WGMMA_DEPTH(columns, types, a0, a1, a2, a3, b, p)                                                \
  FXA_WGMMA(columns, types, "{" a0 ", " a1 ", " a2 ", " a3 "}, " b, p, "1", "r"(a[0]), "r"(a[1]), "r"(a[2]), \
            "r"(a[3]), "l"(desc_b), "r"(1))

template <class T, int Blocks>
FXA_DEVICE void wgmma_rows(WgmmaRegisters<float, Blocks>& d, uint64_t desc_a, uint64_t desc_b, bool add) {
  static_assert(Blocks == 8 || Blocks == 16);
  if constexpr (Blocks == 8) {
    if constexpr (std::is_same_v<T, f16_t>) {
      FXA_WGMMA_ROWS(64, "f16.f16", "%32", "%33", "%34");
    } else {
      FXA_WGMMA_ROWS(64, "bf16.bf16", "%32", "%33", "%34");
    }
  } else if constexpr (std::is_same_v<T, f16_t>) {
    FXA_WGMMA_ROWS(128, "f16.f16", "%64", "%65", "%66");
  } else {
    FXA_WGMMA_ROWS(128, "bf16.bf16", "%64", "%65", "%66");
  }
}

template <class T, int Blocks, int Steps>
FXA_DEVICE void wgmma_depth(WgmmaRegisters<float, Blocks>& d, WgmmaRegisters<uint32_t, Steps>& fragments, int step,
                            uint64_t desc_b) {
  static_assert(Blocks == 8 || Blocks == 16);
  const uint32_t (&a)[4] = fragments.v[step];
  if constexpr (Blocks == 8) {
    if constexpr (std::is_same_v<T, f16_t>) {
      FXA_WGMMA_DEPTH(64, "f16.f16", "%32", "%33", "%34", "%35", "%36", "%37");
    } else {
      FXA_WGMMA_DEPTH(64, "bf16.bf16", "%32", "%33", "%34", "%35", "%36", "%37");
    }
  } else if constexpr (std::is_same_v<T, f16_t>) {
    FXA_WGMMA_DEPTH(128, "f16.f16", "%64", "%65", "%66", "%67", "%68", "%69");
  } else {
    FXA_WGMMA_DEPTH(128, "bf16.bf16", "%64", "%65", "%66", "%67", "%68", "%69");
  }
}
#undef FXA_WGMMA_DEPTH
#undef FXA_WGMMA_ROWS
#undef FXA_WGMMA
#undef FXA_NAMES_128
#undef FXA_NAMES_64
#undef FXA_RESULTS_128
#undef FXA_RESULTS_64
#undef FXA_BLOCKS_8
#undef FXA_BLOCK

}  // namespace fastxattn::gpu
