// Attention forward for compute capability 8.0: one block of rows against its sequence's keys with an online softmax
// (Dao, FlashAttention-2, 2023), and the merge of chunks of keys (Flash-Decoding) in key order, so that the result does
// not depend on which chunk finishes first.
#pragma once

#include "attention/attention_tiles.cuh"

namespace fastxattn::attention {

// Rows per block, keys per tile: two stages of keys and values beside the queries fit the 99 KiB of every device. A
// tile of 16 rows has one warp to copy all keys, and hardly more shared memory.
template <class T, int D>
struct ForwardTile {
  static constexpr int kRows = 64;
  static constexpr int kKeys = sizeof(T) == 4 ? (D > 64 ? 16 : 32) : (D > 128 ? 32 : 64);
};

template <class T, int D, int Rows, int Keys>
constexpr int forward_shared_bytes() {
  return (Rows + 4 * Keys) * D * static_cast<int>(sizeof(T)) + 32;
}

// What the blocks of a launch are for, kv_heads of them each: `tiles` of rows against all keys, then the chunks of keys
// that are cut, whose rows fit in one tile.
struct ForwardWork {
  int tiles;
  // Instead of a tile, a sequence of at most kFewRows; longer ones are another launch's (attention_wgmma.cuh).
  bool few;
};

// Blocks of 2 Rows threads: a warp for 16 rows. Rich: is_rich of attention_select.cuh.
template <class T, int D, int Rows, int Keys, bool Rich>
FXA_KERNEL(2 * Rows, 1)
attention_forward_kernel(FXA_PARAMS AttentionKernelParams p, FXA_PARAMS ForwardWork work) {
  constexpr int kThreads = 2 * Rows, kStep = Operand<T>::kStep, kTile = Keys * D * static_cast<int>(sizeof(T));
  constexpr bool kHoldQueries = sizeof(T) == 2 && D <= 128;  // in registers
  const Shared<T> queries = shared_memory<T>(0);
  const Shared<T> key_tiles = shared_memory<T>(Rows * D * static_cast<int>(sizeof(T)));
  const Shared<T> value_tiles = key_tiles.at(2 * Keys * D);
  const Shared<int> scratch = shared_memory<int>(Rows * D * static_cast<int>(sizeof(T)) + 4 * kTile);

  static_assert(Rows == kCutRows);
  const int kv_head = block_index() % p.kv_heads, item = block_index() / p.kv_heads;
  const bool cut = item >= work.tiles;
  const int place = item - work.tiles;  // of a chunk
  const TileOf tile = cut        ? TileOf{find_cut(p, place), 0}
                      : work.few ? TileOf{item, 0}
                                 : find_sequence(p.cu_q, p.batch, item, p.group, Rows);
  const Span mine = find_span(p.cu_q, p.used_q, p.slots_q, tile.sequence);
  const Span theirs = find_span(p.cu_k, p.used_k, p.slots_k, tile.sequence);
  const int all_rows = mine.count * p.group, first_row = tile.number * Rows, rows = minimum(all_rows - first_row, Rows);
  if (tile.number < 0 || rows <= 0 || cut != is_cut(p, all_rows, theirs.count) ||
      (!cut && work.few && all_rows > kFewRows))
    return;
  int low = 0, high = theirs.count;
  if (cut) {
    const int chunk = chunk_keys(theirs.count, Keys);
    low = (place - theirs.first / kChunkKeys) * chunk;
    if (low < 0 || low >= high) return;
    high = minimum(low + chunk, high);
  }

  // A row of the block is a (query, head) pair; this thread holds two of them in its accumulators.
  const auto query_row = [&](int i) { return find_row(p.index_q, mine.first + (first_row + i) / p.group, p.rows_q); };
  const auto head_of = [&](int i) { return kv_head * p.group + (first_row + i) % p.group; };
  const int warp_row = warp_index() * 16;
  const bool active = warp_row < rows;
  int my_row[2], my_head[2];
  bool there[2];
  Range range[2];
  FXA_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int i = warp_row + lane_index() / 4 + 8 * half;
    there[half] = i < rows;
    my_row[half] = query_row(there[half] ? i : 0);
    my_head[half] = head_of(there[half] ? i : 0);
    range[half] = Rich ? find_range(p.kv_range, my_row[half], theirs.count) : Range{0, theirs.count};
  }
  Window window{0, theirs.count, 0, theirs.count};
  if constexpr (Rich) {
    // Kept out of the registers, which the sums fill: what only the end needs.
    if (thread_index() == 0) {
      scratch.store(4, mine.first);
      scratch.store(5, first_row);
      scratch.store(6, rows);
    }
    window = find_window(scratch, range, there, theirs.count);
    low = maximum(low, window.low / Keys * Keys);
    high = minimum(high, window.high);
  }

