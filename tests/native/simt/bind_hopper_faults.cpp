// Kernels with TMA copies, mbarriers and wgmma with planted faults, beside their sound twins: test_simt_hopper.py
// expects each fault to be caught.
#include "core/cuda/hopper.h"
#include "core/cuda/matrix.cuh"
#include "simt/bind.h"

namespace fastxattn::simt {
namespace {

using namespace gpu;

// C (64, 64) = A B^T over `rounds` panels of both, which a second warp group fetches into one slot each; a third only
// leaves its registers.
enum class Rows {
  sound,
  no_full_wait,       // the product does not wait for the copies
  one_thread_waits,   // the others read what they have not waited for
  no_empty_wait,      // the next copies do not wait for the product
  early_release,      // the slot is given away before the product is done
  overwritten,        // a copy into what a product still reads
  expects_nothing,    // the phase ends before the copies have landed
  expects_too_much,   // the phase never ends
  unfenced_barriers,  // the TMA unit may not have seen the initialisation
  unordered_barriers,
  extra_arrival,
  no_commit,
  no_wgmma_wait,
  no_wgmma_fence,
  absent_warp,     // one warp does not take part in the product
  copy_left,       // the block ends with a copy in flight
  barrier_loaded,  // an mbarrier is read as data
  greedy,          // more registers than the others leave
};

template <class T, Rows Fault>
FXA_KERNEL(384, 1)
rows_kernel(FXA_PARAMS TensorMap map_a, FXA_PARAMS TensorMap map_b, float* c, int rounds) {
  const Shared<T> a = shared_memory<T>(0), b = shared_memory<T>(8192);
  const Shared<uint64_t> full = shared_memory<uint64_t>(16384), empty = full.at(1);
  if (thread_index() == 0) {
    mbarrier_init(full, 1);
    mbarrier_init(empty, 4);
    if (Fault != Rows::unfenced_barriers) fence_barriers();
  }
  if (Fault != Rows::unordered_barriers) sync_threads();
  if (warp_index() >= 4) {
    if (Fault != Rows::greedy) registers_shrink<24>();
    if (thread_index() != 128) return;
    for (int round = 0; round < rounds; ++round) {
      if (Fault != Rows::no_empty_wait) mbarrier_wait(empty, (round & 1) ^ 1);
      if (Fault == Rows::expects_nothing) {
        mbarrier_arrive(full);
      } else {
        mbarrier_arrive_expect(full, Fault == Rows::expects_too_much ? 16400 : 16384);
      }
      tma_load(a, map_a, full, round * kSwizzled, 0, 0);
      tma_load(b, map_b, full, round * kSwizzled, 0, 0);
    }
    return;
  }
  registers_grow<256>();
  Accumulator<64> d;
  for (int i = 0; i < 32; ++i) d[i / 4][i % 4] = 0.0f;
  for (int round = 0; round < rounds; ++round) {
    if (Fault != Rows::no_full_wait && (Fault != Rows::one_thread_waits || thread_index() == 0)) {
      mbarrier_wait(full, round & 1);
    }
    if (Fault == Rows::absent_warp && warp_index() == 3) continue;
    if (Fault != Rows::no_wgmma_fence) wgmma_fence(d);
    for (int step = 0; step < 4; ++step) {
      wgmma_rows<T>(d, moved(matrix_descriptor(a.address(), 16), 32 * step),
                    moved(matrix_descriptor(b.address(), 16), 32 * step), true);
    }
    if (Fault != Rows::no_commit) wgmma_commit();
    if (Fault == Rows::overwritten && thread_index() == 0) tma_load(b, map_b, full, 0, 0, 0);
    if (Fault == Rows::early_release && lane_index() == 0) mbarrier_arrive(empty);
    if (Fault != Rows::no_wgmma_wait) wgmma_wait<0>(d);
    if (Fault != Rows::early_release && lane_index() == 0) mbarrier_arrive(empty);
    if (Fault == Rows::extra_arrival && thread_index() == 0) {
      for (int i = 0; i < 4; ++i) mbarrier_arrive(full);
    }
  }
  if (Fault == Rows::copy_left && thread_index() == 0) tma_load(shared_memory<T>(17408), map_a, full, 0, 0, 0);
  if (Fault == Rows::barrier_loaded) d[0][0] += static_cast<float>(full.load(0));
  for (int i = 0; i < 32; ++i) {
    const int row = warp_index() * 16 + lane_index() / 4 + i % 4 / 2 * 8;
    store_global(c + row * 64 + i / 4 * 8 + lane_index() % 4 * 2 + i % 2, d[i / 4][i % 4]);
  }
}

// C (64, 128) = A B with A (64, 32) from registers, B's rows from one copy of two panels; rows from `left` on are
// cleared, as they are in a tile that reaches into the next sequence.
enum class Depth { sound, no_fence_async, no_barrier, touched_operand, unfenced_operand };

template <class T, Depth Fault>
FXA_KERNEL(128, 1)
depth_kernel(FXA_PARAMS TensorMap map, const T* a, float* c, int first, int left) {
  constexpr int kPanel = 32 * kSwizzled;
  const Shared<T> b = shared_memory<T>(0);
  const Shared<uint64_t> full = shared_memory<uint64_t>(4 * kPanel);
  if (thread_index() == 0) {
    mbarrier_init(full, 1);
    fence_barriers();
    mbarrier_arrive_expect(full, 4 * kPanel);
    for (int panel = 0; panel < 2; ++panel) tma_load(b.at(panel * kPanel), map, full, panel * kSwizzled, first, 1);
  }
  sync_threads();
  Accumulator<128> d;
  Fragments<32> fragments;
  for (int i = 0; i < 64; ++i) d[i / 4][i % 4] = 0.0f;
  for (int i = 0; i < 8; ++i) {
    const int row = warp_index() * 16 + lane_index() / 4 + i % 2 * 8;
    const int column = i / 4 * 16 + i % 4 / 2 * 8 + lane_index() % 4 * 2;
    fragments[i / 4][i % 4] = load_global(reinterpret_cast<const uint32_t*>(a + row * 32 + column));
  }
  mbarrier_wait(full, 0);
  for (int i = thread_index(); i < (32 - left) * 16; i += 128) {
    const int row = left + i / 16, panel = i / 8 % 2;
    b.template store_as<U4>(panel * kPanel + row * kSwizzled + i % 8 * 8, U4{0, 0, 0, 0});
  }
  if (Fault != Depth::no_fence_async) fence_async();
  if (Fault != Depth::no_barrier) sync_threads();
  wgmma_fence(d, fragments);
  if (Fault == Depth::unfenced_operand) fragments[0][0] = 0;
  for (int step = 0; step < 2; ++step) {
    wgmma_depth<T>(d, fragments, step, moved(matrix_descriptor(b.address(), 2 * kPanel), step * 16 * kSwizzledBytes));
  }
  wgmma_commit();
  if (Fault == Depth::touched_operand) fragments[1][0] = 0;
  wgmma_wait<0>(d, fragments);
  for (int i = 0; i < 64; ++i) {
    const int row = warp_index() * 16 + lane_index() / 4 + i % 4 / 2 * 8;
    store_global(c + row * 128 + i / 4 * 8 + lane_index() % 4 * 2 + i % 2, d[i / 4][i % 4]);
  }
}

template <class T>
TensorMap map_of(const Arguments& a, Memory& memory, const char* name, int tile_rows) {
  const Argument& array = a.get(name);
  return {a.input<T>(memory, name), array.shape[2],   array.shape[0], array.shape[1],
          array.strides[0],         array.strides[1], tile_rows};
}
uint64_t order_of(const Arguments& a) { return static_cast<uint64_t>(a.integer("order", 0)); }

template <class T, Rows Fault>
void run_rows(const char* name, const Arguments& a, Statistics& counts) {
  if (a.text("fault") != name) return;
  Memory memory;
  const TensorMap map_a = map_of<T>(a, memory, "a", 64), map_b = map_of<T>(a, memory, "b", 64);
  auto* c = a.output<float>(memory, "c");
  const int rounds = static_cast<int>((map_a.width + kSwizzled - 1) / kSwizzled);
  Runner runner(memory);
  runner.run("rows", {.threads = 384, .shared_bytes = 25600, .order = order_of(a)},
             [&] { rows_kernel<T, Fault>(map_a, map_b, c, rounds); });
  counts = runner.statistics();
}

template <class T, Depth Fault>
void run_depth(const char* name, const Arguments& a, Statistics& counts) {
  if (a.text("fault") != name) return;
  Memory memory;
  const TensorMap map = map_of<T>(a, memory, "b", 32);
  const auto* rows = a.input<T>(memory, "a");
  auto* c = a.output<float>(memory, "c");
  Runner runner(memory);
  runner.run("depth", {.threads = 128, .shared_bytes = 8200, .order = order_of(a)},
             [&] { depth_kernel<T, Fault>(map, rows, c, a.integer("first"), a.integer("left")); });
  counts = runner.statistics();
}

FXA_SIMT_BIND(wgmma_rows_bfloat16) {
  Statistics counts;
  run_rows<bf16_t, Rows::sound>("sound", a, counts);
  return counts;
}
FXA_SIMT_BIND(wgmma_rows_float16) {
  Statistics counts;
#define FXA_ROWS(name) run_rows<f16_t, Rows::name>(#name, a, counts)
  FXA_ROWS(sound), FXA_ROWS(no_full_wait), FXA_ROWS(one_thread_waits), FXA_ROWS(no_empty_wait);
  FXA_ROWS(early_release), FXA_ROWS(overwritten), FXA_ROWS(expects_nothing), FXA_ROWS(expects_too_much);
  FXA_ROWS(unfenced_barriers), FXA_ROWS(unordered_barriers), FXA_ROWS(extra_arrival), FXA_ROWS(no_commit);
  FXA_ROWS(no_wgmma_wait), FXA_ROWS(no_wgmma_fence), FXA_ROWS(absent_warp), FXA_ROWS(copy_left);
  FXA_ROWS(barrier_loaded), FXA_ROWS(greedy);
  return counts;
}
FXA_SIMT_BIND(wgmma_depth_bfloat16) {
  Statistics counts;
  run_depth<bf16_t, Depth::sound>("sound", a, counts);
  return counts;
}
FXA_SIMT_BIND(wgmma_depth_float16) {
  Statistics counts;
#define FXA_DEPTH(name) run_depth<f16_t, Depth::name>(#name, a, counts)
  FXA_DEPTH(sound), FXA_DEPTH(no_fence_async), FXA_DEPTH(no_barrier), FXA_DEPTH(touched_operand);
  FXA_DEPTH(unfenced_operand);
  return counts;
}

}  // namespace
}  // namespace fastxattn::simt
