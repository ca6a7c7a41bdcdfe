// Kernels with planted faults, beside their sound twins: test_simt_runner.py expects each fault to be caught.
#include "simt/bind.h"

namespace fastxattn::simt {
namespace {

using namespace gpu;

// Reverses 128 floats through shared memory. `Fault` plants one.
enum class Reverse { sound, no_barrier, one_too_far, tail_in_shared, unwritten, divergent, left_early };

template <Reverse Fault>
FXA_KERNEL(128, 1)
reverse_kernel(const float* x, float* y, int n) {
  const Shared<float> tile = shared_memory<float>(0);
  const int i = thread_index();
  if (Fault == Reverse::left_early && i == 77) return;
  if (!(Fault == Reverse::unwritten && i == 5))
    tile.store(Fault == Reverse::tail_in_shared ? i + 1 : i, i < n ? load_global(x + i) : 0.0f);
  if (Fault == Reverse::divergent && i < 64) sync_threads_or(true);
  if (Fault != Reverse::no_barrier) sync_threads();
  const float v = tile.load(127 - i);
  if (i < (Fault == Reverse::one_too_far ? n + 1 : n)) store_global(y + i, v);
}

// Sums pairs of neighbours within a warp, twice: the second store races with the first loads without sync_warp.
template <bool Synced>
FXA_KERNEL(64, 1)
neighbours_kernel(float* y) {
  const Shared<float> tile = shared_memory<float>(0);
  const int i = thread_index();
  tile.store(i, static_cast<float>(i));
  sync_warp();
  const float v = tile.load(i ^ 1);
  if (Synced) sync_warp();
  tile.store(i, v);
  sync_warp();
  store_global(y + i, tile.load(i ^ 2));
}

// Two stages of cp.async. Waits = 0: sound; 1: the newest group is read before it is there; 2: no barrier after it.
template <int Fault>
FXA_KERNEL(32, 1)
copy_kernel(const float* x, float* y, int n) {
  const Shared<float> tile = shared_memory<float>(0);
  const int i = thread_index();
  for (int half = 0; half < 2; ++half) {
    const int first = half * 128 + i * 4;
    const int left = n - first < 0 ? 0 : n - first > 4 ? 4 : n - first;
    cp_async<16>(tile.at(first), x + (left > 0 ? first : 0), left * 4);
    cp_async_commit();
  }
  cp_async_wait<1>();
  sync_threads();
  for (int j = 0; j < 4; ++j) store_global(y + j * 32 + i, tile.load(j * 32 + i));
  cp_async_wait<Fault == 1 ? 1 : 0>();
  if (Fault != 2) sync_threads();
  for (int j = 4; j < 8; ++j) store_global(y + j * 32 + i, tile.load(j * 32 + i));
}

// All blocks add to one counter; Fault: with a plain store.
template <bool Atomic>
FXA_KERNEL(32, 1)
count_kernel(int* y) {
  if (Atomic) {
    atomic_add(y, 1);
  } else if (thread_index() == 0) {
    store_global(y, load_global(y) + 1);
  }
}

// A warp function in a branch that half of the warp takes.
FXA_KERNEL(32, 1) branch_kernel(int* y) {
  int v = lane_index();
  if (v < 16) v = shuffle_xor(v, 1);
  v += ballot(true) != 0 ? 1 : 0;
  store_global(y + lane_index(), v);
}

// C (16, 8) = A (16, K) B^T, B (8, K), rows of 16-bit elements; ldmatrix and mma against NumPy.
template <class T>
FXA_KERNEL(32, 1)
mma_kernel(const T* a, const T* b, float* c, int k) {
  const Shared<T> rows_a = shared_memory<T>(0), rows_b = shared_memory<T>(16 * k * 2);
  const int lane = lane_index();
  for (int i = lane; i < 16 * k; i += 32) rows_a.store(i, load_global(a + i));
  for (int i = lane; i < 8 * k; i += 32) rows_b.store(i, load_global(b + i));
  sync_warp();
  float d[4] = {0, 0, 0, 0};
  for (int first = 0; first < k; first += 16) {
    uint32_t fragment_a[4], fragment_b[2];
    ldmatrix_x4(fragment_a, rows_a.at(lane % 16 * k + first + lane / 16 * 8));
    ldmatrix_x2(fragment_b, rows_b.at(lane % 8 * k + first + lane / 8 % 2 * 8));
    mma_m16n8k16<T>(d, fragment_a, fragment_b);
  }
  for (int e = 0; e < 4; ++e) store_global(c + (lane / 4 + e / 2 * 8) * 8 + lane % 4 * 2 + e % 2, d[e]);
}

// A stride of `stride` floats between lanes, to see the conflicts counted.
FXA_KERNEL(32, 1) stride_kernel(float* y, int stride) {
  const Shared<float> tile = shared_memory<float>(0);
  const int i = thread_index();
  tile.store(i * stride, 1.0f);
  sync_warp();
  store_global(y + i, tile.load(i * stride));
}

FXA_SIMT_BIND(reverse) {
  Memory memory;
  const auto* in = a.input<float>(memory, "x");
  auto* out = a.output<float>(memory, "y");
  const int n = a.size("x");
  Runner runner(memory);
  const Launch launch{.threads = 128, .shared_bytes = 512, .order = static_cast<uint64_t>(a.integer("order", 0))};
  const std::string fault = a.text("fault");
  const auto run = [&](const char* name, auto kernel) {
    if (fault == name) runner.run("reverse", launch, [&] { kernel(in, out, n); });
  };
  run("sound", reverse_kernel<Reverse::sound>);
  run("no_barrier", reverse_kernel<Reverse::no_barrier>);
  run("one_too_far", reverse_kernel<Reverse::one_too_far>);
  run("tail_in_shared", reverse_kernel<Reverse::tail_in_shared>);
  run("unwritten", reverse_kernel<Reverse::unwritten>);
  run("divergent", reverse_kernel<Reverse::divergent>);
  run("left_early", reverse_kernel<Reverse::left_early>);
  return runner.statistics();
}

FXA_SIMT_BIND(neighbours) {
  Memory memory;
  auto* out = a.output<float>(memory, "y");
  const Launch launch{.threads = 64, .shared_bytes = 256, .order = static_cast<uint64_t>(a.integer("order", 0))};
  const auto kernel = a.integer("synced") != 0 ? neighbours_kernel<true> : neighbours_kernel<false>;
  Runner runner(memory);
  runner.run("neighbours", launch, [&] { kernel(out); });
  return runner.statistics();
}

FXA_SIMT_BIND(copy) {
  Memory memory;
  const auto* in = a.input<float>(memory, "x");
  auto* out = a.output<float>(memory, "y");
  const int n = a.size("x"), fault = a.integer("fault");
  const auto kernel = fault == 0 ? copy_kernel<0> : fault == 1 ? copy_kernel<1> : copy_kernel<2>;
  Runner runner(memory);
  runner.run("copy", {.threads = 32, .shared_bytes = 1024}, [&] { kernel(in, out, n); });
  return runner.statistics();
}

FXA_SIMT_BIND(count) {
  Memory memory;
  auto* out = a.output<int>(memory, "y", true);
  const auto kernel = a.integer("atomic") != 0 ? count_kernel<true> : count_kernel<false>;
  Runner runner(memory);
  runner.run("count", {.grid_x = 3, .threads = 32}, [&] { kernel(out); });
  return runner.statistics();
}

FXA_SIMT_BIND(branch) {
  Memory memory;
  auto* out = a.output<int>(memory, "y");
  Runner runner(memory);
  runner.run("branch", {.threads = 32}, [&] { branch_kernel(out); });
  return runner.statistics();
}

template <class T>
Statistics product(const Arguments& a) {
  Memory memory;
  const auto *in_a = a.input<T>(memory, "a"), *in_b = a.input<T>(memory, "b");
  auto* out = a.output<float>(memory, "c");
  const int k = a.size("a", 1);
  Runner runner(memory);
  runner.run("mma", {.threads = 32, .shared_bytes = static_cast<size_t>(24 * k * 2)},
             [&] { mma_kernel<T>(in_a, in_b, out, k); });
  return runner.statistics();
}
FXA_SIMT_BIND(mma_float16) { return product<f16_t>(a); }
FXA_SIMT_BIND(mma_bfloat16) { return product<bf16_t>(a); }

FXA_SIMT_BIND(stride) {
  Memory memory;
  auto* out = a.output<float>(memory, "y");
  const int stride = a.integer("stride");
  Runner runner(memory);
  runner.run("stride", {.threads = 32, .shared_bytes = static_cast<size_t>(128 * stride)},
             [&] { stride_kernel(out, stride); });
  return runner.statistics();
}

}  // namespace
}  // namespace fastxattn::simt