  const T* key_base = static_cast<const T*>(p.key) + kv_head * p.key_head;
  const T* value_base = static_cast<const T*>(p.value) + kv_head * p.value_head;
  const auto load_keys = [&](int first, int stage) {
    const int count = theirs.count - first, slot = theirs.first + first;
    load_rows<T, D, Keys, kThreads>(key_tiles.at(stage * Keys * D), count, p.head_dim, p.aligned,
                                    {key_base, p.key_row, p.index_k, slot, p.rows_k});
    load_rows<T, D, Keys, kThreads>(value_tiles.at(stage * Keys * D), count, p.value_dim, p.aligned,
                                    {value_base, p.value_row, p.index_k, slot, p.rows_k});
    cp_async_commit();
  };

  load_tile<T, D, Rows, kThreads>(queries, rows, p.head_dim, p.aligned, [&](int i) {
    return static_cast<const T*>(p.query) + query_row(i) * p.query_row + head_of(i) * p.query_head;
  });
  if (low < high) load_keys(low, 0);
  cp_async_commit();
  Operand<T> held[kHoldQueries ? D / kStep : 1];
  if constexpr (kHoldQueries) {
    cp_async_wait<0>();
    sync_threads();
    FXA_UNROLL
    for (int step = 0; step < D / kStep; ++step) held[step].template load<D>(queries, warp_row, step * kStep);
  }
  const auto query_operand = [&](int step) {
    if constexpr (kHoldQueries) return held[step];
    Operand<T> a;
    a.template load<D>(queries, warp_row, step * kStep);
    return a;
  };

  float acc[D / 8][4] = {};
  float top[2] = {-kInfinity, -kInfinity}, sum[2] = {0.0f, 0.0f};  // sum: of this lane's columns
  const float factor = Rich ? 1.0f : p.scale * kUnit<T>;           // from products to units

  const auto step = [&](int first, int stage, auto masked, bool bad) {
    const Shared<T> values = value_tiles.at(stage * Keys * D);
    float s[Keys / 8][4] = {};
    multiply_rows<T, D, Keys>(s, query_operand, key_tiles.at(stage * Keys * D));
    if constexpr (Rich) {
      scale_scores<T>(p, s, nullptr);
      if (p.key_bias != nullptr) add_key_bias<T>(p, theirs, first, my_head, s);
    }
    if constexpr (Rich || masked.value) {
      FXA_UNROLL
      for (int i = 0; i < Keys / 2; ++i) {
        const int key = first + column_of(i / 4, i % 4);
        if (!(Rich ? range[i % 4 / 2].sees(key) : key < theirs.count)) s[i / 4][i % 4] = -kInfinity;
      }
    }
    float shrinks[2];
    soften<T>(s, factor, top, sum, shrinks);
    shrink_rows(acc, shrinks);
    if (Rich && bad) {
      multiply_depth_guarded<T, D, Keys, D>(acc, s, values, bad_rows<T, D, Keys>(values),
                                            [&](int half, int k) { return range[half].sees(first + k); });
    } else {
      multiply_depth<T, D, Keys, D>(acc, s, values);
    }
  };

  int stage = 0;
  FXA_NO_UNROLL
  for (int first = low; first < high; first += Keys, stage ^= 1) {
    const bool whole = Rich ? first >= window.all_low && first + Keys <= window.all_high : first + Keys <= theirs.count;
    cp_async_wait<0>();
    bool bad = false;
    if constexpr (Rich) {
      bad = sync_threads_or(!whole && loaded_bad<T, D, Keys, kThreads>(value_tiles.at(stage * Keys * D), p.aligned));
    } else {
      sync_threads();
    }
    if (first + Keys < high) load_keys(first + Keys, stage ^ 1);
    if (!active) continue;
    if (!Rich && whole) {
      step(first, stage, std::false_type{}, false);
    } else {
      step(first, stage, std::true_type{}, bad);
    }
  }
  if (!active) return;

