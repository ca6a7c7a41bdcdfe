// Best matches between every token of one set and a set of the other side, both directions from one pass.
#pragma once

#include "core/cuda_tile.cuh"
#include "late_interaction/late_interaction_cuda.h"

namespace fastxattn::gpu {

// One pair of sets: tokens [r0, r1) of `rows` against [c0, c1) of `columns`. With `columns_too` the columns' best
// matches come from the same products; `row_is_a` says which side the rows are.
template <class T>
FXA_DEVICE void best_matches(const LateInteractionCuda& p, bool row_is_a, int n, int m, bool columns_too) {
  const TokenSide& rows = row_is_a ? p.a : p.b;
  const TokenSide& columns = row_is_a ? p.b : p.a;
  const int row_set = row_is_a ? n : m, column_set = row_is_a ? m : n;
  const int r0 = load_global(rows.cu + row_set), r1 = load_global(rows.cu + row_set + 1);
  const int c0 = load_global(columns.cu + column_set), c1 = load_global(columns.cu + column_set + 1);
  const int t = thread_index(), lane = lane_index(), warp = warp_index();
  const Shared<T> stages = shared_memory<T>(0);
  const Shared<float> values = shared_memory<float>(kTileShared<T>);                  // [2][64] of a tile's rows
  const Shared<int> places = shared_memory<int>(kTileShared<T> + 2 * kTileRows * 4);  // [2][64]
  const Shared<float> column_values = shared_memory<float>(kTileShared<T> + 4 * kTileRows * 4);
  const Shared<int> column_places = shared_memory<int>(kTileShared<T> + 4 * kTileRows * 4 + kMaxSimColumns * 4);

  float sum = 0.0f;  // of the rows that this thread finishes
  for (int r = r0; r < r1; r += kTileRows) {
    const TileRows<T> left{static_cast<const T*>(rows.data), p.d, nullptr, r, minimum(r1 - r, kTileRows)};
    Candidate<true> best[2];
    for (int c = c0; c < c1; c += kTileRows) {
      const TileRows<T> right{static_cast<const T*>(columns.data), p.d, nullptr, c, minimum(c1 - c, kTileRows)};
      float sums[4][4];
      tile_product<T>(left, right, p.d, p.aligned, stages, sums);
      FXA_UNROLL
      for (int i = 0; i < 4; ++i) {
        FXA_UNROLL
        for (int e = 0; e < 4; ++e) {
          const int j = tile_column(i, e);
          if (j < right.count) best[e / 2].consider(sums[i][e], c - c0 + j);
        }
      }
      if (!columns_too) continue;
      // Down the columns: within a thread, across the 8 lanes of a column, across the 4 warps.
      FXA_UNROLL
      for (int i = 0; i < 4; ++i) {
        FXA_UNROLL
        for (int e = 0; e < 2; ++e) {
          Candidate<true> top;
          FXA_UNROLL
          for (int h = 0; h < 2; ++h) {
            if (tile_row(h * 2) < left.count) top.consider(sums[i][h * 2 + e], r - r0 + tile_row(h * 2));
          }
          for (int d = 4; d < 32; d *= 2) top.consider(shuffle_xor(top.value, d), shuffle_xor(top.place, d));
          if (lane < 4) {
            const int at = warp % 4 * kTileRows + tile_column(i, e);
            stages.template as<float>().store(at, top.value);
            stages.template as<int>().store(4 * kTileRows + at, top.place);
          }
        }
      }
      sync_threads();
      if (t < right.count) {
        const int at = c - c0 + t;
        Candidate<true> top;
        if (r > r0) top.value = column_values.load(at), top.place = column_places.load(at);
        for (int w = 0; w < 4; ++w) {
          top.consider(stages.template as<float>().load(w * kTileRows + t),
                       stages.template as<int>().load((4 + w) * kTileRows + t));
        }
        column_values.store(at, top.value);
        column_places.store(at, top.place);
      }
      sync_threads();
    }
    for (int h = 0; h < 2; ++h) {
      best[h].reduce_row();
      if (lane % 4 == 0) {
        values.store(warp / 4 * kTileRows + tile_row(h * 2), best[h].value);
        places.store(warp / 4 * kTileRows + tile_row(h * 2), best[h].place);
      }
    }
    sync_threads();
    if (t < left.count) {
      Candidate<true> top;
      top.value = values.load(t), top.place = places.load(t);
      top.consider(values.load(kTileRows + t), places.load(kTileRows + t));
      if (top.place >= 0) sum += top.value;
      if (rows.best != nullptr) {
        store_global(rows.best + static_cast<int64_t>(r + t) * columns.sets + column_set, top.place);
      }
    }
    sync_threads();
  }

  // Sums in one fixed order: each thread's, then the threads' as a tree.
  const auto finish = [&](float part, float* to) {
    for (int d = 16; d > 0; d /= 2) part += shuffle_xor(part, d);
    if (lane == 0) values.store(warp, part);
    sync_threads();
    if (t == 0) {
      float all = 0.0f;
      for (int w = 0; w < kTileThreads / 32; ++w) all += values.load(w);
      store_global(to + static_cast<int64_t>(n) * p.b.sets + m, all);
    }
    sync_threads();
  };
  if (rows.best_sum != nullptr) finish(sum, rows.best_sum);
  if (columns_too) {
    float other = 0.0f;
    for (int c = c0 + t; c < c1; c += kTileThreads) {
      const int place = r1 > r0 ? column_places.load(c - c0) : -1;
      if (place >= 0) other += column_values.load(c - c0);
      if (columns.best != nullptr) store_global(columns.best + static_cast<int64_t>(c) * rows.sets + row_set, place);
    }
    finish(other, columns.best_sum);
  }
}

template <class T>
FXA_KERNEL(kTileThreads, 2)
maxsim_kernel(FXA_PARAMS LateInteractionCuda p) {
  const int n = block_index() / p.b.sets, m = block_index() % p.b.sets;
  const bool from_a = p.a.best_sum != nullptr, from_b = p.b.best_sum != nullptr;
  const int length_b = load_global(p.b.cu + m + 1) - load_global(p.b.cu + m);
  const bool one_pass = from_a && from_b && length_b <= kMaxSimColumns;
  if (from_a) best_matches<T>(p, true, n, m, one_pass);
  if (from_b && !one_pass) best_matches<T>(p, false, n, m, false);
}

}  // namespace fastxattn::gpu
