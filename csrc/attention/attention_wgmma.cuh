// Attention forward for compute capability 9.0 (after Shah et al., FlashAttention-3, 2024): one warp fetches tiles of
// keys and values with the TMA unit, warp groups multiply them with wgmma, 64 rows each.
//
// Tiles pass through one ring of slots in the order of their use: K0, K1, V0, K2, V1, ..., Vn. Each slot has a barrier
// that says it is full and one that says every warp is done with it, and these are all the synchronisation there is.
// While a warp group turns the scores of a tile into weights, the tensor cores multiply its weights of the tile before.
//
// Keys are walked from the last tile to the first, so that the only tile that may reach beyond the sequence comes
// before the loop: its scores are masked and its foreign rows of V, which may hold NaN, are cleared in place.
#pragma once

#include "attention/attention_tiles.cuh"
#include "core/cuda/hopper.h"

namespace fastxattn::attention {

// Shared memory: queries (by warp group), then the slots, each in panels of kSwizzled columns, then the barriers.
template <int D, int Rows, int Keys>
struct WgmmaTile {
  static constexpr int kGroups = Rows / 64;  // that multiply; one more fetches
  static constexpr int kThreads = (kGroups + 1) * 128;
  static constexpr int kSlots = 4;
  static constexpr int kSlot = Keys * D;  // elements
  static constexpr int kBarriers = 2 * (Rows * D + kSlots * kSlot);
  static constexpr int kSharedBytes = kBarriers + 2 * kSlots * 8;
};

// Where a warp is in the ring: slots are filled and emptied in turn, and each turn flips the parity of their barriers.
template <int Slots>
struct RingPlace {
  int slot = 0, parity = 0;
  FXA_DEVICE void advance() {
    if (++slot == Slots) slot = 0, parity ^= 1;
  }
};

// A problem's keys and values as the TMA unit sees them.
struct KeyMaps {
  TensorMap key, value;
};

// Grid: (tile_count(slots_q, batch, group, Rows) * kv_heads). Leaves sequences of at most kFewRows and those whose keys
// are cut to attention_fwd.cuh. Scaled: scales_scores.
template <class T, int D, int Rows, int Keys, bool Scaled>
FXA_KERNEL((WgmmaTile<D, Rows, Keys>::kThreads), 1)
attention_forward_wgmma_kernel(FXA_PARAMS AttentionKernelParams p, FXA_PARAMS KeyMaps maps) {
  using Tile = WgmmaTile<D, Rows, Keys>;
  constexpr int kPanels = D / kSwizzled, kPanel = Keys * kSwizzled;
  const int kv_head = block_index() % p.kv_heads;
  const TileOf tile = find_sequence(p.cu_q, p.batch, block_index() / p.kv_heads, p.group, Rows);
  const Span mine = find_span(p.cu_q, p.used_q, p.slots_q, tile.sequence);
  const Span theirs = find_span(p.cu_k, p.used_k, p.slots_k, tile.sequence);
  const int all_rows = mine.count * p.group, first_row = tile.number * Rows, rows = minimum(all_rows - first_row, Rows);
  if (tile.number < 0 || rows <= 0 || all_rows <= kFewRows || is_cut(p, all_rows, theirs.count)) return;
  const int tiles = (theirs.count + Keys - 1) / Keys, groups = (rows + 63) / 64;

  const Shared<T> ring = shared_memory<T>(2 * Rows * D);
  const Shared<uint64_t> full = shared_memory<uint64_t>(Tile::kBarriers), empty = full.at(Tile::kSlots);
  if (thread_index() == 0) {
    for (int slot = 0; slot < Tile::kSlots; ++slot) {
      mbarrier_init(full.at(slot), 1);
      mbarrier_init(empty.at(slot), 4 * groups);  // a warp arrives as one
    }
    fence_barriers();
  }
  sync_threads();
  RingPlace<Tile::kSlots> place;

  const int group = warp_index() / 4;
  if (group == Tile::kGroups) {
    registers_shrink<24>();
    if (thread_index() != Tile::kGroups * 128) return;
    const auto fetch = [&](const TensorMap& map, int number) {
      mbarrier_wait(empty.at(place.slot), place.parity ^ 1);
      mbarrier_arrive_expect(full.at(place.slot), Tile::kSlot * 2);
      for (int panel = 0; panel < kPanels; ++panel) {
        tma_load(ring.at(place.slot * Tile::kSlot + panel * kPanel), map, full.at(place.slot), panel * kSwizzled,
                 theirs.first + (tiles - 1 - number) * Keys, kv_head);
      }
      place.advance();
    };
    for (int i = 0; i < tiles + 1; ++i) {
      if (i < tiles) fetch(maps.key, i);
      if (i > 0) fetch(maps.value, i - 1);
    }
    return;
  }
  registers_grow<240>();
  if (group >= groups) return;

  // A row of the block is a (query, head) pair, as in attention_fwd.cuh.
  const int group_row = group * 64;
  const auto query_row = [&](int i) { return find_row(p.index_q, mine.first + (first_row + i) / p.group, p.rows_q); };
  const auto head_of = [&](int i) { return kv_head * p.group + (first_row + i) % p.group; };
  const Shared<T> queries = shared_memory<T>(2 * group_row * D);
  FXA_UNROLL
  for (int i = 0; i < D / 16; ++i) {
    const int piece = i * 128 + thread_index() % 128, row = piece / (D / 8), column = piece % (D / 8) * 8;
    const bool there = group_row + row < rows && column < p.head_dim;
    const int from = there ? group_row + row : 0;
    const T* source = static_cast<const T*>(p.query) + query_row(from) * p.query_row + head_of(from) * p.query_head;
    const int panel = column / kSwizzled * 64 * kSwizzled;
    cp_async<16>(queries.at(panel + tile_place<T, kSwizzled>(row, column % kSwizzled)), source + (there ? column : 0),
                 there ? 16 : 0);
  }
  cp_async_commit();
  cp_async_wait<0>();
  fence_async();
  sync_named(1 + group, 128);

  Accumulator<Keys> s;
  Accumulator<D> out;
  Fragments<Keys> weights;
  float top[2] = {-kInfinity, -kInfinity}, sum[2] = {0.0f, 0.0f}, shrinks[2];
  const float factor = Scaled ? 1.0f : p.scale * kUnit<T>;
  FXA_UNROLL
  for (int i = 0; i < D / 2; ++i) out[i / 4][i % 4] = 0.0f;

  const uint64_t query_operand = matrix_descriptor(queries.address(), 16);
  const auto slot_of = [&](const auto& at) { return ring.at(at.slot * Tile::kSlot); };
  const auto multiply_keys = [&] {
    mbarrier_wait(full.at(place.slot), place.parity);
    wgmma_fence(s);
    const uint64_t keys = matrix_descriptor(slot_of(place).address(), 16);
    FXA_UNROLL
    for (int step = 0; step < D / 16; ++step) {
      const int panel = step / 4, inside = step % 4 * 32;
      wgmma_rows<T>(s, moved(query_operand, panel * 64 * kSwizzledBytes + inside),
                    moved(keys, panel * kPanel * 2 + inside), step > 0);
    }
    wgmma_commit();
  };
  const auto multiply_values = [&](const auto& at) {
    mbarrier_wait(full.at(at.slot), at.parity);
    wgmma_fence(out, weights);
    const uint64_t values = matrix_descriptor(slot_of(at).address(), kPanel * 2);
    FXA_UNROLL
    for (int step = 0; step < Keys / 16; ++step) {
      wgmma_depth<T>(out, weights, step, moved(values, step * 16 * kSwizzledBytes));
    }
    wgmma_commit();
  };
  const auto release = [&](const auto& at) {
    if (lane_index() == 0) mbarrier_arrive(empty.at(at.slot));
  };
  const auto round_weights = [&] {
    FXA_UNROLL
    for (int i = 0; i < Keys / 4; ++i) weights[i / 4][i % 4] = pack<T>(s[i / 2][i % 2 * 2], s[i / 2][i % 2 * 2 + 1]);
  };

  if (tiles > 0) {
    multiply_keys();
    wgmma_wait<0>(s);
    release(place);
    place.advance();
    const int left = theirs.count - (tiles - 1) * Keys;
    if constexpr (Scaled) scale_scores<T>(p, s.all(), nullptr);
    if (left < Keys) {
      FXA_UNROLL
      for (int i = 0; i < Keys / 2; ++i) {
        if (column_of(i / 4, i % 4) >= left) s[i / 4][i % 4] = -kInfinity;
      }
      auto at = place;  // of V0
      if (tiles > 1) at.advance();
      mbarrier_wait(full.at(at.slot), at.parity);
      const Shared<T> values = slot_of(at);
      const int pieces = (Keys - left) * (kSwizzled / 8);
      for (int i = thread_index(); i < kPanels * pieces; i += groups * 128) {
        values.template store_as<U4>(i / pieces * kPanel + left * kSwizzled + i % pieces * 8, U4{0, 0, 0, 0});
      }
      fence_async();
      sync_named(8, groups * 128);
    }
    soften<T>(s.all(), factor, top, sum, shrinks);
    round_weights();
  }
  FXA_NO_UNROLL
  for (int i = 1; i < tiles; ++i) {
    multiply_keys();
    const auto keys = place;
    place.advance();
    multiply_values(place);
    wgmma_wait<1>(s);
    if constexpr (Scaled) scale_scores<T>(p, s.all(), nullptr);
    soften<T>(s.all(), factor, top, sum, shrinks);
    if (lane_index() == 0) mbarrier_arrive_after(empty.at(keys.slot), sum[0] + sum[1]);
    wgmma_wait<0>(out, weights);
    release(place);
    place.advance();
    shrink_rows(out.all(), shrinks);
    round_weights();
  }
  if (tiles > 0) {
    multiply_values(place);
    wgmma_wait<0>(out, weights);
  }

  const int heads = p.kv_heads * p.group;
  FXA_UNROLL
  for (int half = 0; half < 2; ++half) {
    const float total = quad_sum(sum[half]);
    const int i = warp_index() * 16 + lane_index() / 4 + 8 * half;
    if (i >= rows) continue;
    const int64_t row = query_row(i), head = head_of(i);
    if (lane_index() % 4 == 0) store_global(p.lse + head * p.rows_q + row, lse_of<T>(top[half], total));
    store_row(static_cast<T*>(p.out) + (row * heads + head) * p.value_dim, out.all(), half,
              total == 0.0f ? 1.0f : 1.0f / total, p.value_dim);
  }
}

// Whether the kernel takes a problem, whatever the device; of its sequences it leaves some. Narrow heads would waste
// half of each product; those, keys behind an index, ranges and biases are for attention_fwd.cuh.
template <class T>
bool fits_wgmma(const AttentionKernelParams& p) {
  const int widest = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
  const auto steps = [](int64_t n, int64_t stride) { return n == 1 || stride > 0; };
  return sizeof(T) == 2 && p.aligned && widest > 32 && widest <= 128 && p.index_k == nullptr && p.kv_range == nullptr &&
         p.key_bias == nullptr && static_cast<int64_t>(p.slots_q) * p.group > kFewRows && steps(p.rows_k, p.key_row) &&
         steps(p.rows_k, p.value_row) && steps(p.kv_heads, p.key_head) && steps(p.kv_heads, p.value_head);
}

template <class T, int D, int Rows, int Keys, bool Scaled, class Launch>
void run_wgmma(const AttentionKernelParams& p, Launch launch) {
  using Tile = WgmmaTile<D, Rows, Keys>;
  const auto map = [&](const void* base, int width, int64_t row, int64_t head) {
    return launch.tensor_map(RowsTile{base, width, p.rows_k, p.kv_heads, row, head, Keys});
  };
  const KeyMaps maps{map(p.key, p.head_dim, p.key_row, p.key_head),
                     map(p.value, p.value_dim, p.value_row, p.value_head)};
  launch(attention_forward_wgmma_kernel<T, D, Rows, Keys, Scaled>,
         tile_count(p.slots_q, p.batch, p.group, Rows) * p.kv_heads, 1, Tile::kThreads, Tile::kSharedBytes, p, maps);
}

template <class T, class Launch>
void run_forward_wgmma(const AttentionKernelParams& p, Launch launch) {
  const bool scaled = scales_scores(p);
  if (p.head_dim <= 64 && p.value_dim <= 64) {
    scaled ? run_wgmma<T, 64, 128, 128, true>(p, launch) : run_wgmma<T, 64, 128, 128, false>(p, launch);
  } else {
    scaled ? run_wgmma<T, 128, 128, 128, true>(p, launch) : run_wgmma<T, 128, 128, 128, false>(p, launch);
  }
}

}  // namespace fastxattn::attention