  const int heads = p.kv_heads * p.group;
  FXA_UNROLL
  for (int half = 0; half < 2; ++half) {
    const float total = quad_sum(sum[half]);
    const int i = warp_row + lane_index() / 4 + 8 * half;
    if (i >= (Rich ? scratch.load(6) : rows)) continue;
    const float lse = lse_of<T>(top[half], total);
    const float inverse = total == 0.0f ? 1.0f : 1.0f / total;
    const int from = (Rich ? scratch.load(5) : first_row) + i, slot = (Rich ? scratch.load(4) : mine.first);
    const int64_t row = find_row(p.index_q, slot + from / p.group, p.rows_q), head = kv_head * p.group + from % p.group;
    if (cut) {
      const int64_t part = (static_cast<int64_t>(place) * p.kv_heads + kv_head) * p.part_rows + i;
      if (lane_index() % 4 == 0) store_global(p.part_lse + part, lse);
      store_row(p.part_out + part * p.value_dim, acc, half, inverse, p.value_dim);
    } else {
      if (lane_index() % 4 == 0) store_global(p.lse + head * p.rows_q + row, lse);
      store_row(static_cast<T*>(p.out) + (row * heads + head) * p.value_dim, acc, half, inverse, p.value_dim);
    }
  }
}

// Out and lse of rows whose keys are cut from their chunks, in key order. Grid: (chunks * kv_heads), 128 threads; the
// blocks of a sequence's places share its rows, a warp takes one at a time. `tile`: the keys per tile of forward.
template <class T>
FXA_KERNEL(128, 1)
attention_merge_kernel(FXA_PARAMS AttentionKernelParams p, int key_tile) {
  const int kv_head = block_index() % p.kv_heads, place = block_index() / p.kv_heads, sequence = find_cut(p, place);
  const Span mine = find_span(p.cu_q, p.used_q, p.slots_q, sequence);
  const Span theirs = find_span(p.cu_k, p.used_k, p.slots_k, sequence);
  const int rows = mine.count * p.group, first_place = theirs.first / kChunkKeys, share = place - first_place;
  if (share < 0 || !is_cut(p, rows, theirs.count) || share >= chunk_places(theirs.count)) return;
  const int chunk = chunk_keys(theirs.count, key_tile), chunks = (theirs.count + chunk - 1) / chunk;
  const int64_t heads = p.kv_heads * p.group;
  for (int i = 4 * share + warp_index(); i < rows; i += 4 * chunk_places(theirs.count)) {
    const int64_t row = find_row(p.index_q, mine.first + i / p.group, p.rows_q), head = kv_head * p.group + i % p.group;
    const auto part = [&](int c) {
      return (static_cast<int64_t>(first_place + c) * p.kv_heads + kv_head) * p.part_rows + i;
    };
    const auto part_lse = [&](int c) { return load_global(p.part_lse + part(c)); };
    float top = -kInfinity;
    for (int c = 0; c < chunks; ++c) top = maximum(top, part_lse(c));
    const float base = top == -kInfinity ? 0.0f : top;
    float total = 0.0f;
    for (int c = 0; c < chunks; ++c) total += power<float>(part_lse(c) - base);
    if (lane_index() == 0) {
      store_global(p.lse + head * p.rows_q + row, total == 0.0f ? -kInfinity : top + accurate_log(total));
    }
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    for (int column = lane_index(); column < p.value_dim; column += 32) {
      float sum = 0.0f;
      for (int c = 0; c < chunks; ++c) {
        const float x = load_global(p.part_out + part(c) * p.value_dim + column);
        sum = fused(x, power<float>(part_lse(c) - base), sum);
      }
      store_global(static_cast<T*>(p.out) + (row * heads + head) * p.value_dim + column, from_float<T>(sum * inverse));
    }
  }
}

}  // namespace fastxattn::attention
