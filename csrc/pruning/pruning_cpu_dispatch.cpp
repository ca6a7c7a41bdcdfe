// Hands out the work of each pruning kernel to threads and gives it scratch memory.
#include <memory>
#include <vector>

#include "core/cpu/isa.h"
#include "pruning/pruning.h"

namespace fastxattn {

using namespace pruning;

FXA_CPU_KERNEL(void, pruning_select, (const SelectParams&, int64_t, uint32_t*, uint8_t*))
FXA_CPU_KERNEL(void, pruning_quantile, (const QuantileParams&, int64_t, uint32_t*, uint8_t*))
FXA_CPU_KERNEL(void, pruning_gather, (const GatherParams&, int64_t, int64_t))
FXA_CPU_KERNEL(void, pruning_merge, (const MergeParams&, const int32_t*, const int32_t*, int64_t, int64_t))
FXA_CPU_KERNEL(void, pruning_pack, (const void*, DType, const int32_t*, int64_t, int64_t, float*, uint8_t*))
FXA_CPU_KERNEL(void, pruning_match,
               (const MatchParams&, int64_t, int64_t, int64_t, int64_t, const float*, const uint8_t*, float*, float*))
FXA_CPU_KERNEL(void, pruning_gram, (const GreedyScratch&, int64_t, int64_t, int64_t, int64_t))
FXA_CPU_KERNEL(void, pruning_greedy, (const GreedyParams&, int64_t, const GreedyScratch&, float*))

namespace pruning {
namespace {

template <class T>
std::unique_ptr<T[]> scratch(int64_t n) {
  return std::unique_ptr<T[]>(new T[static_cast<size_t>(n > 0 ? n : 1)]);  // left uninitialised
}

int64_t longest(const int32_t* cu, int64_t batch) {
  int64_t most = 0;
  for (int64_t b = 0; b < batch; ++b) most = cu[b + 1] - cu[b] > most ? cu[b + 1] - cu[b] : most;
  return most;
}

constexpr int64_t kRowsPerTask = 64;

// Fewer sequences than this share their inner loops among threads; more are handed out whole.
constexpr int64_t kWholeSequences = 4;

}  // namespace

void select(const SelectParams& p, int64_t batch, const Parallel& parallel) {
  const auto kernel = pruning_select_for(active_isa());
  const int64_t n = longest(p.cu, batch);
  const auto keys = scratch<uint32_t>(n * parallel.workers);
  const auto state = scratch<uint8_t>(n * parallel.workers);
  for_each_task(parallel, batch,
                [&](int64_t b, int64_t worker) { kernel(p, b, keys.get() + worker * n, state.get() + worker * n); });
}

void quantile(const QuantileParams& p, const Parallel& parallel) {
  const auto kernel = pruning_quantile_for(active_isa());
  const int64_t n = longest(p.cu, p.batch);
  const auto keys = scratch<uint32_t>(n * parallel.workers);
  const auto state = scratch<uint8_t>(n * parallel.workers);
  for_each_task(parallel, p.batch,
                [&](int64_t b, int64_t worker) { kernel(p, b, keys.get() + worker * n, state.get() + worker * n); });
}

void gather(const GatherParams& p, const Parallel& parallel) {
  const auto kernel = pruning_gather_for(active_isa());
  for_each_task(parallel, (p.rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task, int64_t) {
    const int64_t begin = task * kRowsPerTask, end = begin + kRowsPerTask;
    kernel(p, begin, end < p.rows ? end : p.rows);
  });
}

void merge(const MergeParams& p, const Parallel& parallel) {
  const auto kernel = pruning_merge_for(active_isa());
  std::vector<int32_t> first(static_cast<size_t>(p.rows), -1);
  const auto next = scratch<int32_t>(p.total);
  for (int64_t i = p.total - 1; i >= 0; --i) {
    const int32_t a = p.assignment[i];
    if (a < 0) continue;
    next[static_cast<size_t>(i)] = first[static_cast<size_t>(a)];
    first[static_cast<size_t>(a)] = static_cast<int32_t>(i);
  }
  for_each_task(parallel, (p.rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task, int64_t) {
    const int64_t begin = task * kRowsPerTask, end = begin + kRowsPerTask;
    kernel(p, first.data(), next.get(), begin, end < p.rows ? end : p.rows);
  });
}

void match(const MatchParams& p, const Parallel& parallel) {
  const auto pack = pruning_pack_for(active_isa());
  const auto kernel = pruning_match_for(active_isa());
  const int64_t panel = kPanel * p.channels;
  const int64_t most = panels(longest(p.cu_b, p.batch));
  const bool whole = p.batch >= kWholeSequences;
  const int64_t copies = whole ? parallel.workers : 1;
  const auto b_memory = scratch<float>(copies * most * panel);
  const auto b_finite = scratch<uint8_t>(copies * most * kPanel);
  const auto a_memory = scratch<float>(parallel.workers * panel);
  const auto tiles = scratch<float>(parallel.workers * kPanel * kPanel);
  const Parallel none{};

  // One sequence with its B in copy `copy` of the scratch; `inner` shares its panels among threads.
  const auto sequence = [&](int64_t s, int64_t copy, int64_t home, const Parallel& inner) {
    float* b_panels = b_memory.get() + copy * most * panel;
    uint8_t* finite = b_finite.get() + copy * most * kPanel;
    const int64_t b0 = p.cu_b[s], nb = p.cu_b[s + 1] - b0, a0 = p.cu_a[s], na = p.cu_a[s + 1] - a0;
    if (na == 0) return;
    for_each_task(inner, panels(nb), [&](int64_t j, int64_t) {
      const int64_t rows = nb - j * kPanel < kPanel ? nb - j * kPanel : kPanel;
      pack(p.x, p.dtype, p.b_index + b0 + j * kPanel, rows, p.channels, b_panels + j * panel, finite + j * kPanel);
    });
    for_each_task(inner, panels(na), [&](int64_t i, int64_t inner_worker) {
      const int64_t worker = home + inner_worker;
      const int64_t begin = a0 + i * kPanel, end = begin + kPanel < a0 + na ? begin + kPanel : a0 + na;
      kernel(p, begin, end, b0, b0 + nb, b_panels, finite, a_memory.get() + worker * panel,
             tiles.get() + worker * kPanel * kPanel);
    });
  };
  if (whole) {
    for_each_task(parallel, p.batch, [&](int64_t s, int64_t worker) { sequence(s, worker, worker, none); });
  } else {
    for (int64_t s = 0; s < p.batch; ++s) sequence(s, 0, 0, parallel);
  }
}

void greedy(const GreedyParams& p, const Parallel& parallel) {
  const auto pack = pruning_pack_for(active_isa());
  const auto gram = pruning_gram_for(active_isa());
  const auto search = pruning_greedy_for(active_isa());
  const int64_t longest_n = longest(p.cu, p.batch);
  const int64_t padded = panels(longest_n) * kPanel;
  int64_t picks = 0;
  for (int64_t b = 0; b < p.batch && p.mode == GreedyMode::determinant; ++b)
    picks = picks_of(p, b) > picks ? picks_of(p, b) : picks;
  // Shorter sequences may store their matrix even where the longest does not.
  const int64_t stored = longest_n <= kStoredGram ? padded : panels(kStoredGram) * kPanel;
  const int64_t matrix = stored * stored > kPanel * padded ? stored * stored : kPanel * padded;
  struct Memory {
    std::unique_ptr<float[]> floats;
    std::unique_ptr<uint8_t[]> finite;
  };
  const bool whole = p.batch >= kWholeSequences;
  std::vector<Memory> memory(static_cast<size_t>(whole ? parallel.workers : 1));

  // One sequence in its worker's memory; `inner` shares the packing and the similarities among threads.
  const auto sequence = [&](int64_t b, int64_t worker, const Parallel& inner) {
    const int64_t begin = p.cu[b], n = p.cu[b + 1] - begin;
    for (int64_t i = 0; i < n; ++i) p.scores[begin + i] = -__builtin_inff();
    if (picks_of(p, b) == 0) return;
    Memory& mine = memory[static_cast<size_t>(worker)];
    if (!mine.floats) {
      mine.floats = scratch<float>(padded * p.channels + matrix + padded * (3 + picks));
      mine.finite = scratch<uint8_t>(padded);
    }
    GreedyScratch s;
    s.panel_memory = mine.floats.get();
    s.gram = s.panel_memory + padded * p.channels;
    s.value = s.gram + matrix;
    s.row = s.value + padded;
    float* quality = s.row + padded;
    s.factors = quality + padded;
    s.finite = mine.finite.get();
    const int64_t count = panels(n);
    for_each_task(inner, count, [&](int64_t i, int64_t) {
      const int64_t first = i * kPanel, rows = n - first < kPanel ? n - first : kPanel;
      const char* x = static_cast<const char*>(p.x) + (begin + first) * p.channels * dtype_size(p.dtype);
      pack(x, p.dtype, nullptr, rows, p.channels, s.panel_memory + first * p.channels, s.finite + first);
    });
    if (n <= kStoredGram) {
      for_each_task(inner, count * count, [&](int64_t tile, int64_t) {
        if (tile % count >= tile / count) gram(s, tile / count, tile % count, count * kPanel, p.channels);
      });
    }
    search(p, b, s, quality);
  };
  if (whole) {
    for_each_task(parallel, p.batch, [&](int64_t b, int64_t worker) { sequence(b, worker, Parallel{}); });
  } else {
    for (int64_t b = 0; b < p.batch; ++b) sequence(b, 0, parallel);
  }
}

}  // namespace pruning
}  // namespace fastxattn
